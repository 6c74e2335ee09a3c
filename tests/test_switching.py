"""What a switch costs: in place, nothing done twice, weights kept ready, and where the bank is."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

import emr_hf
from emr_hf import bank, bits, ready, switching
from emr_hf.errors import OptionError, UnknownTaskError
from tests import HANGS, tiny

TASKS = ["glue/sst2", "mnli.v1", "items"]


def load(repo, **options):
    return AutoModelForSequenceClassification.from_pretrained(repo, **options).eval()


@pytest.fixture
def model(bert_repo):
    return load(bert_repo)


@pytest.fixture(scope="module")
def expected(bert_repo):
    """Task -> the weights that it has."""
    model = load(bert_repo)
    return {task: weights(model.set_task(task)) for task in TASKS}


def weights(model):
    return {name: value.clone() for name, value in model.model.named_parameters()}


def assert_task(model, task, expected, dtype=torch.float32):
    assert model.active_task == task
    found = dict(model.model.named_parameters())
    for name, value in expected[task].items():
        assert torch.equal(found[name], value.to(dtype)), name


def test_switches_shared_out_to_threads_are_the_same(model, expected, monkeypatch):
    monkeypatch.setattr(switching, "_SHARED_OUT", 0)
    monkeypatch.setattr(switching, "_PIECE", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for task in (*TASKS, TASKS[0]):
        assert_task(model.set_task(task), task, expected)


def test_addresses_stay(model):
    before = [parameter.data_ptr() for parameter in model.model.bert.parameters()]
    for task in TASKS:
        model.set_task(task)
    assert [parameter.data_ptr() for parameter in model.model.bert.parameters()] == before


@pytest.fixture
def still(bert_inputs, tmp_path):
    """A repo of which the last task alone moves the embedding, its name, and the base's value of it."""
    name = "bert.embeddings.word_embeddings.weight"
    base = load_file(bert_inputs.base / "model.safetensors")
    value = next(value for stored, value in base.items() if name.endswith(stored))
    finetunes = {task: BertForSequenceClassification.from_pretrained(f) for task, f in bert_inputs.finetunes.items()}
    for task in TASKS[:2]:
        finetunes[task].get_parameter(name).data.copy_(value)
    emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "out")
    return tmp_path / "out", name, value


def test_what_no_finetune_moved_is_not_rebuilt(still, monkeypatch):
    repo, name, base = still
    model = load(repo, emr_task=TASKS[0])
    embedding, others = model.model.get_parameter(name), len(model.config.merged_parameters) - 1
    rebuilt = []
    rebuild = bits.rebuild
    monkeypatch.setattr(bits, "rebuild", lambda *args, **kwargs: rebuilt.append(1) or rebuild(*args, **kwargs))
    written = embedding._version
    model.set_task(TASKS[1])
    assert (len(rebuilt), embedding._version) == (others, written)
    model.set_task(TASKS[2])
    assert len(rebuilt) == 2 * others + 1
    assert not torch.equal(embedding, base)
    model.set_task(TASKS[0])
    assert torch.equal(embedding, base)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_interrupted_switch_is_made_good(still, monkeypatch, at):
    repo, name, base = still
    model = load(repo, emr_task=TASKS[2])
    expected = {task: weights(model.set_task(task)) for task in TASKS}
    calls = []
    rebuild, copy_ = bits.rebuild, torch.Tensor.copy_

    def interrupted(function, *args):
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt
        return function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(bits, "rebuild", lambda *args: interrupted(rebuild, *args))
        patch.setattr(torch.Tensor, "copy_", lambda *args: interrupted(copy_, *args))
        with pytest.raises(KeyboardInterrupt):
            model.set_task(TASKS[0])
    assert_task(model.set_task(TASKS[0]), TASKS[0], expected)


def test_masks_loaded_later_are_looked_at_again(bert_repo, model, expected):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    empty = {name: torch.zeros_like(value) if ".mask." in name else value for name, value in state.items()}
    model.load_state_dict(empty)
    base = {name: value for name, value in weights(model).items() if "bert" in name}
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in base.items())
    model.load_state_dict(state)
    assert_task(model, TASKS[0], expected)


def test_a_backward_through_weights_that_were_switched_away_is_an_error(bert_repo):
    model = load(bert_repo)
    inject_adapter_in_model(LoraConfig(target_modules=["query"]), model.model)
    loss = model(input_ids=torch.randint(5, 90, (2, 7))).logits.sum()
    model.set_task(TASKS[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Weights of several tasks


@pytest.mark.parametrize("count", [2, 3, 5])
def test_ready_tasks_are_the_same(model, expected, count):
    model.keep_ready(count)
    for task in [*TASKS, *reversed(TASKS), TASKS[1], TASKS[0]]:
        assert_task(model.set_task(task), task, expected)


def test_a_ready_task_costs_no_rebuild_and_the_least_used_makes_room(model, monkeypatch):
    rebuilt = []
    rebuild = bits.rebuild
    monkeypatch.setattr(bits, "rebuild", lambda *args, **kwargs: rebuilt.append(1) or rebuild(*args, **kwargs))
    every = len(model.config.merged_parameters)

    def cost(task):
        rebuilt.clear()
        model.set_task(task)
        return len(rebuilt) // every

    model.keep_ready(2)
    assert [cost(TASKS[i]) for i in (1, 0, 1, 2, 1, 0)] == [1, 0, 0, 1, 0, 1]
    model.keep_ready(1)
    before = model.model.bert.pooler.dense.weight.data_ptr()
    assert cost(TASKS[2]) == 1
    assert model.model.bert.pooler.dense.weight.data_ptr() == before


def test_a_prefetched_task_is_there(model, expected, monkeypatch):
    started, go = threading.Event(), threading.Event()
    rebuild = bits.rebuild

    def slow(*args, **kwargs):
        started.set()
        assert go.wait(HANGS)
        return rebuild(*args, **kwargs)

    model.keep_ready(2)
    monkeypatch.setattr(bits, "rebuild", slow)
    model.prefetch(TASKS[2])
    assert started.wait(HANGS)
    assert_task(model, TASKS[0], expected)  # while the other is in the making
    go.set()
    assert_task(model.set_task(TASKS[2]), TASKS[2], expected)
    monkeypatch.setattr(bits, "rebuild", None)
    assert_task(model.set_task(TASKS[0]), TASKS[0], expected)  # the active one was not overwritten


def test_many_prefetches_and_switches_at_once(model, expected):
    model.keep_ready(2)
    for i in range(30):
        model.prefetch(TASKS[i % 3])
        model.prefetch(TASKS[(i + 1) % 3])
        task = TASKS[(i * 2) % 3]
        assert_task(model.set_task(task), task, expected)


def test_ready_tasks_among_everything_else(model, expected, bert_repo, tmp_path):
    inputs = {"input_ids": torch.randint(5, 90, (3, 7))}
    plain = model(**inputs, emr_task=[TASKS[0], "__base__", TASKS[2]]).logits
    model.keep_ready(2)
    mixed = model(**inputs, emr_task=[TASKS[0], "__base__", TASKS[2]]).logits
    assert all(torch.equal(*pair) for pair in zip(mixed, plain))
    assert_task(model, TASKS[0], expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for task in TASKS:
            assert_task(other.set_task(task), task, expected)
    model.set_task(TASKS[1]).save_pretrained(tmp_path / "again")
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", bert_repo))
    assert all(torch.equal(again[name], first[name]) for name in first)
    model.load_state_dict(model.state_dict())
    for task in (*TASKS, TASKS[0]):
        assert_task(model.set_task(task), task, expected)
    model.to(torch.float64).to(torch.float32)
    for task in (*TASKS, TASKS[0]):
        assert_task(model.set_task(task), task, expected)


def test_ready_after_a_cast(bert_repo):
    narrow = load(bert_repo, dtype=torch.bfloat16)
    model = load(bert_repo).keep_ready(2).set_task(TASKS[1]).to(torch.bfloat16)
    for task in (TASKS[1], TASKS[0], TASKS[2]):
        assert all(
            torch.equal(*pair)
            for pair in zip(model.set_task(task).model.parameters(), narrow.set_task(task).model.parameters())
        )


def test_what_cannot_be_kept_ready(model):
    with pytest.raises(OptionError, match="at least 1"):
        model.keep_ready(0)
    with pytest.raises(OptionError, match="keep_ready"):
        model.prefetch(TASKS[1])
    with pytest.raises(UnknownTaskError, match="items"):
        model.keep_ready(2).prefetch("item")


# Where the bank is


def test_a_mapped_model_is_the_same_and_leaves_its_files_alone(bert_repo, expected, tmp_path):
    model = load(bert_repo, emr_memory="mapped")
    before = (bert_repo / "model.safetensors").read_bytes()
    for task in (*TASKS, TASKS[0]):
        assert_task(model.set_task(task), task, expected)
    model.save_pretrained(tmp_path / "again")
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", bert_repo))
    assert all(torch.equal(again[name], first[name]) for name in first)
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items() if "pooler" in name}, False)
    with pytest.raises(OptionError, match="mapped from"):
        model.save_pretrained(bert_repo)
    assert (bert_repo / "model.safetensors").read_bytes() == before


def test_a_mapped_model_copies_nothing_but_the_active_weights(bert_repo):
    resident, mapped = load(bert_repo), load(bert_repo, emr_memory="mapped")
    pages = mapped_ranges(bert_repo / "model.safetensors")
    for model, expected in ((mapped, True), (resident, False)):
        for name in ("base", "tau"):
            for tensor in getattr(model.emr, name)._buffers.values():
                assert any(start <= tensor.data_ptr() < stop for start, stop in pages) is expected
        for parameter in model.model.bert.parameters():
            assert not any(start <= parameter.data_ptr() < stop for start, stop in pages)


def mapped_ranges(path):
    lines = open("/proc/self/maps").read().splitlines()
    found = [line.split()[0].split("-") for line in lines if line.endswith(str(path.resolve()))]
    return [(int(start, 16), int(stop, 16)) for start, stop in found]


def test_a_resident_model_does_not_need_its_files(bert_repo, expected, tmp_path):
    stored = load_file(bert_repo / "model.safetensors")
    for file in bert_repo.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = load(tmp_path)
    save_file({name: torch.zeros_like(value) for name, value in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    for task in (*TASKS, TASKS[0]):
        assert_task(model.set_task(task), task, expected)


def test_a_bank_that_stays_follows_a_cast_only(bert_repo):
    model = load(bert_repo, emr_device="cpu")
    before = {name: value.clone() for name, value in model.emr.named_buffers()}
    model.emr.to("meta", torch.bfloat16)
    for name, value in model.emr.named_buffers():
        assert value.device.type == "cpu"
        assert value.dtype == (torch.bfloat16 if name.startswith("base.") else before[name].dtype)
        assert torch.equal(value, before[name].to(value.dtype))


def test_an_unknown_place_is_an_error(bert_repo):
    with pytest.raises(OptionError, match="emr_memory='disk'.*resident, mapped"):
        load(bert_repo, emr_memory="disk")
    with pytest.raises(OptionError, match="emr_device='banana'"):
        load(bert_repo, emr_device="banana")


# Interruptions


class Interrupted(BaseException):
    """Ctrl-C, at a chosen moment."""


def interrupt_at(monkeypatch, owner, name, count):
    """Let the n-th call of a function raise in its place."""
    function, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(name)
        if len(calls) == count:
            raise Interrupted
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("memory", ["resident", "mapped"])
@pytest.mark.parametrize(
    "point", [("rebuild", 1), ("rebuild", 20), ("follow_labels", 1), ("use_generation_config", 1)]
)
def test_the_call_after_an_interrupted_switch_is_on_the_whole_task(bert_repo, monkeypatch, memory, point):
    inputs = tiny.BERT.inputs()
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="items", emr_memory=memory).eval()
    with torch.no_grad():
        expected = {task: model(**inputs, emr_task=task).logits for task in ("mnli.v1", "items")}
        for again in (lambda: model(**inputs).logits, lambda: model.set_task("mnli.v1")(**inputs).logits):
            with monkeypatch.context() as patch:
                interrupt_at(patch, model._switch, *point)
                with pytest.raises(Interrupted):
                    model.set_task("mnli.v1")
            assert model.active_task == "items"
            assert torch.equal(again(), expected[model.active_task])
    assert model.model.num_labels == 3


def test_what_is_read_after_an_interrupted_first_switch_is_right(bert_repo, monkeypatch):
    """The base is taken from the model's own weights at the first switch, which must not lose it."""
    expected = emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="items").model.state_dict()
    for memory in ("resident", "mapped"):
        for owner, count in ((bank._Buffers, 7), (torch, 9)):
            with monkeypatch.context() as patch:
                name = "put" if owner is bank._Buffers else "empty_like"
                activate = emr_hf.EMRMergedModel._activate

                def first(model, task, owner=owner, name=name, count=count, patch=patch, activate=activate):
                    with monkeypatch.context() as inner:
                        interrupt_at(inner, owner, name, count)
                        with suppress(Interrupted):
                            return activate(model, task)

                patch.setattr(emr_hf.EMRMergedModel, "_activate", first)
                model = emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="items", emr_memory=memory)
            assert all(map(torch.equal, model.set_task("items").model.state_dict().values(), expected.values()))


@pytest.mark.parametrize("count", [1, 2, 9])
def test_an_interrupted_keep_ready_or_switch_between_ready_tasks_is_made_whole(bert_repo, monkeypatch, count):
    inputs = tiny.BERT.inputs()
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="items").eval()
    with torch.no_grad():
        expected = {task: model(**inputs, emr_task=task).logits for task in ("mnli.v1", "glue/sst2", "items")}
        with monkeypatch.context() as patch:
            interrupt_at(patch, ready.ReadyTasks, "put", 1)
            with pytest.raises(Interrupted):
                model.keep_ready(2)
        assert torch.equal(model(**inputs).logits, expected["items"])
        model.keep_ready(2)
        for task in ("mnli.v1", "glue/sst2"):
            with monkeypatch.context() as patch:
                interrupt_at(patch, switching.Switch, "_jobs", count)
                with pytest.raises(Interrupted):
                    model.set_task(task)
            assert torch.equal(model(**inputs).logits, expected["items"])
            assert torch.equal(model(**inputs, emr_task=task).logits, expected[task])
            model.set_task("items")


def test_a_load_that_fails_leaves_the_task(bert_repo):
    inputs = tiny.BERT.inputs()
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="items").eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict({"model.bert.pooler.dense.bias": torch.zeros(3)}, strict=False)
        assert torch.equal(model(**inputs).logits, expected)
