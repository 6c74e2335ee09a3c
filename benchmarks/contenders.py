"""What `merge.py` runs in processes of their own beside command lines: two rivals without one, and two floors.

    PYTHON benchmarks/contenders.py {authors,fusion-bench,xor,copy} MODELS ...

MODELS is a folder as `workloads.py` writes it. PYTHON is an environment that has what the verb needs; each verb
imports that and no more. With --save FILE the rivals write their unified vector, to check what they compute.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path
from typing import Any


def models(folder: Path, tasks: int) -> list[Path]:
    """The base and the finetunes."""
    return [folder / "base", *(folder / f"task{index}" for index in range(tasks))]


def authors(options: argparse.Namespace) -> None:
    """The authors' `emr_merge` on task vectors of whole state dicts, taken from their checkout as it is.

    It stands in a script that starts an evaluation, so only the function is run of that file. Nothing is written.
    """
    import torch
    from safetensors.torch import load_file, save_file

    source = options.checkout / "merge_vit" / "src"
    sys.path.append(str(source))
    from task_vectors import TaskVector

    path = source / "main_emr_merging.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name == "emr_merge"]
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(tree, str(path), "exec"), namespace)

    files = [folder / "model.safetensors" for folder in models(options.models, options.tasks)]
    base, vectors = load_file(files[0]), []
    for file in files[1:]:
        finetune = load_file(file)
        vectors.append(TaskVector(vector={name: finetune[name] - base[name] for name in base}))
    unified, _, rescalers = namespace["emr_merge"](vectors)
    print(rescalers.tolist())
    if options.save:
        save_file(unified, options.save)


def fusion_bench(options: argparse.Namespace) -> None:
    """FusionBench's `EMRMerging` on a pool of models that transformers loads. Nothing is written."""
    from fusion_bench import BaseModelPool
    from fusion_bench.method.emr_merging.emr_merging import EMRMerging
    from safetensors.torch import save_file
    from transformers import AutoConfig

    (architecture,) = AutoConfig.from_pretrained(options.models / "base").architectures
    folders = models(options.models, options.tasks)
    pool = {
        "_pretrained_" if folder.name == "base" else folder.name: {
            "_target_": f"transformers.{architecture}.from_pretrained",
            "pretrained_model_name_or_path": str(folder),
        }
        for folder in folders
    }
    merged = EMRMerging().run(BaseModelPool(pool))
    print([float(modulator.rescaler) for modulator in merged.modulators.values()])
    if options.save:
        vector = {name: value.detach().clone() for name, value in merged.unified_task_vector.items()}
        save_file(vector, options.save)


def xor(options: argparse.Namespace) -> None:
    """Floor of reading: all models, mapped, by xor into one block that stays in the cache. Nothing is written."""
    import numpy as np

    block = 1 << 16
    streams = [
        np.memmap(folder / "model.safetensors", np.uint8, "r") for folder in models(options.models, options.tasks)
    ]
    result = np.empty(block // 8, np.uint64)
    for start in range(0, min(map(len, streams)) // block * block, block):
        parts = [stream[start : start + block].view(np.uint64) for stream in streams]
        np.copyto(result, parts[0])
        for part in parts[1:]:
            np.bitwise_xor(result, part, out=result)


def copy(options: argparse.Namespace) -> None:
    """Floor of input and output: all models read into one buffer, and so many bytes of them written as asked for."""
    buffer = memoryview(bytearray(8 << 20))
    left = options.bytes
    with open(options.out, "wb", buffering=0) as out:
        for folder in models(options.models, options.tasks):
            with open(folder / "model.safetensors", "rb", buffering=0) as file:
                while size := file.readinto(buffer):
                    left -= out.write(buffer[: min(size, left)])
    if left:
        raise SystemExit(f"the models are {left} bytes smaller than what is to be written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for run in (authors, fusion_bench, xor, copy):
        verb = verbs.add_parser(run.__name__.replace("_", "-"), description=run.__doc__)
        verb.set_defaults(run=run)
        verb.add_argument("models", type=Path)
        verb.add_argument("--tasks", type=int, required=True, help="number of finetunes")
        if run is authors:
            verb.add_argument("--checkout", type=Path, required=True, help="of the authors' repository")
        if run in (authors, fusion_bench):
            verb.add_argument("--save", type=Path, help="file for the unified vector")
        if run is copy:
            verb.add_argument("--out", type=Path, required=True)
            verb.add_argument("--bytes", type=int, required=True, help="to write")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
