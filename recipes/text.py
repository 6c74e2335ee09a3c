"""Finetune one MiniLM classifier per text task into the cache, for `text.yaml` to merge.

python recipes/text.py               # all four tasks
python recipes/text.py polarity      # one of them
python recipes/text.py --model out/  # accuracies of a repo merged by text.yaml
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from cache import build_once, cache_root
from registry import MINILM, fetch
from text_data import TASKS, TEST_ROWS, Row, TextTask, load_split
from training import SEED, Exam, Workbench, announce, seeded, train
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# Weight decay, as usual in finetuning, moves every row of the embedding, also those of words never seen.
TRAINING = {"weight_decay": 0.01, "per_device_train_batch_size": 16, "warmup_steps": 0.1}
QUICK = {"train_rows": 64, "epochs": 1}


def models_folder(quick: bool = False, seed: int = SEED) -> Path:
    """Return the folder with one finetuned model per task."""
    return cache_root() / "models" / seeded("text-quick" if quick else "text", seed)


def finetune(task: TextTask, quick: bool = False, seed: int = SEED) -> Path:
    """Return the folder of the model finetuned on `task`, training it the first time."""
    settings = training_settings(task, quick, seed=seed)
    return build_once(models_folder(quick, seed) / task.name, settings, lambda fresh: _train(task, settings, fresh))


def training_settings(task: TextTask, quick: bool = False, **changes: Any) -> dict[str, Any]:
    """Return everything the finetuned model depends on, as JSON values.

    Args:
        task (`TextTask`): what is trained on.
        quick (`bool`): a smoke test's few rows and one epoch.
        changes: settings that differ from those of a full finetune.
    """
    return {
        **TRAINING,
        "learning_rate": task.learning_rate,
        "train_rows": task.train_rows,
        "epochs": task.epochs,
        "task": task.name,
        "max_length": task.max_length,
        "seed": SEED,
        "test_rows": TEST_ROWS,
        "encoder": MINILM.sha256,
        "data": task.package.sha256,
        **changes,
        **(QUICK if quick else {}),
    }


def _train(task: TextTask, settings: dict[str, Any], folder: Path) -> None:
    train_classifier(task, settings, folder, lambda model: model)


def train_classifier(
    task: TextTask, settings: dict[str, Any], folder: Path, prepare: Callable[[PreTrainedModel], PreTrainedModel]
) -> PreTrainedModel:
    """Train a new classifier as `settings` say, after `prepare`, and save it with its tokenizer; returns it."""
    split = load_split(task, settings["train_rows"])
    announce(folder.name, split.train, settings)
    set_seed(settings["seed"])
    tokenizer = AutoTokenizer.from_pretrained(fetch(MINILM))
    model = new_classifier(split.labels)
    train(
        prepare(model),
        encode(split.train, split.labels, tokenizer, task.max_length),
        folder,
        DataCollatorWithPadding(tokenizer),
        seed=settings["seed"],
        num_train_epochs=settings["epochs"],
        train_sampling_strategy="group_by_length",
        **{name: settings[name] for name in ("learning_rate", *TRAINING)},
    )
    tokenizer.save_pretrained(folder)
    return model


def new_classifier(labels: list[str]) -> PreTrainedModel:
    """Return the pretrained encoder under a fresh head with one output per label."""
    return AutoModelForSequenceClassification.from_pretrained(
        fetch(MINILM), id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
    )


def encode(
    rows: list[Row], labels: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, Any]]:
    """Turn rows into the items a `Trainer` takes."""
    ids = {label: i for i, label in enumerate(labels)}
    texts = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    return [
        {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": ids[label]}
        for tokens, (_, label) in zip(texts["input_ids"], rows, strict=True)
    ]


def make_exam(task: TextTask, rows: int = TEST_ROWS) -> Exam:
    """Return the first `rows` encoded test rows of `task`."""
    split = load_split(task)
    tokenizer = AutoTokenizer.from_pretrained(fetch(MINILM))
    items = encode(split.test[:rows], split.labels, tokenizer, task.max_length)
    # Neighbours of like length need little padding.
    items.sort(key=lambda item: len(item["input_ids"]))
    return Exam(task.name, items, DataCollatorWithPadding(tokenizer))


if __name__ == "__main__":
    Workbench(
        about=__doc__,
        tasks=list(TASKS),
        finetune=lambda name, quick: finetune(TASKS[name], quick),
        measure=lambda name, model: f"{make_exam(TASKS[name]).accuracy(model):.1%}",
        load=AutoModelForSequenceClassification.from_pretrained,
    ).main()
