"""The rebuild of a task's weights on a GPU, in one pass.

Imports Triton: import this file only where that is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .errors import TensorError
from .lengths import packed_size, require, require_floats

_BLOCK = 1024


@triton.jit
def _rebuild(base, tau, packed, minus_rescaler, out, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    byte = tl.load(packed + index // 8, mask=inside, other=0).to(tl.int32)
    weight = tl.load(base + index, mask=inside, other=0).to(tl.float32)
    delta = tl.load(tau + index, mask=inside, other=0).to(tl.float32) * tl.load(minus_rescaler)
    kept = tl.where((byte >> (index % 8).to(tl.int32)) & 1 == 1, delta, 0.0)
    value = weight - kept
    if out.dtype.element_ty == tl.bfloat16:
        # To nearest, ties to even. Spelled out, since Triton's interpreter cuts off.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = tl.where(value == value, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        tl.store(out + index, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(out + index, value.to(out.dtype.element_ty), mask=inside)


def rebuild(base: Tensor, tau: Tensor, packed: Tensor, minus_rescaler: Tensor, out: Tensor) -> None:
    """`bits.rebuild` of flat, contiguous tensors on one device; `minus_rescaler` is a float32 scalar.

    Raises:
        TensorError: lengths or dtypes differ, or a tensor is not contiguous or elsewhere.
    """
    numel = out.numel()
    _check("base", base, numel, out.device)
    _check("unified vector", tau, numel, out.device)
    _check("packed mask", packed, packed_size(numel), out.device, torch.uint8)
    _check("rescaler", minus_rescaler, 1, out.device, torch.float32)
    _check("output", out, numel, out.device)
    blocks = triton.cdiv(numel, _BLOCK)
    if blocks:
        # Product and difference are rounded one after the other, as everywhere else.
        _rebuild[(blocks,)](base, tau, packed, minus_rescaler, out, numel, BLOCK=_BLOCK, enable_fp_fusion=False)


def _check(what: str, tensor: Tensor, numel: int, device: torch.device, *dtypes: torch.dtype) -> None:
    """Raise TensorError unless the kernel may read so many elements, by default floats, from the address on."""
    if dtypes:
        require(what, tensor, numel, *dtypes)
    else:
        require_floats(what, tensor, numel)
    if tensor.device != device or not tensor.is_contiguous():
        raise TensorError(
            f"{what}: expected a contiguous tensor on {device}, got strides {tensor.stride()} on {tensor.device}"
        )
