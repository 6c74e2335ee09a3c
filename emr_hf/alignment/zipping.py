"""Merge units many to one, also two of the same model: ZipIt (arXiv 2305.03053) with MuDSC's similarity.

Where a permutation pairs each unit of one model with one of the other, this joins whichever units are most alike. The
merged unit is the mean of its members and stands for each of them in what consumes it, as in a model where all of
them compute the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import OptionError
from .aligning import align
from .averaging import check_data, estimate_statistics, with_own
from .layout import Layout, Permutation, Symmetries
from .similarity import STATISTICS, activation_similarity, combine, comparable, weighed, weight_similarity
from .symmetry import Example, stored_tensors

Labels = Mapping[str, Tensor]


def zippable(spec: Symmetries) -> tuple[str, ...]:
    """The groups whose units may be merged many to one.

    These have no parent and no children, are the whole of each axis they lie along, one axis in a tensor, are produced
    by a layer and consumed by a layer, and pass no norm over the units on the way. A norm shows by its scale: a vector
    whose module has no matrix with the group and no running statistics. A norm without scale is not seen.
    """
    return tuple(name for name in spec.children(None) if not spec.children(name) and _sound(spec, name))


def _sound(spec: Symmetries, group: str) -> bool:
    whole = ((group,),)
    carrying = {name: layout for name, layout in spec.tensors.items() if _has(layout, group)}
    places = {name: [dim for dim, axis in enumerate(layout) if axis == whole] for name, layout in carrying.items()}
    if any(len(dims) != 1 or _axes_with(carrying[name], group) != 1 for name, dims in places.items()):
        return False
    consumed = {name for name, (dim,) in places.items() if dim in spec.contracted.get(name, ())}
    matrices = {name for name in carrying if len(carrying[name]) > 1} - consumed
    known = {_module(name) for name in matrices}
    known |= {_module(name) for name in carrying if name.rpartition(".")[2] in STATISTICS}
    return bool(consumed and matrices) and all(_module(name) in known for name in carrying.keys() - consumed)


def _has(layout: Layout, group: str) -> bool:
    return _axes_with(layout, group) > 0


def _axes_with(layout: Layout, group: str) -> int:
    return sum(any(group in segment for segment in axis) for axis in layout)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def zip_similarities(
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    spec: Symmetries,
    permutation: Permutation,
    activation: Mapping[str, Tensor] | None = None,
    weight: float = 0.5,
    *,
    skip: Collection[str] = (),
) -> dict[str, Tensor]:
    """Similarities of all units of both models, for each group that can be merged many to one.

    Args:
        state_a, state_b: the models' tensors by name, each in its own order.
        spec: the groups and how they lie along the tensors' axes.
        permutation: a matching of the second model's units, see [`~matching.match`].
        activation (*optional*): for each group a (2n, 2n) matrix, see `within` of
            [`~similarity.activation_similarity`].
        weight (`float`, *optional*, defaults to 0.5): the share of the weights' similarity.
        skip: names of tensors that do not count.

    Returns:
        `dict[str, Tensor]`: for each group (2n, 2n), the first model's units and then the second's, permuted.
    """
    names = comparable(state_a, state_b, spec, skip)
    state_a = {name: state_a[name] for name in names}
    aligned = spec.permute({name: state_b[name] for name in state_a}, permutation)
    weights, activations = {}, {}
    for group in zippable(spec):
        if weighed(state_a, aligned, spec, group):
            weights[group] = weight_similarity(state_a, aligned, spec, group, within=True)
        if activation is not None and group in activation:
            size = spec.groups[group].size
            order = torch.cat([torch.arange(size), permutation[group] + size])
            activations[group] = activation[group].cpu()[order][:, order]
    return combine(weights, activations, weight if activation is not None else 1.0)


def zip_models(
    model_a: nn.Module,
    model_b: nn.Module,
    *,
    data: Iterable[Any] | None = None,
    weight: float = 0.5,
    private: str | Sequence[str] = (),
    example: Example | None = None,
    seed: int = 0,
) -> tuple[nn.Module, nn.Module]:
    """Align two models and merge them into one, units many to one where that is sound (MuDSC's zip).

    Args:
        model_a, model_b, data, weight, private, example, seed: as for [`~aligning.align`].

    Returns:
        two new models, alike but for the private tensors: each has its own, such as its task's head, fitted to the
        merged units. They share all other tensors in memory. BatchNorm is estimated anew on the data.
    """
    check_data(data)
    batches = list(data) if data is not None else None
    plan = align(model_a, model_b, data=batches, weight=weight, example=example, private=private, seed=seed)
    found, permutation = plan.symmetries, plan.permutations[1]
    within = activation_similarity(model_a, model_b, found, batches, within=True) if batches is not None else None
    state_a, state_b = (
        {name: tensor.detach() for name, tensor in stored_tensors(model).items()} for model in (model_a, model_b)
    )
    similarities = zip_similarities(state_a, state_b, found, permutation, within, plan.weight, skip=plan.private)
    zipped = zip_state(state_a, found.permute(state_b, permutation), found, similarities, private=plan.private)
    copies = [deepcopy(model_a), deepcopy(model_b)]
    with torch.no_grad():
        for copy, state in zip(copies, zipped):
            for name, tensor in stored_tensors(copy).items():
                if name in state:
                    tensor.copy_(state[name])
    if batches is not None:
        estimate_statistics(copies[0], batches)
    return copies[0], with_own(copies[0], copies[1], zipped[0].keys() - plan.private)


def clusters(similarity: Tensor, count: int) -> Tensor:
    """Join the two most similar clusters until `count` remain.

    The similarity of two clusters is the mean over the pairs of their units (average linkage). ZipIt averages without
    regard to the clusters' sizes and can limit merges within a model; this does neither.

    Args:
        similarity: symmetric, of shape (units, units).
        count: how many clusters.

    Returns:
        `Tensor`: the cluster of each unit, int64 of shape (units,), numbered by the cluster's first unit.

    Example:
        >>> clusters(torch.tensor([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]]), 2)
        tensor([0, 1, 0])
    """
    scores = similarity.double().cpu().numpy().copy()
    np.fill_diagonal(scores, -np.inf)
    label, sizes = np.arange(len(scores)), np.ones(len(scores))
    nearest, best = scores.argmax(1), scores.max(1)
    for _ in range(len(scores) - count):
        kept = int(best.argmax())
        kept, gone = sorted((kept, int(nearest[kept])))
        joined = (sizes[kept] * scores[kept] + sizes[gone] * scores[gone]) / (sizes[kept] + sizes[gone])
        joined[[kept, gone]] = -np.inf
        scores[kept], scores[:, kept], scores[gone], scores[:, gone] = joined, joined, -np.inf, -np.inf
        sizes[kept] += sizes[gone]
        label[label == gone] = kept
        # Rows whose nearest was one of the two, and the cluster's own, look again; to others it may have come nearer.
        stale = np.flatnonzero((nearest == kept) | (nearest == gone) | (np.arange(len(label)) == kept))
        nearest[stale], best[stale] = scores[stale].argmax(1), scores[stale].max(1)
        best[gone] = -np.inf
        nearer = joined > best
        nearest[nearer], best[nearer] = kept, joined[nearer]
    return torch.from_numpy(np.unique(label, return_inverse=True)[1].astype(np.int64))


def zip_state(
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    spec: Symmetries,
    similarities: Mapping[str, Tensor],
    *,
    private: Collection[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Merge two models into one, units of the given groups many to one, the rest by averaging.

    A row that produces a merged unit is the mean of its members' rows. A column that consumes it is, for each model,
    the sum of its members' columns, and then the mean of the two models: the merged layer computes the mean of what
    both compute from merged units.

    Args:
        state_a, state_b: the models' tensors by name. The second's units stand in the order of the first's, see
            [`~matching.match`]. A tensor that only one of them has is left out.
        spec: the groups and how they lie along the tensors' axes.
        similarities: for each group that is to be merged, all [`zippable`], see [`zip_similarities`].
        private (*optional*): names of tensors that stay each model's own and only consume merged units, as heads do.

    Returns:
        the merged model twice, with each model's private tensors, in the first's dtypes. Integer tensors are the
        first's.
    """
    allowed = zippable(spec)
    for group in similarities:
        if group not in allowed:
            raise OptionError(f"{group} cannot be merged many to one; those that can: {', '.join(allowed) or 'none'}")
    labels = {group: clusters(matrix, spec.groups[group].size) for group, matrix in similarities.items()}
    shared, owns = {}, ({}, {})  # type: tuple[dict[str, Tensor], tuple[dict[str, Tensor], dict[str, Tensor]]]
    for name in state_a.keys() & state_b.keys():
        merged = [
            _consuming(state[name], spec.tensors.get(name, ()), spec.contracted.get(name, ()), labels, model)
            for model, state in enumerate((state_a, state_b))
        ]
        if name in private:
            owns[0][name], owns[1][name] = (tensor.to(state_a[name].dtype) for tensor in merged)
        else:
            shared[name] = _producing(state_a[name], merged, spec, name, labels)
    return {**shared, **owns[0]}, {**shared, **owns[1]}


def _consuming(
    tensor: Tensor, layout: Layout, contracted: Collection[int], labels: Mapping[str, Tensor], model: int
) -> Tensor:
    """A model's tensor with the columns that consume merged units summed over each unit's members."""
    if not tensor.is_floating_point():
        return tensor.clone()
    summed = tensor.float()
    for dim, axis in enumerate(layout):
        group = axis[0][0] if axis and axis[0] else None
        if group in labels and dim in contracted:
            label = labels[str(group)].chunk(2)[model].to(tensor.device)
            summed = torch.zeros_like(summed).index_add_(dim, label, summed)
    return summed


def _producing(like: Tensor, models: Sequence[Tensor], spec: Symmetries, name: str, labels: Labels) -> Tensor:
    """A tensor of both models averaged, the rows of a merged unit over all its members."""
    if not like.is_floating_point():
        return like.clone()
    a, b = models[0], models[1].to(like.device)
    for dim, axis in enumerate(spec.tensors.get(name, ())):
        group = axis[0][0] if axis and axis[0] else None
        if group in labels and dim not in spec.contracted.get(name, ()):
            label = labels[str(group)].to(like.device)
            total = torch.zeros_like(a).index_add_(dim, label, torch.cat([a, b], dim))
            members = label.bincount(minlength=a.shape[dim])
            return (total / members.view([-1] + [1] * (total.dim() - dim - 1))).to(like.dtype)
    return ((a + b) / 2).to(like.dtype)
