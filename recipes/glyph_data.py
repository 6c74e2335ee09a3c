"""Thirty tasks of letters: which letter of a script a picture shows, rendered from the Noto fonts of Debian.

python recipes/glyph_data.py  # renders what the cache lacks and prints the size of every task

Where a script has two families of fonts, the pictures to test on are of one of them, as a rule the one with serifs,
and there of every second font; the others are trained on. Where it has one family, they are of its thinnest and its
boldest fonts, or of the boldest of four; of Tifinagh's regional styles, they are of two. All pictures, those to test
on too, are turned, scaled and moved a little at random, as there are few fonts of some scripts: several pictures may
then show the same letter of the same font.
Pixels may differ between versions of Pillow, which brings its own FreeType.
"""

from __future__ import annotations

import functools
import itertools
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from cache import build_once, cache_root
from pictures import Picture, distinct
from PIL import Image, ImageFont
from registry import NOTO_CORE, NOTO_EXTRA, Package, fetch
from training import SEED

SIDE = 28
INK = 20
"""Pixels that the longer side of a letter takes, before it is scaled."""
FONT_SIZE = 64
MAX_LETTERS = 46
TRAIN_ROWS, TEST_ROWS = 1200, 400
TURN, SCALE, SHIFT = 8.0, (0.85, 1.1), 2
"""At most: degrees to either side, of the size, pixels in each direction."""


@dataclass(frozen=True)
class GlyphTask:
    """One script.

    Args:
        name: of the task.
        block: the first and last code point to take letters from, in order and at most `MAX_LETTERS`.
        train, test: patterns of the names of the fonts to train on, and of those to take the fonts to test on from,
            `.ttf` left out.
    """

    name: str
    block: tuple[int, int]
    train: tuple[str, ...]
    test: tuple[str, ...]

    def fonts(self, folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
        """Return the fonts to train and to test on: of more than two of a family for testing every second."""
        test = find_fonts(folders, self.test)
        known = test[::2] if len(test) > 2 else []
        test = [font for font in test if font not in known]
        return [font for font in find_fonts(folders, self.train + self.test) if font not in test], test

    def letters(self, fonts: Iterable[Path]) -> list[str]:
        """Return the letters that all of the fonts have; a label is a place in this list."""
        first, last = self.block
        letters = [chr(code) for code in range(first, last + 1)]
        letters = [letter for letter in letters if unicodedata.category(letter) in ("Lu", "Ll", "Lo")]
        for font in fonts:
            letters = covered(open_font(font), letters)
        return letters[:MAX_LETTERS]


def find_fonts(folders: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    """Return the fonts with one of the names, in the order of their names."""
    found = {path for folder in folders for pattern in patterns for path in folder.glob(f"{pattern}.ttf")}
    return sorted(found, key=lambda path: path.name)


@functools.lru_cache(maxsize=256)
def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """Return the font, in the size to draw at."""
    # The other engine, which need not be there, may exchange glyphs; a letter on its own needs none of that.
    return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def covered(font: ImageFont.FreeTypeFont, letters: Sequence[str]) -> list[str]:
    """Return those letters for which the font draws something other than its sign for what it lacks."""
    lacking = font.getmask("\U0010ffff")
    masks = {letter: font.getmask(letter) for letter in letters}
    return [
        letter
        for letter, mask in masks.items()
        if mask.getbbox() is not None and (mask.size != lacking.size or bytes(mask) != bytes(lacking))
    ]


def draw(font: ImageFont.FreeTypeFont, letter: str, chance: random.Random) -> np.ndarray:
    """Return a letter, white on black, (SIDE, SIDE) of bytes."""
    mask = font.getmask(letter)
    ink = Image.frombytes("L", mask.size, bytes(mask)).crop(mask.getbbox())
    scale = INK / max(ink.size) * chance.uniform(*SCALE)
    ink = ink.rotate(chance.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=True)
    ink = ink.resize([max(1, round(scale * side)) for side in ink.size], Image.Resampling.LANCZOS)
    canvas = Image.new("L", (SIDE, SIDE))
    corner = [(SIDE - side) // 2 + chance.randint(-SHIFT, SHIFT) for side in ink.size]
    canvas.paste(ink, tuple(corner))
    return np.asarray(canvas)


def render(fonts: Sequence[Path], letters: Sequence[tuple[str, int]], rows: int, seed: str) -> list[Picture]:
    """Return `rows` distinct pictures of (letter, label) in the fonts, or somewhat fewer where some are the same.

    Each letter is drawn in each font equally often, give or take one; where that makes too many, some are left out
    at random.
    """
    chance = random.Random(seed)
    pairs = list(itertools.product(fonts, letters))
    chance.shuffle(pairs)
    chosen = itertools.islice(itertools.cycle(pairs), rows)
    return distinct((draw(open_font(font), letter, chance), label) for font, (letter, label) in chosen)


def load_glyphs(task: GlyphTask) -> tuple[list[Picture], list[Picture]]:
    """Return the pictures, pixels (SIDE, SIDE) and label, of `task` to train and to test on; renders the first time.

    No picture is in both.
    """
    packages = (NOTO_CORE, NOTO_EXTRA)
    test = render_once(f"glyphs/{task.name}", [task], packages, TEST_ROWS, test=True)
    train = render_once(f"glyphs/{task.name}", [task], packages, TRAIN_ROWS, test=False)
    return distinct(train, seen=test), test


def render_once(
    name: str, scripts: Sequence[GlyphTask], packages: Sequence[Package], rows: int, test: bool
) -> list[Picture]:
    """Return pictures of the letters of one script, labelled by letter, or of several, labelled by script.

    Args:
        name: where the cache keeps them.
        scripts: whose letters; each has a like share of the rows.
        packages: where to look for fonts.
        rows: how many pictures.
        test: whether in the fonts to test on or to train on.
    """
    settings = {
        "scripts": [asdict(script) for script in scripts],
        "packages": [package.sha256 for package in packages],
        "rows": rows,
        "test": test,
        "held out": "every second",
        "sizes": [SIDE, INK, FONT_SIZE, MAX_LETTERS],
        "jitter": [TURN, SCALE, SHIFT],
        "seed": SEED,
    }

    def build(folder: Path) -> None:
        pictures = _render_scripts(scripts, [fetch(package) for package in packages], rows, test, name.split("/")[0])
        pixels, labels = zip(*pictures, strict=True)
        np.savez_compressed(folder / "pictures.npz", pixels=np.stack(pixels), labels=np.array(labels))

    folder = build_once(cache_root() / "rendered" / name / ("test" if test else "train"), settings, build)
    with np.load(folder / "pictures.npz") as arrays:
        return list(zip(arrays["pixels"], arrays["labels"].tolist(), strict=True))


def _render_scripts(
    scripts: Sequence[GlyphTask], folders: Sequence[Path], rows: int, test: bool, purpose: str
) -> Iterator[Picture]:
    for place, script in enumerate(scripts):
        fonts = script.fonts(folders)
        letters = script.letters(itertools.chain(*fonts))
        labels = range(len(letters)) if len(scripts) == 1 else itertools.repeat(place)
        seed = f"{SEED} {purpose} {script.name} {test}"
        yield from render(fonts[test], list(zip(letters, labels)), rows // len(scripts), seed)


def _serif(name: str, first: int, last: int) -> GlyphTask:
    """A script of a family without serifs to train on, and one with them to test on."""
    family = name.title() if name not in ("latin", "greek", "cyrillic") else ""
    return GlyphTask(name, (first, last), (f"NotoSans{family}-*",), (f"NotoSerif{family}-*",))


def _extremes(name: str, first: int, last: int, family: str, *test: str) -> GlyphTask:
    """A script of one family, whose extreme weights, `test`, are tested on."""
    return GlyphTask(name, (first, last), (f"{family}-*",), tuple(f"{family}-{weight}" for weight in test))


GLYPH_TASKS = {
    task.name: task
    for task in (
        _serif("latin", 0x41, 0x5A),
        _serif("greek", 0x391, 0x3A9),
        _serif("cyrillic", 0x410, 0x42F),
        _serif("armenian", 0x531, 0x556),
        _serif("hebrew", 0x5D0, 0x5EA),
        _serif("devanagari", 0x905, 0x939),
        _serif("bengali", 0x985, 0x9B9),
        _serif("gurmukhi", 0xA05, 0xA39),
        _serif("gujarati", 0xA85, 0xAB9),
        _serif("tamil", 0xB85, 0xBB9),
        _serif("telugu", 0xC05, 0xC39),
        _serif("kannada", 0xC85, 0xCB9),
        _serif("malayalam", 0xD05, 0xD39),
        _serif("sinhala", 0xD85, 0xDC6),
        _serif("thai", 0xE01, 0xE2E),
        _serif("lao", 0xE81, 0xEAE),
        _serif("myanmar", 0x1000, 0x102A),
        _serif("georgian", 0x10D0, 0x10F0),
        _serif("ethiopic", 0x1200, 0x1247),
        _serif("khmer", 0x1780, 0x17A2),
        _serif("balinese", 0x1B05, 0x1B33),
        GlyphTask("arabic", (0x621, 0x64A), ("NotoSansArabic-*", "NotoKufiArabic-*"), ("NotoNaskhArabic-*",)),
        GlyphTask(
            "tifinagh",
            (0x2D30, 0x2D67),
            ("NotoSansTifinagh*-*",),
            ("NotoSansTifinaghAdrar-*", "NotoSansTifinaghGhat-*"),
        ),
        _extremes("thaana", 0x780, 0x7A5, "NotoSansThaana", "Thin", "Black"),
        _extremes("tibetan", 0xF40, 0xF6C, "NotoSerifTibetan", "Thin", "Black"),
        _extremes("cherokee", 0x13A0, 0x13F4, "NotoSansCherokee", "Thin", "Black"),
        _extremes("canadian", 0x142F, 0x166C, "NotoSansCanadianAboriginal", "Thin", "Black"),
        _extremes("ol-chiki", 0x1C5A, 0x1C77, "NotoSansOlChiki", "Bold"),
        _extremes("cham", 0xAA00, 0xAA28, "NotoSansCham", "Thin", "Black"),
        _extremes("meetei-mayek", 0xABC0, 0xABE2, "NotoSansMeeteiMayek", "Thin", "Black"),
    )
}
"""The tasks, by name. Of Latin, Greek, Cyrillic and Armenian letters the capitals are taken."""


if __name__ == "__main__":
    for glyph_task in GLYPH_TASKS.values():
        train, test = load_glyphs(glyph_task)
        count = len({label for _, label in train})
        print(f"{glyph_task.name:13} {count:2} letters, {len(train):4} pictures to train on, {len(test):3} to test on")
