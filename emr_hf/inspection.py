"""What a merged repo holds, from its configuration and headers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import AutoConfig
from transformers.utils import ADAPTER_CONFIG_NAME

from .configuration import EMRConfig
from .digests import verify as check_digests
from .disk import writing
from .errors import EMRError, RepoError, one_line
from .format import PARTS, part_of
from .hub import saved_tensors
from .layers import by_kind, grid, worst_tensors
from .opening import check_tensors, fetch_repo, open_merged
from .plotting import check_plot, plot_layers
from .repo import REPORT_NAME
from .report import MergeReport, Tensors, human, table
from .sources import HUB_ERRORS, HubStorage

_MOST_COLUMNS = 8


@dataclass
class Inspection:
    """What [`inspect`] tells.

    Attributes:
        repo: the folder or Hub id.
        architecture, base, default_task, tau_dtype, emr_format, method: of the repo.
        parts: part (`"base"`, `"tau"`, `"scale"`, `"mask"`, `"private"`, `"rescaler"`) -> bytes. With the method
            `"levels"` the part `"base"` has the level nearer to the base in place of each merged weight.
        tasks: task -> what the configuration records of it.
        report: the merge's numbers.
        tensors: of the merge's report, name of a merged tensor -> its [`TensorEntry`]; empty where the report is one
            of an older version.
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
    tensors: Tensors = field(default_factory=dict)
    method: str = "emr"

    def __str__(self) -> str:
        header, rows = MergeReport.from_dict(self.report).rows()
        labels = {task: str(len(entry["id2label"])) for task, entry in self.tasks.items()}
        titles = {"base": "base (nearer level)"} if self.method == "levels" else {}
        sizes = ", ".join(f"{titles.get(part, part)} {human(size)}" for part, size in self.parts.items() if size)
        lines = [
            f"{self.repo}: {self.architecture}, {len(self.tasks)} tasks on {self.base}, format {self.emr_format}",
            f"weights  {human(sum(self.parts.values()))}: {sizes}; tau in {self.tau_dtype}",
            f"method   {self.method}",
            f"default  {self.default_task}",
            "",
            *table([*header, "labels", "source"], [[*r, labels[r[0]], self.tasks[r[0]]["source"]] for r in rows]),
        ]
        if self.tensors:
            lines += ["", *table(*self._kinds()), "", *table(*self._worst())]
        return "\n".join(lines)

    def _kinds(self) -> tuple[list[str], list[list[str]]]:
        """Relative L2 error by kind of layer and task; of many tasks the mean and the worst."""
        tasks = list(self.tasks)
        kinds = by_kind(self.tensors)
        errors = grid(self.tensors, kinds, tasks, lambda numbers: numbers.relative_error)
        header = ["relative L2 error by kind of layer", "elements"]
        rows = [[kind, f"{sum(self.tensors[name]['elements'] for name in names):,}"] for kind, names in kinds.items()]
        if len(tasks) <= _MOST_COLUMNS:
            found = [["" if error is None else f"{error:.3f}" for error in row] for row in errors]
            return [*header, *tasks], [row + cells for row, cells in zip(rows, found)]
        for row, values in zip(rows, errors):
            known = {task: error for task, error in zip(tasks, values) if error is not None}
            worst = max(known, key=lambda task: known[task])
            row += [f"{sum(known.values()) / len(known):.3f}", f"{known[worst]:.3f}", worst]
        return [*header, "mean", "highest", "task"], rows

    def _worst(self) -> tuple[list[str], list[list[str]]]:
        header = ["task", "its worst tensor", "relative L2 error", "share of its task vector"]
        found = worst_tensors(self.tensors, list(self.tasks))
        return header, [
            [task, worst.tensor, f"{worst.relative_error:.3f}", f"{worst.share:.2%}"] for task, worst in found.items()
        ]

    def plot(self, path: str | Path) -> Path:
        """Draw two heat maps, layers by tasks: relative L2 error and sign conflict.

        Args:
            path: a `.png`, `.svg` or `.pdf` file, which is replaced if it is there.

        Raises:
            OptionError: another kind of file, or matplotlib is not installed.
            RepoError: the repo tells nothing of single tensors, or the disk does not take the file.
        """
        path = check_plot(path)
        if not self.tensors:
            raise RepoError(
                f"{self.repo}: its {REPORT_NAME} has no numbers by tensor, as that of an older emr_hf: merge again"
            )
        with writing(path):
            plot_layers(self.tensors, list(self.tasks), path, self.repo)
        return path


def inspect(repo: str | Path, verify: bool = False) -> Inspection:
    """Look into a merged repo without reading a tensor, but the few numbers of rescalers and scales.

    Args:
        repo: a folder or a Hub id.
        verify (*optional*): read all tensor files, of a Hub repo after a download, and compare their SHA-256 digests
            with those in the repo's report. That finds damage; who changes files on purpose changes the report too.

    Raises:
        RepoError: not a merged repo, or one with missing or damaged parts; with `verify` also one without digests.
    """
    if verify:
        check_digests(fetch_repo(repo).folder)
    config, sizes = _read(repo)
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
        tensors=_known_of(config, saved_tensors(repo)),
        method=config.method,
    )


def _known_of(config: EMRConfig, saved: Tensors) -> Tensors:
    """A saved report's numbers of the tensors and tasks that the repo has, in its order."""
    known: Tensors = {}
    for name in config.merged_parameters or []:
        if name in saved:
            own = saved[name]["tasks"]
            known[name] = {**saved[name], "tasks": {task: own[task] for task in config.tasks if task in own}}
    return {name: entry for name, entry in known.items() if entry["tasks"]}


def _read(repo: str | Path) -> tuple[EMRConfig, dict[str, int]]:
    """Configuration, and bytes of every tensor."""
    if Path(repo).exists():
        opened = open_merged(Path(repo))
        return opened.config, {name: info.nbytes for name, info in opened.storage.infos.items()}
    try:
        if HfApi().file_exists(str(repo), ADAPTER_CONFIG_NAME):
            opened = fetch_repo(repo)  # an adapter, which is small
            return opened.config, {name: info.nbytes for name, info in opened.storage.infos.items()}
        config = AutoConfig.from_pretrained(repo, trust_remote_code=False)
        infos = HubStorage(str(repo), str(repo), None).infos
    except EMRError:
        raise
    except HUB_ERRORS as error:
        raise RepoError(f"{repo} is no merged repo, neither here nor on the Hub: {one_line(error)}") from None
    if not isinstance(config, EMRConfig):
        raise RepoError(f"{repo} is no merged repo: its model_type is {config.model_type}")
    check_tensors(config, infos, "model", repo)
    return config, {name: info.nbytes for name, info in infos.items()}
