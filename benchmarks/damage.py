"""Damage to a JSON file: its fields, one by one, and its text; and what every damage says of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

SECRET = "the content of a file outside"
OUTSIDE = "outside"
"""Folder beside the damaged one, with a secret in files of several names."""
ALL = frozenset({"*"})
NONE: frozenset[str] = frozenset()


class DoesNotApply(Exception):
    """A specimen has nothing that this damage could be done to."""


@dataclass(frozen=True)
class Damage:
    """What was done.

    Attributes:
        what: for a reader of the report.
        names: of the file, field or tensor; an error has to tell one of them.
        accept: verbs for which another sound result is right too, as nothing tells it from the intended one; `"*"`
            for all.
    """

    what: str
    names: tuple[str, ...]
    accept: frozenset[str] = NONE


class Raw(str):
    """JSON text that stands for itself, where no Python value would be written so."""


Path_ = tuple[Any, ...]
"""Keys and indices that lead to a value."""

LONG = "x" * 100_000
WRONG: Sequence[tuple[str, Any]] = (
    ("null", None),
    ("an empty string", ""),
    ("a word", "nonsense"),
    ("3", 3),
    ("-1", -1),
    ("10^9", 10**9),
    ("10^30", 10**30),
    ("0.5", 0.5),
    ("NaN", math.nan),
    ("-Infinity", -math.inf),
    ("1e999", Raw("1e999")),
    ("a number of 5000 digits", Raw("9" * 5000)),
    ("true", True),
    ("an empty list", []),
    ("a list of nulls", [None, None]),
    ("lists in lists", [[["x"]]]),
    ("10,000 nested lists", Raw("[" * 10_000 + "]" * 10_000)),
    ("an empty mapping", {}),
    ("a mapping", {"a": {"b": None}}),
    ("a path upwards", f"../{OUTSIDE}"),
    ("a path through a folder upwards", f"tasks/../../{OUTSIDE}"),
    ("an absolute path", f"@{OUTSIDE}@"),
    ("another user's home", "~root/x"),
    ("a null byte", "a\0b"),
    ("dots and slashes", "a.b/c..d"),
    ("100,000 letters", LONG),
    ("half a surrogate", Raw('"\\ud800"')),
    ("a line break", "one\ntwo"),
)


def wrong_values(value: Any) -> list[tuple[str, Any]]:
    """Values that may stand where this one does, and what to call them."""
    found = list(WRONG)
    if isinstance(value, bool):
        found += [("its opposite", not value), ("its word", str(value)), ("its number", int(value))]
    elif isinstance(value, int):
        found += [(f"{value} -> {new}", new) for new in (value + 1, value - 1, 2 * value, -value, 0)]
        found += [("its digits as a string", str(value)), ("a float of it", float(value))]
    elif isinstance(value, float):
        found += [("its negative", -value), ("its digits as a string", str(value)), ("0.0", 0.0), ("1e300", 1e300)]
    elif isinstance(value, str):
        found += [(f"{value} -> {new}", new) for new in (value.upper(), value + "x", value + ".", value[:-1])]
        found += [("a list of its letters", list(value)), ("a mapping of it", {value: value})]
    elif isinstance(value, list):
        found += 2 * [("the list twice", value + value), ("a name more", [*value, "x.y"]), ("one less", value[1:])]
        found += [("in another order", value[::-1]), ("its first for all", value[:1] * len(value))]
    elif isinstance(value, dict) and value:
        found += 2 * _wrong_mappings(value)
    return [(label, new) for label, new in found if type(new) is not type(value) or new != value]


def _wrong_mappings(value: dict[str, Any]) -> list[tuple[str, Any]]:
    first, *rest = value
    others = {key: value[key] for key in rest}
    found: list[tuple[str, Any]] = [
        (f"without {first}", others),
        (f"{first} called '../x'", {"../x": value[first], **others}),
        (f"{first} called ''", {"": value[first], **others}),
        (f"{first} called 'a.b'", {"a.b": value[first], **others}),
        (f"{first} called '1e3'", {"1e3": value[first], **others}),
        (f"{first} once more as 'more'", {**value, "more": value[first]}),
        ("an unknown field more", {**value, "unknown": 1}),
        ("its keys as a list", list(value)),
    ]
    if rest:
        found.append((f"{first} with the value of {rest[0]}", {**value, first: value[rest[0]]}))
    return found


def pick(document: Any, random: Random, rare: Iterable[str] = ()) -> Path_:
    """Lead to a value of a document, chosen by chance.

    Args:
        rare: keys at the top below which most fields are, and that are taken less often than others.
    """
    path: list[Any] = []
    node = document
    while isinstance(node, (dict, list)) and node and (not path or random.random() < 0.7):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = random.choice(keys)
        if not path and key in rare and random.random() < 0.5:
            continue
        path.append(key)
        node = node[key]
    if not path:
        raise DoesNotApply
    return tuple(path)


def at(document: Any, path: Path_) -> Any:
    """The value that a path leads to."""
    for key in path:
        document = document[key]
    return document


def spoil_field(
    file: Path, random: Random, accept: Callable[[Path_], frozenset[str]], rare: Iterable[str] = (), under: Path_ = ()
) -> Damage:
    """Remove a field of a JSON file, or give it a wrong value.

    Args:
        accept: path -> `Damage.accept`.
        under: only fields below this one.
    """
    document = json.loads(file.read_text())
    path = (*under, *pick(at(document, under), random, rare))
    parent, key = at(document, path[:-1]), path[-1]
    shown = ".".join(map(str, path))
    old = parent[key]
    names = _names(file, (*path, next(iter(old))) if isinstance(old, dict) and old else path)
    if random.random() < 0.15:
        del parent[key]
        write_json(file, document)
        return Damage(f"{file.name}: {shown} removed", names, accept(path))
    label, value = random.choice(wrong_values(parent[key]))
    parent[key] = value
    write_json(file, document)
    renamed = key == "tasks" and (" called " in label or "once more" in label)  # tasks may have any names
    return Damage(f"{file.name}: {shown} = {label}", names, ALL if renamed else accept(path))


def _names(file: Path, path: Path_) -> tuple[str, ...]:
    words = [key for key in path if isinstance(key, str)]
    keys = [key for key in words if len(key) > 2]
    return (file.name, *keys, *map(repr, words), *(key.partition("_")[0] for key in keys if key.find("_") > 3))


def write_json(file: Path, document: Any) -> None:
    """Write a document in which [`Raw`] text and `@outside@` may stand."""
    raw: list[str] = []

    def marked(node: Any) -> Any:
        if isinstance(node, Raw):
            raw.append(node)
            return f"@raw {len(raw) - 1}@"
        if isinstance(node, dict):
            return {key: marked(value) for key, value in node.items()}
        return [marked(value) for value in node] if isinstance(node, list) else node

    text = json.dumps(marked(document), indent=2)
    for index, content in enumerate(raw):
        text = text.replace(f'"@raw {index}@"', content)
    file.write_text(text.replace(f"@{OUTSIDE}@", str(file.parent.parent / OUTSIDE)))


def _twice(text: bytes) -> bytes:
    """Every top field twice, with another value first."""
    document = json.loads(text)
    if not isinstance(document, dict) or not document:
        raise DoesNotApply
    fields = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
    return ("{" + ", ".join([f"{json.dumps(key)}: 1" for key in document] + fields) + "}").encode()


def _twice_wrong_last(text: bytes) -> bytes:
    document = json.loads(text)
    if not isinstance(document, dict) or not document:
        raise DoesNotApply
    return text.rstrip()[:-1] + f", {json.dumps(sorted(document)[0])}: 1}}".encode()


TEXTS: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "half of it": lambda text: text[: len(text) // 2],
    "without its last bracket": lambda text: text.rstrip()[:-1],
    "with a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "in UTF-16": lambda text: text.decode().encode("utf-16"),
    "binary": lambda text: bytes(range(256)) * 4,
    "a byte that is not UTF-8 within": lambda text: text.replace(b'"', b'"\xff', 3),
    "null bytes at its end": lambda text: text + b"\0" * 16,
    "a list around it": lambda text: b"[" + text + b"]",
    "a string": lambda text: b'"nonsense"',
    "null": lambda text: b"null",
    "a number": lambda text: b"5",
    "an empty mapping": lambda text: b"{}",
    "a mapping of nothing known": lambda text: b'{"a": 1}',
    "every field twice, wrong first": _twice,
    "a field once more, wrong": _twice_wrong_last,
    "100,000 open brackets": lambda text: b"[" * 100_000,
    "100,000 open mappings": lambda text: b'{"a":' * 100_000,
    "comments": lambda text: b"// a comment\n" + text,
    "twice": lambda text: text + text,
    "a trailing comma": lambda text: text.rstrip()[:-1] + b",}",
    "20 MB of blanks before it": lambda text: b" " * 20_000_000 + text,
}


def spoil_text(file: Path, random: Random, accept: frozenset[str] = NONE) -> Damage:
    """Damage a JSON file as text."""
    label = random.choice(list(TEXTS))
    file.write_bytes(TEXTS[label](file.read_bytes()))
    return Damage(f"{file.name}: {label}", (file.name, file.parent.name), accept)


def write_outside(folder: Path) -> None:
    """Lay down what no reader may read or change."""
    folder.mkdir(parents=True)
    names = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "notes.txt")
    for name in (*names, "config.json", "README.md", "adapter_config.json", "chat_template.jinja"):
        (folder / name).write_text(json.dumps({"secret": SECRET}))
