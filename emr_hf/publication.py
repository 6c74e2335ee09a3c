"""Folders that appear complete or not at all, and never in place of what others have put there.

A folder is filled beside its place, in a staging folder; then it is synced to the disk and renamed.
docs/reliability.md says what that promises.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from .disk import paths_in, sync, sync_tree, writing
from .errors import EMRError, RepoError, one_line, short
from .staging import Staging, new_staging, remove_leftovers

FileState = tuple[int, int, int]
"""Inode, size and time of the last change."""


@dataclass(frozen=True)
class Kind:
    """A kind of folder that this package writes, and may replace.

    Attributes:
        name: for messages, with its article.
        holds: whether a folder is one of these.
        owns: whether the file of a folder at a relative path is one that this package wrote, not one of its owner's.
    """

    name: str
    holds: Callable[[Path], bool]
    owns: Callable[[Path, Path], bool]


@dataclass(frozen=True)
class Target:
    """A place to write to, as it was when it was checked.

    Attributes:
        out: the folder, absolute.
        kind: what is written.
        state: files of the folder that will be replaced, by relative path; `None` where there is none yet.
        notes: what the user should know of what other processes left there.
    """

    out: Path
    kind: Kind
    state: dict[Path, FileState] | None = None
    notes: list[str] = field(default_factory=list)


def claim(out: str | Path, kind: Kind, overwrite: bool = False) -> Target:
    """[`check_target`], after what killed processes of this machine have left of `out` is removed."""
    with _legal(out):
        notes = remove_leftovers(Path(out))
    target = check_target(out, kind, overwrite)
    target.notes.extend(notes)
    return target


def check_target(out: str | Path, kind: Kind, overwrite: bool = False) -> Target:
    """The place `out`, if it may be written: only an empty folder, or one of this kind, is ever replaced.

    Raises:
        RepoError: it may not.
    """
    with _legal(out):
        return _checked(Path(out), kind, overwrite)


@contextmanager
def _legal(out: str | Path) -> Iterator[None]:
    """Raise RepoError for a path that no file can have."""
    try:
        with writing(Path(out)):
            yield
    except ValueError as error:
        if isinstance(error, EMRError):
            raise
        raise RepoError(f"cannot write {short(str(out))}: {one_line(error)}: expected the path of a folder") from None


def _checked(out: Path, kind: Kind, overwrite: bool) -> Target:
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(out)  # unlike `exists` it says why a path cannot be
    _check_parent(out)
    place = out.resolve() if out.is_symlink() else out.absolute()
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        if not place.exists() and len(os.fsencode(place.name)) > 255:
            raise RepoError(f"cannot write {out}: its name has {len(os.fsencode(place.name))} bytes, at most 255 fit")
        return Target(place, kind)
    if not kind.holds(place):
        raise RepoError(f"{out} exists and is no {kind.name}: it will not be touched; choose another folder")
    if not overwrite:
        raise RepoError(f"{out} exists: choose another folder or give overwrite=True (--overwrite)")
    _check_no_git(place)
    return Target(place, kind, _state(place, kind))


def _check_parent(out: Path) -> None:
    for parent in out.absolute().parents:
        if not parent.exists():
            continue
        if not parent.is_dir():
            raise RepoError(f"cannot write {out}: {parent} is a file, expected a folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RepoError(f"cannot write {out}: no permission to write into {parent}")
        return


def _check_no_git(out: Path) -> None:
    if (out / ".git").exists():
        raise RepoError(f"{out} is a git checkout, whose history replacing it would lose: choose another folder")


def check_outside(repo: Path, out: Path) -> None:
    """Raise RepoError where a changed repo would be written into the one it is made of."""
    if repo.resolve() in out.resolve().parents:
        raise RepoError(f"{out} is inside {repo}: choose a folder outside, or the repo itself with overwrite=True")


def check_holds_no_input(target: Target, inputs: Sequence[tuple[str, Path]]) -> None:
    """Raise RepoError where replacing the target would delete an input.

    Args:
        inputs: label and path of each file or folder that is read.
    """
    out = target.out.resolve()
    for label, path in inputs:
        if target.state is not None and out in (path.resolve(), *path.resolve().parents):
            raise RepoError(
                f"{target.out} holds an input, {path} ({label}), that replacing it would delete: choose another folder"
            )


def _state(folder: Path, kind: Kind, ours: bool = True) -> dict[Path, FileState]:
    """The files of a folder that this package wrote, or those of the folder's owner."""
    state = {}
    for place in paths_in(folder):
        if kind.owns(folder, place) == ours:
            stat = (folder / place).lstat()
            state[place] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return state


@contextmanager
def atomic_folder(target: Target) -> Iterator[Path]:
    """A folder to fill that becomes the target only when the block ends well.

    Whatever happens, the target is either as it was or complete, on the disk too. A killed process leaves at most a
    hidden folder beside it, which the next [`claim`] of the target removes.

    Raises:
        RepoError: the target is not as it was checked any more, or the disk does not take it.
    """
    out = target.out
    new_parents = [parent for parent in out.parents if not parent.exists()]
    with writing(out):
        try:
            staging = new_staging(out)
            try:
                yield staging.folder
                _publish(target, staging)
            finally:
                staging.remove()
        finally:
            if not out.exists():
                for parent in new_parents:
                    with suppress(OSError):
                        parent.rmdir()
        for parent in new_parents:
            sync(parent.parent)


# Publication


def _publish(target: Target, staging: Staging) -> None:
    """Put the staging folder's content in the target's place, synced before and after."""
    staging.check_present(target.out)
    carried: dict[Path, FileState] = {}
    if target.state is not None:
        _check_unchanged(target, target.out)
        carried = _carry_over(target, staging.folder)
    sync_tree(staging.folder)
    sync(staging.path)
    staging.check_present(target.out)
    if target.state is None:
        _appear(staging.folder, target)
    else:
        _replace(staging, target, carried)
    sync(target.out.parent)


def _appear(folder: Path, target: Target) -> None:
    try:
        folder.rename(target.out)  # this system call replaces nothing but an empty folder
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise
        raise RepoError(
            f"{target.out} has come to exist while it was written: it is left as it is, and nothing was written; "
            "choose another folder, or look at what is there"
        ) from None


def _replace(staging: Staging, target: Target, carried: dict[Path, FileState]) -> None:
    """Change places with the very folder that was checked; what was there ends up in the staging folder.

    Args:
        carried: the owner's files that are in the new folder already, as they were.
    """
    folder, out = staging.folder, target.out
    try:
        if _exchange(folder, out):
            old = folder
        else:
            old = staging.path / "old"
            out.rename(old)
            folder.rename(out)
        _check_unchanged(target, old, carried)
    except BaseException:
        _undo(staging, out)
        raise


def _undo(staging: Staging, out: Path) -> None:
    """Put back what was at the target, wherever an exchange was interrupted."""
    old = staging.path / "old"
    staging.keep = True  # until it is there again
    if old.exists():
        if out.exists() and out.stat().st_ino == staging.inode:
            out.rename(staging.folder)
        try:
            old.rename(out)  # which replaces nothing that another has put there in between
        except OSError:
            raise RepoError(f"{out} could not be put back: what was there is in {old}") from None
    elif staging.folder.stat().st_ino != staging.inode and not _exchange(staging.folder, out):
        raise RepoError(f"{out} could not be put back: what was there is in {staging.folder}")
    staging.keep = False


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that neither name is ever vacant; whether the system could."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or an old C library
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0


def _check_unchanged(target: Target, old: Path, carried: dict[Path, FileState] | None = None) -> None:
    """Raise RepoError unless a folder is the one that was checked, and nothing of its owner's would be lost.

    Args:
        target: what was checked.
        old: where that folder is now.
        carried (*optional*): the owner's files of which there are copies, as they were.
    """
    changed = f"{target.out} was changed while it was to be replaced"
    if not old.is_dir() or not target.kind.holds(old) or _state(old, target.kind) != target.state:
        raise RepoError(f"{changed}: it is left as it is, and nothing was written; look at what is there")
    _check_no_git(old)
    if carried is not None:
        for place, state in _state(old, target.kind, ours=False).items():
            if carried.get(place) != state:
                raise RepoError(f"{changed} ({place} is new): it is left as it is, and nothing was written")


def _carry_over(target: Target, folder: Path) -> dict[Path, FileState]:
    """Take what the owner of a folder has put into it along into the one that replaces it; its state before."""
    others = _state(target.out, target.kind, ours=False)
    for place in others:
        source, copy = target.out / place, folder / place
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            copy.unlink(missing_ok=True)
            copy.symlink_to(os.readlink(source))
        elif source.is_dir():
            copy.mkdir(exist_ok=True)
        elif source.is_file():
            copy.unlink(missing_ok=True)
            shutil.copy2(source, copy)
        else:
            raise RepoError(f"{source} is no file: move it away, or choose another folder")
    return others


@contextmanager
def updated_folder(out: Path, kind: Kind, last: Sequence[str], is_stale: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder to fill, whose files come to `out` when the block ends well.

    In a folder that is there already each file is replaced in one step, and other files stay; a new one appears
    complete or not at all.

    Args:
        out: a folder, or a place where there is nothing.
        kind: of what is written.
        last, is_stale: as for [`_put_files`].

    Raises:
        RepoError: the disk does not take it, or `out` is no folder.
    """
    if not os.path.lexists(out):
        with atomic_folder(claim(out, kind)) as folder:
            yield folder
        return
    if not out.is_dir():
        raise RepoError(f"cannot write {out}: it is a file, expected a folder")
    place = out / out.resolve().name  # staging folders lie beside their target
    with writing(out):
        for message in remove_leftovers(place):
            warnings.warn(message, stacklevel=4)
        staging = new_staging(place)
        try:
            yield staging.folder
            staging.check_present(out)
            _put_files(staging.folder, out, last, is_stale)
        finally:
            staging.remove()


def _put_files(folder: Path, out: Path, last: Sequence[str], is_stale: Callable[[Path], bool]) -> None:
    """Move the files of a folder into another one that is there already, each in one step, those of `last` at the end.

    Args:
        folder: a folder on the same disk.
        out: where to; what else it holds stays.
        last: names of the files by which readers find the others, in the order of moving.
        is_stale: whether a file of `out`, by its relative path, is of no use beside the new ones: removed at the end.
    """
    sync_tree(folder)
    places = sorted(paths_in(folder))
    late = [Path(name) for name in last if Path(name) in places]
    for group in ([place for place in places if place not in late], late):
        for place in group:
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / place, out / place)
        for parent in {(out / place).parent for place in group}:
            sync(parent)
    for place in list(paths_in(out)):
        if place not in places and is_stale(place):
            (out / place).unlink()
    sync(out)
