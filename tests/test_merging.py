"""The streaming merge on disk against the method in memory."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

import emr_hf
from emr_hf import bits, election
from tests import tiny

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def load_folder(folder):
    """Every tensor of a folder, whatever its shards."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def merge_in_memory(base, finetunes, **options):
    """`merge_state_dicts` over what the plan says is merged, from the folders' own tensors."""
    base_model = tiny.quietly(BertForSequenceClassification.from_pretrained, base)
    models = {task: BertForSequenceClassification.from_pretrained(path) for task, path in finetunes.items()}
    names = [name for name, _ in base_model.named_parameters() if not name.startswith("classifier")]
    state_dicts = {task: {n: model.state_dict()[n] for n in names} for task, model in models.items()}
    return emr_hf.merge_state_dicts({n: base_model.state_dict()[n] for n in names}, state_dicts, **options)


def assert_repo_equals(out, merge):
    stored = load_folder(out)
    flat = {name: name.replace(".", "__") for name in merge.tau}
    assert {name for name in stored if name.startswith("emr.tau.")} == {f"emr.tau.{f}" for f in flat.values()}
    for name, tau in merge.tau.items():
        assert torch.equal(stored[f"emr.tau.{flat[name]}"], tau)
        for index, masks in enumerate(merge.masks.values()):
            assert torch.equal(stored[f"emr.mask.t{index}.{flat[name]}"], bits.pack(masks[name]))
    for index, rescaler in enumerate(merge.rescalers.values()):
        assert stored[f"emr.rescaler.t{index}"] == torch.tensor(rescaler, dtype=torch.float32)


@pytest.mark.parametrize("shard_size", ["5GB", "20KB", 1000])
@pytest.mark.parametrize("rescale", election.RESCALERS)
def test_streaming_equals_in_memory_for_any_shard_size(bert_inputs, tmp_path, shard_size, rescale):
    out = tmp_path / "out"
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, out, rescale=rescale, max_shard_size=shard_size)
    assert_repo_equals(out, merge_in_memory(bert_inputs.base, bert_inputs.finetunes, rescale=rescale))


step = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 0.25, 1e-3, -1e-3])


@given(
    dtype=st.sampled_from(DTYPES),
    hidden=st.sampled_from([4, 12, 20]),
    count=st.integers(1, 4),
    steps=st.lists(step, min_size=5, max_size=11),
    still=st.booleans(),
    shard_size=st.sampled_from([300, 3000, "1GB"]),
    rescale=st.sampled_from(election.RESCALERS),
)
@settings(max_examples=20)
def test_streaming_equals_in_memory_on_adversarial_task_vectors(
    tmp_path_factory, dtype, hidden, count, steps, still, shard_size, rescale
):
    """Shapes, dtypes, N, zeros, exact sign ties and all-zero task vectors."""
    folder = tmp_path_factory.mktemp("property")
    settings = {**tiny.TEXT, "hidden_size": hidden, "vocab_size": 11, "intermediate_size": 7, "num_attention_heads": 2}
    config = tiny.BERT.config(**settings)
    base = BertModel._from_config(config, dtype=dtype)
    base.save_pretrained(folder / "base")
    finetunes = {}
    for task in range(count):
        model = tiny.quietly(BertForSequenceClassification.from_pretrained, folder / "base", dtype=dtype)
        for position, parameter in enumerate(model.bert.parameters()):
            values = torch.tensor(steps).roll(position + task).repeat(parameter.numel() // len(steps) + 1)
            scale = 0.0 if still and task == 0 else (-1.0) ** task  # opposite steps make exact ties
            parameter.data += (scale * values[: parameter.numel()].reshape(parameter.shape)).to(dtype)
        finetunes[f"task {task}"] = folder / str(task)
        model.save_pretrained(folder / str(task))
    emr_hf.merge(folder / "base", finetunes, folder / "out", rescale=rescale, max_shard_size=shard_size)
    assert_repo_equals(folder / "out", merge_in_memory(folder / "base", finetunes, rescale=rescale))
    shutil.rmtree(folder)


def test_one_bfloat16_finetune_comes_back_bit_for_bit(tmp_path):
    inputs = tiny.write_inputs(tiny.BERT, tmp_path, tasks=("only",), dtype=torch.bfloat16)
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    expected = BertForSequenceClassification.from_pretrained(inputs.finetunes["only"]).state_dict()
    found = model.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)) for name in expected)


def test_base_and_task_order_do_not_change_the_result(bert_inputs, tmp_path):
    backwards = dict(reversed(bert_inputs.finetunes.items()))
    first = emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "one")
    second = emr_hf.merge(bert_inputs.base, backwards, tmp_path / "two")
    assert {t: first.tasks[t].rescaler for t in first.tasks} == {t: second.tasks[t].rescaler for t in first.tasks}
    one, two = load_folder(tmp_path / "one"), load_folder(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith(("model.", "emr.tau.")))


@pytest.mark.parametrize("tau_dtype", ["bfloat16", "float16"])
def test_a_narrow_vector_is_smaller_and_its_cost_is_reported(bert_inputs, tmp_path, tau_dtype):
    wide = emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "wide")
    narrow = emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "narrow", tau_dtype=tau_dtype)
    assert wide.tau_rounding == 0
    assert 0 < narrow.tau_rounding < 0.01
    assert narrow.bytes_out == wide.bytes_out - 2 * wide.merged_elements
    tau = load_folder(tmp_path / "narrow")["emr.tau.bert__pooler__dense__weight"]
    assert tau.dtype == getattr(torch, tau_dtype)


def test_the_report_is_right_returned_and_saved(bert_inputs, tmp_path):
    report = emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out")
    merge = merge_in_memory(bert_inputs.base, bert_inputs.finetunes)
    saved = json.loads((tmp_path / "out" / "emr_report.json").read_text())
    for task, numbers in report.tasks.items():
        tau = torch.cat([t.flatten() for t in merge.tau.values()]).double()
        mask = torch.cat([m.flatten() for m in merge.masks[task].values()])
        base = tiny.quietly(BertForSequenceClassification.from_pretrained, bert_inputs.base)
        tuned = BertForSequenceClassification.from_pretrained(bert_inputs.finetunes[task])
        names = list(merge.tau)
        tau_t = torch.cat([(tuned.get_parameter(n) - base.get_parameter(n)).flatten() for n in names]).double()
        kept = mask * tau
        assert numbers.rescaler == pytest.approx(float(tau_t.abs().sum() / kept.abs().sum()))
        assert numbers.density == pytest.approx(float(mask.double().mean()))
        assert numbers.cosine == pytest.approx(float(torch.cosine_similarity(tau_t, kept, dim=0)))
        error = (tau_t - numbers.rescaler * kept).norm() / tau_t.norm()
        assert numbers.relative_error == pytest.approx(float(error))
        conflict = 1 - mask.sum() / (tau_t != 0).sum()
        assert numbers.sign_conflict == pytest.approx(float(conflict))
        assert saved["tasks"][task]["rescaler"] == numbers.rescaler
        assert task in str(report)
    assert saved["bytes_out"] == report.bytes_out == sum(t.nbytes for t in load_folder(tmp_path / "out").values())


def test_batchnorm_statistics_stay_with_their_task(tmp_path):
    inputs = tiny.write_inputs(tiny.RESNET, tmp_path)
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out")
    stored = load_folder(tmp_path / "out")
    for index, path in enumerate(inputs.finetunes.values()):
        own = load_folder(path)
        buffers = [n for n in own if n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
        assert buffers
        for name in buffers:
            assert torch.equal(stored[f"emr.private.t{index}.{name.replace('.', '__')}"], own[name])
            assert f"model.{name}" not in stored


def test_a_pattern_keeps_parameters_private(bert_inputs, tmp_path):
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out", private=["LayerNorm"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", emr_task="items")
    expected = BertForSequenceClassification.from_pretrained(bert_inputs.finetunes["items"])
    assert not any("LayerNorm" in name for name in model.config.merged_parameters)
    for name, parameter in expected.named_parameters():
        if "LayerNorm" in name:
            assert torch.equal(model.model.get_parameter(name), parameter)


def test_one_long_task_vector_is_warned_of(tmp_path):
    inputs = tiny.write_inputs(tiny.BERT, tmp_path, tasks=("a", "b"))
    model = BertForSequenceClassification.from_pretrained(inputs.finetunes["a"])
    tiny.move(model, seed=9, scale=1.0).save_pretrained(tmp_path / "far")
    report = emr_hf.merge(inputs.base, {**inputs.finetunes, "far": tmp_path / "far"}, tmp_path / "out")
    assert any(warning.startswith("far: its task vector is") for warning in report.warnings)


def test_tokenizers_are_shared_where_equal_and_kept_apart_where_not(bert_inputs, tmp_path):
    finetunes = {}
    for task, path in bert_inputs.finetunes.items():
        finetunes[task] = tmp_path / path.name
        shutil.copytree(path, finetunes[task])
        (finetunes[task] / "vocab.txt").write_text("other" if task == "items" else "same")
    emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "out")
    config = emr_hf.EMRConfig.from_pretrained(tmp_path / "out")
    assert [entry["tokenizer"] for entry in config.tasks.values()] == [None, None, "tasks/t2"]
    assert (tmp_path / "out" / "vocab.txt").read_text() == "same"
    assert (tmp_path / "out" / "tasks" / "t2" / "vocab.txt").read_text() == "other"
