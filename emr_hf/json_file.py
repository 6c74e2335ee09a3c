"""Settings of others in JSON files: what cannot be read or used is one error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from .errors import CheckpointError, one_line, short
from .regular_file import require_file

LARGEST = 16 << 20  # bytes; settings with ten thousands of labels have one or two million
DEEPEST = 64


def read_json(path: Path, label: str, unique: bool = False, largest: int = LARGEST) -> dict[str, Any]:
    """Content of a JSON file that holds an object.

    Args:
        path: the file.
        label: owner of the file, for the message.
        unique (*optional*): refuse a key that an object has twice, where Python takes the last.
        largest (*optional*): bytes of a file.

    Raises:
        CheckpointError: no such file, no permission, too large, no JSON, NaN, nested more than 64 levels deep, or
            no object.
    """
    require_file(path, label)
    try:
        if (size := path.stat().st_size) > largest:
            raise ValueError(f"{size:,} bytes are too many for settings")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, **_strict(unique))
        if "\\u" in text:  # half a character, which no file can be written with
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise CheckpointError(f"{label}: {path} is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{label}: {path} is no JSON file that can be used: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{label}: {path}: expected an object of settings, got {type(content).__name__}")
    if _depth(content) > DEEPEST:  # what copies or compares it would go as deep
        raise CheckpointError(f"{label}: {path} is nested too deeply")
    return content


def _strict(unique: bool) -> dict[str, Any]:
    return {"parse_constant": _constant, "object_pairs_hook": _once if unique else None}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{short(next(name for name in names if names.count(name) > 1))} is given twice")
    return content


def _constant(name: str) -> float | NoReturn:
    """Infinity, which some models' time steps are bounded by, but no NaN."""
    if name == "NaN":
        raise ValueError("a value is NaN")
    return float(name)


def _depth(content: object) -> int:
    levels, depth = [content], 0
    while levels and depth <= DEEPEST:
        values = (value.values() if isinstance(value, dict) else value for value in levels)
        levels = [inner for value in values for inner in value if isinstance(inner, (dict, list))]  # type: ignore
        depth += 1
    return depth
