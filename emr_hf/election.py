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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bits import StoredVector
from .errors import NonFiniteError, OptionError

RESCALERS = ("global", "tensor_mean")
TAU_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Elements of all tasks' vectors together that are worked on at a time: few enough for the cache, whatever N.
CHUNK = 1 << 18


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
        total[rounded] = torch.tensor(exact, dtype=torch.float64)
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

    @classmethod
    def total(cls, parts: Iterable[Sums]) -> Sums:
        """Sum over tensors, correctly rounded, so that the tensors' order does not matter."""
        rows = [vars(part) for part in parts]
        counts = {name: sum(row[name] for row in rows) for name in ("numel", "nonzero", "kept")}
        sums = {name: math.fsum(row[name] for row in rows) for name in vars(cls()) if name not in counts}
        return cls(**counts, **sums)  # type: ignore[arg-type]

    @property
    def density(self) -> float:
        """Share of the elements that are in the mask."""
        return self.kept / self.numel if self.numel else 0.0

    @property
    def sign_conflict(self) -> float:
        """Share of the moved elements whose direction lost the election."""
        return 1 - self.kept / self.nonzero if self.nonzero else 0.0

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
    reference scripts: the same ratio of sums over tensors of the tensors' means. 1 where the mask is empty.
    """
    if mode not in RESCALERS:
        raise OptionError(f"rescale={mode!r} is unknown: expected one of {', '.join(RESCALERS)}")
    weights = [1.0 if mode == "global" else 1.0 / part.numel for part in parts if part.numel]
    parts = [part for part in parts if part.numel]
    above = math.fsum(w * part.abs_tau for w, part in zip(weights, parts))
    below = math.fsum(w * part.abs_kept for w, part in zip(weights, parts))
    return above / below if below else 1.0


@dataclass
class Elected:
    """Some elements of a tensor after the election.

    Attributes:
        where: which elements of the flat tensor.
        tau: the unified vector, `(n,)`, in the dtype it will be stored in.
        masks: `(N, n)` bool.
        sums: one a task.
        square: sum tau^2 before rounding to that dtype.
        square_rounding: sum of the squares of what the rounding changed.
    """

    where: slice
    tau: Tensor
    masks: Tensor
    sums: list[Sums]
    square: float
    square_rounding: float


def elect_chunk(
    base: Tensor, finetunes: Sequence[Tensor | TaskVector], tau_dtype: torch.dtype = torch.float32, start: int = 0
) -> Elected:
    """Elect some elements of a tensor.

    Args:
        base: `(n,)`, any float dtype.
        finetunes: N tensors of `(n,)`, any float dtype, or task vectors.
        tau_dtype: the dtype the unified vector will be stored in; masks and sums are those of the rounded vector.
        start: where the inputs stand in the flat tensor.

    Raises:
        NonFiniteError: a NaN or Inf in an input; its `source` is -1 for the base, else the task's position.
        OptionError: the unified vector overflows `tau_dtype`.
    """
    taus = torch.stack([task_vector(finetune, base) for finetune in finetunes])  # (N, n)
    wide = taus.to(torch.float64)  # squares of small float32 numbers underflow in float32
    abs_tau = wide.abs().sum(1)
    if not torch.isfinite(abs_tau).all():
        raise _non_finite(base, finetunes, taus, start)
    exact = elect(taus)
    tau = exact.to(tau_dtype)
    used = tau.to(torch.float32)
    if not torch.isfinite(used).all():
        raise OptionError(f"the unified task vector overflows {tau_dtype}: choose tau_dtype='float32' or 'bfloat16'")
    masks = mask(taus, used)  # (N, n)
    kept = masks * used.abs().to(torch.float64)  # |tau| in the mask
    columns = zip(
        taus.count_nonzero(1).tolist(),
        masks.count_nonzero(1).tolist(),
        abs_tau.tolist(),
        kept.sum(1).tolist(),
        torch.linalg.vecdot(wide, wide).tolist(),  # row by row: a matrix product's rounding depends on the row's place
        torch.linalg.vecdot(kept, kept).tolist(),
        torch.linalg.vecdot(wide.abs_(), kept).tolist(),
    )
    return Elected(
        where=slice(start, start + base.numel()),
        tau=tau,
        masks=masks,
        sums=[Sums(base.numel(), *row) for row in columns],
        square=float(exact.double().square().sum()),
        square_rounding=float((exact.double() - used).square().sum()),
    )


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


def chunk_size(tasks: int) -> int:
    """Elements of a tensor elected at a time: a multiple of 8, so that every chunk's masks end on a whole byte.

    Sums are taken chunk by chunk, so this is part of how lambda is rounded; every way into the election has the same.
    """
    return max(CHUNK // tasks // 8, 1) * 8


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch work on so many threads inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_torch_thread() -> AbstractContextManager[None]:
    """Elect on one thread: chunks are too small to share, and waiting for a busy core costs many times the work."""
    return torch_threads(1)


def elect_tensor(
    base: Tensor, finetunes: Sequence[Tensor | StoredVector], tau_dtype: torch.dtype = torch.float32
) -> Iterator[Elected]:
    """Elect a tensor chunk by chunk, reading each input once, in order.

    Args:
        base: any shape and float dtype; read as if flat.
        finetunes: N tensors of the base's shape, or what a merge has kept of one.
        tau_dtype: as for [`elect_chunk`], which says what is raised.
    """
    flat = base.reshape(-1)
    inputs = [given if isinstance(given, StoredVector) else given.reshape(-1) for given in finetunes]
    step = chunk_size(len(finetunes))
    for start in range(0, base.numel(), step):
        part = slice(start, min(start + step, base.numel()))
        chunk = [TaskVector(given[part]) if isinstance(given, StoredVector) else given[part] for given in inputs]
        yield elect_chunk(flat[part], chunk, tau_dtype, start)


@dataclass
class Merge:
    """A merge of plain state dicts.

    Attributes:
        tau: unified task vector, name -> float32 tensor of the parameter's shape.
        masks: task -> name -> bool tensor of the parameter's shape.
        rescalers: task -> lambda.
        private: task -> names of its tensors that were not merged (missing elsewhere, another shape, not floating).
        sums: task -> float64 sums over all merged elements.
    """

    tau: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rescalers: dict[str, float] = field(default_factory=dict)
    private: dict[str, list[str]] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)


def merge_state_dicts(
    base: Mapping[str, Tensor], finetunes: Mapping[str, Mapping[str, Tensor]], rescale: str = "global"
) -> Merge:
    """EMR-Merging of state dicts, in memory (paper, algorithm 1).

    Args:
        base: name -> tensor.
        finetunes: task -> name -> tensor.
        rescale (*optional*, defaults to `"global"`): `"global"` or `"tensor_mean"`, see [`rescaler`].

    Returns:
        a [`Merge`]. A floating-point tensor that the base and every finetune have in one shape is merged; any other
        is listed in `private`.

    Raises:
        OptionError: no finetunes, an unknown `rescale`, or nothing that all share.
        NonFiniteError: a NaN or Inf in a merged tensor.
    """
    if not finetunes:
        raise OptionError("nothing to merge: expected at least one finetune, got none")
    if rescale not in RESCALERS:
        raise OptionError(f"rescale={rescale!r} is unknown: expected one of {', '.join(RESCALERS)}")
    names = shared_names(base, finetunes)
    if not names:
        raise OptionError("nothing to merge: the base and the finetunes have no floating-point tensor in common")
    result = Merge(masks={task: {} for task in finetunes})
    sums = []
    with one_torch_thread():
        for name in names:
            tau, masks, tensor_sums = _merge_tensor(name, base[name], {t: sd[name] for t, sd in finetunes.items()})
            result.tau[name] = tau
            for task, task_mask in zip(finetunes, masks):
                result.masks[task][name] = task_mask
            sums.append(tensor_sums)
    for task, parts, state_dict in zip(finetunes, zip(*sums), finetunes.values()):
        result.rescalers[task] = rescaler(parts, rescale)
        result.sums[task] = Sums.total(parts)
        result.private[task] = [name for name in state_dict if name not in result.tau]
    return result


def shared_names(base: Mapping[str, Tensor], finetunes: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Names of the floating-point tensors that the base and every finetune have in one shape."""

    def fits(name: str, state_dict: Mapping[str, Tensor]) -> bool:
        found = state_dict.get(name)
        return found is not None and found.is_floating_point() and found.shape == base[name].shape

    return [name for name in base if all(fits(name, weights) for weights in (base, *finetunes.values()))]


def _merge_tensor(name: str, base: Tensor, finetunes: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor], list[Sums]]:
    tau = torch.zeros(base.shape)
    masks = [torch.zeros(base.shape, dtype=torch.bool) for _ in finetunes]
    sums = [[Sums()] for _ in finetunes]
    try:
        for chunk in elect_tensor(base, list(finetunes.values())):
            tau.view(-1)[chunk.where] = chunk.tau
            for task, part in enumerate(chunk.masks):
                masks[task].view(-1)[chunk.where] = part
                sums[task].append(chunk.sums[task])
    except NonFiniteError as error:
        raise error.located(name, base.shape, ["base", *finetunes][error.source + 1]) from None
    return tau, masks, [Sums.total(task_sums) for task_sums in sums]
