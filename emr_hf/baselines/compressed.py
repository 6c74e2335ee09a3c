"""Task vectors compressed one by one: weights for each task, from the base and a few bits beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .. import bits
from ..errors import OptionError, UnknownTaskError, short
from .vectors import StateDict, add, check_density, flat_vector, names_to_merge, split, top_magnitudes

SCALES = ("tensor", "task")

_LINEAR_IN_BLOCK = re.compile(r"(^|\.)\d+\..*weight$")


class Stored(Protocol):
    """What is kept of one tensor of one task."""

    def weight(self, base: Tensor) -> Tensor:
        """The task's tensor, of the base's shape and dtype."""

    def parts(self) -> list[Tensor]:
        """The tensors that are kept."""


@dataclass(frozen=True)
class CompressedTasks:
    """Tasks that are rebuilt one at a time from the base and what is kept of each.

    Attributes:
        base: the pretrained weights; not copied.
        tasks: task -> name -> what is kept of the tensor.
    """

    base: StateDict
    tasks: Mapping[str, Mapping[str, Stored]]

    def rebuild(self, task: str) -> dict[str, Tensor]:
        """Return a task's merged tensors, by name, in the base's dtype.

        Raises:
            UnknownTaskError: there is no such task.
        """
        if task not in self.tasks:
            raise UnknownTaskError(task, self.tasks)
        return {name: stored.weight(self.base[name]) for name, stored in self.tasks[task].items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tasks beside the base: of bits, scales and tensors kept in full. What is shared counts once."""
        kept = [part for tensors in self.tasks.values() for stored in tensors.values() for part in stored.parts()]
        return sum({id(part): part.nbytes for part in kept}.values())


@dataclass(frozen=True)
class Full:
    """A finetune's tensor as it is, in the base's dtype."""

    values: Tensor

    def weight(self, base: Tensor) -> Tensor:
        return self.values.clone()

    def parts(self) -> list[Tensor]:
        return [self.values]


@dataclass(frozen=True)
class Signs:
    """`scale * sign`: a bit for each element, set where the sign is not negative, and a float32 scalar."""

    packed: Tensor
    scale: Tensor

    def weight(self, base: Tensor) -> Tensor:
        positive = bits.unpack(self.packed, base.shape)
        return add(base, torch.where(positive, self.scale, -self.scale))

    def parts(self) -> list[Tensor]:
        return [self.packed, self.scale]


@dataclass(frozen=True)
class Ternary:
    """`scale * mask * sign`: a bit for each element, one more for each in the mask, and a float32 scalar."""

    mask: Tensor
    signs: Tensor
    scale: Tensor

    def weight(self, base: Tensor) -> Tensor:
        mask = bits.unpack(self.mask, base.shape)
        positive = bits.unpack(self.signs, (int(mask.sum()),))
        delta = torch.zeros_like(base, dtype=torch.float32)
        delta[mask] = torch.where(positive, self.scale, -self.scale)
        return add(base, delta)

    def parts(self) -> list[Tensor]:
        return [self.mask, self.signs, self.scale]


def bitdelta(base: StateDict, finetunes: Mapping[str, StateDict], every_tensor: bool = False) -> CompressedTasks:
    """One bit for each weight and one scale for each matrix: `W_t' = W0 + mean|tau_t| sign(tau_t)`.

    Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit" (2024), arXiv 2402.10193, section 3.1, without the
    distillation of the scales that follows there. The scale is the one of least squared error for these signs. A bit
    has no zero: where a value did not move the sign is 1, as in the authors' code.

    As there, only the linear layers of transformer blocks are compressed, taken to be matrices whose name has a
    block's number before it ends in `weight`. Embeddings, heads, biases and norms are the finetune's, in full.

    Args:
        base: the pretrained weights `W0`.
        finetunes: task -> finetuned weights `W_t`.
        every_tensor (*optional*, defaults to `False`): compress each tensor, of any shape, to compare at equal bytes.

    Returns:
        the tasks, and the bytes they take.

    Raises:
        OptionError: no finetune.
    """
    names = names_to_merge(base, finetunes)
    compressed = {name for name in names if every_tensor or _is_linear_in_block(name, base[name])}

    def stored(name: str, weights: StateDict) -> Stored:
        if name not in compressed:
            return Full(weights[name].detach().to(base[name], copy=True))
        return _signs(flat_vector(base, weights, [name]))

    return CompressedTasks(
        base, {task: {name: stored(name, weights) for name in names} for task, weights in finetunes.items()}
    )


def _is_linear_in_block(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and _LINEAR_IN_BLOCK.search(name) is not None


def _signs(tau: Tensor) -> Signs:
    return Signs(bits.pack(tau >= 0), tau.abs().sum() / max(1, tau.numel()))


def ternary(
    base: StateDict, finetunes: Mapping[str, StateDict], density: float = 0.1, scale_per: str = "tensor"
) -> CompressedTasks:
    """Drop the small values of a task vector, binarise the rest: `W_t' = W0 + lambda_t M_t sign(tau_t)`.

    After T-Switch of Qi et al., "Less is More: Efficient Model Merging with Binary Task Switch" (2025), arXiv
    2412.00054: an activation switch `M_t`, a polarity switch `sign(tau_t)` and a scaling knob
    `lambda_t = ||M_t tau_t||_2 / ||M_t||_2`, which keeps the length of what is left. Here exactly the
    `floor(density * numel)` largest magnitudes are left; those of both signs compete.

    Args:
        base: the pretrained weights `W0`.
        finetunes: task -> finetuned weights `W_t`.
        density (*optional*, defaults to 0.1): share of the values that is kept.
        scale_per (*optional*, defaults to `"tensor"`): what has a share and a scale of its own: each `"tensor"`, or
            the `"task"`, whose vector is then taken as a whole.

    Returns:
        the tasks, and the bytes they take.

    Raises:
        OptionError: no finetune, a density out of range or an unknown `scale_per`.
    """
    check_density(density)
    if scale_per not in SCALES:
        raise OptionError(f"scale_per={short(scale_per)} is unknown: expected one of {', '.join(SCALES)}")
    names = names_to_merge(base, finetunes)
    groups = [names] if scale_per == "task" else [[name] for name in names]

    def stored(weights: StateDict) -> dict[str, Stored]:
        return {name: kept for group in groups for name, kept in _ternary(base, weights, group, density).items()}

    return CompressedTasks(base, {task: stored(weights) for task, weights in finetunes.items()})


def _ternary(base: StateDict, weights: StateDict, names: list[str], density: float) -> dict[str, Stored]:
    """Compress some tensors of a task as one vector."""
    tau = flat_vector(base, weights, names)
    mask = top_magnitudes(tau, density) & (tau != 0)
    scale = tau[mask].norm() / max(1, int(mask.sum())) ** 0.5
    taus, masks = split(tau, base, names), split(mask, base, names)
    return {name: Ternary(bits.pack(masks[name]), bits.pack(taus[name][masks[name]] > 0), scale) for name in names}
