"""What a merge tells of its result."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict


class TensorNumbers(NamedTuple):
    """One task's numbers in one merged tensor; each of the first three as in [`TaskReport`].

    Attributes:
        relative_error: ||tau_t - lambda M tau|| / ||tau_t||.
        cosine: between tau_t and M tau.
        sign_conflict: share of the moved elements whose direction lost the election.
        length: ||tau_t||.
        moved: elements that the finetune moved.
    """

    relative_error: float
    cosine: float
    sign_conflict: float
    length: float
    moved: float


class TensorEntry(TypedDict):
    """What a report says of one merged tensor.

    Attributes:
        elements: how many it has.
        tasks: task -> the values of its [`TensorNumbers`].
    """

    elements: int
    tasks: dict[str, list[float]]


Tensors = dict[str, TensorEntry]
"""Name of a merged tensor -> what is known of it."""


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
        length: ||tau_t||.
        nbytes: weights of the finetune by itself.
        adapter: whether it is a PEFT adapter.
        lost: of a task that was there when another was added: at most how far its rebuilt task vector has moved since,
            relative to `length`. `relative_error`, `cosine` and `sign_conflict` are then those of its first merge.
    """

    rescaler: float
    density: float
    relative_error: float
    cosine: float
    sign_conflict: float
    private_elements: int
    source: str
    revision: str | None = None
    length: float | None = None
    nbytes: int = 0
    adapter: bool = False
    lost: float | None = None


@dataclass
class MergeReport:
    """What [`merge`] returns, prints and saves as `emr_report.json`.

    Attributes:
        base: Hub id, folder or class name of the base.
        architecture: class of the wrapped model.
        rescale: the rescaler's mode.
        method: how vector and masks came about.
        tau_dtype: what the unified vector is stored in.
        tau_rounding: relative L2 change of the unified vector by that dtype; 0 for float32.
        merged_tensors, merged_elements: how much was merged.
        bytes_out: weights of the repo.
        bytes_finetunes: weights of the finetunes by themselves; 0 where that is not known any more.
        bytes_modulators: of the repo's weights, what is not the base.
        seconds: wall time.
        tasks: task -> its numbers.
        warnings: what the user should know.
        tensors: name of a merged tensor -> its [`TensorEntry`]. In `emr_report.json`, not in the repo's configuration.
        digests: tensor file of the repo -> its SHA-256. Likewise.
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
    method: str = "emr"
    tasks: dict[str, TaskReport] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    tensors: Tensors = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(to_json(asdict(self)) + "\n", encoding="utf-8")

    def without_tensors(self) -> dict[str, Any]:
        """What stands in the repo's configuration."""
        content = asdict(replace(self, tensors={}))
        del content["tensors"], content["digests"]
        return content

    def keep_tensors(self, known: Tensors) -> None:
        """Take over, of the tasks that the report is of, what was known of each tensor."""
        for name, entry in known.items():
            kept = {task: entry["tasks"][task] for task in self.tasks if task in entry["tasks"]}
            if kept:
                self.tensors.setdefault(name, {"elements": entry["elements"], "tasks": {}})["tasks"].update(kept)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MergeReport:
        """The report that `asdict` made `content` of."""
        tasks = {task: TaskReport(**numbers) for task, numbers in content["tasks"].items()}
        return cls(**{**content, "tasks": tasks})

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The per-task table: header and rows of text."""
        header = ["task", "lambda", "mask density", "relative L2 error", "cosine", "sign conflict"]
        rows = [
            [
                task,
                f"{t.rescaler:.4f}",
                *(f"{v:.3f}" for v in (t.density, t.relative_error, t.cosine, t.sign_conflict)),
            ]
            for task, t in self.tasks.items()
        ]
        if any(t.lost is not None for t in self.tasks.values()):
            header.append("lost since")
            for row, t in zip(rows, self.tasks.values()):
                row.append("" if t.lost is None else f"{t.lost:.3f}")
        return header, rows

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
        only_adapters = all(numbers.adapter for numbers in self.tasks.values())
        text = self._adapters_size() if only_adapters else self._finetunes_size()
        if self.tau_rounding:
            text += f" Storing tau in {self.tau_dtype} changed it by {self.tau_rounding:.1e} (relative L2)."
        return text

    def _finetunes_size(self) -> str:
        if not self.bytes_finetunes:
            return f"{human(self.bytes_out)} on disk."
        share = self.bytes_out / self.bytes_finetunes
        return (
            f"{human(self.bytes_out)} on disk, {share:.0%} of the {len(self.tasks)} finetunes' "
            f"{human(self.bytes_finetunes)}."
        )

    def _adapters_size(self) -> str:
        ours, theirs = human(self.bytes_modulators), human(self.bytes_finetunes)
        text = f"{human(self.bytes_out)} on disk; beside the base, vector, masks and heads take {ours}"
        if self.bytes_modulators > self.bytes_finetunes:
            return f"{text}. The {len(self.tasks)} adapters by themselves are SMALLER: {theirs}."
        return f"{text}, the {len(self.tasks)} adapters by themselves {theirs}."


def read_tensors(path: Path) -> Tensors:
    """`tensors` of a saved report; empty where there is none, an older one that does not have it, or a broken one."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        tensors = json.loads(path.read_text(encoding="utf-8")).get("tensors")
        if isinstance(tensors, dict) and all(map(_is_entry, tensors.values())):
            return tensors
    return {}


def _is_entry(entry: Any) -> bool:
    """Whether it is a [`TensorEntry`]."""
    elements, tasks = (entry.get(name) for name in ("elements", "tasks")) if isinstance(entry, dict) else (None, None)
    if not _is_number(elements) or not isinstance(tasks, dict):
        return False
    count = len(TensorNumbers._fields)
    return all(isinstance(v, list) and len(v) == count and all(map(_is_number, v)) for v in tasks.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def to_json(content: object) -> str:
    """Indented JSON, but each list of numbers on one line."""
    text = json.dumps(content, indent=2, allow_nan=False)
    return re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text)


def without_nan(content: Any) -> Any:
    """The content with `None` for each number that is not finite, as JSON has none."""
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


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
