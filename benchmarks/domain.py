"""A domain of `fidelity.py`: finetunes of one base, and the rows that each is examined on.

The rows that a task holds out of training are cut in two: the first are the test rows, which nothing is chosen by,
the next the validation rows. Rows and cuts are the same for every seed; a seed is of the training alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))

from training import Collate, Exam, Items  # noqa: E402

VALIDATION_ROWS = 200
"""At most, of a task."""


class Examiner(Protocol):
    """What tells how well a model does on rows of a task."""

    def accuracy(self, model: PreTrainedModel) -> float:
        """Return the share of rows that it gets right."""


@dataclass(frozen=True)
class Data:
    """The rows of one task; no row is in two of the three.

    Args:
        train: what was trained on.
        validation: what scales are chosen by.
        test: what is measured on.
        collate: items -> a batch.
    """

    train: Items
    validation: Items
    test: Items
    collate: Collate

    def exam(self, split: str) -> Examiner:
        """Return the exam on `"test"` or on `"validation"`."""
        items = getattr(self, split)
        if items and "input_ids" in items[0]:  # neighbours of like length need little padding
            items = sorted(items, key=lambda item: len(item["input_ids"]))
        return Exam(split, items, self.collate)

    def majority(self) -> float:
        """Return the share of test rows that have the most frequent label of the training rows."""
        label, _ = Counter(int(item["labels"]) for item in self.train).most_common(1)[0]
        return sum(int(item["labels"]) == label for item in self.test) / len(self.test)


@dataclass(frozen=True)
class Task:
    """One task, and where the model finetuned on it is.

    Args:
        folder: a model's or an adapter's.
        settings: everything that the finetune depends on, as JSON values.
        read: returns the rows.
    """

    folder: Path
    settings: Mapping[str, Any]
    read: Callable[[], Data]

    @cached_property
    def data(self) -> Data:
        return self.read()

    @property
    def epochs(self) -> float:
        """Passes over the training rows."""
        if "epochs" in self.settings:
            return self.settings["epochs"]
        training = self.settings["training"]
        return training["steps"] * training["batch"] / len(self.data.train)


@dataclass(frozen=True)
class Domain:
    """Finetunes of one base.

    Args:
        name: of the table.
        seed: of the training.
        base: folder of the pretrained model.
        tasks: name -> task.
        auto: the Auto class that loads base, finetunes and merged repos.
        adapter: `"lora"` or `"ia3"`, where the finetunes are adapters.
        classifies: whether a row has a label, rather than an answer to generate.
    """

    name: str
    seed: int
    base: Path
    tasks: Mapping[str, Task]
    auto: Any
    adapter: str | None = None
    classifies: bool = True

    def load(self, task: str) -> PreTrainedModel:
        """Return the finetune, head and all: of a LoRA the full model, of (IA)³ vectors the model with them on."""
        folder = self.tasks[task].folder
        if self.adapter is None:
            return self.auto.from_pretrained(folder)
        from peft import PeftModel

        model = self.auto.from_pretrained(self.base, config=AutoConfig.from_pretrained(folder))
        model = PeftModel.from_pretrained(model, folder)
        return model.merge_and_unload() if self.adapter == "lora" else model

    def load_base(self) -> dict[str, Tensor]:
        """Return the base's tensors of those that are merged; (IA)³ vectors start as ones."""
        if self.adapter == "ia3":
            return {name: torch.ones_like(vector) for name, vector in self.merged(self.load(next(iter(self.tasks))))}
        return dict(self.merged(self.auto.from_pretrained(self.base)))

    def merged(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors, by name, that are merged: all but heads, or the (IA)³ vectors alone."""
        for name, tensor in model.state_dict().items():
            if "ia3_" in name if self.adapter == "ia3" else not name.startswith("classifier."):
                yield name, tensor

    def head_bytes(self, model: PreTrainedModel) -> int:
        """Return the bytes of a finetune's head."""
        return sum(weight.nbytes for name, weight in model.named_parameters() if _is_active_head(name))

    @property
    def fingerprint(self) -> str:
        """What tells these finetunes from any others."""
        settings = {name: task.settings for name, task in self.tasks.items()}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _is_active_head(name: str) -> bool:
    # PEFT keeps, beside the head it trained, the one it found.
    return "classifier." in name and "original_module" not in name


def cut(held_out: Sequence[Any], rows: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return test and validation rows: the first `rows`, and the next `VALIDATION_ROWS` or what there is of them.

    Raises:
        ValueError: fewer than 50 rows are left to validate on.
    """
    validation = held_out[rows : rows + VALIDATION_ROWS]
    if len(validation) < 50:
        raise ValueError(f"{rows} test rows leave {len(validation)} of {len(held_out)} to choose scales by: too few")
    return held_out[:rows], validation
