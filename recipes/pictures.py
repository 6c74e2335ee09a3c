"""What sets of labelled pictures have in common."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Picture = tuple[np.ndarray, int]
"""Pixels, (height, width, 3) of bytes or (height, width) of grey ones, and the label's id."""


def distinct(pictures: Iterable[Picture], seen: Iterable[Picture] = ()) -> list[Picture]:
    """Return the first picture of those with the same pixels, leaving out those in `seen`."""
    known = {pixels.tobytes() for pixels, _ in seen}
    kept: dict[bytes, Picture] = {}
    for pixels, label in pictures:
        if (key := pixels.tobytes()) not in known:
            kept.setdefault(key, (pixels, label))
    return list(kept.values())


def to_rgb(grey: np.ndarray) -> np.ndarray:
    """(height, width) -> (height, width, 3)."""
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
