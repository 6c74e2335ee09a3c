"""The compiled loops of csrc/: where the library is, and what of torch's tensors it can take.

They are used where they are built (docs/performance.md) and give the bits of the torch code that they stand in for, in
`election.py`, `bits.py`, `fitting.py` and `lowbit.py`. Set the environment variable `EMR_HF_KERNELS` to `off` to do
without them, or to `plain` for what runs on any processor.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

# As in csrc/kernels.cpp.
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TASK_VECTOR = 3


def _load() -> ctypes.CDLL | None:
    if _setting() == "off":
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # built for another machine
                return None
    return None


def _setting() -> str:
    return os.environ.get("EMR_HF_KERNELS", "")


_library = _load()
_level = 0 if _setting() == "plain" else 1
if _library is not None:
    _library.emr_elect_scratch.restype = ctypes.c_int64
    _library.emr_elect_scratch.argtypes = [ctypes.c_int64]
    _library.emr_elect.restype = ctypes.c_int32
    _library.emr_rebuild.restype = None
    _library.emr_fit_tasks.restype = ctypes.c_int64
    _library.emr_fit_vector.restype = None
    _library.emr_two_levels.restype = None
    _library.emr_compare.restype = None
    _library.emr_decode.restype = None


def available() -> bool:
    """Whether the compiled loops are there and wanted."""
    return _library is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the compiled loops can read and write these weights, vectors or packed masks."""
    return _library is not None and all(
        tensor.device.type == "cpu" and tensor.dtype in (*_KINDS, torch.uint8) and tensor.is_contiguous()
        for tensor in tensors
    )


def elect(
    base: Tensor,
    finetunes: Sequence[Tensor],
    are_vectors: Sequence[bool],
    tau: Tensor,
    masks: Sequence[Tensor],
    sums: Tensor,
    counts: Tensor,
    squares: Tensor,
) -> bool:
    """`election.elect_block`, which describes the arguments.

    Args:
        are_vectors: which of the finetunes are task vectors.

    Returns:
        whether all went well; else an input is not finite or the vector overflows.
    """
    assert _library is not None
    tasks = len(finetunes)
    scratch = torch.empty(_library.emr_elect_scratch(tasks), dtype=torch.uint8)
    kinds = [TASK_VECTOR if vector else _KINDS[t.dtype] for t, vector in zip(finetunes, are_vectors)]
    pointers = ctypes.c_void_p * tasks
    result = _library.emr_elect(
        _level,
        ctypes.c_int64(base.numel()),
        ctypes.c_int64(tasks),
        _address(base),
        _KINDS[base.dtype],
        pointers(*(t.data_ptr() for t in finetunes)),
        (ctypes.c_int32 * tasks)(*kinds),
        _address(tau),
        _KINDS[tau.dtype],
        pointers(*(mask.data_ptr() for mask in masks)),
        _address(sums),
        _address(counts),
        _address(squares),
        _address(scratch),
    )
    return result == 0


def rebuild(base: Tensor, tau: Tensor, packed: Tensor, minus_rescaler: float, out: Tensor) -> None:
    """`bits.rebuild` of flat tensors."""
    assert _library is not None
    _library.emr_rebuild(
        _level,
        ctypes.c_int64(out.numel()),
        _address(base),
        _KINDS[base.dtype],
        _address(tau),
        _KINDS[tau.dtype],
        _address(packed),
        ctypes.c_float(minus_rescaler),
        _address(out),
        _KINDS[out.dtype],
    )


def fits(taus: Tensor) -> bool:
    """Whether the compiled fits can take these task vectors, `(N, n)` float32."""
    if _library is None or not takes(taus) or taus.dtype != torch.float32:
        return False
    return len(taus) <= int(_library.emr_fit_tasks())


def fit_vector(taus: Tensor, rescalers: Tensor) -> Tensor:
    """`fitting.fit_vector`, for positive rescalers."""
    assert _library is not None
    tau, rescalers = torch.empty_like(taus[0]), rescalers.to(torch.float32).contiguous()
    count, tasks = ctypes.c_int64(taus.shape[1]), ctypes.c_int64(len(taus))
    _library.emr_fit_vector(_level, count, tasks, _address(taus), _address(rescalers), _address(tau))
    return tau


def two_levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """`fitting.two_levels`."""
    assert _library is not None
    low, high = torch.empty_like(values[0]), torch.empty_like(values[0])
    count, tasks = ctypes.c_int64(values.shape[1]), ctypes.c_int64(len(values))
    _library.emr_two_levels(_level, count, tasks, _address(values), _address(low), _address(high))
    return low, high


def compare(
    taus: Tensor,
    used: Tensor,
    shift: Tensor | None,
    rescalers: Tensor,
    of_moves: bool,
    masks: Sequence[Tensor],
    sums: Tensor,
    counts: Tensor,
) -> None:
    """`fitting.compare`, into zeros."""
    assert _library is not None
    tasks, count = taus.shape
    rescalers = rescalers.to(torch.float32).contiguous()
    _library.emr_compare(
        _level,
        ctypes.c_int64(count),
        ctypes.c_int64(tasks),
        _address(taus),
        _address(used),
        None if shift is None else _address(shift),
        _address(rescalers),
        ctypes.c_int32(of_moves),
        (ctypes.c_void_p * tasks)(*(mask.data_ptr() for mask in masks)),
        _address(sums),
        _address(counts),
    )


def decode(codes: Tensor, scales: Tensor, bits: int, start: int, count: int, columns: int) -> Tensor:
    """Elements of `lowbit.Codes`, from `start` on; `codes` begin with that element's."""
    assert _library is not None
    out = torch.empty(count)
    numbers = [ctypes.c_int64(number) for number in (count, start, columns, bits)]
    _library.emr_decode(_level, *numbers, _address(codes), _address(scales), _address(out))
    return out


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
