"""One merge shared out among processes, and the processes themselves.

The processes are those of `accelerate launch`, `torchrun` or `mpirun`, of a process group that exists already, or of
[`launch`]. What they send each other is small and goes over a gloo group of their own; tensors stay in mapped files.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import EMRError, OptionError, ProcessError, one_line

if TYPE_CHECKING:  # the command line starts processes without torch
    import torch

T = TypeVar("T")

# As accelerate knows them: torchrun's, then those of MPI.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

# A process that has ended is noticed at once, so this is how much longer than another one a living one may take.
_PATIENCE = timedelta(days=7)

# Seconds that other processes have to say why they fail when one has, and then to clean up.
_TO_FAIL, _TO_CLEAN_UP = 5.0, 30.0


def _from_environment(names: Sequence[str]) -> int | None:
    return next((int(value) for name in names if (value := os.environ.get(name, "")).isdigit()), None)


def launched_size() -> int:
    """How many processes a launcher has started; 1 where there is none."""
    # A cluster may give a machine a rank and leave the processes to a launcher: those have a local rank too.
    return _from_environment(_SIZE) or 1 if _from_environment(_LOCAL_RANK) is not None else 1


def is_main_process() -> bool:
    """Whether this is the process of the launcher's that prints."""
    return launched_size() == 1 or not _from_environment(_RANK)


@dataclass
class Leaving:
    """Whether a process is on its way out, when no signal may disturb the cleaning up.

    Attributes:
        begun: whether it is.
        cause: the signal that says so, if one does.
    """

    begun: bool = False
    cause: int | None = None

    def raise_cause(self) -> None:
        """Raise what the signal means, if there is one."""
        if self.cause is not None:
            raise KeyboardInterrupt if self.cause == signal.SIGINT else SystemExit(128 + self.cause)


@dataclass
class Team:
    """The processes that share a merge out. All call the same methods in the same order.

    Attributes:
        rank: this process; 0 is the main one, which makes and finishes the repo.
        size: how many there are.
        group: their gloo group; `None` for one process, which needs none.
        machines: where each of them runs, by rank.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    leaving: Leaving = field(default_factory=Leaving)
    machines: Sequence[str] = ("",)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_near(self) -> bool:
        """Whether this process runs on the machine of the main one."""
        return self.rank not in self.far

    @property
    def far(self) -> list[int]:
        """The processes that do not."""
        return [rank for rank, machine in enumerate(self.machines) if machine != self.machines[0]]

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank.

        Raises:
            ProcessError: one of the processes has ended.
        """
        if self.group is None:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        try:
            arrival = distributed.barrier(self.group, async_op=True)
            while not arrival.is_completed():  # here and not in torch, where no signal would be taken
                time.sleep(0.01)
            arrival.wait()
            distributed.all_gather_object(values, value, self.group)
        except RuntimeError as error:
            self.leaving.begun = True
            raise ProcessError(
                "another process of this merge has ended, killed or out of memory; nothing was written"
            ) from error
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` in every process; everyone's result, by rank. What one raises is raised in all."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        outcomes = self.gather((result, error and self._for_others(error)))
        failed = [rank for rank, (_, failure) in enumerate(outcomes) if failure is not None]
        if not failed:
            return [result for result, _ in outcomes]  # type: ignore[misc]
        self.leaving.begun = True
        if failed[0] != self.rank:
            error = outcomes[failed[0]][1]
        assert error is not None
        try:
            raise error
        finally:
            del error, outcomes  # an error holds this frame: held by it, it would hold on to the mapped files

    def each(self, work: Callable[[], T]) -> T:
        """[`together`], where each process keeps its own result."""
        mine: list[T] = []
        self.together(lambda: mine.append(work()))
        return mine[0]

    def lead(self, work: Callable[[], T]) -> T:
        """[`together`], where the main process works for all."""
        return self.together(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def _for_others(self, error: Exception) -> Exception:
        """An error as another process can raise it."""
        if isinstance(error, EMRError):
            return error
        if isinstance(error, OSError) and error.errno is not None:
            return OSError(error.errno, error.strerror, error.filename)
        return ProcessError(f"process {self.rank} of this merge: {type(error).__name__}: {one_line(error)}")


ALONE = Team()


@contextmanager
def team(device: torch.device | str) -> Iterator[Team]:
    """The processes to share a merge out among; one, where no launcher and no process group says otherwise.

    Args:
        device: where the merge computes; every process takes one of its kind.

    Raises:
        ProcessError: the processes do not find each other.
        OptionError: there are no process groups for such a device.
    """
    from torch import distributed

    if (group := _join(device)) is None:
        yield ALONE
        return
    with stoppable() as leaving:
        team = Team(distributed.get_rank(), distributed.get_world_size(), group, leaving)
        try:
            team.machines = team.gather(_machine())
            yield team
        finally:
            distributed.destroy_process_group(group)


def _join(device: torch.device | str) -> Any:
    """A group of the processes that there are; `None` for one."""
    from torch import accelerator, distributed

    if not distributed.is_available() or (launched_size() == 1 and not distributed.is_initialized()):
        return None
    try:
        if not distributed.is_initialized():
            from accelerate import PartialState

            PartialState(cpu=str(device) == "cpu" or not accelerator.is_available())
        if not distributed.is_initialized():
            raise OptionError(f"device={str(device)!r}: accelerate knows no process group for it on this machine")
        several = distributed.get_world_size() > 1
        return distributed.new_group(backend="gloo", timeout=_PATIENCE) if several else None
    except RuntimeError as error:
        raise ProcessError(f"the processes do not find each other: {one_line(error)}") from error


def _machine() -> str:
    """What tells machines apart: their names may be the same, the ids of started systems hardly."""
    with suppress(OSError):
        return platform.node() + Path("/proc/sys/kernel/random/boot_id").read_text()
    return platform.node()


def divide(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Share tensors out by their sizes, largest first to who has least; in each share they keep their order.

    The tensors of a module stay together, as an adapter makes them together.
    """
    modules: dict[str, int] = {}
    for name, size in sizes.items():
        modules[_module(name)] = modules.get(_module(name), 0) + size
    loads, owners = [0] * count, {}
    for module in sorted(modules, key=lambda module: -modules[module]):
        owners[module] = loads.index(min(loads))
        loads[owners[module]] += modules[module]
    return [[name for name in sizes if owners[_module(name)] == rank] for rank in range(count)]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


@contextmanager
def stoppable(at_once: bool = True) -> Iterator[Leaving]:
    """Let the first Ctrl-C, SIGTERM or SIGHUP end the block in good order, and no other disturb the cleaning up.

    Launchers end the processes of one that has failed by SIGTERM, which by itself leaves everything lying about.

    Args:
        at_once: whether to raise an exception wherever the block is; else the block looks at what this yields.
    """
    leaving = Leaving()

    def stop(number: int, frame: object) -> None:
        if not leaving.begun:
            leaving.begun, leaving.cause = True, number
            if at_once:
                leaving.raise_cause()

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if (handler := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = handler
                signal.signal(number, stop)
    try:
        yield leaving
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch(command: Sequence[str], count: int, out: Path) -> int:
    """Run a command that writes a repo in several processes of this machine, as a launcher does.

    Args:
        command: what each process is.
        count: how many there are.
        out: the repo. If the main process is killed, what it had of it is removed here.

    Returns:
        the exit status of the main process.

    Raises:
        ProcessError: it did not end by itself.
    """
    if count < 1:
        raise OptionError(f"num_processes={count}: expected at least 1")
    port = _free_port()
    processes: list[subprocess.Popen[bytes]] = []
    with stoppable(at_once=False) as leaving:  # an exception in the midst of a `poll` would leave it locked
        try:
            for rank in range(count):
                # In a session of their own: Ctrl-C is for this process, which ends the others.
                process = subprocess.Popen(command, env=_environment(rank, count, port), start_new_session=True)
                processes.append(process)
            failed = _wait(processes, leaving)
        finally:
            leaving.begun = True
            _end(processes)
            if processes and processes[0].returncode < 0 and processes[0].returncode != -signal.SIGTERM:
                from .staging import remove_leftovers

                remove_leftovers(out)
    leaving.raise_cause()
    status = processes[0].returncode
    if failed is not None and (status < 0 or status >= 128):
        raise ProcessError(f"process {failed} of {count} {_how(processes[failed].returncode)}; nothing was written")
    return status


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun would set, and each process its part of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(max((int(given) if given.isdigit() else cores) // count, 1)),
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]], leaving: Leaving) -> int | None:
    """Wait for all to end, not long once one has failed, and not at all after a signal; the first that has failed."""
    failed, deadline = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline and not leaving.begun:
        if failed is None and (found := _failed(processes)) is not None:
            failed, deadline = found, time.monotonic() + _TO_FAIL
        time.sleep(0.05)
    return _failed(processes) if failed is None else failed


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    return next((rank for rank, process in enumerate(processes) if process.poll()), None)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that still run."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _TO_CLEAN_UP
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _how(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
