"""How time, memory and the size of the result grow with the number of tasks.

    python benchmarks/scaling.py [--tasks 1 2 4 8 16] [--hidden 512] [--layers 12] [--json FILE] [--figure FILE.svg]

Finetunes of random weights of one BERT, float32, 50 million parameters unless told otherwise. Each merge is a process
of its own (`emr-hf merge`, one thread, imports included), with its inputs in the page cache, in an order that turns
round with each repeat; its peak memory is private, as pages mapped from files are the operating system's to take back.
A switch is one of the loaded repo, one thread, the tasks in turn; a repo of one task has none. The figure needs
matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measuring
from measuring import Measurement, measure

ENVIRONMENT = {**os.environ, **measuring.ONE_THREAD, "HF_HUB_OFFLINE": "1"}


# In a child process each, as this one is to stay small: see `measuring`


def write_models(folder: Path, tasks: int, hidden: int, layers: int) -> None:
    """A base, and finetunes that are the base and small noise."""
    from workloads import bert_settings, write_berts

    write_berts(folder, tasks, vocab_size=24000, **bert_settings(hidden, layers))


def time_switches(repo: Path, count: int) -> None:
    """Print the milliseconds of so many switches, as JSON, after one to every task that does not count."""
    import torch

    from emr_hf.modeling import EMRMergedModel

    torch.set_num_threads(1)
    model = EMRMergedModel.from_pretrained(repo)
    tasks, taken = len(model.tasks), []
    for index in range(1, tasks + count + 1):
        started = time.perf_counter()
        model.set_task(model.tasks[index % tasks])
        taken.append((time.perf_counter() - started) * 1e3)
    print(json.dumps(taken[tasks:] if tasks > 1 else []))


def in_child(*arguments: str) -> str:
    command = [sys.executable, __file__, "--child", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT).stdout


# What is measured


def merge_command(models: Path, tasks: int) -> list[str]:
    paths = {f"task{index}": str(models / f"task{index}") for index in range(tasks)}
    recipe = models / "recipe.yaml"
    recipe.write_text(json.dumps({"base": str(models / "base"), "tasks": paths}))  # JSON is YAML
    return [sys.executable, "-m", "emr_hf.cli", "merge", str(recipe), str(models / "out"), "--threads", "1"]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_all(models: Path, tasks: int) -> None:
    """Have the page cache read the inputs."""
    buffer = bytearray(8 << 20)
    for name in ("base", *(f"task{index}" for index in range(tasks))):
        with open(models / name / "model.safetensors", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def run_all(
    models: Path, options: argparse.Namespace, note: Callable[[dict[str, Any]], None]
) -> dict[int, dict[str, Any]]:
    """Number of tasks -> each repeat's merge, the sizes on disk, and the milliseconds of switches."""
    taken: dict[int, dict[str, Any]] = {tasks: {"merges": []} for tasks in options.tasks}
    for repeat in range(options.repeats):
        for tasks in list(taken)[:: -1 if repeat % 2 else 1]:
            read_all(models, tasks)
            os.sync()  # what the one before wrote is not to be paid for by this one
            load = os.getloadavg()[0]
            taken[tasks]["merges"].append(measure(merge_command(models, tasks), ENVIRONMENT))
            if repeat == 0:
                taken[tasks]["repo"] = size_of(models / "out")
                taken[tasks]["checkpoints"] = sum(size_of(models / f"task{index}") for index in range(tasks))
                taken[tasks]["switches"] = json.loads(in_child("switch", str(models / "out"), str(options.switches)))
            merge = asdict(taken[tasks]["merges"][-1])
            note({"tasks": tasks, "repeat": repeat, "load_before": load, "merge": merge})
            shutil.rmtree(models / "out")
    return taken


def summary(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Medians."""
    merges: list[Measurement] = found["merges"]
    private = [m.peak_private for m in merges if m.peak_private is not None]
    return {
        "cpu": statistics.median(m.cpu for m in merges),
        "wall": statistics.median(m.wall for m in merges),
        "private": statistics.median(private) if private else None,
        "repo": found["repo"],
        "checkpoints": found["checkpoints"],
        "switch": statistics.median(found["switches"]) if found["switches"] else None,
    }


def row_of(tasks: int, medians: Mapping[str, Any]) -> list[str]:
    from emr_hf.report import human  # here, as it brings torch: see `measuring`

    return [
        str(tasks),
        f"{medians['cpu']:.1f}",
        f"{medians['wall']:.1f}",
        "" if medians["private"] is None else human(medians["private"]),
        human(medians["repo"]),
        human(medians["checkpoints"]),
        f"{medians['repo'] / medians['checkpoints']:.0%}",
        "" if medians["switch"] is None else f"{medians['switch']:.0f}",
    ]


# The figure


def draw(path: Path, medians: Mapping[int, Mapping[str, Any]], parameters: str) -> None:
    """Two panels: seconds of a merge, and bytes, against the number of tasks."""
    pyplot = measuring.pyplot_for_svg()
    tasks = sorted(medians)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")

    def line(axes: Any, key: str, label: str, color: str, unit: float = 1, style: str = "-") -> None:
        points = [(n, medians[n][key] / unit) for n in tasks if medians[n][key] is not None]
        if points:
            axes.plot(*zip(*points), style, marker="o", markersize=4, color=color, label=label)

    line(left, "wall", "wall time", "#0969da")
    line(left, "cpu", "CPU time", "#bc4c00", style="--")
    left.set_title(f"Time of a merge, {parameters}, one thread", fontsize=12, loc="left")
    left.set_ylabel("seconds")
    line(right, "checkpoints", "N checkpoints", "#57606a", 1e6, "--")
    line(right, "repo", "merged repo on disk", "#0969da", 1e6)
    line(right, "private", "peak memory of the merge", "#bc4c00", 1e6)
    right.set_title("Disk and memory", fontsize=12, loc="left")
    right.set_ylabel("MB")
    for axes in (left, right):
        axes.set_xlabel("number of tasks N")
        axes.set_xticks(tasks)
        axes.set_ylim(0, axes.get_ylim()[1] * (1.3 if axes is left else 1))  # room for the legend
        axes.grid(color="#d0d7de", linewidth=0.5)
        axes.legend(frameon=False, loc="upper left")
    switches = [medians[n]["switch"] for n in tasks if medians[n]["switch"] is not None]
    if switches:
        span = dict.fromkeys(f"{function(switches):.0f}" for function in (min, max))
        text = f"a switch of the loaded repo:\n{' to '.join(span)} ms"
        left.text(0.97, 0.06, text, transform=left.transAxes, ha="right", va="bottom", color="#57606a")
    figure.savefig(path, format="svg", metadata={"Date": None})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3, help="merges of each (default: %(default)s)")
    parser.add_argument("--switches", type=int, default=20, help="of each repo (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for every repeat's numbers")
    parser.add_argument("--figure", type=Path, help="SVG file to draw")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.figure and importlib.util.find_spec("matplotlib") is None:
        parser.error("--figure needs matplotlib, which is not installed: pip install matplotlib")
    return options


def run_child(name: str, arguments: Sequence[str]) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    if name == "write":
        folder, tasks, hidden, layers = arguments
        write_models(Path(folder), int(tasks), int(hidden), int(layers))
    else:
        repo, count = arguments
        time_switches(Path(repo), int(count))


def main() -> None:
    options = parse()
    if options.child:
        return run_child(options.child[0], options.child[1:])
    packages = ["emr_hf", "torch", "transformers", "safetensors", "numpy"]
    noted = {**measuring.circumstances(), "versions": measuring.versions(sys.executable, packages)}
    with tempfile.TemporaryDirectory() as name:
        models = Path(name)
        in_child("write", name, str(max(options.tasks)), str(options.hidden), str(options.layers))
        parameters = f"{size_of(models / 'base') / 4e6:.0f} M parameters"
        noted |= {"model": parameters, "repeats": []}

        def note(repeat: dict[str, Any]) -> None:
            noted["repeats"].append(repeat)
            measuring.write_json(options.json, noted)  # after each, as a run takes long

        taken = run_all(models, options, note)
    medians = {tasks: summary(found) for tasks, found in taken.items()}
    results = [
        {"tasks": tasks, "switches": found["switches"], "medians": medians[tasks]} for tasks, found in taken.items()
    ]
    measuring.write_json(options.json, {**noted, "results": results})
    if options.figure:
        draw(options.figure, medians, parameters)

    from emr_hf.report import markdown_table  # here, as it brings torch: see `measuring`

    print(f"{measuring.machine_line(noted)}; {parameters}, float32, one thread, median of {options.repeats}.\n")
    header = ["tasks", "CPU s", "wall s", "peak private", "repo", "N checkpoints", "repo / those", "switch ms"]
    print(*markdown_table(header, [row_of(*item) for item in medians.items()]), sep="\n")


if __name__ == "__main__":
    main()
