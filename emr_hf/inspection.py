"""What a merged repo holds, from its configuration and headers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_local_safetensors_metadata
from transformers import AutoConfig

from .configuration import EMRConfig
from .errors import RepoError
from .repo import PARTS, part_of
from .report import MergeReport, human, table


@dataclass
class Inspection:
    """What [`inspect`] tells.

    Attributes:
        repo: the folder or Hub id.
        architecture, base, default_task, tau_dtype, emr_format: of the repo.
        parts: part (`"base"`, `"tau"`, `"mask"`, `"private"`, `"rescaler"`) -> bytes.
        tasks: task -> what the configuration records of it.
        report: the merge's numbers.
    """

    repo: str
    architecture: str
    base: str
    default_task: str
    tau_dtype: str
    emr_format: int
    tasks: dict[str, dict[str, Any]]
    report: dict[str, Any]
    parts: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        header, rows = MergeReport.from_dict(self.report).rows()
        labels = {task: str(len(entry["id2label"])) for task, entry in self.tasks.items()}
        sizes = ", ".join(f"{part} {human(size)}" for part, size in self.parts.items())
        lines = [
            f"{self.repo}: {self.architecture}, {len(self.tasks)} tasks on {self.base}, format {self.emr_format}",
            f"weights  {human(sum(self.parts.values()))}: {sizes}; tau in {self.tau_dtype}",
            f"default  {self.default_task}",
            "",
            *table([*header, "labels", "source"], [[*r, labels[r[0]], self.tasks[r[0]]["source"]] for r in rows]),
        ]
        return "\n".join(lines)


def inspect(repo: str | Path) -> Inspection:
    """Look into a merged repo without reading a tensor.

    Args:
        repo: a folder or a Hub id.

    Raises:
        RepoError: not a merged repo.
    """
    folder = Path(repo)
    try:
        config = AutoConfig.from_pretrained(repo)
        metadata = (
            get_local_safetensors_metadata(folder) if folder.is_dir() else HfApi().get_safetensors_metadata(str(repo))
        )
    except (OSError, ValueError) as error:
        raise RepoError(f"{repo} is no merged repo: {error}") from None
    if not isinstance(config, EMRConfig):
        raise RepoError(f"{repo} is no merged repo: its model_type is {config.model_type}")
    parts = dict.fromkeys(PARTS, 0)
    for file in metadata.files_metadata.values():
        for name, info in file.tensors.items():
            parts[part_of(name)] += info.data_offsets[1] - info.data_offsets[0]
    return Inspection(
        repo=str(repo),
        architecture=str(config.base_architecture),
        base=str(config.base_model_name_or_path),
        default_task=str(config.default_task),
        tau_dtype=config.tau_dtype,
        emr_format=config.emr_format,
        tasks=config.tasks,
        report=config.report,
        parts=parts,
    )
