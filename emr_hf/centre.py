"""A base for finetunes that have none in common: what stands for W0 where models were only aligned.

Measured in `benchmarks/alignment.py`: with the mean of two models the task vectors are opposites and elect nothing,
with one of the two both are kept exactly; of four models the median was best where there is no BatchNorm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from .mapped_files import WatchedMemory
from .sources import Source
from .storage import Storage, TensorInfo

_PIECE = 1 << 20  # elements of every finetune that are compared at a time


class MedianStorage:
    """The median of several checkpoints, element by element, made when a tensor is read.

    Of an even number it is the lower of the two in the middle, so that it is always some finetune's own weight. It has
    the tensors that all of them have in one shape; those that are not floating-point numbers are the first's.
    """

    def __init__(self, storages: Sequence[Storage]):
        self.storages = storages
        first, *others = storages
        self.infos: dict[str, TensorInfo] = {
            name: info
            for name, info in first.infos.items()
            if all(name in other.infos and other.infos[name].shape == info.shape for other in others)
        }

    @property
    def files(self) -> Sequence[WatchedMemory]:
        return [file for storage in self.storages for file in storage.files]

    def read(self, name: str) -> Tensor:
        first, *others = (storage.read(name) for storage in self.storages)
        if not first.is_floating_point():
            return first
        flat = [tensor.reshape(-1) for tensor in (first, *others)]
        out = torch.empty(first.numel(), dtype=first.dtype)
        for start in range(0, first.numel(), _PIECE):
            piece = torch.stack([values[start : start + _PIECE].to(first.dtype) for values in flat])  # (N, n)
            # Without regard to NaN, so that it is the finetune in which one is found that is blamed.
            out[start : start + _PIECE] = piece.nanmedian(0).values
        return out.reshape(first.shape)


def stand_in(finetunes: Mapping[str, Source]) -> Source:
    """The base to take where there is none.

    Of one or two finetunes it is the first, of more their median, but with BatchNorm the first again: its statistics,
    which are each task's own, do not follow a median of weights.
    """
    first = next(iter(finetunes.values()))
    if len(finetunes) < 3 or any(name.endswith(".running_var") for name in first.storage.infos):
        return replace(first)
    name = f"the median of {', '.join(finetunes)}"
    storage = MedianStorage([finetune.storage for finetune in finetunes.values()])
    return Source("base", name, deepcopy(first.config), storage)
