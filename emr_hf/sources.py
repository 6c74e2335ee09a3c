"""Inputs of a merge: a local folder, a Hub id, or a loaded model. Opening one reads configuration and headers only."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    WEIGHTS_INDEX_NAME,
)

from .errors import CheckpointError, EMRError, one_line, short
from .json_file import read_json
from .mapped_files import WatchedMemory
from .sizes import check_sizes
from .storage import MODEL_WEIGHTS, ModelStorage, Storage, TensorInfo, open_adapter, open_folder

if TYPE_CHECKING:  # a configuration is loaded without the code of models
    from transformers import PreTrainedModel

MERGEABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Reference: TypeAlias = "str | Path | PreTrainedModel"

_CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_READ = (CONFIG_NAME, ADAPTER_CONFIG_NAME, "model", "pytorch_model", "adapter_model")  # what such names begin with
_ADAPTER_FILES = [*_CONFIG_FILES, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME]
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

    def __init__(self, label: str, repo_id: str, revision: str | None):
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

    @property
    def files(self) -> Sequence[WatchedMemory]:
        return self._local.files if "_local" in vars(self) else ()

    def read(self, name: str) -> Tensor:
        return self._local.read(name)


@dataclass
class Adapter:
    """A PEFT adapter as it is stored: an input that is complete only together with its base.

    Attributes:
        label, name, revision, folder: as for [`Source`].
        settings: content of `adapter_config.json`.
        storage: its tensors, under the names PEFT saves.
    """

    label: str
    name: str
    settings: dict[str, Any]
    storage: Storage
    revision: str | None = None
    folder: Path | None = None

    @property
    def peft_type(self) -> str:
        return str(self.settings["peft_type"])

    @property
    def base(self) -> str | None:
        """Hub id or path of the model it was trained on, where it says so."""
        return self.settings.get("base_model_name_or_path") or None

    @property
    def base_revision(self) -> str | None:
        return self.settings.get("revision") or None


@dataclass
class Source:
    """One input: its configuration and its stored tensors.

    Attributes:
        label: `"base"` or the task, for messages.
        name: Hub id, folder name or class name; safe to publish.
        revision: the commit, for a Hub id.
        folder: where configuration and tokenizer files are; `None` for a loaded model.
        model: the loaded model, if it is one.
        adapter: the adapter, if it is one; `config` is its base's then, with the adapter's labels.
        base: the base that completes an adapter.
    """

    label: str
    name: str
    config: PreTrainedConfig
    storage: Storage
    revision: str | None = None
    folder: Path | None = None
    model: PreTrainedModel | None = None
    adapter: Adapter | None = None
    base: Source | None = None

    @property
    def paths(self) -> list[Path]:
        """What is read of this machine's disk: the folder, and the files in it, which may be links."""
        return [] if self.folder is None else [self.folder, *self.folder.iterdir()]

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
        CheckpointError: not found, no weights, a missing shard, a truncated file, quantised, or an adapter.
    """
    source = open_input(reference, label)
    if isinstance(source, Adapter):
        raise CheckpointError(f"{label}: {source.name} is a PEFT adapter, expected a full checkpoint")
    return source


def open_input(reference: Reference, label: str) -> Source | Adapter:
    """[`open_source`], for what may be a PEFT adapter."""
    if isinstance(reference, transformers.PreTrainedModel):
        name = _published_name(str(reference.config.name_or_path or type(reference).__name__))
        source = Source(label, name, reference.config, ModelStorage(label, reference), model=reference)
    elif not isinstance(reference, (str, Path)):
        raise CheckpointError(
            f"{label}: expected a folder, a Hub id or a loaded PreTrainedModel, got {type(reference).__name__}"
        )
    elif (folder := as_folder(reference)) is not None:
        name, revision = hub_snapshot(folder) or (_printable(folder.resolve().name), None)
        if is_adapter(_files(label, folder)):
            return Adapter(label, name, adapter_settings(label, folder), open_adapter(label, folder), revision, folder)
        storage = open_folder(label, folder)
        source = Source(label, name, _config(label, folder, storage), storage, revision, folder)
    elif isinstance(reference, Path) or re.match(r"[./~]|[A-Za-z]:\\", reference) or os.path.isfile(reference):
        raise CheckpointError(
            f"{label}: {_named(reference)} is not a folder{_why_not(reference)}: expected a checkpoint's folder or a "
            "Hub id"
        )
    else:
        found = _open_hub(reference, label)
        if isinstance(found, Adapter):
            return found
        source = found
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


def as_folder(reference: str | Path) -> Path | None:
    """The folder at a path, `None` where there is none, or none that can be looked at."""
    try:
        folder = Path(reference).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, an unknown user's home, a null byte
        return None


def _why_not(reference: str | Path) -> str:
    """The system's reason why a path is no folder, for a message; empty where nothing is there, or a file."""
    try:
        Path(reference).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, RuntimeError, ValueError) as error:
        return f" ({one_line(error.strerror if isinstance(error, OSError) else error)})"
    return ""


def _named(reference: str | Path) -> str:
    return one_line(_printable(str(reference)))


def _printable(name: str) -> str:
    """A name without the bytes that are no text, as a disk may have them."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _files(label: str, folder: Path) -> list[str]:
    """Names of what is in a folder, of which settings and weights may be read."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise CheckpointError(f"{label}: cannot read the folder {_named(folder)}: {error.strerror}") from None
    for name in names:
        path = folder / name
        if name.startswith(_READ) and os.path.isfile(path) and not os.access(path, os.R_OK):
            raise CheckpointError(f"{label}: cannot read {_named(path)}: no permission")
    return names


def hub_snapshot(path: str | Path) -> tuple[str, str] | None:
    """Hub id and commit of a folder in the Hub's cache, `None` for another."""
    found = re.search(r"models--([^/]+)/snapshots/([^/]+)/?$", str(path))
    return (found[1].replace("--", "/"), found[2]) if found else None


def _published_name(name: str) -> str:
    """A Hub id as it is, of a local path the last part."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not os.path.exists(name)
    return name if is_hub_id else _printable(Path(name).name)


def _quantisation(config: PreTrainedConfig) -> str:
    settings = config.quantization_config
    settings = settings if isinstance(settings, dict) else getattr(settings, "to_dict", dict)()
    return str(settings.get("quant_method", "by an unknown method"))


def is_adapter(files: Collection[str]) -> bool:
    """Whether these files make a PEFT adapter; beside a whole model's weights an adapter's are left alone."""
    return ADAPTER_CONFIG_NAME in files and not any(name in files for name in MODEL_WEIGHTS)


def adapter_settings(label: str, folder: Path) -> dict[str, Any]:
    """Content of `adapter_config.json` in a PEFT adapter's folder.

    Raises:
        CheckpointError: it cannot be read, or does not say what it is.
    """
    path = folder / ADAPTER_CONFIG_NAME
    settings = read_json(path, label)
    if not isinstance(settings.get("peft_type"), str):
        found = f"peft_type is {short(settings['peft_type'])}" if "peft_type" in settings else "no field 'peft_type'"
        raise CheckpointError(f"{label}: cannot use {path}: {found}: expected a PEFT adapter's settings")
    for field in ("base_model_name_or_path", "revision"):
        if not isinstance(settings.get(field) or "", str):
            raise CheckpointError(f"{label}: cannot use {path}: {field} is {short(settings[field])}: expected a text")
    return settings


def read_config(label: str, folder: Path, storage: Storage | None = None) -> PreTrainedConfig:
    """`config.json` of a folder; a checkpoint's own code is never run.

    Args:
        label: owner of the folder, for the message.
        folder: where the file is.
        storage (*optional*): the tensors beside it, which its sizes are compared with.

    Raises:
        CheckpointError: it cannot be read, it names sizes of another order than the tensors', or transformers cannot
            use it.
    """
    path = folder / CONFIG_NAME
    infos = storage.infos.values() if storage is not None else ()
    sizes = [size for info in infos if info.numel for size in info.shape]
    settings = read_json(path, label)
    check_sizes(f"{label}: {path}", settings, max(sizes, default=0))
    named = settings.get("architectures")
    if not (named is None or (isinstance(named, list) and all(isinstance(name, str) for name in named))):
        raise CheckpointError(f"{label}: {path}: architectures is {short(named)}: expected a list of names")
    try:
        # False, not the default: that one would ask to run a checkpoint's own code.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        type(config).from_dict(config.to_dict())  # as a repo keeps it
        return config
    except Exception as error:  # a configuration's class may raise anything
        raise CheckpointError(f"{label}: cannot use {path}: {one_line(error) or type(error).__name__}") from None


def _config(label: str, folder: Path, storage: Storage) -> PreTrainedConfig:
    if not os.path.lexists(folder / CONFIG_NAME):
        raise CheckpointError(f"{label}: no {CONFIG_NAME} in {_named(folder)}")
    return read_config(label, folder, storage)


def commit_of(repo_id: str, revision: str | None) -> str:
    """The commit that a branch, tag or commit of a Hub repo is; errors are `HUB_ERRORS`."""
    if constants.HF_HUB_OFFLINE:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True)).name
    return str(HfApi().model_info(repo_id, revision=revision).sha)


def _open_hub(reference: str, label: str) -> Source | Adapter:
    repo_id, _, revision = reference.partition("@")
    try:
        offline = constants.HF_HUB_OFFLINE
        commit = commit_of(repo_id, revision or None)
        patterns = None if offline else _CONFIG_FILES
        folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=patterns, local_files_only=offline))
        files = os.listdir(folder)
        if ADAPTER_CONFIG_NAME in files and not offline:
            files = HfApi().list_repo_files(repo_id, revision=commit)
        if is_adapter(files):
            if not offline:  # an adapter is small: no need to read headers from afar
                folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=_ADAPTER_FILES))
            return Adapter(
                label, repo_id, adapter_settings(label, folder), open_adapter(label, folder), commit, folder
            )
        storage = open_folder(label, folder) if offline else HubStorage(label, repo_id, commit)
    except EMRError:
        raise
    except HFValidationError as error:
        raise CheckpointError(
            f"{label}: {short(reference)} is neither a folder nor a Hub id: {one_line(error)}"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"{label}: {short(reference)} is neither a folder here nor on the Hub: {one_line(error)}"
        ) from None
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"{label}: {short(reference)} is no folder here, and the Hub did not answer for it: {one_line(error)}"
        ) from None
    return Source(label, repo_id, _config(label, folder, storage), storage, commit, folder)
