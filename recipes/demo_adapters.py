"""The adapter demo: merge LoRAs, and (IA)³ adapters, of four real text tasks, beside PEFT's own ways to merge them.

python recipes/demo_adapters.py              # downloads 145 MB and trains for minutes the first time
python recipes/demo_adapters.py --quick      # 64 rows to train, 100 to test: a smoke test, its accuracies mean nothing
python recipes/demo_adapters.py --markdown   # prints the tables as Markdown
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import peft_merges
from adapters import KINDS, Kind, adapters_folder, load_adapter, train_adapter
from cache import cache_root
from demo import QUICK_TEST_ROWS, Scores, load_recipe, print_scores, run_demo, say, switch_seconds
from text import make_exam
from text_data import TASKS, TEST_ROWS
from training import Exam
from transformers import AutoModelForSequenceClassification

import emr_hf
from emr_hf.quiet import quiet_libraries
from emr_hf.report import human


def run(quick: bool, markdown: bool) -> None:
    """Fetch, train, merge, measure, print, for each kind of adapter."""
    quiet_libraries()
    rows = QUICK_TEST_ROWS if quick else TEST_ROWS
    exams = {name: make_exam(task, rows) for name, task in TASKS.items()}
    for kind in KINDS.values():
        folders = {name: train_adapter(kind, task, quick) for name, task in TASKS.items()}
        out = cache_root() / "merged" / f"{adapters_folder(kind, quick).parent.name}-{kind.name}"
        recipe = load_recipe(Path(__file__).with_name(f"{kind.name}.yaml"), folders)
        report = emr_hf.merge_recipe(recipe, out, overwrite=True)
        print(f"# {kind.name}\n\n{report}\n")
        merged = AutoModelForSequenceClassification.from_pretrained(out)
        scores = dict(score(kind, folders, exams))
        say("measuring the EMR merge")
        scores["EMR"] = {name: exam.accuracy(merged.set_task(name)) for name, exam in exams.items()}
        print_scores(scores, rows, markdown)
        ours, theirs = human(report.bytes_modulators), human(report.bytes_finetunes)
        print(f"Beside the base: {ours} for the merge, {theirs} for the {len(folders)} adapters.")
        print(f"Switching to another task takes {switch_seconds(merged) * 1e3:.1f} ms.\n")


def score(kind: Kind, folders: Mapping[str, Path], exams: Mapping[str, Exam]) -> Iterator[tuple[str, Scores]]:
    """Measure the adapters, and what PEFT makes of all under the head of each."""
    say(f"measuring the {kind.name} adapters")
    yield "individual", {name: exams[name].accuracy(load_adapter(folder)) for name, folder in folders.items()}
    print("PEFT's add_weighted_adapter says to")
    print("\n".join(f"- {what}: {answer}" for what, answer in peft_merges.refusals(folders)), end="\n\n")
    for combination in peft_merges.COMBINATIONS[kind.name]:
        say(f"measuring PEFT's {combination} merge")
        yield f"PEFT {combination}", peft_merges.best_scores(folders, exams, combination)


if __name__ == "__main__":
    run_demo(__doc__, run)
