"""Lengths and dtypes of tensors, checked before anything is computed with them.

The compiled loops are handed addresses and would read or write beyond a tensor that is too short; torch would spread a
single element over all of a tensor, or leave out the end of one. Both paths refuse the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import TensorError


def packed_size(numel: int) -> int:
    """Bytes of a packed mask of `numel` elements."""
    return (numel + 7) // 8


def require(what: str, tensor: Tensor, numel: int, *dtypes: torch.dtype) -> None:
    """Raise TensorError unless a tensor has so many elements, of one of the dtypes."""
    if tensor.numel() != numel:
        raise TensorError(f"{what}: expected {numel:,} elements, got {tensor.numel():,}")
    if tensor.dtype not in dtypes:
        raise TensorError(f"{what}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def require_floats(what: str, tensor: Tensor, numel: int) -> None:
    """Raise TensorError unless a tensor has so many elements, of any floating-point dtype."""
    require(what, tensor, numel, tensor.dtype)
    if not tensor.is_floating_point():
        raise TensorError(f"{what}: expected a floating-point dtype, got {tensor.dtype}")


def require_shape(what: str, shape: torch.Size, expected: torch.Size) -> None:
    """Raise TensorError unless two shapes are the same."""
    if shape != expected:
        raise TensorError(f"{what}: expected shape {list(expected)}, got {list(shape)}")


def require_number(what: str, found: int, expected: int) -> None:
    """Raise TensorError unless there are as many of something as there must be."""
    if found != expected:
        raise TensorError(f"{what}: expected {expected:,}, got {found:,}")


def require_part(what: str, part: slice, numel: int, step: int = 8) -> None:
    """Raise TensorError unless a slice lies within so many elements and begins at a multiple of `step`."""
    inside = part.step in (None, 1) and 0 <= part.start <= part.stop <= numel
    if not inside or part.start % step:
        raise TensorError(
            f"{what}: expected a part of {numel:,} elements that begins at a multiple of {step}, "
            f"got {part.start}:{part.stop}"
        )


def require_rows(what: str, tensor: Tensor) -> tuple[int, int]:
    """Rows and columns of a matrix of at least one row; raise TensorError where it is none."""
    if tensor.dim() != 2 or not len(tensor):
        raise TensorError(f"{what}: expected shape [tasks, elements] with at least one task, got {list(tensor.shape)}")
    return len(tensor), tensor.shape[1]
