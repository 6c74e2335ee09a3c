"""Batches whose rows belong to different tasks, and threads that share a model."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    DynamicCache,
    GenerationConfig,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import emr_hf
from emr_hf import mixed
from tests import HANGS, tiny
from tests.test_pipelines import WORDS, expected_label, pipeline, repo, write_tokenizer  # noqa: F401

SST2, MNLI, ITEMS = "glue/sst2", "mnli.v1", "items"  # 2, 3 and 2 labels
RAGGED = [MNLI, SST2, ITEMS, MNLI, SST2]
EVEN = [ITEMS, SST2, ITEMS, ITEMS, SST2]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model(bert_repo):
    return AutoModelForSequenceClassification.from_pretrained(bert_repo)


def merged(architecture, folder, **options):
    found = next(t for t in tiny.ALL if t.architecture == architecture)
    inputs = tiny.write_inputs(found, folder)
    emr_hf.merge(inputs.base, inputs.finetunes, folder / "out", progress=False, **options)
    return folder / "out"


@pytest.fixture(scope="module")
def gpt2_repo(tmp_path_factory):
    """A repo whose task b generates three tokens, the others as many as they are asked for."""
    folder = tmp_path_factory.mktemp("gpt2")
    inputs = tiny.write_inputs(tiny.GPT2, folder)
    GenerationConfig(max_new_tokens=3, eos_token_id=2, pad_token_id=0).save_pretrained(inputs.finetunes["b"])
    emr_hf.merge(inputs.base, inputs.finetunes, folder / "out", progress=False)
    return folder / "out"


@pytest.fixture(scope="module")
def t5_repo(tmp_path_factory):
    return merged("T5ForConditionalGeneration", tmp_path_factory.mktemp("t5"))


def batch(rows=5, tokens=7):
    return {
        "input_ids": torch.randint(5, 90, (rows, tokens)),
        "attention_mask": (torch.arange(tokens) < torch.randint(3, tokens + 1, (rows, 1))).long(),
    }


def alone(model, inputs, names, field="logits", **options):
    """Each row's output by its own task, one row at a time."""
    rows = []
    for row, name in enumerate(names):
        with model.use_task(name):
            rows.append(model(**{k: v[row : row + 1] for k, v in inputs.items()}, **options)[field][0])
    return rows


def close(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        # Rows alone and rows in a group are batches of two shapes, which processors add up in two orders.
        torch.testing.assert_close(one, other, rtol=1.3e-6, atol=1e-5)


# Forward


@pytest.mark.parametrize(
    "given",
    [
        RAGGED,
        tuple(RAGGED),
        np.array(RAGGED),
        [1, 0, 2, 1, 0],
        torch.tensor([1, 0, 2, 1, 0]),
        torch.tensor([1, 0, 2, 1, 0], dtype=torch.int32),
        np.array([1, 0, 2, 1, 0]),
        [torch.tensor(1), np.int64(0), ITEMS, 1, SST2],
    ],
    ids=lambda given: type(given).__name__,
)
@pytest.mark.parametrize("active", [SST2, MNLI])
def test_a_row_gets_what_its_task_gives_it_alone(model, given, active):
    model.set_task(active)
    inputs = batch()
    output = model(**inputs, emr_task=given)
    assert model.active_task == active
    assert model.config.id2label[0] == f"{active}-0"
    assert type(output).__name__ == "SequenceClassifierOutput"
    assert isinstance(output.logits, list)
    assert [len(row) for row in output.logits] == [3, 2, 2, 3, 2]
    close(output.logits, alone(model, inputs, RAGGED))


def test_heads_of_one_shape_give_one_tensor(model):
    inputs = batch()
    logits = model(**inputs, emr_task=EVEN).logits
    assert logits.shape == (5, 2)
    close(logits, alone(model, inputs, EVEN))


def test_one_task_for_every_row_is_that_task(model):
    inputs = batch()
    expected = model(**inputs, emr_task=MNLI).logits
    model.set_task(SST2)
    assert torch.equal(model(**inputs, emr_task=[MNLI] * 5).logits, expected)
    assert model.active_task == SST2
    one = {name: value[:1] for name, value in inputs.items()}
    close(model(**one, emr_task=[MNLI]).logits, expected[:1])


def test_the_active_task_goes_first_and_every_task_once(model, monkeypatch):
    switches, become = [], model._switch.become
    monkeypatch.setattr(model._switch, "become", lambda task: (switches.append(task), become(task)))
    model.set_task(ITEMS)
    model(**batch(), emr_task=RAGGED)
    assert switches == [ITEMS, MNLI, SST2, ITEMS]
    model(**batch(), emr_task=[ITEMS] * 5)
    assert len(switches) == 4


@pytest.mark.parametrize("base", ["__base__", -1])
def test_the_base_has_the_default_tasks_head(model, base):
    plain = copy.deepcopy(model).merge_and_unload(SST2)
    weights = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    plain.load_state_dict({n: v for n, v in weights.items() if n in plain.state_dict()}, strict=False)
    inputs = batch()
    default = alone(model, inputs, [SST2] * 5)
    model.set_task(MNLI)
    expected = alone(model, inputs, [MNLI] * 5)
    expected[1], expected[3] = plain(**inputs).logits[[1, 3]]
    given = [MNLI, base, MNLI, base, MNLI] if base == "__base__" else torch.tensor([1, -1, 1, -1, 1])
    close(model(**inputs, emr_task=given).logits, expected)
    assert model.active_task == MNLI
    close(model(**inputs).logits, alone(model, inputs, [MNLI] * 5))
    model.set_task(SST2)
    close(model(**inputs, emr_task=[base] * 5).logits, plain(**inputs).logits)
    close(model(**inputs).logits, default)


@pytest.mark.parametrize("names", [RAGGED, EVEN, [SST2] * 5, [MNLI] * 5])
def test_padding_is_to_the_widest_head_of_all_tasks(model, names):
    inputs = batch()
    logits = model(**inputs, emr_task=names, emr_pad=True).logits
    assert logits.shape == (5, 3)
    for found, expected in zip(logits, alone(model, inputs, names)):
        close(found[: len(expected)], expected)
        assert (found[len(expected) :] == float("-inf")).all()
    model.emr_pad = True
    assert torch.equal(model(**inputs, emr_task=names).logits, logits)
    assert isinstance(model(**inputs, emr_task=RAGGED, emr_pad=False).logits, list)
    assert model(**inputs, emr_task=SST2).logits.shape == (5, 2), "one task for all rows is as it was"


def test_what_has_rows_comes_out_in_their_order(bert_repo):
    model = AutoModelForSequenceClassification.from_pretrained(bert_repo, attn_implementation="eager")
    inputs, options = batch(), {"output_hidden_states": True, "output_attentions": True}
    output = model(**inputs, emr_task=RAGGED, **options)
    assert len(output.hidden_states) == 3
    assert output.attentions[0].shape == (5, 4, 7, 7)
    for row, name in enumerate(RAGGED):
        by_itself = model(**{k: v[row : row + 1] for k, v in inputs.items()}, emr_task=name, **options)
        for field in ("hidden_states", "attentions"):
            close([layer[row] for layer in output[field]], [layer[0] for layer in by_itself[field]])


def test_tuples_come_out_of_whom_asks_for_them(model):
    inputs = batch()
    labels = torch.tensor([0, 1, 1, 0, 1])
    whole = model(**inputs, labels=labels, emr_task=EVEN)
    found = model(**inputs, labels=labels, emr_task=EVEN, return_dict=False)
    assert isinstance(found, tuple) and len(found) == 2
    assert torch.equal(found[0], whole.loss) and torch.equal(found[1], whole.logits)
    model.config.return_dict = False
    assert isinstance(model(**inputs, emr_task=EVEN), tuple)


def test_inputs_by_position_and_embeddings(model):
    inputs = batch()
    expected = model(**inputs, emr_task=EVEN).logits
    assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"], emr_task=EVEN).logits, expected)
    with pytest.raises(TypeError, match="multiple values"):
        model(inputs["input_ids"], **inputs, emr_task=EVEN)
    positions = torch.arange(7)[None]
    close(model(**inputs, position_ids=positions, emr_task=EVEN).logits, expected)
    close(model(**inputs, position_ids=positions.repeat(5, 1), emr_task=EVEN).logits, expected)
    embeddings = torch.randn(5, 7, 32)
    rows = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    close(model(**rows, emr_task=RAGGED).logits, alone(model, rows, RAGGED))


def test_a_batch_without_rows_is_the_active_tasks(tmp_path):
    """Where the wrapped model takes such a batch, as most text models do not."""
    model = emr_hf.EMRMergedModel.from_pretrained(merged("ResNetForImageClassification", tmp_path), emr_task="b")
    nothing = torch.zeros(0, 3, 32, 32)
    assert model(pixel_values=nothing, emr_task=[]).logits.shape == (0, 3)
    model.set_task("a")
    assert model(pixel_values=nothing, emr_task=torch.tensor([], dtype=torch.long)).logits.shape == (0, 2)
    assert model(pixel_values=nothing, emr_task=[], emr_pad=True).logits.shape == (0, 3)


@pytest.mark.parametrize(
    "architecture", ["ViTForImageClassification", "ResNetForImageClassification", "GPT2ForSequenceClassification"]
)
def test_other_inputs(architecture, tmp_path):
    model = emr_hf.EMRMergedModel.from_pretrained(merged(architecture, tmp_path))
    found = next(t for t in tiny.ALL if t.architecture == architecture)
    inputs = {name: torch.cat([value, value.flip(-1)]) for name, value in found.inputs().items()}
    names = ["b", "a", "c", "b"]
    close(model(**inputs, emr_task=names).logits, alone(model, inputs, names))


def test_encoder_and_decoder(t5_repo):
    model = AutoModelForSeq2SeqLM.from_pretrained(t5_repo)
    inputs = {**batch(4), "decoder_input_ids": torch.randint(5, 90, (4, 3))}
    names = ["c", "a", "c", "b"]
    output = model(**inputs, emr_task=names)
    close(output.logits, alone(model, inputs, names))
    close(output.encoder_last_hidden_state, alone(model, inputs, names, "encoder_last_hidden_state"))
    assert output.past_key_values is None
    encoded = model.get_encoder()(input_ids=inputs["input_ids"])  # as its type has it: rows inside
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    by_hand = []
    for row, name in enumerate(names):
        part = {k: v[row : row + 1] for k, v in rest.items()}
        hidden = type(encoded)(last_hidden_state=encoded.last_hidden_state[row : row + 1])
        by_hand.append(model(**part, encoder_outputs=hidden, emr_task=name).logits[0])
    close(model(**rest, encoder_outputs=encoded, emr_task=names).logits, by_hand)


def test_no_cache_comes_out(gpt2_repo):
    model = AutoModelForCausalLM.from_pretrained(gpt2_repo)
    inputs = {"input_ids": torch.randint(5, 90, (3, 4))}
    output = model(**inputs, use_cache=True, emr_task=["a", "b", "a"])
    assert output.past_key_values is None
    close(output.logits, alone(model, inputs, ["a", "b", "a"]))
    with pytest.raises(emr_hf.OptionError, match="past_key_values"):
        model(**inputs, past_key_values=DynamicCache(), emr_task=["a", "b", "a"])


# Losses


def test_the_loss_is_the_mean_over_the_batchs_labels(model):
    inputs, labels = batch(), torch.tensor([2, -100, 1, 0, 1])
    output = model(**inputs, labels=labels, emr_task=RAGGED)
    rows = [row for row, label in enumerate(labels) if label >= 0]
    expected = torch.stack([F.cross_entropy(output.logits[row], labels[row]) for row in rows]).mean()
    torch.testing.assert_close(output.loss, expected)
    padded = model(**inputs, labels=labels, emr_task=RAGGED, emr_pad=True)
    torch.testing.assert_close(padded.loss, F.cross_entropy(padded.logits, labels))
    assert model(**inputs, labels=torch.full((5,), -100), emr_task=RAGGED).loss.isnan()
    labels[:] = torch.tensor([-100, 1, 0, -100, 0])
    assert model(**inputs, labels=labels, emr_task=RAGGED).loss.isfinite(), "a group in which nothing counts"
    by_items = model(**inputs, labels=labels, emr_task=EVEN, num_items_in_batch=torch.tensor(6))
    torch.testing.assert_close(by_items.loss * 2, model(**inputs, labels=labels, emr_task=EVEN).loss)


def test_causal_labels_count_after_the_first_token(gpt2_repo):
    model = AutoModelForCausalLM.from_pretrained(gpt2_repo)
    inputs = {"input_ids": torch.randint(5, 90, (4, 6))}
    labels = inputs["input_ids"].clone()
    labels[0, :5], labels[1, 0], labels[2, 2:] = -100, -100, -100
    output = model(**inputs, labels=labels, emr_task=["a", "b", "c", "a"])
    expected = F.cross_entropy(output.logits[:, :-1].reshape(-1, 96), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, expected)


def test_seq2seq_labels_are_all_counted(t5_repo):
    model = AutoModelForSeq2SeqLM.from_pretrained(t5_repo)
    labels = torch.randint(5, 90, (4, 3))
    labels[0, 1:], labels[1, 2] = -100, -100
    output = model(**batch(4), labels=labels, emr_task=["a", "b", "c", "b"])
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.reshape(-1, 96), labels.reshape(-1)))


def test_masked_tokens_are_counted(tmp_path):
    model = emr_hf.EMRMergedModel.from_pretrained(merged("BertForMaskedLM", tmp_path))
    labels = torch.randint(5, 90, (4, 7))
    labels[0, 1:], labels[1, 2] = -100, -100
    output = model(**batch(4), labels=labels, emr_task=["a", "b", "a", "c"])
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.reshape(-1, 96), labels.reshape(-1)))


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_labels_that_are_no_classes_are_counted_by_rows(bert_inputs, tmp_path, kind):
    finetunes = {}
    for index, task in enumerate("abc"):
        settings = {"num_labels": 1 if kind == "regression" else 4, "problem_type": kind}
        load = BertForSequenceClassification.from_pretrained
        tiny.move(tiny.quietly(load, bert_inputs.base, **settings), index).save_pretrained(tmp_path / task)
        finetunes[task] = tmp_path / task
    emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "out", progress=False)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    names = ["a", "b", "a", "a", "c"]
    labels = torch.rand(5) if kind == "regression" else torch.randint(0, 2, (5, 4)).float()
    output = model(**batch(), labels=labels, emr_task=names, num_items_in_batch=torch.tensor(labels.numel()))
    loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    torch.testing.assert_close(output.loss, loss(output.logits.reshape(labels.shape), labels))


# What is refused


@pytest.mark.parametrize(
    "given, error, message",
    [
        ([SST2] * 4, emr_hf.OptionError, "a task for each of 5 rows, got 4"),
        ([], emr_hf.OptionError, "a task for each of 5 rows, got 0"),
        (torch.tensor(1), emr_hf.OptionError, "one for every row"),
        (torch.zeros(5, 1, dtype=torch.long), emr_hf.OptionError, r"row 0.*got \[0\] \(list\)"),
        (torch.zeros(5), emr_hf.OptionError, r"row 0.*got 0.0 \(float\)"),
        ([SST2, None, SST2, SST2, SST2], emr_hf.OptionError, r"row 1.*got None \(NoneType\)"),
        ([0, 1, True, 0, 0], emr_hf.OptionError, r"row 2.*got True \(bool\)"),
        ([SST2, "mnli.v2", SST2, SST2, SST2], emr_hf.UnknownTaskError, "Did you mean 'mnli.v1'"),
        ([0, 1, 3, 0, 0], emr_hf.UnknownTaskError, "unknown task 3. This model holds: glue/sst2, mnli.v1, items"),
        ([0, 1, -2, 0, 0], emr_hf.UnknownTaskError, "unknown task -2"),
        (3, emr_hf.UnknownTaskError, "unknown task 3"),
        ("__base__", emr_hf.UnknownTaskError, "unknown task '__base__'"),
    ],
)
def test_bad_tasks_are_refused_before_any_forward(model, monkeypatch, given, error, message):
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: pytest.fail("forward"))
    monkeypatch.setattr(model._switch, "become", lambda task: pytest.fail("switch"))
    with pytest.raises(error, match=message):
        model(**batch(), emr_task=given)
    assert issubclass(error, emr_hf.EMRError)


def test_without_a_tensor_there_are_no_rows(model):
    with pytest.raises(emr_hf.OptionError, match="a tensor with rows, got input_ids"):
        model(input_ids=None, emr_task=[SST2])


def test_an_error_in_a_forward_leaves_the_task_that_was_active(model):
    inputs, before = batch(), copy.deepcopy(model.model.state_dict())
    inputs["input_ids"][3] = 1000  # no such token
    with pytest.raises(IndexError):
        model(**inputs, emr_task=RAGGED)
    assert model.active_task == SST2
    assert all(torch.equal(before[name], value) for name, value in model.model.state_dict().items())


def test_gradients_of_several_tasks_are_refused(model):
    peft = pytest.importorskip("peft", reason="peft is an extra of the tests")
    inputs = batch()
    with torch.enable_grad():
        expected = model(**inputs, emr_task=RAGGED).logits
        close(expected, alone(model, inputs, RAGGED))  # all is frozen
        embeddings = torch.randn(5, 7, 32, requires_grad=True)
        with pytest.raises(emr_hf.EMRError, match="no_grad"):
            model(inputs_embeds=embeddings, emr_task=RAGGED)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
        with pytest.raises(emr_hf.EMRError, match="no_grad"):
            adapted(**inputs, emr_task=RAGGED)
        labels = torch.tensor([0, 1, 0, 1, 0])
        adapted(**inputs, labels=labels, emr_task=[SST2] * 5).loss.backward()
        assert any(parameter.grad is not None for parameter in adapted.parameters())
    close(adapted(**inputs, emr_task=RAGGED).logits, expected)


def test_an_offloaded_or_unloaded_model_cannot_be_several_tasks(model):
    replica = model._replicate_for_data_parallel()
    with pytest.raises(emr_hf.EMRError, match="DataParallel"):
        replica.set_task(MNLI)
    with model._lock, ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: replica.set_task(SST2)).result(timeout=HANGS) is replica
    model.emr.tau.to("meta")
    with pytest.raises(emr_hf.OffloadedError):
        model(**batch(), emr_task=RAGGED)


# Generation


def prompts(rows=4):
    ids = torch.randint(5, 90, (rows, 5))
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated_alone(model, inputs, names, **options):
    found = []
    for row, name in enumerate(names):
        with model.use_task(name):
            found.extend(model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, **options))
    longest = max(len(row) for row in found)
    return torch.stack([F.pad(row, (0, longest - len(row)), value=0) for row in found])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
        {"use_cache": False},
    ],
)
@pytest.mark.parametrize("names", [["b", "a", "c", "a"], [1, 0, 2, 0]])
def test_generation_in_row_order_each_with_its_tasks_settings(gpt2_repo, options, names):
    model = AutoModelForCausalLM.from_pretrained(gpt2_repo)
    inputs = prompts()
    options = {"do_sample": False, "pad_token_id": 0, **options}
    found = model.generate(**inputs, emr_task=names, **options)
    assert model.active_task == "a"
    assert torch.equal(found, generated_alone(model, inputs, ["b", "a", "c", "a"], **options))


def test_changed_settings_of_the_active_task_hold_and_stay(gpt2_repo):
    model = AutoModelForCausalLM.from_pretrained(gpt2_repo)
    model.generation_config.max_new_tokens = 7
    for _ in range(2):
        found = model.generate(**prompts(), emr_task=["b", "a", "a", "a"], do_sample=False, pad_token_id=0)
        assert found.shape == (4, 12)
    assert model.generation_config.max_new_tokens == 7


def test_sequences_are_filled_up_on_the_right(gpt2_repo):
    model = AutoModelForCausalLM.from_pretrained(gpt2_repo)
    inputs, options = prompts(), {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    ends = model.generate(**inputs, emr_task="c", **options)[1, 6]
    options["eos_token_id"] = [int(ends), 2]
    names = ["a", "c", "a", "c"]
    found = model.generate(**inputs, emr_task=names, **options)
    assert torch.equal(found, generated_alone(model, inputs, names, **options))
    assert (found == 0).any()
    rows = torch.tensor([[3, 4], [5, 6]])
    joined = mixed.join_sequences([rows, rows[:1, :1]], [[0, 2], [1]], [9, 8])
    assert joined.tolist() == [[3, 4], [3, 8], [5, 6]]
    with pytest.raises(emr_hf.OptionError, match="pad_token_id"):
        mixed.join_sequences([rows, rows[:1, :1]], [[0, 2], [1]], [None, None])
    for pad, eos, fill in ((4, 2, 4), (None, 2, 2), (None, [3, 2], 3), (None, torch.tensor([3, 2]), 3)):
        assert mixed._fill_token({}, GenerationConfig(pad_token_id=pad, eos_token_id=eos)) == fill


def test_settings_that_look_like_rows_are_not_split(gpt2_repo):
    model = AutoModelForCausalLM.from_pretrained(gpt2_repo)
    inputs, names = prompts(), ["a", "c", "a", "c"]
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    likely = model.generate(**inputs, emr_task=names, **options)[:, 5:].unique().tolist()[:4]
    options["bad_words_ids"] = [[token] for token in likely]
    assert len(likely) == 4
    found = model.generate(**inputs, emr_task=names, **options)
    assert torch.equal(found, generated_alone(model, inputs, names, **options))
    del options["bad_words_ids"]
    allowed = [[10 + row] for row in range(4)]
    found = model.generate(**inputs, emr_task=names, prefix_allowed_tokens_fn=lambda row, _: allowed[row], **options)
    assert found[:, 5:].tolist() == [[10 + row] * 4 for row in range(4)]


def test_generation_by_an_encoder_and_a_decoder(t5_repo):
    model = AutoModelForSeq2SeqLM.from_pretrained(t5_repo)
    inputs, names = batch(4), ["c", "a", "b", "a"]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    found = model.generate(**inputs, emr_task=names, **options)
    assert torch.equal(found, generated_alone(model, inputs, names, **options))


def test_what_generation_refuses_with_a_task_for_every_row(gpt2_repo, repo):  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(gpt2_repo)
    inputs, names = prompts(), ["a", "b", "a", "a"]
    for options, message in (
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"generation_config": GenerationConfig(return_dict_in_generate=True)}, "return_dict_in_generate"),
        ({"streamer": TextIteratorStreamer(AutoTokenizer.from_pretrained(repo))}, "streamer"),
        ({"past_key_values": DynamicCache()}, "past_key_values"),
    ):
        with pytest.raises(emr_hf.OptionError, match=message):
            model.generate(**inputs, emr_task=names, **options)
    with pytest.raises(emr_hf.OptionError, match="4 rows, got 1"):
        model.generate(inputs["input_ids"], emr_task=["a"])
    with pytest.raises(emr_hf.UnknownTaskError):
        model.generate(inputs["input_ids"], emr_task=["a", "b", "x", "a"])


# Pipelines


TEXTS = ["a good film", "the bad film", "bad", "a film", "good good film"]


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_pipeline_with_a_task_for_every_text(repo, size):  # noqa: F811
    pipe = pipeline("emr-text-classification", model=str(repo), emr_task=SST2)
    words = dict.fromkeys((SST2, MNLI), WORDS) | {ITEMS: [*WORDS[:5], *reversed(WORDS[5:])]}
    expected = [expected_label(repo, task, text, words[task]) for task, text in zip(RAGGED, TEXTS)]
    assert pipe(TEXTS, emr_task=RAGGED, batch_size=size) == expected
    assert pipe(TEXTS, emr_task=[1, 0, 2, 1, 0], batch_size=size) == expected
    assert pipe.model.active_task == SST2
    scores = pipe(TEXTS, emr_task=RAGGED, batch_size=size, top_k=None)
    assert [len(row) for row in scores] == [3, 2, 2, 3, 2]
    assert [row[0] for row in scores] == expected
    assert pipe(TEXTS[:1], emr_task=[ITEMS]) == [expected_label(repo, ITEMS, TEXTS[0], words[ITEMS])]
    assert pipe("bad") == [expected_label(repo, SST2, "bad")]
    pairs = [{"text": text, "text_pair": "a film"} for text in TEXTS]
    alone = [pipe([pair], emr_task=task)[0] for pair, task in zip(pairs, RAGGED)]
    for found, one in zip(pipe(pairs, emr_task=RAGGED, batch_size=size), alone):
        assert found == {"label": one["label"], "score": pytest.approx(one["score"], abs=1e-5)}


def test_the_base_in_a_pipeline(repo):  # noqa: F811
    pipe = pipeline("emr-text-classification", model=str(repo), emr_task=MNLI)
    pipe.model.set_task(MNLI)
    found = pipe(["bad", "bad"], emr_task=["__base__", MNLI], top_k=None)
    logits = pipe.model(**pipe.tokenizer("bad", return_tensors="pt"), emr_task=[-1]).logits[0]
    assert found[0][0]["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
    assert {label["label"] for label in found[0]} == {f"{SST2}-0", f"{SST2}-1"}
    assert len(found[1]) == 3


def test_problem_types_follow_the_text(bert_inputs, tmp_path):
    finetunes = {}
    for index, (task, kind) in enumerate({"score": "regression", "topics": "multi_label_classification"}.items()):
        load = BertForSequenceClassification.from_pretrained
        count = 1 if kind == "regression" else 3
        finetune = tiny.quietly(load, bert_inputs.base, num_labels=count, problem_type=kind)
        tiny.move(finetune, index).save_pretrained(tmp_path / task)
        write_tokenizer(tmp_path / task, WORDS)
        finetunes[task] = tmp_path / task
    emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "out", progress=False)
    pipe = pipeline("emr-text-classification", model=str(tmp_path / "out"))
    found = pipe(["a film", "bad", "a film"], emr_task=["topics", "score", "topics"], top_k=None, batch_size=2)
    model, ids = pipe.model, torch.tensor([[2, WORDS.index("bad"), 3]])
    assert found[1][0]["score"] == pytest.approx(float(model(ids, emr_task="score").logits), abs=1e-5)
    assert found[0] == found[2]
    assert len(found[0]) == 3 and all(0 < label["score"] < 1 for label in found[0])


def test_what_a_pipeline_refuses(repo):  # noqa: F811
    pipe = pipeline("emr-text-classification", model=str(repo))
    with pytest.raises(emr_hf.OptionError, match="5 rows, got 2"):
        pipe(TEXTS, emr_task=[SST2, MNLI])
    with pytest.raises(emr_hf.UnknownTaskError, match="Did you mean 'items'"):
        pipe(TEXTS[:1], emr_task=["item"])
    with pytest.raises(emr_hf.OptionError, match="a list of inputs, got str"):
        pipe("bad", emr_task=[SST2, MNLI, SST2])
    with pytest.raises(emr_hf.OptionError, match="a list of inputs, got generator"):
        pipe((text for text in TEXTS), emr_task=RAGGED)
    assert pipe([], emr_task=[]) == []


def test_other_pipelines(tmp_path):
    from PIL import Image
    from transformers import ViTImageProcessor

    out = merged("BertForTokenClassification", tmp_path / "tokens")
    write_tokenizer(out, WORDS)
    pipe = pipeline("emr-token-classification", model=str(out))
    texts, names = ["a good film", "bad", "the film"], ["b", "a", "b"]
    alone = [pipe([text], emr_task=task)[0] for text, task in zip(texts, names)]
    for found, expected in zip(pipe(texts, emr_task=names, batch_size=2), alone):
        assert [(e["entity"], e["word"]) for e in found] == [(e["entity"], e["word"]) for e in expected]
        assert [e["score"] for e in found] == pytest.approx([e["score"] for e in expected], abs=1e-5)
    assert {entity["entity"][0] for entity in alone[0]} == {"b"}
    out = merged("ViTForImageClassification", tmp_path / "images")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(out)
    pipe = pipeline("emr-image-classification", model=str(out))
    images = [Image.new("RGB", (16, 16), (60 * i, 9, 9)) for i in range(3)]
    assert [len(row) for row in pipe(images, emr_task=["b", "a", "b"], batch_size=2)] == [3, 2, 3]


# Trainer


@pytest.mark.parametrize("collator", ["default", "padding"])
def test_trainer_predicts_each_row_by_its_task(model, repo, tmp_path, collator):  # noqa: F811
    torch.manual_seed(1)
    count, tasks = 11, [1, 0, 2, 0, 1, 1, 2, 0, 0, 0, 0]  # the last batch has one task, and heads of two labels
    lengths = [7 if collator == "default" else 3 + row % 5 for row in range(count)]
    rows = [
        {"input_ids": torch.randint(5, 90, (n,)).tolist(), "attention_mask": [1] * n, "emr_task": task, "labels": 1}
        for n, task in zip(lengths, tasks)
    ]
    padding = DataCollatorWithPadding(AutoTokenizer.from_pretrained(repo))
    arguments = TrainingArguments(
        tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4
    )
    trainer = Trainer(model, arguments, data_collator=default_data_collator if collator == "default" else padding)
    model.emr_pad = True
    found = trainer.predict(datasets.Dataset.from_list(rows))
    assert found.predictions.shape == (count, 3)
    names = [model.tasks[task] for task in tasks]
    expected = [alone(model, _one(row), [name])[0] for row, name in zip(rows, names)]
    for prediction, logits in zip(found.predictions, expected):
        assert prediction[: len(logits)] == pytest.approx(logits.numpy(), abs=1e-5)
        assert (prediction[len(logits) :] == -np.inf).all()
    losses = [float(F.cross_entropy(logits, torch.tensor(1))) for logits in expected]
    assert found.metrics["test_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def _one(row):
    return {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}


# Threads


def in_threads(function, count=8):
    """Call `function(number)` in many threads at once; an error in one is raised."""
    interval, barrier = sys.getswitchinterval(), threading.Barrier(count)

    def run(number):
        barrier.wait()
        with torch.no_grad():
            return function(number)

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(run, range(count)))
    finally:
        sys.setswitchinterval(interval)


def test_threads_that_ask_for_different_tasks_get_their_own_answers(model):
    inputs = batch()
    serial = {task: model(**inputs, emr_task=task).logits for task in model.tasks}
    serial_mixed = model(**inputs, emr_task=EVEN).logits
    plain = list(serial.values())

    def work(number):
        choices = random.Random(number)
        for _ in range(15):
            task, way = choices.choice(model.tasks), choices.randrange(5)
            if way == 0:
                with model.use_task(task):
                    assert torch.equal(model(**inputs).logits, serial[task])
                    assert model.config.id2label[0] == f"{task}-0"
            elif way == 1:
                found = model.set_task(task)(**inputs).logits  # perhaps another's by now, but never half of one
                assert any(torch.equal(found, logits) for logits in plain)
            elif way == 2:
                assert torch.equal(model(**inputs, emr_task=EVEN).logits, serial_mixed)
            else:
                assert torch.equal(model(**inputs, emr_task=task).logits, serial[task])
        return True

    assert all(in_threads(work))


def test_threads_generate_each_its_task(gpt2_repo):
    model = AutoModelForCausalLM.from_pretrained(gpt2_repo)
    inputs, options = prompts(), {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 5}
    serial = {task: model.generate(**inputs, emr_task=task, **options) for task in "abc"}
    names = ["b", "a", "c", "a"]
    rows = model.generate(**inputs, emr_task=names, **options)

    def work(number):
        task = "abc"[number % 3]
        assert torch.equal(model.generate(**inputs, emr_task=task, **options), serial[task])
        assert torch.equal(model.generate(**inputs, emr_task=names, **options), rows)
        return True

    assert all(in_threads(work))


def test_pipelines_in_threads_share_a_model(repo):  # noqa: F811
    first = pipeline("emr-text-classification", model=str(repo))
    pipes = [
        emr_hf.EMRTextClassificationPipeline(model=first.model, tokenizer=first.tokenizer, task=first.task)
        for _ in range(4)
    ]
    serial = {task: first(TEXTS, emr_task=task) for task in (SST2, MNLI)}

    def work(number):
        task = (SST2, MNLI)[number % 2]
        return [pipes[number](TEXTS, emr_task=task, batch_size=2) for _ in range(3)]

    for number, answers in enumerate(in_threads(work, 4)):
        for answer in answers:
            assert [row["label"] for row in answer] == [row["label"] for row in serial[(SST2, MNLI)[number % 2]]]


def test_use_task_keeps_other_threads_waiting(model):
    done = threading.Event()

    def other():
        model.set_task(MNLI)
        done.set()

    with model.use_task(ITEMS):
        thread = threading.Thread(target=other)
        thread.start()
        assert not done.wait(0.2)
        assert model.active_task == ITEMS
    thread.join(HANGS)
    assert model.active_task == MNLI


def test_copies_and_pickles_have_a_lock_of_their_own(model):
    inputs = batch()
    expected = model(**inputs, emr_task=MNLI).logits
    with model._lock:
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(lambda twin=twin: twin(**inputs, emr_task=MNLI).logits).result(timeout=HANGS)
            assert torch.equal(found, expected)


def test_compiled_models_take_tasks_with_the_call(model):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    inputs = batch()
    for task in (SST2, ITEMS, SST2):
        torch.testing.assert_close(compiled(**inputs, emr_task=task).logits, model(**inputs, emr_task=task).logits)
    assert counter.frame_count == 1, "switches are not compiled"
    close(compiled(**inputs, emr_task=RAGGED).logits, alone(model, inputs, RAGGED))
    assert counter.frame_count == 1
    model.model.compile(backend=counter)  # the way to compile what the rows of each task go through
    close(model(**inputs, emr_task=EVEN).logits, alone(copy.deepcopy(model), inputs, EVEN))
    assert counter.frame_count > 1


# The parts


def test_rows_of_inputs():
    rows, other = torch.arange(3), torch.arange(4)
    taken = mixed.take_inputs(
        {
            "tensor": rows,
            "other": other,
            "scalar": torch.tensor(3),
            "pair": (rows, other),
            "dict": {"full": rows, "none": None},
            "detections": [{"boxes": other}, {"boxes": other + 1}, {"boxes": other + 2}],
            "numbers": [1, 2, 3],
            "name": "abc",
            "position_ids": torch.arange(18).reshape(3, 3, 2),
        },
        [2, 0],
        3,
    )
    assert taken["tensor"].tolist() == [2, 0]
    assert taken["other"] is other
    assert taken["scalar"] == 3
    assert taken["pair"][0].tolist() == [2, 0] and taken["pair"][1] is other
    assert taken["dict"]["full"].tolist() == [2, 0]
    assert [label["boxes"].tolist()[0] for label in taken["detections"]] == [2, 0]
    assert taken["numbers"] == [1, 2, 3]
    assert taken["name"] == "abc"
    assert taken["position_ids"][:, :, 0].tolist() == [[4, 0], [10, 6], [16, 12]]


def test_outputs_in_row_order():
    order = [[0, 3], [1], [2, 4]]
    parts = [torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0]]), torch.tensor([[2.0], [4.0]])]
    assert mixed.join(parts, order).flatten().tolist() == [0, 1, 2, 3, 4]
    assert mixed.join([(part, None) for part in parts], order)[1] is None
    assert mixed.join([torch.tensor(1.0)] * 3, order) is None
    assert mixed.join([torch.zeros(7, 2)] * 3, order) is None, "no rows of the batch"
    wider = [parts[0], parts[1].expand(1, 2), parts[2]]
    assert [row.tolist() for row in mixed.join(wider, order)] == [[0], [1, 1], [2], [3], [4]]


def test_padding_of_maps_and_of_vocabularies():
    maps = mixed.widen([torch.zeros(1, 2, 4, 4), torch.zeros(2, 3, 4, 4)], [2, 3], 5)
    assert [tuple(part.shape) for part in maps] == [(1, 5, 4, 4), (2, 5, 4, 4)]
    assert (maps[0][:, 2:] == -float("inf")).all() and (maps[0][:, :2] == 0).all()
    words = mixed.widen([torch.zeros(1, 7, 96), torch.zeros(2, 7, 98)], [2, 3], 5)
    assert [tuple(part.shape) for part in words] == [(1, 7, 98), (2, 7, 98)]


def test_no_task_is_called_as_the_base_is(bert_inputs, tmp_path):
    finetune = next(iter(bert_inputs.finetunes.values()))
    with pytest.raises(emr_hf.OptionError, match="'__base__'.*mixed batch"):
        emr_hf.merge(bert_inputs.base, {"__base__": finetune}, tmp_path / "out")
