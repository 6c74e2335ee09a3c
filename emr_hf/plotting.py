"""A picture of where a merge loses what: layers by tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import OptionError, one_line, short
from .layers import by_layer, grid
from .report import Tensors

SUFFIXES = (".png", ".svg", ".pdf")
_FEW = 160  # cells that still have room for their numbers
_LEAST_SPAN = 0.1  # of a scale of colours: less would make something of nothing


def check_plot(path: str | Path) -> Path:
    """Where a picture is to be written.

    Raises:
        OptionError: it is no name of a picture in a folder that exists, or matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"plot={short(str(path))}: expected a file name that ends in {', '.join(SUFFIXES)}")
    if not os.path.isdir(path.parent):
        raise OptionError(f"plot={short(str(path))}: {path.parent} is no folder")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise OptionError("a plot needs matplotlib, which is not installed: pip install 'emr_hf[plot]'") from None
    return path


def plot_layers(tensors: Tensors, tasks: Sequence[str], path: Path, title: str) -> None:
    """Draw the relative L2 error and the sign conflict of every layer and task as two heat maps.

    Args:
        tensors: the report's.
        tasks: the columns, in order.
        path: the file, of one of `SUFFIXES`.
        title: above the picture.

    Raises:
        OptionError: the disk does not take the file.
    """
    from matplotlib.figure import Figure

    layers = by_layer(tensors)
    errors = grid(tensors, layers, tasks, lambda numbers: numbers.relative_error)
    conflicts = grid(tensors, layers, tasks, lambda numbers: numbers.sign_conflict)
    many = len(layers) * len(tasks) > _FEW
    width = max((0.3 if many else 0.55) * len(tasks), 2.2)  # inches of one map
    height = max((0.19 if many else 0.28) * len(layers), 2.0)
    left = 0.5 + 0.075 * max(map(len, layers))
    below = 0.35 + 0.06 * max(min(len(task), 24) for task in tasks)
    # Room beside each map for its colour bar and the bar's numbers.
    size = left + 2 * width + 2.6, 0.8 + height + below
    figure = Figure(figsize=size, dpi=150)
    for index, (values, name, colours) in enumerate(
        ((errors, "relative L2 error", "viridis"), (conflicts, "sign conflict", "magma"))
    ):
        place = (left + index * (width + 1.3)) / size[0]
        axes = figure.add_axes((place, below / size[1], width / size[0], height / size[1]))
        image = _heat_map(axes, values, tasks, colours, numbers=not many)
        axes.set_title(name, fontsize=9)
        axes.set_yticks(range(len(layers)), list(layers) if index == 0 else [], fontsize=7)
        bar = (place + (width + 0.1) / size[0], below / size[1], 0.12 / size[0], height / size[1])
        figure.colorbar(image, cax=figure.add_axes(bar)).ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=10, x=0.12 / size[0], y=1 - 0.12 / size[1], ha="left", va="top", parse_math=False)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OptionError(f"plot={short(str(path))}: cannot be written: {one_line(error)}") from None


def _heat_map(
    axes: Any, values: list[list[float | None]], tasks: Sequence[str], colours: str, *, numbers: bool
) -> Any:
    cells = [[float("nan") if value is None else value for value in row] for row in values]
    image = axes.imshow(cells, aspect="auto", cmap=colours, interpolation="nearest")
    lowest, highest = image.get_clim()
    spare = max(_LEAST_SPAN - (highest - lowest), 0.0) / 2
    image.set_clim(lowest - spare, highest + spare)
    shown = [task if len(task) <= 24 else f"{task[:23]}…" for task in tasks]
    axes.set_xticks(range(len(tasks)), shown, rotation=90, fontsize=7, parse_math=False)
    axes.tick_params(length=0)
    if numbers:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value is not None:
                    light = value < (lowest + highest) / 2
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=6, color="w" if light else "k")
    return image
