"""The repo on disk: valid safetensors, written once, complete or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import emr_hf
from emr_hf import merging, publication, repo
from emr_hf.errors import RepoError, TensorError
from emr_hf.storage import TensorInfo
from tests import HANGS, tiny
from tests.test_sources import assert_same_bits, stored_tensors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
INFOS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"  # safetensors' own
    ),
    st.builds(TensorInfo, st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=12,
)


# Files


@settings(max_examples=60)
@given(infos=INFOS, size=st.sampled_from([1, 40, 200, "1KB", "5GB"]), seed=st.integers(0, 99))
def test_what_is_written_is_what_safetensors_reads(tmp_path_factory, infos, size, seed):
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(seed)
    expected = {n: torch.rand(i.shape, generator=generator).mul(9).to(i.dtype) for n, i in infos.items()}
    repo.create_weights(folder, infos, size)
    writer = repo.WeightsWriter(folder, infos)
    for name in reversed(list(infos)):
        writer.write(name, expected[name])
    writer.close()
    assert_same_bits(stored_tensors(folder), expected)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("size", [1, 20_000, "20KB", "5GB"])
def test_a_repo_of_any_shard_size_loads_and_holds_the_same(bert_inputs, bert_repo, tmp_path, size):
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out", max_shard_size=size)
    assert_same_bits(stored_tensors(tmp_path / "out"), stored_tensors(bert_repo))
    expected = emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="items").model.state_dict()
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").set_task("items")
    assert_same_bits(loaded.model.state_dict(), expected)


def test_an_index_names_every_tensor_and_its_shard(bert_inputs, tmp_path):
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out", max_shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {file: set(load_file(tmp_path / "out" / file)) for file in set(index["weight_map"].values())}
    assert len(shards) > 2
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(shards)
    assert all(name in shards[file] for name, file in index["weight_map"].items())
    assert sum(map(len, shards.values())) == len(index["weight_map"])
    sizes = [tensor.nbytes for tensor in stored_tensors(tmp_path / "out").values()]
    assert index["metadata"]["total_size"] == sum(sizes)


def test_tensors_start_where_their_dtype_is_aligned(bert_repo):
    content = (bert_repo / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    width = {"F32": 4, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + size + entry["data_offsets"][0]) % width[entry["dtype"]] == 0, name


@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_an_exported_task_loads_with_transformers_alone(bert_repo, tmp_path, size):
    emr_hf.export(bert_repo, "mnli.v1", tmp_path / "plain", max_shard_size=size)
    assert (tmp_path / "plain" / "model.safetensors.index.json").exists() == (size == "20KB")
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "plain")
    live = emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="mnli.v1")
    assert_same_bits(plain.state_dict(), live.model.state_dict())


def test_a_repo_names_no_path_of_the_machine_that_made_it(bert_inputs, bert_repo):
    for path in bert_repo.iterdir():
        assert str(bert_inputs.base.parent).encode() not in path.read_bytes(), path.name
        assert str(bert_repo.parent).encode() not in path.read_bytes(), path.name


def test_two_merges_of_one_recipe_are_the_same_bytes(bert_inputs, bert_repo, tmp_path):
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (bert_repo / "model.safetensors").read_bytes()


def test_saving_and_loading_keeps_everything(bert_repo, tmp_path):
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="items")
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert_same_bits(stored_tensors(tmp_path / "again"), stored_tensors(bert_repo))
    assert (tmp_path / "again/modeling_emr_hf.py").read_bytes() == (bert_repo / "modeling_emr_hf.py").read_bytes()
    again, before = (json.loads((path / "emr_report.json").read_text()) for path in (tmp_path / "again", bert_repo))
    assert {*again.pop("digests")} == {path.name for path in (tmp_path / "again").glob("*.safetensors")}
    assert {*before.pop("digests")} == {"model.safetensors"} and again == before


@pytest.fixture
def two_tensors(tmp_path):
    infos = {"a": TensorInfo((4, 2), torch.float32), "b": TensorInfo((8,), torch.float32)}
    repo.create_weights(tmp_path, infos, "5GB")
    return tmp_path, infos


@pytest.mark.parametrize("values, start", [(9, 0), (8, 1), (1, 8), (1, -1), (0, 9)])
def test_no_value_is_written_beyond_its_tensor(two_tensors, values, start):
    folder, infos = two_tensors
    writer = repo.WeightsWriter(folder, infos)
    for name in infos:
        writer.write(name, torch.full((8,), 2.0))
    for name in infos:
        with pytest.raises(TensorError, match=f"{name} has 8 elements, got {values} to write from {start} on"):
            writer.write(name, torch.ones(values), start)
    writer.close()
    assert all((tensor == 2).all() for tensor in stored_tensors(folder).values())


def test_a_tensor_that_is_not_written_in_full_is_named(two_tensors):
    folder, infos = two_tensors
    writer = repo.WeightsWriter(folder, infos)
    with pytest.raises(RepoError, match="^a: 0 of its 8 elements have been written"):
        writer.close()
    writer.write("a", torch.ones(4, 2))
    writer.write("b", torch.ones(5), 3)
    with pytest.raises(RepoError, match="^b: 5 of its 8 elements have been written"):
        writer.close()
    writer.write("b", torch.ones(3))
    writer.close()


def test_what_several_processes_write_counts_together(two_tensors):
    folder, infos = two_tensors
    main, other = repo.WeightsWriter(folder, infos), repo.WeightsWriter(folder, infos)
    main.write("a", torch.ones(8))
    other.write("b", torch.ones(8))
    with pytest.raises(RepoError, match="^b: 0 of its 8"):
        main.close()
    main.count(other.written)
    main.close()
    assert all(tensor.all() for tensor in stored_tensors(folder).values())


@pytest.mark.parametrize("part", ["emr.tau", "emr.mask", "emr.private", "emr.rescaler", "model."])
def test_a_merge_that_leaves_a_tensor_out_publishes_nothing(bert_inputs, tmp_path, monkeypatch, part):
    write, left_out = repo.WeightsWriter.write, []

    def leaving_out(writer, name, values, start=0):
        if name.startswith(part) and not left_out:
            left_out.append(name)
        if name not in left_out:
            write(writer, name, values, start)

    monkeypatch.setattr(repo.WeightsWriter, "write", leaving_out)
    with pytest.raises(RepoError, match="0 of its .* elements have been written") as caught:
        emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out")
    assert str(caught.value).startswith(f"{left_out[0]}: ")
    assert list(tmp_path.iterdir()) == []


# Complete or not at all


def fail(*args, **kwargs):
    raise RuntimeError("struck by lightning")


STAGES = {
    "at the first tensor": (merging, "_elections"),
    "between merged and private tensors": (merging, "_write_private"),
    "before the weights are flushed": (repo.WeightsWriter, "close"),
    "before the configuration": (emr_hf.EMRConfig, "save_pretrained"),
    "before the card": (merging, "write_repo_files"),
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, MemoryError, SystemExit])
def test_an_interrupted_merge_leaves_nothing(bert_inputs, tmp_path, monkeypatch, stage, interruption):
    def interrupt(*args, **kwargs):
        raise interruption("struck by lightning")

    monkeypatch.setattr(*stage, interrupt)
    with pytest.raises(interruption):
        emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_an_interrupted_merge_leaves_the_old_repo(bert_inputs, tmp_path, monkeypatch, stage):
    out = tmp_path / "out"
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(*stage, fail)
    with pytest.raises(RuntimeError, match="lightning"):
        emr_hf.merge(bert_inputs.base, {"only": bert_inputs.finetunes["items"]}, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_old_repo(bert_inputs, tmp_path, monkeypatch, failing):
    out = tmp_path / "out"
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    calls, rename = [], type(out).rename

    def rename_or_fail(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(publication, "_exchange", lambda one, other: False)  # as on systems without such a call
    monkeypatch.setattr(type(out), "rename", rename_or_fail)
    with pytest.raises(emr_hf.RepoError, match="Input/output error"):
        emr_hf.merge(bert_inputs.base, {"only": bert_inputs.finetunes["items"]}, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_nothing(bert_repo, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.BertForSequenceClassification, "save_pretrained", fail)
    with pytest.raises(RuntimeError, match="lightning"):
        emr_hf.export(bert_repo, "items", tmp_path / "plain")
    with pytest.raises(emr_hf.UnknownTaskError):
        emr_hf.export(bert_repo, "item", tmp_path / "plain")
    assert not any(tmp_path.iterdir())


# One process imports emr_hf once; each of its children is killed at another point of a merge.
KILLED = """
import os, pathlib, signal, sys
import torch
torch.set_num_threads(1)
import emr_hf
from emr_hf import merging, publication, repo

base, finetune, folder = map(pathlib.Path, sys.argv[1:])

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def after(function):
    def run(*args, **kwargs):
        result = function(*args, **kwargs)
        kill()
    return run

path_type = type(folder)
points = {
    "tensor": lambda: setattr(merging.election, "elect_block", kill),
    "private": lambda: setattr(merging, "_write_private", kill),
    "config": lambda: setattr(emr_hf.EMRConfig, "save_pretrained", kill),
    "card": lambda: setattr(merging, "write_repo_files", kill),
    "rename": lambda: (setattr(path_type, "rename", kill), setattr(publication, "_exchange", kill)),
    "renamed": lambda: (
        setattr(path_type, "rename", after(path_type.rename)),
        setattr(publication, "_exchange", after(publication._exchange)),
    ),
}
for name, patch in points.items():
    for out, overwrite in ((folder / f"new-{name}", False), (folder / f"old-{name}", True)):
        child = os.fork()
        if child == 0:
            patch()
            emr_hf.merge(base, {"only": finetune}, out, overwrite=overwrite, progress=False)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, overwrite, status)
"""
POINTS = ("tensor", "private", "config", "card", "rename", "renamed")


def state_of(out):
    """What a folder is after a merge into it was killed."""
    if not out.exists():
        return "nothing"
    tensors = stored_tensors(out)
    tasks = emr_hf.EMRMergedModel.from_pretrained(out).tasks
    complete = (out / "README.md").exists() and set(tensors) == set(load_file(out / "model.safetensors"))
    return {("only",): "new", ("glue/sst2", "mnli.v1", "items"): "old"}[tuple(tasks)] if complete else "half"


def test_a_merge_killed_at_any_point_leaves_the_old_state_or_the_new(bert_inputs, bert_repo, tmp_path):
    """`new-*` had no repo before the killed merge, `old-*` had a copy of `bert_repo`."""
    for point in POINTS:
        shutil.copytree(bert_repo, tmp_path / f"old-{point}")
    arguments = [str(path) for path in (bert_inputs.base, bert_inputs.finetunes["items"], tmp_path)]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], check=True, timeout=HANGS)
    unfinished = POINTS[:-1]
    expected = {f"new-{point}": "nothing" for point in unfinished} | {f"old-{point}": "old" for point in unfinished}
    assert {name: state_of(tmp_path / name) for name in expected} == expected
    assert state_of(tmp_path / "new-renamed") == "new"
    emr_hf.merge(bert_inputs.base, {"only": bert_inputs.finetunes["items"]}, tmp_path / "new-tensor")
    assert state_of(tmp_path / "new-tensor") == "new"
    assert state_of(tmp_path / "old-renamed") == "new"


# Spoilt repos


def test_a_truncated_repo_is_named(bert_repo, tmp_path):
    spoilt = shutil.copytree(bert_repo, tmp_path / "spoilt")
    content = (spoilt / "model.safetensors").read_bytes()
    for size in (0, 100, len(content) - 1):
        (spoilt / "model.safetensors").write_bytes(content[:size])
        for use in (emr_hf.inspect, lambda path: emr_hf.export(path, "items", tmp_path / "plain")):
            with pytest.raises(emr_hf.EMRError, match="spoilt"):
                use(spoilt)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_repo_with_a_missing_file_is_named(bert_repo, tmp_path, name):
    spoilt = shutil.copytree(bert_repo, tmp_path / "spoilt")
    (spoilt / name).unlink()
    for use in (emr_hf.inspect, lambda path: emr_hf.export(path, "items", tmp_path / "plain")):
        with pytest.raises(emr_hf.EMRError, match="spoilt"):
            use(spoilt)


def test_a_plain_checkpoint_is_no_merged_repo(bert_inputs, tmp_path):
    for use in (emr_hf.inspect, lambda path: emr_hf.export(path, "items", tmp_path / "plain")):
        with pytest.raises(emr_hf.RepoError, match=f"{bert_inputs.base} is no merged repo"):
            use(bert_inputs.base)


def test_a_folder_that_does_not_exist_is_no_merged_repo(tmp_path):
    for use in (emr_hf.inspect, lambda path: emr_hf.export(path, "items", tmp_path / "plain")):
        with pytest.raises(emr_hf.RepoError, match="nowhere is no merged repo"):
            use(tmp_path / "nowhere")


def test_a_repo_of_a_later_format_is_refused(bert_repo, tmp_path):
    (tmp_path / "later").mkdir()
    content = json.loads((bert_repo / "config.json").read_text())
    (tmp_path / "later" / "config.json").write_text(json.dumps({**content, "emr_format": 99}))
    with pytest.raises(emr_hf.RepoError, match="version 99.*upgrade"):
        emr_hf.EMRMergedModel.from_pretrained(tmp_path / "later")


# Tokenizers


def write_tokenizer(folder, words):
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(folder)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Inputs with tokenizers, the second task's another, and their repo."""
    folder = tmp_path_factory.mktemp("spoken")
    inputs = tiny.write_inputs(tiny.BERT, folder, ("a", "b"))
    for path, words in ((inputs.base, "x y"), (inputs.finetunes["a"], "x y"), (inputs.finetunes["b"], "p q r")):
        write_tokenizer(path, words.split())
    emr_hf.merge(inputs.base, inputs.finetunes, folder / "out")
    return inputs, folder / "out"


@pytest.mark.parametrize(("task", "size"), [("a", 7), ("b", 8)])
@pytest.mark.parametrize("saved_again", [False, True])
def test_each_task_is_exported_with_its_own_tokenizer(spoken, tmp_path, task, size, saved_again):
    repo_folder = spoken[1]
    if saved_again:
        emr_hf.EMRMergedModel.from_pretrained(repo_folder).save_pretrained(tmp_path / "again")
        transformers.AutoTokenizer.from_pretrained(repo_folder).save_pretrained(tmp_path / "again")
        repo_folder = tmp_path / "again"
    emr_hf.export(repo_folder, task, tmp_path / "plain")
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")) == size


def test_tokenizers_name_no_path_of_the_machine_that_made_them(spoken):
    inputs, out = spoken
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert str(inputs.base.parent).encode() not in path.read_bytes(), path.name
