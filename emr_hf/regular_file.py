"""Refusal of what is no regular file: opening a named pipe would wait for ever, and reading a device never ends."""

from __future__ import annotations

import stat
from pathlib import Path

from .errors import CheckpointError, one_line

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_file(path: Path, label: str) -> None:
    """Raise unless a path, or what it links to, is a regular file; nothing is opened.

    Args:
        path: the file that is about to be read.
        label: owner of the file, for the message.

    Raises:
        CheckpointError: it is a folder, a named pipe, a socket or a device, or it cannot be found.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"{label}: {path} does not exist: expected a file") from None
    except (OSError, ValueError) as error:  # no permission, a loop of links, too long a name, a null byte
        raise CheckpointError(f"{label}: cannot read {path}: {one_line(error)}") from None
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise CheckpointError(f"{label}: {path} is {kind}: expected a regular file")
