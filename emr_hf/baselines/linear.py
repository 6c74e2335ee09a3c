"""Merges that are a weighted sum: the average of the weights, and task arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .vectors import StateDict, names_to_merge


def weight_average(base: StateDict, finetunes: Mapping[str, StateDict]) -> dict[str, Tensor]:
    """Average the finetunes: `W = mean_t W_t`, the uniform soup of Wortsman et al., "Model soups" (2022).

    Args:
        base: the pretrained weights. Only their names, shapes and dtypes matter here.
        finetunes: task -> finetuned weights.

    Returns:
        the merged tensors, by name.
    """
    return task_arithmetic(base, finetunes, 1 / max(1, len(finetunes)))


def task_arithmetic(base: StateDict, finetunes: Mapping[str, StateDict], scale: float) -> dict[str, Tensor]:
    """Add up the task vectors: `W = W0 + scale * sum_t (W_t - W0)`.

    Ilharco et al., "Editing Models with Task Arithmetic" (2023), who find scales of 0.3 to 0.5 close to the best in
    many cases.

    Args:
        base: the pretrained weights `W0`.
        finetunes: task -> finetuned weights `W_t`.
        scale: what the sum is multiplied by. `1 / len(finetunes)` gives the weight average.

    Returns:
        the merged tensors, by name.

    Example:
        >>> base, plus, minus = ({"w": torch.full((2,), value)} for value in (1.0, 3.0, 0.0))
        >>> task_arithmetic(base, {"a": plus, "b": minus}, scale=0.5)
        {'w': tensor([1.5000, 1.5000])}
    """
    merged = {}
    for name in names_to_merge(base, finetunes):
        start = base[name].float()
        moved = torch.zeros_like(start)
        for weights in finetunes.values():
            moved += weights[name].to(start) - start
        merged[name] = (start + scale * moved).to(base[name].dtype)
    return merged
