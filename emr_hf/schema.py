"""The fields of a merged repo's configuration, checked: types, ranges, references to each other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import PurePosixPath
from typing import Any

import torch
from transformers import PreTrainedConfig

from .election import TAU_DTYPES
from .errors import CheckpointError, RepoError, short
from .fitting import METHODS
from .format import FORMAT_VERSION, flat_name
from .lowbit import BITS
from .report import MergeReport, TaskReport
from .sizes import check_sizes
from .storage import TensorInfo

_PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
_NAME = re.compile(r"\w+(\.\w+)*")
# Names of modules, escaped, as adapters.ia3 joins them; nothing else that a regular expression can say.
_LITERALS = re.compile(r"(?:[\w|-]|\\[^\w\s])*|\(\?!\)")
_MOST_ELEMENTS = 1 << 48


class _Fields:
    """The fields of one object, with its place in the file for messages."""

    def __init__(self, content: object, place: str = ""):
        if not isinstance(content, Mapping):
            raise RepoError(f"{place or 'the configuration'} is {short(content)}: expected an object with fields")
        self.content, self.place = content, place

    def get(self, name: str, expected: str, fits: Callable[[Any], bool], default: Any = ...) -> Any:
        """A field's value.

        Args:
            name: the field's.
            expected: for the message.
            fits: whether a value is one that is expected.
            default (*optional*): of a field that may be left out.

        Raises:
            RepoError: there is no such field, or it has another value.
        """
        if name not in self.content:
            if default is ...:
                raise RepoError(f"{self.path(name)} is missing: expected {expected}")
            return default
        value = self.content[name]
        if not fits(value):
            raise RepoError(f"{self.path(name)} is {short(value)}: expected {expected}")
        return value

    def choose(self, name: str, choices: Sequence[str]) -> None:
        """Check a field that has one of these values, or that is left out."""
        self.get(name, f"one of {', '.join(choices)}", lambda value: value in list(choices), default=None)

    def path(self, name: str) -> str:
        return f"{self.place}.{_in_path(name)}" if self.place else _in_path(name)

    def inside(self, name: str) -> _Fields:
        """The object in a field."""
        return _Fields(self.get(name, "an object with fields", lambda value: True), self.path(name))


def _in_path(name: object) -> str:
    return str(name) if re.fullmatch(r"[\w/.-]{1,80}", str(name)) else short(name)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_ELEMENTS


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and _NAME.fullmatch(name) for name in value)


def check_configuration(content: Mapping[str, Any]) -> None:
    """Raise RepoError unless this can be the configuration of a merged repo.

    Args:
        content: of `config.json`, or of `emr` in `adapter_config.json`, as it was read.
    """
    top = _Fields(content)
    check_version(top.get("emr_format", "the version of the format, a whole number", lambda v: _is_count(v) and v > 0))
    top.get("base_architecture", "the name of a model class", lambda v: isinstance(v, str) and v.isidentifier())
    top.get("base_config", "a model's configuration", _is_model_config)
    top.get("dtype", "a dtype's name", _is_dtype, default=None)
    for name in ("base_model_name_or_path", "base_revision"):
        top.get(name, "text or null", _or_none(_is_text), default=None)
    for name, choices in (("tau_dtype", (*TAU_DTYPES, *BITS)), ("method", METHODS)):
        top.choose(name, choices)
    merged = _check_merged(top)
    tasks = _check_tasks(top, merged)
    top.get("default_task", f"one of {short(list(tasks))}", lambda v: v == "" or v in tasks, default="")
    _check_vectors(top, tasks)
    _check_recipe(top, tasks)
    _check_report(top, tasks)
    largest = 0
    if content.get("tensors") is not None:
        _check_tensors(top.inside("tensors"), merged)
        largest = max((size for shape, _ in content["tensors"].values() for size in shape), default=0)
    if isinstance(content["base_config"], Mapping):
        try:
            check_sizes("base_config", content["base_config"], largest)
        except CheckpointError as error:
            raise RepoError(str(error)) from None


def check_adapter(settings: Mapping[str, Any]) -> None:
    """Raise RepoError unless these can be the settings of a merge that is an adapter, but for the merge itself.

    Args:
        settings: content of `adapter_config.json`.
    """
    top = _Fields(settings)
    top.get("base_model_name_or_path", "the base's Hub id or folder", _is_text)
    top.get("revision", "text or null", _or_none(_is_text), default=None)
    top.inside("emr")


def check_version(version: int) -> None:
    """Raise RepoError for a format that this version of the package does not know yet."""
    if version > FORMAT_VERSION:
        raise RepoError(
            f"emr_format: the repo's format is version {version}, this emr_hf reads up to {FORMAT_VERSION}: upgrade it"
        )


def _is_model_config(value: object) -> bool:
    return isinstance(value, PreTrainedConfig) or (isinstance(value, Mapping) and _is_text(value.get("model_type")))


def _check_merged(top: _Fields) -> list[str]:
    expected = "a list of parameters' names, at least one"
    merged = top.get("merged_parameters", expected, lambda v: _is_names(v) and bool(v))
    _check_different(top.path("merged_parameters"), merged)
    return merged


def _check_different(place: str, names: Collection[str]) -> None:
    """Raise RepoError if a name comes twice, also with dots replaced as in the names of buffers."""
    seen: set[str] = set()
    for name in names:
        if flat_name(name) in seen:
            raise RepoError(f"{place} has {short(name)} twice, or another name that is the same in the files")
        seen.add(flat_name(name))


def _check_tasks(top: _Fields, merged: Collection[str]) -> Mapping[str, Any]:
    tasks = top.inside("tasks")
    if not tasks.content:
        raise RepoError("tasks is empty: expected at least one")
    entries = {task: tasks.inside(task) for task in tasks.content}
    for entry in entries.values():
        _check_task(entry, set(map(flat_name, merged)))
    for name in ("key", "index"):
        values = [entry.content[name] for entry in entries.values()]
        if twice := [task for task, entry in entries.items() if values.count(entry.content[name]) > 1]:
            raise RepoError(
                f"{entries[twice[0]].path(name)} is that of {short(twice[1])} too: expected one of its own"
            )
    return tasks.content


def _check_task(entry: _Fields, merged: Collection[str]) -> None:
    entry.get("key", "t0, t1, ...", lambda v: isinstance(v, str) and re.fullmatch(r"t\d{1,9}", v) is not None)
    entry.get("index", "a whole number", _is_count)
    entry.get("id2label", "an object of label ids to labels", _is_labels)
    entry.get("problem_type", f"one of {_PROBLEM_TYPES}", lambda v: v in _PROBLEM_TYPES, default=None)
    entry.get("source", "text", _is_text)
    entry.get("revision", "text or null", _or_none(_is_text), default=None)
    entry.get("tokenizer", "a folder inside the repo, or null", _or_none(is_inside), default=None)
    entry.get("generation_config", "an object or null", _or_none(lambda v: isinstance(v, Mapping)), default=None)
    private = entry.inside("private")
    _check_different(private.place, private.content)
    for name in private.content:
        if not (isinstance(name, str) and _NAME.fullmatch(name)) or flat_name(name) in merged:
            raise RepoError(f"{private.path(name)}: expected the name of a tensor that is not merged")
        private.get(name, "[shape, dtype]", _is_spec)


def _is_labels(value: object) -> bool:
    if not isinstance(value, Mapping) or any(isinstance(label, (Mapping, list)) for label in value.values()):
        return False
    ids = [str(key) for key in value]
    return all(re.fullmatch(r"\d{1,9}", key) for key in ids) and len(set(map(int, ids))) == len(ids)


def is_inside(value: object) -> bool:
    """Whether a value is the relative path of something inside a folder."""
    if not isinstance(value, str) or not 0 < len(value) < 256 or "\\" in value or "\0" in value or ":" in value:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and ".." not in path.parts and bool(path.parts)


def _is_spec(value: object) -> bool:
    if not (isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], (list, tuple))):
        return False
    shape, dtype = value
    return all(map(_is_count, shape)) and math.prod(shape) < _MOST_ELEMENTS and dtype_named(dtype) is not None


def _is_dtype(value: object) -> bool:
    return value is None or isinstance(value, torch.dtype) or dtype_named(value) is not None


def dtype_named(name: object) -> torch.dtype | None:
    """A dtype by its name, such as `"float32"`; `None` if there is none of that name."""
    found = getattr(torch, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, torch.dtype) else None


def tensor_infos(specs: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Tensors by their `[shape, dtype]`."""
    return {name: TensorInfo(tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in specs.items()}


def _check_tensors(tensors: _Fields, merged: Collection[str]) -> None:
    for name in tensors.content:
        tensors.get(name, "[shape, dtype]", _is_spec)
    for name in merged:
        if name not in tensors.content:
            raise RepoError(f"{tensors.path(name)} is missing: expected the shape and dtype of a merged parameter")


def _check_vectors(top: _Fields, tasks: Mapping[str, Any]) -> None:
    if top.content.get("vectors") is None:
        return
    vectors = top.inside("vectors")
    vectors.get("peft_type", "IA3", lambda v: v == "IA3")
    for name in vectors.content:
        if name not in ("peft_type", "target_modules", "feedforward_modules"):
            raise RepoError(f"{vectors.path(name)}: expected peft_type, target_modules and feedforward_modules only")
    for name in ("target_modules", "feedforward_modules"):
        expected = "names of modules, escaped and joined by |"
        vectors.get(name, expected, lambda v: isinstance(v, str) and _LITERALS.fullmatch(v) is not None)
    for task in tasks:
        entry = top.inside("tasks").inside(task)
        entry.inside("adapter")
        entry.get("vectors", "a list of vectors' names", _is_names)


def _check_recipe(top: _Fields, tasks: Mapping[str, Any]) -> None:
    recipe = top.inside("recipe")
    recipe.get("base", "text", _is_text)
    sources = recipe.inside("tasks")
    for task in tasks:
        sources.get(task, "text", _is_text)
    recipe.get("rescale", "text", _is_text)
    recipe.get("private", "a list of text", _is_texts, default=[])


def _check_report(top: _Fields, tasks: Mapping[str, Any]) -> None:
    report = top.inside("report")
    _check_numbers(report, MergeReport, ("tasks", "tensors", "digests", "warnings"))
    report.get("warnings", "a list of text", _is_texts, default=[])
    numbers = report.inside("tasks")
    for task in tasks:
        _check_numbers(numbers.inside(task), TaskReport, ())


def _check_numbers(content: _Fields, kind: type, others: Collection[str]) -> None:
    """Raise RepoError unless an object has the fields of a report's data class."""
    known = {f.name: f for f in fields(kind) if f.name not in others}
    for name in content.content:
        if name not in known and name not in others:
            raise RepoError(f"{content.path(name)}: expected only {', '.join(known)}")
    fits: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "str": ("text", lambda v: isinstance(v, str)),
        "str | None": ("text or null", _or_none(lambda v: isinstance(v, str))),
        "int": ("a whole number", _is_count),
        "float": ("a number", _is_number),
        "float | None": ("a number or null", _or_none(_is_number)),
        "bool": ("true or false", lambda v: isinstance(v, bool)),
    }
    for name, f in known.items():
        if f.default is MISSING or name in content.content:
            content.get(name, *fits[str(f.type)])
