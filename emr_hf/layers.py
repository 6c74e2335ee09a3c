"""A report's numbers by tensor, put together by kind of layer and by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .report import TensorNumbers, Tensors

_NORM = re.compile(r"norm|(^|[._])(ln|bn)(\d|_|\.|$)", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|(^|[._])(wte|wpe)([._]|$)", re.IGNORECASE)
BIASES, NORMS, EMBEDDINGS, OTHERS = "biases", "norms", "embeddings", "others"


@dataclass
class GroupNumbers:
    """One task's numbers over several tensors.

    Attributes:
        relative_error: ||tau_t - lambda M tau|| / ||tau_t|| over all of them; 0 for a task vector of zeros.
        sign_conflict: share of the moved elements whose direction lost the election.
    """

    relative_error: float
    sign_conflict: float

    @classmethod
    def of(cls, parts: Iterable[TensorNumbers]) -> GroupNumbers:
        parts = list(parts)
        square = math.fsum(part.length**2 for part in parts)
        error = math.fsum((part.relative_error * part.length) ** 2 for part in parts)
        moved = math.fsum(part.moved for part in parts)
        lost = math.fsum(part.sign_conflict * part.moved for part in parts)
        return cls(math.sqrt(error / square) if square else 0.0, lost / moved if moved else 0.0)


def kind_of(name: str) -> str:
    """Kind of layer that a tensor belongs to: its name without numbers, or what stands for all biases or norms."""
    module, _, last = name.rpartition(".")
    if last.endswith("bias"):
        return BIASES
    if _NORM.search(module.rpartition(".")[2]):
        return NORMS
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def by_kind(tensors: Tensors, most: int = 12) -> dict[str, list[str]]:
    """Kind of layer -> its tensors, in the model's order.

    Args:
        tensors: the report's.
        most: kinds to tell apart; where there are more, the smallest ones are `"others"`.
    """
    kinds: dict[str, list[str]] = {}
    for name in tensors:
        kinds.setdefault(kind_of(name), []).append(name)
    if len(kinds) > most:
        size = {kind: sum(tensors[name]["elements"] for name in names) for kind, names in kinds.items()}
        small = sorted(kinds, key=lambda kind: (kind in (BIASES, NORMS), size[kind]))[: len(kinds) - most + 1]
        others = [name for kind, names in kinds.items() if kind in small for name in names]
        kinds = {kind: names for kind, names in kinds.items() if kind not in small}
        kinds[OTHERS] = others
    last = [kind for kind in (NORMS, BIASES, OTHERS) if kind in kinds]
    return {kind: kinds[kind] for kind in [*(kind for kind in kinds if kind not in last), *last]}


def by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Layer -> its tensors: embeddings, then each stack of numbered layers in the model's order, then the others.

    A layer is all that has the same name up to the first number. It is called `layer 3` in a model with one stack;
    with several, by what tells them apart: `encoder 3`, `decoder 3`.
    """
    stacks: dict[str, dict[int, list[str]]] = {}
    embeddings: list[str] = []
    others: list[str] = []
    for name in names:
        parts = name.split(".")
        place = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
        if place is not None:
            stacks.setdefault(".".join(parts[:place]), {}).setdefault(int(parts[place]), []).append(name)
        else:
            (embeddings if _EMBEDDING.search(name) else others).append(name)
    layers = {EMBEDDINGS: embeddings}
    for stack, title in zip(stacks, _titles(list(stacks))):
        for number in sorted(stacks[stack]):
            layers[f"{title} {number}".strip()] = stacks[stack][number]
    layers[OTHERS] = others
    return {layer: found for layer, found in layers.items() if found}


def _titles(stacks: Sequence[str]) -> list[str]:
    """What tells stacks of layers apart: their paths without the beginning and the end that all have."""
    if len(stacks) == 1:
        return ["layer"]
    paths = [stack.split(".") for stack in stacks]
    for step in (slice(1, None), slice(None, -1)):
        end = 0 if step.start else -1
        while all(len(path) > 1 for path in paths) and len({path[end] for path in paths}) == 1:
            paths = [path[step] for path in paths]
    return [".".join(path) for path in paths]


def grid(
    tensors: Tensors, groups: Mapping[str, Sequence[str]], tasks: Sequence[str], value: Callable[[GroupNumbers], float]
) -> list[list[float | None]]:
    """A row for each group, a column for each task; `None` where nothing is known of the task there."""
    rows = []
    for names in groups.values():
        row: list[float | None] = []
        for task in tasks:
            known = (tensors[name]["tasks"].get(task) for name in names)
            parts = [TensorNumbers(*values) for values in known if values is not None]
            row.append(value(GroupNumbers.of(parts)) if parts else None)
        rows.append(row)
    return rows


@dataclass
class Worst:
    """A merged tensor of which a task keeps least.

    Attributes:
        tensor: its name.
        relative_error: of the task in it.
        share: of the task vector's squared length that the tensor has.
    """

    tensor: str
    relative_error: float
    share: float


def worst_tensors(tensors: Tensors, tasks: Sequence[str]) -> dict[str, Worst]:
    """Task -> its tensor of the highest relative error.

    What counts are tensors with at least half of the mean share of the task vector's squared length: the highest of
    all would nearly always be some bias's, of which little depends.
    """
    found = {}
    for task in tasks:
        known = ((name, entry["tasks"].get(task)) for name, entry in tensors.items())
        own = {name: TensorNumbers(*values) for name, values in known if values is not None}
        if not own:
            continue
        square = math.fsum(numbers.length**2 for numbers in own.values())
        heavy = [name for name, numbers in own.items() if 2 * len(own) * numbers.length**2 >= square]
        name = max(heavy, key=lambda name: own[name].relative_error)
        found[task] = Worst(name, own[name].relative_error, own[name].length ** 2 / square if square else 0.0)
    return found
