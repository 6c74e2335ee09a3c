"""Alignment of checkpoints on disk: what `emr-hf align` and the recipe's field `align` do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint import build_skeleton, model_class_of
from ..errors import CheckpointError, OptionError, RecipeError, one_line, short
from ..mapped_files import guarded_reads
from ..publication import Kind, atomic_folder, claim
from ..regular_file import require_file
from ..repo import copy_side_files, is_written_by_us
from ..sources import Source, open_source
from ..storage import ModelStorage
from .aligning import AlignmentPlan, align, check_options
from .matching import check_scipy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..recipe import Recipe

BATCH = 32  # rows of the data at a time
SYMMETRIES_NAME = "symmetries.json"


def _owns(folder: Path, place: Path) -> bool:
    return str(place) == SYMMETRIES_NAME or (len(place.parts) == 2 and is_written_by_us(Path(place.name)))


_ALIGNED = Kind("folder of aligned models", lambda folder: (folder / SYMMETRIES_NAME).is_file(), _owns)


def align_recipe(recipe: Recipe, out: str | Path, *, overwrite: bool = False) -> AlignmentPlan:
    """Write a recipe's finetunes aligned to the first one, each as a checkpoint of its own: `out/<task>`.

    All models are in memory at once.

    Args:
        recipe: without a base; `recipe.align` says how, see [`Recipe`].
        out: folder to write; it appears complete or not at all.
        overwrite (*optional*): replace what an earlier alignment wrote there.

    Returns:
        the plan. `out/symmetries.json` says what could be put in another order.

    Raises:
        EMRError: of the subclass that says what kind of input is wrong.
    """
    target = claim(out, _ALIGNED, overwrite)
    for note in target.notes:
        warnings.warn(note, stacklevel=2)
    if recipe.base is not None:
        raise RecipeError("align: finetunes of one base lie alike already: leave out the field 'base', or 'align'")
    check_alignment(recipe)
    settings = dict(recipe.align or {})
    path = settings.pop("data", None)
    batches = read_batches(path) if path is not None else None
    sources = {task: open_source(reference, task) for task, reference in recipe.finetunes.items()}
    folders = folder_names(sources)
    models = {task: _load(source) for task, source in sources.items()}
    read = [source.storage for source in sources.values()] + [ModelStorage(task, models[task]) for task in models]
    with guarded_reads(read) as check_inputs, atomic_folder(target) as folder:
        plan = align(*models.values(), data=batches, private=recipe.private, **settings)
        for number, (task, model) in enumerate(models.items()):
            aligned: Any = plan.apply(model, number)
            aligned.save_pretrained(folder / folders[task], max_shard_size=recipe.max_shard_size)
            if (side := sources[task].folder) is not None:
                copy_side_files(side, folder / folders[task])
        plan.symmetries.save(folder / SYMMETRIES_NAME)
        check_inputs()
    return plan


def check_alignment(recipe: Recipe) -> None:
    """Raise where a recipe's finetunes cannot be aligned as its field `align` says, before any of them is read.

    Raises:
        OptionError: an option cannot be used, or SciPy is not installed.
        CheckpointError: the data is no file.
    """
    options: dict[str, Any] = {"method": "mudsc", "weight": 0.5, "sites": "all", "seed": 0, **(recipe.align or {})}
    path, seed = options.get("data"), options["seed"]
    check_options(options["method"], options["weight"], options["sites"], path is not None)
    if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 2**63:
        raise OptionError(f"align: seed={short(seed)}: expected a whole number")
    check_scipy()
    if path is None:
        return
    if not isinstance(path, (str, Path)):
        raise OptionError(f"align: data={short(path)}: expected a safetensors file")
    require_file(Path(path), "align: data")


def aligned_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of a merge of the finetunes, aligned into a new folder."""
    align_recipe(recipe, folder)
    names = folder_names(recipe.finetunes)
    return replace(recipe, finetunes={task: folder / name for task, name in names.items()}, align=None)


def folder_names(tasks: Mapping[str, Any]) -> dict[str, str]:
    """Task -> name of its folder.

    Raises:
        OptionError: two tasks would have the same.
    """
    names = {task: re.sub(r"[^\w.-]+", "-", task).strip(".") or "task" for task in tasks}
    if len({SYMMETRIES_NAME, *map(str.lower, names.values())}) <= len(names):  # a disk may not tell cases apart
        raise OptionError(f"tasks {', '.join(map(repr, names))}: expected names that make different folders")
    return names


def read_batches(path: str | Path) -> list[dict[str, Tensor]]:
    """Unlabelled data: a safetensors file of the model's arguments by name, each with one row an example.

    Raises:
        CheckpointError: the file cannot be read, or is empty, or its tensors have different numbers of rows.
    """
    from safetensors.torch import load_file

    require_file(Path(path), "align: data")
    try:
        tensors = load_file(path)
    except Exception as error:  # of the library, and of what it makes of a header that is damaged
        raise CheckpointError(f"align: data: cannot read {path}: {one_line(error)}") from None
    rows = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in tensors.items()}
    if len(set(rows.values())) != 1 or 0 in rows.values():
        raise CheckpointError(f"align: data: {path} has {short(rows)} rows: expected the same number in all")
    parts = {name: tensor.split(BATCH) for name, tensor in tensors.items()}
    return [dict(zip(parts, batch)) for batch in zip(*parts.values())]


def _load(source: Source) -> PreTrainedModel:
    """The source's whole model, by transformers."""
    if source.model is not None:
        return source.model
    build_skeleton(source, torch.float32)  # where that fails, it fails before any weights are in memory
    model_class = model_class_of(str(source.architecture))
    where = source.folder if source.revision is None or source.folder is not None else source.name
    try:
        loaded: Any = model_class.from_pretrained(where, revision=source.revision or "main", output_loading_info=True)
    except Exception as error:  # a model's constructor may raise anything
        raise CheckpointError(f"{source.label}: cannot load {source.name}: {one_line(error)}") from None
    model, info = loaded
    if info["missing_keys"]:
        raise CheckpointError(f"{source.label}: {source.name} has no {min(info['missing_keys'])}")
    return model
