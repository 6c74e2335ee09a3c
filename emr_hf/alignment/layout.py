"""How a model's units lie along the axes of its tensors, and what putting them in another order does to the tensors.

A *group* is a set of units that may be put in any order without changing what the model computes: the channels of a
residual stream, the neurons of an MLP, the heads of an attention layer. The units of a group with a *parent* lie
within each unit of the parent, as dimensions lie within a head, and may be in another order in each.

An *axis* of a tensor is a concatenation of *segments*, a segment a product, in row-major order, of groups and of plain
sizes, which stay as they are. Printed, `[heads*dims + heads*dims, residual]` is a matrix of two stacked projections.

A *permutation* is, for each group, an int64 tensor of shape `(*sizes of the ancestors, size)`, the outermost ancestor
first: unit `i` of the result is unit `permutation[group][..., i]` of the model, where `...` is the place of the
ancestors in the result, and the unit is counted within the ancestors that came to that place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Segment = tuple[str | int, ...]
Axis = tuple[Segment, ...]
Layout = tuple[Axis, ...]
Permutation = dict[str, Tensor]


@dataclass(frozen=True)
class Group:
    """Units that may be put in any order.

    Attributes:
        name: readable, unique.
        size: how many units there are, within each unit of the parent if there is one.
        parent: the group within whose units these lie, by name.
    """

    name: str
    size: int
    parent: str | None = None


@dataclass(frozen=True)
class Site:
    """A place where activations can be read: an input or output of a module.

    Attributes:
        module: the module's name.
        kind: `"input"` or `"output"`.
        position: which of the positional inputs, or of the outputs where they are a tuple.
        layout: that of the activation. The axes of batch, sequence and space are plain sizes, those of the example.
    """

    module: str
    kind: str
    position: int
    layout: Layout


@dataclass(frozen=True)
class Symmetries:
    """The orders of units that a model's function does not depend on.

    Attributes:
        groups: by name; a parent stands before its children.
        tensors: name of each parameter and buffer -> its layout. A name of a tied tensor has the same layout as the
            tensor it is tied to.
        contracted: name -> the axes that some operation sums over (a linear layer's inputs). All others are kept.
        sites: where activations can be read that have a group along an axis.
        frozen: name -> why an axis of this tensor has to stay in its order, for those that one may expect to be free.
    """

    groups: dict[str, Group]
    tensors: dict[str, Layout]
    contracted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()
    frozen: dict[str, str] = field(default_factory=dict)

    def chain(self, group: str) -> tuple[str, ...]:
        """The group's ancestors, outermost first, and the group."""
        parent = self.groups[group].parent
        return (*(self.chain(parent) if parent else ()), group)

    def children(self, group: str | None) -> tuple[str, ...]:
        """The groups whose parent is this one; of `None`, those without parent."""
        return tuple(name for name, other in self.groups.items() if other.parent == group)

    def shape(self, group: str) -> tuple[int, ...]:
        """Shape of the group's entry in a permutation."""
        return tuple(self.groups[name].size for name in self.chain(group))

    def identity(self) -> Permutation:
        """The permutation that leaves all as it is."""
        return {
            name: torch.arange(group.size).expand(self.shape(name)).contiguous() for name, group in self.groups.items()
        }

    def random(self, generator: torch.Generator | None = None) -> Permutation:
        """A permutation drawn uniformly."""
        return {name: torch.rand(self.shape(name), generator=generator).argsort(-1) for name in self.groups}

    def compose(self, first: Permutation, then: Permutation) -> Permutation:
        """The permutation that does the work of two, one applied to the result of the other."""
        composed = {}
        for name in self.groups:
            *ancestors, _ = self.chain(name)
            places = [index for index, _ in self._sources(ancestors, then)]
            composed[name] = first[name][tuple(places)].expand(self.shape(name)).gather(-1, then[name])
        return composed

    def permute(self, tensors: Mapping[str, Tensor], permutation: Permutation) -> dict[str, Tensor]:
        """The tensors of the same model with its units in another order.

        Args:
            tensors: by name; those without a layout are passed through.
            permutation: for each group, see above.
        """
        return {
            name: self.permute_tensor(tensor, self.tensors[name], permutation) if name in self.tensors else tensor
            for name, tensor in tensors.items()
        }

    def permute_tensor(self, tensor: Tensor, layout: Layout, permutation: Permutation) -> Tensor:
        """One tensor of this layout with its units in another order."""
        for dim, axis in enumerate(layout):
            if any(isinstance(factor, str) for segment in axis for factor in segment):
                tensor = tensor.index_select(dim, self._source(axis, permutation).to(tensor.device))
        return tensor

    def _source(self, axis: Axis, permutation: Permutation) -> Tensor:
        """For each place along the axis, where what comes there is taken from."""
        parts, start = [], 0
        for segment in axis:
            source = torch.zeros((), dtype=torch.int64)
            for index, size in self._sources(segment, permutation):
                source = source * size + index
            parts.append(source.reshape(-1) + start)
            start += source.numel()
        return torch.cat(parts)

    def _sources(self, segment: Iterable[str | int], permutation: Permutation) -> Iterator[tuple[Tensor, int]]:
        """For each factor the index of what comes to each place, broadcast over the segment, and its size."""
        factors = tuple(segment)
        for place, factor in enumerate(factors):
            shape = [1] * len(factors)
            if isinstance(factor, int):
                shape[place] = factor
                yield torch.arange(factor).view(shape), factor
                continue
            for name, size in zip(self.chain(factor), self.shape(factor)):
                shape[factors.index(name)] = size
            yield permutation[factor].reshape(shape), self.groups[factor].size

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups"]
        for name, group in self.groups.items():
            within = f" within each of {group.parent}" if group.parent else ""
            lines.append(f"  {name}: {group.size}{within}")
        lines.append(f"{len(self.tensors)} tensors")
        for name, layout in self.tensors.items():
            reason = f"  # {self.frozen[name]}" if name in self.frozen else ""
            lines.append(f"  {name} {described(layout)}{reason}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Symmetries:
        """Read what [`save`] wrote."""
        stored: dict[str, Any] = json.loads(Path(path).read_text())
        return cls(
            groups={name: Group(**group) for name, group in stored["groups"].items()},
            tensors={name: _layout(layout) for name, layout in stored["tensors"].items()},
            contracted={name: tuple(axes) for name, axes in stored["contracted"].items()},
            sites=tuple(Site(**{**site, "layout": _layout(site["layout"])}) for site in stored["sites"]),
            frozen=stored["frozen"],
        )


def described(layout: Layout) -> str:
    """A layout as people read it: `[heads*dims, residual]`."""
    axes = (" + ".join("*".join(map(str, segment)) for segment in axis) for axis in layout)
    return f"[{', '.join(axes)}]"


def _layout(stored: list[list[list[str | int]]]) -> Layout:
    return tuple(tuple(tuple(segment) for segment in axis) for axis in stored)
