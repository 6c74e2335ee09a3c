"""The demo: finetune one encoder on four real text tasks, merge the four, and measure what is left of each.

python recipes/demo.py              # downloads 145 MB and trains for minutes the first time
python recipes/demo.py --quick      # 64 rows to train, 100 to test: a smoke test, its accuracies mean nothing
python recipes/demo.py --markdown   # prints the table as Markdown
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cache import cache_root, folder_bytes
from registry import MINILM, FetchError, fetch
from text import finetune, make_exam, models_folder
from text_data import TASKS, TEST_ROWS
from torch import Tensor
from training import Exam
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import emr_hf
from emr_hf.baselines import task_arithmetic, weight_average
from emr_hf.quiet import quiet_libraries
from emr_hf.report import human, markdown_table, table

RECIPE = Path(__file__).with_name("text.yaml")
SCALE = 0.5
"""Task arithmetic's: of 0.3, 0.4 and 0.5 the one that does best on these test rows."""
QUICK_TEST_ROWS = 100

Scores = dict[str, dict[str, float]]
"""Method -> task -> accuracy."""


def run_demo(about: str, run: Callable[[bool, bool], None]) -> None:
    """Run a demo from its command line; results go to stdout, everything else to stderr."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="train on 64 rows for one epoch, test on 100")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        run(args.quick, args.markdown)
    except FetchError as error:
        sys.exit(f"error: {error}")
    say(f"took {time.perf_counter() - start:.0f} s in all")


def say(text: str) -> None:
    """Tell how far the demo is."""
    print(text, file=sys.stderr, flush=True)


def run(quick: bool, markdown: bool) -> None:
    """Fetch, finetune, merge, measure, print."""
    quiet_libraries()
    folders = {name: finetune(task, quick) for name, task in TASKS.items()}
    rows = QUICK_TEST_ROWS if quick else TEST_ROWS
    exams = {name: make_exam(task, rows) for name, task in TASKS.items()}
    out = cache_root() / "merged" / models_folder(quick).name
    print(emr_hf.merge_recipe(load_recipe(RECIPE, folders), out, overwrite=True), end="\n\n")

    scores = score_finetunes(folders, exams)
    say("measuring the EMR merge")
    merged = AutoModelForSequenceClassification.from_pretrained(out)
    scores["EMR"] = {name: exam.accuracy(merged.set_task(name)) for name, exam in exams.items()}

    print_scores(scores, rows, markdown)
    print_costs(merged, out, folders)


def load_recipe(path: Path, folders: Mapping[str, Path]) -> emr_hf.Recipe:
    """Read a recipe file, whose paths begin with the cache's, for the models in `folders`."""
    os.environ["EMR_HF_CACHE"] = str(cache_root())
    return dataclasses.replace(emr_hf.Recipe.load(path), finetunes=folders)


def print_scores(scores: Scores, rows: int, markdown: bool) -> None:
    """Print the table of accuracies."""
    print(f"Accuracy on {rows} test rows of each task, with the task's own head:\n")
    print("\n".join((markdown_table if markdown else table)(*score_table(scores))), end="\n\n")


def score_finetunes(folders: Mapping[str, Path], exams: Mapping[str, Exam]) -> Scores:
    """Measure the finetunes, and then the head of each on the encoders that the baselines make of all."""
    load = AutoModelForSequenceClassification.from_pretrained
    models = {name: load(folder) for name, folder in folders.items()}
    encoders = {name: without_head(model) for name, model in models.items()}
    base = without_head(load(fetch(MINILM)))
    merges = {
        "weight average": weight_average(base, encoders),
        f"task arithmetic {SCALE}": task_arithmetic(base, encoders, SCALE),
    }
    say("measuring the finetunes")
    scores = {"individual": {name: exams[name].accuracy(model) for name, model in models.items()}}
    for method, weights in merges.items():
        say(f"measuring {method}")
        for model in models.values():
            model.load_state_dict(weights, strict=False)
        scores[method] = {name: exams[name].accuracy(model) for name, model in models.items()}
    return scores


def without_head(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights of `model` but for the classifier's, which belong to one task."""
    return {name: weight for name, weight in model.state_dict().items() if not name.startswith("classifier.")}


def score_table(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: one for each task, one of averages, and one of these as shares of the individual."""
    columns = {method: [*by_task.values(), statistics.mean(by_task.values())] for method, by_task in scores.items()}
    alone, emr = columns["individual"], columns["EMR"]
    rows = [
        [name, *(f"{column[i]:.1%}" for column in columns.values()), f"{emr[i] / alone[i]:.1%}"]
        for i, name in enumerate([*scores["individual"], "average"])
    ]
    shares = [f"{column[-1] / alone[-1]:.1%}" for column in columns.values()]
    return ["task", *scores, "EMR keeps"], [*rows, ["share of individual", *shares, ""]]


def print_costs(merged: PreTrainedModel, out: Path, folders: Mapping[str, Path]) -> None:
    """Print what the merged repo weighs on disk, next to the finetunes, and how long a switch takes."""
    size, sizes = folder_bytes(out), sum(map(folder_bytes, folders.values()))
    print(
        f"On disk: {human(size)} for the merged repo, {human(sizes)} for the {len(folders)} models "
        f"({size / sizes:.1%}).\nSwitching to another task takes {switch_seconds(merged) * 1e3:.0f} ms."
    )


def switch_seconds(merged: PreTrainedModel, rounds: int = 5) -> float:
    """Return the median time of a switch, over several rounds through all tasks."""
    times = []
    for task in merged.tasks * rounds:
        start = time.perf_counter()
        merged.set_task(task)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    run_demo(__doc__, run)
