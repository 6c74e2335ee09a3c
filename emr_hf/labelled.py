"""Labelled data sets, read by the library `datasets`: rows of text, of pairs of texts, or of images."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError, OptionError, nearest, one_line, short
from .regular_file import require_file

FILES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
SINGLE = {"text": ("text", "sentence"), "image": ("image", "img")}
LABELS = ("label", "labels")
_MOST_NAMES = 50  # in a message


@dataclass
class LabelledData:
    """Rows to classify.

    Attributes:
        columns: one sequence of texts or images, or two of pairs, of a value a row.
        labels: as they are in the data.
        label_names: names of the ids, where the data tells them.
    """

    columns: list[Sequence[Any]]
    labels: list[Any]
    label_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)


def read_data(
    data: str | Path,
    config: str | None,
    split: str | None,
    text_column: str | Sequence[str] | None,
    label_column: str | None,
    rows: int | None,
    kind: str,
) -> LabelledData:
    """Read labelled rows.

    Args:
        data, config, split, text_column, label_column, rows: as for [`evaluate_task`].
        kind: `"text"` or `"image"`.

    Raises:
        OptionError: the data cannot be read, or lacks what is asked for.
    """
    found = _one_split(_load(str(data), config, split), split, data)
    names = list(found.column_names)
    columns = _input_columns(names, [text_column] if isinstance(text_column, str) else text_column, kind, data)
    label = _column(names, label_column, data) if label_column else next((n for n in LABELS if n in names), None)
    if label is None:
        raise OptionError(
            f"{data} has no column {' or '.join(LABELS)}: name it (--label-column). It has: {_list(names)}"
        )
    if rows is not None:
        found = found.select(range(min(rows, len(found))))
    if len(found) == 0:
        raise OptionError(f"{data} has no rows")
    if kind == "text":
        values: list[Sequence[Any]] = [list(found[name]) for name in columns]
        for name, column in zip(columns, values):
            _check_texts(column, name, data)
    else:
        values = [_Pictures(found, columns[0], Path(data).parent)]
        values[0][0]  # noqa: B018 - what is no picture is told before the model is loaded
    return LabelledData(values, list(found[label]), getattr(found.features[label], "names", None))


def _load(data: str, config: str | None, split: str | None) -> Any:
    """What `datasets` makes of it: a `Dataset`, or a `DatasetDict` of several."""
    try:
        import datasets
    except ImportError:
        raise OptionError(
            "reading labelled data needs the library datasets, which is not installed: pip install 'emr_hf[eval]'"
        ) from None
    path = Path(data)
    try:
        if path.is_dir():
            saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
            if not saved:
                return datasets.load_dataset(data, config)
            _refuse_config(config, data)
            found = datasets.load_from_disk(data)
            if split is not None and not isinstance(found, dict):
                raise OptionError(f"split={short(split)}: {data} is one data set, which has no splits to choose from")
            return found
        if path.suffix.lower() in FILES or os.path.lexists(path):
            _refuse_config(config, data)
            return _load_file(datasets, path)
        name, _, hub_split = data.partition(":")
        if split and hub_split and split != hub_split:
            raise OptionError(f"split={short(split)}: {data} names another one")
        return datasets.load_dataset(name, config, split=split or hub_split or None)
    except OptionError:
        raise
    except CheckpointError as error:
        raise OptionError(str(error)) from None
    except Exception as error:  # the library raises many kinds
        raise OptionError(f"cannot read the data {data}: {one_line(error.__cause__ or error)}") from None


def _refuse_config(config: str | None, data: str) -> None:
    if config is not None:
        raise OptionError(
            f"config={short(config)}: {data} is one data set, which has no configurations to choose from"
        )


def _load_file(datasets: Any, path: Path) -> Any:
    if path.suffix.lower() not in FILES:
        raise OptionError(f"{path}: expected a file that ends in {', '.join(FILES)}")
    if not os.path.lexists(path):
        raise OptionError(f"{path}: there is no such file")
    require_file(path, "data")
    kind, options = FILES[path.suffix.lower()], {}
    if kind == "csv":  # only what is empty is missing: NA and None are texts and labels like any other
        options = {"keep_default_na": False, "na_values": [""]}
    if path.suffix.lower() == ".tsv":
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    return datasets.load_dataset(kind, data_files=str(path), **options)


def _one_split(found: Any, split: str | None, data: object) -> Any:
    if not isinstance(found, dict):
        return found
    if split is not None and split not in found:
        raise OptionError(f"{data} has no split {short(split)}.{nearest(split, found)} It has: {_list(found)}")
    if split is None and len(found) > 1:
        raise OptionError(f"{data} has several splits: choose one (--split). It has: {_list(found)}")
    return found[split or next(iter(found))]


def _list(names: Any) -> str:
    texts = [one_line(name, 100) for name in names]
    return ", ".join(texts if len(texts) <= _MOST_NAMES else [*texts[:_MOST_NAMES], "..."])


def _column(names: Sequence[str], name: str, data: object) -> str:
    if name not in names:
        raise OptionError(f"{data} has no column {short(name)}.{nearest(name, names)} It has: {_list(names)}")
    return name


def _input_columns(names: Sequence[str], asked: Sequence[str] | None, kind: str, data: object) -> list[str]:
    most = 2 if kind == "text" else 1
    if asked is not None:
        if not 1 <= len(asked) <= most:
            raise OptionError(
                f"text_column={short(list(asked))}: expected {'one or two columns' if most == 2 else 'one column'}"
            )
        return [_column(names, name, data) for name in asked]
    if kind == "text":
        for pair in PAIRS:
            if set(pair) <= set(names):
                return list(pair)
    for name in SINGLE[kind]:
        if name in names:
            return [name]
    usual = " or ".join(SINGLE[kind])
    raise OptionError(f"{data} has no column {usual}: name the {kind} column (--text-column). It has: {_list(names)}")


def _check_texts(values: Sequence[Any], column: str, data: object) -> None:
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise OptionError(f"{data}, row {row}: {short(column)} is {short(value)}, expected a text")


class _Pictures(Sequence[Any]):
    """A column of images, opened when asked for: as the data set has them, or by path relative to its file."""

    def __init__(self, rows: Any, column: str, folder: Path):
        self._rows, self._column, self._folder = rows, column, folder

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        try:
            from PIL import Image
        except ImportError:
            raise OptionError("reading images needs pillow, which is not installed: pip install pillow") from None
        try:
            value = self._rows[row][self._column]  # `datasets` opens what it knows for a picture
            if not isinstance(value, str):
                return value.convert("RGB")
            require_file(self._folder / value, "image")
            image = Image.open(self._folder / value)
            image.load()
            return image
        except Exception as error:  # a file that is damaged, of a kind of its own for each format
            raise OptionError(f"row {row}: {short(self._column)} is no image: {one_line(error)}") from None


def label_ids(
    labels: Sequence[Any], label_names: Sequence[str] | None, id2label: Mapping[int, str], task: str
) -> list[int]:
    """The task's ids of labels that are given as names or ids.

    Args:
        labels: a value a row: a name, with or without capitals, or an id. A number is a name if all labels are names.
        label_names: names of the data's ids, where it tells them. They are what counts where the task has one of them.
        id2label: the task's.
        task: its name, for the error.

    Raises:
        OptionError: labels that the task does not have, with those that it has.
    """
    exact = {name: index for index, name in id2label.items()}
    lower = {name.lower(): index for index, name in id2label.items()}
    if label_names is not None and any(name.lower() in lower for name in label_names):
        labels = [label_names[int(label)] if _is_id(label, range(len(label_names))) else label for label in labels]

    texts = [_text(label) for label in labels]
    ids = [None if text is None else exact.get(text, lower.get(text.strip().lower())) for text in texts]
    if None in ids:  # a task of names such as 1 to 5 has them as names, where all labels are names
        for row, text in enumerate(texts):
            if text is not None and text.strip().isdecimal():
                ids[row] = int(text) if int(text) in id2label else None
    unknown = dict.fromkeys(short(label) for label, found in zip(labels, ids) if found is None)
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        known = _list(f"{name} ({index})" for index, name in sorted(id2label.items()))
        raise OptionError(f"{task} does not have the labels {_list(list(unknown)[:5])}{more}. It has: {known}")
    return [found for found in ids if found is not None]


def _text(label: Any) -> str | None:
    """A label as text; `None` for what is neither that nor a whole number."""
    if isinstance(label, str):
        return label
    return str(int(label)) if _is_whole(label) else None


def _is_whole(label: Any) -> bool:
    return isinstance(label, (int, float)) and math.isfinite(label) and label == int(label)


def _is_id(label: Any, known: Any) -> bool:
    return _is_whole(label) and int(label) in known
