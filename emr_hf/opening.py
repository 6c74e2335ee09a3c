"""The one gate through which every reader of a merged repo goes: its configuration, its headers, its values."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from .configuration import EMRConfig
from .digests import verify_downloaded
from .errors import CheckpointError, RepoError, one_line, short
from .format import model_name, part_of, scale_name, stored_name, tau_name, tensors_of
from .json_file import read_json
from .lowbit import BITS
from .mapped_files import WatchedMemory
from .repo import layout_of, open_repo
from .schema import check_adapter, tensor_infos
from .sources import HUB_ERRORS
from .storage import Storage, TensorInfo

# Elements looked at a time: small enough for the cache, and for torch to stay on one thread, all that a fork has.
_PIECE = 1 << 14
_LARGEST = 1 << 28  # bytes of a configuration, which names every tensor several times


@dataclass(frozen=True)
class OpenRepo:
    """A merged repo whose configuration and tensors fit each other.

    Attributes:
        folder: where it is.
        layout: `"model"` or `"peft"`.
        config: its configuration.
        settings: content of its `config.json` or `adapter_config.json`.
        storage: its tensors.
    """

    folder: Path
    layout: str
    config: EMRConfig
    settings: dict[str, Any]
    storage: Storage


def fetch_repo(repo: str | Path) -> OpenRepo:
    """A merged repo, downloaded if it is on the Hub; see [`open_merged`].

    Raises:
        RepoError: it is neither here nor there, or damaged.
    """
    if Path(repo).exists():
        return open_merged(Path(repo))
    since = time.time()
    try:
        folder = Path(snapshot_download(str(repo)))
    except HUB_ERRORS as error:
        raise RepoError(f"{repo} is no merged repo, neither here nor on the Hub: {one_line(error)}") from None
    opened = open_merged(folder)
    verify_downloaded(str(repo), folder.glob("*.safetensors"), folder.name, since)
    return opened


def open_merged(folder: Path) -> OpenRepo:
    """A merged repo of either layout, checked.

    Raises:
        RepoError: it is none, or something in it is missing, damaged, or not what its configuration says.
    """
    layout = layout_of(folder)
    if layout is None:
        raise _no_repo(folder)
    settings = read_settings(folder, layout)
    config = config_of(settings, layout, folder)
    stored = open_repo(folder)
    check_tensors(config, stored.infos, layout, folder)
    storage = CheckedStorage(stored, config, folder)
    for name in storage.infos:
        if part_of(name) in ("rescaler", "scale"):
            storage.read(name)
    return OpenRepo(folder, layout, config, settings, storage)


def _no_repo(folder: Path) -> RepoError:
    for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME):
        if (folder / name).exists():
            _read(folder / name)  # a broken file says more than that it is another
    return RepoError(f"{folder} is no merged repo: expected what `emr-hf merge` or save_pretrained wrote")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, path.parent.name, unique=True, largest=_LARGEST)
    except CheckpointError as error:
        raise RepoError(str(error)) from None


def _file_of(folder: Path, layout: str) -> Path:
    return folder / (CONFIG_NAME if layout == "model" else ADAPTER_CONFIG_NAME)


def read_settings(folder: Path, layout: str) -> dict[str, Any]:
    """Content of the configuration's file."""
    return _read(_file_of(folder, layout))


def config_of(settings: dict[str, Any], layout: str, folder: Path) -> EMRConfig:
    """The configuration of a merged repo, from the content of its file.

    Raises:
        RepoError: of a wrong field.
    """
    try:
        if layout == "peft":
            check_adapter(settings)
        return EMRConfig.from_dict(settings if layout == "model" else settings["emr"])
    except RepoError as error:
        raise RepoError(f"{_file_of(folder, layout)}: {error}") from None


def check_tensors(config: EMRConfig, infos: Mapping[str, TensorInfo], layout: str, place: object) -> None:
    """Raise RepoError unless the tensors of a repo are those that its configuration demands.

    Args:
        config: the repo's.
        infos: name -> shape and dtype, as the headers say.
        layout: of the repo.
        place: what messages call it.
    """
    expected = _expected(config, infos, layout, place)
    for name, info in expected.items():
        if name not in infos:
            raise _missing(place, stored_name(name, layout))
        if infos[name] != info:
            raise RepoError(
                f"{place}: the tensor {name} is {_shown(infos[name])}, but {_shown(info)} by its configuration"
            )
    if unknown := [name for name in infos if name not in expected]:
        raise RepoError(f"{place} holds the tensor {short(unknown[0])}, which its configuration does not know")


def _shown(info: TensorInfo) -> str:
    return f"{str(info.dtype).removeprefix('torch.')} {list(info.shape)}"


def _missing(place: object, name: str) -> RepoError:
    return RepoError(f"{place}: the tensor {name} is missing, which its configuration demands")


def _expected(config: EMRConfig, infos: Mapping[str, TensorInfo], layout: str, place: object) -> dict[str, TensorInfo]:
    """The tensors that a configuration demands."""
    merged = config.merged_parameters or []
    base = _unrecorded(config, infos, layout) if config.tensors is None else tensor_infos(config.tensors)
    for name in merged:
        if name not in base:
            raise _missing(place, stored_name(model_name(name) if layout == "model" else tau_name(name), layout))
    private = {entry["key"]: tensor_infos(entry["private"]) for entry in config.tasks.values()}
    return tensors_of(base, merged, private, config.tau_dtype, layout)


def _unrecorded(config: EMRConfig, infos: Mapping[str, TensorInfo], layout: str) -> dict[str, TensorInfo]:
    """The base's tensors in a repo of an older version, which did not record them: as its headers have them."""
    if layout == "model":
        prefix = model_name("")
        return {name.removeprefix(prefix): info for name, info in infos.items() if name.startswith(prefix)}
    found = {}
    for name in config.merged_parameters or []:
        if tau_name(name) in infos:
            tau, scale = infos[tau_name(name)], infos.get(scale_name(name))
            if scale is not None and scale.numel:  # in codes: rows, and columns of as many bytes
                tau = TensorInfo((scale.numel, tau.numel * 8 // BITS[config.tau_dtype] // scale.numel), torch.float32)
            found[name] = tau
    return found


class CheckedStorage:
    """A repo's tensors, of which no number that is read may be infinite or none.

    What no task changes is the base's own business but for NaN.
    """

    def __init__(self, storage: Storage, config: EMRConfig, place: object):
        self.infos = storage.infos
        self._storage, self._place = storage, place
        self._merged = {model_name(name) for name in config.merged_parameters or []}

    @property
    def files(self) -> Sequence[WatchedMemory]:
        return self._storage.files

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file where it has one."""
        tensor = self._storage.read(name)
        check_finite(tensor, name, self._place, infinite=part_of(name) == "base" and name not in self._merged)
        return tensor


def check_finite(tensor: Tensor, name: str, place: object, infinite: bool = False) -> None:
    """Raise RepoError if a tensor holds NaN, or infinite numbers unless these are allowed."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dtype.itemsize < 2:
        return
    for piece in tensor.detach().reshape(-1).split(_PIECE if tensor.device.type == "cpu" else tensor.numel()):
        low, high = (float(value) for value in torch.aminmax(piece))  # NaN comes through
        if math.isnan(low) or (not infinite and math.inf in (-low, high)):
            found = high if high == math.inf else low
            raise RepoError(f"{place}: the tensor {name} holds {found}: expected finite numbers; the repo is damaged")
