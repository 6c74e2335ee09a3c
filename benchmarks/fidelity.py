"""How much of the finetunes' accuracy merging keeps, on real tasks, beside every rival on the same checkpoints.

    python benchmarks/fidelity.py [--domains text vision glyphs lora ia3 generation] [--seeds 0 1 2]
        [--methods EMR levels ...] [--rows 500] [--task-counts 2 4 8 16 30 60] [--json FILE] [--figure FILE.svg]

Domains, see `domains.py`: eight full finetunes of one text encoder, and of one image encoder; 2 to 60 of a small ViT
on the letters of 30 scripts; LoRA and (IA)³ adapters on the text tasks; LoRAs of a language model. Contenders, see
`methods.py`. A seed is of the training alone: rows and their cuts are always the same. No test row is used to choose
anything; scales are chosen on validation rows. mergekit is run from an environment of its own that `EMR_MERGEKIT`
names, a Python or a virtual environment; its rows are left out where there is none.

"Kept" is the mean accuracy over the tasks divided by that of the finetunes one by one. Beside it stands the mean of
the tasks' own ratios, in which an easy and a hard task count the same.

What is trained and every score are kept in the cache (`EMR_HF_CACHE`, or `~/.cache/emr_hf`), scores in
`scores/fidelity` by the finetunes' settings, the contender's options and the number of rows, and an interrupted run
goes on from there. After a change of the library that changes weights remove that folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import domains
from cache import cache_root
from domain import Domain
from measuring import circumstances, machine_line, pyplot_for_svg, write_json
from methods import BASE, CONTENDERS, INDIVIDUAL, Checkpoints, Contender

from emr_hf.errors import EMRError
from emr_hf.quiet import quiet_libraries
from emr_hf.report import human, markdown_table

NAMES = ("text", "vision", "glyphs", "lora", "ia3", "generation")
COUNTS = (2, 4, 8, 16, 30, 60)
QUICK_COUNTS = (2, 3)
PREDICTORS = ("relative_error", "cosine", "sign_conflict")

Entry = dict[str, Any]
"""A contender's result on a domain: `accuracy` by task, `total` and `beside` in bytes, `figures` by task."""


@dataclass(frozen=True)
class Result:
    """All entries of one domain and seed.

    Args:
        domain, seed: what was merged.
        tasks: task -> how it was trained and examined.
        entries: method -> entry.
    """

    domain: str
    seed: int
    tasks: Mapping[str, Mapping[str, Any]]
    entries: Mapping[str, Entry]

    def mean(self, method: str) -> float:
        return statistics.mean(self.entries[method]["accuracy"].values())

    def kept(self, method: str) -> float:
        """Ratio of the means."""
        return self.mean(method) / self.mean(INDIVIDUAL)

    def ratios(self, method: str) -> dict[str, float]:
        """Task -> share of its own finetune's accuracy."""
        alone = self.entries[INDIVIDUAL]["accuracy"]
        return {task: value / alone[task] for task, value in self.entries[method]["accuracy"].items()}


class Scores:
    """The scores of a domain and seed in the cache."""

    def __init__(self, domain: Domain, rows: int, folder: Path) -> None:
        self.path = folder / f"{domain.name.replace(' ', '-')}-seed{domain.seed}.json"
        self.key = f"{domain.fingerprint}/{rows}"
        self.held = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def entry(self, method: str, contender: Contender) -> Entry:
        """Return what is known of a contender with these options, to be filled."""
        found = self.held.setdefault(self.key, {}).get(method)
        if found is None or found["options"] != contender.options:
            found = self.held[self.key][method] = {"options": dict(contender.options), "accuracy": {}}
        return found

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp")
        write_json(fresh, self.held)
        fresh.replace(self.path)


def measure(domain: Domain, methods: Sequence[str], rows: int, quick: bool) -> Result:
    """Return the scores of a domain, measuring those that the cache lacks."""
    scores = Scores(domain, rows, cache_root() / "scores" / ("fidelity-quick" if quick else "fidelity"))
    given, entries = Checkpoints(domain), {}
    for method in methods:
        contender = CONTENDERS[method]
        if not contender.applies(domain):
            continue
        entry = scores.entry(method, contender)
        try:
            fill(entry, contender, given, scores)
        except EMRError as error:
            say(f"{domain.name}, {method}: left out: {error}")
        else:
            entries[method] = entry
    return Result(domain.name, domain.seed, {name: described(domain, name) for name in domain.tasks}, entries)


def fill(entry: Entry, contender: Contender, given: Checkpoints, scores: Scores) -> None:
    """Measure what an entry lacks, and save it after each task."""
    missing = [task for task in given.domain.tasks if task not in entry["accuracy"]]
    if not missing:
        return
    scratch = cache_root() / "merged"
    scratch.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=scratch, prefix="fidelity-") as folder:
        made = contender(given, Path(folder))
        entry |= {"total": made.total, "beside": made.beside, "figures": made.figures, "chosen": made.chosen}
        for task in missing:
            entry["accuracy"][task] = made.score(task)
            scores.save()
    method = next(name for name, known in CONTENDERS.items() if known is contender)
    mean = statistics.mean(entry["accuracy"].values())
    took = time.perf_counter() - started
    say(f"{given.domain.name}, seed {given.domain.seed}: {method} {mean:.1%} in {took:.0f} s")


def described(domain: Domain, name: str) -> dict[str, Any]:
    """Return what a row of the table of tasks tells of how a task was trained and examined."""
    task = domain.tasks[name]
    return {
        "train rows": len(task.data.train),
        "validation rows": len(task.data.validation),
        "test rows": len(task.data.test),
        "epochs": round(task.epochs, 1),
        "seed": domain.seed,
    }


def say(text: str) -> None:
    """Tell how far the benchmark is."""
    print(text, file=sys.stderr, flush=True)


# Tables


def spread(values: Sequence[float], form: str = ".1%") -> str:
    """The mean, and the standard deviation where there are several."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def methods_of(results: Sequence[Result]) -> list[str]:
    """Return the methods that all results have, in the order of the contenders."""
    return [method for method in CONTENDERS if all(method in result.entries for result in results)]


def accuracy_table(results: Sequence[Result]) -> list[str]:
    """Return the lines of the table of methods and tasks, over the seeds of one domain."""
    tasks = list(results[0].tasks)
    header = ["method", *tasks, "mean", "kept", "mean of ratios", "on disk", "beside the base"]
    rows = []
    for method in methods_of(results):
        entry = results[0].entries[method]
        by_task = [spread([result.entries[method]["accuracy"][task] for result in results]) for task in tasks]
        mean = spread([result.mean(method) for result in results])
        kept = spread([result.kept(method) for result in results])
        ratios = spread([statistics.mean(result.ratios(method).values()) for result in results])
        name = method if entry["chosen"] is None else f"{method} ({chosen(method, results)})"
        rows.append([name, *by_task, mean, kept, ratios, human(entry["total"]), human(entry["beside"])])
    return markdown_table(header, rows)


def chosen(method: str, results: Sequence[Result]) -> str:
    """The scales that were chosen, each once."""
    return ", ".join(dict.fromkeys(f"{result.entries[method]['chosen']:g}" for result in results))


def task_table(results: Sequence[Result]) -> list[str]:
    """Return the lines of the table of tasks: what each finetune is worth."""
    columns = [method for method in ("majority", BASE, "frozen probe", INDIVIDUAL) if method in methods_of(results)]
    facts = list(next(iter(results[0].tasks.values())))
    rows = [
        [name, *(str(task[fact]) for fact in facts)]
        + [format(result.entries[method]["accuracy"][name], ".1%") for method in columns]
        for result in results
        for name, task in result.tasks.items()
    ]
    return markdown_table(["task", *facts, *columns], rows)


def count_table(results: Mapping[int, Sequence[Result]]) -> list[str]:
    """Return the lines of the table of methods and numbers of tasks; of each what is kept."""
    methods = [method for method in CONTENDERS if any(method in methods_of(found) for found in results.values())]
    rows = [
        [method]
        + [
            spread([result.kept(method) for result in found]) if method in methods_of(found) else ""
            for found in results.values()
        ]
        for method in methods
    ]
    return markdown_table(["kept, of N tasks", *map(str, results)], rows)


def correlation_lines(results: Sequence[Result]) -> Iterator[str]:
    """Say how well figures of the weights tell, over repos and tasks, what accuracy is kept."""
    pairs = [
        (result.ratios(method)[task], figures)
        for result in results
        for method, entry in result.entries.items()
        for task, figures in entry["figures"].items()
    ]
    if len(pairs) > 2 and importlib.util.find_spec("scipy") is not None:
        from scipy.stats import spearmanr

        kept = [share for share, _ in pairs]
        for name in PREDICTORS:
            rho = spearmanr(kept, [figures[name] for _, figures in pairs]).statistic
            yield f"- {name.replace('_', ' ')}: {rho:+.2f} over {len(pairs)} pairs of repo and task"


# The figure

DRAWN = {
    INDIVIDUAL: ("#57606a", "o"),
    "weight average": ("#8250df", "o"),
    "TIES": ("#8250df", "v"),
    "BitDelta": ("#1a7f37", "o"),
    "BitDelta everywhere": ("#1a7f37", "v"),
    "ternary": ("#1a7f37", "s"),
    "EMR": ("#bc4c00", "o"),
    "fit": ("#0969da", "o"),
    "fit int2": ("#0969da", "s"),
    "levels": ("#cf222e", "o"),
    "levels int2": ("#cf222e", "s"),
}
"""Method -> its colour and marker."""
BY_COUNT = ("weight average", "TIES", "BitDelta", "BitDelta everywhere", "EMR", "fit", "levels", "levels int2")


def draw(path: Path, results: Sequence[Result], counts: Mapping[int, Sequence[Result]]) -> None:
    """Two panels: accuracy kept against bytes on disk of one domain, and against the number of tasks."""
    pyplot = pyplot_for_svg()
    figure, panels = pyplot.subplots(1, bool(results) + bool(counts), figsize=(11, 4.6), layout="constrained")
    panels = list(panels) if results and counts else [panels]
    if results:
        draw_bytes(panels[0], results)
    if counts:
        draw_counts(panels[-1], counts)
    for axes in panels:
        axes.grid(color="#d0d7de", linewidth=0.5)
        axes.set_ylabel("accuracy kept, %")
    figure.savefig(path, format="svg", metadata={"Date": None})


def draw_bytes(axes: Any, results: Sequence[Result]) -> None:
    """A large marker for what a method keeps, and a faint one for each of its tasks."""
    whole = results[0].entries[INDIVIDUAL]["total"]
    for method in (method for method in methods_of(results) if method in DRAWN):
        color, marker = DRAWN[method]
        share = 100 * results[0].entries[method]["total"] / whole
        ratios = [100 * ratio for result in results for ratio in result.ratios(method).values()]
        kept = 100 * statistics.mean(result.kept(method) for result in results)
        axes.plot([share] * len(ratios), ratios, "o", markersize=3.5, color=color, alpha=0.3, markeredgewidth=0)
        axes.plot(share, kept, marker, markersize=8, color=color, label=method)
    axes.set_xscale("log")
    axes.set_xlim(axes.get_xlim()[0], 150)
    ticks = [tick for tick in (5, 10, 15, 20, 30, 40, 60, 100) if tick > axes.get_xlim()[0]]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xlabel("bytes on disk, % of the finetunes one by one")
    axes.set_title(f"{results[0].domain}, {len(results[0].tasks)} tasks", fontsize=12, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def draw_counts(axes: Any, counts: Mapping[int, Sequence[Result]]) -> None:
    """A line for each method."""
    for method in BY_COUNT:
        found = {n: results for n, results in counts.items() if method in methods_of(results)}
        kept = [100 * statistics.mean(result.kept(method) for result in results) for results in found.values()]
        if found:
            color, marker = DRAWN[method]
            axes.plot(list(found), kept, "-", marker=marker, markersize=4, color=color, label=method)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(counts), map(str, counts))
    axes.set_xlabel("number of tasks N")
    axes.set_title("letters of scripts, a small ViT", fontsize=12, loc="left")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.22))


# The command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", nargs="+", choices=NAMES, help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, metavar="METHOD", default=list(CONTENDERS))
    parser.add_argument("--rows", type=int, default=500, help="test rows of a task (default: %(default)s)")
    parser.add_argument("--task-counts", nargs="+", type=int, metavar="N", help="of glyphs (default: 2 to 60)")
    parser.add_argument("--train-only", action="store_true", help="train what the cache lacks, measure nothing")
    parser.add_argument("--quick", action="store_true", help="tiny networks on made-up tasks: a smoke test")
    parser.add_argument("--json", type=Path, help="file for every number")
    parser.add_argument("--figure", type=Path, help="SVG file to draw")
    options = parser.parse_args()
    if options.figure and importlib.util.find_spec("matplotlib") is None:
        parser.error("--figure needs matplotlib, which is not installed: pip install 'emr_hf[plot]'")
    options.task_counts = options.task_counts or (QUICK_COUNTS if options.quick else COUNTS)
    options.domains = options.domains or [name for name in NAMES if not options.quick or name != "generation"]
    options.methods = [name for name in CONTENDERS if name == INDIVIDUAL or name in options.methods]
    return options


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int | None]]:
    """Yield domain and number of tasks, which only glyphs have."""
    for name in options.domains:
        yield from ((name, count) for count in options.task_counts) if name == "glyphs" else [(name, None)]


def run(options: argparse.Namespace) -> dict[tuple[str, int | None], list[Result]]:
    """Return the results of each domain, one a seed."""
    found: dict[tuple[str, int | None], list[Result]] = {case: [] for case in cases(options)}
    # Seeds in the outer loop: one complete set of results is there early.
    for seed in options.seeds:
        for (name, count), results in found.items():
            domain = domains.build(name, seed, options.rows, count, options.quick)
            if not options.train_only:
                results.append(measure(domain, options.methods, options.rows, options.quick))
    return found


def main() -> None:
    options = parse()
    quiet_libraries()
    found = run(options)
    if options.train_only:
        return
    noted = circumstances()
    every = [result for results in found.values() for result in results]
    write_json(options.json, {**noted, "rows": options.rows, "results": [vars(result) for result in every]})
    print(machine_line(noted), end="\n\n")
    for results in found.values():
        print(f"## {results[0].domain}\n", *accuracy_table(results), "", *task_table(results), "", sep="\n")
    counts = {count: results for (name, count), results in found.items() if name == "glyphs"}
    if counts:
        print("## By number of tasks\n", *count_table(counts), "", sep="\n")
    if lines := list(correlation_lines(every)):
        print("## Spearman's correlation of accuracy kept with figures of the weights\n", *lines, sep="\n")
    if options.figure:
        others = [results for (name, _), results in found.items() if name != "glyphs"]
        draw(options.figure, others[0] if others else [], counts)


if __name__ == "__main__":
    main()
