"""Forked children under limits: work that may crash, hang or eat memory, and what became of it.

A child has what its parent has imported, so it starts in milliseconds. A lock that another thread of the parent holds
would be held in the child for ever: a parent imports and does not compute.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Work = Callable[[str], dict[str, Any]]
"""Does a step of that name; what it returns goes to the parent as JSON."""

_GROWTH_OF_FILES = 1 << 30


@dataclass(frozen=True)
class Limits:
    """What a step of a child may take.

    Wall time alone would find hangs where the machine is only busy with something else.

    Args:
        cpu: seconds of the processor.
        idle: seconds asleep, without any of the processor.
        memory: bytes of address space beyond those of the parent.
    """

    cpu: int = 10
    idle: float = 20.0
    memory: int = 2 << 30


def one_thread() -> None:
    """Make torch and the libraries below it work in this thread alone."""
    import torch

    torch.set_num_threads(1)
    with suppress(RuntimeError):  # it is set once in a process
        torch.set_num_interop_threads(1)


def run_steps(names: Sequence[str], work: Work, limits: Limits, log: Path) -> dict[str, dict[str, Any]]:
    """Do steps in a child, and after one that kills it those that are left in another.

    Args:
        log: file for what the children print.

    Returns:
        step -> what it returned, or `{"outcome": "signal" or "hang", "text": ...}`.
    """
    found: dict[str, dict[str, Any]] = {}
    rest = list(names)
    while rest:
        replies, end = _one_child(rest, work, limits, log)
        found.update(zip(rest, replies))
        if len(replies) < len(rest):
            found[rest[len(replies)]] = end
        rest = rest[len(replies) + 1 :]
    return found


def _one_child(names: Sequence[str], work: Work, limits: Limits, log: Path) -> tuple[list[dict], dict[str, Any]]:
    reader, writer = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _be_child(names, work, limits, log, writer)
    os.close(writer)
    try:
        replies, hangs = _replies(reader, child, len(names), limits.idle)
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # it has said all it has to, or never will
        _, status = os.waitpid(child, 0)
    if hangs:
        return replies, {"outcome": "hang", "text": f"waits for {limits.idle:.0f} s"}
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGXCPU:
        return replies, {"outcome": "hang", "text": f"busy for {limits.cpu} s"}
    text = (
        signal.Signals(number).name if number else f"the process ended with status {os.waitstatus_to_exitcode(status)}"
    )
    return replies, {"outcome": "signal", "text": text}


def _replies(reader: int, child: int, count: int, idle: float) -> tuple[list[dict], bool]:
    """The lines of a child as they come, and whether it sleeps for too long over one."""
    replies: list[dict] = []
    text, since, used = b"", time.monotonic(), -1
    while len(replies) < count:
        if select.select([reader], [], [], 0.5)[0]:
            part = os.read(reader, 1 << 16)
            if not part:
                return replies, False
            *lines, text = (text + part).split(b"\n")
            replies += [json.loads(line) for line in lines]
        state, now = _activity(child)
        if state not in "SD" or now != used:
            since, used = time.monotonic(), now
        elif time.monotonic() - since > idle:
            return replies, True
    return replies, False


def _activity(process: int) -> tuple[str, int]:
    """State of a process' main thread, and what all its threads have had of the processor."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])


def kill_child(work: Callable[[], object], log: Path, after: float | None = None, longest: float = 300.0) -> bool:
    """Do work in a child that is killed, or kills itself.

    Args:
        after: seconds after which it is killed; by default it sees to that.
        longest: seconds after which it has to have ended.

    Returns:
        whether it was killed, and had not come to its end before.

    Raises:
        RuntimeError: it was not, and has failed or hangs.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = os.fork()
    if child == 0:
        _be_killed(work, log)
    started = time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        waited = time.monotonic() - started
        if waited > (longest if after is None else after):
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            if after is None:
                raise RuntimeError(f"no end after {longest:.0f} s")
            break
        time.sleep(0.001)
    status = os.waitstatus_to_exitcode(ended[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"status {status}: {log.read_text()[-1000:]}")
    return status != 0


def _be_killed(work: Callable[[], object], log: Path) -> None:
    status = 1
    try:
        _redirect(log)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _be_child(names: Sequence[str], work: Work, limits: Limits, log: Path, writer: int) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        _redirect(log)
        for kind, size in (
            (resource.RLIMIT_AS, _address_space() + limits.memory),
            (resource.RLIMIT_FSIZE, _GROWTH_OF_FILES),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (size, size))
        for name in names:
            used = resource.getrusage(resource.RUSAGE_SELF)
            until = int(used.ru_utime + used.ru_stime) + limits.cpu + 1
            resource.setrlimit(resource.RLIMIT_CPU, (until, resource.RLIM_INFINITY))
            os.write(writer, json.dumps(work(name)).encode() + b"\n")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _redirect(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)


def _address_space() -> int:
    """Bytes that this process has mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
