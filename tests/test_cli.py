"""The command: exit status, results on stdout, messages on stderr, errors on one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

import emr_hf
from emr_hf import cli
from tests import HANGS, adapters, tiny


@pytest.fixture
def recipe(bert_inputs, tmp_path):
    return write_recipe(bert_inputs, tmp_path / "recipe.yaml")


def write_recipe(inputs, path, **fields):
    tasks = {task: str(folder) for task, folder in inputs.finetunes.items()}
    path.write_text(yaml.safe_dump({"base": str(inputs.base), "tasks": tasks, **fields}, sort_keys=False))
    return path


def assert_one_line_error(result, *named):
    assert result.status == 1
    assert result.out == ""
    assert result.err.startswith("emr-hf: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    for name in named:
        assert str(name) in result.err


def test_check_prints_the_plan_and_writes_nothing(run, recipe, tmp_path):
    result = run("check", recipe, tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    assert result.out == f"{emr_hf.check(emr_hf.Recipe.load(recipe))}\n"
    assert list(tmp_path.iterdir()) == [recipe]


def test_merge_prints_the_plan_on_stderr_and_the_report_on_stdout(run, recipe, bert_repo, tmp_path):
    result = run("merge", recipe, tmp_path / "out")
    assert result.status == 0
    assert "memory" in result.err and "memory" not in result.out
    assert "lambda" in result.out and "lambda" not in result.err
    merged = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert merged == (bert_repo / "model.safetensors").read_bytes()


def test_a_merge_as_json_is_the_saved_report(run, recipe, tmp_path):
    result = run("merge", recipe, tmp_path / "out", "--format", "json")
    assert result.status == 0
    assert json.loads(result.out) == json.loads((tmp_path / "out" / "emr_report.json").read_text())


def test_merge_overwrites_only_when_told(run, recipe, tmp_path):
    assert run("merge", recipe, tmp_path / "out").status == 0
    assert_one_line_error(run("merge", recipe, tmp_path / "out"), tmp_path / "out", "--overwrite")
    assert run("merge", recipe, tmp_path / "out", "--overwrite").status == 0


def test_check_tells_of_an_existing_folder(run, recipe, bert_repo, tmp_path):
    assert_one_line_error(run("check", recipe, bert_repo), bert_repo, "--overwrite")
    assert run("check", recipe, bert_repo, "--overwrite").status == 0
    assert_one_line_error(run("check", recipe, tmp_path, "--overwrite"), tmp_path, "no merged repo")


def test_inspect_prints_tasks_and_sizes(run, bert_repo):
    result = run("inspect", bert_repo)
    assert (result.status, result.err) == (0, "")
    for text in ("glue/sst2", "mnli.v1", "items", "BertForSequenceClassification", "tau", "mask", "kB"):
        assert text in result.out


def test_an_inspection_as_json_parses(run, bert_repo):
    result = run("inspect", bert_repo, "--format", "json")
    content = json.loads(result.out)
    assert (result.status, list(content["tasks"])) == (0, ["glue/sst2", "mnli.v1", "items"])
    tensors = load_file(bert_repo / "model.safetensors")
    assert sum(content["parts"].values()) == sum(tensor.nbytes for tensor in tensors.values())


def test_export_prints_the_folder(run, bert_repo, tmp_path):
    result = run("export", bert_repo, tmp_path / "plain", "--task", "items", "--max-shard-size", "20KB")
    assert (result.status, result.out) == (0, f"{tmp_path / 'plain'}\n")
    assert (tmp_path / "plain" / "model.safetensors.index.json").exists()
    transformers.BertForSequenceClassification.from_pretrained(tmp_path / "plain")


@pytest.fixture(scope="module")
def adapter_repo(tmp_path_factory):
    """(IA)³ adapters merged into an adapter, and the recipe of it, which names no base."""
    folder = tmp_path_factory.mktemp("adapters")
    base = adapters.write_base(tiny.BERT, folder / "base")
    lines = []
    for seed, task in enumerate(("sst2", "mnli")):
        settings = {**adapters.BERT_IA3, "task_type": "SEQ_CLS"}
        adapters.write_adapter(folder / task, tiny.BERT.architecture, base, settings, seed, "IA3")
        lines.append(f"  {task}: ./{task}\n")
    (folder / "recipe.yaml").write_text("tasks:\n" + "".join(lines))
    assert cli.main(["merge", str(folder / "recipe.yaml"), str(folder / "out"), "--as", "peft"]) == 0
    return folder / "out"


def test_adapters_are_merged_into_an_adapter(run, adapter_repo, tmp_path):
    result = run("check", adapter_repo.parent / "recipe.yaml", tmp_path / "out", "--as", "peft")
    assert result.status == 0 and "(IA)³ vectors" in result.out
    names = {path.name for path in adapter_repo.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "adapters", "emr_report.json"}
    assert {path.name for path in (adapter_repo / "adapters").iterdir()} == {"sst2", "mnli"}
    result = run("inspect", adapter_repo)
    assert result.status == 0 and " 0 B" not in result.out and "sst2" in result.out
    card = (adapter_repo / "README.md").read_text()
    assert "library_name: peft" in card and "PeftModel.from_pretrained(base" in card


def test_other_libraries_say_nothing_of_parts_that_they_lack(adapter_repo, tmp_path):
    """In a fresh process: PEFT imports bitsandbytes, which tells of a kernel that it has failed to load."""
    command = [sys.executable, "-m", "emr_hf", "check", adapter_repo.parent / "recipe.yaml", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_task_is_exported_in_each_form(run, adapter_repo, bert_repo, tmp_path):
    result = run("export", adapter_repo, tmp_path / "ia3", "--task", "mnli", "--as", "ia3")
    assert (result.status, result.out) == (0, f"{tmp_path / 'ia3'}\n")
    result = run("export", bert_repo, tmp_path / "lora", "--task", "items", "--as", "lora", "--rank", "4")
    assert (result.status, result.out) == (0, f"{tmp_path / 'lora'}\n")
    assert "relative L2 error" in result.err and "left out" in result.err
    assert run("export", adapter_repo, tmp_path / "plain", "--task", "sst2").status == 0
    assert_one_line_error(run("export", bert_repo, tmp_path / "x", "--task", "items", "--as", "lora"), "rank")
    assert_one_line_error(run("export", bert_repo, tmp_path / "x", "--task", "items", "--as", "ia3"), "vectors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ia3", "lora", "plain"]


def test_tasks_are_added_and_removed(run, bert_repo, bert_inputs, tmp_path):
    out = tmp_path / "out"
    finetune = bert_inputs.finetunes["items"]
    result = run("add", bert_repo, "again", finetune, out)
    assert result.status == 0 and "lost since" in result.out
    assert_one_line_error(run("add", bert_repo, "items", finetune, tmp_path / "x"), "'items'")
    assert_one_line_error(run("remove", out, "again", out), "--overwrite")
    result = run("remove", out, "again", out, "--overwrite", "--format", "json")
    assert result.status == 0
    assert list(json.loads(result.out)["tasks"]) == list(bert_inputs.finetunes)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_push_prints_where_to(run, bert_repo, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **k: calls.append(k) or SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **k: calls.append(k) or f"https://hub/{k['repo_id']}")
    repo = shutil.copytree(bert_repo, tmp_path / "merged")
    result = run("push", repo, "me/bert-emr", "--private", "--create-pr")
    assert (result.status, result.out) == (0, "https://hub/me/bert-emr\n")
    assert calls[0]["private"] is True
    assert calls[1]["create_pr"] is True


# Errors


def test_a_bad_recipe_is_one_line(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text("base: [\n")
    for verb in ("check", "merge"):
        for path in (tmp_path / "recipe.yaml", tmp_path / "nowhere.yaml", tmp_path):
            arguments = [path, tmp_path / "out"] if verb == "merge" else [path]
            assert_one_line_error(run(verb, *arguments), path)
    assert not (tmp_path / "out").exists()


def test_a_bad_checkpoint_is_one_line(run, bert_inputs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(bert_inputs.base, broken)
    (broken / "model.safetensors").write_bytes(b"")
    path = write_recipe(bert_inputs, tmp_path / "recipe.yaml", base=str(broken))
    assert_one_line_error(run("check", path), "base: ", broken)
    assert_one_line_error(run("merge", path, tmp_path / "out"), "base: ", broken)
    assert not (tmp_path / "out").exists()


def test_an_unknown_task_is_one_line_with_the_nearest_name(run, bert_repo, tmp_path):
    result = run("export", bert_repo, tmp_path / "plain", "--task", "mnli")
    assert_one_line_error(result, "'mnli'", "Did you mean 'mnli.v1'?")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["lots", "0", "-1GB", "1.5"])
def test_a_bad_shard_size_is_one_line(run, bert_repo, tmp_path, size):
    result = run("export", bert_repo, tmp_path / "plain", "--task", "items", f"--max-shard-size={size}")
    assert_one_line_error(result, size, "5GB")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["inspect", "export", "push"])
@pytest.mark.parametrize("kind", ["plain", "nowhere", "empty", "bare", "truncated"])
def test_what_is_no_merged_repo_is_one_line(run, bert_inputs, bert_repo, tmp_path, monkeypatch, verb, kind):
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **k: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **k: "https://hub")
    folder = tmp_path / kind
    if kind in ("plain", "truncated"):
        shutil.copytree(bert_inputs.base if kind == "plain" else bert_repo, folder)
    if kind == "truncated":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-1])
    if kind in ("empty", "bare"):
        folder.mkdir()
    if kind == "bare":
        (folder / "config.json").write_text('{"model_type": "emr_merged"}')
    arguments = {"inspect": [], "export": [tmp_path / "out", "--task", "items"], "push": ["me/bert-emr"]}[verb]
    assert_one_line_error(run(verb, folder, *arguments), folder)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_refuses_an_upload_is_one_line(run, bert_repo, tmp_path, monkeypatch):
    def refuse(self, repo_id, **options):
        raise HfHubHTTPError("401 Client Error: Unauthorized", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    repo = shutil.copytree(bert_repo, tmp_path / "merged")
    assert_one_line_error(run("push", repo, "me/bert-emr"), "me/bert-emr", "401")


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/bert emr", ""])
def test_an_illegal_repo_id_is_one_line(run, bert_repo, tmp_path, repo_id):
    repo = shutil.copytree(bert_repo, tmp_path / "merged")
    assert_one_line_error(run("push", repo, repo_id), repr(repo_id))


def test_an_interruption_is_told_and_leaves_nothing(run, recipe, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(emr_hf.merging, "_write_private", interrupt)
    result = run("merge", recipe, tmp_path / "out")
    assert (result.status, result.out) == (130, "")
    assert result.err.endswith("emr-hf: interrupted, nothing was written\n")
    assert list(tmp_path.iterdir()) == [recipe]


UNEXPECTED = {
    RuntimeError(
        "a bug\nof ours"
    ): "internal error: RuntimeError: a bug of ours; run again with --debug and report it",
    RecursionError("too deep"): "internal error: RecursionError: too deep; run again with --debug and report it",
    MemoryError(): "out of memory",
    torch.OutOfMemoryError("tried to allocate 3 GB"): "out of memory: tried to allocate 3 GB",
    OSError(errno.ENOSPC, "No space left on device"): "[Errno 28] No space left on device",
    OSError(errno.EROFS, "Read-only file system", "x"): "[Errno 30] Read-only file system: 'x'",
    emr_hf.OptionError("one\nand two"): "one and two",
}


@pytest.mark.parametrize(("error", "line"), UNEXPECTED.items(), ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("debug", [None, "before", "after"])
def test_every_error_is_one_line_and_a_traceback_with_debug(run, bert_repo, monkeypatch, error, line, debug):
    def fail(repo, verify):
        raise error

    monkeypatch.setattr(emr_hf, "inspect", fail)
    result = run(*["--debug"] * (debug == "before"), "inspect", bert_repo, *["--debug"] * (debug == "after"))
    assert (result.status, result.out) == (1, "")
    assert result.err.splitlines()[-1] == f"emr-hf: {line}"
    assert ("Traceback" in result.err and "in fail" in result.err) == (debug is not None)
    assert (result.err.count("\n") == 1) == (debug is None)


def start(*arguments, **options):
    command = [sys.executable, "-m", "emr_hf", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_has_seen_enough_is_no_error(bert_repo):
    process = start("inspect", bert_repo, stdout=subprocess.PIPE)
    process.stdout.close()  # before anything is written
    _, told = process.communicate(timeout=600)
    assert (process.returncode, told) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_results_that_cannot_be_written_are_told(bert_repo):
    with open("/dev/full", "w") as full:
        process = start("inspect", bert_repo, stdout=full)
        _, told = process.communicate(timeout=600)
    assert (process.returncode, told) == (1, "emr-hf: [Errno 28] No space left on device\n")


def test_a_path_that_is_no_text_is_told_as_it_is(run, bert_repo, tmp_path):
    nowhere = os.fsdecode(os.fsencode(tmp_path) + b"/no\xfftext")
    for arguments in (
        ["inspect", nowhere],
        ["check", nowhere],
        ["export", nowhere, tmp_path / "x", "--task", "items"],
    ):
        assert_one_line_error(run(*arguments))
    process = start("export", str(bert_repo), nowhere, "--task", "items", stdout=subprocess.PIPE)
    out, told = process.communicate(timeout=600)
    assert (process.returncode, out) == (0, f"{tmp_path}/no\\udcfftext\n"), told
    assert os.path.isfile(os.path.join(nowhere, "model.safetensors"))


@pytest.mark.parametrize("verb", ["check", "merge", "align"])
@pytest.mark.parametrize(
    "path", ["~no-such-user/x", "x" * 5000, "a" * 256, "/dev/zero", "/proc/self/mem", "/root/x\ty"]
)
def test_a_recipe_that_no_system_can_read_is_one_line(run, tmp_path, verb, path):
    assert_one_line_error(run(verb, path, *[tmp_path / "out"] * (verb != "check")), "cannot read the recipe")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [[], ["mrege"], ["merge"], ["merge", "recipe.yaml"], ["export", "repo", "out"], ["check", "x", "--no"]],
)
def test_a_wrong_command_line_shows_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("usage: emr-hf")


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["--version"]])
def test_help_and_version_are_results(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "emr-hf" in captured.out or emr_hf.__version__ in captured.out


# The installed script


def test_the_installed_script_merges(recipe, tmp_path):
    script = Path(sysconfig.get_path("scripts")) / "emr-hf"
    command = [script, "merge", recipe, tmp_path / "out", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"] == "BertForSequenceClassification"
    assert "Traceback" not in done.stderr
    assert "it/s" not in done.stderr and "elements/s" not in done.stderr  # no progress bar where nobody watches
