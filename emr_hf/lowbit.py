"""The unified vector in a few bits an element, with a scale for each row.

A code c of b bits stands for `(c - (2^b - 1) / 2) * scale`: no code is zero, so a code keeps the sign that was
elected, and what is in no mask may have any. Codes are packed in the order of the flat tensor, the first of a byte in
its lowest bits. A row is the shortest run of last dimensions with 32 elements: the inputs of one output of a linear or
convolutional layer, of one expert's too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .errors import TensorError
from .lengths import require, require_part
from .storage import TensorInfo

BITS = {"int8": 8, "int4": 4, "int2": 2}
"""dtype of a vector -> bits of a code."""

# Elements of a row; of a shorter one the scale would take more than one bit an element.
_SHORTEST = 32
# Where the search for a row's scale begins, as a share of its values' mean magnitude, and how often it goes on.
_FIRST_SCALE = {4: 0.45, 2: 1.0}
_ROUNDS = 6


def columns_of(shape: Sequence[int]) -> int | None:
    """Elements of a row; `None` where a tensor has no two rows, as a bias."""
    columns = 1
    for size in reversed(shape[1:]):
        columns *= size
        if columns >= _SHORTEST:
            return columns if torch.Size(shape).numel() > columns else None
    return None


def is_packed(dtype: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of the vector is stored in codes; one without rows stays float32."""
    return dtype in BITS and columns_of(shape) is not None


def infos(dtype: str, shape: Sequence[int]) -> tuple[TensorInfo, TensorInfo]:
    """What is stored of a tensor: its codes, uint8 `(ceil(numel * bits / 8),)`, and scales, float32 `(rows,)`."""
    numel = torch.Size(shape).numel()
    size, rows = -(-numel * BITS[dtype] // 8), numel // (columns_of(shape) or 1)
    return TensorInfo((size,), torch.uint8), TensorInfo((rows,), torch.float32)


@dataclass(frozen=True)
class Codes:
    """A part of the unified vector as it is stored.

    Attributes:
        codes: uint8 `(ceil(numel * bits / 8),)`.
        scales: float32 `(rows,)`.
        bits: of a code.
        shape: of the tensor.

    Raises:
        TensorError: codes or scales are not of the shape's length, or a code has a number of bits that none has.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    shape: torch.Size

    def __post_init__(self) -> None:
        if self.bits not in BITS.values():
            raise TensorError(f"bits of a code: expected 8, 4 or 2, got {self.bits}")
        require("codes", self.codes, -(-self.numel() * self.bits // 8), torch.uint8)
        require("scales", self.scales, self.numel() // self.columns, torch.float32)

    @property
    def columns(self) -> int:
        """Elements of a row; those of the last dimension where the tensor is a piece of another, or small."""
        return columns_of(self.shape) or max(self.shape[-1] if self.shape else 1, 1)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def numel(self) -> int:
        return self.shape.numel()

    def __getitem__(self, where: slice) -> Tensor:
        """Elements `start` (a multiple of 8) to `stop` of the flat tensor, float32."""
        require_part("codes", where, self.numel())
        count, columns = where.stop - where.start, self.columns
        packed = self.codes[where.start * self.bits // 8 : -(-where.stop * self.bits // 8)]
        if kernels.takes(packed, self.scales):
            return kernels.decode(packed, self.scales, self.bits, where.start, count, columns)
        values = _values(self.bits, packed.device)[packed.int()].reshape(-1)[:count]
        first, last = where.start // columns, -(-where.stop // columns)
        scales = self.scales[first:last].repeat_interleave(columns)
        return values * scales[where.start - first * columns :][:count]

    def dense(self) -> Tensor:
        """The whole tensor, float32."""
        return self[0 : self.numel()].reshape(self.shape)


@functools.cache
def _values(bits: int, device: torch.device) -> Tensor:
    """Byte -> the codes in it, less half of the largest one; `(256, 8 / bits)` float32."""
    byte = torch.arange(256, device=device)
    codes = [(byte >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(codes, 1).to(torch.float32) - (2**bits - 1) / 2


def encode(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of some rows.

    Of 8 bits the scale is the least that reaches the row's largest value. Of fewer it pays to cut off the largest:
    codes and scale are chosen for each other in turn (Lloyd, "Least squares quantization in PCM", 1982). Zeros, which
    are in no mask, do not count.

    Args:
        rows: `(r, columns)` float32, finite. Unless these are the last rows, `r * columns` is a multiple of 8.
        bits: of a code.

    Returns:
        packed codes, uint8, and scales, float32 `(r,)`.
    """
    outermost = (2**bits - 1) / 2
    if bits == 8:
        scales = rows.abs().amax(1) / outermost
    else:
        counted = rows != 0
        scales = rows.abs().sum(1) / counted.sum(1).clamp_min(1) * _FIRST_SCALE[bits]
        for _ in range(_ROUNDS):
            nearest = _nearest(rows, scales, bits) * counted
            scales = (nearest * rows).sum(1) / nearest.square().sum(1).clamp_min(1)
    codes = (_nearest(rows, scales, bits) + outermost).to(torch.uint8).reshape(-1)
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % (8 // bits))).view(-1, 8 // bits)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes << shifts).sum(1, dtype=torch.uint8), scales


def _nearest(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The code nearest to each value, less half of the largest one."""
    outermost = (2**bits - 1) / 2
    in_scales = rows / torch.where(scales > 0, scales, 1)[:, None]
    return (in_scales.floor() + 0.5).clamp(-outermost, outermost)
