"""Which unit of one model plays the part of which unit of another: assignments, nested ones, and sweeps over groups.

[`match`] is MuDSC's alternation (arXiv 2403.01753): start from the matching of the activations, then solve one group
after the other for the similarity of activations and weights, with the weights of all other groups in the order found
so far. With activations alone it is the permutation variant of ZipIt (arXiv 2305.03053), with the inner product of
weights alone it is git re-basin (arXiv 2209.04836).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError, OptionError, short
from .layout import Permutation, Symmetries
from .similarity import combine, comparable, matched_similarity, weighed, weight_similarity

TIE = 1e-9  # a gain below this share is rounding
Similarities = Mapping[str, Tensor]


@dataclass(frozen=True)
class Matching:
    """The orders in which several models' units lie alike.

    Attributes:
        permutations: one for each model; that of the first is the identity.
        objective: the best value at the start and after each sweep, so it never falls. The mean similarity of matched
            units, or for `measure="inner"` the cosine of all weights that count.
        sweeps: how many there were.
    """

    permutations: tuple[Permutation, ...]
    objective: tuple[float, ...]
    sweeps: int

    @property
    def permutation(self) -> Permutation:
        """That of the last model, the second of two."""
        return self.permutations[-1]


# ---- one group, or one tree of groups


def assign(similarity: Tensor) -> Tensor:
    """The permutation `p` that maximises the sum of `similarity[i, p[i]]`, int64 of shape (n,)."""
    return torch.from_numpy(_assign(similarity.double().cpu().numpy()))


def check_scipy() -> None:
    """Raise OptionError where there is no SciPy."""
    if find_spec("scipy") is None or find_spec("scipy.optimize") is None:
        raise OptionError("alignment needs SciPy: pip install 'emr_hf[align]'")


def _assign(similarity: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    check_scipy()
    from scipy.optimize import linear_sum_assignment

    if similarity.shape[0] != similarity.shape[1] or not np.isfinite(similarity).all():
        raise OptionError(f"similarity of shape {similarity.shape}: expected a square matrix of finite numbers")
    return linear_sum_assignment(similarity, maximize=True)[1].astype(np.int64)


def match_tree(spec: Symmetries, root: str, similarities: Similarities) -> tuple[Permutation, float]:
    """The best permutation of a group without parent and of all its descendants together.

    For each pair of units of a parent the children are assigned on their own; the pair's score is its own similarity
    plus that of the children so matched, and decides the parent's assignment. The result is optimal.

    Args:
        spec: the groups.
        root: name of the group.
        similarities: for each group of the tree a matrix over its units, ancestors first. A group may be left out;
            its units then count only by those within.

    Returns:
        `tuple[Permutation, float]`: the entries of `root` and of its descendants, and the mean similarity of all units
        that have one.
    """
    blocks = {}
    for name in tree(spec, root):
        if name in similarities:
            outer, size = math.prod(spec.shape(name)[:-1]), spec.groups[name].size
            # (ancestors of A, unit of A, ancestors of B, unit of B)
            blocks[name] = similarities[name].double().cpu().numpy().reshape(outer, size, outer, size)
    total, orders = _solve(spec, root, blocks, 0, 0)
    units = sum(math.prod(spec.shape(name)) for name in blocks)
    return {name: torch.from_numpy(order) for name, order in orders.items()}, total / max(units, 1)


Blocks = dict[str, np.ndarray[Any, Any]]


def _solve(spec: Symmetries, group: str, blocks: Blocks, a: int, b: int) -> tuple[float, Blocks]:
    """Assign the units within one pair of ancestors: the summed similarity, and each group's order."""
    size, children = spec.groups[group].size, spec.children(group)
    score = blocks[group][a, :, b, :] if group in blocks else np.zeros((size, size))
    within: dict[tuple[int, int], Blocks] = {}
    if children:
        score = score.copy()
        for i, j in itertools.product(range(size), repeat=2):
            within[i, j] = {}
            for child in children:
                total, orders = _solve(spec, child, blocks, a * size + i, b * size + j)
                score[i, j] += total
                within[i, j].update(orders)
    order = _assign(score)
    found = {group: order}
    for name in within.get((0, 0), ()):
        found[name] = np.stack([within[i, j][name] for i, j in enumerate(order)])
    return float(score[np.arange(size), order].sum()), found


def tree(spec: Symmetries, root: str) -> tuple[str, ...]:
    """A group and its descendants."""
    return tuple(name for name in spec.groups if root in spec.chain(name))


# ---- whole models


def match(
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    spec: Symmetries,
    activation: Similarities | None = None,
    weight: float = 0.5,
    *,
    measure: str = "pearson",
    skip: Collection[str] = (),
    seed: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
) -> Matching:
    """Order the units of one model as those of another.

    Args:
        state_a, state_b: the models' tensors by name; the second's units are put in order.
        spec: the groups and how they lie along the tensors' axes.
        activation (*optional*): similarity of each group's units in what they compute, see
            [`~similarity.activation_similarity`]. Without it the weights alone decide.
        weight (`float`, *optional*, defaults to 0.5): the share of the weights' similarity; the rest is the
            activations'. A group that has only one of the two goes by that.
        measure, skip, seed, max_sweeps, patience: see [`match_all`].

    Returns:
        [`Matching`]: `spec.permute(state_b, matching.permutation)` has its units in the order of `state_a`.
    """
    activations = None if activation is None else {(0, 1): activation}
    return match_all(
        [state_a, state_b],
        spec,
        activations,
        weight,
        measure=measure,
        skip=skip,
        seed=seed,
        max_sweeps=max_sweeps,
        patience=patience,
    )


def match_all(
    states: Sequence[Mapping[str, Tensor]],
    spec: Symmetries,
    activations: Mapping[tuple[int, int], Similarities] | None = None,
    weight: float = 0.5,
    *,
    measure: str = "pearson",
    skip: Collection[str] = (),
    seed: int = 0,
    max_sweeps: int = 100,
    patience: int = 5,
) -> Matching:
    """Order the units of several models alike, in the order of the first.

    In each sweep each group of each model but the first is solved once, in random order, for the mean of its
    similarities to all other models as they stand. Correlations of different groups are normalised apart, so solving
    one can lower another: no potential rises with every step. The sweeps go on while the mean over all matched units
    rises, and the best state seen is returned. For `"inner"` the steps share a potential, the inner product of all
    weights, unless a tensor has groups of one tree along two axes.

    Args:
        states: the models' tensors by name.
        spec: the groups and how they lie along the tensors' axes.
        activations (*optional*): for each pair of models, the lower index first, the similarity of each group's units.
        weight (`float`, *optional*, defaults to 0.5): the share of the weights' similarity. With 0, groups that have
            activations are solved once.
        measure (`str`, *optional*, defaults to `"pearson"`): how weights are compared. `"inner"`, the inner product
            as in git re-basin, goes with no activations, as the two have no common scale.
        skip: names of tensors that do not count, such as the heads of different tasks.
        seed (`int`, *optional*, defaults to 0): of the order of the groups.
        max_sweeps (`int`, *optional*, defaults to 100): at most so many.
        patience (`int`, *optional*, defaults to 5): end after so many sweeps in a row without a better objective.

    Returns:
        [`Matching`]: a permutation for each model.
    """
    _check(states, spec, activations, weight, measure)
    alignment = _Alignment(states, spec, activations or {}, weight, measure, skip)
    order = random.Random(seed)
    best, objective = list(alignment.permutations), [alignment.objective()]
    stale = 0
    while stale < patience and len(objective) <= max_sweeps and alignment.steps:
        order.shuffle(alignment.steps)
        changed = [alignment.improve(root, k) for root, k in alignment.steps]
        if not any(changed):
            break
        value = alignment.objective()
        if value > objective[-1] + TIE:
            best, stale = list(alignment.permutations), 0
        else:
            stale += 1
        objective.append(max(value, objective[-1]))
    return Matching(tuple(best), tuple(objective), len(objective) - 1)


def _check(
    states: Sequence[Mapping[str, Tensor]],
    spec: Symmetries,
    activations: Mapping[tuple[int, int], Similarities] | None,
    weight: float,
    measure: str,
) -> None:
    if len(states) < 2:
        raise OptionError(f"{len(states)} models to match: expected at least two")
    if not 0 <= weight <= 1:
        raise OptionError(f"weight is {weight}: expected a number from 0 to 1")
    if measure not in ("pearson", "inner"):
        raise OptionError(f"measure is {short(measure)}: expected 'pearson' or 'inner'")
    if measure == "inner" and activations is not None:
        raise OptionError("measure='inner' has another scale than activations: expected none")
    if activations is None:
        return
    for pair in itertools.combinations(range(len(states)), 2):
        if pair not in activations:
            raise OptionError(f"activations lack the pair {pair}: they have {', '.join(map(str, activations))}")
        for name, similarity in activations[pair].items():
            units = math.prod(spec.shape(name)) if name in spec.groups else None
            if similarity.shape != (units, units):
                raise OptionError(f"similarity of {name} is {tuple(similarity.shape)}: expected ({units}, {units})")


def _mean(parts: Iterable[Tensor]) -> float:
    """The mean of all elements of several tensors, 0 of none."""
    total, count = 0.0, 0
    for part in parts:
        total, count = total + float(part.double().sum()), count + part.numel()
    return total / max(count, 1)


def _check_finite(tensors: Mapping[str, Tensor], k: int) -> None:
    for name, tensor in tensors.items():
        finite = tensor.isfinite().flatten()
        if not finite.all():
            index = int((~finite).nonzero()[0])
            error = NonFiniteError(k, index, float(tensor.flatten()[index]))
            raise error.located(name, tensor.shape, f"model {k}")


class _Alignment:
    """The models in the order found so far, and what one step does to it."""

    def __init__(
        self,
        states: Sequence[Mapping[str, Tensor]],
        spec: Symmetries,
        activations: Mapping[tuple[int, int], Similarities],
        weight: float,
        measure: str,
        skip: Collection[str],
    ):
        self.spec, self.activations, self.measure = spec, activations, measure
        self.weight = weight if activations else 1.0
        self.pairs = list(itertools.combinations(range(len(states)), 2))
        names = list(comparable(states[0], states[-1], spec, skip))
        for state in states[1:-1]:
            list(comparable(states[0], state, spec, skip))  # refuses other shapes
        self.states = [{name: state[name] for name in names} for state in states]
        for k, state in enumerate(self.states):
            _check_finite(state, k)
        self.weighed = {name for name in spec.groups if weighed(self.states[0], self.states[1], spec, name, measure)}
        self.permutations = [spec.identity() for _ in states]
        for k in range(1, len(states)) if activations else ():
            for root in spec.children(None):
                self.permutations[k] |= match_tree(spec, root, activations[0, k])[0]
        roots = [root for root in spec.children(None) if len(states) > 2 or self._weights_count(root)]
        self.steps = [(root, k) for root in roots for k in range(1, len(states))]

    def _weights_count(self, root: str) -> bool:
        """Whether the weights have a say in this tree: by their share, or for a group that nothing else tells of."""
        names = self.weighed.intersection(tree(self.spec, root))
        return any(self.weight > 0 or name not in self._activations(0, 1) for name in names)

    def improve(self, root: str, k: int) -> bool:
        """Put the units of a tree of one model in the best order; whether that was another one."""
        others = [j for j in range(len(self.states)) if j != k]
        mean: dict[str, Tensor] = {}
        for j in others:
            for name, similarity in self._similarities(root, j, k).items():
                mean[name] = mean.get(name, 0) + similarity / len(others)
        step, value = match_tree(self.spec, root, mean)
        current = _mean(similarity.diagonal() for similarity in mean.values())
        if value <= current + TIE * max(abs(current), 1):
            return False
        self.permutations[k] = self.spec.compose(self.permutations[k], self.spec.identity() | step)
        return True

    def objective(self) -> float:
        """The mean similarity of matched units over all groups and pairs, or the cosine of all weights."""
        values = [self._cosine(*pair) if self.measure == "inner" else self._matched(*pair) for pair in self.pairs]
        return sum(values) / len(values)

    def _matched(self, j: int, k: int) -> float:
        trees = (self._similarities(root, j, k, matched=True) for root in self.spec.children(None))
        return _mean(diagonal for similarities in trees for diagonal in similarities.values())

    def _similarities(self, root: str, j: int, k: int, matched: bool = False) -> dict[str, Tensor]:
        """Of each group of the tree the units of model j and those of k, both in their current order.

        Where `matched`, only those at the same place, of shape (units,).
        """
        tensors_j, tensors_k = self._tensors(root, j), self._tensors(root, k)
        weights, activations = {}, {}
        for name in tree(self.spec, root):
            read = name in self._activations(j, k)
            if name in self.weighed and (self.weight > 0 or not read):
                weights[name] = (
                    matched_similarity(tensors_j, tensors_k, self.spec, name)
                    if matched
                    else weight_similarity(tensors_j, tensors_k, self.spec, name, measure=self.measure)
                ).cpu()
            if read and (self.weight < 1 or name not in weights):
                similarity = self._activation(name, j, k)
                activations[name] = similarity.diagonal() if matched else similarity
        return combine(weights, activations, self.weight)

    def _cosine(self, j: int, k: int) -> float:
        cross = square_j = square_k = 0.0
        for name in self.states[j]:
            a, b = (self._tensor(name, model).double().flatten() for model in (j, k))
            cross, square_j, square_k = cross + float(a @ b), square_j + float(a @ a), square_k + float(b @ b)
        return cross / max(math.sqrt(square_j * square_k), torch.finfo(torch.float64).tiny)

    def _activations(self, j: int, k: int) -> Similarities:
        return self.activations.get((min(j, k), max(j, k)), {})

    def _activation(self, group: str, j: int, k: int) -> Tensor:
        """Similarity of the activations, with both models' units in their current order."""
        matrix = self._activations(j, k)[group].cpu()
        matrix = matrix if j < k else matrix.T
        units, plain = (self.spec.chain(group),), ((len(matrix),),)
        for model, layout in ((j, (units, plain)), (k, (plain, units))):
            if model:  # the first model keeps its order
                matrix = self.spec.permute_tensor(matrix, layout, self.permutations[model])
        return matrix

    def _tensors(self, root: str, k: int) -> dict[str, Tensor]:
        """The tensors of model k that have a group of the tree, in the current order."""
        names = set(tree(self.spec, root))
        return {
            name: self._tensor(name, k)
            for name in self.states[k]
            if any(factor in names for axis in self.spec.tensors[name] for segment in axis for factor in segment)
        }

    def _tensor(self, name: str, k: int) -> Tensor:
        tensor = self.states[k][name]
        return self.spec.permute_tensor(tensor, self.spec.tensors[name], self.permutations[k]) if k else tensor
