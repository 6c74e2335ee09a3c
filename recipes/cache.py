"""Where the recipes keep what they download and train, and how a folder there comes to be."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RECORD = "made_with.json"


def cache_root() -> Path:
    """Return `$EMR_HF_CACHE`, or `~/.cache/emr_hf` when that is unset or empty."""
    return Path(os.environ.get("EMR_HF_CACHE") or "~/.cache/emr_hf").expanduser()


def build_once(folder: Path, settings: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """Return `folder`, building it first unless it was already built with the same settings.

    The work happens in a temporary folder beside it that is renamed when finished, so an interrupted run never
    leaves a folder that looks complete.

    Args:
        folder (`Path`): where the result belongs.
        settings (`Mapping`): everything the result depends on, as JSON values. Kept inside the folder and compared.
        build (`Callable`): fills the empty folder it is given.
    """
    record = json.dumps(settings, indent=2, sort_keys=True)
    if is_built(folder, record):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh = Path(scratch) / folder.name
        fresh.mkdir()
        build(fresh)
        (fresh / RECORD).write_text(record, encoding="utf-8")
        _put_in_place(fresh, folder, record)
    return folder


def is_built(folder: Path, record: str) -> bool:
    """Say whether `folder` holds a finished result whose record reads exactly `record`."""
    path = folder / RECORD
    return path.is_file() and path.read_text(encoding="utf-8") == record


def _put_in_place(fresh: Path, folder: Path, record: str) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    try:
        fresh.rename(folder)
    except OSError:
        # Another process may have finished the same work between the two calls above.
        if not is_built(folder, record):
            raise


def folder_bytes(folder: Path) -> int:
    """Return the size of all files under `folder`, the record left out."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != RECORD)
