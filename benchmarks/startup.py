"""How long it takes until something happens: `import emr_hf` and `emr-hf --help`.

    python benchmarks/startup.py [--repeats 7] [--json FILE]

Each is a fresh process, in an order that turns round with each repeat, after one run of each that is not counted. What
`import emr_hf` adds is measured against `import torch, transformers`: submodules of transformers that it loads lazily
and emr_hf needs count against emr_hf.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import measuring
from measuring import Measurement, measure

BARE, LIBRARIES, PACKAGE, HELP = "nothing", "import torch, transformers", "the same and emr_hf", "emr-hf --help"
COMMANDS = {
    BARE: ["-c", "pass"],
    LIBRARIES: ["-c", "import torch, transformers"],
    PACKAGE: ["-c", "import torch, transformers, emr_hf"],
    HELP: ["-m", "emr_hf.cli", "--help"],
}


def run_all(repeats: int) -> dict[str, list[Measurement]]:
    taken: dict[str, list[Measurement]] = {name: [] for name in COMMANDS}
    for repeat in range(-1, repeats):  # the one before 0 fills the caches
        for name in list(COMMANDS)[:: -1 if repeat % 2 else 1]:
            measurement = measure([sys.executable, *COMMANDS[name]])
            if repeat >= 0:
                taken[name].append(measurement)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for every repeat's numbers")
    options = parser.parse_args()
    packages = ["emr_hf", "torch", "transformers", "peft"]
    noted = {**measuring.circumstances(), "versions": measuring.versions(sys.executable, packages)}
    taken = run_all(options.repeats)
    noted["repeats"] = {name: [asdict(m) for m in measurements] for name, measurements in taken.items()}
    measuring.write_json(options.json, noted)

    from emr_hf.report import markdown_table  # here, as it brings torch: see `measuring`

    print(f"{measuring.machine_line(noted)}; median of {options.repeats}.\n")
    rows = [
        [name, *(f"{statistics.median(getattr(m, what) for m in taken[name]):.2f}" for what in ("wall", "cpu"))]
        for name in COMMANDS
    ]
    added = [
        statistics.median(getattr(m, what) - getattr(o, what) for m, o in zip(taken[PACKAGE], taken[LIBRARIES]))
        for what in ("wall", "cpu")
    ]
    rows.append(["emr_hf beyond torch and transformers", *(f"{seconds:.2f}" for seconds in added)])
    print(*markdown_table(["process", "wall s", "CPU s"], rows), sep="\n")


if __name__ == "__main__":
    main()
