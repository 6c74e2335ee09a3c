"""Least-squares fits of finetunes, in the container of EMR-Merging: a vector, one bit per weight and task, scalars.

Symbols as in `emr_hf.election`. Both fits are exact for each element by itself: of N numbers in order, what falls on
one side of a threshold is one of N prefixes, and each prefix has its best level in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import bits, kernels, lowbit
from .bits import StoredVector
from .election import (
    BLOCK,
    RESCALERS,
    TAU_DTYPES,
    Partial,
    TaskVector,
    check_shapes,
    elect,
    finite_task_vectors,
    in_segments,
    scales,
    whole_sums,
)
from .errors import OptionError, check_choice
from .lengths import require, require_floats, require_rows

METHODS = ("emr", "fit", "levels")
"""EMR-Merging's election; least-squares vector and masks; two levels for each weight, for base and vector."""


def check_method(method: str, rescale: str | None) -> str:
    """The rescaler of a method: the one that is asked for, or where none is the method's own.

    Raises:
        OptionError: either is unknown, or they do not go together.
    """
    check_choice("method", method, METHODS)
    if rescale is None:
        return "none" if method == "levels" else "global"
    check_choice("rescale", rescale, RESCALERS)
    if method == "levels" and rescale != "none":
        raise OptionError(f"rescale={rescale!r}: method='levels' has none, leave it out: its levels are the weights")
    return rescale


def fit_vector(taus: Tensor, rescalers: Tensor) -> Tensor:
    """The vector that minimises `sum_t (tau_t - lambda_t M_t tau)^2`, for given rescalers and the best masks.

    With `z_t = tau_t / lambda_t` the best mask of a given vector is `z_t / tau > 1/2`, so the tasks in it are those
    with the largest z, or with the smallest. A set S of tasks has its optimum at
    `tau = sum_S lambda_t tau_t / sum_S lambda_t^2`, which explains `(sum_S lambda_t tau_t)^2 / sum_S lambda_t^2` of
    the squares: that is tried for every set.

    Args:
        taus: `(N, n)` float32 task vectors, finite.
        rescalers: `(N,)` float32, not negative; a task of rescaler 0 is left out.

    Returns:
        `(n,)` float32.

    Raises:
        TensorError: lengths or dtypes are not those above.
    """
    tasks, _ = _check_vectors(taus)
    require_floats("rescalers", rescalers, tasks)
    given = rescalers > 0
    if not given.any():
        return torch.zeros_like(taus[0])
    if not given.all():
        taus, rescalers = taus[given], rescalers[given]
    if kernels.fits(taus):
        return kernels.fit_vector(taus, rescalers)
    z, weighted, weights = taus / rescalers[:, None], taus * rescalers[:, None], rescalers.square()
    best = torch.zeros_like(z[0])
    explained = best.to(torch.float64)  # which holds the squares of all float32 numbers
    for threshold in z:
        above, below = torch.zeros_like(best), torch.zeros_like(best)
        sides = torch.where(threshold > 0, z, -z) >= threshold.abs()
        for inside, value, weight in zip(sides, weighted, weights):
            above += torch.where(inside, value, 0)
            below += torch.where(inside, weight, 0)
        gain = above.to(torch.float64).square() / below.to(torch.float64)
        better = (gain > explained) & (threshold != 0)
        best = torch.where(better, above / below, best)
        explained = torch.where(better, gain, explained)
    return best


def two_levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """The two numbers nearest to N, by 1-D two-means: they minimise `sum_t min((x_t - low)^2, (x_t - high)^2)`.

    Args:
        values: `(N, n)` float32, finite.

    Returns:
        low and high, `(n,)` float32 each; equal where all N numbers are, and of two the numbers themselves.

    Raises:
        TensorError: the numbers are not of that shape and dtype.
    """
    _check_vectors(values)
    if kernels.fits(values):
        return kernels.two_levels(values)
    best_low, best_high, explained = values[0], values[0], torch.zeros_like(values[0], dtype=torch.float64)
    for threshold in values:
        above, below, members = (torch.zeros_like(threshold) for _ in range(3))
        for value in values:
            inside = value >= threshold
            above += torch.where(inside, value, 0)
            below += torch.where(inside, 0, value)
            members += inside
        others = len(values) - members
        high, low = above / members, below / others.clamp_min(1)
        between = (high - low).to(torch.float64).square() * (members * others).to(torch.float64)
        better = between > explained
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
        explained = torch.where(better, between, explained)
    return best_low, best_high


def _check_vectors(taus: Tensor) -> tuple[int, int]:
    """Tasks and elements of task vectors."""
    tasks, count = require_rows("task vectors", taus)
    require("task vectors", taus, tasks * count, torch.float32)
    return tasks, count


@dataclass
class Fitted:
    """What is stored of some elements of a tensor.

    Attributes:
        base: in the dtype of the repo's base; with `"levels"` the level nearest to it.
        tau: the vector, in its dtype, or codes of it.
        scales: of the codes' rows; `None` where there are no codes.
        masks: N packed masks.
        partial: the sums.
    """

    base: Tensor
    tau: Tensor
    scales: Tensor | None
    masks: list[Tensor]
    partial: Partial


@dataclass
class TensorFit:
    """The vector and masks of one tensor by one of `METHODS`, a block of rows at a time, in any order, by any thread.

    Attributes:
        base: any shape and float dtype, as it is stored in the repo.
        finetunes: N tensors of the base's shape, or what a merge has kept of one.
        method: one of `METHODS`.
        tau_dtype: what the vector is stored in.
        rescalers: `(N,)` float32, what the `"fit"` starts from.
        device: where the work is done.
    """

    base: Tensor
    finetunes: Sequence[Tensor | StoredVector]
    method: str
    tau_dtype: str
    rescalers: Tensor
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_shapes(self.base, self.finetunes)
        require_floats("rescalers", self.rescalers, len(self.finetunes))
        self.bits = lowbit.BITS[self.tau_dtype] if lowbit.is_packed(self.tau_dtype, self.base.shape) else None
        self.columns = lowbit.columns_of(self.base.shape) or 1
        self.base = self.base.reshape(-1)
        self.finetunes = [given if isinstance(given, StoredVector) else given.reshape(-1) for given in self.finetunes]

    def blocks(self) -> list[slice]:
        """Pieces of the flat tensor, whole rows where the vector is in codes; one of no elements if it is empty."""
        numel = self.base.numel()
        step = max(BLOCK // len(self.finetunes) // 8, 1) * 8
        if self.bits is not None:
            whole = math.lcm(self.columns, 8)  # rows, and bytes of the masks
            step = max(step // whole, 1) * whole
        return [slice(start, min(start + step, numel)) for start in range(0, max(numel, 1), step)]

    def code_bytes(self, start: int) -> int:
        """Where the codes of the elements from `start` on begin."""
        return start * (self.bits or 0) // 8

    def row(self, start: int) -> int:
        """The row that begins at an element."""
        return start // self.columns

    def run(self, block: slice) -> Fitted:
        """Fit one of the blocks.

        Raises:
            NonFiniteError, OptionError: as `election.elect_block`.
        """
        base = self.base[block].to(self.device)
        given = [TaskVector(one[block]) if isinstance(one, StoredVector) else one[block] for one in self.finetunes]
        taus = finite_task_vectors(base, given, block.start, self.device)
        start, exact = self._solve(base, taus)
        tau, row_scales, used = self._stored(exact)
        levels = self.method == "levels"
        shift = start.to(torch.float32) - base.to(torch.float32) if levels else None
        masks, part = compare(taus, used, shift, self._thresholds(), of_moves=levels)
        if self.tau_dtype != "float32":
            changes = torch.where(exact == 0, 0, exact - used)  # codes have no zero, nor needs a mask one
            part.squares = torch.stack([one.double().square().sum() for one in (exact, changes)])[None].cpu()
        return Fitted(start, tau, row_scales, masks, part)

    def _solve(self, base: Tensor, taus: Tensor) -> tuple[Tensor, Tensor]:
        """What the vector is added to, in the base's dtype, and the vector."""
        if self.method == "emr":
            return base, elect(taus)
        if self.method == "fit":
            return base, fit_vector(taus, self.rescalers.to(taus.device))
        low, high = two_levels(taus)
        swap = high.abs() < low.abs()
        near, far = torch.where(swap, high, low), torch.where(swap, low, high)
        start = (base.to(torch.float32) + near).to(base.dtype)
        _check_finite(start, "a weight's level, in the base's dtype,", str(base.dtype).removeprefix("torch."))
        return start, torch.where(far == near, 0, far - (start.to(torch.float32) - base.to(torch.float32)))

    def _thresholds(self) -> Tensor:
        """Rescalers by which masks are found."""
        by_sign = torch.zeros_like(self.rescalers)
        return {"emr": by_sign, "fit": self.rescalers, "levels": by_sign + 1}[self.method]

    def _stored(self, exact: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The vector as it is stored, the scales of its codes, and its values then."""
        row_scales = None
        if self.bits is not None:
            rows = exact.view(-1, self.columns)
            tau, row_scales = lowbit.encode(rows, self.bits)
            used = lowbit.Codes(tau, row_scales, self.bits, rows.shape).dense().reshape(-1)
        else:
            tau = exact.to(TAU_DTYPES.get(self.tau_dtype, torch.float32)) + 0.0  # no -0.0 of underflow
            used = tau.to(torch.float32)
        _check_finite(used, "the unified task vector, or what leads to it,", self.tau_dtype)
        return tau, row_scales, used


def _check_finite(values: Tensor, what: str, dtype: str) -> None:
    if not torch.isfinite(values).all():
        raise OptionError(f"{what} overflows in {dtype}")


def compare(
    taus: Tensor, used: Tensor, shift: Tensor | None, rescalers: Tensor, of_moves: bool
) -> tuple[list[Tensor], Partial]:
    """Masks, and the sums that rescalers and report are made of.

    Task t's mask has the elements that `lambda_t tau` is nearer to than 0 is; with a rescaler of 0, those of its sign.

    Args:
        taus: `(N, n)` float32.
        used: `(n,)` float32: the vector as it is stored.
        shift: `(n,)` float32: what all tasks move by before the vector is added, `None` for nothing.
        rescalers: `(N,)` float32.
        of_moves: whether an element agrees that moves as the task's own did, or one that moves as the vector does.

    Returns:
        N packed masks, and sums in which `M_t tau` is what the task moves by in all.

    Raises:
        TensorError: lengths or dtypes are not those above.
    """
    tasks, count = _check_vectors(taus)
    require("vector", used, count, torch.float32)
    require_floats("rescalers", rescalers, tasks)
    if shift is not None:
        require("shift", shift, count, torch.float32)
    part = Partial.empty(count, tasks)
    part.counts = torch.zeros(tasks, 3, dtype=torch.int64)
    if kernels.takes(taus, used, *([] if shift is None else [shift])):
        masks = [torch.empty(bits.packed_size(count), dtype=torch.uint8) for _ in taus]
        kernels.compare(taus, used, shift, rescalers, of_moves, masks, part.sums, part.counts)
        return masks, part
    start = torch.zeros_like(used) if shift is None else shift
    inside = ((taus - start) * used.sign() > used.abs() * rescalers.to(used.device)[:, None] * 0.5) & (used != 0)
    moves = inside * used + start
    agreeing = taus * (moves if of_moves else used).sign() > 0
    part.counts = torch.stack([one.sum(1) for one in (taus != 0, inside, agreeing)], 1).cpu()
    if count:
        part.sums = _sums(taus, moves).cpu()
    return [bits.pack(one) for one in inside], part


def _sums(taus: Tensor, moves: Tensor) -> Tensor:
    """Those of a `Partial`, `(units, N, 5)` float64."""
    scaled = []
    for values in map(in_segments, (taus, moves)):
        scale = scales(values.abs().amax(-1))
        scaled.append((values * scale[..., None], 1 / scale.to(torch.float64)))
    (a, unit_a), (b, unit_b) = scaled
    columns = (
        (a.abs(), unit_a),
        (b.abs(), unit_b),
        (a * a, unit_a * unit_a),
        (b * b, unit_b * unit_b),
        (a * b, unit_a * unit_b),
    )
    return torch.stack([whole_sums(terms, units) for terms, units in columns], -1).transpose(0, 1)
