"""What the baselines have in common: task vectors, flat or by name, and the checks of their options."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..election import shared_names, task_vector
from ..errors import OptionError

StateDict = Mapping[str, Tensor]


def names_to_merge(base: StateDict, finetunes: Mapping[str, StateDict]) -> list[str]:
    """Return the names of the shared tensors.

    Raises:
        OptionError: there is no finetune.
    """
    if not finetunes:
        raise OptionError("expected at least one finetune to merge, got none")
    return shared_names(base, finetunes)


def check_density(density: float) -> None:
    """Raise OptionError unless `0 < density <= 1`."""
    if not 0 < density <= 1:
        raise OptionError(f"density={density}: expected a share of the values, above 0 and at most 1")


def flat_vector(base: StateDict, finetune: StateDict, names: list[str]) -> Tensor:
    """The task vector over some tensors, in their order: `W_t - W0`, float32 of `(total numel,)`."""
    parts = [task_vector(finetune[name].to(base[name].device), base[name]).reshape(-1) for name in names]
    return torch.cat(parts) if parts else torch.zeros(0)


def split(flat: Tensor, base: StateDict, names: list[str]) -> dict[str, Tensor]:
    """Undo the flattening: name -> a view of the base's shape."""
    parts = flat.split([base[name].numel() for name in names])
    return {name: part.view(base[name].shape) for name, part in zip(names, parts)}


def add(base: Tensor, delta: Tensor) -> Tensor:
    """`W0 + delta`, summed in float32, in the base's dtype."""
    return (base.float() + delta).to(base.dtype)


def top_magnitudes(values: Tensor, density: float) -> Tensor:
    """Mark the `floor(density * numel)` largest magnitudes of a tensor, and no more where some are equal; bool."""
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[values.reshape(-1).abs().topk(int(density * values.numel())).indices] = True
    return mask.view(values.shape)
