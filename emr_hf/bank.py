"""EMRBank: the buffers from which a model's tasks are rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .bits import packed_size
from .election import TAU_DTYPES
from .format import flat_name
from .lowbit import BITS, Codes, infos, is_packed

PrivateSpec = Mapping[str, tuple[torch.Size, torch.dtype]]


class _Buffers(nn.Module):
    """Tensors by parameter name, each one flat buffer: a tree of modules would look like layers to PEFT."""

    def put(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        self.register_buffer(flat_name(name), tensor, persistent)

    def get(self, name: str) -> Tensor:
        return self._buffers[flat_name(name)]  # type: ignore[return-value]

    def has(self, name: str) -> bool:
        return flat_name(name) in self._buffers


class EMRBank(nn.Module):
    """The unified task vector and, per task, masks, rescaler and private tensors.

    Args:
        shapes: merged parameter -> shape.
        tau_dtype: of the unified vector: a name of `election.TAU_DTYPES` or of `lowbit.BITS`.
        private: task's key -> name -> shape and dtype of its private tensors.

    Buffers, saved under these names: `tau.<parameter>`, of the parameter's shape, `tau_dtype`, or its codes, uint8,
    and then `scale.<parameter>`, float32, one a row;
    `mask.<key>.<parameter>`, packed bits (see `emr_hf.bits`), uint8; `rescaler.<key>`, a float32 scalar;
    `private.<key>.<name>`. The base's values are kept in `base.<parameter>` once a task has replaced them in the
    model; they are saved as the model's.

    Attributes:
        place: device that the buffers stay on wherever the model goes; `None` for the model's.
    """

    place: torch.device | None = None

    def __init__(self, shapes: Mapping[str, torch.Size], tau_dtype: str, private: Mapping[str, PrivateSpec]):
        super().__init__()
        self.base, self.tau, self.scale, self.rescaler = _Buffers(), _Buffers(), _Buffers(), _Buffers()
        self._shapes, self._tau_dtype = shapes, tau_dtype
        self.mask, self.private = nn.Module(), nn.Module()
        for name, shape in shapes.items():
            if is_packed(tau_dtype, shape):
                codes, scales = infos(tau_dtype, shape)
                self.tau.put(name, torch.zeros(codes.shape, dtype=codes.dtype))
                self.scale.put(name, torch.zeros(scales.shape, dtype=scales.dtype))
            else:
                self.tau.put(name, torch.zeros(shape, dtype=TAU_DTYPES.get(tau_dtype, torch.float32)))
        for key, tensors in private.items():
            masks, own = _Buffers(), _Buffers()
            for name, shape in shapes.items():
                masks.put(name, torch.zeros(packed_size(shape.numel()), dtype=torch.uint8))
            for name, (shape, dtype) in tensors.items():
                own.put(name, torch.zeros(shape, dtype=dtype))
            self.mask.add_module(key, masks)
            self.private.add_module(key, own)
            self.rescaler.put(key, torch.ones((), dtype=torch.float32))

    def vector(self, name: str) -> Tensor | Codes:
        """A parameter's part of the unified vector."""
        stored = self.tau.get(name)
        if not self.scale.has(name):
            return stored
        return Codes(stored, self.scale.get(name), BITS[self._tau_dtype], self._shapes[name])

    def mask_of(self, key: str, name: str) -> Tensor:
        """The packed mask of a parameter, uint8."""
        return getattr(self.mask, key).get(name)

    def private_of(self, key: str, name: str) -> Tensor:
        """A task's own tensor."""
        return getattr(self.private, key).get(name)

    def needed(self, key: str | None) -> list[tuple[str, Tensor]]:
        """Buffers that are read for a task, or for the base, and their names."""
        parts = (
            [self.base]
            if key is None
            else [self.base, self.tau, self.scale, getattr(self.mask, key), getattr(self.private, key)]
        )
        return [(name, tensor) for part in parts for name, tensor in part._buffers.items() if tensor is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMRBank:
        """Follow `.to(device)`. A change of dtype is the model's and the base's: everything else stays exact."""
        if self.place is not None:
            return self._apply_here(fn, recurse)
        exact = (self.tau, self.scale, self.rescaler, *self.mask.children(), *self.private.children())
        kept = {buffers: dict(buffers._buffers) for buffers in exact}
        super()._apply(fn, recurse)
        for buffers, before in kept.items():
            for name, tensor in buffers._buffers.items():
                old = before[name]
                if tensor is not None and old is not None and tensor.dtype != old.dtype:
                    buffers._buffers[name] = old.to(tensor.device)
        return self

    def _apply_here(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> EMRBank:
        """Follow a change of dtype, but stay."""
        place, self.place = self.place, None
        try:
            return self._apply(lambda tensor: tensor.to(place, fn(tensor.new_empty(0)).dtype), recurse)
        finally:
            self.place = place

    def extra_repr(self) -> str:
        count: Any = len(self.tau._buffers)
        return f"{count} parameters, {len(self.rescaler._buffers)} tasks"
