"""What a batch of several tasks costs, beside the same rows of one task and beside one plain model for each task.

    python benchmarks/mixed.py [--lengths 16 64] [--rows 16] [--tasks 2 8] [--hidden 768] [--layers 12] [--json FILE]

A merged model of random weights (BERT's shapes; only sizes matter here), rows dealt out to the tasks in turn. In one
process with one thread, in turn:

* one task: a plain model's forward of all rows, the floor;
* N models: one plain model for each task, a forward of its rows on each, the logits put back in row order;
* merged: `model(**batch, emr_task=[...])` as loaded: weights rebuilt for each task, and for the first again;
* merged, ready: the same after `keep_ready(N)`, so that a switch only changes pointers.

The plain models are the merged one's tasks unloaded, so all but the floor have to give the same logits. Memory is that
of weights: parameters, buffers, base, vector and masks, and those that `keep_ready` holds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import circumstances, machine_line, write_json
from torch import Tensor, nn
from transformers.utils import logging
from workloads import bert_settings, write_berts

import emr_hf
from emr_hf.modeling import EMRMergedModel
from emr_hf.report import human, markdown_table

CONTENDERS = {"plain": "one task", "models": "N models", "merged": "merged", "ready": "merged, ready"}
Batch = dict[str, Tensor]


def write_repo(folder: Path, tasks: int, hidden: int, layers: int) -> Path:
    finetunes = write_berts(folder, tasks, **bert_settings(hidden, layers))
    emr_hf.merge(folder / "base", finetunes, folder / "repo", progress=False)
    return folder / "repo"


def load(repo: Path) -> Any:
    return EMRMergedModel.from_pretrained(repo).eval()


def make_batch(vocabulary: int, rows: int, length: int) -> Batch:
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def one_after_the_other(models: Sequence[nn.Module], batch: Batch) -> Tensor:
    """Row i by model i modulo N, as one would write it by hand."""
    rows = len(batch["input_ids"])
    parts = {}
    for index, model in enumerate(models[:rows]):
        mine = list(range(index, rows, len(models)))
        logits = model(**{name: value[mine] for name, value in batch.items()}).logits
        parts.update(zip(mine, logits))
    return torch.stack([parts[row] for row in range(rows)])


def weight_bytes(models: Iterable[nn.Module]) -> int:
    """Bytes of all tensors, shared ones once."""
    storages = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def merged_bytes(model: Any) -> int:
    """Bytes of one task's merged weights, as `keep_ready` holds them."""
    return sum(model.model.get_parameter(name).nbytes for name in model.config.merged_parameters)


def measure(contenders: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repeat, after a first that does not count."""
    outputs = {name: run() for name, run in contenders.items()}
    for name in ("merged", "ready"):
        torch.testing.assert_close(outputs[name], outputs["models"], rtol=1e-4, atol=1e-5)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name in list(contenders)[:: -1 if repeat % 2 else 1]:
            started = time.perf_counter()
            contenders[name]()
            taken[name].append((time.perf_counter() - started) * 1e3)
    return taken


@torch.no_grad()
def measure_tasks(folder: Path, tasks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All lengths and numbers of rows with one number of tasks."""
    repo = write_repo(folder, tasks, options.hidden, options.layers)
    models = [load(repo).merge_and_unload(f"task{index}") for index in range(tasks)]
    merged, ready = load(repo), load(repo).keep_ready(tasks)
    memory = {
        "plain": weight_bytes(models[:1]),
        "models": weight_bytes(models),
        "merged": weight_bytes([merged]),
        "ready": weight_bytes([ready]) + (tasks - 1) * merged_bytes(ready),
    }
    results = []
    for length in options.lengths:
        for rows in options.rows:
            batch = make_batch(models[0].config.vocab_size, rows, length)
            names = [f"task{row % tasks}" for row in range(rows)]
            contenders = {
                "plain": lambda batch=batch: models[0](**batch).logits,
                "models": lambda batch=batch: one_after_the_other(models, batch),
                "merged": lambda batch=batch, names=names: merged(**batch, emr_task=names).logits,
                "ready": lambda batch=batch, names=names: ready(**batch, emr_task=names).logits,
            }
            taken = measure(contenders, options.repeats)
            results.append({"length": length, "rows": rows, "tasks": tasks, "milliseconds": taken, "memory": memory})
    return results


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """Rows of the table: medians over the repeats; ratios to the floor of the same repeat, their median."""
    taken = result["milliseconds"]
    return [
        [
            label,
            *(str(result[key]) for key in ("length", "rows", "tasks")),
            f"{statistics.median(taken[name]):.0f}",
            f"{statistics.median(ms / floor for ms, floor in zip(taken[name], taken['plain'])):.2f}",
            human(result["memory"][name]),
        ]
        for name, label in CONTENDERS.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64], help="tokens of a row")
    parser.add_argument("--rows", type=int, nargs="+", default=[16], help="of a batch")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for every repeat's numbers")
    options = parser.parse_args()
    if min(options.rows) < max(options.tasks):
        parser.error("--rows: expected at least one row for each task")
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    noted = circumstances()
    results: list[dict[str, Any]] = []
    for tasks in options.tasks:
        with tempfile.TemporaryDirectory() as folder:
            results += measure_tasks(Path(folder), tasks, options)
        write_json(options.json, {**noted, "torch": torch.__version__, "results": results})
    results.sort(key=lambda result: (result["length"], result["rows"], result["tasks"]))
    header = ["", "length", "rows", "tasks", "ms", "/ one task", "weights"]
    print(f"{machine_line(noted)}; one thread, median of {options.repeats}.\n")
    print(*markdown_table(header, [row for result in results for row in rows_of(result)]), sep="\n")


if __name__ == "__main__":
    main()
