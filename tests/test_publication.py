"""Folders that appear complete or not at all, synced to the disk, and never in place of what others have put there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import emr_hf
from emr_hf import merging, publication, repo, staging
from tests.test_sources import assert_same_bits, copy_of, edit_json, stored_tensors


@pytest.fixture
def merge(bert_inputs):
    """A merge of one finetune."""

    def merge(out, **options):
        return emr_hf.merge(bert_inputs.base, {"only": bert_inputs.finetunes["items"]}, out, progress=False, **options)

    return merge


@pytest.fixture
def meanwhile(monkeypatch):
    """Do something while a merge is under way: once, before its last files are written."""
    finish = merging._finish

    def meanwhile(action):
        def run(*arguments):
            monkeypatch.setattr(merging, "_finish", finish)
            action()
            return finish(*arguments)

        monkeypatch.setattr(merging, "_finish", run)

    return meanwhile


def contents(folder):
    """Every file below a folder, and where links point."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


# What comes to be at the target while it is written


def test_a_folder_that_appears_stays(merge, meanwhile, tmp_path):
    out = tmp_path / "out"
    meanwhile(lambda: (out.mkdir(), (out / "thesis.tex").write_text("the only copy")))
    with pytest.raises(emr_hf.RepoError, match="out has come to exist"):
        merge(out)
    assert contents(tmp_path) == {"out/thesis.tex": b"the only copy"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_merges_the_first_to_end_gets_the_place(merge, meanwhile, tmp_path, overwrite):
    out = tmp_path / "out"
    if overwrite:
        merge(out)
    meanwhile(lambda: merge(out, method="fit", overwrite=overwrite))
    with pytest.raises(emr_hf.RepoError, match="come to exist|was changed"):
        merge(out, overwrite=overwrite)
    assert emr_hf.inspect(out).method == "fit"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("thing", ["file", "link", "pipe"])
def test_what_is_no_folder_stays_too(merge, meanwhile, tmp_path, thing):
    out = tmp_path / "out"
    make = {
        "file": lambda: out.write_text("mine"),
        "link": lambda: out.symlink_to(tmp_path / "elsewhere"),
        "pipe": lambda: os.mkfifo(out),
    }
    meanwhile(make[thing])
    with pytest.raises(emr_hf.RepoError, match="out has come to exist"):
        merge(out)
    assert os.path.lexists(out) and not out.is_dir()
    assert list(tmp_path.iterdir()) == [out]


CHANGES = {
    "a git checkout": lambda out: (out / ".git").mkdir(),
    "another configuration": lambda out: edit_json(out / "config.json", base_revision="main"),
    "no repo": lambda out: (out / "config.json").unlink(),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_the_repo_that_was_checked_is_replaced(merge, meanwhile, bert_repo, tmp_path, change):
    out = copy_of(bert_repo, tmp_path / "out")
    meanwhile(lambda: CHANGES[change](out))
    with pytest.raises(emr_hf.RepoError, match="git checkout|was changed while it was to be replaced"):
        merge(out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if change != "gone" else [])
    if change == "a git checkout":
        assert (out / ".git").is_dir()
        assert contents(out) == contents(bert_repo)


@pytest.mark.parametrize("system_exchanges", [True, False])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_change_at_the_last_moment_is_undone(merge, bert_repo, tmp_path, monkeypatch, system_exchanges, is_new):
    out, exchange = copy_of(bert_repo, tmp_path / "out"), publication._exchange
    if not is_new:
        (out / "notes.txt").write_text("written long ago")

    def exchange_late(one, other):
        if (out / "config.json").read_bytes() == (bert_repo / "config.json").read_bytes():
            (out / "notes.txt").write_text("written just now")
        return system_exchanges and exchange(one, other)

    monkeypatch.setattr(publication, "_exchange", exchange_late)
    with pytest.raises(emr_hf.RepoError, match="notes.txt is new"):
        merge(out, overwrite=True)
    assert contents(out) == {**contents(bert_repo), "notes.txt": b"written just now"}
    assert list(tmp_path.iterdir()) == [out]


def test_what_appears_between_two_renames_stays_and_the_old_repo_is_named(merge, bert_repo, tmp_path, monkeypatch):
    out, rename = copy_of(bert_repo, tmp_path / "out"), Path.rename

    def rename_and_be_overtaken(self, to):
        rename(self, to)
        if self == out:
            out.mkdir()
            (out / "thesis.tex").write_text("the only copy")

    monkeypatch.setattr(publication, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", rename_and_be_overtaken)
    with pytest.raises(emr_hf.RepoError, match="could not be put back: what was there is in (.*)") as caught:
        merge(out, overwrite=True)
    assert contents(out) == {"thesis.tex": b"the only copy"}
    assert contents(Path(str(caught.value).rpartition(" ")[2])) == contents(bert_repo)


@pytest.mark.parametrize("system_exchanges", [True, False])
def test_files_of_the_owner_go_along_into_the_new_repo(merge, bert_repo, tmp_path, monkeypatch, system_exchanges):
    out = copy_of(bert_repo, tmp_path / "out")
    if not system_exchanges:
        monkeypatch.setattr(publication, "_exchange", lambda one, other: False)
    (out / "notes").mkdir()
    (out / "notes" / "a.txt").write_text("mine")
    (out / "empty").mkdir()
    (out / ".gitattributes").write_text("* text")
    (out / "link").symlink_to("/nowhere")
    (out / "README.md").write_text("my own card")
    merge(out, overwrite=True)
    found = contents(out)
    assert found["notes/a.txt"] == b"mine" and found[".gitattributes"] == b"* text" and found["link"] == "/nowhere"
    assert found["README.md"] == b"my own card" and (out / "empty").is_dir()
    assert emr_hf.EMRMergedModel.from_pretrained(out).tasks == ["only"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_repo_that_holds_an_input_is_not_replaced(merge, bert_inputs, bert_repo, tmp_path):
    out = copy_of(bert_repo, tmp_path / "out")
    inner = copy_of(bert_inputs.finetunes["items"], out / "finetune")
    (tmp_path / "linked").mkdir()
    for path in inner.iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    before = contents(out)
    for finetune in (inner, tmp_path / "linked"):
        with pytest.raises(emr_hf.RepoError, match=r"holds an input, .* \(mine\)"):
            emr_hf.merge(bert_inputs.base, {"mine": finetune}, out, overwrite=True)
    assert contents(out) == before


# The staging folder


def test_a_staging_folder_that_is_removed_is_an_error(merge, meanwhile, tmp_path):
    meanwhile(lambda: shutil.rmtree(next(tmp_path.glob(".out.partial*"))))
    with pytest.raises(emr_hf.RepoError, match="was removed while|no weights|cannot write"):
        merge(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_removed_from_it_is_an_error(merge, monkeypatch, tmp_path):
    write = merging.write_repo_files

    def remove_weights(folder, *arguments):
        (folder / "model.safetensors").unlink()
        return write(folder, *arguments)

    monkeypatch.setattr(merging, "write_repo_files", remove_weights)
    with pytest.raises(emr_hf.RepoError, match="no weights"):
        merge(tmp_path / "out")
    assert not any(tmp_path.iterdir())


def left_over(merge, out):
    """Kill a merge into `out`; returns what it leaves."""
    child = os.fork()
    if child == 0:
        merging._finish = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        merge(out)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    [found] = [path for path in out.parent.iterdir() if ".partial-" in path.name]
    return found


@pytest.mark.parametrize("name", ["out", "n" * 240, "名" * 80])
def test_the_next_write_removes_what_a_killed_one_left(merge, tmp_path, name):
    out = tmp_path / name
    assert (left_over(merge, out) / "new" / "model.safetensors").stat().st_size > 1000
    merge(out)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("verb", ["add", "remove", "export", "align"])
def test_every_verb_that_writes_removes_it(merge, bert_inputs, bert_repo, tmp_path, verb):
    out, items = tmp_path / "out", bert_inputs.finetunes["items"]
    left_over(merge, out)
    {
        "add": lambda: emr_hf.add_task(bert_repo, "more", items, out),
        "remove": lambda: emr_hf.remove_task(bert_repo, "items", out),
        "export": lambda: emr_hf.export(bert_repo, "items", out),
        "align": lambda: emr_hf.align_recipe(emr_hf.Recipe(None, {"a": items, "b": items}), out),
    }[verb]()
    assert list(tmp_path.iterdir()) == [out]


def test_what_another_machine_left_is_named_and_stays(merge, tmp_path):
    found = left_over(merge, tmp_path / "out")
    owner = json.loads((found / "lock").read_text())
    assert owner["host"].startswith(socket.gethostname()) and owner["target"] == str(tmp_path / "out")
    (found / "lock").write_text(json.dumps({**owner, "host": "elsewhere"}))
    report = merge(tmp_path / "out")
    assert [warning for warning in report.warnings if str(found) in warning and "elsewhere" in warning]
    assert found.is_dir()


def test_what_a_running_process_has_is_named_and_stays(merge, bert_inputs, tmp_path):
    out = tmp_path / "out"
    with publication.atomic_folder(publication.check_target(out, publication.Kind("x", bool, bool))) as folder:
        (folder / "file").write_text("to come")
        assert "is writing" in staging.remove_leftovers(out)[0]
        assert folder.is_dir()
    assert contents(out) == {"file": b"to come"}


def test_a_folder_of_unknown_origin_is_named_and_stays(merge, tmp_path):
    old = tmp_path / ".out.partial-7-0123abcd"
    old.mkdir()
    (old / "model.safetensors").write_text("of an older version")
    [warning] = [text for text in merge(tmp_path / "out").warnings if "partial" in text]
    assert str(old) in warning and old.is_dir()


def test_another_target_whose_name_begins_alike_keeps_its_own(merge, tmp_path):
    long = tmp_path / ("n" * 200 + "1")
    found = left_over(merge, long)
    merge(tmp_path / ("n" * 200 + "2"))
    assert found.is_dir()


def test_an_old_repo_comes_back_after_a_kill_between_two_renames(merge, bert_repo, tmp_path, monkeypatch):
    out = copy_of(bert_repo, tmp_path / "out")
    child = os.fork()
    if child == 0:
        rename = Path.rename

        def rename_once(self, to):
            rename(self, to)
            os.kill(os.getpid(), signal.SIGKILL)

        publication._exchange, Path.rename = lambda one, other: False, rename_once
        merge(out, overwrite=True)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL and not out.exists()
    with pytest.raises(emr_hf.RepoError, match="out exists: choose another folder or give overwrite"):
        merge(out)
    assert contents(out) == contents(bert_repo) and list(tmp_path.iterdir()) == [out]


# On the disk


@pytest.fixture
def disk(monkeypatch):
    """What is synced and renamed, in order."""
    log, fsync, rename, replace = [], os.fsync, Path.rename, os.replace

    def note_sync(descriptor):
        log.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_rename(self, to):
        files = [path.relative_to(self) for path in self.rglob("*")]
        log.append(("rename", self, Path(to), files))
        return rename(self, to)

    def note_replace(source, to, **options):
        log.append(("replace", Path(to)))
        return replace(source, to, **options)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(os, "replace", note_replace)
    return log


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at open files in /proc")
@pytest.mark.parametrize("verb", ["merge", "add", "remove", "export", "align", "save_pretrained"])
def test_all_is_on_the_disk_before_and_after_the_rename(merge, bert_inputs, bert_repo, tmp_path, disk, verb):
    out, items = tmp_path / "new" / "out", bert_inputs.finetunes["items"]
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo)
    disk.clear()
    {
        "merge": lambda: merge(out, max_shard_size="40KB"),
        "add": lambda: emr_hf.add_task(bert_repo, "more", items, out),
        "remove": lambda: emr_hf.remove_task(bert_repo, "items", out),
        "export": lambda: emr_hf.export(bert_repo, "items", out),
        "align": lambda: emr_hf.align_recipe(emr_hf.Recipe(None, {"a": items, "b": items}), out),
        "save_pretrained": lambda: model.save_pretrained(out),
    }[verb]()
    [at] = [index for index, step in enumerate(disk) if step[0] == "rename" and step[2] == out]
    _, folder, _, files = disk[at]
    synced = {step[1] for step in disk[:at] if step[0] == "sync"}
    assert len(files) > 1 and {folder, *(folder / file for file in files)} <= synced
    after = [step[1] for step in disk[at:] if step[0] == "sync"]
    assert out.parent in after and tmp_path in after


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at open files in /proc")
def test_a_saved_models_files_are_renamed_one_by_one_the_configuration_last(bert_repo, tmp_path, disk):
    folder = copy_of(bert_repo, tmp_path / "saved")
    (folder / "notes.txt").write_text("mine")
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo)
    disk.clear()
    model.save_pretrained(folder, max_shard_size="40KB")
    replaced = [step[1].name for step in disk if step[0] == "replace" and step[1].parent == folder]
    shards = [name for name in replaced if name.startswith("model-")]
    assert len(shards) > 2 and replaced[-2:] == ["model.safetensors.index.json", "config.json"]
    last_shard = max(disk.index(("replace", folder / name)) for name in shards)
    index = disk.index(("replace", folder / "model.safetensors.index.json"))
    assert ("sync", folder) in disk[last_shard:index] and disk[-1] == ("sync", folder)
    assert not (folder / "model.safetensors").exists() and (folder / "notes.txt").read_text() == "mine"
    assert_same_bits(stored_tensors(folder), stored_tensors(bert_repo))
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in bert_repo.iterdir()} | {"notes.txt"}
    assert_same_bits(stored_tensors(folder), stored_tensors(bert_repo))


def test_a_model_saved_over_its_own_repo_that_is_interrupted_still_loads(bert_repo, tmp_path, monkeypatch):
    replace = os.replace
    for count in range(1, 6):
        folder, calls = copy_of(bert_repo, tmp_path / str(count)), []

        def replace_some(source, to, calls=calls, count=count):
            calls.append(to)
            if len(calls) == count:
                raise KeyboardInterrupt
            replace(source, to)

        model = emr_hf.EMRMergedModel.from_pretrained(folder)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_some)
            with pytest.raises(KeyboardInterrupt):
                model.save_pretrained(folder)
        assert_same_bits(stored_tensors(folder), stored_tensors(bert_repo))
        assert emr_hf.EMRMergedModel.from_pretrained(folder).tasks == model.tasks
        assert not list(folder.glob(".*"))


# Paths that cannot be


def test_a_path_that_no_folder_can_have_is_one_error(merge, tmp_path):
    for out, text in ((tmp_path / ("n" * 256), "256 bytes|too long"), (f"{tmp_path}/a\0b", "null byte")):
        with pytest.raises(emr_hf.RepoError, match=text):
            merge(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(emr_hf.RepoError, match="is a file, expected a folder"):
        merge(tmp_path / "file" / "out")
    with pytest.raises(emr_hf.RepoError, match="expected a folder"):
        emr_hf.EMRMergedModel.from_pretrained(merge_to(merge, tmp_path / "out")).save_pretrained(tmp_path / "file")


def merge_to(merge, out):
    merge(out)
    return out


def test_a_folder_without_permission_is_found_before_anything_is_read(merge, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may do everything
    monkeypatch.setattr(merging, "check", lambda *arguments: pytest.fail("read"))
    with pytest.raises(emr_hf.RepoError, match="no permission to write"):
        merge(tmp_path / "out")


FULL = """
import resource, sys
import emr_hf
verb, source, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes of a file
try:
    if verb == "export":
        emr_hf.export(source, "items", out)
    else:
        emr_hf.align_recipe(emr_hf.Recipe(None, {"a": source, "b": source}), out)
except emr_hf.RepoError as error:
    print(error)
"""


@pytest.mark.parametrize("verb", ["export", "align"])
def test_a_full_disk_is_one_error(bert_inputs, bert_repo, tmp_path, verb):
    source = bert_repo if verb == "export" else bert_inputs.finetunes["items"]
    command = [sys.executable, "-c", FULL, verb, source, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout.startswith(f"cannot write {tmp_path / 'out'}: "), done.stderr
    assert len(done.stdout.splitlines()) == 1 and not any(tmp_path.iterdir())


# Links


def test_links_out_of_a_folder_are_not_followed(merge, bert_inputs, bert_repo, tmp_path):
    (tmp_path / "key").write_text("PRIVATE KEY")
    linked = copy_of(bert_repo, tmp_path / "linked")
    (linked / "notes.txt").symlink_to(tmp_path / "key")
    (linked / "own.txt").write_text("mine")
    (linked / "inside.txt").symlink_to("own.txt")
    emr_hf.add_task(linked, "more", bert_inputs.finetunes["items"], tmp_path / "out", progress=False)
    assert not os.path.lexists(tmp_path / "out" / "notes.txt")
    assert (tmp_path / "out" / "inside.txt").read_text() == "mine"
    with pytest.raises(emr_hf.EMRError, match="notes.txt links to .*key, outside of"):
        emr_hf.push_folder(linked, "me/linked")
    finetune = copy_of(bert_inputs.finetunes["items"], tmp_path / "finetune")
    (finetune / "merges.txt").symlink_to(tmp_path / "key")
    with pytest.raises(emr_hf.CheckpointError, match="merges.txt links to .*key, outside of"):
        emr_hf.check(emr_hf.Recipe(bert_inputs.base, {"a": finetune}))
    (linked / "vocab.txt").symlink_to(tmp_path / "key")
    with pytest.raises(emr_hf.EMRError, match="vocab.txt links to"):
        emr_hf.export(linked, "items", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_links_of_the_hubs_cache_are_the_repos_own(tmp_path):
    cache = tmp_path / "models--me--bert"
    snapshot, blobs = cache / "snapshots" / ("0" * 40), cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("vocabulary")
    (snapshot / "vocab.txt").symlink_to("../../blobs/abc")
    (tmp_path / "other").write_text("of another repo")
    (snapshot / "merges.txt").symlink_to(tmp_path / "other")
    assert repo.is_own(snapshot / "vocab.txt", snapshot) and not repo.is_own(snapshot / "merges.txt", snapshot)
