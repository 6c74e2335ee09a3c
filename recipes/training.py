"""What the recipes' finetunings share: one way to train, one to examine, one command line."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from emr_hf.quiet import quiet_libraries

SEED = 0

Items = Sequence[Mapping[str, Any]]
Collate = Callable[[list[Mapping[str, Any]]], dict[str, torch.Tensor]]


def train(
    model: PreTrainedModel,
    items: Items,
    folder: Path,
    collate: Collate | None = None,
    seed: int = SEED,
    **settings: Any,
) -> None:
    """Finetune `model` on `items` and save it in `folder`.

    On the CPU, so that the figures repeat, and with nothing saved midway.
    """
    from transformers import Trainer, TrainingArguments  # brings PEFT, and with it whatever that looks for

    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=items, data_collator=collate)
    # The trainer prints its figures; stdout is for results.
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Exam:
    """The test items of one task, the same for every model that sits it."""

    name: str
    items: Items
    collate: Collate

    @torch.inference_mode()
    def accuracy(self, model: PreTrainedModel) -> float:
        """Return the share of items to whose label `model` gives the highest logit."""
        model.eval()
        right = 0
        for start in tqdm(range(0, len(self.items), 64), desc=self.name, disable=None, leave=False):
            batch = dict(self.collate(self.items[start : start + 64]))
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
        return right / len(self.items)


@dataclass(frozen=True)
class Workbench:
    """A recipe's command line: makes the finetunes, and measures them or a merge of them.

    Args:
        about: the recipe's docstring, shown by `--help`.
        tasks: names of the tasks.
        finetune: task, quick -> folder of the model.
        measure: task, model -> its score as text.
        load: folder -> model.
    """

    about: str
    tasks: Sequence[str]
    finetune: Callable[[str, bool], Path]
    measure: Callable[[str, PreTrainedModel], str]
    load: Callable[[Path], PreTrainedModel]

    def main(self) -> None:
        """Make the finetunes and print each one's score, or the scores of the model that is given."""
        args = self._parse()
        quiet_libraries()
        model = self._load_merged(args.model) if args.model else None
        for name in args.tasks or self.tasks:
            if model is None:
                self._make(name, args.quick)
            else:
                if hasattr(model, "set_task"):
                    model.set_task(name)
                print(f"{name}\t{self.measure(name, model)}", flush=True)

    def _load_merged(self, folder: Path) -> PreTrainedModel:
        import emr_hf  # noqa: F401 - registers the classes of a merged repo

        return self.load(folder)

    def _make(self, name: str, quick: bool) -> None:
        start = time.perf_counter()
        folder = self.finetune(name, quick)
        took = time.perf_counter() - start
        print(f"{name}\t{self.measure(name, self.load(folder))}\t{took:.0f} s\t{folder}", flush=True)

    def _parse(self) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("tasks", nargs="*", metavar="task", help=f"any of {', '.join(self.tasks)}; all by default")
        parser.add_argument("--quick", action="store_true", help="64 training items and one epoch: a smoke test")
        parser.add_argument("--model", type=Path, metavar="DIR", help="train nothing, measure this merged repo")
        args = parser.parse_args()
        if unknown := set(args.tasks) - set(self.tasks):
            parser.error(f"no task named {', '.join(sorted(unknown))}; there are {', '.join(self.tasks)}")
        return args


def seeded(name: str, seed: int) -> str:
    """Return the name of the folder for what is trained with a seed: of the usual one, just `name`."""
    return name if seed == SEED else f"{name}-seed{seed}"


def announce(name: str, items: Items, settings: Mapping[str, Any]) -> None:
    """Say on stderr what is about to be trained."""
    print(f"finetuning on {name}: {len(items)} items, {settings['epochs']} epoch(s)", file=sys.stderr, flush=True)
