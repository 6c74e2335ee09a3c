"""Files that others cut short, replace or write to while they are read, and what is no file at all.

Each case runs in a process of its own, which must end by itself: neither by a signal nor never.
"""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import pickle
import shutil
import signal
import socket
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

import emr_hf
from emr_hf import bits, kernels, merging, modeling, repo, shares
from emr_hf.alignment import folders
from emr_hf.centre import MedianStorage
from emr_hf.errors import CheckpointError, NonFiniteError
from emr_hf.mapped_files import InputFile, guarded_reads
from emr_hf.regular_file import require_file
from emr_hf.storage import BinStorage, ModelStorage, SafetensorsStorage, open_adapter, open_folder
from tests import adapters, tiny

TASKS = ("one", "two", "three")
LORA = {**adapters.BERT_LORA, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
HANGS = 300  # seconds, whatever the load
guarded = pytest.mark.skipif(not kernels.available(), reason="the compiled file was not built (no C++ compiler)")


def in_child(function):
    """What a function returns in a forked process; what it raises, as `Class: message`; or the signal ending it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            faulthandler.disable()
            torch.set_num_threads(1)
            told = str(function())
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + HANGS
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hung"
        time.sleep(0.01)
    with os.fdopen(reader) as file:
        told = file.read()
    return signal.Signals(os.WTERMSIG(ended[1])).name if os.WIFSIGNALED(ended[1]) else told


def assert_told(told, error, *parts):
    assert told.startswith(f"{error}: ") and "\n" not in told, told
    for part in parts:
        assert str(part) in told, told


def cut(path):
    os.truncate(path, 0)


def replace(path):
    shutil.copyfile(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def rewrite(path):
    """Other values in place, of neither another size nor another file."""
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    later = path.stat().st_mtime_ns + 1_000_000_000  # the clock of files may stand still for some milliseconds
    os.utime(path, ns=(later, later))


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


CHANGES = {
    "cut": (cut, "was cut from"),
    "replaced": (replace, "was replaced by another file"),
    "written to": (rewrite, "was written to"),
    "grown": (grow, "has grown from"),
    "removed": (os.unlink, "is gone"),
}


# The guard


@pytest.fixture
def weights(tmp_path):
    """A file of some pages, and its storage, of which nothing has been read yet."""
    path = tmp_path / "model.safetensors"
    save_file({"small": torch.ones(8), "big": torch.ones(1 << 16)}, path)
    return path, SafetensorsStorage("task", [path])


@guarded
def test_pages_that_are_gone_read_as_zeros_and_are_told(weights):
    path, storage = weights
    size = path.stat().st_size

    def read():
        with guarded_reads([storage]) as check:
            values = storage.read("big")
            os.truncate(path, 4096)
            assert values[-10:].tolist() == [0.0] * 10
            assert 0 < float(values.sum()) < 4096
            check()

    assert_told(in_child(read), "CheckpointError", f"task: {path} was cut from {size} to 4096 bytes")


@guarded
def test_a_missing_page_is_remembered_when_the_file_is_whole_again(weights):
    path, storage = weights
    before = path.stat()

    def read():
        with guarded_reads([storage]) as check:
            values = storage.read("big")
            os.truncate(path, 4096)
            values.sum()
            os.truncate(path, before.st_size)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            with pytest.raises(CheckpointError, match="was cut short, or the disk cannot read it"):
                check()
        return storage.read("small")

    assert_told(in_child(read), "CheckpointError", f"task: {path} was cut short")


@guarded
def test_an_error_that_comes_of_a_cut_file_is_told_as_that(weights):
    path, storage = weights

    def read():
        with guarded_reads([storage]):
            values = storage.read("big")
            cut(path)
            raise NonFiniteError(0, 0, float(values[0]))

    assert_told(in_child(read), "CheckpointError", path, "was cut from")


def test_other_errors_stay_what_they_are(weights):
    _, storage = weights
    with pytest.raises(NonFiniteError), guarded_reads([storage]):
        raise NonFiniteError(0, 0, float("nan"))


@guarded
@pytest.mark.parametrize("where", ["after a guard", "elsewhere"])
def test_what_is_not_guarded_ends_the_process_as_ever(weights, tmp_path, where):
    path, storage = weights
    shutil.copyfile(path, tmp_path / "other.safetensors")
    other = load_file(tmp_path / "other.safetensors")["big"]

    def read():
        with guarded_reads([storage]), guarded_reads([storage]):
            values = storage.read("big")
            if where == "elsewhere":
                cut(tmp_path / "other.safetensors")
                return other.sum()
        cut(path)
        return values.sum()

    assert in_child(read) == "SIGBUS"


@guarded
@pytest.mark.parametrize("sent_to", ["process", "handler"])
def test_a_signal_that_is_sent_goes_to_who_had_it_before(weights, sent_to):
    _, storage = weights

    def send():
        taken = []
        if sent_to == "handler":
            signal.signal(signal.SIGBUS, lambda *_: taken.append(1))
        with guarded_reads([storage]):
            os.kill(os.getpid(), signal.SIGBUS)
        return f"taken {len(taken)}"

    assert in_child(send) == {"process": "SIGBUS", "handler": "taken 1"}[sent_to]


@guarded
def test_guards_of_several_threads_are_one_for_all(weights):
    """One thread's guard ends while another one's still reads."""
    path, storage = weights

    def read():
        reading, ended, sums = threading.Event(), threading.Event(), []

        def other():
            with guarded_reads([storage]):
                reading.wait(HANGS)
            ended.set()

        thread = threading.Thread(target=other)
        thread.start()
        with guarded_reads([storage]) as check:
            values = storage.read("big")
            reading.set()
            ended.wait(HANGS)
            cut(path)
            readers = [threading.Thread(target=lambda: sums.append(float(values.sum()))) for _ in range(4)]
            for reader in readers:
                reader.start()
            for reader in (*readers, thread):
                reader.join()
            assert sums == [0.0] * 4
            check()

    assert_told(in_child(read), "CheckpointError", path)


@guarded
def test_many_files_are_watched_and_let_go(tmp_path):
    """The records of what is watched are used again, and another file's do not tell of this one."""

    def read():
        for index in range(50):
            path = tmp_path / f"{index}.safetensors"
            save_file({str(name): torch.ones(2048) for name in range(20)}, path)
            storage = SafetensorsStorage(f"task {index}", [path])
            with guarded_reads([storage]) as check:
                values = [storage.read(name) for name in storage.infos]
                if index % 2:
                    cut(path)
                    assert not any(value.any() for value in values)
                    with pytest.raises(CheckpointError, match=f"task {index}: .*/{index}.safetensors"):
                        check()
                else:
                    assert all(value.all() for value in values)
                    check()
            del storage, values, check
            gc.collect()
        return "done"

    assert in_child(read) == "done"


# Storages


def storages(folder):
    """Each kind of storage of one tensor in files, and the file."""
    single, binary = folder / "model.safetensors", folder / "pytorch_model.bin"
    save_file({"w": torch.ones(4096)}, single)
    torch.save({"w": torch.ones(4096)}, binary)
    torch.save({"w": torch.ones(4096)}, folder / "old.bin", _use_new_zipfile_serialization=False)
    return {
        "safetensors": (SafetensorsStorage("task", [single]), single),
        "bin": (BinStorage("task", [binary]), binary),
        "bin of old": (BinStorage("task", [folder / "old.bin"]), folder / "old.bin"),
        "median": (MedianStorage([SafetensorsStorage("task", [single])] * 2), single),
        "peft": (repo._PeftStorage(SafetensorsStorage("task", [single])), single),
    }


KINDS = ("safetensors", "bin", "bin of old", "median", "peft")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_every_kind_of_storage_tells_of_every_change(tmp_path, kind, change):
    storage, path = storages(tmp_path)[kind]
    alter, told = CHANGES[change]
    with guarded_reads([storage]) as check:
        check()
        alter(path)
        with pytest.raises(CheckpointError, match=f"task: .*{path.name} {told}"):
            check()
        if kind != "peft":
            with pytest.raises(CheckpointError, match=told):
                storage.read("w")


def test_a_file_that_stays_is_not_complained_of(tmp_path):
    for storage, path in storages(tmp_path).values():
        with guarded_reads([storage]) as check:
            path.chmod(0o600)
            assert all(storage.read(name).all() for name in storage.infos)
            path.read_bytes()
            check()


def test_a_link_is_followed_and_told_when_it_leads_elsewhere(tmp_path):
    for name in ("one", "two"):
        save_file({"w": torch.ones(64)}, tmp_path / name)
    link = tmp_path / "model.safetensors"
    link.symlink_to("one")
    storage = SafetensorsStorage("task", [link])
    assert storage.read("w").all()
    link.unlink()
    link.symlink_to("two")
    with pytest.raises(CheckpointError, match="model.safetensors was replaced by another file"):
        storage.read("w")


@guarded
def test_a_loaded_model_whose_file_is_cut_is_told(tmp_path):
    inputs = tiny.write_inputs(tiny.BERT, tmp_path, tasks=("one",))
    path = inputs.finetunes["one"] / "model.safetensors"
    storage = ModelStorage("one", BertForSequenceClassification.from_pretrained(path.parent))

    def read():
        with guarded_reads([storage]) as check:
            cut(path)
            assert not storage.read("bert.embeddings.word_embeddings.weight").any()
            check()

    assert_told(in_child(read), "CheckpointError", "one: a file that it is mapped from was cut short")


# Merges


@pytest.fixture
def inputs(tmp_path):
    return tiny.write_inputs(tiny.BERT, tmp_path / "inputs", tasks=TASKS)


def changed_when(monkeypatch, place, name, change, before=True, at=1):
    """Change a file just before or after a call of a function."""
    function, calls = getattr(place, name), []

    def changing(*args, **kwargs):
        calls.append(1)
        if before and len(calls) == at:
            change()
        result = function(*args, **kwargs)
        if not before and len(calls) == at:
            change()
        return result

    monkeypatch.setattr(place, name, changing)


def nothing_left(folder, out="out"):
    return not (folder / out).exists() and not list(folder.glob(f".{out}.*"))


MOMENTS = {
    "before the first tensor": (shares, "open_writer", True),
    "once tensors are mapped": (merging.TensorElection, "run", True),
    "before private tensors": (merging, "_write_private", True),
    "before the last check": (merging, "_finish", False),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("whose, change", [("base", "cut"), *(("two", change) for change in CHANGES)])
def test_an_input_that_is_changed_during_a_merge_is_named(inputs, tmp_path, monkeypatch, moment, change, whose):
    if change == "cut" and moment == "once tensors are mapped" and not kernels.available():
        pytest.skip("reads are not guarded without the compiled file")
    path = (inputs.base if whose == "base" else inputs.finetunes[whose]) / "model.safetensors"
    place, name, before = MOMENTS[moment]
    alter, told = CHANGES[change]
    changed_when(monkeypatch, place, name, lambda: alter(path), before)
    outcome = in_child(lambda: emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out", progress=False))
    assert_told(outcome, "CheckpointError", f"{whose}: {path} {told}")
    assert nothing_left(tmp_path)


@guarded
@pytest.mark.parametrize("options", [{"threads": 3}, {"method": "fit"}, {"method": "levels"}, {"tau_dtype": "int4"}])
def test_whatever_the_merge(inputs, tmp_path, monkeypatch, options):
    path = inputs.finetunes["two"] / "model.safetensors"
    place = merging.TensorElection if "threads" in options else merging.TensorFit
    changed_when(monkeypatch, place, "run", lambda: cut(path))
    outcome = in_child(lambda: emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out", **options))
    assert_told(outcome, "CheckpointError", f"two: {path} was cut")
    assert nothing_left(tmp_path)


@guarded
@pytest.mark.parametrize("form", ["shards", "bin"])
def test_whatever_the_files(tmp_path, monkeypatch, form):
    options = {"max_shard_size": "20KB"} if form == "shards" else {}
    inputs = tiny.write_inputs(tiny.BERT, tmp_path / "inputs", tasks=TASKS, **options)
    folder = inputs.finetunes["two"]
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    path = max(folder.glob("*.bin" if form == "bin" else "*.safetensors"), key=lambda path: path.stat().st_size)
    changed_when(monkeypatch, merging.TensorElection, "run", lambda: cut(path))
    outcome = in_child(lambda: emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out", progress=False))
    assert_told(outcome, "CheckpointError", f"two: {path} was cut")
    assert nothing_left(tmp_path)


@guarded
def test_of_loaded_models_the_files_too(inputs, tmp_path, monkeypatch):
    models = {task: BertForSequenceClassification.from_pretrained(path) for task, path in inputs.finetunes.items()}
    path = inputs.finetunes["two"] / "model.safetensors"
    changed_when(monkeypatch, merging.TensorElection, "run", lambda: cut(path))
    outcome = in_child(lambda: emr_hf.merge(inputs.base, models, tmp_path / "out", progress=False))
    assert_told(outcome, "CheckpointError", "two: a file that it is mapped from was cut short")
    assert nothing_left(tmp_path)


@guarded
@pytest.mark.parametrize("part", ["emr.private", "model.bert"])
def test_what_the_system_cannot_write_for_want_of_a_page_is_the_inputs_fault(inputs, tmp_path, monkeypatch, part):
    """A write from a missing page is no signal but an error, of the output by its looks."""
    path = (inputs.base if part == "model.bert" else inputs.finetunes["one"]) / "model.safetensors"
    write = repo.WeightsWriter.write

    def cutting(writer, name, values, start=0):
        if name.startswith(part):
            cut(path)
        write(writer, name, values, start)

    monkeypatch.setattr(repo.WeightsWriter, "write", cutting)
    outcome = in_child(lambda: emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out", progress=False))
    assert_told(outcome, "CheckpointError", f"{path} was cut")
    assert nothing_left(tmp_path)


@guarded
@pytest.mark.parametrize("whose", ["adapter", "base"])
def test_adapters_and_their_base(tmp_path, monkeypatch, whose):
    base = adapters.write_base(tiny.BERT, tmp_path / "base")
    finetunes = {
        task: adapters.write_adapter(tmp_path / task, tiny.BERT.architecture, base, LORA, seed)
        for seed, task in enumerate(TASKS[:2])
    }
    path = base / "model.safetensors" if whose == "base" else finetunes["two"] / "adapter_model.safetensors"
    changed_when(monkeypatch, merging.TensorElection, "run", lambda: cut(path))
    outcome = in_child(lambda: emr_hf.merge(base, finetunes, tmp_path / "out", progress=False))
    assert_told(outcome, "CheckpointError", f"{path} was cut")
    assert nothing_left(tmp_path)


@guarded
def test_an_input_that_is_cut_while_it_is_aligned(inputs, tmp_path, monkeypatch):
    path = inputs.finetunes["two"] / "model.safetensors"
    finetunes = {task: inputs.finetunes[task] for task in ("one", "two")}
    recipe = emr_hf.Recipe(None, finetunes, align={"method": "mudsc"}, private=["classifier"])
    changed_when(monkeypatch, folders, "align", lambda: cut(path))
    outcome = in_child(lambda: emr_hf.merge_recipe(recipe, tmp_path / "out", progress=False))
    assert_told(outcome, "CheckpointError", f"two: {path} was cut")
    assert nothing_left(tmp_path)


@pytest.fixture
def merged(inputs, tmp_path):
    emr_hf.merge(inputs.base, {task: inputs.finetunes[task] for task in TASKS[:2]}, tmp_path / "repo", progress=False)
    return tmp_path / "repo"


@pytest.mark.parametrize("verb", ["add", "remove", "export as a LoRA"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_repo_that_is_changed_while_it_is_read_is_named(inputs, merged, tmp_path, monkeypatch, verb, change):
    if change == "cut" and verb == "export as a LoRA" and not kernels.available():
        pytest.skip("reads are not guarded without the compiled file")
    path = merged / "model.safetensors"
    alter, told = CHANGES[change]
    calls = {
        "add": lambda: emr_hf.add_task(merged, "three", inputs.finetunes["three"], tmp_path / "out", progress=False),
        "remove": lambda: emr_hf.remove_task(merged, "one", tmp_path / "out"),
        "export as a LoRA": lambda: emr_hf.export(merged, "one", tmp_path / "out", save_as="lora", rank=2),
    }
    place, name = (bits, "rebuild") if verb == "export as a LoRA" else (shares, "open_writer")
    changed_when(monkeypatch, place, name, lambda: alter(path))
    assert_told(in_child(calls[verb]), "CheckpointError", f"{path} {told}")
    assert nothing_left(tmp_path)


def test_a_repo_is_changed_in_its_place_without_complaint(inputs, merged):
    """What is read is replaced by what is written, which is no change by others."""
    emr_hf.add_task(merged, "three", inputs.finetunes["three"], merged, overwrite=True, progress=False)
    emr_hf.remove_task(merged, "one", merged, overwrite=True)
    assert emr_hf.EMRMergedModel.from_pretrained(merged).tasks == ["two", "three"]


# Mapped models


def load(folder, **options):
    return AutoModelForSequenceClassification.from_pretrained(folder, emr_task="one", **options).eval()


INPUT = {"input_ids": torch.arange(5, 12)[None]}


@torch.no_grad()
def logits(model, **options):
    return model(**INPUT, **options).logits


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("switch", ["set_task", "forward", "use_task", "rows", "kept ready"])
def test_a_switch_of_a_mapped_model_whose_file_was_changed_is_refused(merged, change, switch):
    alter, told = CHANGES[change]
    path = merged / "model.safetensors"

    def switches(model):
        if switch == "kept ready":
            model.keep_ready(2)
        if switch in ("set_task", "kept ready"):
            return model.set_task("two")
        if switch == "forward":
            return logits(model, emr_task="two")
        if switch == "rows":
            return logits(model, emr_task=["two"])
        with model.use_task("two"):
            return None

    def run():
        model = load(merged, emr_memory="mapped")
        before, expected = logits(model), {name: value.clone() for name, value in model.model.state_dict().items()}
        alter(path)
        for _ in range(2):
            with pytest.raises(emr_hf.RepoError, match=f"^{path} {told}"):
                switches(model)
        assert model.active_task == "one" and torch.equal(logits(model), before)
        assert all(torch.equal(value, expected[name]) for name, value in model.model.state_dict().items())
        return "as it was"

    assert in_child(run) == "as it was"


@guarded
@pytest.mark.parametrize("tau_dtype", ["float32", "int4"])
def test_a_switch_during_which_the_file_is_cut_does_not_count(inputs, tmp_path, monkeypatch, tau_dtype):
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "repo", progress=False, tau_dtype=tau_dtype)
    path = tmp_path / "repo" / "model.safetensors"

    def run():
        model = load(path.parent, emr_memory="mapped")
        changed_when(monkeypatch, bits, "rebuild", lambda: cut(path), at=2)
        for task in ("two", "three", "one"):
            with pytest.raises(emr_hf.RepoError, match=f"^{path} was cut from"):
                model.set_task(task)
        with pytest.raises(emr_hf.RepoError, match=f"^{path} was cut from"):
            logits(model)
        return model.active_task

    assert in_child(run) == "one"


@guarded
def test_tasks_made_ahead_of_a_mapped_model_whose_file_is_cut(merged, monkeypatch):
    path = merged / "model.safetensors"

    def run():
        model = load(merged, emr_memory="mapped").keep_ready(2)
        changed_when(monkeypatch, bits, "rebuild", lambda: cut(path), at=2)
        model.prefetch("two")
        model.set_task("two")

    assert_told(in_child(run), "RepoError", f"{path} was cut from")


@guarded
@pytest.mark.parametrize("memory", modeling.MEMORY)
def test_a_file_that_is_cut_while_a_model_is_loaded(merged, monkeypatch, memory):
    path = merged / "model.safetensors"
    changed_when(monkeypatch, modeling, "_take_into_memory", lambda: cut(path))
    assert_told(in_child(lambda: load(merged, emr_memory=memory)), "RepoError", f"{path} was cut from")


@guarded
@pytest.mark.parametrize("use", ["save", "cast", "base"])
def test_other_uses_of_a_mapped_model_whose_file_was_cut(merged, tmp_path, use):
    path = merged / "model.safetensors"

    def run():
        model = load(merged, emr_memory="mapped")
        cut(path)
        if use == "save":
            model.save_pretrained(tmp_path / "again")
        elif use == "cast":
            model.to(torch.bfloat16)
        else:
            logits(model, emr_task=["__base__"])

    assert_told(in_child(run), "RepoError", f"{path} was cut from")


def test_forwards_of_a_mapped_model_read_no_file(tmp_path):
    """Neither what no finetune touches nor a task's own head is left in the file."""
    base = adapters.write_base(tiny.BERT, tmp_path / "base")
    finetunes = {
        task: adapters.write_adapter(tmp_path / task, tiny.BERT.architecture, base, LORA, seed)
        for seed, task in enumerate(TASKS[:2])
    }
    emr_hf.merge(base, finetunes, tmp_path / "repo", progress=False)

    def run():
        model = load(tmp_path / "repo", emr_memory="mapped")
        expected = {task: logits(model.set_task(task)) for task in TASKS[:2]}
        cut(tmp_path / "repo" / "model.safetensors")
        assert torch.equal(logits(model), expected["two"])
        return "right"

    assert in_child(run) == "right"


def test_an_adapter_on_top_of_a_mapped_model_changes_no_file_of_it(merged, tmp_path):
    model = load(merged)
    model.add_adapter(LoraConfig(target_modules=["query"], r=2))
    model.save_pretrained(tmp_path / "adapter")
    mapped = load(merged, emr_memory="mapped")
    mapped.load_adapter(tmp_path / "adapter")
    assert mapped.set_task("two").active_task == "two"
    cut(merged / "model.safetensors")
    with pytest.raises(emr_hf.RepoError, match=f"{merged / 'model.safetensors'} was cut from"):
        mapped.set_task("one")


def test_a_copy_of_a_mapped_model_needs_no_file(merged):
    model = load(merged, emr_memory="mapped")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    cut(merged / "model.safetensors")
    for other in copies:
        assert other.set_task("two").active_task == "two"


def test_a_resident_model_needs_no_file(merged):
    model = load(merged)
    expected = logits(model.set_task("two"))
    model.set_task("one")
    cut(merged / "model.safetensors")
    assert torch.equal(logits(model.set_task("two")), expected)


# What is no file


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # the whole path may be too long for a socket
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


OBJECTS = {
    "a named pipe": make_pipe,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_only_a_regular_file_is_one(tmp_path, kind):
    OBJECTS[kind](tmp_path / "x")
    told = in_child(lambda: require_file(tmp_path / "x", "task"))
    assert told == f"CheckpointError: task: {tmp_path / 'x'} is {kind}: expected a regular file"


def test_a_file_or_a_link_to_one_is_one(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    require_file(tmp_path / "file", "task")
    require_file(tmp_path / "link", "task")


def test_what_cannot_be_looked_at_is_told(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name, told in (("none", "does not exist"), ("loop", "cannot read"), ("x" * 300, "cannot read")):
        with pytest.raises(CheckpointError, match=f"^task: .*{told}"):
            require_file(tmp_path / name, "task")
    with pytest.raises(CheckpointError, match="cannot read"):
        require_file(Path("nu\0ll"), "task")


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
)
def test_weights_that_are_no_file_are_refused_at_once(inputs, tmp_path, kind, name):
    folder = inputs.finetunes["two"]
    (folder / "model.safetensors").unlink()
    OBJECTS[kind](folder / name)
    outcome = in_child(lambda: emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out", progress=False))
    assert_told(outcome, "CheckpointError", f"two: {folder / name} is {kind}: expected a regular file")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("kind", OBJECTS)
def test_a_shard_that_is_no_file_is_refused_at_once(tmp_path, kind):
    inputs = tiny.write_inputs(tiny.BERT, tmp_path, tasks=("one",), max_shard_size="20KB")
    shard = min(inputs.base.glob("*-of-*.safetensors"))
    shard.unlink()
    OBJECTS[kind](shard)
    told = in_child(lambda: open_folder("base", inputs.base))
    assert_told(told, "CheckpointError", f"base: {shard} is {kind}: expected a regular file")


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_that_is_no_file_is_refused_at_once(tmp_path, kind, name):
    OBJECTS[kind](tmp_path / name)
    told = in_child(lambda: open_adapter("task", tmp_path))
    assert_told(told, "CheckpointError", f"task: {tmp_path / name} is {kind}: expected a regular file")


def test_looking_at_a_file_opens_nothing(tmp_path):
    """Its state is that of before it is opened, so that no change in between is missed."""
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(64)}, path)
    path.chmod(0)
    file = InputFile(path, "task")
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    file.check()
