"""The compiled loops of csrc/: where the library is, and what of torch's tensors it can take.

They are used where they are built (docs/performance.md) and give the bits of the torch code that they stand in for, in
`election.py`, `bits.py`, `fitting.py` and `lowbit.py`. Set the environment variable `EMR_HF_KERNELS` to `off` to do
without them, or to `plain` for what runs on any processor.

C gets no address here but from `_address`, which raises TensorError unless the tensor is as long as the loop will take
it to be, whoever calls.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from .errors import TensorError
from .lengths import packed_size, require, require_number, require_rows

# As in csrc/kernels.cpp.
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TASK_VECTOR = 3
_UNIT = 1 << 14
_CODE_BITS = (2, 4, 8)


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
# The same functions called with Python's lock held: none of them is under way when another thread forks.
_guards = None if _library is None else ctypes.PyDLL(_library._name, handle=_library._handle)
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
if _guards is not None:
    _guards.emr_watch.restype = ctypes.c_void_p
    _guards.emr_hits.restype = ctypes.c_int64
    _guards.emr_all_hits.restype = ctypes.c_int64


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
    numel, tasks, units = base.numel(), len(finetunes), -(-base.numel() // _UNIT)
    require_number("task vectors", len(are_vectors), tasks)
    scratch = torch.empty(_library.emr_elect_scratch(tasks), dtype=torch.uint8)
    given = list(zip(finetunes, are_vectors))
    inputs = [_address("finetune", t, numel, *([torch.float32] if vector else _KINDS)) for t, vector in given]
    kinds = [TASK_VECTOR if vector else _KINDS[tensor.dtype] for tensor, vector in given]
    result = _library.emr_elect(
        _level,
        ctypes.c_int64(numel),
        ctypes.c_int64(tasks),
        _address("base", base, numel, *_KINDS),
        _KINDS[base.dtype],
        (ctypes.c_void_p * tasks)(*inputs),
        (ctypes.c_int32 * tasks)(*kinds),
        _address("unified vector", tau, numel, *_KINDS),
        _KINDS[tau.dtype],
        _mask_addresses(masks, tasks, numel),
        _address("sums", sums, units * tasks * 5, torch.float64),
        _address("counts", counts, tasks * 2, torch.int64),
        _address("squares", squares, units * 2, torch.float64),
        _address("scratch", scratch, scratch.numel(), torch.uint8),
    )
    return result == 0


def rebuild(base: Tensor, tau: Tensor, packed: Tensor, minus_rescaler: float, out: Tensor) -> None:
    """`bits.rebuild` of flat tensors."""
    assert _library is not None
    numel = out.numel()
    _library.emr_rebuild(
        _level,
        ctypes.c_int64(numel),
        _address("base", base, numel, *_KINDS),
        _KINDS[base.dtype],
        _address("unified vector", tau, numel, *_KINDS),
        _KINDS[tau.dtype],
        _address("packed mask", packed, packed_size(numel), torch.uint8),
        ctypes.c_float(minus_rescaler),
        _address("output", out, numel, *_KINDS),
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
    tasks, count = _size_to_fit(taus)
    tau, rescalers = torch.empty(count, dtype=torch.float32), rescalers.to(torch.float32).contiguous()
    _library.emr_fit_vector(
        _level,
        ctypes.c_int64(count),
        ctypes.c_int64(tasks),
        _address("task vectors", taus, tasks * count, torch.float32),
        _address("rescalers", rescalers, tasks, torch.float32),
        _address("vector", tau, count, torch.float32),
    )
    return tau


def two_levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """`fitting.two_levels`."""
    assert _library is not None
    tasks, count = _size_to_fit(values)
    low, high = torch.empty(2, count, dtype=torch.float32)
    _library.emr_two_levels(
        _level,
        ctypes.c_int64(count),
        ctypes.c_int64(tasks),
        _address("task vectors", values, tasks * count, torch.float32),
        _address("low", low, count, torch.float32),
        _address("high", high, count, torch.float32),
    )
    return low, high


def _size_to_fit(taus: Tensor) -> tuple[int, int]:
    """Tasks and elements of what a fit is given; it holds no more than so many tasks' values."""
    assert _library is not None
    tasks, count = require_rows("task vectors", taus)
    if tasks > (most := int(_library.emr_fit_tasks())):
        raise TensorError(f"task vectors: expected at most {most} tasks, got {tasks}")
    return tasks, count


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
    tasks, count = require_rows("task vectors", taus)
    rescalers = rescalers.to(torch.float32).contiguous()
    _library.emr_compare(
        _level,
        ctypes.c_int64(count),
        ctypes.c_int64(tasks),
        _address("task vectors", taus, tasks * count, torch.float32),
        _address("vector", used, count, torch.float32),
        None if shift is None else _address("shift", shift, count, torch.float32),
        _address("rescalers", rescalers, tasks, torch.float32),
        ctypes.c_int32(of_moves),
        _mask_addresses(masks, tasks, count),
        _address("sums", sums, -(-count // _UNIT) * tasks * 5, torch.float64),
        _address("counts", counts, tasks * 3, torch.int64),
    )


def decode(codes: Tensor, scales: Tensor, bits: int, start: int, count: int, columns: int) -> Tensor:
    """Elements of `lowbit.Codes`, from `start` on; `codes` begin with that element's."""
    assert _library is not None
    if bits not in _CODE_BITS:
        raise TensorError(f"bits of a code: expected 2, 4 or 8, got {bits}")
    if min(start, count) < 0 or columns < 1 or start + count > columns * scales.numel():
        raise TensorError(
            f"scales: expected those of elements {start:,} to {start + count:,} in rows of {columns:,}, "
            f"got {scales.numel():,} scales"
        )
    out = torch.empty(count, dtype=torch.float32)
    _library.emr_decode(
        _level,
        *(ctypes.c_int64(number) for number in (count, start, columns, bits)),
        _address("codes", codes, -(-count * bits // 8), torch.uint8),
        _address("scales", scales, scales.numel(), torch.float32),
        _address("values", out, count, torch.float32),
    )
    return out


def _address(what: str, tensor: Tensor, numel: int, *dtypes: torch.dtype) -> ctypes.c_void_p:
    """Where so many elements of one of the dtypes are, one after the other."""
    if tensor.numel() == numel and tensor.dtype in dtypes and tensor.is_cpu and tensor.is_contiguous():
        return ctypes.c_void_p(tensor.data_ptr())
    require(what, tensor, numel, *dtypes)
    how = "contiguous" if tensor.is_cpu else "on the CPU"
    raise TensorError(f"{what}: expected a tensor {how}, got strides {tensor.stride()} on {tensor.device}")


def _mask_addresses(masks: Sequence[Tensor], tasks: int, numel: int) -> ctypes.Array[ctypes.c_void_p]:
    require_number("packed masks", len(masks), tasks)
    places = [_address("packed mask", mask, packed_size(numel), torch.uint8) for mask in masks]
    return (ctypes.c_void_p * tasks)(*places)


# Guarded reads of mapped files, see csrc/guard.cpp; nothing is guarded where there is no compiled file


def begin_guard() -> None:
    """Let reads of watched tensors find zeros where their file has been cut short."""
    if _guards is not None:
        _guards.emr_guard_begin()


def end_guard() -> None:
    """Undo one [`begin_guard`]."""
    if _guards is not None:
        _guards.emr_guard_end()


def watch(address: int, length: int) -> int | None:
    """Watch bytes of memory until [`unwatch`], before which they must stay; `None` where nothing can be guarded."""
    if _guards is None:
        return None
    return _guards.emr_watch(ctypes.c_size_t(address), ctypes.c_size_t(length))


def unwatch(watched: int) -> None:
    """Undo [`watch`]."""
    assert _guards is not None
    _guards.emr_unwatch(ctypes.c_void_p(watched))


def hits(watched: int) -> int:
    """How often a read of what [`watch`] watches has found zeros."""
    assert _guards is not None
    return int(_guards.emr_hits(ctypes.c_void_p(watched)))


def all_hits() -> int:
    """[`hits`] of everything that has ever been watched."""
    return 0 if _guards is None else int(_guards.emr_all_hits())
