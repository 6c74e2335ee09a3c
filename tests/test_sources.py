"""Every kind of input: folders, Hub ids, loaded models; safetensors and `.bin`, single and sharded."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import ModelInfo, get_local_safetensors_metadata
from huggingface_hub.errors import (
    HfHubHTTPError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import emr_hf
from emr_hf import sources
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# Helpers that other test files use too.


def copy_of(folder, to):
    """A checkpoint's folder that a test may spoil."""
    return Path(shutil.copytree(folder, to))


def edit_json(path, **changes):
    """Set fields of a JSON file; a value of `None` drops the field."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def edit_tensors(folder, **changes):
    """Set tensors of `model.safetensors`, `__` in a name for a dot; a value of `None` drops the tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors.update({name.replace("__", "."): value for name, value in changes.items()})
    tensors = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def stored_tensors(folder):
    """All tensors of a folder's safetensors files."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(*(side[name].reshape(-1).view(torch.uint8) for side in (one, other))), name


# Kinds of input. Each turns a folder with safetensors into another reference to the same weights.


def sharded_safetensors(folder, to):
    copy_of(folder, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    return write_shards(to, tensors, "model", ".safetensors", save_file)


def write_shards(to, tensors, stem, suffix, save):
    names = sorted(tensors)
    files = [f"{stem}-{i + 1:05}-of-00003{suffix}" for i in range(3)]
    for i, file in enumerate(files):
        save({name: tensors[name] for name in names[i::3]}, to / file)
    weight_map = {name: files[i % 3] for i, name in enumerate(names)}
    (to / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return to


def bin_tensors(folder, to):
    copy_of(folder, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    return tensors


def single_bin(folder, to):
    torch.save(bin_tensors(folder, to), to / "pytorch_model.bin")
    return to


def old_bin(folder, to):
    torch.save(bin_tensors(folder, to), to / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return to


def sharded_bin(folder, to):
    return write_shards(to, bin_tensors(folder, to), "pytorch_model", ".bin", torch.save)


def loaded_model(folder, to):
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype="auto")


def path_as_text(folder, to):
    return str(folder)


KINDS = [sharded_safetensors, single_bin, old_bin, sharded_bin, loaded_model, path_as_text]


@pytest.fixture(scope="module", params=[tiny.BERT, tiny.GPT2, tiny.MIXTRAL, tiny.RESNET], ids=str)
def merged(request, tmp_path_factory):
    """Folders of an architecture and the tensors of their merge."""
    folder = tmp_path_factory.mktemp("inputs")
    inputs = tiny.write_inputs(request.param, folder, ("a", "b"), dtype=torch.bfloat16)
    emr_hf.merge(inputs.base, inputs.finetunes, folder / "out")
    return inputs, stored_tensors(folder / "out")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_input_gives_the_same_bits(merged, kind, tmp_path):
    inputs, expected = merged
    base = kind(inputs.base, tmp_path / "base")
    finetunes = {task: kind(folder, tmp_path / task) for task, folder in inputs.finetunes.items()}
    emr_hf.merge(base, finetunes, tmp_path / "out")
    assert_same_bits(stored_tensors(tmp_path / "out"), expected)


def test_kinds_of_input_may_be_mixed(merged, tmp_path):
    inputs, expected = merged
    first, second = inputs.finetunes.values()
    finetunes = {"a": loaded_model(first, None), "b": old_bin(second, tmp_path / "b")}
    emr_hf.merge(sharded_safetensors(inputs.base, tmp_path / "base"), finetunes, tmp_path / "out")
    assert_same_bits(stored_tensors(tmp_path / "out"), expected)


def test_a_merge_leaves_loaded_models_as_they_were(bert_inputs, tmp_path):
    models = {task: loaded_model(folder, None) for task, folder in bert_inputs.finetunes.items()}
    before = {task: {n: t.clone() for n, t in m.state_dict().items()} for task, m in models.items()}
    labels = {task: dict(m.config.id2label) for task, m in models.items()}
    emr_hf.merge(loaded_model(bert_inputs.base, None), models, tmp_path / "out")
    for task, model in models.items():
        assert_same_bits(model.state_dict(), before[task])
        assert model.config.id2label == labels[task]


def test_safetensors_are_preferred_to_a_bin_beside_them(bert_inputs, tmp_path):
    folder = copy_of(bert_inputs.base, tmp_path / "base")
    (folder / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    emr_hf.check(emr_hf.Recipe(folder, bert_inputs.finetunes))


def test_an_offloaded_model_is_refused(bert_inputs):
    model = loaded_model(bert_inputs.base, None)
    model.embeddings.word_embeddings.to("meta")
    with pytest.raises(emr_hf.CheckpointError, match="base: embeddings.word_embeddings.weight is offloaded"):
        emr_hf.check(emr_hf.Recipe(model, bert_inputs.finetunes))


# Pickles


class RunsCode:
    """What a malicious `.bin` holds: unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(bert_inputs, tmp_path, zipped):
    folder, marker = tmp_path / "evil", tmp_path / "was-run"
    tensors = {**bin_tensors(bert_inputs.base, folder), "evil": RunsCode(os.mkdir, str(marker))}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(emr_hf.CheckpointError, match="base: cannot load .*pytorch_model.bin with weights_only=True"):
        emr_hf.check(emr_hf.Recipe(folder, bert_inputs.finetunes))
    assert not marker.exists()


def test_every_bin_is_loaded_with_weights_only(bert_inputs, tmp_path, monkeypatch):
    calls = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: calls.append(options) or load(*args, **options))
    base = sharded_bin(bert_inputs.base, tmp_path / "base")
    emr_hf.check(emr_hf.Recipe(old_bin(bert_inputs.base, tmp_path / "old"), bert_inputs.finetunes))
    emr_hf.merge(base, bert_inputs.finetunes, tmp_path / "out")
    assert len(calls) >= 4
    assert all(options["weights_only"] is True for options in calls)


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [torch.zeros(3)], {"state_dict": {"a": torch.zeros(3)}}, {"step": 3}, {1: torch.zeros(3)}],
    ids=["tensor", "list", "nested", "number", "integer-key"],
)
def test_a_bin_that_is_no_dictionary_of_tensors_is_refused(bert_inputs, tmp_path, content):
    folder = tmp_path / "base"
    bin_tensors(bert_inputs.base, folder)
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(
        emr_hf.CheckpointError, match="base: .*pytorch_model.bin: .*expected (a dictionary of|named) tensors"
    ):
        emr_hf.check(emr_hf.Recipe(folder, bert_inputs.finetunes))


def test_no_code_of_a_checkpoint_is_run_and_nobody_is_asked(bert_inputs, tmp_path, monkeypatch):
    folder, marker = copy_of(bert_inputs.base, tmp_path / "base"), tmp_path / "was-run"
    edit_json(folder / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    code = f"import os\nos.mkdir({str(marker)!r})\nfrom transformers import BertConfig as OwnConfig\n"
    (folder / "configuration_own.py").write_text(code)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    with pytest.raises(emr_hf.CheckpointError, match="base: "):
        emr_hf.check(emr_hf.Recipe(folder, bert_inputs.finetunes))
    assert not asked
    assert not marker.exists()


# Hub ids


class FakeHub:
    """Repos of a Hub that are local folders: stands in for `HfApi` and `snapshot_download` in `emr_hf.sources`."""

    def __init__(self, repos):
        self.repos = repos
        self.asked: list[tuple[str, str | None]] = []
        self.downloads: list[tuple[str, str | None, list[str]]] = []
        self.headers: list[tuple[str, str | None]] = []

    def __call__(self, *args, **kwargs):
        return self

    def folder(self, repo_id):
        if repo_id not in self.repos:
            raise RepositoryNotFoundError("404 Client Error: Repository Not Found", response=not_found())
        return self.repos[repo_id]

    def model_info(self, repo_id, *, revision=None, **kwargs):
        self.asked.append((repo_id, revision))
        self.folder(repo_id)
        if revision == "gone":
            raise RevisionNotFoundError("404 Client Error: Revision Not Found", response=not_found())
        return ModelInfo(id=repo_id, sha=COMMIT)

    def get_safetensors_metadata(self, repo_id, *, revision=None, **kwargs):
        self.headers.append((repo_id, revision))
        if not list(self.folder(repo_id).glob("*.safetensors*")):
            raise NotASafetensorsRepoError(repo_id)
        return get_local_safetensors_metadata(self.folder(repo_id))

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None, **kwargs):
        self.downloads.append((repo_id, revision, list(allow_patterns)))
        return str(self.folder(repo_id))

    def list_repo_files(self, repo_id, *, revision=None, **kwargs):
        return [path.name for path in self.folder(repo_id).iterdir()]

    def patterns(self):
        return [pattern for _, _, patterns in self.downloads for pattern in patterns]


def not_found():
    """A response of the Hub, as its errors want one."""
    return SimpleNamespace(headers={}, request=None)


@pytest.fixture
def hub(bert_inputs, monkeypatch):
    tasks = {f"me/{index}": folder for index, folder in enumerate(bert_inputs.finetunes.values())}
    hub = FakeHub({"google/tiny-bert": bert_inputs.base, **tasks})
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "HfApi", hub)
    monkeypatch.setattr(sources, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def hub_finetunes(bert_inputs):
    return {task: f"me/{index}" for index, task in enumerate(bert_inputs.finetunes)}


def test_hub_ids_give_the_same_bits_as_folders(hub, hub_finetunes, bert_repo, tmp_path):
    emr_hf.merge("google/tiny-bert", hub_finetunes, tmp_path / "out")
    assert_same_bits(stored_tensors(tmp_path / "out"), stored_tensors(bert_repo))


def test_a_hub_repo_with_bins_only_gives_the_same_bits(hub, hub_finetunes, bert_repo, tmp_path):
    hub.repos["me/0"] = sharded_bin(hub.repos["me/0"], tmp_path / "bins")
    emr_hf.merge("google/tiny-bert", hub_finetunes, tmp_path / "out")
    assert_same_bits(stored_tensors(tmp_path / "out"), stored_tensors(bert_repo))


def test_a_revision_is_resolved_to_a_commit_that_is_used_throughout_and_recorded(hub, hub_finetunes, tmp_path):
    first = next(iter(hub_finetunes))
    report = emr_hf.merge("google/tiny-bert@v1.0", {**hub_finetunes, first: "me/0@refs/pr/1"}, tmp_path / "out")
    assert hub.asked == [("google/tiny-bert", "v1.0"), ("me/0", "refs/pr/1"), ("me/1", None), ("me/2", None)]
    assert {revision for _, revision, _ in hub.downloads} == {COMMIT}
    assert {revision for _, revision in hub.headers} == {COMMIT}
    config = emr_hf.EMRConfig.from_pretrained(tmp_path / "out")
    assert (config.base_model_name_or_path, config.base_revision) == ("google/tiny-bert", COMMIT)
    assert (config.tasks[first]["source"], config.tasks[first]["revision"]) == ("me/0", COMMIT)
    assert (report.base, report.base_revision, report.tasks[first].revision) == ("google/tiny-bert", COMMIT, COMMIT)


def test_checking_hub_ids_downloads_no_weights(hub, hub_finetunes):
    emr_hf.check(emr_hf.Recipe("google/tiny-bert", hub_finetunes))
    assert hub.downloads
    assert not [pattern for pattern in hub.patterns() if "safetensors" in pattern or "bin" in pattern]


def test_merging_hub_ids_downloads_no_other_weights_than_it_reads(hub, hub_finetunes, bert_inputs, tmp_path):
    """Repos also hold `onnx/model.safetensors`, `model.fp16.safetensors` and the like, each as large as the model."""
    emr_hf.merge("google/tiny-bert", hub_finetunes, tmp_path / "out")
    extra = ["model.fp16.safetensors", "onnx/model.safetensors", "adapter/adapter_model.safetensors", "tf_model.h5"]
    assert not list(filter_repo_objects(extra, allow_patterns=hub.patterns()))


@pytest.mark.parametrize("reference", ["me/nowhere", "google/tiny-bert@gone", "a b", "a/b/c", "@main"])
def test_an_unknown_hub_id_is_named(hub, hub_finetunes, reference):
    with pytest.raises(emr_hf.CheckpointError) as caught:
        emr_hf.check(emr_hf.Recipe("google/tiny-bert", {**hub_finetunes, "extra": reference}))
    assert "extra: " in str(caught.value)
    assert reference in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_clear_error(hub_finetunes):
    with pytest.raises(emr_hf.CheckpointError, match="base: 'google/tiny-bert' .*Hub"):
        emr_hf.check(emr_hf.Recipe("google/tiny-bert", hub_finetunes))


def test_a_refused_connection_is_one_clear_error(hub, hub_finetunes, monkeypatch):
    transport_error = HfHubHTTPError.__bases__[0]  # of huggingface_hub's HTTP client, and no OSError

    def refuse(*args, **kwargs):
        raise transport_error("[Errno 111] Connection refused")

    monkeypatch.setattr(hub, "model_info", refuse)
    with pytest.raises(emr_hf.CheckpointError, match="base: 'google/tiny-bert' .*Connection refused"):
        emr_hf.check(emr_hf.Recipe("google/tiny-bert", hub_finetunes))


def test_a_download_that_breaks_is_an_error_about_the_input_and_leaves_nothing(
    hub, hub_finetunes, tmp_path, monkeypatch
):
    plan = emr_hf.check(emr_hf.Recipe("google/tiny-bert", hub_finetunes))

    def broken(*args, **kwargs):
        raise HfHubHTTPError("504 Server Error: Gateway Time-out", response=not_found())

    monkeypatch.setattr(sources, "snapshot_download", broken)
    with pytest.raises(emr_hf.EMRError) as caught:
        emr_hf.merging.run(plan, tmp_path / "target" / "out")
    assert any(name in str(caught.value) for name in ["base", *hub_finetunes])
    assert "cannot write" not in str(caught.value)
    assert not any(tmp_path.glob("target*"))


def test_without_a_network_a_cached_repo_is_used(hub, hub_finetunes, bert_repo, tmp_path, monkeypatch):
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "model_info", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    cached = {name: copy_of(folder, tmp_path / name / COMMIT) for name, folder in hub.repos.items()}
    monkeypatch.setattr(sources, "snapshot_download", lambda name, local_files_only, **kwargs: cached[name])
    emr_hf.merge("google/tiny-bert", hub_finetunes, tmp_path / "out")
    assert_same_bits(stored_tensors(tmp_path / "out"), stored_tensors(bert_repo))
    assert emr_hf.inspect(tmp_path / "out").tasks["items"]["revision"] == COMMIT


def test_a_folder_wins_over_a_hub_id_of_the_same_name(hub, bert_inputs, tmp_path, monkeypatch):
    copy_of(bert_inputs.base, tmp_path / "google" / "tiny-bert")
    monkeypatch.chdir(tmp_path)
    emr_hf.check(emr_hf.Recipe("google/tiny-bert", bert_inputs.finetunes))
    assert not hub.asked


def test_a_loaded_model_keeps_the_hub_id_it_came_from(bert_inputs, tmp_path):
    base = loaded_model(bert_inputs.base, None)
    base.config.name_or_path = base.name_or_path = "google/tiny-bert"
    emr_hf.merge(base, bert_inputs.finetunes, tmp_path / "out")
    assert emr_hf.EMRConfig.from_pretrained(tmp_path / "out").base_model_name_or_path == "google/tiny-bert"


def test_a_bin_file_that_would_unpack_to_more_than_it_holds_is_refused(tmp_path):
    inputs = tiny.write_inputs(tiny.BERT, tmp_path, ("a",))
    folder, tensors = inputs.finetunes["a"], load_file(inputs.finetunes["a"] / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "bert.pooler.dense.weight"
    torch.save({**tensors, name: tensors[name][:1, :1].clone().expand(32, 32)}, folder / "pytorch_model.bin")
    with pytest.raises(emr_hf.CheckpointError, match=f"{name} stands for 4,096 bytes, but 4 are stored"):
        emr_hf.check(emr_hf.Recipe(inputs.base, {"a": folder}))
    torch.save(tensors, tmp_path / "stored.bin")
    with zipfile.ZipFile(tmp_path / "stored.bin") as stored:
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in stored.namelist():
                packed.writestr(entry, stored.read(entry))
    with pytest.raises(emr_hf.CheckpointError, match="pytorch_model.bin .* is compressed"):
        emr_hf.check(emr_hf.Recipe(inputs.base, {"a": folder}))
