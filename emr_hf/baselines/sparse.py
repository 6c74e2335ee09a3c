"""Merges that thin out the task vectors first: TIES and DARE, as PEFT computes them, on full checkpoints.

PEFT's functions take one tensor of each task. They are given whole task vectors, flattened, where it matters what a
tensor is: see [`ties`].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import OptionError, short
from .vectors import StateDict, add, check_density, flat_vector, names_to_merge, split

TRIMS = ("global", "tensor")


def ties(
    base: StateDict, finetunes: Mapping[str, StateDict], density: float = 0.2, scale: float = 1.0, trim: str = "global"
) -> dict[str, Tensor]:
    """Trim the task vectors, elect a sign for each element, average what agrees: `W = W0 + scale * tau_m`.

    Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (2023), arXiv 2306.01708, algorithm 1:
    `gamma = sign(sum_t tau_t)` of the trimmed vectors, `tau_m` the mean of the nonzero values of sign `gamma`.

    The paper trims a task vector as a whole, so that a tensor that the finetune hardly moved is dropped and one that
    it moved far is kept. PEFT, made for adapters, trims each tensor on its own. The default here is the paper's.

    Args:
        base: the pretrained weights `W0`.
        finetunes: task -> finetuned weights `W_t`.
        density (*optional*, defaults to 0.2): share of each task vector that is kept, its largest magnitudes.
        scale (*optional*, defaults to 1.0): the paper's `lambda`, which it finds best near 1.
        trim (*optional*, defaults to `"global"`): of what the share is taken. `"global"`: of the task's whole vector,
            for which all task vectors are held in memory at a time. `"tensor"`: of each tensor.

    Returns:
        the merged tensors, by name.

    Raises:
        OptionError: no finetune, a density out of range, an unknown `trim`, or PEFT is not installed.
    """
    if trim not in TRIMS:
        raise OptionError(f"trim={short(trim)} is unknown: expected one of {', '.join(TRIMS)}")
    merge = _peft_merge("ties", density, scale)
    names = names_to_merge(base, finetunes)
    if trim == "global":
        merged = merge([flat_vector(base, weights, names) for weights in finetunes.values()])
        return {name: add(base[name], delta) for name, delta in split(merged, base, names).items()}
    return _merge_tensors(base, finetunes, names, merge)


def dare_linear(
    base: StateDict, finetunes: Mapping[str, StateDict], density: float = 0.5, scale: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """Drop values at random, rescale the rest, add up: `W = W0 + scale * sum_t m_t tau_t / density`.

    Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch" (2024),
    arXiv 2311.03099, equations 1 to 3; `m_t` is 1 with a chance of `density`, the paper's `1 - p`. Over the seeds the
    mean is task arithmetic. Each value is drawn on its own, so here a tensor is as good as the whole vector.

    Args:
        base: the pretrained weights `W0`.
        finetunes: task -> finetuned weights `W_t`.
        density (*optional*, defaults to 0.5): share of the values that is kept.
        scale (*optional*, defaults to 1.0): what the sum is multiplied by.
        seed (*optional*, defaults to 0): of what is drawn. The global generator is left as it was.

    Returns:
        the merged tensors, by name.

    Raises:
        OptionError: no finetune, a density out of range, or PEFT is not installed.
    """
    return _dare("dare_linear", base, finetunes, density, scale, seed)


def dare_ties(
    base: StateDict, finetunes: Mapping[str, StateDict], density: float = 0.5, scale: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """Drop and rescale as [`dare_linear`] does, then elect signs and average as [`ties`] does.

    Yu et al. (2024), arXiv 2311.03099, section 3.3: DARE before TIES, in place of its trimming.

    Args:
        base: the pretrained weights `W0`.
        finetunes: task -> finetuned weights `W_t`.
        density (*optional*, defaults to 0.5): share of the values that is kept.
        scale (*optional*, defaults to 1.0): what the mean is multiplied by.
        seed (*optional*, defaults to 0): of what is drawn. The global generator is left as it was.

    Returns:
        the merged tensors, by name.

    Raises:
        OptionError: no finetune, a density out of range, or PEFT is not installed.
    """
    return _dare("dare_ties", base, finetunes, density, scale, seed)


def _dare(
    method: str, base: StateDict, finetunes: Mapping[str, StateDict], density: float, scale: float, seed: int
) -> dict[str, Tensor]:
    merge = _peft_merge(method, density, scale)
    names = names_to_merge(base, finetunes)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return _merge_tensors(base, finetunes, names, merge)


def _merge_tensors(
    base: StateDict, finetunes: Mapping[str, StateDict], names: list[str], merge: Callable[[list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Merge each tensor on its own."""
    merged = {}
    for name in names:
        taus = [flat_vector(base, weights, [name]) for weights in finetunes.values()]
        merged[name] = add(base[name], merge(taus).view(base[name].shape))
    return merged


def _peft_merge(method: str, density: float, scale: float) -> Callable[[list[Tensor]], Tensor]:
    """PEFT's function of that name, of task vectors alone; `scale` is given to every task."""
    check_density(density)
    try:
        from peft.utils import merge_utils
    except ImportError:
        raise OptionError("TIES and DARE need PEFT: pip install 'emr_hf[adapters]'") from None

    def merge(taus: list[Tensor]) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The density")  # of 1: that nothing is dropped is what was asked for
            return getattr(merge_utils, method)(taus, taus[0].new_full((len(taus),), scale), density)

    return merge
