"""A recipe: what to merge and how, as a validated value and as a YAML file."""

from __future__ import annotations

import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .election import TAU_DTYPES
from .errors import CheckpointError, OptionError, RecipeError, check_choice, nearest, one_line, short
from .fitting import check_method
from .lowbit import BITS
from .patterns import check_pattern
from .regular_file import require_file
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
            raise OptionError(
                f"expected a mapping of tasks to finetunes, with at least one, got {short(self.finetunes)}"
            )
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
                    f"{path}: unknown field {short(name)}.{nearest(name, allowed)} "
                    f"Expected {', '.join(sorted(allowed))}"
                )
        if "tasks" not in content:
            raise RecipeError(f"{path}: the field 'tasks' is missing")
        tasks = content.pop("tasks")
        if not isinstance(tasks, dict):
            raise RecipeError(f"{path}: tasks: expected a mapping of names to finetunes, got {short(tasks)}")
        try:
            base = _reference("base", content.pop("base"), path.parent) if "base" in content else None
            finetunes = {
                task: _reference(f"tasks: {one_line(task)}", value, path.parent) for task, value in tasks.items()
            }
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
        raise OptionError(f"illegal task name {short(task)}: expected printable text without surrounding blanks")
    if task == BASE:
        raise OptionError(f"illegal task name {task!r}: in a mixed batch it stands for the base itself")


def _check_labels(labels: object, tasks: Mapping[str, Any]) -> None:
    if not isinstance(labels, Mapping):
        raise OptionError(f"labels={short(labels)}: expected a mapping of tasks to lists of names")
    for task, names in labels.items():
        check_choice("labels", task, tasks)
        right = isinstance(names, Sequence) and not isinstance(names, str) and all(map(_is_text, names))
        if not right or not names:
            raise OptionError(f"labels: {task}: expected a list of names, got {short(names)}")


def _is_text(value: object) -> bool:
    """True for a text that a file can hold, without halves of characters."""
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode("utf-8")


def _check_align(align: object, base: object) -> None:
    if align is None:
        return
    if not isinstance(align, Mapping):
        raise OptionError(f"align={short(align)}: expected a mapping of {', '.join(ALIGN)}")
    for name in align:
        if name not in ALIGN:
            raise OptionError(f"align: unknown field {short(name)}.{nearest(name, ALIGN)} Expected {', '.join(ALIGN)}")
    if base is not None:
        raise OptionError("align: finetunes of one base lie alike already: leave out the field 'base', or 'align'")


def patterns(private: object, names: Collection[str] = ()) -> tuple[str, ...]:
    """The regular expressions of an option `private`.

    Args:
        private: one, or a list of them.
        names (*optional*): what they are searched in.

    Raises:
        OptionError: something else, or to search one of them in the names would take too long.
    """
    if isinstance(private, str):
        private = [private]
    if not isinstance(private, Sequence) or not all(isinstance(pattern, str) for pattern in private):
        raise OptionError(f"private={short(private)}: expected a regular expression or a list of them")
    for pattern in private:
        check_pattern(pattern, "private", names, search=True)
    return tuple(private)


def _reference(field_name: str, reference: object, folder: Path) -> str | Path:
    if not isinstance(reference, str) or not reference:
        raise OptionError(f"{field_name}: expected a folder or a Hub id, got {short(reference)}")
    expanded = os.path.expandvars(os.path.expanduser(reference))
    local = folder / expanded
    return local if os.path.isdir(local) or expanded.startswith((".", "/", "~", "$")) else expanded


_LARGEST = 1 << 20  # bytes of a recipe: thousands of tasks
_MOST_VALUES = 100_000


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML silently keeps the last, and aliases of aliases without end.

    A few hundred bytes of them stand for more values than any memory holds.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._sizes: dict[int, int] = {}  # of each node, by its id: how many values it stands for

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias stands inside what it stands for", None)
        if node is not None and not is_alias:
            self._sizes[id(node)] = size = 1 + sum(self._sizes[id(inner)] for inner in _inner_nodes(node))
            if size > _MOST_VALUES:
                problem = f"more than {_MOST_VALUES:,} values, aliases written out"
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        str(value).encode()  # half a character is an error here, as no file can be written with it
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{short(key)} is given twice", node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _inner_nodes(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        require_file(path, "recipe")
        if (size := path.stat().st_size) > _LARGEST:
            raise RecipeError(f"{path} has {size:,} bytes: expected a recipe, of at most {_LARGEST:,}")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except RecipeError:
        raise
    except CheckpointError as error:
        raise RecipeError(f"cannot read the {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {one_line(error)}") from None
    except RecursionError:
        raise RecipeError(f"{path} is nested too deeply") from None
    except Exception as error:  # beside its own, PyYAML lets those of a date or a number through
        raise RecipeError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected a mapping with the fields base and tasks, got {type(content).__name__}")
    return content
