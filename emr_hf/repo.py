"""A merged repo on disk (docs/format.md): names, shards, atomic writing. The only file that knows file names."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .errors import RepoError
from .sources import TensorInfo

FORMAT_VERSION = 1
MODEL_TYPE = "emr_merged"
CONFIG_NAME = "config.json"
REPORT_NAME = "emr_report.json"
CARD_NAME = "README.md"
SHIM_NAME = "modeling_emr_hf.py"
TASKS_FOLDER = "tasks"

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
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
GENERATION_CONFIG = "generation_config.json"

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


def flat_name(name: str) -> str:
    """A parameter's name as one buffer's: dots would make it a module's path."""
    return name.replace(".", "__")


def model_name(name: str) -> str:
    """Where the base's tensor stands in a repo."""
    return f"model.{name}"


def tau_name(name: str) -> str:
    return f"emr.tau.{flat_name(name)}"


def mask_name(key: str, name: str) -> str:
    return f"emr.mask.{key}.{flat_name(name)}"


def private_name(key: str, name: str) -> str:
    return f"emr.private.{key}.{flat_name(name)}"


def rescaler_name(key: str) -> str:
    return f"emr.rescaler.{key}"


PARTS = ("base", "tau", "mask", "private", "rescaler")


def part_of(name: str) -> str:
    """Which of `PARTS` a tensor of a repo belongs to."""
    return "base" if name.startswith("model.") else name.split(".")[1]


def is_merged_repo(folder: Path) -> bool:
    """Whether a folder holds a merged repo."""
    try:
        return json.loads((folder / CONFIG_NAME).read_text()).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


def check_target(out: Path, overwrite: bool) -> None:
    """Raise RepoError unless `out` may become a repo. Only an empty folder or a merged repo is ever replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    if not is_merged_repo(out):
        raise RepoError(f"{out} exists and is no merged repo: it will not be touched; choose another folder")
    if not overwrite:
        raise RepoError(f"{out} exists: choose another folder or give overwrite=True (--overwrite)")


@contextmanager
def atomic_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `out` only when the block ends well.

    Whatever happens, `out` is either as it was or complete: a killed process leaves at most a hidden folder beside it.
    """
    out = out.absolute()
    check_target(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".{out.name}.partial-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        yield staging
        _replace(out, staging)
    except OSError as error:
        raise RepoError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(out: Path, staging: Path) -> None:
    target = out.resolve() if out.is_symlink() else out
    if not target.exists():
        staging.rename(target)
        return
    old = target.parent / f".{target.name}.replaced-{uuid.uuid4().hex[:8]}"
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


class WeightsWriter:
    """Safetensors files whose tensors are filled in place, in any order and piece by piece.

    All names, shapes and dtypes are known from the start, so the headers are written and the space reserved first; a
    tensor is then a view of its file. `safetensors` itself needs every tensor of a file in memory at once.

    Args:
        folder: where to.
        tensors: name -> shape and dtype.
        max_shard_size: bytes of a file, or a size such as `"5GB"`.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], max_shard_size: str | int):
        self._maps: dict[str, tuple[mmap.mmap, int]] = {}
        self._tensors = tensors
        shards = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda info: info.nbytes,
            filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=max_shard_size,
        )
        for file_name, names in shards.filename_to_tensors.items():
            self._create(folder / file_name, names)
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _create(self, path: Path, names: list[str]) -> None:
        # Widest dtype first keeps every tensor aligned, as safetensors' own writer does.
        names = sorted(names, key=lambda name: (-self._tensors[name].dtype.itemsize, name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name in names:
            info = self._tensors[name]
            starts[name], end = end, end + info.nbytes
            dtype = _SAFETENSORS_DTYPES[info.dtype]
            header[name] = {"dtype": dtype, "shape": list(info.shape), "data_offsets": [starts[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb+") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            data_start = file.tell()
            if end:
                _reserve(file.fileno(), data_start + end)
                mapped = mmap.mmap(file.fileno(), data_start + end)
                self._maps.update({name: (mapped, data_start + start) for name, start in starts.items()})

    def view(self, name: str) -> Tensor:
        """The tensor's place in its file; what is assigned to its elements is written."""
        info = self._tensors[name]
        if info.numel == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        mapped, offset = self._maps[name]
        return torch.frombuffer(mapped, dtype=info.dtype, count=info.numel, offset=offset).view(info.shape)

    def close(self) -> None:
        """Write everything to the disk."""
        for mapped in {id(m): m for m, _ in self._maps.values()}.values():
            mapped.flush()
        self._maps.clear()


def _reserve(descriptor: int, size: int) -> None:
    # Without reserved blocks a full disk would kill the process at some later write into the map.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def write_shim(folder: Path, names: list[str]) -> None:
    """The file that `auto_map` points to."""
    (folder / SHIM_NAME).write_text(_SHIM.format(names=", ".join(names)))


def copy_side_files(folder: Path, out: Path) -> list[str]:
    """Copy tokenizer and processor files; returns their names."""
    names = [name for name in SIDE_FILES if (folder / name).is_file()]
    for name in names:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
    return names


def same_side_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tokenizer and processor."""
    return all(_content(one / name) == _content(other / name) for name in SIDE_FILES)


def _content(path: Path) -> object:
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.name != "tokenizer_config.json":
        return content
    settings = json.loads(content)
    settings.pop("name_or_path", None)  # where the tokenizer once was, not what it does
    return settings
