"""`check`: what a merge will do, from configurations and headers alone."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import emr_hf
from emr_hf import sources, storage
from tests import tiny
from tests.test_sources import copy_of, edit_json, edit_tensors, loaded_model, stored_tensors

EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
HEAD = {"classifier.weight", "classifier.bias"}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return tiny.write_inputs(tiny.RESNET, tmp_path_factory.mktemp("resnet"), ("a", "b"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return tiny.write_inputs(tiny.GPT2, tmp_path_factory.mktemp("gpt2"), ("a", "b"))


def plan_of(inputs, **options):
    return emr_hf.check(emr_hf.Recipe(inputs.base, inputs.finetunes, **options))


# No tensor is read


@pytest.mark.parametrize("architecture", [tiny.BERT, tiny.GPT2, tiny.MIXTRAL, tiny.RESNET], ids=str)
def test_check_reads_no_tensor(architecture, tmp_path, monkeypatch):
    inputs = tiny.write_inputs(architecture, tmp_path, ("a", "b"), max_shard_size="20KB")

    def read(self, name):
        raise AssertionError(f"check has read {name}")

    for kind in (storage.SafetensorsStorage, storage.BinStorage, storage.ModelStorage, sources.HubStorage):
        monkeypatch.setattr(kind, "read", read)
    assert plan_of(inputs).merged


def test_check_passes_where_all_data_is_rubbish(bert_inputs, tmp_path):
    inputs = tiny.Inputs(copy_of(bert_inputs.base, tmp_path / "base"))
    inputs.finetunes = {t: copy_of(f, tmp_path / f"{i}") for i, (t, f) in enumerate(bert_inputs.finetunes.items())}
    for folder in (inputs.base, *inputs.finetunes.values()):
        spoil_data(folder / "model.safetensors")
    assert plan_of(inputs).merged == plan_of(bert_inputs).merged
    with pytest.raises(emr_hf.NonFiniteError):
        emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out")


def spoil_data(path):
    """Fill everything after the header with NaN."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)
    path.write_bytes(content)


def test_check_writes_nothing(bert_inputs, tmp_path):
    emr_hf.check(emr_hf.Recipe(bert_inputs.base, bert_inputs.finetunes), tmp_path / "deep" / "out")
    assert not any(tmp_path.iterdir())


def test_merge_runs_the_same_check_first(bert_inputs, tmp_path, monkeypatch):
    calls = []

    def refuse(recipe, out=None, overwrite=False, save_as="model"):
        calls.append((recipe, out, overwrite))
        raise emr_hf.MismatchError("refused by check")

    monkeypatch.setattr("emr_hf.merging.check", refuse)
    with pytest.raises(emr_hf.MismatchError, match="refused by check"):
        emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out", rescale="tensor_mean", overwrite=True)
    [(recipe, out, overwrite)] = calls
    assert (recipe.rescale, out, overwrite) == ("tensor_mean", tmp_path / "out", True)
    assert not any(tmp_path.iterdir())


# What the plan says


def test_heads_are_private_and_the_rest_is_merged(bert_inputs):
    plan = plan_of(bert_inputs)
    stored = set(load_file(bert_inputs.finetunes["items"] / "model.safetensors"))
    assert plan.private == dict.fromkeys(HEAD, "head")
    assert set(plan.merged) == stored - HEAD
    assert len(set(plan.merged)) == len(plan.merged)
    assert plan.skipped == []
    assert plan.warnings == []


def test_buffers_are_private_and_none_is_elected(resnet):
    plan = plan_of(resnet)
    buffers = {name for name in plan.private if plan.private[name] == "buffer"}
    kinds = {name.rpartition(".")[2] for name in buffers}
    assert kinds == {"running_mean", "running_var", "num_batches_tracked"}
    assert not [name for name in plan.merged if name.rpartition(".")[2] in kinds]
    assert ("base", sorted(buffers)[0], "each task has its own, buffer") in plan.skipped


def test_batch_norm_statistics_stay_each_tasks_own(resnet, tmp_path):
    emr_hf.merge(resnet.base, resnet.finetunes, tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    for task, folder in resnet.finetunes.items():
        live = model.set_task(task).model.state_dict()
        own = load_file(folder / "model.safetensors")
        statistics = [name for name in own if "running" in name or "tracked" in name]
        assert statistics
        assert all(torch.equal(live[name], own[name]) for name in statistics)


def test_a_tied_tensor_is_merged_once_under_one_name(gpt2):
    plan = plan_of(gpt2)
    assert "transformer.wte.weight" in plan.merged
    assert not [name for name in (*plan.merged, *plan.private, *plan.outputs) if "lm_head" in name]


def test_a_vocabulary_head_is_merged(tmp_path):
    inputs = tiny.write_inputs(tiny.LLAMA, tmp_path, ("a",))
    assert "lm_head.weight" in plan_of(inputs).merged


def test_position_embeddings_of_another_length_are_refused_unless_asked_for(bert_inputs, tmp_path):
    name = "bert.embeddings.position_embeddings.weight"
    folder = copy_of(bert_inputs.finetunes["items"], tmp_path / "longer")
    edit_json(folder / "config.json", max_position_embeddings=80)
    edit_tensors(folder, **{name: torch.randn(80, 32)})
    finetunes = {**bert_inputs.finetunes, "items": folder}
    with pytest.raises(emr_hf.MismatchError, match=r"items: .*position_embeddings.weight is \[80, 32\].*\[64, 32\]"):
        emr_hf.check(emr_hf.Recipe(bert_inputs.base, finetunes))
    plan = emr_hf.check(emr_hf.Recipe(bert_inputs.base, finetunes, private="position_embeddings"))
    assert plan.private[name] == "asked for by the recipe"
    assert any("max_position_embeddings is 80" in warning for warning in plan.warnings)


def test_what_a_recipe_asks_for_is_private(bert_inputs):
    plan = plan_of(bert_inputs, private=[r"LayerNorm", r"^bert\.pooler\."])
    asked = {name for name, why in plan.private.items() if why == "asked for by the recipe"}
    assert asked == {name for name in asked if "LayerNorm" in name or name.startswith("bert.pooler.")}
    assert len(asked) == 2 * (2 * 2 + 1) + 2
    assert not asked & set(plan.merged)


def test_one_expression_may_be_given_as_a_text(bert_inputs):
    asked = plan_of(bert_inputs, private="pooler").private
    assert asked == plan_of(bert_inputs, private=["pooler"]).private


def test_a_tensor_that_the_base_lacks_is_private_and_said_to_be(bert_inputs, tmp_path):
    base = edit_tensors(copy_of(bert_inputs.base, tmp_path / "base"), pooler__dense__weight=None)
    plan = emr_hf.check(emr_hf.Recipe(base, bert_inputs.finetunes))
    assert plan.private["bert.pooler.dense.weight"] == "not in the base"
    assert "not in the base" in str(plan)


def test_what_is_not_used_is_listed_with_its_checkpoint_and_why(bert_inputs, tmp_path):
    base = edit_tensors(copy_of(bert_inputs.base, tmp_path / "base"), cls__predictions__bias=torch.zeros(96))
    plan = emr_hf.check(emr_hf.Recipe(base, bert_inputs.finetunes))
    assert plan.skipped == [("base", "cls.predictions.bias", "not part of BertForSequenceClassification")]
    assert "cls.predictions.bias" in str(plan)


def test_every_stored_tensor_is_accounted_for(resnet, tmp_path):
    finetune = edit_tensors(copy_of(resnet.finetunes["a"], tmp_path / "a"), extra__weight=torch.zeros(2))
    plan = emr_hf.check(emr_hf.Recipe(resnet.base, {"a": finetune, "b": resnet.finetunes["b"]}))
    skipped = {(label, name) for label, name, _ in plan.skipped}
    for name in stored_tensors(finetune):
        assert (name in plan.merged) + (name in plan.private) + (("a", name) in skipped) == 1, name
    for name in stored_tensors(resnet.base):
        assert (f"resnet.{name}" in plan.merged) + (("base", f"resnet.{name}") in skipped) == 1, name


# Sizes


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_the_plan_knows_the_bytes_of_the_repo(bert_inputs, tmp_path, max_shard_size):
    plan = plan_of(bert_inputs)
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out", max_shard_size=max_shard_size)
    tensors = stored_tensors(tmp_path / "out")
    assert plan.bytes_out == sum(tensor.nbytes for tensor in tensors.values())
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (tuple(info.shape), info.dtype) for name, info in plan.outputs.items()
    }


def test_the_plan_knows_the_bytes_of_the_inputs(bert_inputs):
    plan = plan_of(bert_inputs)
    sizes = [sum(t.nbytes for t in stored_tensors(folder).values()) for folder in bert_inputs.finetunes.values()]
    base = sum(tensor.nbytes for tensor in stored_tensors(bert_inputs.base).values())
    assert plan.bytes_finetunes == sum(sizes)
    assert plan.bytes_in == base + sum(sizes)


def test_the_plan_tells_disk_and_memory(bert_inputs):
    text = str(plan_of(bert_inputs))
    lines = dict(line.split(maxsplit=1) for line in text.splitlines()[1:])
    assert {"merge", "private", "task", "disk", "memory"} <= set(lines)
    assert "kB out" in lines["disk"]
    assert "MB" in lines["memory"]


def test_a_full_disk_is_found_before_anything_is_written(bert_inputs, tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(emr_hf.RepoError, match=r"no space for .*out: needs \d+\.\d kB, 1\.0 kB are free"):
        emr_hf.check(emr_hf.Recipe(bert_inputs.base, bert_inputs.finetunes), tmp_path / "new" / "out")
    assert asked == [tmp_path]
    with pytest.raises(emr_hf.RepoError, match="no space"):
        emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "new" / "out")
    assert not any(tmp_path.iterdir())


# Warnings


def test_a_finetune_that_is_the_base_is_warned_of_and_works(gpt2, tmp_path):
    finetunes = {"a": gpt2.finetunes["a"], "zero": gpt2.base}
    assert any("zero" in w and "base" in w for w in emr_hf.check(emr_hf.Recipe(gpt2.base, finetunes)).warnings)
    report = emr_hf.merge(gpt2.base, finetunes, tmp_path / "out")
    assert sum("zero" in warning for warning in report.warnings) == 1
    assert_is_the_base(tmp_path / "out", "zero", gpt2.base)


def test_a_copy_of_the_base_is_warned_of_and_works(gpt2, tmp_path):
    finetunes = {"zero": copy_of(gpt2.base, tmp_path / "copy"), "a": gpt2.finetunes["a"]}
    report = emr_hf.merge(gpt2.base, finetunes, tmp_path / "out")
    assert any("zero" in warning and "equals the base" in warning for warning in report.warnings)
    assert report.tasks["zero"].density == 0
    assert report.tasks["zero"].rescaler == 1
    assert_is_the_base(tmp_path / "out", "zero", gpt2.base)


def assert_is_the_base(repo, task, base):
    live = emr_hf.EMRMergedModel.from_pretrained(repo, emr_task=task).model.state_dict()
    assert all(torch.equal(live[name], tensor) for name, tensor in load_file(base / "model.safetensors").items())


def test_the_same_folder_twice_is_warned_of_and_works(bert_inputs, tmp_path):
    folder = bert_inputs.finetunes["items"]
    finetunes = {"one": folder, "two": folder.parent / "finetune-0" / ".." / folder.name}
    warnings = emr_hf.check(emr_hf.Recipe(bert_inputs.base, finetunes)).warnings
    assert warnings == ["two: is the same checkpoint as one"]
    report = emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "out")
    assert report.tasks["one"].rescaler == report.tasks["two"].rescaler == 1
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    one, two = ({n: t.clone() for n, t in model.set_task(t).model.state_dict().items()} for t in finetunes)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_same_loaded_model_twice_is_warned_of(bert_inputs):
    model = loaded_model(bert_inputs.finetunes["items"], None)
    warnings = emr_hf.check(emr_hf.Recipe(bert_inputs.base, {"one": model, "two": model})).warnings
    assert warnings == ["two: is the same checkpoint as one"]


def test_a_copy_of_another_finetune_is_warned_of(bert_inputs, tmp_path):
    folder = bert_inputs.finetunes["items"]
    finetunes = {"one": folder, "two": copy_of(folder, tmp_path / "copy")}
    report = emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "out")
    assert any("one" in warning and "two" in warning for warning in report.warnings)


def test_a_finetune_of_narrower_dtype_than_the_base_is_warned_of(tmp_path):
    inputs = tiny.write_inputs(tiny.BERT, tmp_path / "wide", ("a",))
    narrow = tiny.write_inputs(tiny.BERT, tmp_path / "narrow", ("a",), dtype=torch.bfloat16)
    warnings = emr_hf.check(emr_hf.Recipe(inputs.base, narrow.finetunes)).warnings
    assert any("a: is bfloat16 and the base float32" in warning for warning in warnings)


def test_warnings_stand_in_the_plan_and_in_the_report(bert_inputs, tmp_path):
    folder = bert_inputs.finetunes["items"]
    recipe = emr_hf.Recipe(bert_inputs.base, {"one": folder, "two": folder})
    [warning] = emr_hf.check(recipe).warnings
    assert warning in str(emr_hf.check(recipe))
    assert warning in str(emr_hf.merge_recipe(recipe, tmp_path / "out"))
