"""How long a merge takes, end to end from safetensors on disk to a finished repo, beside the rivals.

    python benchmarks/merge.py [--workload 110m-fp32 0.5b-bf16] [--repeats 3] [--json FILE]
        [--authors CHECKOUT] [--fusion-bench PYTHON] [--mergekit PYTHON]

Each contender is a process of its own with one thread (OMP_NUM_THREADS=1 and its like), except for "2 threads", run on
models of random weights (`workloads.py`) that the page cache has, in an order that turns round with each repeat. CPU
seconds are user + system of the whole process, start and imports included. The contenders:

ours           `emr-hf merge`: base, float32 vector and masks on disk
authors        the authors' own function (harveyhuang18/EMR_Merging), on task vectors made of the loaded files; writes
               nothing. It needs the environment that this runs in, and a checkout.
fusion-bench   EMR merging of fusion_bench, on models that transformers loads; writes nothing
mergekit       `mergekit-yaml`: task_arithmetic, and ties of density 0.2; other methods, that write one model
floor: xor     the same files read by numpy, in one pass, into one small block; writes nothing
floor: copy    the same files read into one buffer, and as many bytes written of them as an EMR repo has

Rivals are run from environments of their own, named by options or by EMR_AUTHORS, EMR_FUSION_BENCH and EMR_MERGEKIT: a
checkout, and a Python or a virtual environment each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measuring
from measuring import ChildError, Measurement, measure, mergekit_config, python_of

HERE = Path(__file__).parent
OURS = "emr-hf merge"
CONTENDERS = {  # as named in options, and in the table
    "ours": OURS,
    "ours-2": f"{OURS}, 2 threads",
    "authors": "authors' function",
    "fusion-bench": "FusionBench EMR",
    "task-arithmetic": "mergekit task_arithmetic",
    "ties": "mergekit ties",
    "ours-check": "emr-hf check: imports and plan",
    "mergekit-imports": "mergekit: imports",
    "floor-xor": "floor: xor",
    "floor-copy": "floor: copy",
}
ITEM_SIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Models:
    """A workload on disk: `base` and `task0`, `task1`, ... in one folder."""

    folder: Path
    tasks: int
    dtype: str

    @classmethod
    def write(cls, name: str, folder: Path, tasks: int | None, scale: float) -> Models:
        """Let `workloads.py` write them, in a process of its own: this one is to stay small."""
        command = [sys.executable, str(HERE / "workloads.py"), name, "--folder", str(folder), "--scale", str(scale)]
        if tasks is not None:
            command += ["--tasks", str(tasks)]
        written = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return cls(Path(written["folder"]), written["tasks"], written["dtype"])

    def paths(self) -> dict[str, Path]:
        return {name: self.folder / name for name in ("base", *(f"task{index}" for index in range(self.tasks)))}

    @property
    def nbytes(self) -> int:
        """Bytes of one model."""
        return (self.folder / "base" / "model.safetensors").stat().st_size

    @property
    def repo_bytes(self) -> int:
        """Bytes of an EMR repo: the base, a float32 vector, one bit per weight and task."""
        elements = self.nbytes // ITEM_SIZE[self.dtype]
        return self.nbytes + 4 * elements + self.tasks * elements // 8

    def read(self) -> None:
        """Have the page cache read all of it."""
        buffer = bytearray(8 << 20)
        for path in self.paths().values():
            with open(path / "model.safetensors", "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def commands(models: Models, scratch: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Contender -> command line; those are missing that this machine does not have."""
    driver = [str(HERE / "contenders.py")]
    folder = [str(models.folder), "--tasks", str(models.tasks)]
    out = str(scratch / "out")
    found = {
        "ours": [*ours(models, scratch), "--threads", "1"],
        "ours-2": [*ours(models, scratch), "--threads", "2"],
        "ours-check": [sys.executable, "-m", "emr_hf", "check", str(scratch / "recipe.yaml")],
        "floor-xor": [sys.executable, *driver, "xor", *folder],
        "floor-copy": [sys.executable, *driver, "copy", *folder, "--out", out, "--bytes", str(models.repo_bytes)],
    }
    if options.authors:
        found["authors"] = [sys.executable, *driver, "authors", *folder, "--checkout", str(options.authors)]
    if options.fusion_bench:
        found["fusion-bench"] = [python_of(options.fusion_bench), *driver, "fusion-bench", *folder]
    if options.mergekit:
        for name, method, parameters in (
            ("task-arithmetic", "task_arithmetic", {"weight": 0.3}),
            ("ties", "ties", {"weight": 1.0, "density": 0.2}),
        ):
            base, *finetunes = models.paths().values()
            config = mergekit_config(scratch / f"{name}.yaml", method, base, finetunes, parameters, dtype=models.dtype)
            found[name] = [python_of(options.mergekit), "-m", "mergekit.scripts.run_yaml", str(config), out]
        found["mergekit-imports"] = [python_of(options.mergekit), "-m", "mergekit.scripts.run_yaml", "--help"]
    return found


def ours(models: Models, scratch: Path) -> list[str]:
    paths = {name: str(path) for name, path in models.paths().items()}
    recipe = scratch / "recipe.yaml"
    recipe.write_text(json.dumps({"base": paths.pop("base"), "tasks": paths}))  # JSON is YAML
    return [sys.executable, "-m", "emr_hf", "merge", str(recipe), str(scratch / "out")]


def run_all(
    models: Models, scratch: Path, options: argparse.Namespace, note: Callable[[dict[str, Any]], None]
) -> dict[str, list[Measurement | None]]:
    """Contender -> what each repeat took, None where it failed; no entry where it is absent."""
    found = commands(models, scratch, options)
    taken: dict[str, list[Measurement | None]] = {name: [] for name in options.contenders if name in found}
    for repeat in range(options.repeats):
        for name in list(taken)[:: -1 if repeat % 2 else 1]:
            models.read()
            os.sync()  # what the one before wrote is not to be paid for by this one
            load = os.getloadavg()[0]
            try:
                measurement = measure(found[name], environment_of(name))
            except ChildError as error:
                print(f"{name} failed: {error}", file=sys.stderr)
                measurement = None
            shutil.rmtree(scratch / "out", ignore_errors=True)
            (scratch / "out").unlink(missing_ok=True)
            taken[name].append(measurement)
            numbers = asdict(measurement) if measurement else None
            note({"contender": name, "repeat": repeat, "load_before": load, "measurement": numbers})
    return taken


def environment_of(contender: str) -> dict[str, str]:
    """One thread and no network; for rivals also without this environment's search path."""
    environment = {**os.environ, **measuring.ONE_THREAD, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if contender in ("fusion-bench", "task-arithmetic", "ties"):
        environment.pop("PYTHONPATH", None)
    return environment


def rows(taken: Mapping[str, list[Measurement | None]], contenders: list[str]) -> list[list[str]]:
    """The table: medians over the repeats; ratios to ours of the same repeat, their median."""
    from emr_hf.report import human  # here, as it brings torch: see `measuring`

    def row(name: str) -> list[str]:
        measurements = [m for m in taken.get(name, []) if m is not None]
        if not measurements:
            return [CONTENDERS[name], "failed" if name in taken else "absent", *[""] * 5]
        pairs = [(m, o) for m, o in zip(taken[name], taken.get("ours", [])) if m is not None and o is not None]
        ratios = [
            statistics.median(r) if r else None
            for r in ([m.cpu / o.cpu for m, o in pairs], [m.wall / o.wall for m, o in pairs])
        ]
        private = [m.peak_private for m in measurements if m.peak_private is not None]
        return [
            CONTENDERS[name],
            f"{statistics.median(m.cpu for m in measurements):.1f}",
            f"{statistics.median(m.wall for m in measurements):.1f}",
            human(statistics.median(m.peak_rss for m in measurements)),
            human(statistics.median(private)) if private else "",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        ]

    return [row(name) for name in contenders]


def all_versions(options: argparse.Namespace) -> dict[str, Any]:
    """Environment -> its packages' versions, and the commit of the authors' checkout."""
    packages = ["torch", "transformers", "safetensors", "numpy"]
    found: dict[str, Any] = {"ours": measuring.versions(sys.executable, ["emr_hf", *packages])}
    for name, package in (("fusion_bench", "fusion-bench"), ("mergekit", "mergekit")):
        if environment := getattr(options, name):
            found[name] = measuring.versions(python_of(environment), [package, *packages])
    if options.authors:
        command = ["git", "-C", str(options.authors), "rev-parse", "HEAD"]
        found["authors"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found


def parse() -> argparse.Namespace:
    def environment(name: str) -> Path | None:
        return Path(os.environ[name]) if name in os.environ else None

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=["110m-fp32", "0.5b-bf16"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", type=int, help="number of finetunes (default: the workload's, 8 and 4)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of a workload's layers and words")
    parser.add_argument("--folder", type=Path, help="where to keep the workloads for another time (default: nowhere)")
    parser.add_argument("--json", type=Path, help="file for every repeat's numbers")
    parser.add_argument("--authors", type=Path, default=environment("EMR_AUTHORS"), metavar="CHECKOUT")
    parser.add_argument("--fusion-bench", type=Path, default=environment("EMR_FUSION_BENCH"), metavar="PYTHON")
    parser.add_argument("--mergekit", type=Path, default=environment("EMR_MERGEKIT"), metavar="PYTHON")
    return parser.parse_args()


def main() -> None:
    options = parse()
    noted = {**measuring.circumstances(), "versions": all_versions(options), "workloads": {}}
    results = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        scratch = Path(name)
        for workload in options.workload:
            models = Models.write(workload, options.folder or scratch, options.tasks, options.scale)
            repeats: list[dict[str, Any]] = []
            noted["workloads"][workload] = {"tasks": models.tasks, "bytes": models.nbytes, "repeats": repeats}

            def note(repeat: dict[str, Any], repeats: list[dict[str, Any]] = repeats) -> None:
                repeats.append(repeat)
                measuring.write_json(options.json, noted)  # after each, as a run takes long

            results[workload] = models, run_all(models, scratch, options, note)
        show(noted, results, options)  # here, while the models are there to be measured


def show(noted: Mapping[str, Any], results: Mapping[str, Any], options: argparse.Namespace) -> None:
    from emr_hf.report import human, markdown_table  # here, as it brings torch: see `measuring`

    print(
        f"{measuring.machine_line(noted)}; one thread each unless said, warm page cache, median of {options.repeats}."
    )
    header = ["contender", "CPU s", "wall s", "peak RSS", "peak private", "CPU / ours", "wall / ours"]
    for workload, (models, taken) in results.items():
        print(f"\n{workload}: {models.tasks} finetunes and a base of {human(models.nbytes)} each, {models.dtype}\n")
        print(*markdown_table(header, rows(taken, options.contenders)), sep="\n")


if __name__ == "__main__":
    main()
