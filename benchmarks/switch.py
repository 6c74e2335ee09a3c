"""How long a switch to another task takes, beside a copy of one checkpoint and the speed of memory.

    python benchmarks/switch.py [--dtypes float32 bfloat16] [--tasks 2 8] [--threads 1 2] [--device cuda]

A merged model of random weights (BERT-base shapes and more layers; only sizes matter here). In one process, in turn:

* floor: two streams read and one written, by numpy's xor, of the bytes that a rebuild moves;
* set_task: as it is; with the bank mapped from the repo's files; and back to a task that `keep_ready` holds;
* reload: what one does without a merge, the task's own checkpoint read from the page cache into the model's weights,
  and the same with its pages dropped from the cache first, where the system lets us.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measuring import circumstances, machine_line, write_json
from safetensors import safe_open
from torch import Tensor
from workloads import write_berts

import emr_hf
from emr_hf.modeling import EMRMergedModel
from emr_hf.report import markdown_table


def write_repo(folder: Path, dtype: torch.dtype, tasks: int, layers: int) -> Path:
    finetunes = write_berts(folder, tasks, dtype, num_hidden_layers=layers)
    emr_hf.merge(folder / "base", finetunes, folder / "repo", progress=False)
    return folder / "repo"


def weights_of(model: EMRMergedModel) -> list[tuple[str, Tensor]]:
    return [(name, model.model.get_parameter(name).data) for name in model.config.merged_parameters]


def stream_floor(model: EMRMergedModel) -> Callable[[], None]:
    """Base and unified vector read, weights written, in pieces that fit the cache; of their sizes."""
    pairs = []
    for name, weight in weights_of(model):
        base, tau = model.emr.base.get(name), model.emr.tau.get(name)
        pairs.append([t.reshape(-1).view(torch.uint8).numpy() for t in (base, tau, torch.empty_like(weight))])

    def run() -> None:
        for base, tau, out in pairs:
            ratio = len(tau) // len(out)
            for start in range(0, len(out), 1 << 18):
                piece = slice(start, start + (1 << 18))
                wide = tau[piece.start * ratio : piece.stop * ratio]
                np.bitwise_xor(base[piece], wide[: len(out[piece])], out=out[piece])
                for part in range(1, ratio):  # a vector of a wider dtype has to be read whole
                    np.bitwise_xor(out[piece], wide[part * len(out[piece]) :][: len(out[piece])], out=out[piece])

    return run


def reload(model: EMRMergedModel, checkpoint: Path, cold: bool) -> Callable[[], None]:
    """Copy a checkpoint's tensors into the model, read anew each time."""
    path = checkpoint / "model.safetensors"

    def run() -> None:
        with safe_open(path, "pt") as file:
            for name, weight in weights_of(model):
                weight.copy_(file.get_tensor(name))

    def drop_and_run() -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        run()

    return drop_and_run if cold else run


def switching(model: EMRMergedModel, count: int) -> Callable[[], None]:
    """To the next of the first `count` tasks."""
    tasks = model.tasks[:count]

    def run() -> None:
        model.set_task(tasks[(tasks.index(model.active_task) + 1) % count if model.active_task in tasks else 0])
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def measure(repo: Path, tasks: int, device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of each."""
    plain = EMRMergedModel.from_pretrained(repo).to(device)
    contenders: dict[str, Callable[[], None]] = {"set_task": switching(plain, tasks)}
    if device == "cpu":
        mapped = EMRMergedModel.from_pretrained(repo, emr_memory="mapped")
        ready = EMRMergedModel.from_pretrained(repo).keep_ready(2)
        contenders = {
            "floor": stream_floor(plain),
            **contenders,
            "set_task, mapped": switching(mapped, tasks),
            "set_task, ready": switching(ready, 2),
            "reload, warm": reload(plain, repo.parent / "task0", cold=False),
            "reload, cold": reload(plain, repo.parent / "task0", cold=True),
        }
    else:
        source = [weight.clone() for _, weight in weights_of(plain)]
        contenders["copy"] = gpu_copy(plain, source)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 3):  # every task once before it counts
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if repeat >= 3:
                taken[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def gpu_copy(model: EMRMergedModel, source: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for (_, weight), values in zip(weights_of(model), source):
            weight.copy_(values)
        torch.cuda.synchronize()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results, rows = [], []
    for dtype in options.dtypes:
        for tasks in options.tasks:
            with tempfile.TemporaryDirectory() as folder:
                repo = write_repo(Path(folder), getattr(torch, dtype), tasks, options.layers)
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    found = measure(repo, tasks, options.device, options.repeats)
                    results.append({"dtype": dtype, "tasks": tasks, "threads": threads, "milliseconds": found})
                    reference = found.get("floor", found.get("copy"))
                    for name, value in found.items():
                        rows.append(
                            [dtype, str(tasks), str(threads), name, f"{value:.1f}", f"{value / reference:.2f}"]
                        )
    noted = circumstances()
    print(machine_line(noted), "\n")
    print(*markdown_table(["dtype", "tasks", "threads", "", "ms", "/ floor"], rows), sep="\n")
    write_json(options.json, {**noted, "results": results})


if __name__ == "__main__":
    main()
