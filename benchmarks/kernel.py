"""The two loops by themselves, one thread, as times the stream floor: election and rebuild, compiled and in torch.

    python benchmarks/kernel.py [--numel 4000000] [--repeats 5]

The floor reads the same streams and writes one, by numpy's xor, in the same process and in turn: N + 1 checkpoints
and one tensor of their dtype for the election, of which a merge has one block at a time in memory; base and vector,
of the weights' dtype, and weights for the rebuild.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measuring import circumstances, machine_line, write_json
from torch import Tensor

from emr_hf import bits, election, kernels
from emr_hf.report import markdown_table

_PIECE = 1 << 18


def floor(inputs: list[Tensor]) -> Callable[[], None]:
    streams = [tensor.view(torch.int16).numpy() for tensor in inputs]
    out = np.empty_like(streams[0])

    def run() -> None:
        for start in range(0, len(out), _PIECE // 2):
            piece = slice(start, start + _PIECE // 2)
            np.bitwise_xor(streams[0][piece], streams[1][piece], out=out[piece])
            for stream in streams[2:]:
                np.bitwise_xor(out[piece], stream[piece], out=out[piece])

    return run


def electing(base: Tensor, finetunes: list[Tensor]) -> Callable[[], None]:
    tensor = election.TensorElection(base, finetunes)
    # As a merge does: each block into the same buffers, which are then written to the file.
    block_size = election.block_size(len(finetunes))
    tau = torch.zeros(block_size)
    masks = [torch.zeros(bits.packed_size(block_size), dtype=torch.uint8) for _ in finetunes]

    def run() -> None:
        for block in tensor.blocks():
            numel = block.stop - block.start
            tensor.run(block, tau[:numel], [mask[: bits.packed_size(numel)] for mask in masks])

    return run


def in_torch(run: Callable[[], None]) -> Callable[[], None]:
    """The same without what is compiled."""

    def run_in_torch() -> None:
        library, kernels._library = kernels._library, None
        try:
            run()
        finally:
            kernels._library = library

    return run_in_torch


def contenders(dtype: torch.dtype, tasks: int, numel: int) -> dict[str, dict[str, Callable[[], None]]]:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(numel, generator=generator) * 0.02).to(dtype)
    finetunes = [(base.float() + torch.randn(numel, generator=generator) * 1e-3).to(dtype) for _ in range(tasks)]
    tau = (torch.randn(numel, generator=generator) * 1e-3).to(dtype)
    packed = bits.pack(torch.rand(numel, generator=generator) > 0.4)
    out, rescaler = torch.empty_like(base), torch.tensor(1.1)

    def rebuild() -> None:
        bits.rebuild(base, tau, packed, rescaler, out=out)

    elect = electing(base, finetunes)
    return {
        f"election, N = {tasks}": {
            "floor": floor([base, *finetunes]),
            "compiled": elect,
            "torch": in_torch(elect),
        },
        "rebuild": {"floor": floor([base, tau]), "compiled": rebuild, "torch": in_torch(rebuild)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=4_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, rows = [], []
    for dtype, tasks in ((torch.float32, 8), (torch.bfloat16, 4)):
        for loop, runs in contenders(dtype, tasks, options.numel).items():
            taken: dict[str, list[float]] = {name: [] for name in runs}
            for repeat in range(options.repeats + 1):
                for name, run in runs.items():
                    started = time.process_time()
                    run()
                    if repeat:
                        taken[name].append((time.process_time() - started) * 1e11 / options.numel)
            for name, values in taken.items():
                middle = statistics.median(values)
                ratio = middle / statistics.median(taken["floor"])
                rows.append([str(dtype).removeprefix("torch."), loop, name, f"{middle:.0f}", f"{ratio:.2f}"])
                results.append({"dtype": str(dtype), "loop": loop, "name": name, "ms per 100 M": values})
    noted = circumstances()
    print(machine_line(noted), "\n")
    print(*markdown_table(["dtype", "loop", "", "CPU ms per 100 M", "/ floor"], rows), sep="\n")
    write_json(options.json, {**noted, "results": results})


if __name__ == "__main__":
    main()
