"""EMR-Merging (arXiv 2405.17461) as pure functions on tensors: elect, mask, rescale.

Symbols, for one tensor of n elements and N tasks:

    base        W0                                  any float dtype
    task vector tau_t   = W_t - W0                  float32, whatever the checkpoints' dtype
    sign        gamma   = sign(sum_t tau_t)         of the exact sum; -1 for a sum of exactly zero
    unified     tau     = gamma * max |tau_t|       the maximum over the tasks whose sign is gamma, 0 if there is none
    mask        M_t     = [sign(tau_t) == sign(tau) != 0]
    rescaler    lambda_t= sum |tau_t| / sum M_t |tau|
    use         W_t'    = W0 + lambda_t M_t tau     (see `emr_hf.bits.rebuild`)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import bits, kernels
from .bits import StoredVector
from .errors import NonFiniteError, OptionError, check_choice
from .lengths import packed_size, require, require_floats, require_number, require_shape

RESCALERS = ("global", "tensor_mean", "least_squares", "none")
TAU_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How lambda is rounded must depend neither on the number of threads nor on how much is worked on at a time. So terms
# are summed in whole numbers within segments (see `whole_sums`), segments in order within units, and units by
# `math.fsum`. What is worked on at a time is whole units. The compiled election knows these three numbers too.
SEGMENT = 1 << 10
UNIT = 1 << 14
WHOLE = 26  # bits of a whole number

# Elements that a thread works on at a time: compiled, and in torch of all tasks together, few enough for the cache.
BLOCK = 1 << 18


@dataclass(frozen=True)
class TaskVector:
    """tau_t, where it is what is known of a task in place of its weights: `(n,)` float32."""

    values: Tensor


def task_vector(finetune: Tensor | TaskVector, base: Tensor) -> Tensor:
    """tau_t = W_t - W0 in float32, of the inputs' shape."""
    if isinstance(finetune, TaskVector):
        return finetune.values
    return finetune.to(torch.float32) - base.to(torch.float32)


def sign_of_sum(taus: Tensor) -> Tensor:
    """Sign of the exact sum over the tasks, whatever their order.

    Float64 addition settles almost every element. Where the terms cancel to within its rounding error the order of
    the tasks could decide, so those few are summed exactly.

    Args:
        taus: `(N, n)` float32, finite.

    Returns:
        `(n,)` float32 of -1 and 1. A sum of exactly zero elects -1, as the reference code does: in a tie some task
        has to lose, and where no task moved the unified vector is 0 all the same.
    """
    total = taus.sum(0, dtype=torch.float64)
    lowest, highest = taus.aminmax(dim=0)
    error_bound = torch.maximum(-lowest, highest).to(torch.float64) * (len(taus) ** 2 * 2.0**-52)
    unsure = (total.abs() <= error_bound) & (error_bound > 0)
    if unsure.any():
        total[unsure] = _exact_sums(taus[:, unsure].to(torch.float64))
    return torch.where(total > 0, 1.0, -1.0)


def _exact_sums(columns: Tensor) -> Tensor:
    """Correctly rounded sums of the columns of an `(N, k)` float64 tensor.

    Knuth's TwoSum finds the columns whose plain sum met no rounding, as exact ties do; `math.fsum` does the others.
    """
    total = torch.zeros_like(columns[0])
    rounded = torch.zeros_like(total, dtype=torch.bool)
    for term in columns:
        new = total + term
        part = new - total
        rounded |= ((total - (new - part)) + (term - part)) != 0
        total = new
    if rounded.any():
        exact = [math.fsum(column) for column in columns[:, rounded].T.tolist()]
        total[rounded] = torch.tensor(exact, dtype=torch.float64, device=total.device)
    return total


def elect(taus: Tensor) -> Tensor:
    """Unified task vector: elected sign times the largest magnitude of that sign (paper, section 3.2).

    Args:
        taus: `(N, n)` float32 task vectors, finite.

    Returns:
        `(n,)` float32; 0 where no task moved.
    """
    sign = sign_of_sum(taus)  # (n,)
    agreeing = (taus * sign).clamp_min_(0)  # (N, n): |tau_t| where the signs agree, else 0
    return sign * agreeing.amax(0) + 0.0  # no -0.0


def mask(tau_t: Tensor, tau: Tensor) -> Tensor:
    """M_t = [sign(tau_t) == sign(tau) != 0], bool, broadcast over the inputs."""
    return tau_t * tau.sign() > 0  # by tau's sign: a product with tau itself underflows


@dataclass
class Sums:
    """Float64 sums of one task over one or many tensors: all that the rescaler and the report need."""

    numel: int = 0
    nonzero: int = 0  # elements the finetune moved
    kept: int = 0  # elements in the mask
    abs_tau: float = 0.0  # sum |tau_t|
    abs_kept: float = 0.0  # sum M_t |tau|
    square_tau: float = 0.0  # sum tau_t^2
    square_kept: float = 0.0  # sum M_t tau^2
    product: float = 0.0  # sum tau_t M_t tau
    agreeing: int = 0  # elements of the elected sign, all of which are in EMR's mask

    @classmethod
    def total(cls, parts: Iterable[Sums]) -> Sums:
        """Sum over tensors, correctly rounded, so that the tensors' order does not matter."""
        rows = [vars(part) for part in parts]
        counts = {name: sum(row[name] for row in rows) for name in ("numel", "nonzero", "kept", "agreeing")}
        sums = {name: math.fsum(row[name] for row in rows) for name in vars(cls()) if name not in counts}
        return cls(**counts, **sums)  # type: ignore[arg-type]

    @property
    def density(self) -> float:
        """Share of the elements that are in the mask."""
        return self.kept / self.numel if self.numel else 0.0

    @property
    def sign_conflict(self) -> float:
        """Share of the moved elements whose direction lost the election."""
        return 1 - self.agreeing / self.nonzero if self.nonzero else 0.0

    @property
    def cosine(self) -> float:
        """Cosine between tau_t and M_t tau; 1 for a task vector of zeros."""
        norms = math.sqrt(self.square_tau) * math.sqrt(self.square_kept)
        if norms == 0:
            return 1.0 if self.square_tau == 0 else 0.0
        return min(self.product / norms, 1.0)

    def relative_error(self, rescaler: float) -> float:
        """||tau_t - lambda M_t tau|| / ||tau_t||; 0 for a task vector of zeros."""
        if self.square_tau == 0:
            return 0.0
        square = self.square_tau - 2 * rescaler * self.product + rescaler**2 * self.square_kept
        return math.sqrt(max(square, 0.0) / self.square_tau)


def rescaler(parts: Sequence[Sums], mode: str = "global") -> float:
    """lambda_t from one task's sums over each merged tensor.

    `"global"` is the paper's: sum |tau_t| / sum M_t |tau| over all elements. `"tensor_mean"` is that of most of the
    reference scripts: the same ratio of sums over tensors of the tensors' means. `"least_squares"` is what minimises
    ||tau_t - lambda M_t tau||: <tau_t, M_t tau> / ||M_t tau||^2. 1 where the mask is empty, and with `"none"`.
    """
    check_choice("rescale", mode, RESCALERS)
    parts = [part for part in parts if part.numel]
    if mode == "none":
        return 1.0
    if mode == "least_squares":
        total = Sums.total(parts)
        return total.product / total.square_kept if total.square_kept else 1.0
    weights = [1.0 if mode == "global" else 1.0 / part.numel for part in parts]
    above = math.fsum(w * part.abs_tau for w, part in zip(weights, parts))
    below = math.fsum(w * part.abs_kept for w, part in zip(weights, parts))
    return above / below if below else 1.0


@dataclass
class Partial:
    """What some elements of a tensor add to the sums; `units` is `ceil(n / UNIT)`.

    Attributes:
        sums: `(units, N, 5)` float64: for each task sum |tau_t|, sum M_t |tau|, sum tau_t^2, sum M_t tau^2 and
            sum tau_t M_t tau.
        counts: `(N, 2)` int64: elements that moved, and elements in the mask. Where these are not all of the elected
            sign, `(N, 3)`: also how many are.
        squares: `(units, 2)` float64: sum tau^2 before rounding to a narrower dtype than float32, and the sum of the
            squares of what the rounding changed; zeros where nothing is rounded.
        numel: the elements.
    """

    sums: Tensor
    counts: Tensor
    squares: Tensor
    numel: int

    @classmethod
    def empty(cls, numel: int, tasks: int) -> Partial:
        units = -(-numel // UNIT)
        return cls(
            sums=torch.zeros(units, tasks, 5, dtype=torch.float64),
            counts=torch.zeros(tasks, 2, dtype=torch.int64),
            squares=torch.zeros(units, 2, dtype=torch.float64),
            numel=numel,
        )


_COLUMNS = ("abs_tau", "abs_kept", "square_tau", "square_kept", "product")
"""Of `Partial.sums`."""


@dataclass
class TensorSums:
    """Sums over a tensor: one a task, and those of `Partial.squares`."""

    tasks: list[Sums]
    square: float
    square_rounding: float

    @classmethod
    def total(cls, parts: Sequence[Partial]) -> TensorSums:
        """Over the tensor's blocks, in any order."""
        numel = sum(part.numel for part in parts)
        counts = torch.stack([part.counts for part in parts]).sum(0).tolist()
        columns = torch.cat([part.sums for part in parts]).permute(1, 2, 0).tolist()  # (N, 5, units)
        square, rounding = (math.fsum(column) for column in torch.cat([part.squares for part in parts]).T.tolist())
        tasks = [
            Sums(numel, count[0], count[1], agreeing=count[-1], **dict(zip(_COLUMNS, map(math.fsum, rows))))
            for count, rows in zip(counts, columns)
        ]
        return cls(tasks, square, rounding)


def scales(largest: Tensor) -> Tensor:
    """The power of two that takes magnitudes up to `largest` below 1, or 2^100 if that is less; float32, its shape."""
    return torch.ldexp(torch.ones_like(largest), (-torch.frexp(largest).exponent).clamp(max=100))


def whole_sums(terms: Tensor, units: Tensor) -> Tensor:
    """Sums whose order cannot matter, so that any device, thread and instruction set has the same bits.

    Each term is rounded to a whole number of at most 26 bits, half to even, and these are added. No term is so far off
    by more than 2^-27 of the scale of its segment's largest.

    Args:
        terms: `(..., segments, SEGMENT)` float32, in [0, 1].
        units: `(..., segments)` float64: what 1 stands for in each segment.

    Returns:
        `(..., ceil(segments * SEGMENT / UNIT))` float64.
    """
    sums = (terms * 2.0**WHOLE).round().sum(-1, dtype=torch.float64) * 2.0**-WHOLE * units
    in_units = torch.nn.functional.pad(sums, (0, -sums.shape[-1] % (UNIT // SEGMENT)))
    in_units = in_units.unflatten(-1, (-1, UNIT // SEGMENT))
    total = torch.zeros_like(in_units[..., 0])
    for segment in in_units.unbind(-1):
        total += segment
    return total


def in_segments(values: Tensor) -> Tensor:
    """`(..., n)` as `(..., segments, SEGMENT)`, filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % SEGMENT))
    return padded.reshape(*values.shape[:-1], -1, SEGMENT)


def elect_block(
    base: Tensor,
    finetunes: Sequence[Tensor | TaskVector],
    tau: Tensor,
    masks: Sequence[Tensor],
    start: int = 0,
    device: torch.device | str = "cpu",
) -> Partial:
    """Elect some elements of a tensor.

    Args:
        base: `(n,)`, any float dtype.
        finetunes: N tensors of `(n,)`, any float dtype, or task vectors.
        tau: `(n,)`, where the unified vector is written, in the dtype it is stored in; masks and sums are those of the
            rounded vector.
        masks: N tensors of `(ceil(n / 8),)` uint8, where the packed masks are written.
        start: where the inputs stand in the flat tensor.
        device: where to do the work; the result is the same to the bit.

    Raises:
        NonFiniteError: a NaN or Inf in an input; its `source` is -1 for the base, else the task's position.
        OptionError: the unified vector overflows its dtype.
        TensorError: lengths or dtypes are not those above.
    """
    _check_block(base, finetunes, tau, masks)
    part = Partial.empty(base.numel(), len(finetunes))
    if base.numel() == 0:
        return part
    if torch.device(device).type == "cpu" and kernels.takes(tau, *masks):
        done = kernels.elect(
            _plain(base),
            [_plain(given.values if isinstance(given, TaskVector) else given) for given in finetunes],
            [isinstance(given, TaskVector) for given in finetunes],
            tau,
            masks,
            part.sums,
            part.counts,
            part.squares,
        )
        if done:
            return part
    return _elect_with_torch(base, finetunes, tau, masks, start, device)  # which says what is wrong, if anything is


def _check_block(base: Tensor, finetunes: Sequence[Tensor | TaskVector], tau: Tensor, masks: Sequence[Tensor]) -> None:
    numel = base.numel()
    _require_finetunes(finetunes)
    require_floats("base", base, numel)
    for given in finetunes:
        if isinstance(given, TaskVector):
            require("task vector", given.values, numel, torch.float32)
        else:
            require_floats("finetune", given, numel)
    require_floats("unified vector", tau, numel)
    require_number("packed masks", len(masks), len(finetunes))
    for packed in masks:
        require("packed mask", packed, packed_size(numel), torch.uint8)


def _plain(values: Tensor) -> Tensor:
    """What the compiled loops take."""
    return values if kernels.takes(values) and values.is_floating_point() else values.to(torch.float32).contiguous()


def _elect_with_torch(
    base: Tensor,
    finetunes: Sequence[Tensor | TaskVector],
    tau_out: Tensor,
    masks_out: Sequence[Tensor],
    start: int,
    device: torch.device | str,
) -> Partial:
    """[`elect_block`], by its definition."""
    taus = finite_task_vectors(base, finetunes, start, device)
    abs_tau = in_segments(taus.abs())  # (N, segments, SEGMENT)
    largest = abs_tau.amax(-1)
    exact = elect(taus)
    tau = exact.to(tau_out.dtype) + 0.0  # no -0.0 of underflow either
    used = tau.to(torch.float32)
    if not torch.isfinite(used).all():
        raise OptionError(f"the unified task vector overflows {tau.dtype}: choose tau_dtype='float32' or 'bfloat16'")
    masks = mask(taus, used)  # (N, n)
    tau_out.copy_(tau)
    for mask_out, task_mask in zip(masks_out, masks):
        mask_out.copy_(bits.pack(task_mask))
    part = Partial.empty(base.numel(), len(finetunes))
    scale, scale_used = scales(largest), scales(largest.amax(0))
    unit, unit_used = 1 / scale.to(torch.float64), 1 / scale_used.to(torch.float64)
    moved = abs_tau * scale[..., None]
    kept = in_segments(masks * used.abs()) * scale_used[..., None]
    for column, (terms, units) in enumerate(
        (
            (moved, unit),
            (kept, unit_used),
            (moved.square(), unit.square()),
            (kept.square(), unit_used.square()),
            (moved * kept, unit * unit_used),
        )
    ):
        part.sums[..., column] = whole_sums(terms, units).T
    part.counts[:, 0] = taus.count_nonzero(1)
    part.counts[:, 1] = masks.count_nonzero(1)
    if tau.dtype != torch.float32:
        for column, values in enumerate((exact, exact - used)):
            sizes = in_segments(values.abs())
            scale = scales(sizes.amax(-1))
            terms = (sizes * scale[..., None]).square()
            part.squares[:, column] = whole_sums(terms, 1 / scale.to(torch.float64).square())
    return part


def finite_task_vectors(
    base: Tensor, finetunes: Sequence[Tensor | TaskVector], start: int, device: torch.device | str
) -> Tensor:
    """The task vectors of some elements, `(N, n)` float32 on a device; arguments and errors as [`elect_block`]."""
    base = base.to(device)
    finetunes = [
        TaskVector(given.values.to(device)) if isinstance(given, TaskVector) else given.to(device)
        for given in finetunes
    ]
    taus = torch.stack([task_vector(finetune, base) for finetune in finetunes])
    if not torch.isfinite(taus.abs().amax(-1) if taus.numel() else taus).all():
        raise _non_finite(base, finetunes, taus, start)
    return taus


def first_non_finite(values: Tensor) -> int | None:
    """Position in the flat tensor of the first NaN or Inf; `None` if all is finite."""
    bad = torch.isfinite(values).logical_not().reshape(-1).nonzero()
    return int(bad[0]) if len(bad) else None


def _non_finite(base: Tensor, finetunes: Sequence[Tensor | TaskVector], taus: Tensor, start: int) -> NonFiniteError:
    for source, given in enumerate([base, *finetunes], start=-1):
        values = given.values if isinstance(given, TaskVector) else given
        if (bad := first_non_finite(values)) is not None:
            return NonFiniteError(source, start + bad, float(values[bad]))
    task, index = (int(i) for i in torch.isfinite(taus).logical_not().nonzero()[0])
    return NonFiniteError(task, start + index, float(taus[task, index]))


def block_size(tasks: int, device: torch.device | str = "cpu") -> int:
    """Elements of a tensor elected at a time: whole units."""
    if torch.device(device).type != "cpu":
        return max(64 * BLOCK // tasks // UNIT, 1) * UNIT
    return BLOCK if kernels.available() else max(BLOCK // tasks // UNIT, 1) * UNIT


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch work on so many threads inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_shapes(base: Tensor, finetunes: Sequence[Tensor | StoredVector]) -> None:
    """Raise TensorError unless all finetunes are of the base's shape, OptionError where there are none."""
    _require_finetunes(finetunes)
    require_floats("base", base, base.numel())
    for given in finetunes:
        require_shape("finetune", (given.tau if isinstance(given, StoredVector) else given).shape, base.shape)
        if not isinstance(given, StoredVector):
            require_floats("finetune", given, base.numel())


def _require_finetunes(finetunes: Sequence[object]) -> None:
    if not finetunes:
        raise OptionError("nothing to merge: expected at least one finetune, got none")


@dataclass
class TensorElection:
    """The election of one tensor, a block at a time, in any order and by any thread.

    Attributes:
        base: any shape and float dtype; read as if flat.
        finetunes: N tensors of the base's shape, or what a merge has kept of one.
        device: where the work is done.

    Raises:
        TensorError: a finetune has another shape.
    """

    base: Tensor
    finetunes: Sequence[Tensor | StoredVector]
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        check_shapes(self.base, self.finetunes)
        self.base = self.base.reshape(-1)
        self.finetunes = [given if isinstance(given, StoredVector) else given.reshape(-1) for given in self.finetunes]

    def blocks(self) -> list[slice]:
        """Pieces of the flat tensor; one of no elements for an empty tensor."""
        numel, step = self.base.numel(), block_size(len(self.finetunes), self.device)
        return [slice(start, min(start + step, numel)) for start in range(0, max(numel, 1), step)]

    def run(self, block: slice, tau: Tensor, masks: Sequence[Tensor]) -> Partial:
        """Elect one of the blocks into `tau` and `masks`, see [`elect_block`]."""
        inputs = [
            TaskVector(given[block]) if isinstance(given, StoredVector) else given[block] for given in self.finetunes
        ]
        return elect_block(self.base[block], inputs, tau, masks, block.start, self.device)


def shared_names(base: Mapping[str, Tensor], finetunes: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that the base and every finetune have in one shape."""

    def fits(name: str, state_dict: Mapping[str, Tensor]) -> bool:
        found = state_dict.get(name)
        return found is not None and found.is_floating_point() and found.shape == base[name].shape

    return [name for name in base if all(fits(name, weights) for weights in (base, *finetunes.values()))]
