"""Staging folders: where a folder is filled before it gets its place, and what killed processes leave of them.

A staging folder lies beside its target, `.<target>.partial-<process>-<number>`. It holds a lock, which the system lets
go when the process ends, with the names of the machine, the process and the target.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import RepoError

try:
    import fcntl
except ImportError:  # not a Unix: what a killed process leaves is named, not removed
    fcntl = None  # type: ignore[assignment]

_LOCK = "lock"
_LONGEST_NAME = 160  # bytes that a staging folder's name takes of its target's: most file systems allow 255 in all


@dataclass
class Staging:
    """A folder beside the target that is filled and then renamed.

    Attributes:
        path: of the staging folder, which holds the lock and `folder`.
        folder: what becomes the target.
        lock: descriptor of the lock file, locked where the file system can.
        keep: whether something in it is not ours to delete.
    """

    path: Path
    lock: int
    keep: bool = False

    def __post_init__(self) -> None:
        self.folder = self.path / "new"
        self.folder.mkdir()
        self.inode = self.folder.stat().st_ino

    def check_present(self, out: Path) -> None:
        """Raise RepoError if somebody has removed it meanwhile."""
        with suppress(FileNotFoundError):
            present = os.path.samestat(os.fstat(self.lock), os.stat(self.path / _LOCK))
            if present and self.folder.stat().st_ino == self.inode:
                return
        raise RepoError(f"{self.path} was removed while {out} was written into it: nothing was written; start again")

    def remove(self) -> None:
        """Delete it, and let the lock go."""
        if not self.keep:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def _prefix(out: Path) -> str:
    """Beginning of the names of a target's staging folders."""
    return f".{os.fsencode(out.name)[:_LONGEST_NAME].decode(errors='ignore')}.partial-"


def new_staging(out: Path) -> Staging:
    """A new staging folder of a target, locked, with the names of its owner."""
    while True:
        path = out.parent / f"{_prefix(out)}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        path.mkdir(parents=True)
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # another process took the empty folder for what a killed one had left
        if not _take(lock):
            os.close(lock)  # likewise
            continue
        owner = {"host": _host(), "process": os.getpid(), "target": str(out)}
        os.write(lock, json.dumps(owner).encode())
        return Staging(path, lock)


def _take(lock: int) -> bool:
    """Lock a file; `False` if another process holds it. Where there are no locks, everybody has it."""
    if fcntl is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
    return True


def _host() -> str:
    """Name of this machine: containers may share their names, or their ids, hardly both."""
    with suppress(OSError):
        return f"{platform.node()} {Path('/etc/machine-id').read_text().strip()}"
    return platform.node()


def remove_leftovers(out: Path) -> list[str]:
    """Remove the staging folders of a target whose processes have ended; what may not be removed is named.

    Args:
        out: the target.

    Returns:
        a message for each that stays: of a process that runs, of another machine, or of unknown origin.
    """
    out = out.resolve() if out.is_symlink() else out.absolute()
    if not out.parent.is_dir():
        return []
    found = sorted(path for path in out.parent.iterdir() if path.name.startswith(_prefix(out)))
    return [message for path in found if (message := _remove_leftover(path, out)) is not None]


def _remove_leftover(path: Path, out: Path) -> str | None:
    with suppress(OSError):
        path.rmdir()  # killed before it held anything
        return None
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return f"{path} is left of a write into {out} that did not end: remove it if nothing uses it"
    try:
        owner = _owner(lock)
        if owner.get("target", str(out)) != str(out):
            return None  # another target whose long name begins alike
        if owner.get("host") != _host() or fcntl is None:
            return (
                f"{path} is left of process {owner.get('process')} on {owner.get('host', 'an unknown machine')}: "
                "remove it there if that process has ended"
            )
        if not _take(lock):
            return f"process {owner.get('process')} is writing {out} too: the first to end gets the place"
        _bring_back(path, out)
        shutil.rmtree(path, ignore_errors=True)
        return None
    finally:
        os.close(lock)


def _owner(lock: int) -> dict[str, object]:
    with suppress(ValueError):
        owner = json.loads(os.pread(lock, 1 << 16, 0))
        if isinstance(owner, dict):
            return owner
    return {}


def _bring_back(staging: Path, out: Path) -> None:
    """Give a target its old folder back, which a process killed between two renames had moved away."""
    if (staging / "old").is_dir() and not out.exists():
        (staging / "old").rename(out)
