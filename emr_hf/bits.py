"""One-bit masks, and the formula of a task's weight.

A mask of n elements is `ceil(n / 8)` uint8: element i is bit `i % 8` (least significant first) of byte `i // 8` of the
flat tensor. Unused bits of the last byte are 0.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .lengths import packed_size, require, require_floats, require_number, require_part, require_shape
from .lowbit import Codes

# Elements rebuilt at a time on the CPU: small enough for the cache and for torch to stay on one thread.
_CHUNK = 1 << 15
# Elements decoded at a time there: what a piece costs by itself counts for more than the cache.
_DECODED = 1 << 18


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into a uint8 tensor of `(ceil(numel / 8),)`, on its device."""
    flat = mask.reshape(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Undo `pack`: a bool tensor of `shape`, on the packed tensor's device.

    Raises:
        TensorError: the mask is not of that shape's length.
    """
    numel = torch.Size(shape).numel()
    require("packed mask", packed, packed_size(numel), torch.uint8)
    return _unpack_flat(packed, 0, numel).to(torch.bool).reshape(shape)


def is_empty(packed: Tensor) -> bool:
    """Whether a packed mask has no element."""
    return not (packed.numpy().any() if packed.device.type == "cpu" else bool(packed.any()))


def _unpack_flat(packed: Tensor, start: int, stop: int) -> Tensor:
    """Elements `start` (a multiple of 8) to `stop` of a packed mask, as uint8 zeros and ones."""
    part = packed[start // 8 : packed_size(stop)]
    if part.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(part.numpy(), count=stop - start, bitorder="little"))
    shifts = torch.arange(8, dtype=torch.uint8, device=part.device)
    return ((part[:, None] >> shifts) & 1).reshape(-1)[: stop - start]


def rebuild(base: Tensor, tau: Tensor | Codes, packed: Tensor, rescaler: Tensor, out: Tensor | None = None) -> Tensor:
    """W_t' = W0 + lambda_t M_t tau (paper, equation 5): the one definition of a task's weight.

    Computed in float32 and rounded once, to `out`'s dtype. Where the mask is 0 the result is the base to the bit.

    Args:
        base: W0, any shape and float dtype.
        tau: the unified vector, of the base's shape, any float dtype, or codes of it.
        packed: the task's mask, uint8 `(ceil(numel / 8),)`.
        rescaler: lambda_t, a float32 scalar.
        out (*optional*): where to write; a new tensor of the base's shape and dtype by default.
            Its device is where the work is done, the inputs are moved there.

    Returns:
        `out`.

    Raises:
        TensorError: shapes, lengths or dtypes are not those above.
    """
    out = torch.empty_like(base, memory_format=torch.contiguous_format) if out is None else out
    require_shape("base", base.shape, out.shape)
    require_shape("unified vector", tau.shape, out.shape)
    require_floats("rescaler", rescaler, 1)
    device = out.device
    # Subtracting a masked +0.0 keeps every base as it is, -0.0 too; adding one would turn -0.0 into 0.0.
    minus_rescaler = -rescaler.to(device, torch.float32)
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=device)
    flat_out, flat_base = (t.detach().reshape(-1) for t in (target, base))
    if isinstance(tau, Codes):
        rebuild_part(flat_base, tau, packed, rescaler, flat_out, slice(0, flat_out.numel()))
        if target is not out:
            out.detach().copy_(target)
        return out
    flat_tau = tau.detach().reshape(-1)
    if kernels.takes(flat_out, flat_base, flat_tau, packed):
        kernels.rebuild(flat_base, flat_tau, packed, float(minus_rescaler), flat_out)
    elif device.type == "cuda" and _has_triton():
        from . import triton_kernels

        on_device = [given.to(device).contiguous() for given in (flat_base, flat_tau, packed)]
        triton_kernels.rebuild(on_device[0], on_device[1], on_device[2], minus_rescaler, flat_out)
    else:
        _rebuild_with_torch(flat_base, flat_tau, packed, minus_rescaler, flat_out)
    if not flat_out.is_inference():
        torch.autograd.graph.increment_version(flat_out)  # a backward through the old weights is an error
    if target is not out:
        out.detach().copy_(target)
    return out


def rebuild_part(
    base: Tensor, tau: Tensor | Codes, packed: Tensor, rescaler: Tensor, out: Tensor, part: slice
) -> None:
    """[`rebuild`] elements `start` (a multiple of 8) to `stop` of flat tensors."""
    numel = out.numel()
    require_part("elements to rebuild", part, numel)
    require_shape("base", base.shape, out.shape)
    require_number("elements of the unified vector", tau.numel(), numel)
    require("packed mask", packed, packed_size(numel), torch.uint8)
    step = max(part.stop - part.start, 1)
    if isinstance(tau, Codes) and out.device.type == "cpu":
        step = _DECODED
    for start in range(part.start, part.stop, step):
        piece = slice(start, min(start + step, part.stop))
        rebuild(base[piece], tau[piece], packed[start // 8 : packed_size(piece.stop)], rescaler, out[piece])


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _rebuild_with_torch(base: Tensor, tau: Tensor, packed: Tensor, minus_rescaler: Tensor, out: Tensor) -> None:
    """[`rebuild`] of flat tensors, by its definition."""
    device, numel = out.device, out.numel()
    require("packed mask", packed, packed_size(numel), torch.uint8)
    for what, tensor in (("base", base), ("unified vector", tau), ("output", out)):
        require_floats(what, tensor, numel)
    step = _CHUNK if device.type == "cpu" else max(numel, 1)
    for start in range(0, numel, step):
        part = slice(start, min(start + step, numel))
        delta = tau[part].to(device, torch.float32) * minus_rescaler
        keep = _unpack_flat(packed, part.start, part.stop).to(device, torch.int32).neg_()  # 0 or all ones
        delta.view(torch.int32).bitwise_and_(keep)
        out[part] = base[part].to(device, torch.float32) - delta


@dataclass(frozen=True)
class StoredVector:
    """lambda_t M_t tau: what a merge has kept of a task vector, made a piece at a time.

    Attributes:
        tau, packed, rescaler: as for [`rebuild`].

    Raises:
        TensorError: the mask is not of the vector's length, or there is not one rescaler.
    """

    tau: Tensor | Codes
    packed: Tensor
    rescaler: Tensor

    def __post_init__(self) -> None:
        require("packed mask", self.packed, packed_size(self.tau.numel()), torch.uint8)
        require_floats("rescaler", self.rescaler, 1)

    def __getitem__(self, where: slice) -> Tensor:
        """Elements `start` (a multiple of 8) to `stop` of the flat vector, float32."""
        require_part("vector", where, self.tau.numel())
        tau = self.tau[where] if isinstance(self.tau, Codes) else self.tau.reshape(-1)[where]
        packed = self.packed[where.start // 8 : packed_size(where.stop)]
        return rebuild(torch.zeros(tau.shape, dtype=torch.float32), tau, packed, self.rescaler)
