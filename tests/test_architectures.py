"""Every architecture, from checkpoints on disk to plain checkpoints again."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file

import emr_hf
from tests import tiny

TASKS = ("a", "b", "c")


ids = [f"{t}-tied" if t.settings.get("tie_word_embeddings") else str(t) for t in tiny.ALL]
generating = [(t, i) for t, i in zip(tiny.ALL, ids) if t.generates]


@pytest.fixture(scope="module", params=tiny.ALL, ids=ids)
def case(request, tmp_path_factory):
    """The architecture, its inputs, and the merged repo."""
    folder = tmp_path_factory.mktemp("case")
    inputs = tiny.write_inputs(request.param, folder, TASKS)
    emr_hf.merge(inputs.base, inputs.finetunes, folder / "out", progress=False)
    return request.param, inputs, folder / "out"


def outputs_of(model, batch):
    with torch.no_grad():
        result = model(**copy.deepcopy(batch))
    return result.logits if "logits" in result else result[0]


def reference_model(architecture, inputs, task):
    """The task's model by the reference formula, on state dicts in memory, with none of the wrapper's code."""
    model_class = getattr(transformers, architecture.architecture)
    finetunes = {t: model_class.from_pretrained(path) for t, path in inputs.finetunes.items()}
    base = tiny.quietly(model_class.from_pretrained, inputs.base)
    shared = emr_hf.check(emr_hf.Recipe(inputs.base, inputs.finetunes)).merged
    state_dicts = {t: {n: m.state_dict()[n] for n in shared} for t, m in finetunes.items()}
    base_dict = {n: base.state_dict()[n] for n in shared}
    merge = emr_hf.merge_state_dicts(base_dict, state_dicts)
    model = finetunes[task]
    scale = torch.tensor(merge.rescalers[task], dtype=torch.float32)
    with torch.no_grad():
        for name in shared:
            delta = scale * merge.tau[name] * merge.masks[task][name]
            model.get_parameter(name).copy_(base_dict[name] + delta)
    return model.eval()


def test_loads_without_a_warning_and_saves_the_same_bytes(case, tmp_path, caplog):
    architecture, _, out = case
    with caplog.at_level(logging.WARNING):
        model = getattr(transformers, architecture.auto_class).from_pretrained(out)
    assert not caplog.records, caplog.text
    assert model.tasks == list(TASKS)
    model.set_task("b")
    model.save_pretrained(tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (out, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].dtype == second[name].dtype for name in first)


@pytest.mark.parametrize("task", ["a", "b"])
def test_gives_the_logits_of_the_reference_formula(case, task):
    architecture, inputs, out = case
    model = emr_hf.EMRMergedModel.from_pretrained(out)
    batch = architecture.inputs()
    expected = outputs_of(reference_model(architecture, inputs, task), batch)
    torch.testing.assert_close(outputs_of(model.set_task(task), batch), expected, rtol=0, atol=2e-6)


def test_exports_a_task_bit_for_bit(case, tmp_path):
    architecture, _, out = case
    emr_hf.export(out, "b", tmp_path / "plain")
    plain = getattr(transformers, architecture.architecture).from_pretrained(tmp_path / "plain")
    live = emr_hf.EMRMergedModel.from_pretrained(out, emr_task="b").model
    expected, found = live.state_dict(), plain.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    if architecture.labels:
        assert plain.config.id2label == {i: f"b-{i}" for i in range(3)}


@pytest.mark.parametrize("case", [t for t, _ in generating], ids=[i for _, i in generating], indirect=True)
def test_generates_as_the_exported_task(case):
    architecture, _, out = case
    model = getattr(transformers, architecture.auto_class).from_pretrained(out)
    assert model.can_generate()
    plain = copy.deepcopy(model).merge_and_unload("b")
    batch = {k: v for k, v in architecture.inputs().items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = plain.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, emr_task="b", **options), expected)
    assert model.active_task == "b"


def test_tied_tensors_stay_tied_and_are_stored_once(case):
    architecture, _, out = case
    model = emr_hf.EMRMergedModel.from_pretrained(out)
    names = set(load_file(out / "model.safetensors"))
    for alias, name in model.model.all_tied_weights_keys.items():
        assert model.model.get_parameter(alias) is model.model.get_parameter(name)
        assert f"model.{alias}" not in names
