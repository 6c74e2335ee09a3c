"""Inputs of a merge: a local folder, a Hub id, or a loaded model. Opening one reads configuration and headers only."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME

from .errors import CheckpointError, one_line
from .storage import ModelStorage, Storage, TensorInfo, open_folder

MERGEABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Reference = str | Path | PreTrainedModel

_CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# Whatever fails between here and the Hub: a repo id or a repo of the wrong kind (ValueError), the network, the Hub's
# answers, and its HTTP library's own errors, which those derive from.
HUB_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError,
    *HfHubHTTPError.__bases__,
    OSError,
    ValueError,
    NotASafetensorsRepoError,
)


class HubStorage:
    """A Hub repo at one commit: headers by range requests now, weights downloaded when the first tensor is read."""

    def __init__(self, label: str, repo_id: str, revision: str):
        self.label, self.repo_id, self.revision = label, repo_id, revision
        self._files: list[str] = ["pytorch_model*.bin", WEIGHTS_INDEX_NAME]
        try:
            metadata = HfApi().get_safetensors_metadata(repo_id, revision=revision)
        except NotASafetensorsRepoError:
            self.infos = self._local.infos  # .bin files have no header to read from afar
            return
        self._files = [*metadata.files_metadata, SAFE_WEIGHTS_INDEX_NAME]
        self.infos = {}
        for name, shard in metadata.weight_map.items():
            tensor = metadata.files_metadata[shard].tensors.get(name)
            if tensor is None:
                raise CheckpointError(f"{label}: the index says that {name} is in {shard}, which does not hold it")
            self.infos[name] = TensorInfo.of_header(label, name, tensor.shape, tensor.dtype)

    @cached_property
    def _local(self) -> Storage:
        try:
            folder = snapshot_download(self.repo_id, revision=self.revision, allow_patterns=self._files)
        except HUB_ERRORS as error:
            raise CheckpointError(f"{self.label}: cannot download {self.repo_id}: {one_line(error)}") from None
        return open_folder(self.label, Path(folder))

    def read(self, name: str) -> Tensor:
        return self._local.read(name)


@dataclass
class Source:
    """One input: its configuration and its stored tensors.

    Attributes:
        label: `"base"` or the task, for messages.
        name: Hub id, folder name or class name; safe to publish.
        revision: the commit, for a Hub id.
        folder: where configuration and tokenizer files are; `None` for a loaded model.
        model: the loaded model, if it is one.
    """

    label: str
    name: str
    config: PreTrainedConfig
    storage: Storage
    revision: str | None = None
    folder: Path | None = None
    model: PreTrainedModel | None = None

    @property
    def architecture(self) -> str | None:
        if self.model is not None:
            return type(self.model).__name__
        return self.config.architectures[0] if self.config.architectures else None


def open_source(reference: Reference, label: str) -> Source:
    """Open a checkpoint by configuration and headers.

    Args:
        reference: a local folder, a Hub id (`"me/repo"` or `"me/repo@revision"`), or a loaded model.
        label: how messages name it.

    Raises:
        CheckpointError: not found, no weights, a missing shard, a truncated file, or quantised.
    """
    if isinstance(reference, PreTrainedModel):
        name = _published_name(str(reference.config.name_or_path or type(reference).__name__))
        source = Source(label, name, reference.config, ModelStorage(label, reference), model=reference)
    elif not isinstance(reference, (str, Path)):
        raise CheckpointError(
            f"{label}: expected a folder, a Hub id or a loaded PreTrainedModel, got {type(reference).__name__}"
        )
    elif (folder := _as_folder(reference)) is not None:
        name = folder.resolve().name
        source = Source(label, name, _config(label, folder), open_folder(label, folder), folder=folder)
    elif isinstance(reference, Path) or re.match(r"[./~]|[A-Za-z]:\\", reference) or os.path.isfile(reference):
        raise CheckpointError(f"{label}: {reference} is not a folder: expected a checkpoint's folder or a Hub id")
    else:
        source = _open_hub(reference, label)
    if getattr(source.config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{label}: {source.name} is quantised ({_quantisation(source.config)}): "
            "merge the full-precision checkpoint"
        )
    if source.config.model_type == "emr_merged":
        raise CheckpointError(
            f"{label}: {source.name} is a merged repo: export one of its tasks first (emr-hf export)"
        )
    return source


def _as_folder(reference: str | Path) -> Path | None:
    try:
        folder = Path(reference).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, an unknown user's home, a null byte
        return None


def _published_name(name: str) -> str:
    """A Hub id as it is, of a local path the last part."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists()
    return name if is_hub_id else Path(name).name


def _quantisation(config: PreTrainedConfig) -> str:
    settings = config.quantization_config
    settings = settings if isinstance(settings, dict) else getattr(settings, "to_dict", dict)()
    return str(settings.get("quant_method", "by an unknown method"))


def _config(label: str, folder: Path) -> PreTrainedConfig:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{label}: {folder} is a PEFT adapter, expected a full checkpoint: save what its merge_and_unload() gives"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{label}: no config.json in {folder}")
    try:
        # False, not the default: that one would ask to run a checkpoint's own code.
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{label}: cannot use {folder / 'config.json'}: {one_line(error)}") from None


def _open_hub(reference: str, label: str) -> Source:
    repo_id, _, revision = reference.partition("@")
    try:
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(repo_id, revision=revision or None, local_files_only=True))
            commit, storage = folder.name, open_folder(label, folder)
        else:
            commit = str(HfApi().model_info(repo_id, revision=revision or None).sha)
            folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=_CONFIG_FILES))
            storage = HubStorage(label, repo_id, commit)
    except HFValidationError as error:
        raise CheckpointError(f"{label}: {reference!r} is neither a folder nor a Hub id: {one_line(error)}") from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"{label}: {reference!r} is neither a folder here nor on the Hub: {one_line(error)}"
        ) from None
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"{label}: {reference!r} is no folder here, and the Hub did not answer for it: {one_line(error)}"
        ) from None
    return Source(label, repo_id, _config(label, folder), storage, commit, folder)
