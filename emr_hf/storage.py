"""Named tensors as they are stored: safetensors and `.bin` files, single and sharded, and models in memory.

Opening reads headers only; a tensor is mapped from its file when it is asked for.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from .errors import CheckpointError, one_line, short
from .mapped_files import InputFile, WatchedMemory
from .regular_file import require_file

if TYPE_CHECKING:  # a configuration is loaded without the code of models
    from transformers import PreTrainedModel

# A whole model's weights stand in one of these files, or in those that it names.
MODEL_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


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

    @classmethod
    def of_header(cls, label: str, name: str, shape: Sequence[int], dtype: str) -> TensorInfo:
        """From a safetensors header.

        Raises:
            CheckpointError: torch has no such dtype.
        """
        from transformers.modeling_utils import str_to_torch_dtype

        if dtype not in str_to_torch_dtype:
            raise CheckpointError(f"{label}: {name} has dtype {dtype}: expected F32, BF16, F16 or F64")
        return cls(tuple(shape), str_to_torch_dtype[dtype])


class Storage(Protocol):
    """Tensors under the names they are stored with."""

    infos: dict[str, TensorInfo]

    @property
    def files(self) -> Sequence[WatchedMemory]:
        """What has been opened, for `mapped_files.guarded_reads`."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file where it has one."""
        ...


def open_adapter(label: str, folder: Path) -> Storage:
    """The weights of a PEFT adapter's folder.

    Raises:
        CheckpointError: no weights, a truncated or broken file, or what is no regular file.
    """
    for kind, name in ((SafetensorsStorage, ADAPTER_SAFE_WEIGHTS_NAME), (BinStorage, ADAPTER_WEIGHTS_NAME)):
        if (folder / name).exists():
            return kind(label, [folder / name])
    raise CheckpointError(f"{label}: no weights in {folder}: expected {ADAPTER_SAFE_WEIGHTS_NAME}")


def open_folder(label: str, folder: Path) -> Storage:
    """The weights of a checkpoint's folder; safetensors are preferred, as transformers does.

    Raises:
        CheckpointError: no weights, a missing shard, a truncated or broken file, or what is no regular file.
    """
    for kind, single, index in (
        (SafetensorsStorage, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        (BinStorage, WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ):
        if (folder / single).exists():
            return kind(label, [folder / single])
        if (folder / index).exists():
            weight_map = _read_index(label, folder / index)
            paths = [folder / shard for shard in sorted(set(weight_map.values()))]
            for path in paths:
                if not path.exists():
                    raise CheckpointError(f"{label}: missing shard {path}, which {index} names")
            return kind(label, paths, {name: folder / shard for name, shard in weight_map.items()})
    raise CheckpointError(f"{label}: no weights in {folder}: expected {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} or an index")


def _read_index(label: str, path: Path) -> dict[str, str]:
    """`weight_map` of an index: tensor -> file."""
    require_file(path, label)
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        usable = bool(weight_map) and all(map(_is_below, weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{label}: broken index {path}: {one_line(error) or type(error).__name__}") from None
    if not usable:
        raise CheckpointError(f"{label}: broken index {path}: expected a weight_map of tensors to files beside it")
    return weight_map


def _is_below(shard: object) -> bool:
    """Whether a shard's name leads nowhere but into its index's folder."""
    if not isinstance(shard, str) or not 0 < len(shard) < 256:
        return False
    return not os.path.isabs(shard) and ".." not in Path(shard).parts


def _check_places(label: str, expected: dict[str, Path] | None, found: dict[str, Path]) -> None:
    """Raise if the index names a tensor that its file does not hold."""
    for name, path in (expected or {}).items():
        if found.get(name) != path:
            raise CheckpointError(f"{label}: the index says that {name} is in {path}, which does not hold it")


class SafetensorsStorage:
    """Safetensors files. The library checks headers and lengths on opening."""

    def __init__(self, label: str, paths: Sequence[Path], places: dict[str, Path] | None = None):
        self.label = label
        self.infos: dict[str, TensorInfo] = {}
        self.files = [InputFile(path, label) for path in paths]
        self._places: dict[str, tuple[InputFile, Any]] = {}
        for file in self.files:
            try:
                opened = safe_open(file.path, framework="pt")
                for name in opened.keys():
                    part = opened.get_slice(name)
                    self.infos[name] = TensorInfo.of_header(label, name, part.get_shape(), part.get_dtype())
                    self._places[name] = file, opened
            except CheckpointError:
                raise
            except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
                raise CheckpointError(f"{label}: {file.path} is truncated or damaged: {one_line(error)}") from None
        _check_places(label, places, {name: file.path for name, (file, _) in self._places.items()})

    def read(self, name: str) -> Tensor:
        file, opened = self._places[name]
        file.check()
        try:
            return file.watch(opened.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.label}: cannot read {name} from {file.path}: {one_line(error)}") from None


class BinStorage:
    """`pytorch_model.bin` files through `torch.load(weights_only=True)`: no code of a file is run."""

    def __init__(self, label: str, paths: Sequence[Path], places: dict[str, Path] | None = None):
        self.files = [InputFile(path, label) for path in paths]
        self._places: dict[str, tuple[InputFile, Tensor]] = {}
        for file in self.files:
            for name, tensor in _load_bin(label, file.path).items():
                self._places[name] = file, file.watch(tensor)
        _check_places(label, places, {name: file.path for name, (file, _) in self._places.items()})
        self.infos = {name: TensorInfo.of(tensor) for name, (_, tensor) in self._places.items()}

    def read(self, name: str) -> Tensor:
        file, tensor = self._places[name]
        file.check()
        return tensor


def _load_bin(label: str, path: Path) -> dict[str, Tensor]:
    try:
        _check_not_packed(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch < 1.6 are no zip archives and cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        reason = one_line(str(error).partition("\n")[0]) or type(error).__name__
        raise CheckpointError(f"{label}: cannot load {path} with weights_only=True: {reason}") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{label}: {path}: expected a dictionary of tensors, got {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{label}: {path}: {short(name)} is {type(value).__name__}: expected named tensors")
        if value.layout is not torch.strided or value.is_meta:
            raise CheckpointError(f"{label}: {path}: {name} is no dense tensor with values ({value.layout})")
        if value.nbytes > (stored := value.untyped_storage().nbytes()):
            raise CheckpointError(
                f"{label}: {path}: {name} stands for {value.nbytes:,} bytes, but {stored:,} are stored"
            )
    return loaded


def _check_not_packed(path: Path) -> None:
    """Raise ValueError for an archive of packed files, which torch never writes: they may unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(
                        f"{entry.filename} in it is compressed: expected an archive as torch.save writes it"
                    )


class ModelStorage:
    """A loaded model. Its names are those in memory already. transformers may have mapped it from its files."""

    def __init__(self, label: str, model: PreTrainedModel):
        memory = WatchedMemory(label)
        self.files = [memory]
        self._tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        for name, tensor in self._tensors.items():
            if tensor.is_meta:
                raise CheckpointError(f"{label}: {name} is offloaded: merge from the model's folder instead")
        self.infos = {name: TensorInfo.of(memory.watch(tensor)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].cpu()


def reserve(descriptor: int, size: int) -> None:
    """Give an open file its size and its blocks; a full disk would otherwise kill the process at a write into its map.

    Raises:
        OSError: no space.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
