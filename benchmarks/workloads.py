"""Checkpoints of random weights to merge: a base and N finetunes of it, of real architectures and sizes.

    python benchmarks/workloads.py 110m-fp32 --folder FOLDER [--tasks 8] [--scale 1]

Writes FOLDER/NAME/{base,task0,task1,...}, unless they are there already, and prints where as JSON. A finetune is the
base and small noise, of another scale for each tensor (1e-4 to 2e-3, where weights are 2e-2), and in the word
embeddings in three rows of ten, the others being of words that the task never saw. With --scale below 1 there are
fewer layers and words, each layer keeping its shapes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    RobertaConfig,
)


@dataclass(frozen=True)
class Workload:
    """A size to merge.

    Attributes:
        config: scale -> configuration.
        auto: the Auto class of the architecture.
        dtype: of the checkpoints.
        tasks: number of finetunes unless told otherwise.
    """

    config: Callable[[float], PreTrainedConfig]
    auto: Any
    dtype: torch.dtype
    tasks: int


def bert_base(scale: float) -> PreTrainedConfig:
    """BERT-base's shapes under RoBERTa's names: mergekit 0.1.5 fails on BERT's optional `position_ids`."""
    return RobertaConfig(vocab_size=_scaled(30522, scale), num_hidden_layers=_scaled(12, scale))


def qwen2_half_billion(scale: float) -> PreTrainedConfig:
    return Qwen2Config(
        vocab_size=_scaled(151936, scale),
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=_scaled(24, scale),
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def _scaled(number: int, scale: float) -> int:
    return max(1, round(number * scale))


WORKLOADS = {
    "110m-fp32": Workload(bert_base, AutoModelForMaskedLM, torch.float32, 8),
    "0.5b-bf16": Workload(qwen2_half_billion, AutoModelForCausalLM, torch.bfloat16, 4),
}


def write_workload(workload: Workload, folder: Path, tasks: int, scale: float = 1.0) -> Path:
    """Write a base and its finetunes, one model at a time; returns the folder that has them.

    Models that an earlier call has written are taken as they are.
    """
    if scale != 1:
        folder = folder.with_name(f"{folder.name}-x{scale:g}")
    with torch.device("meta"):
        skeleton = workload.auto.from_config(workload.config(scale), dtype=workload.dtype)
    base = folder / "base"
    if not _is_written(base):
        _write(skeleton, base, _base_tensors(skeleton))
    for index in range(tasks):
        task = folder / f"task{index}"
        if not _is_written(task):
            _write(skeleton, task, _finetuned_tensors(base, torch.Generator().manual_seed(1 + index)))
    return folder


def _is_written(model: Path) -> bool:
    return (model / "config.json").exists()  # what is written last


def _base_tensors(skeleton: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in skeleton.named_parameters():  # tied weights once
        values = torch.randn(parameter.shape, generator=generator).mul_(0.02)
        if name.lower().endswith("norm.weight"):
            values += 1
        yield name, values.to(parameter.dtype)


def _finetuned_tensors(base: Path, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, weight in load_file(base / "model.safetensors").items():
        scale = 10 ** (-4 + 1.3 * torch.rand((), generator=generator))  # 1e-4 to 2e-3
        noise = torch.randn(weight.shape, generator=generator).mul_(scale)
        if "word_embeddings" in name or "embed_tokens" in name:
            noise *= torch.rand(len(noise), 1, generator=generator) < 0.3
        yield name, noise.add_(weight).to(weight.dtype)


def _write(skeleton: PreTrainedModel, folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(folder)


def write_berts(folder: Path, tasks: int, dtype: torch.dtype = torch.float32, **settings: int) -> dict[str, Path]:
    """A BERT classifier in `base`, and finetunes that are it and small noise.

    Args:
        settings: of the configuration, BERT-base's where they are not given.

    Returns:
        task -> its folder.
    """
    torch.manual_seed(0)
    model = BertForSequenceClassification._from_config(BertConfig(**settings), dtype=dtype)
    model.save_pretrained(folder / "base")
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    finetunes = {f"task{index}": folder / f"task{index}" for index in range(tasks)}
    for path in finetunes.values():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name] + (torch.randn(parameter.shape) * 1e-3).to(dtype))
        model.save_pretrained(path)
    return finetunes


def bert_settings(hidden: int, layers: int) -> dict[str, int]:
    """Of a BERT of this width and depth, with heads of 64."""
    heads = max(1, hidden // 64)
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--folder", type=Path, required=True, help="where the workloads are kept")
    parser.add_argument("--tasks", type=int, help="number of finetunes (default: 8 and 4)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the layers and words (default: %(default)s)"
    )
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    tasks = options.tasks or workload.tasks
    folder = write_workload(workload, options.folder / options.workload, tasks, options.scale)
    print(json.dumps({"folder": str(folder), "tasks": tasks, "dtype": str(workload.dtype).removeprefix("torch.")}))


if __name__ == "__main__":
    main()
