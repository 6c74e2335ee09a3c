"""Files that are read while others may change them: what is mapped of one that was cut short is not used.

A mapped tensor is read from its file when it is computed with. By then the file may be another one, be shorter, which
would end the process by SIGBUS, or have other values. So it is compared with what it was when it was opened, at every
tensor and once more before a result is used, and reads are guarded (csrc/guard.cpp) where there is the compiled file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from . import kernels
from .errors import CheckpointError, one_line
from .regular_file import require_file


class WatchedMemory:
    """Tensors of which some may be mapped from files that are not known.

    Args:
        label: owner of the tensors, for messages.
    """

    def __init__(self, label: str):
        self.label = label
        # By address: what watches it, and the tensor, without which its addresses might be another file's.
        self._watched: dict[int, tuple[int, Tensor]] = {}
        self._looked_at, self._is_damaged = 0, False

    def watch(self, tensor: Tensor) -> Tensor:
        """Guard a tensor's memory in [`guarded_reads`]; returns the tensor."""
        if tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            address, length = storage.data_ptr(), storage.nbytes()
            if length and address not in self._watched and (watched := kernels.watch(address, length)) is not None:
                self._watched[address] = watched, tensor.detach()
        return tensor

    def check(self) -> None:
        """Raise CheckpointError if what was read may not be what was opened."""
        if self._was_hit():
            raise CheckpointError(f"{self.label}: a file that it is mapped from was cut short, or cannot be read")

    def _was_hit(self) -> bool:
        """Whether a guarded read has found a page missing, which then stays a page of zeros."""
        if (now := kernels.all_hits()) != self._looked_at:
            self._is_damaged |= any(kernels.hits(watched) for watched, _ in self._watched.values())
            self._looked_at = now
        return self._is_damaged

    def __del__(self) -> None:
        for watched, _ in self._watched.values():
            kernels.unwatch(watched)


class InputFile(WatchedMemory):
    """A weights file. Make it before the file is opened.

    Args:
        path: the file.
        label: as for [`WatchedMemory`].

    Raises:
        CheckpointError: it is no regular file.
    """

    def __init__(self, path: Path, label: str):
        super().__init__(label)
        require_file(path, label)
        self.path = path
        self._opened = path.stat()

    def check(self) -> None:
        """Raise CheckpointError if the file is not what it was when it was opened, or a page of it was missing."""
        change = self._change() or ("was cut short, or the disk cannot read it," if self._was_hit() else None)
        if change is not None:
            owner = "" if Path(self.label) in self.path.parents else f"{self.label}: "
            raise CheckpointError(f"{owner}{self.path} {change} while it was in use: open it again once it is whole")

    def _change(self) -> str | None:
        before = self._opened
        try:
            now = os.stat(self.path)
        except OSError as error:
            return f"is gone ({one_line(error.strerror)})"
        if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino):
            return "was replaced by another file"
        if now.st_size != before.st_size:
            verb = "was cut" if now.st_size < before.st_size else "has grown"
            return f"{verb} from {before.st_size} to {now.st_size} bytes"
        return "was written to" if now.st_mtime_ns != before.st_mtime_ns else None


class HasFiles(Protocol):
    """What is read from files."""

    @property
    def files(self) -> Sequence[WatchedMemory]:
        """All that have been opened so far."""
        ...


@contextmanager
def guarded_reads(inputs: Sequence[HasFiles]) -> Iterator[Callable[[], None]]:
    """Read from files, and be told of one that is changed meanwhile.

    An error that comes of a changed file is told as what it is. Where all went well, call what this yields before the
    result is used. Blocks may be nested, and run in several threads.

    Raises:
        CheckpointError: a file was cut short, replaced, removed or written to.
    """

    def check() -> None:
        for file in {id(file): file for given in inputs for file in given.files}.values():
            file.check()

    kernels.begin_guard()
    try:
        yield check
    except Exception:
        check()
        raise
    finally:
        kernels.end_guard()
