"""One merge shared out among processes: the same repo to the bit, and a clean end whatever happens to one of them."""

from __future__ import annotations

import ctypes
import errno
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import pytest
import torch

import emr_hf
from emr_hf import cli, distributed, errors, heartbeats, merging, repo, shares, staging
from tests import adapters, tiny
from tests.test_cli import assert_one_line_error, write_recipe
from tests.test_sources import copy_of, edit_tensors

# Processes are forked off one that has imported everything, once, and has no threads.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["accelerate", "peft", "emr_hf.modeling", "tests.test_distributed"])
AT_MOST = 1800  # seconds; only what hangs takes so long, however busy the machine is
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


@pytest.fixture
def in_processes(tmp_path_factory):
    """Call a function of this file in processes of a launcher: what each returned or raised, its status and its id.

    One that stops itself (`stops`) is killed when the others have ended.
    """

    def run(count, function, *arguments, launcher="torchrun", stops=None):
        port, folder = distributed._free_port(), tmp_path_factory.mktemp("answers")
        processes = []
        for rank in range(count):
            environment = distributed._environment(rank, count, port)
            call = (folder / str(rank), launcher, environment, function, arguments)
            processes.append(FORKS.Process(target=_call, args=call))
            processes[-1].start()
        deadline = time.monotonic() + AT_MOST
        ending = [process for rank, process in enumerate(processes) if rank != stops]
        for process in ending:
            process.join(max(deadline - time.monotonic(), 0))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hanging:
            processes[rank].kill()
            processes[rank].join()
        assert hanging == ([] if stops is None else [stops])
        answers = [folder / str(rank) for rank in range(count)]
        return [
            SimpleNamespace(answer=pickle.loads(a.read_bytes()) if a.exists() else None, status=p.exitcode, pid=p.pid)
            for p, a in zip(processes, answers)
        ]

    return run


def _call(answer, launcher, environment, function, arguments):
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # the tests themselves may be run where they are ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if launcher == "none":
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        address = f"tcp://127.0.0.1:{environment['MASTER_PORT']}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    else:
        names = OPENMPI if launcher == "mpirun" else {}
        os.environ.update({names.get(name, name): value for name, value in environment.items()})
    answer.write_bytes(pickle.dumps(outcome(function, *arguments)))


def outcome(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except Exception as error:
        return error


def files_of(folder):
    """The bytes of every file, but for the time that the merge took."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("config.json", "adapter_config.json", "emr_report.json"):
        if name in files:
            files[name] = json.loads(files[name], object_hook=lambda fields: {**fields, "seconds": None})
    return files


def timeless(report):
    return {**vars(report), "seconds": None}


# The same repo


@pytest.fixture(scope="module")
def jobs(bert_inputs, tmp_path_factory):
    """Calls of `merge` by name, without `out`; the last ones fail."""
    folder = tmp_path_factory.mktemp("jobs")
    base, full = bert_inputs.base, bert_inputs.finetunes
    for seed, kind, settings in ((1, "LORA", adapters.BERT_LORA), (2, "IA3", adapters.BERT_IA3), (3, "IA3", {})):
        settings = {**(settings or adapters.BERT_IA3), "task_type": "SEQ_CLS"}
        adapters.write_adapter(folder / f"{kind}{seed}", tiny.BERT.architecture, base, settings, seed, kind)
    nan = torch.full((32, 32), math.nan)
    merged = edit_tensors(copy_of(full["items"], folder / "merged"), **{QUERY.replace(".", "__"): nan})
    private = edit_tensors(copy_of(full["items"], folder / "private"), classifier__bias=nan[0, :2])
    narrow = {"max_shard_size": "20KB", "tau_dtype": "bfloat16", "rescale": "tensor_mean"}
    return {
        "full": {"base": base, "finetunes": full},
        "sharded": {"base": base, "finetunes": full, **narrow},
        "fit": {"base": base, "finetunes": full, "method": "fit", "tau_dtype": "int4"},
        "levels": {"base": base, "finetunes": full, "method": "levels"},
        "lora": {"base": base, "finetunes": {"lora": folder / "LORA1", "full": full["items"]}},
        "ia3": {"base": base, "finetunes": {"one": folder / "IA32", "two": folder / "IA33"}, "save_as": "peft"},
        "merged": {"base": base, "finetunes": {"a": full["items"], "bad": merged}},
        "private": {"base": base, "finetunes": {"a": full["items"], "bad": private}},
    }


def merge_all(jobs, folder):
    reports = {name: outcome(emr_hf.merge, **job, out=folder / name) for name, job in jobs.items()}
    nowhere = outcome(emr_hf.merge, **jobs["full"], out=folder / "nowhere", device="nowhere")
    again = outcome(emr_hf.merge, **jobs["full"], out=folder / "full", overwrite=True)  # after merges that have failed
    refused = outcome(emr_hf.merge, **jobs["full"], out=folder / "full")
    return {**reports, "nowhere": nowhere, "again": again, "refused": refused}


@pytest.mark.parametrize(("count", "launcher"), [(2, "mpirun"), (3, "torchrun")])
def test_processes_make_the_repo_that_one_makes(in_processes, jobs, tmp_path, count, launcher):
    [alone] = in_processes(1, merge_all, jobs, tmp_path / "one")
    shared = in_processes(count, merge_all, jobs, tmp_path / "many", launcher=launcher)
    assert [process.status for process in shared] == [0] * count
    good = ["fit", "full", "ia3", "levels", "lora", "sharded"]
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == good
    for name in good:
        assert files_of(tmp_path / "many" / name) == files_of(tmp_path / "one" / name)
        for process in shared:
            assert timeless(process.answer[name]) == timeless(alone.answer[name])
        assert len({process.answer[name].seconds for process in shared}) == 1
    for name, text in (("merged", f"bad: {QUERY}[0, 0] is nan"), ("private", "bad: classifier.bias[0] is nan")):
        for process in [alone, *shared]:
            assert type(process.answer[name]) is emr_hf.NonFiniteError
            assert str(process.answer[name]).startswith(text)
    for process in shared:
        assert timeless(process.answer["again"]) == timeless(alone.answer["full"])
        assert type(process.answer["refused"]) is emr_hf.RepoError
        assert type(process.answer["nowhere"]) is emr_hf.OptionError


def merge_apart(jobs, folder):
    """[`merge_all`] where only the first process is on the main machine, and where weights were written."""
    rank, write, written = int(os.environ["RANK"]), repo.WeightsWriter.write, set()
    distributed._machine = lambda: f"machine {min(rank, 1)}"

    def noting(writer, *arguments):
        write(writer, *arguments)
        written.update(Path(os.readlink(f"/proc/self/fd/{file}")).parent.name for file in writer._files)

    def rmtree(place):
        assert f"{place}/" not in Path("/proc/self/maps").read_text()  # NFS keeps a file that is still mapped
        shutil.rmtree(place)

    repo.WeightsWriter.write, shares.shutil = noting, SimpleNamespace(rmtree=rmtree)
    return merge_all(jobs, folder), written


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at open files in /proc")
def test_machines_do_not_write_into_the_same_files(in_processes, jobs, tmp_path):
    [alone] = in_processes(1, merge_all, jobs, tmp_path / "one")
    shared = in_processes(3, merge_apart, jobs, tmp_path / "many")
    for name in sorted(path.name for path in (tmp_path / "one").iterdir()):
        assert files_of(tmp_path / "many" / name) == files_of(tmp_path / "one" / name)
    for rank, process in enumerate(shared):
        reports, written = process.answer
        assert timeless(reports["again"]) == timeless(alone.answer["full"])
        assert str(reports["merged"]) == str(alone.answer["merged"])
        if rank:
            assert written == {f"part-{rank}"}
        else:
            assert written == {"new"}  # in the staging folder


def test_what_processes_must_agree_on(bert_inputs, tmp_path):
    moved = {QUERY.replace(".", "__"): torch.ones(32, 32)}
    other = edit_tensors(copy_of(bert_inputs.finetunes["items"], tmp_path / "other"), **moved)
    recipes = [
        emr_hf.Recipe(bert_inputs.base, {"a": finetune}, **options)
        for finetune in (bert_inputs.finetunes["items"], other)
        for options in ({}, {"method": "levels"}, {"rescale": "tensor_mean"}, {"tau_dtype": "bfloat16"})
    ]
    found = [shares.fingerprint(emr_hf.check(recipe)) for recipe in recipes]
    assert len(set(found)) == len(found)
    same = emr_hf.Recipe(bert_inputs.base, {"a": copy_of(bert_inputs.finetunes["items"], tmp_path / "same")})
    assert shares.fingerprint(emr_hf.check(same)) == found[0]


def unlike(inputs, out):
    return outcome(emr_hf.merge, **inputs, out=out, method="fit" if int(os.environ["RANK"]) else "emr")


def test_processes_that_merge_something_else_are_refused(in_processes, jobs, tmp_path):
    for process in in_processes(2, unlike, jobs["full"], tmp_path / "out"):
        assert type(process.answer) is emr_hf.MismatchError and process.status == 0
    assert not (tmp_path / "out").exists()


def test_a_machine_has_to_see_the_output(bert_inputs, tmp_path):
    plan = emr_hf.check(emr_hf.Recipe(bert_inputs.base, bert_inputs.finetunes))
    far = distributed.Team(rank=1, size=2, machines=("one", "two"))
    with pytest.raises(emr_hf.ProcessError, match="process 1, on another machine than the main one, does not see"):
        shares.open_writer(plan, tmp_path / "elsewhere", far)


def test_tensors_are_shared_out_by_size_and_modules_stay_together():
    sizes = {"a.weight": 90, "a.bias": 1, "b.weight": 50, "b.bias": 1, "c.weight": 40, "d": 5}
    assert distributed.divide(sizes, 1) == [list(sizes)]
    assert distributed.divide(sizes, 2) == [["a.weight", "a.bias", "d"], ["b.weight", "b.bias", "c.weight"]]
    assert distributed.divide(sizes, 9)[4:] == [[]] * 5


# What goes wrong in one process goes wrong in all


def faulty(job, folder):
    """Merges with a fault in process 1; what each process makes of them."""
    rank = torch.distributed.get_rank()
    merge = {**job, "out": folder / "out"}
    found = []
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(merging, "check", _raises(emr_hf.CheckpointError("b: no weights here")))
        found.append(outcome(emr_hf.merge, **merge))
    for error in (OSError(errno.ENOSPC, "No space left on device"), ZeroDivisionError("by chance")):
        elected = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                merging, "_elections", _raises(error) if rank == 1 else _waiting(merging._elections, elected)
            )
            found.append(outcome(emr_hf.merge, **merge))
        assert len(elected) <= 1  # where another has failed a process does not go on
    tasks = dict(reversed(job["finetunes"].items())) if rank == 1 else job["finetunes"]
    found.append(outcome(emr_hf.merge, **{**merge, "finetunes": tasks}))
    return found


def _raises(error):
    def run(*arguments, **options):
        raise error

    return run


def _waiting(function, calls):
    def run(plan, writer, *arguments):
        calls.append(arguments)
        while not (writer.folder / "stop").exists():
            time.sleep(0.01)
        return function(plan, writer, *arguments)

    return run


def test_an_error_of_one_process_is_that_of_all(in_processes, jobs, tmp_path):
    processes = in_processes(2, faulty, jobs["full"], tmp_path, launcher="none")
    assert not any(tmp_path.iterdir())
    for process in processes:
        missing, full, _, inputs = process.answer
        assert (type(missing), str(missing)) == (emr_hf.CheckpointError, "b: no weights here")
        assert type(full) is emr_hf.RepoError and "No space left" in str(full)
        assert type(inputs) is emr_hf.MismatchError
    assert type(processes[1].answer[2]) is ZeroDivisionError
    told = processes[0].answer[2]
    assert type(told) is errors.ProcessError and "process 1" in str(told) and "ZeroDivisionError" in str(told)


@pytest.mark.parametrize(
    "error",
    [
        errors.NonFiniteError(1, 5, math.inf).located("a.weight", (2, 3), "task"),
        errors.UnknownTaskError("itesm", ["items"]),
        errors.RecipeError("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_as_it_was_sent(error):
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived), vars(arrived)) == (type(error), str(error), vars(error))


# The end of a process


def struck(job, out, victim, number):
    """A merge in which one process is sent a signal at its first tensor."""
    if torch.distributed.get_rank() == victim:
        merging._elections = lambda *arguments: os.kill(os.getpid(), number) or iter([])
    return emr_hf.merge(**job, out=out, overwrite=True)


@pytest.mark.parametrize(
    ("victim", "number", "status"),
    [(1, signal.SIGKILL, -signal.SIGKILL), (0, signal.SIGKILL, -signal.SIGKILL), (0, signal.SIGTERM, 143)],
)
def test_the_end_of_a_process_is_the_end_of_the_merge(in_processes, jobs, bert_repo, tmp_path, victim, number, status):
    out = copy_of(bert_repo, tmp_path / "out")
    job = {**jobs["full"], "finetunes": {"only": jobs["full"]["finetunes"]["items"]}}
    processes = in_processes(3, struck, job, out, victim, number, launcher="none")
    assert processes[victim].status == status
    for process in [process for rank, process in enumerate(processes) if rank != victim]:
        assert type(process.answer) is errors.ProcessError
    if processes[0].status == -signal.SIGKILL:
        assert len(list(tmp_path.iterdir())) == 2
        staging.remove_leftovers(out)  # as the parent of a launch does
    assert list(tmp_path.iterdir()) == [out]
    assert files_of(out) == files_of(bert_repo)


BOUND = 60.0
"""Seconds for a partner that is stopped; one that lives is not held up so long, whatever else the machine does."""


def _held_up(function, rank, hold):
    """A function that process `rank` calls only after `hold`."""

    def run(*arguments):
        if torch.distributed.get_rank() == rank:
            hold()
        return function(*arguments)

    return run


def stopping(job, out, victim):
    """A merge in which one process takes long, and one in which it is stopped, as by a machine that hangs."""
    elect, merge = merging.elect, {**job, "out": out, "overwrite": True, "partner_timeout": BOUND}
    merging.elect = _held_up(elect, victim, lambda: time.sleep(1.5 * BOUND))
    slow = outcome(emr_hf.merge, **merge)
    merging.elect = _held_up(elect, victim, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    return slow, outcome(emr_hf.merge, **merge)


@pytest.mark.parametrize(("victim", "launcher"), [(0, "torchrun"), (1, "none")])
def test_a_process_may_take_long_but_has_to_live(in_processes, jobs, bert_repo, tmp_path, victim, launcher):
    out = tmp_path / bert_repo.name
    processes = in_processes(3, stopping, jobs["full"], out, victim, launcher=launcher, stops=victim)
    for process in [process for rank, process in enumerate(processes) if rank != victim]:
        slow, stopped = process.answer
        assert slow.merged_tensors
        assert type(stopped) is errors.ProcessError
        assert str(stopped).startswith(f"process {victim} of this merge") and "no life for 60 s" in str(stopped)
        assert process.status == 0  # nothing hangs at its end either
    staging.remove_leftovers(out)
    assert list(tmp_path.iterdir()) == [out]
    assert files_of(out) == files_of(bert_repo)


def ending_last(job, out, victim):
    """A merge in which one process is killed once the repo is complete."""
    if torch.distributed.get_rank() == victim:
        distributed.Team.conclude = lambda team, work: os.kill(os.getpid(), signal.SIGKILL)
    return outcome(emr_hf.merge, **job, out=out)


def test_a_repo_that_is_published_is_no_error(in_processes, jobs, bert_repo, tmp_path):
    out = tmp_path / bert_repo.name
    main, killed, other = in_processes(3, ending_last, jobs["full"], out, 1, launcher="none")
    assert main.answer.merged_tensors and killed.status == -signal.SIGKILL
    assert type(other.answer) is errors.ProcessError and "may have written the repo" in str(other.answer)
    assert list(tmp_path.iterdir()) == [out] and files_of(out) == files_of(bert_repo)


def leaving(job, out, victim, number):
    """A merge in which one process is stopped and another is sent a signal then."""
    stopped = out.with_name("stopped")

    def stop():
        stopped.touch()
        os.kill(os.getpid(), signal.SIGSTOP)

    def strike():
        while not stopped.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    if torch.distributed.get_rank() != victim:
        threading.Thread(target=strike, daemon=True).start()
    merging.elect = _held_up(merging.elect, victim, stop)
    try:
        return emr_hf.merge(**job, out=out)
    except KeyboardInterrupt:
        sys.exit(130)


@pytest.mark.parametrize(
    ("victim", "number", "status"), [(1, signal.SIGINT, 130), (1, signal.SIGTERM, 143), (0, signal.SIGTERM, 143)]
)
def test_a_signal_ends_a_process_whose_partner_is_stopped(in_processes, jobs, tmp_path, victim, number, status):
    processes = in_processes(2, leaving, jobs["full"], tmp_path / "out", victim, number, launcher="none", stops=victim)
    assert processes[1 - victim].status == status
    staging.remove_leftovers(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "stopped"]


SCRIPT = """
import pickle, sys, torch
from tests.test_distributed import leaving
torch.distributed.init_process_group("gloo")
leaving(*pickle.loads(bytes.fromhex(sys.argv[1])))
"""


def test_nothing_hangs_at_the_end_of_python(jobs, tmp_path):
    port, call = distributed._free_port(), (jobs["full"], tmp_path / "out", 1, signal.SIGTERM)
    command = [sys.executable, "-c", SCRIPT, pickle.dumps(call).hex()]
    environments = [distributed._environment(rank, 2, port) for rank in range(2)]
    root = Path(__file__).parents[1]
    ended, stopped = (subprocess.Popen(command, env=environment, cwd=root) for environment in environments)
    try:
        assert ended.wait(AT_MOST) == 143
    finally:
        for process in (ended, stopped):
            process.kill()
            process.wait()
    assert list(tmp_path.iterdir()) == [tmp_path / "stopped"]


def absent(job, out):
    """A merge to which the second process does not come."""
    if torch.distributed.get_rank() == 1:
        return time.sleep(2.0)
    distributed._TO_MEET = 1.0
    return outcome(emr_hf.merge, **job, out=out, partner_timeout=1)


def test_all_have_to_come(in_processes, jobs, tmp_path):
    [process, _] = in_processes(2, absent, jobs["full"], tmp_path / "out", launcher="none")
    assert type(process.answer) is errors.ProcessError
    assert str(process.answer).startswith("process 1 of this merge has not come to it within 1 s")


def never_through(seconds):
    """A process whose cleaning up hangs and holds Python's lock."""
    distributed._TO_LEAVE = seconds
    with distributed.stoppable():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            ctypes.PyDLL(None).pause()


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="the system ends no processes")
def test_a_process_that_cannot_clean_up_is_ended(in_processes):
    [process] = in_processes(1, never_through, 1)
    assert process.status == -signal.SIGALRM


def going_on():
    """What is left of an alarm after a Ctrl-C that has been dealt with."""
    try:
        with distributed.stoppable():
            signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return signal.alarm(0), signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_has_cleaned_up_may_go_on(in_processes):
    [process] = in_processes(1, going_on)
    assert process.answer == (0, True)


def test_who_was_stopped_itself_finds_nobody_silent(monkeypatch):
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(heartbeats, "_INTERVAL", 0.001)
    monkeypatch.setattr(heartbeats, "time", SimpleNamespace(monotonic=lambda: float(next(hours))))
    store = torch.distributed.HashStore()
    ours, other = (heartbeats.Heartbeats(store, rank, 2, 3600.0) for rank in range(2))
    while ours.absent:
        time.sleep(0.001)
    other.end(leaving=False)
    begun = next(hours)
    while next(hours) < begun + 100 * 3600:  # many looks at the others
        time.sleep(0.001)
    assert ours.silent() == []
    ours.end(leaving=False)


def test_who_ends_early_says_so():
    store = torch.distributed.HashStore()
    ours, other = (heartbeats.Heartbeats(store, rank, 2, 10.0) for rank in range(2))
    while ours.absent:
        time.sleep(0.001)
    other.end(leaving=True)
    while not ours.left:
        time.sleep(0.001)
    assert ours.left == [1]
    with pytest.raises(errors.ProcessError, match="^process 1 of this merge has left it"):
        distributed.Team(0, 2, ours).check()
    ours.end(leaving=False)


@pytest.mark.parametrize(("rank", "speaks"), [(1, True), (3, False)])
def test_another_process_speaks_where_the_main_one_is_silent(monkeypatch, rank, speaks):
    monkeypatch.setattr(distributed, "_stands_in", False)
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    seen = SimpleNamespace(bound=300.0, left=[], silent=lambda part: [0, 2])
    assert not distributed.is_main_process()
    with pytest.raises(errors.ProcessError, match="^processes 0, 2 of this merge have shown no life for 300 s"):
        distributed.Team(rank, 4, seen).check()
    assert distributed.is_main_process() == speaks


def test_a_main_process_whose_store_is_silent_blames_the_launcher():
    seen = SimpleNamespace(bound=300.0, left=[], silent=lambda part: [0])
    with pytest.raises(errors.ProcessError, match="^the launcher of this merge has shown no life for 300 s"):
        distributed.Team(0, 2, seen).check()


@pytest.mark.parametrize("seconds", [0, -1, 0.5, math.nan, math.inf, True, "60", None])
def test_a_wrong_time_for_partners(bert_inputs, tmp_path, seconds):
    with pytest.raises(emr_hf.OptionError, match=r"^partner_timeout=.*: expected seconds, from 1 to 604800$"):
        emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out", partner_timeout=seconds)
    assert not any(tmp_path.iterdir())


# Processes of our own


CHILD = """
import os, shutil, signal, sys, time
from pathlib import Path
out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
does = sys.argv[2 + rank]
unfinished = out.parent / f".{out.name}.partial-{os.getpid()}-x"
def leave(status):
    shutil.rmtree(unfinished, ignore_errors=True)
    sys.exit(status)
signal.signal(signal.SIGTERM, signal.SIG_IGN if does == "ignores" else lambda *_: leave(143))
if rank == 0:
    unfinished.mkdir()
if does == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if does == "works":
    (out.parent / str(rank)).write_text(str({**os.environ}))
if does == "stops":
    os.kill(os.getpid(), signal.SIGSTOP)
if does in ("waits", "ignores"):
    sys.stdin.read()  # until the launcher ends
leave(int(does) if does.isdigit() else 0)
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_TO_FAIL", 0.5)
    monkeypatch.setattr(distributed, "_TO_CLEAN_UP", 1.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")

    def run(*does):
        out = tmp_path / "out"
        return distributed.launch([sys.executable, "-c", CHILD, str(out), *does], len(does), out)

    return run


def test_launched_processes_know_each_other_and_share_the_cores(launch, tmp_path):
    assert launch("works", "works", "works") == 0
    known = [eval((tmp_path / str(rank)).read_text()) for rank in range(3)]
    for rank, environment in enumerate(known):
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environment["WORLD_SIZE"], environment["OMP_NUM_THREADS"]) == ("3", "1")
        assert environment["MASTER_PORT"] == known[0]["MASTER_PORT"]


@pytest.mark.parametrize(
    ("does", "text"),
    [
        (("waits", "dies", "waits"), "process 1 of 3 was ended by SIGKILL"),
        (("dies", "waits"), "process 0 of 2 was ended by SIGKILL"),
        (("ignores", "3"), "process 1 of 2 ended with status 3"),
        (("stops", "3"), "process 1 of 2 ended with status 3"),
    ],
)
def test_one_that_dies_ends_the_others(launch, tmp_path, does, text):
    with pytest.raises(errors.ProcessError, match=text):
        launch(*does)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("status", [0, 1])
def test_what_the_main_process_says_is_enough(launch, tmp_path, status):
    assert launch(str(status), "waits") == status
    assert not any(tmp_path.iterdir())


def interrupted(out, number):
    """A launch that is sent a signal once its main process has begun."""

    def strike():
        while not any(out.parent.iterdir()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=strike).start()
    try:
        return distributed.launch([sys.executable, "-c", CHILD, str(out), "waits", "waits"], 2, out)
    except KeyboardInterrupt:
        sys.exit(130)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_all_processes(in_processes, tmp_path, number, status):
    [process] = in_processes(1, interrupted, tmp_path / "out", number)
    assert process.status == status
    assert not any(tmp_path.iterdir())


WORKER = """
import fcntl, os, sys, time
from pathlib import Path
base, finetune, out, when = sys.argv[1:]
held = open(Path(out).with_name("alive"), "a")
fcntl.flock(held, fcntl.LOCK_SH)
def begin(*_):
    Path(out).with_name("begun" + os.environ["RANK"]).write_text(str(os.getpid()))
launcher = os.getppid()
if when == "starting":
    begin()
while when == "starting" and os.getppid() == launcher:
    time.sleep(0.01)
from emr_hf.distributed import end_with_launcher
end_with_launcher()
def wait(*_):
    begin()
    while True:
        time.sleep(1)
import emr_hf
from emr_hf import merging
merging.elect = wait
emr_hf.merge(base, {"a": finetune}, out)
"""


def killed(inputs, out, when):
    """A launch that is killed while its processes start, or in the midst of their merge."""

    def strike():
        while not all(out.with_name(f"begun{rank}").exists() for rank in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=strike, daemon=True).start()
    command = [sys.executable, "-c", WORKER, str(inputs["base"]), str(inputs["finetunes"]["items"]), str(out), when]
    distributed.launch(command, 2, out)


@pytest.mark.parametrize("when", ["starting", "merging"])
def test_the_end_of_the_launcher_ends_its_processes(in_processes, jobs, tmp_path, when):
    fcntl = pytest.importorskip("fcntl")
    [process] = in_processes(1, killed, jobs["full"], tmp_path / "out", when)
    assert process.status == -signal.SIGKILL
    begun = [tmp_path / f"begun{rank}" for rank in range(2)]
    deadline = time.monotonic() + AT_MOST
    with (tmp_path / "alive").open("a") as held:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    for file in begun:
                        os.kill(int(file.read_text()), signal.SIGKILL)
                    raise
                time.sleep(0.05)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "alive", *begun]


def test_the_command_ends_with_its_launcher(bert_inputs, tmp_path):
    recipe = write_recipe(bert_inputs, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "emr_hf", "merge", recipe, tmp_path / "out"]
    environment = {**distributed._environment(0, 2, distributed._free_port()), distributed._LAUNCHED: "1"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, timeout=AT_MOST)
    assert done.returncode == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == [recipe]


# The command


def test_accelerate_launches_the_command(bert_inputs, bert_repo, tmp_path):
    recipe, out = write_recipe(bert_inputs, tmp_path / "recipe.yaml"), tmp_path / "merged"
    launcher = [Path(sysconfig.get_path("scripts")) / "accelerate", "launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "--main_process_port", str(distributed._free_port()), "-m", "emr_hf", "merge", recipe, out]
    with subprocess.Popen([*command, "--format", "json"], stdout=PIPE, stderr=PIPE, text=True) as launched:
        try:
            printed, told = launched.communicate(timeout=AT_MOST)
        finally:
            launched.terminate()  # if it hangs: it ends its processes then
    assert launched.returncode == 0, told
    assert files_of(out) == files_of(bert_repo)
    assert json.loads(printed) == json.loads((out / "emr_report.json").read_text())
    assert told.count("BertForSequenceClassification, 3 tasks") == 1


def test_processes_that_the_command_launches_tell_of_an_error_once(jobs, tmp_path, capfd):
    recipe = write_recipe(SimpleNamespace(**jobs["merged"]), tmp_path / "recipe.yaml")
    status = cli.main(["merge", str(recipe), str(tmp_path / "out"), "--num-processes", "2"])
    captured = capfd.readouterr()
    told = [line for line in captured.err.splitlines() if line.startswith("emr-hf: ")]
    assert (status, captured.out, len(told)) == (1, "", 1)
    assert f"bad: {QUERY}[0, 0] is nan" in told[0] and "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == [recipe]


def test_of_a_launchers_processes_the_main_one_does_what_is_no_merge(bert_repo, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")  # as a cluster may name its machines
    assert cli.main(["inspect", str(bert_repo)]) == 0 and capsys.readouterr().out
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["inspect", str(bert_repo)]) == 0 and not capsys.readouterr().out
    assert cli.main(["export", str(bert_repo), str(tmp_path / "x"), "--task", "items"]) == 0
    assert not any(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["inspect", str(bert_repo)]) == 0 and capsys.readouterr().out


@pytest.mark.parametrize(("count", "launched", "named"), [(0, 1, "num_processes=0"), (3, 2, "2 processes already")])
def test_a_wrong_number_of_processes_is_one_line(tmp_path, monkeypatch, capsys, count, launched, named):
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", launched)):
        monkeypatch.setenv(name, str(value))
    status = cli.main(["merge", "recipe.yaml", str(tmp_path / "out"), "--num-processes", str(count)])
    captured = capsys.readouterr()
    assert_one_line_error(SimpleNamespace(status=status, out=captured.out, err=captured.err), named)
