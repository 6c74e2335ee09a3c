"""What a merge tells of its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class TaskReport:
    """One task's numbers.

    Attributes:
        rescaler: lambda.
        density: share of the merged elements in the mask.
        relative_error: ||tau_t - lambda M tau|| / ||tau_t||, before the weights are rounded to their dtype.
        cosine: between tau_t and M tau.
        sign_conflict: share of the elements the finetune moved whose direction lost the election.
        private_elements: elements kept for this task by itself.
        source: Hub id, folder or class name.
        revision: commit of the source, for a Hub id.
    """

    rescaler: float
    density: float
    relative_error: float
    cosine: float
    sign_conflict: float
    private_elements: int
    source: str
    revision: str | None = None


@dataclass
class MergeReport:
    """What [`merge`] returns, prints and saves as `emr_report.json`.

    Attributes:
        base: Hub id, folder or class name of the base.
        architecture: class of the wrapped model.
        rescale: the rescaler's mode.
        tau_dtype: what the unified vector is stored in.
        tau_rounding: relative L2 change of the unified vector by that dtype; 0 for float32.
        merged_tensors, merged_elements: how much was merged.
        bytes_out: weights of the repo.
        bytes_finetunes: weights of the finetunes by themselves.
        bytes_modulators: of the repo's weights, what is not the base.
        adapters: how many of the finetunes are adapters.
        seconds: wall time.
        tasks: task -> its numbers.
        warnings: what the user should know.
    """

    base: str
    base_revision: str | None
    architecture: str
    rescale: str
    tau_dtype: str
    tau_rounding: float
    merged_tensors: int
    merged_elements: int
    bytes_out: int
    bytes_finetunes: int
    seconds: float
    bytes_modulators: int = 0
    adapters: int = 0
    tasks: dict[str, TaskReport] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MergeReport:
        """The report that `asdict` made `content` of."""
        tasks = {task: TaskReport(**numbers) for task, numbers in content["tasks"].items()}
        return cls(**{**content, "tasks": tasks})

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The per-task table: header and rows of text."""
        header = ["task", "lambda", "mask density", "relative L2 error", "cosine", "sign conflict"]
        return header, [
            [
                task,
                f"{t.rescaler:.4f}",
                *(f"{v:.3f}" for v in (t.density, t.relative_error, t.cosine, t.sign_conflict)),
            ]
            for task, t in self.tasks.items()
        ]

    def __str__(self) -> str:
        lines = [
            f"{self.architecture}: {len(self.tasks)} tasks on {self.base}, {self.merged_elements:,} elements of "
            f"{self.merged_tensors} tensors merged in {self.seconds:.1f} s",
            "",
            *table(*self.rows()),
            "",
            self.summary(),
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)

    def summary(self) -> str:
        """One sentence on size, and one on what a narrow `tau_dtype` cost."""
        text = self._adapters_size() if self.adapters == len(self.tasks) else self._finetunes_size()
        if self.tau_rounding:
            text += f" Storing tau in {self.tau_dtype} changed it by {self.tau_rounding:.1e} (relative L2)."
        return text

    def _finetunes_size(self) -> str:
        share = self.bytes_out / self.bytes_finetunes
        return (
            f"{human(self.bytes_out)} on disk, {share:.0%} of the {len(self.tasks)} finetunes' "
            f"{human(self.bytes_finetunes)}."
        )

    def _adapters_size(self) -> str:
        ours, theirs = human(self.bytes_modulators), human(self.bytes_finetunes)
        text = f"{human(self.bytes_out)} on disk; beside the base, vector, masks and heads take {ours}"
        if self.bytes_modulators > self.bytes_finetunes:
            return f"{text}. The {self.adapters} adapters by themselves are SMALLER: {theirs}."
        return f"{text}, the {self.adapters} adapters by themselves {theirs}."


def human(size: float) -> str:
    """Bytes as people read them, in powers of ten as disks are sold."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table in plain text, first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))).rstrip()

    return [line(header), line(["-" * width for width in widths]), *map(line, rows)]


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of the same table in Markdown."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    safe = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in (header, marks, *rows)]
    return ["| " + " | ".join(cells) + " |" for cells in safe]
