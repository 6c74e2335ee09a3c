"""MNIST's file format, idx."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def read_idx(path: Path) -> np.ndarray:
    """Return the array of bytes in a gzip file of format idx: a header of big-endian numbers, then the bytes."""
    data = gzip.decompress(path.read_bytes())
    zeros, kind, dimensions = struct.unpack(">HBB", data[:4])
    if (zeros, kind) != (0, 8):
        raise ValueError(f"{path.name} does not hold an array of bytes in format idx")
    start = 4 + 4 * dimensions
    return np.frombuffer(data, np.uint8, offset=start).reshape(struct.unpack(f">{dimensions}I", data[4:start]))
