"""A task as a LoRA: truncated SVD of what the merge has kept of its weights' change."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from ..bits import StoredVector
from ..checkpoint import build_skeleton, tied_names
from ..errors import OptionError, short
from ..finished import FinishedRepo, FinishedTask
from ..report import human, table
from ..sites import site_of
from .binding import PREFIX
from .layers import inject, plain_name, require_peft, stored_names


@dataclass
class LoraReport:
    """What a LoRA keeps of a task.

    Attributes:
        task: the task.
        rank: of every module.
        error: ||D - B A|| / ||D||, D the change of all merged tensors together, those that are left out with it.
        errors: tensor -> the same of it alone.
        left_out: tensor -> why no LoRA can hold it; its change is lost.
        bytes_out: size of the adapter.
    """

    task: str
    rank: int
    error: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    bytes_out: int = 0

    def __str__(self) -> str:
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:3]
        lines = [
            f"{self.task} as a LoRA of rank {self.rank}: relative L2 error {self.error:.4f}, {human(self.bytes_out)}",
            *table(["worst tensors", "relative L2 error"], [[name, f"{error:.4f}"] for name, error in worst]),
        ]
        reasons = sorted(set(self.left_out.values()))
        for why in reasons:
            names = [name for name, reason in self.left_out.items() if reason == why]
            lines.append(f"left out: {len(names)} tensors ({why}): {', '.join(names[:3])}{', ...' * (len(names) > 3)}")
        return "\n".join(lines)


def check_rank(rank: object) -> int:
    """Raise OptionError unless `rank` is a whole number above 0."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise OptionError(f"rank={short(rank)}: expected a whole number above 0")
    return rank


@torch.no_grad()
def write_lora(repo: FinishedRepo, task: str, folder: Path, rank: int) -> LoraReport:
    """Write a task of a merge of weights as an ordinary LoRA adapter.

    Args:
        repo: the merged repo.
        task: one of its tasks.
        folder: an empty folder.
        rank: of every module.

    Returns:
        what it keeps.

    Raises:
        OptionError: the repo merges vectors, or two levels, the task changes nothing that a LoRA can hold, or the rank
            is larger than any weight.
    """
    require_peft()
    if repo.config.vectors is not None:
        raise OptionError(f"{repo.folder} merges (IA)³ vectors: write the task as an (IA)³ adapter (--as ia3)")
    if repo.config.method == "levels":
        raise OptionError(f"{repo.folder} holds two levels for each weight, not the base that a LoRA is added to")
    skeleton = build_skeleton(repo.source(task), torch.float32)
    _check_largest(rank, skeleton)
    kept = repo.task(task, skeleton)
    report = LoraReport(task, rank)
    tied = {name for pair in tied_names(skeleton).items() for name in pair}
    whole = _whole_modules(skeleton, repo.config.entry(task)["private"], tied)
    factors = _factors(repo, kept, skeleton, whole, tied, report)
    if not factors:
        raise OptionError(f"{task}: none of its weights has changed in a way that a LoRA can hold")
    peft_config = _save_settings(repo, skeleton, folder, rank, factors, whole)
    tensors = {}
    for name in stored_names(skeleton, peft_config):
        path, _, part = name.rpartition(".lora_")
        tensors[PREFIX + name] = _factor(factors[path], part) if path else kept.read(plain_name(name)).contiguous()
    save_file(tensors, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    report.bytes_out = sum(tensor.nbytes for tensor in tensors.values())
    return report


def _check_largest(rank: int, skeleton: PreTrainedModel) -> None:
    """Raise where a rank is larger than any weight has rows or columns, those of a convolution's kernels together."""
    most = max((max(len(w), w[0].numel()) for w in skeleton.parameters() if w.dim() > 1 and len(w)), default=1)
    if rank > most:
        raise OptionError(f"rank={short(rank)}: expected at most {most:,}, the largest side of a weight")


def _whole_modules(skeleton: PreTrainedModel, private: Collection[str], tied: Collection[str]) -> list[str]:
    """Modules that the task has for itself, for `modules_to_save`: the outermost ones that hold nothing else."""
    tensors = skeleton.state_dict()
    modules = set()
    for name in private:
        path = name.rpartition(".")[0]
        if not path or name in tied:
            raise OptionError(
                f"{name} is the task's own, and no module that an adapter could save: export a checkpoint"
            )
        while parent := path.rpartition(".")[0]:
            if not all(tensor in private for tensor in tensors if tensor.startswith(f"{parent}.")):
                break
            path = parent
        modules.add(path)
    return sorted(modules)


def _factors(
    repo: FinishedRepo,
    kept: FinishedTask,
    skeleton: PreTrainedModel,
    whole: Sequence[str],
    tied: Collection[str],
    report: LoraReport,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of a module -> the factors of its change; the report is filled in on the way."""
    factors, square, square_error = {}, 0.0, 0.0
    for name in repo.config.merged_parameters or []:
        change = kept.deviation(name)
        assert isinstance(change, StoredVector)
        delta = change[0 : change.tau.numel()].reshape(change.tau.shape)
        length = float(delta.double().square().sum())
        module, attr = site_of(skeleton, name)
        path = name.rpartition(".")[0]
        why = "tied to another module" if name in tied else _obstacle(module, attr)
        if length == 0 or any(f"{path}.".startswith(f"{module}.") for module in whole):
            continue
        square += length
        if why is not None:
            report.left_out[name] = why
            square_error += length
            continue
        left, right, error = factorise(_as_matrix(module, delta), report.rank)
        factors[path] = _in_layer(module, left, right)
        report.errors[name] = (error / length) ** 0.5
        square_error += error
    report.error = (square_error / square) ** 0.5 if square else 0.0
    return factors


def _obstacle(module: nn.Module, attr: str) -> str | None:
    if attr != "weight" or not isinstance(module, (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d)):
        return "LoRA holds weights of linear, embedding and convolution layers only"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return "a grouped convolution"
    return None


def factorise(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Best approximation of a matrix by `B A` (Eckart and Young), the singular values shared between the two.

    Args:
        matrix: `(m, n)` float32.
        rank: r; columns beyond the matrix's own rank are zero.

    Returns:
        B `(m, r)`, A `(r, n)`, and the squared L2 error of their product.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    left, right = matrix.new_zeros(len(matrix), rank), matrix.new_zeros(rank, matrix.shape[1])
    left[:, :kept], right[:kept] = u[:, :kept] * root, root[:, None] * vh[:kept]
    return left, right, float((matrix - left @ right).double().square().sum())


def _as_matrix(module: nn.Module, delta: Tensor) -> Tensor:
    """A weight's change as `(outputs, inputs)`."""
    if isinstance(module, (Conv1D, nn.Embedding)):
        return delta.T
    return delta.reshape(len(delta), -1)


def _in_layer(module: nn.Module, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors A and B in the shapes of PEFT's layers."""
    if isinstance(module, nn.Conv2d):
        return right.reshape(len(right), module.in_channels, *module.kernel_size), left[:, :, None, None]
    return right, left


def _factor(factors: tuple[Tensor, Tensor], part: str) -> Tensor:
    return factors["B" in part.partition(".")[0]].contiguous()


def _save_settings(
    repo: FinishedRepo,
    skeleton: PreTrainedModel,
    folder: Path,
    rank: int,
    factors: dict[str, Any],
    whole: Sequence[str],
) -> Any:
    """Write `adapter_config.json`, and put the adapter's layers into the skeleton; returns PEFT's configuration."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _find_minimal_target_modules

    from .export import base_settings

    others = [name for name, _ in skeleton.named_modules() if name and name not in factors]
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(_find_minimal_target_modules([*factors], others)),
        "modules_to_save": list(whole) or None,
        "fan_in_fan_out": all(isinstance(skeleton.get_submodule(path), Conv1D) for path in factors),
        "inference_mode": True,
        **base_settings(repo.config, (repo.base_place, repo.base_revision)),
    }
    LoraConfig(**settings).save_pretrained(str(folder))
    return inject(skeleton, {**settings, "peft_type": "LORA"})
