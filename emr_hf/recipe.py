"""A recipe: what to merge and how, as a validated value and as a YAML file."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .election import TAU_DTYPES
from .errors import OptionError, RecipeError, check_choice, nearest
from .fitting import check_method
from .lowbit import BITS
from .repo import parse_size
from .sources import Reference

BASE = "__base__"
"""Where a task is asked for: none, but the base's merged weights, with the head and the labels of the default task."""

ALIGN = ("weight", "method", "sites", "seed", "data")


@dataclass(frozen=True)
class Recipe:
    """What to merge and how.

    Args:
        base: the pretrained model: a folder, a Hub id (`me/repo@revision`) or a loaded model; `None` to take the one
            that the adapters name, or for full checkpoints that share none, such as aligned models, a stand-in: of two
            the first, of more their median, with BatchNorm the first.
        finetunes: task -> finetune, each as `base`, or a PEFT adapter. In YAML the field is called `tasks`.
        method (*optional*, defaults to `"emr"`): how vector and masks come about, see docs/methods.md: `"emr"`, the
            paper's election; `"fit"`, the vector and masks of least squared error; `"levels"`, two values for each
            weight, of which the nearer to the base takes the base's place in the repo.
        rescale (*optional*): `"global"` (the paper's, and the default of `"emr"` and `"fit"`), `"tensor_mean"`,
            `"least_squares"` or `"none"`, which is all that `"levels"` has.
        tau_dtype (*optional*, defaults to `"float32"`): what the unified vector is stored in: `"bfloat16"` and
            `"float16"` halve it, `"int8"`, `"int4"` and `"int2"` take so many bits an element and a scale for each
            row. The report says what they cost.
        default_task (*optional*): active after loading; the first one by default.
        private (*optional*): regular expressions; parameters they match are not merged but kept for each task.
        max_shard_size (*optional*, defaults to `"5GB"`): of one file of the repo.
        labels (*optional*): task -> names of its labels, in order, where the finetune does not tell,
            as an adapter does not.
        align (*optional*): align the finetunes, which share no initialisation, to the first before they are merged:
            a mapping of any of `weight`, `method`, `sites` and `seed`, see [`align`], and `data`, a safetensors file
            of the model's arguments by name, unlabelled. All models are in memory then.

    Raises:
        OptionError: the field that is wrong, what was expected and what came.
    """

    base: Reference | None
    finetunes: Mapping[str, Reference]
    rescale: str | None = None
    tau_dtype: str = "float32"
    default_task: str | None = None
    private: str | Sequence[str] = ()
    max_shard_size: str | int = "5GB"
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    align: Mapping[str, Any] | None = None
    method: str = "emr"

    def __post_init__(self) -> None:
        if not isinstance(self.finetunes, Mapping) or not self.finetunes:
            raise OptionError(f"expected a mapping of tasks to finetunes, with at least one, got {self.finetunes!r}")
        for task in self.finetunes:
            _check_task_name(task)
        object.__setattr__(self, "rescale", check_method(self.method, self.rescale))
        check_choice("tau_dtype", self.tau_dtype, [*TAU_DTYPES, *BITS])
        if self.default_task is not None:
            check_choice("default_task", self.default_task, self.finetunes)
        object.__setattr__(self, "private", patterns(self.private))
        parse_size(self.max_shard_size)
        _check_labels(self.labels, self.finetunes)
        _check_align(self.align, self.base)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML recipe.

        Relative paths are relative to the recipe's folder; `~` and environment variables are expanded. What is no
        folder there is taken for a Hub id, unless it starts with `.`, `/` or `~`.

        Raises:
            RecipeError: the file cannot be read, or a field is missing, unknown, doubled or wrong.
        """
        path = Path(path)
        content = _read_yaml(path)
        allowed = {"tasks" if f.name == "finetunes" else f.name for f in fields(cls)}
        for name in content:
            if name not in allowed:
                raise RecipeError(
                    f"{path}: unknown field {name!r}.{nearest(name, allowed)} Expected {', '.join(sorted(allowed))}"
                )
        if "tasks" not in content:
            raise RecipeError(f"{path}: the field 'tasks' is missing")
        tasks = content.pop("tasks")
        if not isinstance(tasks, dict):
            raise RecipeError(f"{path}: tasks: expected a mapping of names to finetunes, got {tasks!r}")
        try:
            base = _reference("base", content.pop("base"), path.parent) if "base" in content else None
            finetunes = {task: _reference(f"tasks: {task}", value, path.parent) for task, value in tasks.items()}
            if isinstance(align := content.get("align"), dict) and isinstance(align.get("data"), str):
                align["data"] = path.parent / os.path.expandvars(os.path.expanduser(align["data"]))
            return cls(base, finetunes, **content)
        except (OptionError, TypeError) as error:
            raise RecipeError(f"{path}: {error}") from None

    def published(self, base: str, tasks: Mapping[str, str]) -> dict[str, Any]:
        """The recipe as a file's content, under names that may be published in place of local paths and models.

        Args:
            base: name of the base.
            tasks: task -> name of its finetune.
        """
        content: dict[str, Any] = {"base": base, "tasks": dict(tasks), "rescale": self.rescale, "method": self.method}
        for name in ("tau_dtype", "default_task", "private"):
            if value := getattr(self, name):
                content[name] = list(value) if name == "private" else value
        if self.align is not None:
            content["align"] = {name: value for name, value in self.align.items() if name != "data"}
        if self.labels:
            content["labels"] = {task: list(names) for task, names in self.labels.items()}
        return content


def _check_task_name(task: object) -> None:
    if not isinstance(task, str) or not task or task != task.strip() or not task.isprintable():
        raise OptionError(f"illegal task name {task!r}: expected printable text without surrounding blanks")
    if task == BASE:
        raise OptionError(f"illegal task name {task!r}: in a mixed batch it stands for the base itself")


def _check_labels(labels: object, tasks: Mapping[str, Any]) -> None:
    if not isinstance(labels, Mapping):
        raise OptionError(f"labels={labels!r}: expected a mapping of tasks to lists of names")
    for task, names in labels.items():
        check_choice("labels", task, tasks)
        right = isinstance(names, Sequence) and not isinstance(names, str) and all(isinstance(n, str) for n in names)
        if not right or not names:
            raise OptionError(f"labels: {task}: expected a list of names, got {names!r}")


def _check_align(align: object, base: object) -> None:
    if align is None:
        return
    if not isinstance(align, Mapping):
        raise OptionError(f"align={align!r}: expected a mapping of {', '.join(ALIGN)}")
    for name in align:
        if name not in ALIGN:
            raise OptionError(f"align: unknown field {name!r}.{nearest(name, ALIGN)} Expected {', '.join(ALIGN)}")
    if base is not None:
        raise OptionError("align: finetunes of one base lie alike already: leave out the field 'base', or 'align'")


def patterns(private: object) -> tuple[str, ...]:
    """The regular expressions of an option `private`.

    Raises:
        OptionError: it is none, nor a list of them.
    """
    if isinstance(private, str):
        private = [private]
    if not isinstance(private, Sequence) or not all(isinstance(pattern, str) for pattern in private):
        raise OptionError(f"private={private!r}: expected a regular expression or a list of them")
    for pattern in private:
        try:
            re.compile(pattern)
        except re.error as error:
            raise OptionError(f"private: {pattern!r} is not a regular expression: {error}") from None
    return tuple(private)


def _reference(field_name: str, reference: object, folder: Path) -> str | Path:
    if not isinstance(reference, str) or not reference:
        raise OptionError(f"{field_name}: expected a folder or a Hub id, got {reference!r}")
    expanded = os.path.expandvars(os.path.expanduser(reference))
    local = folder / expanded
    return local if local.is_dir() or expanded.startswith((".", "/", "~", "$")) else expanded


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a mapping with the fields base and tasks, got {type(content).__name__}")
    return content
