"""A merged repo on disk (docs/format.md): its files and their names, and the weights, filled in piece by piece."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from torch import Tensor
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from .errors import CheckpointError, OptionError, RepoError, TensorError, short
from .format import MODEL_TYPE, PEFT_PREFIX, PEFT_TYPE, stored_name
from .json_file import read_json
from .mapped_files import WatchedMemory
from .storage import Storage, TensorInfo, open_adapter, open_folder, reserve

REPORT_NAME = "emr_report.json"
CARD_NAME = "README.md"
SHIM_NAME = "modeling_emr_hf.py"
TASKS_FOLDER = "tasks"
ADAPTERS_FOLDER = "adapters"

# Everything that a tokenizer, a processor or `generate` reads beside the weights.
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "bpe.model",
    "vocab.bpe",
    "bpe.codes",
    "dict.txt",
    "entity_vocab.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
GENERATION_CONFIG = "generation_config.json"
# Settings in which transformers writes down where they were loaded from.
NAMING_FILES = ("tokenizer_config.json", "processor_config.json")

_SHIM = '''"""Loads this repo with `trust_remote_code=True` where emr_hf is installed but not imported."""

from emr_hf import {names}  # noqa: F401
'''

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def layout_of(folder: Path) -> str | None:
    """Which of `LAYOUTS` a folder's merge has; `None` if it holds none."""
    for layout, file, key, kind in (
        ("model", CONFIG_NAME, "model_type", MODEL_TYPE),
        ("peft", ADAPTER_CONFIG_NAME, "peft_type", PEFT_TYPE),
    ):
        with suppress(CheckpointError):
            if read_json(folder / file, folder.name).get(key) == kind:
                return layout
    return None


class _PeftStorage:
    """A merge in PEFT's file, under the names of a repo with a base."""

    def __init__(self, storage: Storage):
        self._storage = storage
        names = (name for name in storage.infos if name.startswith(PEFT_PREFIX))
        self._stored = {f"emr.{name.removeprefix(PEFT_PREFIX)}": name for name in names}
        self.infos = {name: storage.infos[stored] for name, stored in self._stored.items()}

    @property
    def files(self) -> Sequence[WatchedMemory]:
        return self._storage.files

    def read(self, name: str) -> Tensor:
        return self._storage.read(self._stored[name])


def open_repo(folder: Path) -> Storage:
    """The tensors of a merged repo, by their headers, under one name each whatever the layout.

    Raises:
        RepoError: not a merged repo, or one with missing or damaged files.
    """
    layout = layout_of(folder)
    if layout is None:
        raise RepoError(f"{folder} is no merged repo: expected what `emr-hf merge` or save_pretrained wrote")
    try:
        if layout == "peft":
            return _PeftStorage(open_adapter(str(folder), folder))
        return open_folder(str(folder), folder)
    except CheckpointError as error:
        raise RepoError(str(error)) from None


def parse_size(size: str | int) -> int:
    """Bytes of a size such as `"5GB"` (powers of ten), or of a whole number.

    Raises:
        OptionError: anything else, or nothing.
    """
    text = size.upper() if isinstance(size, str) else str(size) if type(size) is int and abs(size) < 2**63 else ""
    match = re.fullmatch(r"(\d{1,19}(?:\.\d{1,19})?)\s*([KMGT]?)B|(\d{1,19})", text)
    if match:
        number, unit, plain = match.groups()
        if (found := int(plain or float(number) * 1000 ** " KMGT".index(unit or " "))) > 0:
            return found
    raise OptionError(f"max_shard_size={short(size)}: expected bytes, more than 0, or a size such as '5GB'")


def create_weights(
    folder: Path, tensors: Mapping[str, TensorInfo], max_shard_size: str | int, layout: str = "model"
) -> None:
    """Write safetensors files whose tensors are yet to be filled in by [`WeightsWriter`], and reserve their space.

    Args:
        folder: where to.
        tensors: name -> shape and dtype.
        max_shard_size: bytes of a file, or a size such as `"5GB"`; PEFT reads a single one.
        layout (*optional*, defaults to `"model"`): which of `LAYOUTS`.
    """
    if layout == "peft":
        _create_file(folder / ADAPTER_SAFE_WEIGHTS_NAME, tensors, layout)
        return
    shards = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda info: info.nbytes,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=parse_size(max_shard_size),
    )
    for file_name, names in shards.filename_to_tensors.items():
        _create_file(folder / file_name, {name: tensors[name] for name in names}, layout)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _create_file(path: Path, tensors: Mapping[str, TensorInfo], layout: str) -> None:
    # Widest dtype first keeps every tensor aligned, as safetensors' own writer does.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        info = tensors[name]
        start, end = end, end + info.nbytes
        dtype = _SAFETENSORS_DTYPES[info.dtype]
        header[stored_name(name, layout)] = {"dtype": dtype, "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        reserve(file.fileno(), file.tell() + end)


class WeightsWriter:
    """The files of [`create_weights`], whose tensors are filled in any order and piece by piece.

    All names, shapes and dtypes are known from the start; `safetensors` itself needs every tensor of a file in memory
    at once. Any thread may write, and several processes may fill one file, each its own tensors. Nothing is mapped:
    the system would fill each new page with zeros first.

    Args:
        folder, tensors, layout: as for [`create_weights`].
        files (*optional*): where the files are, if not in `folder` itself.

    Attributes:
        written: name -> elements written so far, by this process and by those that it has been told of. Pieces of a
            tensor never overlap, so that a tensor is complete when all its elements are counted.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, TensorInfo], layout: str = "model", files: Path | None = None
    ):
        self.folder = folder
        self._tensors = tensors
        self.written = dict.fromkeys(tensors, 0)
        self._counting = threading.Lock()
        self._files: list[int] = []
        places: dict[str, tuple[int, int]] = {}
        try:
            for path in (files or folder).glob("*.safetensors"):
                file = os.open(path, os.O_RDWR)
                self._files.append(file)
                (length,) = struct.unpack("<Q", os.pread(file, 8, 0))
                header = json.loads(os.pread(file, length, 8))
                del header["__metadata__"]
                for stored, entry in header.items():
                    places[stored] = file, 8 + length + entry["data_offsets"][0]
        except BaseException:
            self._close()
            raise
        self._places = {name: places[stored_name(name, layout)] for name in tensors}

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor is stored in."""
        return self._tensors[name].dtype

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        """Write elements of a tensor, from its element `start` on; they are cast to its dtype.

        Raises:
            TensorError: they reach beyond the tensor, where the next one is.
        """
        file, offset = self._places[name]
        dtype, numel = self._tensors[name].dtype, self._tensors[name].numel
        if start < 0 or start + values.numel() > numel:
            raise TensorError(f"{name} has {numel:,} elements, got {values.numel():,} to write from {start:,} on")
        flat = values.detach().to("cpu", dtype).contiguous().reshape(-1)
        content = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        offset += start * dtype.itemsize
        while content:  # a system call writes 2 GB at most
            written = os.pwrite(file, content, offset)
            content, offset = content[written:], offset + written
        self.count({name: values.numel()})

    def count(self, written: Mapping[str, int]) -> None:
        """Take into account that so many elements of some tensors have been written, perhaps by another process."""
        with self._counting:
            for name, numel in written.items():
                self.written[name] += numel

    def close(self) -> None:
        """Write everything to the disk, what other processes have filled in too.

        Raises:
            RepoError: a tensor has not been written in full.
        """
        for name, info in self._tensors.items():
            if self.written[name] != info.numel:
                raise RepoError(f"{name}: {self.written[name]:,} of its {info.numel:,} elements have been written")
        for file in self._files:
            os.fsync(file)
        self._close()

    def _close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def __del__(self) -> None:
        self._close()


def write_shim(folder: Path, names: list[str]) -> None:
    """The file that `auto_map` points to."""
    (folder / SHIM_NAME).write_text(_SHIM.format(names=", ".join(names)))


def copy_side_files(folder: Path, out: Path) -> list[str]:
    """Copy tokenizer and processor files; returns their names.

    Raises:
        CheckpointError: one of them links to a file outside of the folder.
    """
    names = [name for name in SIDE_FILES if (folder / name).is_file()]
    for name in names:
        check_own(folder / name, folder)
        out.mkdir(parents=True, exist_ok=True)
        if name in NAMING_FILES and "name_or_path" in read_json(folder / name, folder.name):
            text = json.dumps(_content(folder / name), indent=2, ensure_ascii=False)
            (out / name).write_text(text + "\n", encoding="utf-8")
        else:
            shutil.copyfile(folder / name, out / name)
    return names


def is_own(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, also if it is a link; in the Hub's cache files link to `blobs` beside it."""
    real, root = path.resolve(), folder.resolve()
    cached = next((p.parent for p in (root, *root.parents) if p.name == "snapshots" and "--" in p.parent.name), None)
    return any(place in real.parents for place in (root, *([cached / "blobs"] if cached is not None else [])))


def check_own(path: Path, folder: Path) -> None:
    """Raise CheckpointError if a file that would be copied or published links to one outside of its folder."""
    if not is_own(path, folder):
        raise CheckpointError(
            f"{path} links to {path.resolve()}, outside of {folder}: put the file itself there if it is to be copied"
        )


def is_written_by_us(place: Path) -> bool:
    """Whether a file at this place in a repo is one that this package writes."""
    if len(place.parts) > 1 and place.parts[0] not in (TASKS_FOLDER, ADAPTERS_FOLDER):
        return False
    names = (*SIDE_FILES, GENERATION_CONFIG, CONFIG_NAME, REPORT_NAME, CARD_NAME, SHIM_NAME, ADAPTER_CONFIG_NAME)
    return place.name in (*names, ADAPTER_SAFE_WEIGHTS_NAME) or is_weights_file(Path(place.name))


def is_weights_file(place: Path) -> bool:
    """Whether a file at this place in a repo holds its weights, or says which one does."""
    return bool(re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", str(place)))


def side_files_of(repo: str | Path) -> Path:
    """Folder with the tokenizers of a merged repo, fetched if it is on the Hub."""
    if Path(repo).is_dir():
        return Path(repo)
    patterns = [*SIDE_FILES, *(f"{TASKS_FOLDER}/*/{name}" for name in SIDE_FILES)]
    return Path(snapshot_download(str(repo), allow_patterns=patterns))


def same_side_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tokenizer and processor."""
    return all(_content(one / name) == _content(other / name) for name in SIDE_FILES)


def _content(path: Path) -> bytes | dict[str, Any] | None:
    """A file's bytes, or settings but for the path that they were loaded from, which is not what they do."""
    if not path.is_file():
        return None
    if path.name not in NAMING_FILES:
        return path.read_bytes()
    return {name: value for name, value in read_json(path, path.parent.name).items() if name != "name_or_path"}
