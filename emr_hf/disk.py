"""Files and folders on the disk: errors of writing, and what has to be done so that a power cut loses nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import EMRError, RepoError, one_line


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise RepoError where the disk does not take what is written."""
    try:
        yield
    except EMRError:
        raise
    except (OSError, SafetensorError) as error:
        raise RepoError(f"cannot write {out}: {one_line(error)}") from error


def paths_in(folder: Path) -> Iterator[Path]:
    """Relative path of everything in a folder but folders; links are not followed."""
    for root, folders, files in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(root, name))]
        empty = [] if folders or files or Path(root) == folder else [""]
        for name in (*files, *linked, *empty):
            yield (Path(root) / name).relative_to(folder)


def sync_tree(folder: Path) -> None:
    """Write all files of a folder, and the folders, to the disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(root) / name
            if not path.is_symlink():
                sync(path)
        sync(Path(root))


def sync(path: Path) -> None:
    """Write a file's content, or a folder's list of names, to the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return  # Windows has no such call
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)
