"""Recipes, sound and damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

from catalog import HOSTILE_PATTERNS, Family
from damage import ALL, NONE, OUTSIDE, Damage, Path_, spoil_field, write_json

NAME = "recipe.yaml"
_FREE = ("private", "labels", "max_shard_size")


def write_recipe(folder: Path, finetunes: Mapping[str, Path]) -> Path:
    """A recipe with every field, of models in its own folder."""
    content = {
        "base": "./base",
        "tasks": {task: f"./{path.name}" for task, path in finetunes.items()},
        "method": "emr",
        "rescale": "global",
        "tau_dtype": "float32",
        "default_task": list(finetunes)[-1],
        "private": [],
        "max_shard_size": "5GB",
        "labels": {},
    }
    (folder / NAME).write_text(json.dumps(content, indent=1))
    return folder / NAME


def _accepts(path: Path_) -> frozenset[str]:
    return ALL if path[0] in _FREE else NONE


def field(folder: Path, random: Random) -> Damage:
    """A field of the recipe."""
    return spoil_field(folder / NAME, random, _accepts)


def _laughs(document: str, depth: int = 9, width: int = 9) -> str:
    lines = ["a0: &a0 [lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join([*lines, f"tasks: *a{depth - 1}", "base: ./base", ""])


def _laughs_in(field_name: str) -> Callable[[str], str]:
    def bomb(document: str) -> str:
        lines = ["x0: &x0 {k: v}"]
        lines += [f"x{i}: &x{i} {{{', '.join(f'k{j}: *x{i - 1}' for j in range(9))}}}" for i in range(1, 9)]
        return "\n".join([*lines, "base: ./base", "tasks: {a: ./finetune-0}", f"{field_name}: *x8", ""])

    return bomb


def _block(document: str, change: Callable[[dict], object]) -> str:
    content = json.loads(document)
    change(content)
    return json.dumps(content)


TEXTS: Mapping[str, Callable[[str], str | bytes]] = {
    "empty": lambda text: "",
    "half of it": lambda text: text[: len(text) // 2],
    "with tabs": lambda text: "base: ./base\ntasks:\n\ta: ./finetune-0\n",
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "not UTF-8": lambda text: text.encode() + b"\xff\xfe",
    "binary": lambda text: bytes(range(256)),
    "null bytes": lambda text: text + "\0\0",
    "an alias bomb in tasks": _laughs,
    "an alias bomb in labels": _laughs_in("labels"),
    "an alias bomb in private": _laughs_in("private"),
    "an alias bomb in align": _laughs_in("align"),
    "an alias bomb in an unknown field": lambda text: _laughs_in("unknown")(text),
    "an alias bomb in default_task": _laughs_in("default_task"),
    "an alias bomb in a task": lambda text: _laughs(text).replace("tasks: *a8", "tasks: {a: *a8}"),
    "an alias bomb as base": lambda text: _laughs(text).replace("base: ./base", "base: *a8"),
    "an alias bomb as keys": lambda text: _laughs(text).replace("tasks: *a8", "tasks: {? *a8 : x}"),
    "a list that holds itself": lambda text: "base: ./base\ntasks: &t [*t]\n",
    "a mapping that holds itself": lambda text: "base: ./base\ntasks: &t {a: *t}\n",
    "a document that holds itself": lambda text: "&d\nbase: *d\ntasks: *d\n",
    "a task that is the mapping": lambda text: "base: ./base\ntasks: &t\n  a: ./finetune-0\n  b: *t\n",
    "merge keys": lambda text: "x: &x {a: ./finetune-0}\nbase: ./base\ntasks: {<<: *x}\n",
    "a merge of many": lambda text: "base: ./base\ntasks: {<<: [{a: ./finetune-0}, 5]}\n",
    "an unknown alias": lambda text: "base: *nothing\ntasks: {a: b}\n",
    "an anchor twice": lambda text: "base: &a ./base\ntasks: {a: &a ./finetune-0, b: *a}\n",
    "a Python object": lambda text: "base: !!python/object/apply:os.system ['true']\ntasks: {a: b}\n",
    "a Python name": lambda text: "!!python/name:os.system\n",
    "an unknown tag": lambda text: "base: !own ./base\ntasks: {a: ./finetune-0}\n",
    "a set": lambda text: "base: ./base\ntasks: !!set {a, b}\n",
    "an ordered mapping": lambda text: "base: ./base\ntasks: !!omap [a: ./finetune-0]\n",
    "bytes": lambda text: "base: ./base\ntasks: {a: !!binary aGVsbG8=}\n",
    "bytes that are none": lambda text: "base: ./base\ntasks: {a: !!binary '$$$'}\n",
    "a date": lambda text: "base: ./base\ntasks: {2020-01-01: ./finetune-0}\n",
    "a date that is none": lambda text: "base: ./base\ntasks: {a: 2020-99-99}\n",
    "a number of base 60": lambda text: "base: ./base\ntasks: {a: 190:20:30}\n",
    "an integer that is none": lambda text: "base: ./base\ntasks: {a: !!int x}\n",
    "a float that is none": lambda text: "base: ./base\ntasks: {a: !!float x}\n",
    "a bool that is none": lambda text: "base: ./base\ntasks: {a: !!bool x}\n",
    "a number of 5000 digits": lambda text: "base: ./base\ntasks: {a: " + "9" * 5000 + "}\n",
    "numbers for names": lambda text: "base: ./base\ntasks: {1: ./finetune-0}\n",
    "on for a name": lambda text: "base: ./base\ntasks: {on: ./finetune-0}\n",
    "null for a name": lambda text: "base: ./base\ntasks: {~: ./finetune-0}\n",
    "NaN for names": lambda text: "base: ./base\ntasks: {.nan: ./finetune-0, .NaN: x}\n",
    "lists for names": lambda text: "base: ./base\ntasks: {? [a, b] : ./finetune-0}\n",
    "mappings for names": lambda text: "base: ./base\ntasks: {? {a: b} : ./finetune-0}\n",
    "a field twice": lambda text: text.rstrip()[:-1] + ', "method": "fit"}',
    "a task twice": lambda text: "base: ./base\ntasks: {a: ./finetune-0, a: ./finetune-1}\n",
    "two documents": lambda text: text + "\n---\n" + text,
    "nested lists": lambda text: "base: ./base\ntasks: " + "[" * 20_000,
    "closed nested lists": lambda text: "base: ./base\ntasks: " + "[" * 2_000 + "]" * 2_000,
    "nested mappings": lambda text: "base: ./base\ntasks: " + "{a: " * 2_000 + "x" + "}" * 2_000,
    "20,000 tasks": lambda text: "base: ./base\ntasks: {" + ", ".join(f"t{i}: x" for i in range(20_000)) + "}",
    "a line of 10 MB": lambda text: "base: ./base\ntasks: {a: " + "x" * 10_000_000 + "}",
    "a word": lambda text: "nonsense",
    "a list": lambda text: "- base\n- tasks\n",
    "a number": lambda text: "5",
    "null": lambda text: "~",
    "base missing": lambda text: _block(text, lambda content: content.pop("base")),
    "tasks missing": lambda text: _block(text, lambda content: content.pop("tasks")),
}
# A base missing is one that adapters name, or the median; and of two anchors YAML takes the later.
_OTHER_MERGES = ("base missing", "merge keys", "an anchor twice", "on for a name", "a date", "an ordered mapping")


def text(folder: Path, random: Random) -> Damage:
    """The recipe as text."""
    file = folder / NAME
    label = random.choice(list(TEXTS))
    new = TEXTS[label](file.read_text())
    file.write_bytes(new if isinstance(new, bytes) else new.encode())
    names = (NAME, "tasks", "base", "labels", "private", "align", "default_task", "t0")
    return Damage(f"{NAME}: {label}", names, ALL if label in _OTHER_MERGES else NONE)


PATHS: Sequence[str] = (
    "a\0b",
    "x" * 5000,
    "./" + "x/" * 3000,
    "~nobody-here/x",
    "$NOWHERE",
    "${NOWHERE",
    "$HOME",
    "/dev/zero",
    "/dev/null",
    "/",
    "..",
    ".",
    "./pipe",
    "./recipe.yaml",
    "./finetune-0/model.safetensors",
    "https://example.invalid/x",
    "me/model@" + "x" * 500,
    "me/model@../../x",
    "@",
    "a/b/c/d",
    "-x",
    "me/mo del",
    "C:\\models\\x",
    "\ud7ff",
    "./loop",
    f"../{OUTSIDE}",
    "",
    " ",
    "\n",
)


def path(folder: Path, random: Random) -> Damage:
    """A path or Hub id that leads nowhere good."""
    file = folder / NAME
    content = json.loads(file.read_text())
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    value, name = random.choice(PATHS), random.choice(["base", *content["tasks"]])
    place = content if name == "base" else content["tasks"]
    place[name] = value
    write_json(file, content)
    return Damage(f"{NAME}: {name} = {value[:60]!r}", (name, NAME))


def pattern(folder: Path, random: Random) -> Damage:
    """A pattern in `private` that would take for ever, or is none."""
    file = folder / NAME
    content = json.loads(file.read_text())
    value = random.choice(HOSTILE_PATTERNS)
    content["private"] = random.choice([value, [value], [value, 5]])
    write_json(file, content)
    return Damage(f"{NAME}: private = {value[:60]!r}", (NAME, "private"), ALL)


TASKS: Sequence[str] = (
    "..", ".", "/", "a/../../b", "/etc/x", "__base__", " a", "a ", "a\nb", "a\0b", "", "x" * 10_000, "\u202ea",
    "adapter_config.json", "config.json", "tasks", "con", "a:b", "a" + "\u0301" * 50, "\ud83d\ude00", "-a", "a,b", "*",
)  # fmt: skip


def task_name(folder: Path, random: Random) -> Damage:
    """A strange name of a task."""
    file = folder / NAME
    content = json.loads(file.read_text())
    old, new = list(content["tasks"])[0], random.choice(TASKS)
    content["tasks"] = {new if task == old else task: value for task, value in content["tasks"].items()}
    write_json(file, content)
    return Damage(f"{NAME}: {old} called {new[:60]!r}", (NAME, "task"), ALL)


def special(folder: Path, random: Random) -> Damage:
    """No file where the recipe should be."""
    file = folder / NAME
    content = file.read_bytes()
    label = random.choice(["missing", "a folder", "a named pipe", "a link to itself", "a link to /dev/zero", "a link"])
    file.unlink()
    if label == "a folder":
        file.mkdir()
    elif label == "a named pipe":
        os.mkfifo(file)
    elif label == "a link to itself":
        file.symlink_to(NAME)
    elif label == "a link to /dev/zero":
        file.symlink_to("/dev/zero")
    elif label == "a link":
        (folder / "recipe-2.yaml").write_bytes(content)
        file.symlink_to("recipe-2.yaml")
    return Damage(f"{NAME}: {label}", (NAME,))


RECIPE: Sequence[Family] = (field, field, field, text, text, text, path, pattern, task_name, special)
