"""What a merge will do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from . import election
from .checkpoint import NamedTensors
from .format import part_of
from .publication import Target
from .recipe import Recipe
from .report import human
from .storage import TensorInfo


@dataclass
class Plan:
    """A checked merge, ready to run.

    Attributes:
        recipe: the request.
        base: the base's tensors.
        finetunes: task -> its tensors.
        architecture: class name of the wrapped model.
        config: configuration of the wrapped model, with the default task's labels.
        skeleton: the wrapped model on the meta device.
        dtype: of the base in the repo.
        save_as: layout of what is written, `"model"` or `"peft"`.
        vectors: settings of the (IA)³ adapter whose vectors are merged; `None` where weights are.
        merged: names that are merged, in the model's order.
        private: name -> why it is kept for each task by itself.
        kept: names of the tensors that no finetune touches: they stay the base's.
        repo: folder of the repo that the plan changes; `None` for a first merge.
        dtypes: name -> dtype of the base's tensor in the repo, or when the base is loaded beside it.
        skipped: (checkpoint, stored name, why) of every stored tensor that is not used.
        outputs: name in the repo -> shape and dtype.
        warnings: what the user should know.
        target: the place to write to, as it was checked; `None` if it was not.
    """

    recipe: Recipe
    base: NamedTensors
    finetunes: dict[str, NamedTensors]
    architecture: str
    config: PreTrainedConfig
    skeleton: PreTrainedModel
    dtype: torch.dtype
    save_as: str = "model"
    vectors: dict[str, Any] | None = None
    merged: list[str] = field(default_factory=list)
    private: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    repo: Path | None = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    outputs: dict[str, TensorInfo] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    target: Target | None = None

    @property
    def tasks(self) -> list[str]:
        return list(self.finetunes)

    @property
    def task_keys(self) -> dict[str, str]:
        """Task -> its name in buffers and files; tasks may be called anything, these are always legal."""
        return {task: f"t{index}" for index, task in enumerate(self.finetunes)}

    @property
    def default_task(self) -> str:
        return self.recipe.default_task or self.tasks[0]

    @property
    def bytes_in(self) -> int:
        return self.base.nbytes + self.bytes_finetunes

    @property
    def bytes_finetunes(self) -> int:
        return sum(checkpoint.nbytes for checkpoint in self.finetunes.values())

    @property
    def bytes_out(self) -> int:
        return sum(info.nbytes for info in self.outputs.values())

    @property
    def bytes_modulators(self) -> int:
        """Bytes of everything that is written beside the base."""
        return sum(info.nbytes for name, info in self.outputs.items() if part_of(name) != "base")

    @property
    def memory(self) -> int:
        """Estimate of the private memory that the merge's tensors need, bytes; mapped files are not counted."""
        checkpoints = [self.base, *self.finetunes.values()]
        return 128 * election.BLOCK + 2 * max(checkpoint.largest_conversion for checkpoint in checkpoints)

    def stored_dtype(self, name: str) -> torch.dtype:
        return self.dtypes[name]

    def __str__(self) -> str:
        merged = sum(self.base.infos[name].numel for name in self.merged)
        lines = [
            f"{self.architecture}, {len(self.finetunes)} tasks on {self.base.source.name}",
            f"merge    {len(self.merged)} tensors, {merged:,} elements, method={self.recipe.method}, "
            f"rescale={self.recipe.rescale}, "
            f"tau in {self.recipe.tau_dtype}, base in {dtype_name(self.dtype)}",
        ]
        if self.vectors is not None:
            lines.append("space    that of the (IA)³ vectors, base value one")
        lines += _grouped("private", [(why, name) for name, why in self.private.items()])
        lines += _grouped("keep", [("the base's, no finetune touches them", name) for name in self.kept])
        lines += _grouped("skip", [(f"{label}: {why}", name) for label, name, why in self.skipped])
        for task, checkpoint in self.finetunes.items():
            default = " (default)" if task == self.default_task else ""
            lines.append(f"task     {task}{default}: {checkpoint.source.name}")
        lines += [f"warning  {warning}" for warning in self.warnings]
        lines.append(
            f"disk     {human(self.bytes_out)} out, {human(self.bytes_in)} in "
            f"({len(self.finetunes)} finetunes: {human(self.bytes_finetunes)})"
        )
        adapters = all(checkpoint.source.adapter is not None for checkpoint in self.finetunes.values())
        if adapters and self.bytes_modulators > self.bytes_finetunes:
            lines.append(
                f"note     the adapters by themselves are SMALLER than what is written beside the base "
                f"({human(self.bytes_modulators)})"
            )
        lines.append(f"memory   about {human(self.memory)} of tensors, whatever the number and size of the models")
        return "\n".join(lines)


def _grouped(verb: str, reasons: Iterable[tuple[str, str]], shown: int = 3) -> list[str]:
    """One line a reason, with the first names."""
    names_of: dict[str, list[str]] = {}
    for why, name in reasons:
        names_of.setdefault(why, []).append(name)
    lines = []
    for why, names in names_of.items():
        more = f", ... {len(names) - shown} more" if len(names) > shown else ""
        lines.append(f"{verb:<8} {len(names)} tensors ({why}): {', '.join(names[:shown])}{more}")
    return lines


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
