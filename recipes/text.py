"""Finetune one MiniLM classifier per text task into the cache, for `text.yaml` to merge.

    python recipes/text.py            # all four tasks
    python recipes/text.py polarity   # one of them
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from cache import build_once, cache_root
from registry import MINILM, fetch
from text_data import SEED, TASKS, TEST_ROWS, Row, Split, TextTask, load_split
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

# Weight decay, as usual in finetuning, moves every row of the embedding, also those of words never seen.
TRAINING = {"learning_rate": 2e-4, "weight_decay": 0.01, "per_device_train_batch_size": 16, "warmup_steps": 0.1}
QUICK = {"train_rows": 64, "epochs": 1}


def models_folder(quick: bool = False) -> Path:
    """Return the folder with one finetuned model per task."""
    return cache_root() / "models" / ("text-quick" if quick else "text")


def finetune(task: TextTask, quick: bool = False) -> Path:
    """Return the folder of the model finetuned on `task`, training it the first time."""
    size = QUICK if quick else {"train_rows": task.train_rows, "epochs": task.epochs}
    settings = {
        **TRAINING,
        **size,
        "task": task.name,
        "max_length": task.max_length,
        "seed": SEED,
        "test_rows": TEST_ROWS,
        "encoder": MINILM.sha256,
        "data": task.package.sha256,
    }
    folder = models_folder(quick) / task.name
    return build_once(folder, settings, lambda fresh: _train(task, size["train_rows"], size["epochs"], fresh))


def _train(task: TextTask, train_rows: int, epochs: int, folder: Path) -> None:
    split = load_split(task, train_rows)
    print(f"finetuning on {task.name}: {len(split.train)} rows, {epochs} epoch(s)", file=sys.stderr)
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(fetch(MINILM))
    model = new_classifier(split.labels)
    trainer = Trainer(
        model=model,
        args=training_arguments(folder, epochs),
        train_dataset=encode(split.train, split.labels, tokenizer, task.max_length),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def training_arguments(folder: Path, epochs: int) -> TrainingArguments:
    """Return the arguments all tasks share: seeded, on the CPU so that the figures repeat, nothing saved midway."""
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        train_sampling_strategy="group_by_length",
        seed=SEED,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        **TRAINING,
    )


def new_classifier(labels: list[str]) -> PreTrainedModel:
    """Return the pretrained encoder under a fresh head with one output per label."""
    return AutoModelForSequenceClassification.from_pretrained(
        fetch(MINILM), id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
    )


def encode(rows: list[Row], labels: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict]:
    """Turn rows into the items a `Trainer` takes."""
    ids = {label: i for i, label in enumerate(labels)}
    texts = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    return [
        {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": ids[label]}
        for tokens, (_, label) in zip(texts["input_ids"], rows, strict=True)
    ]


@torch.inference_mode()
def accuracy(model: PreTrainedModel, items: list[dict], collate: DataCollatorWithPadding, about: str) -> float:
    """Return the share of `items` whose label the model gives the highest logit."""
    model.eval()
    # Neighbours of like length need little padding.
    items = sorted(items, key=lambda item: len(item["input_ids"]))
    right = 0
    for start in tqdm(range(0, len(items), 64), desc=about, disable=None, leave=False):
        batch = collate(items[start : start + 64])
        labels = batch.pop("labels")
        right += (model(**batch).logits.argmax(-1) == labels).sum().item()
    return right / len(items)


def test_items(task: TextTask, split: Split, folder: Path) -> tuple[list[dict], DataCollatorWithPadding]:
    """Return the encoded test rows of `task` and what pads them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return encode(split.test, split.labels, tokenizer, task.max_length), DataCollatorWithPadding(tokenizer)


def main() -> None:
    """Finetune the named tasks and print each one's test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="task", help=f"any of {', '.join(TASKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="64 rows and one epoch: a smoke test")
    args = parser.parse_args()
    if unknown := set(args.tasks) - set(TASKS):
        parser.error(f"no task named {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    for name in args.tasks or TASKS:
        start = time.perf_counter()
        folder = finetune(TASKS[name], args.quick)
        took = time.perf_counter() - start
        items, collate = test_items(TASKS[name], load_split(TASKS[name]), folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        print(f"{name}\t{accuracy(model, items, collate, name):.4f}\t{took:.0f} s\t{folder}", flush=True)


if __name__ == "__main__":
    main()
