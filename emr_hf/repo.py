"""A merged repo on disk (docs/format.md): names, shards, atomic writing. The only file that knows file names."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import struct
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

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

from .errors import CheckpointError, OptionError, RepoError, TensorError, one_line
from .mapped_files import WatchedMemory
from .storage import Storage, TensorInfo, open_adapter, open_folder, reserve

FORMAT_VERSION = 3
MODEL_TYPE = "emr_merged"
PEFT_TYPE = "EMR"
LAYOUTS = ("model", "peft")
"""A model with its base, or an adapter for a base kept elsewhere."""
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
    """Where its part of the unified vector stands."""
    return f"emr.tau.{flat_name(name)}"


def scale_name(name: str) -> str:
    """Where the scales of its rows stand, if the vector is in codes."""
    return f"emr.scale.{flat_name(name)}"


def mask_name(key: str, name: str) -> str:
    """Where a task's mask of it stands."""
    return f"emr.mask.{key}.{flat_name(name)}"


def private_name(key: str, name: str) -> str:
    """Where a task's own tensor stands."""
    return f"emr.private.{key}.{flat_name(name)}"


def rescaler_name(key: str) -> str:
    """Where a task's lambda stands."""
    return f"emr.rescaler.{key}"


# The bank's place in a model that PEFT has put it into, and that in PEFT's file, which leaves out the adapter's name.
PEFT_MODULE, PEFT_BANKS = "emr", "emr_bank"
_PEFT_PREFIX = f"base_model.model.{PEFT_MODULE}.{PEFT_BANKS}."


def stored_name(name: str, layout: str) -> str:
    """Name in the file of what is called `name` in a repo with a base."""
    return name if layout == "model" else _PEFT_PREFIX + name.removeprefix("emr.")


PARTS = ("base", "tau", "scale", "mask", "private", "rescaler")


def part_of(name: str) -> str:
    """Which of `PARTS` a tensor of a repo belongs to."""
    return "base" if name.startswith("model.") else name.split(".")[1]


def layout_of(folder: Path) -> str | None:
    """Which of `LAYOUTS` a folder's merge has; `None` if it holds none."""
    for layout, file, key, kind in (
        ("model", CONFIG_NAME, "model_type", MODEL_TYPE),
        ("peft", ADAPTER_CONFIG_NAME, "peft_type", PEFT_TYPE),
    ):
        with suppress(OSError, ValueError, AttributeError):
            if json.loads((folder / file).read_text()).get(key) == kind:
                return layout
    return None


class _PeftStorage:
    """A merge in PEFT's file, under the names of a repo with a base."""

    def __init__(self, storage: Storage):
        self._storage = storage
        names = (name for name in storage.infos if name.startswith(_PEFT_PREFIX))
        self._stored = {f"emr.{name.removeprefix(_PEFT_PREFIX)}": name for name in names}
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
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B|(\d+)", str(size).upper())
    if match and not isinstance(size, bool):
        number, unit, plain = match.groups()
        if (found := int(plain or float(number) * 1000 ** " KMGT".index(unit or " "))) > 0:
            return found
    raise OptionError(f"max_shard_size={size!r}: expected bytes, more than 0, or a size such as '5GB'")


def check_target(out: Path, overwrite: bool, mark: str | None = None) -> None:
    """Raise RepoError unless `out` may be written. Only an empty folder or a merged repo is ever replaced.

    Args:
        mark (*optional*): name of a file by which a folder of another kind is known, which is replaced then.
    """
    for parent in out.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise RepoError(f"cannot write {out}: {parent} is a file, expected a folder")
            break
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    if not (out / mark).is_file() if mark else layout_of(out) is None:
        what = f"has no {mark}" if mark else "is no merged repo"
        raise RepoError(f"{out} exists and {what}: it will not be touched; choose another folder")
    if not overwrite:
        raise RepoError(f"{out} exists: choose another folder or give overwrite=True (--overwrite)")
    if (out / ".git").exists():
        raise RepoError(f"{out} is a git checkout, whose history replacing it would lose: choose another folder")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise RepoError where the disk does not take what is written."""
    try:
        yield
    except OSError as error:
        raise RepoError(f"cannot write {out}: {one_line(error)}") from error


@contextmanager
def atomic_folder(out: Path, overwrite: bool = False, mark: str | None = None) -> Iterator[Path]:
    """A folder to fill that becomes `out` only when the block ends well.

    Whatever happens, `out` is either as it was or complete. A killed process leaves at most a hidden folder beside it.

    Raises:
        RepoError: `out` may not be replaced, or the disk does not take it.
    """
    check_target(out, overwrite, mark)
    out = _place_of(out)
    new_parents = [parent for parent in out.parents if not parent.exists()]
    staging = out.parent / f"{_unfinished_name(out, os.getpid())}{uuid.uuid4().hex[:8]}"
    with writing(out):
        try:
            staging.mkdir(parents=True)
            yield staging
            _become(out, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if not out.exists():
                for parent in new_parents:
                    with suppress(OSError):
                        parent.rmdir()


def _place_of(out: Path) -> Path:
    return out.resolve() if out.is_symlink() else out.absolute()


def _unfinished_name(out: Path, process: int) -> str:
    """What the name of a process' unfinished `out` begins with."""
    return f".{out.name}.partial-{process}-"


def remove_unfinished(out: Path, process: int) -> None:
    """Remove what a killed process had of `out`."""
    out = _place_of(out)
    if out.parent.is_dir():
        for path in out.parent.iterdir():
            if path.name.startswith(_unfinished_name(out, process)):
                shutil.rmtree(path, ignore_errors=True)


def _become(out: Path, staging: Path) -> None:
    """Put `staging` in the place of `out`; what was there ends up in `staging`, or deleted."""
    if not out.exists():
        staging.rename(out)
        return
    if _exchange(staging, out):
        return
    old = out.parent / f".{out.name}.replaced-{uuid.uuid4().hex[:8]}"
    out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that neither name is ever vacant; whether the system could."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or an old C library
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0


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
    """Copy tokenizer and processor files; returns their names."""
    names = [name for name in SIDE_FILES if (folder / name).is_file()]
    for name in names:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, out / name)
    return names


def is_written_by_us(place: Path) -> bool:
    """Whether a file at this place in a repo is one that this package writes."""
    if len(place.parts) > 1 and place.parts[0] not in (TASKS_FOLDER, ADAPTERS_FOLDER):
        return False
    names = (*SIDE_FILES, GENERATION_CONFIG, CONFIG_NAME, REPORT_NAME, CARD_NAME, SHIM_NAME, ADAPTER_CONFIG_NAME)
    weights = (ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    return place.name in (*names, *weights) or bool(re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", place.name))


def check_outside(repo: Path, out: Path) -> None:
    """Raise RepoError where a changed repo would be written into the one it is made of."""
    if repo.resolve() in out.resolve().parents:
        raise RepoError(f"{out} is inside {repo}: choose a folder outside, or the repo itself with overwrite=True")


def fetch_repo(repo: str | Path) -> Path:
    """The folder of a merged repo, downloaded if it is on the Hub.

    Raises:
        RepoError: it is neither.
    """
    # Not above: by way of transformers it imports our configuration, which imports this file.
    from .sources import HUB_ERRORS

    folder = Path(repo)
    if not folder.exists():
        try:
            folder = Path(snapshot_download(str(repo)))
        except HUB_ERRORS as error:
            raise RepoError(f"{repo} is no merged repo, neither here nor on the Hub: {one_line(error)}") from None
    open_repo(folder)
    return folder


def side_files_of(repo: str | Path) -> Path:
    """Folder with the tokenizers of a merged repo, fetched if it is on the Hub."""
    if Path(repo).is_dir():
        return Path(repo)
    patterns = [*SIDE_FILES, *(f"{TASKS_FOLDER}/*/{name}" for name in SIDE_FILES)]
    return Path(snapshot_download(str(repo), allow_patterns=patterns))


def same_side_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tokenizer and processor."""
    return all(_content(one / name) == _content(other / name) for name in SIDE_FILES)


def _content(path: Path) -> object:
    if not path.is_file():
        return None
    content = path.read_bytes()
    if path.name == "tokenizer_config.json":
        settings = json.loads(content)
        settings.pop("name_or_path", None)  # where the tokenizer once was, not what it does
        return settings
    return content
