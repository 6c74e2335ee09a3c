"""Peak private memory of a merge on disk, beside the same merge in memory, by number of tasks and size of model.

    python benchmarks/memory.py [--hidden 512 1024] [--tasks 2 8] [--adapters]

With --adapters the finetunes are LoRAs of all linear layers; in memory, PEFT makes a full model of each first. Private
memory is `RssAnon`: pages mapped from files are the operating system's to take back. Each merge runs in a
process of its own, on random weights (only sizes matter here).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import emr_hf
from emr_hf.report import human, table


def private_memory() -> int:
    """Bytes of this process's anonymous memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


def peak_of(function) -> tuple[int, float]:
    """Highest rise of private memory while the function runs, bytes, and its seconds."""
    before, peak, done = private_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    function()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return max(peak, private_memory()) - before, seconds


def write_models(folder: Path, hidden: int, tasks: int, adapters: bool) -> None:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=16000,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    for name in (f"task{i}" for i in range(tasks)):
        if adapters:
            write_adapter(folder / "base", folder / name)
        else:
            LlamaForCausalLM(config).save_pretrained(folder / name)


@torch.no_grad()
def write_adapter(base: Path, folder: Path) -> None:
    settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), settings).save_pretrained(folder)


def run_one(kind: str, folder: Path, tasks: int) -> None:
    """In a child process: one merge, its peak and seconds on stdout."""
    torch.set_num_threads(1)
    finetunes = {f"task{i}": folder / f"task{i}" for i in range(tasks)}
    if kind == "disk":
        peak, seconds = peak_of(lambda: emr_hf.merge(folder / "base", finetunes, folder / "out", progress=False))
    else:
        peak, seconds = peak_of(lambda: merge_in_memory(folder / "base", finetunes))
    print(peak, seconds)


def merge_in_memory(base: Path, finetunes: dict[str, Path]) -> None:
    state_dicts = {task: load_finetune(base, path).state_dict() for task, path in finetunes.items()}
    emr_hf.merge_state_dicts(LlamaForCausalLM.from_pretrained(base).state_dict(), state_dicts)


def load_finetune(base: Path, path: Path) -> PreTrainedModel:
    if (path / "adapter_config.json").exists():
        return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), path).merge_and_unload()
    return LlamaForCausalLM.from_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--adapters", action="store_true", help="merge LoRAs in place of full finetunes")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, folder, tasks = options.child
        return run_one(kind, Path(folder), int(tasks))
    rows = []
    for hidden in options.hidden:
        for tasks in options.tasks:
            rows.append(measure(hidden, tasks, options.adapters))
    header = ["hidden", "tasks", "one model", "largest tensor", "disk: peak", "disk: s", "memory: peak", "memory: s"]
    print(*table(header, rows), sep="\n")


def measure(hidden: int, tasks: int, adapters: bool) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, hidden, tasks, adapters)
        size = (folder / "base" / "model.safetensors").stat().st_size
        row = [str(hidden), str(tasks), human(size), human(16000 * hidden * 4)]
        for kind in ("disk", "memory"):
            command = [sys.executable, __file__, "--child", kind, name, str(tasks)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            row += [human(int(output[-2])), f"{float(output[-1]):.1f}"]
        return row


if __name__ == "__main__":
    main()
