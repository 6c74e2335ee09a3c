"""One gate for every reader: a repo of which something is missing, foreign, damaged or no number is read by none."""

from __future__ import annotations

import json
import math
import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import emr_hf
from emr_hf import digests
from tests import adapters, tiny
from tests.test_sources import copy_of, edit_json, stored_tensors

QUERY = "bert__encoder__layer__0__attention__self__query__weight"
MODEL_QUERY = "model.bert.encoder.layer.0.attention.self.query.weight"


def load_mapped(repo, out):
    emr_hf.EMRMergedModel.from_pretrained(repo, emr_memory="mapped")


READERS = {
    "from_pretrained": lambda repo, out: emr_hf.EMRMergedModel.from_pretrained(repo),
    "mapped": load_mapped,
    "auto": lambda repo, out: AutoModelForSequenceClassification.from_pretrained(repo),
    "inspect": lambda repo, out: emr_hf.inspect(repo),
    "export": lambda repo, out: emr_hf.export(repo, "items", out),
    "export lora": lambda repo, out: emr_hf.export(repo, "items", out, save_as="lora", rank=2),
    "remove": lambda repo, out: emr_hf.remove_task(repo, "items", out),
    "add": lambda repo, out: emr_hf.add_task(repo, "more", repo.parent / "finetune", out, progress=False),
    "push": lambda repo, out: emr_hf.push_folder(repo, "me/repo"),
}
QUICK = ("from_pretrained", "inspect", "remove")


@pytest.fixture
def spoilt(bert_inputs, bert_repo, tmp_path):
    """A copy of a repo to spoil, a finetune to add to it, and no way out to the Hub."""
    copy_of(bert_inputs.finetunes["items"], tmp_path / "finetune")
    return copy_of(bert_repo, tmp_path / "spoilt")


def refused(readers, repo, match):
    """All readers raise RepoError and write nothing."""
    before = sorted(repo.parent.iterdir())
    for name in readers:
        with pytest.raises(emr_hf.RepoError, match=match):
            READERS[name](repo, repo.parent / "out")
            pytest.fail(f"{name} did not notice")
    assert sorted(repo.parent.iterdir()) == before


# The configuration


def changed(path, value):
    """Change a field of a repo's configuration; `...` takes it away."""

    def change(content):
        *parents, name = path
        for parent in parents:
            content = content[parent]
        if value is ...:
            del content[name]
        else:
            content[name] = value

    return change


TASK = ("tasks", "items")
BIAS = (*TASK, "private", "classifier.bias")
FIELDS = [
    (("emr_format",), "3", "emr_format is '3'"),
    (("emr_format",), True, "emr_format is True"),
    (("emr_format",), ..., "emr_format is missing"),
    (("base_architecture",), None, "base_architecture is None"),
    (("base_architecture",), "os.system", "base_architecture is 'os.system'"),
    (("base_config",), [], r"base_config is \[\]"),
    (("base_config", "model_type"), ..., "base_config is"),
    (("base_config", "num_hidden_layers"), 10**9, "base_config: num_hidden_layers is 1000000000"),
    (("base_config", "hidden_size"), "x", "hidden_size|cannot use the configuration|cannot build"),
    (("tau_dtype",), "float3", "tau_dtype is 'float3'"),
    (("method",), ["emr"], r"method is \['emr'\]"),
    (("dtype",), "", "dtype is ''"),
    (("base_config", "dtype"), list("float32"), "cannot use the configuration"),
    (("default_task",), "item", "default_task is 'item'"),
    (("merged_parameters",), 3, "merged_parameters is 3"),
    (("merged_parameters",), [], r"merged_parameters is \[\]"),
    (("merged_parameters",), ["a.b", "a__b"], "merged_parameters has 'a__b' twice"),
    (("merged_parameters",), ["a/../b"], "merged_parameters is"),
    (("tensors", "bert.pooler.dense.bias"), ..., "tensors.bert.pooler.dense.bias is missing"),
    (("tensors", "bert.pooler.dense.bias"), [[-1], "float32"], "tensors.bert.pooler.dense.bias is"),
    (("tasks",), {}, "tasks is empty"),
    (("tasks",), [], r"tasks is \[\]"),
    (TASK, None, "tasks.items is None"),
    ((*TASK, "key"), "../x", "tasks.items.key is '../x'"),
    ((*TASK, "key"), "t0", "key is that of"),
    ((*TASK, "index"), "2", "tasks.items.index is '2'"),
    ((*TASK, "index"), 0, "index is that of"),
    ((*TASK, "id2label"), None, "tasks.items.id2label is None"),
    ((*TASK, "id2label"), {"x": "a"}, "tasks.items.id2label is"),
    ((*TASK, "problem_type"), "guessing", "tasks.items.problem_type is 'guessing'"),
    ((*TASK, "source"), None, "tasks.items.source is None"),
    ((*TASK, "tokenizer"), "../evil", "tasks.items.tokenizer is '../evil'"),
    ((*TASK, "tokenizer"), "/etc", "tasks.items.tokenizer is '/etc'"),
    ((*TASK, "generation_config"), "greedy", "tasks.items.generation_config is 'greedy'"),
    ((*TASK, "private"), None, "tasks.items.private is None"),
    (BIAS, [[2], "load"], "tasks.items.private.classifier.bias is"),
    (BIAS, [["x"], "float32"], "tasks.items.private.classifier.bias is"),
    (BIAS, [[1 << 40, 1 << 40], "float32"], "tasks.items.private.classifier.bias is"),
    ((*TASK, "private", "bert.pooler.dense.bias"), [[32], "float32"], "expected the name of a tensor that is not"),
    (("recipe",), None, "recipe is None"),
    (("recipe", "tasks", "items"), ..., "recipe.tasks.items is missing"),
    (("report",), 1, "report is 1"),
    (("report", "extra"), 1, "report.extra: expected only"),
    (("report", "tasks"), {}, "report.tasks.items is missing|report.tasks"),
    (("report", "tasks", "items", "density"), "much", "report.tasks.items.density is 'much'"),
    (("vectors",), "x", "vectors is 'x'"),
    (("vectors",), {"peft_type": "LORA", "target_modules": "a", "feedforward_modules": "a"}, "vectors.peft_type"),
    (("vectors",), {"peft_type": "IA3", "target_modules": "(a+)+", "feedforward_modules": "a"}, "target_modules"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "match"), FIELDS, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named(spoilt, path, value, match):
    content = json.loads((spoilt / "config.json").read_text())
    changed(path, value)(content)
    (spoilt / "config.json").write_text(json.dumps(content))
    refused(QUICK, spoilt, f"spoilt.*({match})")


TEXTS = {
    "a key twice": lambda text: text.replace('"emr_format"', '"default_task": "items",\n "emr_format"'),
    "no JSON": lambda text: text[:-9],
    "a number that is none": lambda text: text.replace('"index": 0', '"index": NaN'),
    "too deep": lambda text: '{"model_type": "emr_merged", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a list": lambda text: f"[{text}]",
    "a number": lambda text: "5",
    "binary": lambda text: "\0\1\2",
    "nothing": lambda text: "",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_what_is_no_sound_json_is_named(spoilt, kind):
    text = (spoilt / "config.json").read_text()
    (spoilt / "config.json").write_text(TEXTS[kind](text))
    refused(("inspect", "remove", "export"), spoilt, "config.json")
    refused(("from_pretrained",), spoilt, "spoilt")


def test_a_doubled_key_does_not_load(spoilt):
    (spoilt / "config.json").write_text(TEXTS["a key twice"]((spoilt / "config.json").read_text()))
    refused(("from_pretrained", "auto"), spoilt, "is given twice")


def test_what_transformers_cannot_read_is_one_error(spoilt):
    (spoilt / "model.safetensors").unlink()
    (spoilt / "model.safetensors").symlink_to("model.safetensors")
    refused(("from_pretrained", "mapped", "inspect"), spoilt, "spoilt")
    (spoilt / "model.safetensors").unlink()
    (spoilt / "model.safetensors.index.json").write_text("")
    refused(("from_pretrained", "inspect", "remove"), spoilt, "spoilt")


def test_a_head_of_another_size_than_its_labels_is_named(bert_inputs, spoilt, tmp_path):
    finetune = tmp_path / "finetune"
    tensors = load_file(finetune / "model.safetensors")
    tensors["classifier.weight"] = torch.zeros(5, 32)
    save_file(tensors, finetune / "model.safetensors", {"format": "pt"})
    for use in (
        lambda: emr_hf.check(emr_hf.Recipe(bert_inputs.base, {"a": bert_inputs.finetunes["items"], "b": finetune})),
        lambda: emr_hf.add_task(spoilt, "b", finetune, tmp_path / "out"),
    ):
        with pytest.raises(emr_hf.MismatchError, match=r"b: classifier.weight is \[5, 32\], but \[2, 32\]"):
            use()


def test_a_pipe_in_place_of_a_file_does_not_block(spoilt):
    for name in ("config.json", "model.safetensors"):
        kept = (spoilt / name).read_bytes()
        (spoilt / name).unlink()
        os.mkfifo(spoilt / name)
        refused(("inspect", "remove"), spoilt, "spoilt")
        (spoilt / name).unlink()
        (spoilt / name).write_bytes(kept)


# The tensors


def spoil(repo, name, change):
    """Change a tensor of a repo's file; `None` takes it away."""
    tensors = load_file(repo / "model.safetensors")
    value = change(tensors.pop(name, torch.zeros(1)))
    if value is not None:
        tensors[name] = value.contiguous()
    save_file(tensors, repo / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "name",
    ["emr.rescaler.t2", f"emr.mask.t2.{QUERY}", f"emr.tau.{QUERY}", MODEL_QUERY, "emr.private.t2.classifier__weight"],
)
def test_a_missing_tensor_is_named_by_every_reader(spoilt, name, monkeypatch):
    spoil(spoilt, name, lambda value: None)
    refused(READERS, spoilt, f"the tensor {name} is missing")


WRONG = {
    "too long": (f"emr.tau.{QUERY}", lambda x: torch.cat([x, x])),
    "empty": (f"emr.tau.{QUERY}", lambda x: x[:0]),
    "of another shape": (MODEL_QUERY, lambda x: x.reshape(16, 64)),
    "a short mask": (f"emr.mask.t2.{QUERY}", lambda x: x[:1]),
    "a mask of numbers": (f"emr.mask.t2.{QUERY}", lambda x: x.long()),
    "a mask of bools": (f"emr.mask.t2.{QUERY}", lambda x: x.bool()),
    "integers": (f"emr.tau.{QUERY}", lambda x: x.char()),
    "half": (MODEL_QUERY, lambda x: x.half()),
    "a rescaler of one dimension": ("emr.rescaler.t2", lambda x: x.reshape(1)),
    "an empty rescaler": ("emr.rescaler.t2", lambda x: torch.zeros(0)),
    "another's head": ("emr.private.t2.classifier__weight", lambda x: torch.zeros(3, 32)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_tensor_of_another_shape_or_dtype_is_named(spoilt, kind):
    name, change = WRONG[kind]
    spoil(spoilt, name, change)
    refused((*QUICK, "export", "export lora", "add"), spoilt, f"the tensor {name} is ")


@pytest.mark.parametrize("name", ["emr", "emr.tau.more", "model.more.weight", "emr.rescaler.t7", "odd"])
def test_a_tensor_that_nobody_knows_is_named(spoilt, name):
    spoil(spoilt, name, lambda value: value)
    refused(QUICK, spoilt, f"holds the tensor '{name}'")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["emr.rescaler.t2", f"emr.tau.{QUERY}", MODEL_QUERY, "emr.private.t2.classifier__bias"]
)
def test_a_number_that_is_none_is_named(spoilt, name, number):
    spoil(spoilt, name, lambda value: value.reshape(-1).index_fill(0, torch.tensor(0), number).reshape(value.shape))
    readers = ["from_pretrained", "mapped", "export", "add"]
    readers.append("push")
    if "private" not in name:
        readers.append("remove")
    if "rescaler" in name:
        readers.append("inspect")
    refused(readers, spoilt, "holds (nan|-?inf)|is (nan|-?inf)")


def test_a_scale_that_is_no_number_is_named(bert_inputs, tmp_path):
    copy_of(bert_inputs.finetunes["items"], tmp_path / "finetune")
    emr_hf.merge(bert_inputs.base, {"items": bert_inputs.finetunes["items"], "b": bert_inputs.finetunes["mnli.v1"]},
                 tmp_path / "spoilt", tau_dtype="int4")  # fmt: skip
    spoil(tmp_path / "spoilt", f"emr.scale.{QUERY}", lambda x: x.index_fill(0, torch.tensor(3), math.nan))
    refused(("from_pretrained", "inspect", "remove", "export"), tmp_path / "spoilt", f"emr.scale.{QUERY} holds nan")
    spoil(tmp_path / "spoilt", f"emr.scale.{QUERY}", lambda x: x[:4])
    refused(("from_pretrained", "inspect", "remove", "export", "add"), tmp_path / "spoilt", "the tensor emr.scale")


def test_infinite_numbers_are_the_bases_own_business_where_no_task_changes_them(tmp_path):
    base = adapters.write_base(tiny.BERT, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    [position] = [name for name in tensors if "position_embeddings" in name]
    tensors[position][-1] = -math.inf
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    settings = {**adapters.BERT_LORA, "task_type": "SEQ_CLS"}
    adapter = adapters.write_adapter(tmp_path / "a", tiny.BERT.architecture, base, settings, 1, "LORA")
    emr_hf.merge(base, {"a": adapter}, tmp_path / "out", progress=False)
    assert emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out").tasks == ["a"]
    tensors[position][-1] = math.nan
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(emr_hf.EMRError, match="position_embeddings.weight holds nan"):
        emr_hf.merge(base, {"a": adapter}, tmp_path / "again", progress=False)


def test_what_the_model_is_built_for_has_to_fit_too(spoilt):
    """Configuration, record and tensors agree with each other, but not with the class."""
    config = json.loads((spoilt / "config.json").read_text())
    config["base_config"]["intermediate_size"] = 64
    (spoilt / "config.json").write_text(json.dumps(config))
    refused(("from_pretrained", "auto", "export"), spoilt, r"intermediate.dense.*is \[48")


@pytest.mark.parametrize("reader", ["from_pretrained", "remove", "export lora"])
def test_a_model_of_far_more_parts_than_are_stored_is_not_built(spoilt, reader):
    config = json.loads((spoilt / "config.json").read_text())
    config["base_config"]["num_hidden_layers"] = 100_000
    (spoilt / "config.json").write_text(json.dumps(config))
    with pytest.raises(emr_hf.EMRError, match="more than [0-9,]+ parts"):
        READERS[reader](spoilt, spoilt.parent / "out")


def test_a_repo_without_a_record_is_checked_by_its_own_headers(bert_repo, spoilt):
    edit_json(spoilt / "config.json", tensors=None)
    model = emr_hf.EMRMergedModel.from_pretrained(spoilt, emr_task="items")
    right = emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="items")
    assert all(map(torch.equal, model.model.state_dict().values(), right.model.state_dict().values()))
    spoil(spoilt, f"emr.mask.t2.{QUERY}", lambda x: x[:-1])
    refused((*QUICK, "add"), spoilt, f"emr.mask.t2.{QUERY}")


def test_a_cast_is_recorded(bert_repo, tmp_path):
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "narrow")
    record = json.loads((tmp_path / "narrow" / "config.json").read_text())["tensors"]
    stored = stored_tensors(tmp_path / "narrow")
    assert {f"model.{name}" for name in record} == {name for name in stored if name.startswith("model.")}
    assert record[MODEL_QUERY.removeprefix("model.")] == [[32, 32], "bfloat16"]
    assert emr_hf.inspect(tmp_path / "narrow", verify=True).tasks.keys() == emr_hf.inspect(bert_repo).tasks.keys()


# An adapter for a base kept elsewhere


@pytest.fixture(scope="module")
def peft_repo(bert_inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, folder / "repo", save_as="peft", progress=False)
    return folder / "repo"


def base_model(bert_inputs):
    return tiny.quietly(AutoModelForSequenceClassification.from_pretrained, bert_inputs.base)


@pytest.mark.parametrize("part", [f"mask.t1.{QUERY}", f"tau.{QUERY}", "rescaler.t1", "private.t1.classifier__bias"])
def test_peft_does_not_load_a_merge_of_which_something_is_missing(bert_inputs, peft_repo, tmp_path, part):
    repo = copy_of(peft_repo, tmp_path / "repo")
    tensors = load_file(repo / "adapter_model.safetensors")
    del tensors[f"base_model.model.emr.emr_bank.{part}"]
    save_file(tensors, repo / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(emr_hf.RepoError, match=f"emr_bank.{part} is missing"):
        peft.PeftModel.from_pretrained(base_model(bert_inputs), repo)
    with pytest.raises(emr_hf.RepoError, match=f"holds no {part}"):
        model = base_model(bert_inputs)
        model.load_adapter(str(repo))  # by transformers, which does not say where the file is
        model(**tiny.BERT.inputs())


def test_a_wrong_field_of_an_adapters_merge_is_named(bert_inputs, peft_repo, tmp_path):
    repo = copy_of(peft_repo, tmp_path / "repo")
    content = json.loads((repo / "adapter_config.json").read_text())
    content["emr"]["tasks"]["items"]["key"] = "../x"
    (repo / "adapter_config.json").write_text(json.dumps(content))
    for use in (
        lambda: peft.PeftModel.from_pretrained(base_model(bert_inputs), repo),
        lambda: base_model(bert_inputs).load_adapter(str(repo)),
        lambda: emr_hf.inspect(repo),
        lambda: emr_hf.remove_task(repo, "items", tmp_path / "out"),
    ):
        with pytest.raises(emr_hf.RepoError, match="tasks.items.key is '../x'"):
            use()


@pytest.mark.parametrize(
    "change", [{"base_model_name_or_path": None}, {"base_model_name_or_path": 5}, {"revision": 5}]
)
def test_an_adapter_has_to_name_its_base(peft_repo, tmp_path, change):
    repo = copy_of(peft_repo, tmp_path / "repo")
    edit_json(repo / "adapter_config.json", **change)
    for use in (emr_hf.inspect, lambda path: emr_hf.remove_task(path, "items", tmp_path / "out")):
        with pytest.raises(emr_hf.RepoError, match=f"adapter_config.json: {next(iter(change))} is"):
            use(repo)


@pytest.mark.parametrize("shard", ["../other.safetensors", "/dev/zero", "a/../../b", "x" * 5000])
def test_an_index_names_files_beside_it_only(bert_inputs, tmp_path, shard):
    repo = tmp_path / "spoilt"
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, repo, max_shard_size="40KB", progress=False)
    index = json.loads((repo / "model.safetensors.index.json").read_text())
    index["weight_map"]["emr.rescaler.t0"] = shard
    (repo / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(("inspect", "remove", "from_pretrained"), repo, "broken index .*weight_map of tensors to files beside it")
    (repo / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 5}))
    refused(("inspect", "from_pretrained"), repo, "broken index")


# Digests


def test_digests_find_changed_values(bert_repo, spoilt, run):
    assert emr_hf.inspect(bert_repo, verify=True).tasks
    content = bytearray((spoilt / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (spoilt / "model.safetensors").write_bytes(content)
    emr_hf.inspect(spoilt)  # headers do not tell
    with pytest.raises(emr_hf.RepoError, match="model.safetensors has SHA-256 .* damaged or was changed"):
        emr_hf.inspect(spoilt, verify=True)
    found = run("inspect", spoilt, "--verify")
    assert found.status == 1 and not found.out and found.err.startswith("emr-hf: ") and found.err.count("\n") == 1
    assert run("inspect", bert_repo, "--verify").status == 0


def test_digests_are_of_all_files_and_may_be_absent(bert_repo, spoilt):
    (spoilt / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(emr_hf.RepoError, match="extra.safetensors has no digest"):
        digests.verify(spoilt)
    (spoilt / "extra.safetensors").unlink()
    edit_json(spoilt / "emr_report.json", digests=None)
    with pytest.raises(emr_hf.RepoError, match="has no digests"):
        digests.verify(spoilt)
    assert emr_hf.EMRMergedModel.from_pretrained(spoilt).tasks


@pytest.mark.parametrize("verb", ["add", "remove", "save_pretrained", "peft"])
def test_whatever_rewrites_tensors_rewrites_their_digests(bert_inputs, bert_repo, tmp_path, verb):
    out = tmp_path / "out"
    {
        "add": lambda: emr_hf.add_task(bert_repo, "more", bert_inputs.finetunes["items"], out, progress=False),
        "remove": lambda: emr_hf.remove_task(bert_repo, "items", out),
        "save_pretrained": lambda: emr_hf.EMRMergedModel.from_pretrained(bert_repo).half().save_pretrained(out),
        "peft": lambda: emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, out, save_as="peft", progress=False),
    }[verb]()
    digests.verify(out)


def test_a_download_is_verified(bert_repo, spoilt, monkeypatch):
    asked = []
    monkeypatch.setattr(digests, "hf_hub_download", lambda *names, **more: asked.append(names) or spoilt / names[1])
    files = [spoilt / "model.safetensors"]
    digests.verify_downloaded("me/repo", files, None, since=0.0)
    assert asked == [("me/repo", "emr_report.json")]
    edit_json(spoilt / "emr_report.json", digests={"model.safetensors": "0" * 64})
    digests.verify_downloaded("me/repo", files, None, since=math.inf)  # was there before
    with pytest.raises(emr_hf.RepoError, match="model.safetensors has SHA-256"):
        digests.verify_downloaded("me/repo", files, None, since=0.0)


# What is published


def test_a_repo_names_no_path_that_its_tokenizer_had(bert_inputs, tmp_path):
    finetune = copy_of(bert_inputs.finetunes["items"], tmp_path / "home" / "finetune")
    settings = {"name_or_path": str(finetune), "tokenizer_class": "BertTokenizer"}
    (finetune / "tokenizer_config.json").write_text(json.dumps(settings))
    (finetune / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    emr_hf.merge(bert_inputs.base, {"a": finetune}, tmp_path / "out", progress=False)
    emr_hf.export(tmp_path / "out", "a", tmp_path / "plain")
    for folder in ("out", "plain"):
        assert json.loads((tmp_path / folder / "tokenizer_config.json").read_text()) == {
            "tokenizer_class": "BertTokenizer"
        }


def test_a_path_of_this_machine_is_told_of_before_it_is_pushed(peft_repo, monkeypatch):
    from emr_hf import hub

    monkeypatch.setattr(hub, "HfApi", lambda **options: pytest.fail("pushed"))
    with pytest.warns(UserWarning, match="adapter_config.json: base_model_name_or_path is .*a path of this machine"):
        with pytest.raises(pytest.fail.Exception):
            emr_hf.push_folder(peft_repo, "me/repo")


def test_what_transformers_does_not_save_is_one_error(spoilt):
    content = json.loads((spoilt / "config.json").read_text())
    content["base_config"]["output_attentions"] = True
    (spoilt / "config.json").write_text(json.dumps(content))
    with pytest.raises(emr_hf.RepoError, match="transformers does not save BertForSequenceClassification"):
        emr_hf.export(spoilt, "items", spoilt.parent / "out")
    assert not (spoilt.parent / "out").exists()


def test_code_of_others_is_not_named_in_a_repo_or_an_export(bert_inputs, tmp_path):
    finetune = copy_of(bert_inputs.finetunes["items"], tmp_path / "finetune")
    edit_json(finetune / "config.json", auto_map={"AutoModelForSequenceClassification": "evil.Model"})
    emr_hf.merge(bert_inputs.base, {"a": finetune}, tmp_path / "out", progress=False)
    assert "evil" not in (tmp_path / "out" / "config.json").read_text()
    edit_json(tmp_path / "out" / "config.json", auto_map={"AutoConfig": "evil.Config"})
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    content["base_config"]["auto_map"] = {"AutoModel": "evil.Model"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(content))
    emr_hf.export(tmp_path / "out", "a", tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path / "plain").model_type == "bert"
