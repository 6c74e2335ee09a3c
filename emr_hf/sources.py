"""Inputs of a merge: a local folder, a Hub id, or a loaded model, as lazily read named tensors.

Opening a source reads configurations and headers only. The tensors' names are those of the model in memory: where
transformers renames, splits or fuses a checkpoint's tensors on loading (as for experts), so does this file, one group
of tensors at a time and by transformers' own rules.
"""

from __future__ import annotations

import json
import pickle
import re
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub import HfApi, get_local_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.hf_api import SafetensorsRepoMetadata
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils.generic import ContextManagers

from .errors import CheckpointError, MismatchError

MERGEABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Reference = str | Path | PreTrainedModel

_CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "tokenizer*", "README.md"]
_SAFETENSORS = ["*.safetensors", "*.safetensors.index.json"]
_BIN_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        return cls(tuple(tensor.shape), tensor.dtype)


class Storage(Protocol):
    """Tensors under the names they are stored with."""

    infos: dict[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file where it has one."""
        ...


class SafetensorsStorage:
    """One safetensors file, or shards behind an index. Headers are checked on opening, tensors mapped on reading."""

    def __init__(self, label: str, folder: Path, metadata: SafetensorsRepoMetadata):
        self.label, self.folder, self.metadata = label, folder, metadata
        self.infos = {name: self._info(name, shard) for name, shard in metadata.weight_map.items()}
        self._open: dict[str, Any] = {}

    def _info(self, name: str, shard: str) -> TensorInfo:
        tensor = self.metadata.files_metadata[shard].tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.label}: the index says that {name} is in {shard}, which does not hold it")
        if tensor.dtype not in str_to_torch_dtype:
            raise CheckpointError(
                f"{self.label}: {name} has dtype {tensor.dtype}, which cannot be merged: "
                "expected F32, BF16, F16 or F64"
            )
        return TensorInfo(tuple(tensor.shape), str_to_torch_dtype[tensor.dtype])

    @classmethod
    def open_local(cls, label: str, folder: Path) -> SafetensorsStorage:
        try:
            metadata = get_local_safetensors_metadata(folder)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{label}: missing shard {error.filename}, which the index in {folder} names"
            ) from None
        except (SafetensorsParsingError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{label}: broken or truncated file in {folder}: {error}") from None
        for shard, header in metadata.files_metadata.items():
            _check_complete(label, folder / shard, header)
        return cls(label, folder, metadata)

    def read(self, name: str) -> Tensor:
        shard = self.metadata.weight_map[name]
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(self.folder / shard, framework="pt")
            return self._open[shard].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.label}: cannot read {name} from {self.folder / shard}: {error}") from None


def _check_complete(label: str, path: Path, header: Any) -> None:
    with path.open("rb") as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
    expected = data_start + max((tensor.data_offsets[1] for tensor in header.tensors.values()), default=0)
    found = path.stat().st_size
    if found != expected:
        raise CheckpointError(f"{label}: {path} is truncated or damaged: expected {expected} bytes, found {found}")


class BinStorage:
    """`pytorch_model.bin`, single or sharded, through `torch.load(weights_only=True)`: no code of the file is run."""

    def __init__(self, label: str, folder: Path):
        self.label = label
        self._tensors: dict[str, Tensor] = {}
        for path in self._files(folder):
            self._tensors.update(self._load(path))
        self.infos = {name: TensorInfo.of(tensor) for name, tensor in self._tensors.items()}

    def _files(self, folder: Path) -> list[Path]:
        single, index = (folder / name for name in _BIN_FILES)
        paths = [single]
        if not single.exists():
            paths = [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        for path in paths:
            if not path.exists():
                raise CheckpointError(f"{self.label}: missing shard {path}, which {index.name} names")
        return paths

    def _load(self, path: Path) -> dict[str, Tensor]:
        try:
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # files of torch < 1.6 are no zip archives and cannot be mapped
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.label}: cannot load {path} with weights_only=True: {error}") from None
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise CheckpointError(f"{self.label}: {path} is not a plain dictionary of tensors")
        return loaded

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class ModelStorage:
    """A loaded model. Its names are those in memory already."""

    def __init__(self, label: str, model: PreTrainedModel):
        self._tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        for name, tensor in self._tensors.items():
            if tensor.device.type == "meta":
                raise CheckpointError(f"{label}: {name} is offloaded: merge from the model's folder instead")
        self.infos = {name: TensorInfo.of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].cpu()


class HubStorage:
    """A Hub repo at one commit: headers by range requests now, weights downloaded when the first tensor is read."""

    def __init__(self, label: str, repo_id: str, revision: str):
        self.label, self.repo_id, self.revision = label, repo_id, revision
        self._metadata: SafetensorsRepoMetadata | None = None
        try:
            self._metadata = HfApi().get_safetensors_metadata(repo_id, revision=revision)
            self.infos = SafetensorsStorage(label, Path(), self._metadata).infos
        except NotASafetensorsRepoError:
            self.infos = self._local.infos  # .bin files have no header to read from afar

    @cached_property
    def _local(self) -> SafetensorsStorage | BinStorage:
        patterns = _SAFETENSORS if self._metadata else ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
        folder = Path(snapshot_download(self.repo_id, revision=self.revision, allow_patterns=patterns))
        return SafetensorsStorage.open_local(self.label, folder) if self._metadata else BinStorage(self.label, folder)

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
    is_hub_id: bool = False

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
        name = str(reference.config.name_or_path or type(reference).__name__)
        storage = ModelStorage(label, reference)
        source = Source(label, Path(name).name, reference.config, storage, model=reference)
    elif (folder := Path(reference).expanduser()).is_dir():
        source = Source(
            label, folder.resolve().name, _config(label, folder), _folder_storage(label, folder), None, folder
        )
    elif isinstance(reference, Path) or re.match(r"[./~]|[A-Za-z]:\\", str(reference)) or folder.is_file():
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


def _quantisation(config: PreTrainedConfig) -> str:
    settings = config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    return str(settings.get("quant_method", "unknown method"))


def _config(label: str, folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{label}: no config.json in {folder}")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{label}: cannot use {folder / 'config.json'}: {error}") from None


def _folder_storage(label: str, folder: Path) -> Storage:
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        return SafetensorsStorage.open_local(label, folder)
    if any((folder / name).exists() for name in _BIN_FILES):
        return BinStorage(label, folder)
    raise CheckpointError(
        f"{label}: no weights in {folder}: expected model.safetensors, its index, or {_BIN_FILES[0]}"
    )


def _open_hub(reference: str, label: str) -> Source:
    repo_id, _, revision = reference.partition("@")
    try:
        commit = HfApi().model_info(repo_id, revision=revision or None).sha
        folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=_CONFIG_FILES))
        storage = HubStorage(label, repo_id, str(commit))
    except HFValidationError as error:
        raise CheckpointError(f"{label}: {reference!r} is neither a folder nor a Hub id: {error}") from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(f"{label}: {reference!r} is neither a folder here nor on the Hub: {error}") from None
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{label}: {reference!r} is no folder here, and the Hub did not answer for it: {error}"
        ) from None
    return Source(label, repo_id, _config(label, folder), storage, commit, folder, is_hub_id=True)


def build_skeleton(architecture: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights, on the meta device, as `from_pretrained` would build it."""
    model_class = model_class_of(architecture)
    config = deepcopy(config)
    with ContextManagers(model_class.get_init_context(dtype, False, False, False)):
        return model_class(config)


def model_class_of(architecture: str) -> type[PreTrainedModel]:
    """A model class of transformers by its name."""
    model_class = getattr(transformers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise MismatchError(
            f"architecture {architecture!r} is not a model class of transformers {transformers.__version__}"
        )
    return model_class


@dataclass
class _Group:
    """Stored tensors that make one or more tensors in memory; `converter` is `None` for a plain renaming."""

    first_target: str
    converter: WeightConverter | None
    members: list[tuple[str, str]] = field(default_factory=list)  # (source pattern, stored name)


class Checkpoint:
    """A source's tensors under the names they have in `skeleton`.

    Attributes:
        infos: name in memory -> shape and dtype. Tied tensors appear once, under the name transformers ties to.
        scratch: folder for temporary files, the system's by default.
        unexpected: stored names that the model has no place for.
    """

    def __init__(self, source: Source, skeleton: PreTrainedModel):
        self.source, self._skeleton = source, skeleton
        self.scratch: Path | None = None
        self.unexpected: list[str] = []
        self.infos: dict[str, TensorInfo] = {}
        self._groups: dict[str, _Group] = {}
        self._spilled: dict[str, Tensor] = {}
        for group in self._make_groups():
            for name, info in self._infos_of(group).items():
                self._groups[name], self.infos[name] = group, info
        self._tied = self._fold_tied_names()

    def _make_groups(self) -> list[_Group]:
        places = self._skeleton.state_dict()
        prefix = self._skeleton.base_model_prefix
        mapping = get_model_conversion_mapping(self._skeleton) if self.source.model is None else []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        groups: dict[str, _Group] = {}
        for stored in sorted(self.source.storage.infos, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, places)
            if name not in places and stored in places:
                name, pattern = stored, None
            if name not in places:
                self.unexpected.append(stored)
                continue
            converter = deepcopy(by_pattern[pattern]) if pattern is not None else None
            groups.setdefault(name, _Group(name, converter)).members.append((pattern or stored, stored))
        return list(groups.values())

    def _infos_of(self, group: _Group) -> dict[str, TensorInfo]:
        stored = self.source.storage.infos
        if group.converter is None:
            return {group.first_target: stored[group.members[0][1]]}
        members = {
            name: torch.empty(stored[name].shape, dtype=stored[name].dtype, device="meta") for _, name in group.members
        }
        return {name: TensorInfo.of(tensor) for name, tensor in self._convert(group, members).items()}

    def _convert(self, group: _Group, members: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(group.converter)
        assert converter is not None
        for pattern, stored in group.members:
            converter.add_tensor(group.first_target, stored, pattern, members[stored])  # type: ignore[arg-type]
        try:
            converted = converter.convert(group.first_target, model=self._skeleton, config=self._skeleton.config)
        except Exception as error:  # whatever transformers' conversion raises, the checkpoint does not fit it
            names = ", ".join(stored for _, stored in group.members[:3])
            raise CheckpointError(
                f"{self.source.label}: cannot make {group.first_target} of {names}, ...: {error}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def _fold_tied_names(self) -> dict[str, str]:
        """Keep one name of each tied tensor; returns kept name -> the other stored name, where both are stored."""
        both = {}
        for alias, name in tied_names(self._skeleton).items():
            if alias not in self.infos:
                continue
            if name in self.infos:
                both[alias] = name
            else:
                self.infos[name], self._groups[name] = self.infos[alias], self._groups[alias]
            del self.infos[alias]
        return both

    def check_tied(self) -> None:
        """Raise if tensors that the configuration ties are stored with different values."""
        for alias, name in self._tied.items():
            if not torch.equal(self.read(alias), self.read(name)):
                raise MismatchError(
                    f"{self.source.label}: {alias} and {name} differ, but the configuration ties them "
                    "(tie_word_embeddings=true): correct the checkpoint's config.json"
                )

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from a file where there is one."""
        group = self._groups[name]
        if group.converter is None:
            return self.source.storage.read(group.members[0][1])
        if name not in self._spilled:
            members = {stored: self.source.storage.read(stored) for _, stored in group.members}
            # Converted tensors of N finetunes are needed side by side: kept in memory they would grow with N.
            self._spilled = {n: _spill(tensor, self.scratch) for n, tensor in self._convert(group, members).items()}
        return self._spilled[name]


def tied_names(skeleton: PreTrainedModel) -> dict[str, str]:
    """Alias -> name that it is tied to."""
    return dict(skeleton.all_tied_weights_keys)


def _spill(tensor: Tensor, folder: Path | None) -> Tensor:
    """A copy of the tensor that lives in an unnamed temporary file."""
    if tensor.numel() == 0:
        return tensor
    with tempfile.NamedTemporaryFile(prefix="emr-hf-", dir=folder) as file:
        copy = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        copy.copy_(tensor.reshape(-1))
    return copy.reshape(tensor.shape)
