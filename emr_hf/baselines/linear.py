"""The two merges that need no mask, to compare EMR-Merging with.

Both give one set of weights for all tasks. Pure functions on state dicts; arithmetic is in float32, the result in the
base's dtype. Only what all models share is merged: a tensor that is missing somewhere, differs in shape or is not
floating point is left out of the result. Take out a head by name first, should it have one shape everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .election import shared_names
from .errors import OptionError

StateDict = Mapping[str, Tensor]


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
    if not finetunes:
        raise OptionError("expected at least one finetune to merge, got none")
    merged = {}
    for name in shared_names(base, finetunes):
        start = base[name].float()
        moved = torch.zeros_like(start)
        for weights in finetunes.values():
            moved += weights[name].to(start) - start
        merged[name] = (start + scale * moved).to(base[name].dtype)
    return merged
