"""Checks of a merged repo on its way into a model: nothing that is missing, foreign or no number comes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from .adapters.ia3 import inject_vectors
from .checkpoint import model_class_of, parts_limited
from .configuration import EMRConfig
from .digests import verify_downloaded
from .errors import CheckpointError, RepoError, one_line
from .format import model_name, part_of
from .opening import check_finite, check_tensors, read_settings
from .storage import SafetensorsStorage


def build_wrapped(config: EMRConfig) -> PreTrainedModel:
    """The wrapped model, with places for vectors where these are merged."""
    model_class = model_class_of(str(config.base_architecture))
    try:
        with parts_limited(len(config.tensors or config.merged_parameters or [])):
            model = model_class(config.base_config)
    except Exception as error:  # a model's constructor may raise anything
        place = f"{config.name_or_path}: " if config.name_or_path else ""
        raise RepoError(
            f"{place}cannot build {config.base_architecture} from base_config: {one_line(error)}"
        ) from error
    if config.vectors is not None:
        inject_vectors(model, config.vectors)
    return model


def check_files(model: Any, files: list[Path], since: float) -> None:
    """Raise RepoError unless the files of a repo hold what its configuration, and the model built of it, demand.

    Args:
        model: an [`EMRMergedModel`] without weights.
        files: those of its weights.
        since: when loading began: files that are younger have just been downloaded.
    """
    place = str(model.config.name_or_path)
    if odd := [file.name for file in files or [Path("")] if file.suffix != ".safetensors"]:
        raise RepoError(f"{place}: {odd[0]!r} is named as a file of weights: expected .safetensors files")
    if (files[0].parent / CONFIG_NAME).is_file():
        read_settings(files[0].parent, "model")  # more strictly than transformers has read it
    try:
        infos = SafetensorsStorage(place, files).infos
    except CheckpointError as error:
        raise RepoError(str(error)) from None
    check_tensors(model.config, infos, "model", place)
    for name, tensor in model.state_dict().items():
        if name in infos and infos[name].shape != tuple(tensor.shape):
            raise RepoError(
                f"{place}: the tensor {name} is {list(infos[name].shape)}, but {list(tensor.shape)} in "
                f"{model.config.base_architecture} as its configuration says"
            )
    if not Path(place).is_dir():
        verify_downloaded(place, files, getattr(model.config, "_commit_hash", None), since)


@torch.no_grad()
def check_values(model: Any) -> None:
    """Raise RepoError if a number that has been loaded is none, or is infinite where tasks are made of it."""
    merged = {model_name(name) for name in model._switch.sites}
    own = {model_name(name) for name in model._switch.private_names}  # the wrapped model's are not loaded yet
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta and name not in own:
            is_kept = part_of(name) == "base" and name not in merged
            check_finite(tensor, name, model.config.name_or_path, infinite=is_kept)
