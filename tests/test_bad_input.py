"""Bad input: one clear error that names the offender, as early as possible, and nothing left on disk."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import emr_hf
from emr_hf.checkpoint import build_skeleton
from emr_hf.sources import open_source
from tests import tiny
from tests.test_sources import bin_tensors, copy_of, edit_json, edit_tensors, loaded_model, sharded_bin, stored_tensors

QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.write_inputs(tiny.BERT, tmp_path_factory.mktemp("bert"), ("good", "bad"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return tiny.write_inputs(tiny.GPT2, tmp_path_factory.mktemp("gpt2"), ("good", "bad"))


@pytest.fixture
def spoilt(bert, tmp_path):
    """A copy of the finetune `bad` that a test may spoil."""
    return copy_of(bert.finetunes["bad"], tmp_path / "spoilt")


class Refusal:
    """Merges that must fail: with which error, what it names, whether the check finds it, what is left."""

    def __init__(self, target):
        self.target = target

    def __call__(self, error, base, finetunes, *named, late=False, **options):
        self.target.mkdir(exist_ok=True)
        if not late:
            with pytest.raises(error):
                emr_hf.check(emr_hf.Recipe(base, finetunes, **options))
        with pytest.raises(error) as caught:
            emr_hf.merge(base, finetunes, self.target / "out", **options)
        assert not any(self.target.iterdir())
        message = str(caught.value)
        assert issubclass(error, emr_hf.EMRError)
        assert "\n" not in message
        for name in named:
            assert str(name) in message
        return caught.value


@pytest.fixture
def refuse(tmp_path):
    return Refusal(tmp_path / "target")


@pytest.fixture
def refuse_bad(refuse, bert):
    """Refuse a merge of which only the finetune `bad` is wrong; its name must be told."""

    def run(error, reference, *named, **options):
        return refuse(error, bert.base, {"good": bert.finetunes["good"], "bad": reference}, "bad: ", *named, **options)

    return run


# Files


def test_a_path_that_does_not_exist_is_named(refuse_bad, tmp_path):
    refuse_bad(emr_hf.CheckpointError, tmp_path / "nowhere", "nowhere", "folder")
    refuse_bad(emr_hf.CheckpointError, str(tmp_path / "nowhere"), "nowhere", "folder")


def test_a_file_in_place_of_a_folder_is_named(refuse_bad, bert):
    refuse_bad(emr_hf.CheckpointError, bert.finetunes["bad"] / "model.safetensors", "model.safetensors", "folder")


@pytest.mark.parametrize("reference", [None, 5, b"x", {"w": torch.zeros(2)}, torch.nn.Linear(2, 2)], ids=str)
def test_a_reference_of_a_wrong_kind_is_named(refuse_bad, reference):
    refuse_bad(emr_hf.EMRError, reference, "folder")


@pytest.mark.parametrize(
    "reference", ["~no-such-user/x", "x" * 5000, "a\0b", ""], ids=["user", "long", "null", "none"]
)
def test_a_path_that_no_system_has_is_named(refuse_bad, reference):
    refuse_bad(emr_hf.CheckpointError, reference)


def test_a_missing_config_is_named(refuse_bad, spoilt):
    (spoilt / "config.json").unlink()
    refuse_bad(emr_hf.CheckpointError, spoilt, "no config.json", spoilt)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '"bert"', '{"model_type": "nonsense"}', "\xff"])
def test_a_broken_config_is_named(refuse_bad, spoilt, content):
    (spoilt / "config.json").write_bytes(content.encode("latin1"))
    refuse_bad(emr_hf.EMRError, spoilt, spoilt / "config.json")


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "big"}, {"num_hidden_layers": -1}, {"id2label": {"x": "y"}}, {"quantization_config": [1]}],
    ids=str,
)
def test_a_config_with_a_wrong_value_is_named(refuse_bad, spoilt, changes):
    edit_json(spoilt / "config.json", **changes)
    refuse_bad(emr_hf.EMRError, spoilt)


def test_a_config_that_no_model_can_be_built_of_is_named(refuse, bert, tmp_path):
    base, finetune = copy_of(bert.base, tmp_path / "base"), copy_of(bert.finetunes["bad"], tmp_path / "bad")
    for folder in (base, finetune):
        edit_json(folder / "config.json", num_attention_heads=5)
    refuse(emr_hf.EMRError, base, {"bad": finetune}, "bad", "attention heads (5)")


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"], ["BertConfig"]], ids=str)
def test_a_config_without_a_known_architecture_is_named(refuse, bert, spoilt, architectures):
    edit_json(spoilt / "config.json", architectures=architectures)
    refuse(emr_hf.MismatchError, bert.base, {"bad": spoilt}, "bad")


def test_missing_weights_are_named(refuse_bad, spoilt):
    (spoilt / "model.safetensors").unlink()
    refuse_bad(emr_hf.CheckpointError, spoilt, "no weights", spoilt, "model.safetensors")


@pytest.fixture(params=["safetensors", "bin"])
def sharded(request, bert, tmp_path):
    """The finetune `bad` in shards, and its index."""
    if request.param == "bin":
        folder = sharded_bin(bert.finetunes["bad"], tmp_path / "sharded")
        return folder, folder / "pytorch_model.bin.index.json"
    folder = tmp_path / "sharded"
    loaded_model(bert.finetunes["bad"], None).save_pretrained(folder, max_shard_size="20KB")
    return folder, folder / "model.safetensors.index.json"


def test_a_missing_shard_is_named(refuse_bad, sharded):
    folder, index = sharded
    gone = sorted(set(json.loads(index.read_text())["weight_map"].values()))[1]
    (folder / gone).unlink()
    refuse_bad(emr_hf.CheckpointError, folder, "missing shard", gone)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"],
)
def test_a_broken_index_is_named(refuse_bad, sharded, content):
    folder, index = sharded
    index.write_bytes(content.encode("latin1"))
    refuse_bad(emr_hf.CheckpointError, folder, folder)


def test_an_index_that_points_to_a_wrong_shard_is_named(refuse_bad, bert, tmp_path):
    folder = tmp_path / "sharded"
    loaded_model(bert.finetunes["bad"], None).save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[QUERY])
    edit_json(index, weight_map={**weight_map, QUERY: other})
    refuse_bad(emr_hf.CheckpointError, folder, QUERY, other)


@pytest.mark.parametrize("kept", [0, 4, 8, 9, 100, 2000, -4096, -1])
def test_a_truncated_file_is_named(refuse_bad, spoilt, kept):
    path = spoilt / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refuse_bad(emr_hf.CheckpointError, spoilt, "model.safetensors")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("kept", [0, 1, 2, 100, 2000, -4096, -1])
def test_a_truncated_bin_is_named(refuse_bad, bert, tmp_path, zipped, kept):
    folder = tmp_path / "spoilt"
    path = folder / "pytorch_model.bin"
    torch.save(bin_tensors(bert.finetunes["bad"], folder), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:kept])
    refuse_bad(emr_hf.CheckpointError, folder, "pytorch_model.bin")


def test_bytes_after_the_end_are_named(refuse_bad, spoilt):
    with (spoilt / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refuse_bad(emr_hf.CheckpointError, spoilt, "model.safetensors")


def write_header(path, change):
    """Rewrite a safetensors file's header as `change` makes it, the data as it was."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


HEADERS = {
    "shape does not fit the offsets": lambda header: header[QUERY].update(shape=[32, 16]),
    "offsets overlap": lambda header: header[QUERY].update(data_offsets=[0, 4096]),
    "offsets run backwards": lambda header: header[QUERY].update(data_offsets=[4096, 0]),
    "unknown dtype": lambda header: header[QUERY].update(dtype="F33"),
    "shape is negative": lambda header: header[QUERY].update(shape=[-32, -32]),
    "no offsets": lambda header: header[QUERY].pop("data_offsets"),
    "no object": lambda header: header.update({QUERY: 3}),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=list(HEADERS))
def test_a_header_that_is_wrong_is_named(refuse_bad, spoilt, change):
    write_header(spoilt / "model.safetensors", change)
    refuse_bad(emr_hf.CheckpointError, spoilt)


# Settings: each file that a checkpoint is read with, broken in each way


SETTINGS = ("config.json", "tokenizer_config.json", "generation_config.json")
BROKEN = {
    "empty": b"",
    "cut short": b'{"a": ',
    "a list": b"[]",
    "null": b"null",
    "a text": b'"bert"',
    "no text": b"\xff\xfe\x00",
    "NaN": b'{"a": NaN}',
    "a number without end": b'{"a": ' + b"9" * 10_000 + b"}",
    "half a character": b'{"a": "\\ud800"}',
    "too deep to parse": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "too deep to compare": b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}",
    "too large": b'{"a": "' + b"x" * (17 << 20) + b'"}',
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_broken_settings_are_named(refuse_bad, spoilt, name, content):
    (spoilt / name).write_bytes(content)
    refuse_bad(emr_hf.CheckpointError, spoilt, spoilt / name)


UNFIT = {
    "a named pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a loop of links": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("make", UNFIT.values(), ids=list(UNFIT))
def test_settings_that_are_no_file_are_named(refuse_bad, spoilt, name, make):
    (spoilt / name).unlink(missing_ok=True)
    make(spoilt / name)
    refuse_bad(emr_hf.CheckpointError, spoilt, spoilt / name)


def test_a_linked_file_is_a_file(bert, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in bert.finetunes["bad"].iterdir():
        (linked / path.name).symlink_to(path)
    assert emr_hf.check(emr_hf.Recipe(bert.base, {"linked": linked})).merged


@pytest.mark.parametrize(
    "settings",
    [{"num_return_sequences": 4}, {"early_stopping": "soon"}, {"max_new_tokens": "5"}, {"watermarking_config": 5},
     {"cache_implementation": "none such"}],
    ids=str,
)  # fmt: skip
def test_generation_settings_that_transformers_refuses_are_found_by_the_check(refuse, gpt2, tmp_path, settings):
    bad = copy_of(gpt2.finetunes["bad"], tmp_path / "bad")
    edit_json(bad / "generation_config.json", **settings)
    finetunes = {"good": gpt2.finetunes["good"], "bad": bad}
    refuse(emr_hf.CheckpointError, gpt2.base, finetunes, "bad: ", bad / "generation_config.json")
    base = copy_of(gpt2.base, tmp_path / "base")
    edit_json(base / "generation_config.json", **settings)
    refuse(emr_hf.CheckpointError, base, gpt2.finetunes, "base: ", base / "generation_config.json")


def test_generation_settings_that_transformers_only_warns_of_stay_as_they_are(gpt2, tmp_path):
    """Sampling settings without sampling, as many published models have them."""
    hot = copy_of(gpt2.finetunes["bad"], tmp_path / "hot")
    edit_json(hot / "generation_config.json", temperature=0.5)
    emr_hf.merge(gpt2.base, {"good": gpt2.finetunes["good"], "hot": hot}, tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    model.set_task("hot").save_pretrained(tmp_path / "saved")
    emr_hf.export(tmp_path / "out", "hot", tmp_path / "plain")
    assert model.generation_config.temperature == 0.5
    assert json.loads((tmp_path / "plain" / "generation_config.json").read_text())["temperature"] == 0.5


@pytest.mark.parametrize("size", [10**9, 10**18])
@pytest.mark.parametrize("name", ["num_labels", "num_hidden_layers", "vocab_size", "hidden_size", "n_layers"])
def test_sizes_that_no_weight_has_are_refused_before_anything_is_made(refuse_bad, spoilt, name, size):
    edit_json(spoilt / "config.json", **{name: size, "id2label": None, "label2id": None})
    refuse_bad(emr_hf.CheckpointError, spoilt, spoilt / "config.json", name, size)


def test_a_model_of_more_parts_than_are_stored_is_not_built(bert, spoilt):
    edit_json(spoilt / "config.json", num_hidden_layers=100_000)
    with pytest.raises(emr_hf.MismatchError, match="cannot build BertForSequenceClassification .* parts"):
        build_skeleton(open_source(spoilt, "bad"), torch.float32)
    assert build_skeleton(open_source(bert.finetunes["bad"], "bad"), torch.float32).config.num_hidden_layers == 2


@pytest.mark.parametrize("architectures", [5, "BertModel", {"0": "BertModel"}, [5], [None]], ids=str)
def test_architectures_that_are_no_names_are_named(refuse_bad, spoilt, architectures):
    edit_json(spoilt / "config.json", architectures=architectures)
    refuse_bad(emr_hf.CheckpointError, spoilt, "architectures")


CLOSED = (".", "config.json", "model.safetensors", "generation_config.json", "vocab.txt")


@pytest.mark.parametrize("label", [0, None, 1.5, ["x"], {"x": 1}], ids=str)
def test_a_label_that_is_no_text_is_named_and_may_be_given_in_the_recipe(refuse_bad, bert, spoilt, label):
    edit_json(spoilt / "config.json", id2label={"0": "first", "1": label, "2": "last"})
    refuse_bad(emr_hf.CheckpointError, spoilt, "id2label", "label 1")
    given = emr_hf.Recipe(bert.base, {"bad": spoilt}, labels={"bad": ["a", "b", "c"]})
    assert emr_hf.check(given).config.id2label == {0: "a", 1: "b", 2: "c"}


def test_settings_that_cannot_be_saved_again_are_told_by_the_check(refuse_bad, bert, spoilt):
    edit_json(spoilt / "config.json", output_attentions=True)  # which needs another kind of attention than models have
    [warning] = emr_hf.check(emr_hf.Recipe(bert.base, {"bad": spoilt})).warnings
    assert warning.startswith("bad: transformers loads a model with its config.json, but does not save one")
    edit_json(spoilt / "config.json", output_attentions=False, dtype=1.5)
    refuse_bad(emr_hf.CheckpointError, spoilt, spoilt / "config.json")


AS_NOBODY = """
import os, sys
import emr_hf
base, *tasks = sys.argv[1:]
emr_hf.check(emr_hf.Recipe(base, {"base": base}))  # what is imported later, nobody may read either
if os.geteuid() == 0:  # whom no permission stops
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for task in tasks:
    try:
        emr_hf.check(emr_hf.Recipe(base, {"bad": task}))
    except emr_hf.CheckpointError as error:
        print(error)
"""


def test_what_may_not_be_read_is_named(gpt2):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folder is closed to others by itself
        Path(folder).chmod(0o755)
        base = copy_of(gpt2.base, Path(folder, "base"))
        tasks = [copy_of(gpt2.finetunes["bad"], Path(folder, f"task-{number}")) for number in range(len(CLOSED))]
        for path in (base, *tasks):
            (path / "vocab.txt").write_text("[PAD]")
            for file in path.iterdir():
                file.chmod(0o644)
        closed = [task / name for task, name in zip(tasks, CLOSED)]
        for path in closed:
            path.chmod(0)
        command = [sys.executable, "-c", AS_NOBODY, base, *tasks]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        tasks[0].chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == len(closed), done.stderr
    for line, path in zip(lines, closed):
        assert line.startswith("bad: cannot read ") and str(path) in line and "ermission" in line


# Checkpoints that do not belong together


def test_a_finetune_of_another_architecture_is_named(refuse, bert, gpt2):
    finetunes = {"good": bert.finetunes["good"], "bad": gpt2.finetunes["bad"]}
    refuse(emr_hf.MismatchError, bert.base, finetunes, "bad: ", "GPT2LMHeadModel", "BertForSequenceClassification")
    refuse(emr_hf.MismatchError, bert.base, {"bad": gpt2.finetunes["bad"]}, "bad: ", "gpt2", "bert")


def test_a_finetune_of_another_class_is_named(refuse_bad, bert, spoilt):
    edit_json(spoilt / "config.json", architectures=["BertForTokenClassification"])
    refuse_bad(emr_hf.MismatchError, spoilt, "BertForTokenClassification", "BertForSequenceClassification")


def finetune_of(architecture, folder, **settings):
    changed = tiny.Tiny(**{**vars(architecture), "settings": {**architecture.settings, **settings}})
    return tiny.write_inputs(changed, folder, ("bad",)).finetunes["bad"]


def test_a_finetune_with_another_vocabulary_is_named(refuse_bad, tmp_path):
    other = finetune_of(tiny.BERT, tmp_path, vocab_size=100)
    refuse_bad(emr_hf.MismatchError, other, "vocabulary size", "100", "96")


@pytest.mark.parametrize(
    "settings",
    [{"hidden_size": 48}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 64},
     {"num_attention_heads": 2}],
    ids=str,
)  # fmt: skip
def test_a_finetune_of_another_size_is_named(refuse_bad, tmp_path, settings):
    [(name, size)] = settings.items()
    refuse_bad(emr_hf.MismatchError, finetune_of(tiny.BERT, tmp_path, **settings), name, size)


OTHERS = {architecture.architecture: architecture for architecture in tiny.ALL}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("T5ForConditionalGeneration", {"d_ff": 64}), ("T5ForConditionalGeneration", {"num_layers": 3}),
     ("DistilBertForSequenceClassification", {"hidden_dim": 64}), ("GPT2LMHeadModel", {"n_inner": 64}),
     ("BartForConditionalGeneration", {"encoder_ffn_dim": 48}), ("LlamaForCausalLM", {"head_dim": 16}),
     ("CLIPModel", {"projection_dim": 24})],
    ids=str,
)  # fmt: skip
def test_sizes_by_any_name_are_compared(refuse, tmp_path, architecture, settings):
    inputs = tiny.write_inputs(OTHERS[architecture], tmp_path / "inputs", ("good",))
    finetunes = {**inputs.finetunes, "bad": finetune_of(OTHERS[architecture], tmp_path / "other", **settings)}
    refuse(emr_hf.MismatchError, inputs.base, finetunes, "bad: ")


def test_a_missing_tensor_is_named(refuse_bad, spoilt):
    edit_tensors(spoilt, **{QUERY: None})
    refuse_bad(emr_hf.MismatchError, spoilt, QUERY)


def test_a_missing_head_is_named(refuse_bad, spoilt):
    edit_tensors(spoilt, classifier__weight=None)
    refuse_bad(emr_hf.MismatchError, spoilt, "classifier.weight")


def test_weights_that_do_not_fit_their_own_config_are_named(refuse, bert, tmp_path):
    """All inputs agree, so the merge would work; its result could not be loaded."""
    embeddings = torch.randn(100, 32)
    base = edit_tensors(copy_of(bert.base, tmp_path / "base"), embeddings__word_embeddings__weight=embeddings)
    bad = copy_of(bert.finetunes["bad"], tmp_path / "bad")
    edit_tensors(bad, bert__embeddings__word_embeddings__weight=embeddings)
    refuse(emr_hf.MismatchError, base, {"bad": bad}, "word_embeddings.weight", "100", "96")


def test_a_merged_repo_in_place_of_a_finetune_is_named(refuse, bert, tmp_path):
    emr_hf.merge(bert.base, bert.finetunes, tmp_path / "repo")
    for repo in (tmp_path / "repo", emr_hf.EMRMergedModel.from_pretrained(tmp_path / "repo")):
        finetunes = {"good": bert.finetunes["good"], "bad": repo}
        refuse(emr_hf.CheckpointError, bert.base, finetunes, "bad: ", "merged repo", "export")
        refuse(emr_hf.CheckpointError, repo, bert.finetunes, "base: ", "merged repo", "export")


def test_a_tied_base_with_an_untied_finetune_is_named(refuse, gpt2, tmp_path):
    untied = finetune_of(tiny.GPT2, tmp_path, tie_word_embeddings=False)
    finetunes = {"good": gpt2.finetunes["good"], "bad": untied}
    refuse(emr_hf.MismatchError, gpt2.base, finetunes, "bad: ", "tie_word_embeddings is False", "True")


def test_tied_by_config_but_stored_differently_is_named(refuse, gpt2, tmp_path):
    bad = copy_of(gpt2.finetunes["bad"], tmp_path / "bad")
    edit_tensors(bad, lm_head__weight=torch.zeros(96, 32))
    finetunes = {"good": gpt2.finetunes["good"], "bad": bad}
    refuse(emr_hf.MismatchError, gpt2.base, finetunes, "bad: ", "lm_head.weight", "transformer.wte.weight", late=True)


def test_tied_and_stored_twice_with_one_value_works(gpt2, tmp_path):
    twice = copy_of(gpt2.finetunes["bad"], tmp_path / "bad")
    embeddings = load_file(twice / "model.safetensors")["transformer.wte.weight"]
    edit_tensors(twice, lm_head__weight=embeddings.clone())
    emr_hf.merge(gpt2.base, gpt2.finetunes, tmp_path / "once")
    emr_hf.merge(gpt2.base, {**gpt2.finetunes, "bad": twice}, tmp_path / "twice")
    once, again = stored_tensors(tmp_path / "once"), stored_tensors(tmp_path / "twice")
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


# Values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize(
    ("owner", "name", "at", "where"),
    [
        ("base", "encoder.layer.1.attention.self.query.weight", (3, 5), f"base: {QUERY}[3, 5] is "),
        ("bad", QUERY, (31, 0), f"bad: {QUERY}[31, 0] is "),
        ("bad", "bert.pooler.dense.bias", (7,), "bad: bert.pooler.dense.bias[7] is "),
        ("bad", "classifier.weight", (2, 9), "bad: classifier.weight[2, 9] is "),
    ],
)
def test_a_value_that_is_not_finite_is_located(refuse, bert, tmp_path, owner, name, at, where, value):
    folders = {"base": bert.base, **bert.finetunes}
    spoilt = folders[owner] = copy_of(folders[owner], tmp_path / "spoilt")
    tensor = load_file(spoilt / "model.safetensors")[name]
    tensor[at] = value
    edit_tensors(spoilt, **{name: tensor})
    base = folders.pop("base")
    error = refuse(emr_hf.NonFiniteError, base, folders, f"{where}{value}", late=True)
    assert error.source == ["base", "good", "bad"].index(owner) - 1
    assert torch.equal(torch.tensor(error.value), torch.tensor(value)) or error.value != error.value


def test_a_statistic_that_is_not_finite_is_located(refuse, tmp_path):
    inputs = tiny.write_inputs(tiny.RESNET, tmp_path / "inputs", ("bad",))
    name = "resnet.embedder.embedder.normalization.running_var"
    tensor = load_file(inputs.finetunes["bad"] / "model.safetensors")[name]
    tensor[4] = float("inf")
    edit_tensors(inputs.finetunes["bad"], **{name: tensor})
    refuse(emr_hf.NonFiniteError, inputs.base, inputs.finetunes, f"bad: {name}[4] is inf", late=True)


def test_a_scalar_that_is_not_finite_is_named(refuse, tmp_path):
    inputs = tiny.write_inputs(OTHERS["CLIPModel"], tmp_path / "inputs", ("bad",))
    edit_tensors(inputs.finetunes["bad"], logit_scale=torch.tensor(float("nan")))
    refuse(emr_hf.NonFiniteError, inputs.base, inputs.finetunes, "bad: logit_scale is nan", late=True)


def test_an_adapter_needs_a_base_to_name(refuse, bert):
    refuse(emr_hf.OptionError, None, bert.finetunes, "save_as='peft'", "no base is given", late=True, save_as="peft")


# Quantised checkpoints


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "torchao"])
def test_a_checkpoint_quantised_by_its_config_is_named(refuse_bad, spoilt, method):
    edit_json(spoilt / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refuse_bad(emr_hf.CheckpointError, spoilt, "quantised", method)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", [QUERY, "classifier.weight"])
def test_a_tensor_of_a_quantised_dtype_is_named(refuse_bad, spoilt, dtype, name):
    tensor = load_file(spoilt / "model.safetensors")[name]
    edit_tensors(spoilt, **{name: tensor.to(dtype)})
    refuse_bad(emr_hf.CheckpointError, spoilt, name, str(dtype).removeprefix("torch."), "quantised")


@pytest.mark.parametrize("unfit", ["to_sparse", "complex"])
def test_a_tensor_that_is_no_dense_real_one_is_named(refuse_bad, bert, tmp_path, unfit):
    folder = tmp_path / "bad"
    tensors = bin_tensors(bert.finetunes["bad"], folder)
    head = tensors["classifier.weight"]
    tensors["classifier.weight"] = head.to_sparse() if unfit == "to_sparse" else head.to(torch.complex64)
    torch.save(tensors, folder / "pytorch_model.bin")
    refuse_bad(emr_hf.CheckpointError, folder, "classifier.weight")


# Where to write


def test_an_existing_folder_is_not_touched(bert, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years of work")
    for overwrite in (False, True):
        with pytest.raises(emr_hf.RepoError, match="out exists and is no merged repo"):
            emr_hf.merge(bert.base, bert.finetunes, out, overwrite=overwrite)
        with pytest.raises(emr_hf.RepoError, match="out exists and is no merged repo"):
            emr_hf.check(emr_hf.Recipe(bert.base, bert.finetunes), out, overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "thesis.txt").read_text() == "ten years of work"


def test_a_plain_checkpoint_is_never_replaced(bert, spoilt):
    before = stored_tensors(spoilt)
    with pytest.raises(emr_hf.RepoError, match="is no merged repo"):
        emr_hf.merge(bert.base, bert.finetunes, spoilt, overwrite=True)
    assert stored_tensors(spoilt).keys() == before.keys()


def test_a_merged_repo_is_replaced_with_overwrite_only(bert, tmp_path):
    emr_hf.merge(bert.base, bert.finetunes, tmp_path / "out")
    before = stored_tensors(tmp_path / "out")
    with pytest.raises(emr_hf.RepoError, match=r"out exists.*overwrite"):
        emr_hf.merge(bert.base, {"only": bert.finetunes["bad"]}, tmp_path / "out")
    assert stored_tensors(tmp_path / "out").keys() == before.keys()
    emr_hf.merge(bert.base, {"only": bert.finetunes["bad"]}, tmp_path / "out", overwrite=True)
    assert emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out").tasks == ["only"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(bert, tmp_path):
    (tmp_path / "out").mkdir()
    emr_hf.merge(bert.base, bert.finetunes, tmp_path / "out")
    assert emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out").tasks == ["good", "bad"]


def test_a_file_where_the_folder_should_be_is_named(bert, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(emr_hf.RepoError, match="file"):
            emr_hf.merge(bert.base, bert.finetunes, out, overwrite=True)
    assert (tmp_path / "file").read_text() == "x"


def test_a_disk_that_fills_up_in_the_middle_is_named_and_leaves_nothing(refuse, bert, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    refuse(emr_hf.RepoError, bert.base, bert.finetunes, "out", "No space left on device", late=True)


# Tasks' names


@pytest.mark.parametrize(
    "name", ["", " ", " a", "a ", "a\n", "a\nb", "\t", "a\0b", "\u200b", "\u202ea", 1, None, True, ("a",)]
)
def test_an_illegal_task_name_is_named(refuse, bert, name):
    with pytest.raises(emr_hf.OptionError) as caught:
        emr_hf.merge(bert.base, {"good": bert.finetunes["good"], name: bert.finetunes["bad"]}, refuse.target / "out")
    assert repr(name) in str(caught.value)
    assert "task name" in str(caught.value)


LEGAL = (
    "glue/sst2", "mnli.v1", "items", "train", "forward", "weight", "_buffers", "..", "a b", "Fließtext", "感情",
    "x|y", "*", "t0", "null", "true", "1", "{task}", "'quoted\"", "a: b", "#x", "🙂", "é", "e\u0301", "x" * 300,
)  # fmt: skip


def test_every_legal_task_name_works_from_merge_to_switch(bert, tmp_path):
    folders = list(bert.finetunes.values())
    emr_hf.merge(bert.base, {task: folders[i % 2] for i, task in enumerate(LEGAL)}, tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    assert model.tasks == list(LEGAL)
    heads = [load_file(folder / "model.safetensors")["classifier.weight"] for folder in folders]
    for i, task in enumerate(LEGAL):
        assert model.set_task(task).active_task == task
        assert torch.equal(model.model.classifier.weight, heads[i % 2])
    with model.use_task("mnli.v1"):
        assert model.active_task == "mnli.v1"


@pytest.mark.parametrize(("task", "nearest"), [("glue/sst", "glue/sst2"), ("mnli", "mnli.v1"), ("item", "items")])
def test_an_unknown_task_is_answered_with_the_nearest_names(bert_repo, task, nearest):
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo)
    with pytest.raises(emr_hf.UnknownTaskError) as caught:
        model.set_task(task)
    message = str(caught.value)
    assert f"unknown task {task!r}" in message
    assert f"Did you mean {nearest!r}?" in message
    assert "glue/sst2, mnli.v1, items" in message
    assert model.active_task == "glue/sst2"


@pytest.mark.parametrize("task", [None, 3, ["items"], ""])
def test_a_task_of_a_wrong_type_is_an_unknown_task(bert_repo, task):
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo)
    with pytest.raises(emr_hf.UnknownTaskError, match="unknown task"):
        model.set_task(task)


def test_loading_with_an_unknown_task_is_an_unknown_task(bert_repo):
    with pytest.raises(emr_hf.UnknownTaskError, match="Did you mean 'items'"):
        emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="itms")


def test_an_unknown_default_task_is_answered_with_the_known_ones(refuse, bert):
    with pytest.raises(emr_hf.OptionError, match="default_task='god'.*good.*bad"):
        emr_hf.merge(bert.base, bert.finetunes, refuse.target / "out", default_task="god")


# Recipes


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


GOOD = "base: ./base\ntasks:\n  a: ./a\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", ["mapping", "base", "tasks"]),
        ("- base", ["mapping", "list"]),
        ("just text", ["mapping", "str"]),
        ("base: [", ["YAML", "line"]),
        (b"\xff\xfe\x00", ["recipe.yaml"]),
        ("a: !!python/object/apply:os.mkdir [x]", ["YAML"]),
        ("base: ./base", ["'tasks'", "missing"]),
        (GOOD + "base: ./other", ["'base'", "twice"]),
        (GOOD + "  a: ./b", ["'a'", "twice"]),
        ("base: ./base\ntasks: {}", ["tasks", "at least one"]),
        ("base: ./base\ntasks:", ["tasks", "mapping"]),
        ("base: ./base\ntasks: [./a]", ["tasks", "mapping", "./a"]),
        ("base: ./base\ntasks: {1: ./a}", ["task name", "1"]),
        ("base: ./base\ntasks: {yes: ./a}", ["task name", "True"]),
        ("base: ./base\ntasks: {' a': ./a}", ["task name", "' a'"]),
        ("base: ./base\ntasks: {a: 5}", ["a", "folder or a Hub id", "5"]),
        ("base: ./base\ntasks: {quality: 5, a: ./a}", ["quality", "5"]),
        ("base: ./base\ntasks: {a: }", ["a", "None"]),
        ("base: 5\ntasks: {a: ./a}", ["base", "5"]),
        (GOOD + "rescaler: global", ["'rescaler'", "unknown field", "rescale"]),
        (GOOD + "finetunes: {}", ["'finetunes'", "unknown field", "tasks"]),
        (GOOD + "3: x", ["3", "unknown field"]),
        (GOOD + "rescale: globl", ["rescale", "'globl'", "global", "tensor_mean"]),
        (GOOD + "rescale: [global]", ["rescale", "['global']"]),
        (GOOD + "method:", ["method", "None", "emr", "levels"]),
        (GOOD + "method: levels\nrescale: global", ["rescale", "'global'", "levels"]),
        (GOOD + "tau_dtype: int3", ["tau_dtype", "'int3'", "float32", "bfloat16", "int4"]),
        (GOOD + "default_task: b", ["default_task", "'b'", "a"]),
        (GOOD + "private: '('", ["private", "'('"]),
        (GOOD + "private: [ok, '*']", ["private", "'*'"]),
        (GOOD + "private: [5]", ["private", "5"]),
        (GOOD + "private: 5", ["private", "5"]),
        (GOOD + "private: {a: b}", ["private", "{'a': 'b'}"]),
        (GOOD + "max_shard_size: huge", ["max_shard_size", "'huge'", "5GB"]),
        (GOOD + "max_shard_size: 0", ["max_shard_size", "0"]),
        (GOOD + "max_shard_size: -1", ["max_shard_size", "-1"]),
        (GOOD + "max_shard_size: [1]", ["max_shard_size", "[1]"]),
        (GOOD + "max_shard_size: true", ["max_shard_size", "True"]),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_one_line_that_names_the_field(recipe, text, named):
    path = recipe(text)
    with pytest.raises(emr_hf.RecipeError) as caught:
        emr_hf.Recipe.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for name in (str(path), *named):
        assert name in message


def test_a_missing_recipe_is_named(tmp_path):
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(emr_hf.RecipeError, match=f"cannot read the recipe: {path}"):
            emr_hf.Recipe.load(path)


ALIASES = "&b0 [x, x, x, x, x, x, x, x, x]"
for level in range(1, 9):
    ALIASES = f"&b{level} [{ALIASES}{f', *b{level - 1}' * 8}]"
MERGED = "{a0: &m0 {x: y}" + "".join(
    f", a{level}: &m{level} {{<<: [{', '.join([f'*m{level - 1}'] * 9)}]}}" for level in range(1, 9)
)
HEAVY = {
    "aliases of aliases": (ALIASES, "aliases"),
    "merged aliases": (MERGED + "}", "aliases"),
    "an alias of itself": ("&a [*a]", "inside"),
    "deep": ("[" * 20_000 + "]" * 20_000, "deep"),
    "a long text": ("x" * (2 << 20), "bytes"),
    "many values": (f"[{'x,' * 100_001}]", "values"),
    "a date that is none": ("2020-99-99", "YAML"),
    "a number without end": ("9" * 10_000, "YAML"),
    "a truth that is none": ("!!bool maybe", "YAML"),
}


FIELDS = ("tasks", "base", "private", "rescale", "max_shard_size", "labels", "default_task", "align", "new")


@pytest.mark.parametrize(("field", "kind"), [*((field, "aliases of aliases") for field in FIELDS),
                                             *(("labels", kind) for kind in HEAVY)])  # fmt: skip
def test_a_value_of_any_size_is_refused_while_the_recipe_is_read(recipe, field, kind):
    value, why = HEAVY[kind]
    fields = {"base": "./base", "tasks": "{a: ./a}", field: value}
    path = recipe("".join(f"{name}: {text}\n" for name, text in fields.items()))
    with pytest.raises(emr_hf.RecipeError, match=why) as caught:
        emr_hf.Recipe.load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_aliases_of_usual_size_are_what_they_stand_for(recipe):
    loaded = emr_hf.Recipe.load(recipe("base: &base ./base\ntasks: {a: *base, b: *base}\n"))
    assert loaded.finetunes["a"] == loaded.finetunes["b"] == loaded.base


@pytest.mark.parametrize("make", UNFIT.values(), ids=list(UNFIT))
def test_a_recipe_that_is_no_file_is_named(tmp_path, make):
    path = tmp_path / "recipe.yaml"
    make(path)
    with pytest.raises(emr_hf.RecipeError, match=f"cannot read the recipe: .*{path}"):
        emr_hf.Recipe.load(path)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"], ids=["long", "null"])
def test_a_recipe_by_a_name_that_no_system_has_is_named(path):
    with pytest.raises(emr_hf.RecipeError, match="cannot read the recipe: "):
        emr_hf.Recipe.load(path)


def test_peft_is_missed_by_the_check(bert, monkeypatch):
    assert peft.__version__
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(emr_hf.OptionError, match=r"pip install 'emr_hf\[adapters\]'"):
        emr_hf.check(emr_hf.Recipe(bert.base, bert.finetunes), save_as="peft")


def test_a_field_that_is_nearly_right_is_answered_with_the_nearest(recipe):
    with pytest.raises(emr_hf.RecipeError, match="[Dd]id you mean 'rescale'"):
        emr_hf.Recipe.load(recipe(GOOD + "rescal: global"))


@pytest.mark.parametrize(
    "options",
    [{"rescale": "globl"}, {"method": None}, {"tau_dtype": "int3"}, {"tau_dtype": torch.float32}, {"private": ["("]},
     {"private": 5}, {"max_shard_size": "0"}, {"max_shard_size": 0}, {"max_shard_size": "1.5"},
     {"max_shard_size": None}, {"default_task": 3}],
    ids=str,
)  # fmt: skip
def test_a_bad_option_is_named(bert, refuse, options):
    [name] = options
    with pytest.raises(emr_hf.OptionError, match=name):
        emr_hf.merge(bert.base, bert.finetunes, refuse.target / "out", **options)


@pytest.mark.parametrize("finetunes", [{}, [], None, ["a"], "a"], ids=str)
def test_finetunes_that_are_no_mapping_are_refused(bert, refuse, finetunes):
    with pytest.raises(emr_hf.OptionError, match="mapping"):
        emr_hf.merge(bert.base, finetunes, refuse.target / "out")


@pytest.mark.parametrize("private", [r"(([a-z._0-9])+)+!", [r"(\w+)\1"], ["x" * 10**6]], ids=["hang", "group", "long"])
def test_private_expressions_that_may_take_for_ever_are_refused(refuse, bert, private):
    with pytest.raises(emr_hf.OptionError, match="^private: "):
        emr_hf.check(emr_hf.Recipe(bert.base, bert.finetunes, private=private))
    with pytest.raises(emr_hf.OptionError, match="^private: "):
        emr_hf.merge(bert.base, bert.finetunes, refuse.target / "out", private=private)


def test_private_expressions_that_leave_nothing_to_merge_are_refused(refuse, bert):
    refuse(emr_hf.MismatchError, bert.base, bert.finetunes, "nothing to merge", "private", private=["."])


def test_recipes_find_folders_beside_them(bert, tmp_path, recipe):
    copy_of(bert.base, tmp_path / "models" / "base")
    copy_of(bert.finetunes["bad"], tmp_path / "models" / "bad")
    loaded = emr_hf.Recipe.load(recipe("base: models/base\ntasks: {a: ./models/bad}"))
    assert emr_hf.check(loaded).tasks == ["a"]


def test_a_broken_tokenizer_file_is_named(refuse, bert, tmp_path):
    good, bad = (copy_of(folder, tmp_path / task) for task, folder in bert.finetunes.items())
    (good / "tokenizer_config.json").write_text("{}")
    (bad / "tokenizer_config.json").write_text("{")
    refuse(emr_hf.EMRError, bert.base, {"good": good, "bad": bad}, "bad", "tokenizer_config.json")
