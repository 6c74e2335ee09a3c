"""What a merged repo holds, from its configuration and headers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME

from .configuration import EMRConfig, repo_config
from .errors import RepoError, one_line
from .repo import PARTS, fetch_repo, open_repo, part_of
from .report import MergeReport, human, table
from .sources import HUB_ERRORS


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
    config, sizes = _read(repo)
    if not isinstance(config, EMRConfig):
        raise RepoError(f"{repo} is no merged repo: its model_type is {config.model_type}")
    parts = dict.fromkeys(PARTS, 0)
    for name, size in sizes.items():
        parts[part_of(name)] += size
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


def _read(repo: str | Path) -> tuple[PreTrainedConfig, dict[str, int]]:
    """Configuration, and bytes of every tensor."""
    folder = Path(repo)
    if folder.exists():
        infos = open_repo(folder).infos
        return repo_config(folder), {name: info.nbytes for name, info in infos.items()}
    try:
        if HfApi().file_exists(str(repo), ADAPTER_CONFIG_NAME):
            return _read(fetch_repo(repo))  # an adapter, which is small
        config = AutoConfig.from_pretrained(repo, trust_remote_code=False)
        files = HfApi().get_safetensors_metadata(str(repo)).files_metadata.values()
    except HUB_ERRORS as error:
        raise RepoError(f"{repo} is no merged repo, neither here nor on the Hub: {one_line(error)}") from None
    tensors = [item for file in files for item in file.tensors.items()]
    return config, {name: info.data_offsets[1] - info.data_offsets[0] for name, info in tensors}
