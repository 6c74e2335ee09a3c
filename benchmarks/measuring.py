"""What the timing benchmarks share: one child process measured, and what to note beside its numbers.

Of the standard library only, and to be imported before anything large: a child's peak memory is at least what its
parent held when it started the child, as the kernel hands that mark on.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)


@dataclass(frozen=True)
class Measurement:
    """What one process took: seconds, and bytes at its highest.

    `peak_rss` counts pages mapped from files, which are the operating system's to take back. `peak_private`, looked
    at every 10 ms, does not; None where the kernel does not tell.
    """

    user: float
    system: float
    wall: float
    peak_rss: int
    peak_private: int | None

    @property
    def cpu(self) -> float:
        return self.user + self.system


class ChildError(RuntimeError):
    """A measured process failed; the message ends with its last lines."""


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measurement:
    """Run a command to its end, its children included.

    Raises:
        ChildError: its exit status was not 0.
    """
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        peak_private: int | None = None
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if (private := _private_memory(child.pid)) is not None:
                peak_private = max(peak_private or 0, private)
            time.sleep(0.01)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            last = "\n".join(output.read().decode(errors="replace").splitlines()[-15:])
            raise ChildError(f"exit status {child.returncode} of {shlex.join(command)}\n{last}")
    return Measurement(usage.ru_utime, usage.ru_stime, wall, usage.ru_maxrss * 1024, peak_private)


def _private_memory(pid: int) -> int | None:
    """Bytes of a process's anonymous memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)


def python_of(environment: Path) -> str:
    """The interpreter, given itself or its virtual environment."""
    return str(environment / "bin" / "python" if environment.is_dir() else environment)


def mergekit_config(
    path: Path, method: str, base: Path, finetunes: Iterable[Path], parameters: Mapping[str, float], **more: str
) -> Path:
    """Write what mergekit is to merge; each finetune gets the same parameters."""
    models = [{"model": str(finetune), "parameters": dict(parameters)} for finetune in finetunes]
    path.write_text(json.dumps({"merge_method": method, "base_model": str(base), "models": models, **more}))
    return path  # JSON is YAML


def circumstances() -> dict[str, Any]:
    """When, on what and by which command something is measured; of absolute paths the last part only."""
    arguments = [Path(part).name if part.startswith("/") else part for part in sys.argv]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *arguments]),
        "machine": {
            "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
            "cores": os.cpu_count(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
    }


def _field(path: Path, name: str) -> str | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def machine_line(noted: Mapping[str, Any]) -> str:
    """`circumstances` as one line of text."""
    machine = noted["machine"]
    return (
        f"`{noted['command']}`, {noted['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory'] / 1e9:.0f} GB, Python {machine['python']}"
    )


def versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    """Package -> version of those that an environment has."""
    script = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"
    )
    output = subprocess.run([python, "-c", script, *packages], check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a measurement down, where a path is given."""
    if path is not None:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def pyplot_for_svg() -> Any:
    """Return pyplot in the style of the figures in docs/: text stays text, and the same figure is the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "emr_hf",
            "font.family": "sans-serif",
            "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans", "sans-serif"],
            "font.size": 12,
            "text.color": "#1f2328",
            "axes.edgecolor": "#8c959f",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    from matplotlib import pyplot

    return pyplot
