"""One merge shared out among processes, and the processes themselves.

The processes are those of `accelerate launch`, `torchrun` or `mpirun`, of a process group that exists already, or of
[`launch`]. What they send each other is small and goes over a gloo group of their own; tensors stay in mapped files.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .errors import EMRError, OptionError, ProcessError, one_line, short
from .heartbeats import Heartbeats

if TYPE_CHECKING:  # the command line starts processes without torch
    import torch

T = TypeVar("T")

# As accelerate knows them: torchrun's, then those of MPI.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

PARTNER_TIMEOUT = 300.0
"""Seconds after which a process that shows no life is given up."""

# One that has ended or shows no life is noticed before, so this is how much longer than another a living one may take.
_PATIENCE = timedelta(days=7)

# Seconds that processes have to come to the merge: those of torch. One that has not come can show no life.
_TO_MEET = 1800.0

# Seconds that other processes have to say why they fail when one has, and then to clean up; and what a process has to
# clean up after a signal before the system ends it.
_TO_FAIL, _TO_CLEAN_UP, _TO_LEAVE = 5.0, 20.0, 15

# Says to a process that its standard input is a pipe from its launcher.
_LAUNCHED = "EMR_HF_LAUNCHED"

_stands_in = False  # for the main process, which shows no life


def _from_environment(names: Sequence[str]) -> int | None:
    return next((int(value) for name in names if (value := os.environ.get(name, "")).isdigit()), None)


def launched_size() -> int:
    """How many processes a launcher has started; 1 where there is none."""
    # A cluster may give a machine a rank and leave the processes to a launcher: those have a local rank too.
    return _from_environment(_SIZE) or 1 if _from_environment(_LOCAL_RANK) is not None else 1


def is_main_process() -> bool:
    """Whether this is the process of the launcher's that prints."""
    return _stands_in or launched_size() == 1 or not _from_environment(_RANK)


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
        heartbeats: their signs of life; `None` for one process, which needs none.
        group: their gloo group, once they have met.
        machines: where each of them runs, by rank.
    """

    rank: int = 0
    size: int = 1
    heartbeats: Heartbeats | None = None
    group: Any = None
    leaving: Leaving = field(default_factory=Leaving)
    machines: Sequence[str] = ("",)
    _written: str = "nothing was written"
    _busy: bool = False

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

    def meet(self) -> None:
        """Wait until all have come, and make their group.

        Raises:
            ProcessError: one does not come, has ended or shows no life.
        """
        from torch import distributed

        assert self.heartbeats is not None
        limit = max(_TO_MEET, self.heartbeats.bound)
        deadline = time.monotonic() + limit
        while absent := self.heartbeats.absent:
            self.check()
            if time.monotonic() > deadline:
                raise ProcessError(f"{_named(absent)} not come to it within {limit:g} s; {self._written}")
            time.sleep(0.01)
        self._busy = True
        group = _in_thread(lambda: distributed.new_group(backend="gloo", timeout=_PATIENCE))
        self.group = self._wait(group.done, group.result)
        self.machines = self.gather(_machine())

    def part(self) -> None:
        """Let go of the others, even of those that do not answer."""
        from torch import distributed

        assert self.heartbeats is not None
        self.heartbeats.end(leaving=self._busy)
        if self.group is None:
            return
        if self._busy:  # the end of a group waits for what it does, so this one is to outlive Python itself
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))
        else:
            distributed.destroy_process_group(self.group)

    def check(self, part: float = 1.0) -> None:
        """Raise ProcessError if a process has shown no life for a part of the time that it has, or has given up."""
        global _stands_in
        if self.heartbeats is None:
            return
        left = self.heartbeats.left
        # Who gives up does so for a cause, and the others are about to see it too.
        if silent := self.heartbeats.silent(min(part, 0.5) if left else part):
            _stands_in = silent[0] == 0 and self.rank == min({*range(self.size)} - {*silent}, default=0)
            # Of itself this process knows better: it is not the main one that keeps the store then.
            subject = "the launcher of this merge has" if self.rank in silent else _named(silent)
            raise ProcessError(
                f"{subject} shown no life for {self.heartbeats.bound:g} s (--partner-timeout): "
                f"stopped, hung or out of reach; {self._written}"
            )
        if left:
            raise ProcessError(f"{_named(left)} left it; {self._written}")

    def _wait(self, done: Callable[[], bool], result: Callable[[], T]) -> T:
        """The result of what may wait for others, here and not in torch, where no signal would be taken.

        Raises:
            ProcessError: another process has ended or shows no life.
        """
        try:
            while not done():
                self.check()
                time.sleep(0.01)
            self._busy = False
            return result()
        except RuntimeError as error:
            self.check(part=0.5)  # one of those that have noticed it may have ended before this one has
            raise ProcessError(
                f"another process of this merge has ended, killed or out of memory; {self._written}"
            ) from error

    def _all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        from torch import distributed

        self.check()
        parts = [tensor.clone() for _ in range(self.size)]
        self._busy = True
        work = distributed.all_gather(parts, tensor, self.group, async_op=True)
        self._wait(work.is_completed, work.wait)
        return parts

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank.

        Raises:
            ProcessError: one of the processes has ended or shows no life.
        """
        if self.size == 1:
            return [value]
        import torch

        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        try:
            lengths = [int(length) for length in self._all_gather(torch.tensor([content.numel()]))]
            parts = self._all_gather(torch.nn.functional.pad(content, (0, max(lengths) - content.numel())))
        except ProcessError:
            self.leaving.begun = True
            raise
        return [pickle.loads(part[:length].numpy().tobytes()) for part, length in zip(parts, lengths)]

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

    def conclude(self, work: Callable[[], object]) -> None:
        """[`lead`], for what publishes the repo: done is done, even if the others do not hear of it any more."""
        done = []
        self._written = "the main process may have written the repo"
        try:
            self.lead(lambda: done.append(work()))
        except ProcessError:
            if not done:
                raise

    def _for_others(self, error: Exception) -> Exception:
        """An error as another process can raise it."""
        if isinstance(error, EMRError):
            return error
        if isinstance(error, OSError) and error.errno is not None:
            return OSError(error.errno, error.strerror, error.filename)
        return ProcessError(f"process {self.rank} of this merge: {type(error).__name__}: {one_line(error)}")


ALONE = Team()


def _named(ranks: Sequence[int]) -> str:
    """The subject of an error."""
    if len(ranks) == 1:
        return f"process {ranks[0]} of this merge has"
    return f"processes {', '.join(map(str, ranks))} of this merge have"


def _in_thread(call: Callable[[], T]) -> futures.Future[T]:
    """What a call returns in a thread that nothing waits for when this process ends."""
    outcome: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome


@contextmanager
def team(device: torch.device | str, partner_timeout: float = PARTNER_TIMEOUT) -> Iterator[Team]:
    """The processes to share a merge out among; one, where no launcher and no process group says otherwise.

    Args:
        device: where the merge computes; every process takes one of its kind.
        partner_timeout (*optional*): seconds after which one that shows no life is given up.

    Raises:
        ProcessError: the processes do not find each other.
        OptionError: there are no process groups for such a device, or that is no time to wait.
    """
    from torch import distributed

    _check_timeout(partner_timeout)
    if not _connect(device):
        yield ALONE
        return
    store = distributed.distributed_c10d._get_default_store()
    rank, size = distributed.get_rank(), distributed.get_world_size()
    with stoppable() as leaving:
        team = Team(rank, size, Heartbeats(store, rank, size, partner_timeout), leaving=leaving)
        try:
            team.meet()
            yield team
        finally:
            team.part()


def _check_timeout(seconds: object) -> None:
    most = int(_PATIENCE.total_seconds())
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 1 <= seconds <= most:
        raise OptionError(f"partner_timeout={short(seconds)}: expected seconds, from 1 to {most}")


def _connect(device: torch.device | str) -> bool:
    """Make the default process group unless it is there; whether there are several processes."""
    from torch import accelerator, distributed

    if not distributed.is_available() or (launched_size() == 1 and not distributed.is_initialized()):
        return False
    try:
        if not distributed.is_initialized():
            from accelerate import PartialState

            with _interrupted_at_once():
                PartialState(cpu=str(device) == "cpu" or not accelerator.is_available())
        if not distributed.is_initialized():
            raise OptionError(f"device={short(str(device))}: accelerate knows no process group for it on this machine")
        return distributed.get_world_size() > 1
    except RuntimeError as error:
        raise ProcessError(f"the processes do not find each other: {one_line(error)}") from error


@contextmanager
def _interrupted_at_once() -> Iterator[None]:
    """Let Ctrl-C end this process while torch waits for others, of which Python would only hear afterwards."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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

    Launchers end the processes of one that has failed by SIGTERM, which by itself leaves everything lying about. Where
    the cleaning up hangs, the system ends the process.

    Args:
        at_once: whether to raise an exception wherever the block is; else the block looks at what this yields.
    """
    leaving, alarmed = Leaving(), False

    def stop(number: int, frame: object) -> None:
        nonlocal alarmed
        if at_once and not alarmed:
            alarmed = True
            _alarm(_TO_LEAVE)
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
        if alarmed:
            _alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _alarm(seconds: int) -> None:
    """Have the system end this process after a while, whoever holds Python's lock then; 0 calls it off."""
    # Where the program handles alarms itself it needs the only one that there is.
    if hasattr(signal, "alarm") and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL:
        signal.alarm(seconds)


def end_at_once(status: int) -> NoReturn:
    """End this process without Python's own cleaning up, which takes seconds and may run into what torch is doing."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody listens any more
            stream.flush()
    os._exit(status)


def end_with_launcher() -> None:
    """Let the end of the process that has [`launch`]ed this one, however it comes, be the end of this one."""
    if os.environ.pop(_LAUNCHED, None):
        if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:  # as the launcher has been told to
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=_end_with_input, daemon=True).start()


def _end_with_input() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_TO_LEAVE)
    os._exit(128 + signal.SIGTERM)


def launch(command: Sequence[str], count: int, out: Path) -> int:
    """Run a command that writes a repo in several processes of this machine, as a launcher does.

    Args:
        command: what each process is.
        count: how many there are. The standard input of each is a pipe, which ends when this process does.
        out: the repo. If the main process is killed, what it had of it is removed here.

    Returns:
        the exit status of the main process.

    Raises:
        ProcessError: it did not end by itself.
    """
    if count < 1:
        raise OptionError(f"num_processes={count}: expected at least 1")
    port = _free_port()
    pipe = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    with stoppable(at_once=False) as leaving:  # an exception in the midst of a `poll` would leave it locked
        try:
            for rank in range(count):
                environment = {**_environment(rank, count, port), _LAUNCHED: "1"}
                # In a session of their own: Ctrl-C is for this process, which ends the others.
                process = subprocess.Popen(command, env=environment, stdin=pipe[0], start_new_session=True)
                processes.append(process)
            failed = _wait(processes, leaving)
        finally:
            leaving.begun = True
            _end(processes)
            for end in pipe:
                os.close(end)
            from .staging import remove_leftovers

            remove_leftovers(out)  # of a main process that was killed
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
    """Wait for all to end, not long once one has failed or the main one is through, and not at all after a signal.

    Returns:
        the first that has failed.
    """
    failed, deadline = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline and not leaving.begun:
        if failed is None and (found := _failed(processes)) is not None:
            failed, deadline = found, time.monotonic() + _TO_FAIL
        if processes[0].poll() == 0:  # the repo is there: the others only have to end
            deadline = min(deadline, time.monotonic() + _TO_CLEAN_UP)
        time.sleep(0.05)
    return _failed(processes) if failed is None else failed


def _failed(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    return next((rank for rank, process in enumerate(processes) if process.poll()), None)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that still run."""
    for process in processes:
        process.terminate()
        if hasattr(signal, "SIGCONT"):
            process.send_signal(signal.SIGCONT)  # one that is stopped would not take the other
    deadline = time.monotonic() + _TO_CLEAN_UP
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _how(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
