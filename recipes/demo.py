"""The demo: finetune one encoder on four real text tasks, merge the four, and measure what is left of each.

python recipes/demo.py              # downloads 145 MB and trains for minutes the first time
python recipes/demo.py --quick      # 64 training rows a task: a smoke test, its accuracies mean nothing
python recipes/demo.py --markdown   # the same table as Markdown
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache import cache_root, folder_bytes
from registry import MINILM, FetchError, fetch

RECIPE = Path(__file__).with_name("text.yaml")
SCALE = 0.3
"""Of task arithmetic. Of 0.3, 0.4 and 0.5, the best on these tasks."""

Scores = dict[str, dict[str, float]]
"""Method -> task -> accuracy."""


def main() -> None:
    """Run the demo and print its table."""
    args = parse_args()
    os.environ["EMR_HF_CACHE"] = str(cache_root())  # the recipe's paths start with it
    start = time.perf_counter()
    try:
        run(args.quick, args.markdown)
    except FetchError as error:
        sys.exit(f"error: {error}")
    say(f"took {time.perf_counter() - start:.0f} s in all")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="train on 64 rows for one epoch")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser.parse_args()


def say(text: str) -> None:
    """Tell how far the demo is; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def run(quick: bool, markdown: bool) -> None:
    """Fetch, finetune, merge, measure, print."""
    import text
    from text_data import TASKS
    from transformers import AutoModelForSequenceClassification

    import emr_hf

    text.quiet()
    folders = {name: text.finetune(task, quick) for name, task in TASKS.items()}
    exams = {name: text.Exam.of(task) for name, task in TASKS.items()}
    recipe = dataclasses.replace(emr_hf.Recipe.load(RECIPE), finetunes=folders)
    out = cache_root() / "merged" / text.models_folder(quick).name
    print(emr_hf.merge_recipe(recipe, out, overwrite=True), end="\n\n")

    scores = score_finetunes(folders, exams)
    say("measuring the EMR merge")
    merged = AutoModelForSequenceClassification.from_pretrained(out)
    scores["EMR"] = {name: exam.accuracy(merged.set_task(name)) for name, exam in exams.items()}
    print_scores(scores, {name: len(exam.items) for name, exam in exams.items()}, markdown)
    print_costs(merged, out, list(folders.values()))


def score_finetunes(folders: Mapping[str, Path], exams: Mapping[str, Any]) -> Scores:
    """Measure the finetunes, and then each finetune's head on the encoders that the baselines make of all."""
    from transformers import AutoModelForSequenceClassification as Classifier

    from emr_hf.baselines import task_arithmetic, weight_average

    models = {name: Classifier.from_pretrained(folder) for name, folder in folders.items()}
    base = without_head(Classifier.from_pretrained(fetch(MINILM)))
    encoders = {name: without_head(model) for name, model in models.items()}
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


def without_head(model: Any) -> dict[str, Any]:
    """Return the weights of `model` without the classifier's, which belong to one task."""
    return {name: weight for name, weight in model.state_dict().items() if not name.startswith("classifier.")}


def print_scores(scores: Scores, rows: Mapping[str, int], markdown: bool) -> None:
    """Print the table of accuracies."""
    from emr_hf.report import markdown_table, table

    print(f"Accuracy on {min(rows.values())} to {max(rows.values())} test rows a task, each with its own head:\n")
    print("\n".join((markdown_table if markdown else table)(*score_table(scores))), end="\n\n")


def score_table(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: a task a row, then the averages, and these as shares of the individual models'."""
    columns = {method: [*by_task.values(), statistics.mean(by_task.values())] for method, by_task in scores.items()}
    names = [*scores["individual"], "average"]
    kept = [emr / alone for emr, alone in zip(columns["EMR"], columns["individual"], strict=True)]
    rows = [
        [name, *(f"{column[i]:.1%}" for column in columns.values()), f"{kept[i]:.1%}"] for i, name in enumerate(names)
    ]
    shares = [f"{column[-1] / columns['individual'][-1]:.1%}" for column in columns.values()]
    return ["task", *scores, "EMR keeps"], [*rows, ["share of individual", *shares, ""]]


def print_costs(merged: Any, out: Path, folders: list[Path]) -> None:
    """Print what the merged repo weighs on disk, next to the finetunes, and how long a switch takes."""
    from emr_hf.report import human

    size, sizes = folder_bytes(out), sum(map(folder_bytes, folders))
    print(
        f"On disk: {human(size)} for the merged repo, {human(sizes)} for the {len(folders)} models ({size / sizes:.1%})."
    )
    print(f"Switching to another task takes {switch_seconds(merged) * 1e3:.0f} ms.")


def switch_seconds(merged: Any, rounds: int = 5) -> float:
    """Return the median time of a switch, over several rounds through all tasks."""
    times = []
    for task in merged.tasks * rounds:
        start = time.perf_counter()
        merged.set_task(task)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
