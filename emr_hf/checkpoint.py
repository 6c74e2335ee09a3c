"""A source's tensors under the names they have in a model in memory.

Where transformers renames, splits or fuses a checkpoint's tensors on loading (as for experts), so does this file, one
group of tensors at a time and by transformers' own rules.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.generic import ContextManagers

from .bits import StoredVector
from .errors import CheckpointError, MismatchError, one_line, short
from .sources import Source
from .storage import TensorInfo, reserve

# Heads of models whose class does not keep them apart from a named body.
_HEAD = re.compile(r"^(classifier|score|qa_outputs|classification_head|projector|head|logits_proj|fc)\.")

SPARE_PARTS = 10_000  # of a model of which only a part is stored


def build_skeleton(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The source's model without weights, on the meta device, as `from_pretrained` would build it.

    Raises:
        MismatchError: transformers has no such class, cannot build it from the configuration, or would build something
            far larger than what is stored.
    """
    try:
        model_class = model_class_of(str(source.architecture))
        config = deepcopy(source.config)
        stored = (source.base or source).storage.infos
        with (
            parts_limited(len(stored)),
            ContextManagers(model_class.get_init_context(dtype, False, False, False)),
        ):
            return model_class(config)
    except Exception as error:  # a model's constructor may raise anything
        raise MismatchError(
            f"{source.label}: cannot build {one_line(source.architecture)} from its configuration: {one_line(error)}"
        ) from error


@contextmanager
def parts_limited(stored: int) -> Iterator[None]:
    """Raise MismatchError where this thread makes a model of far more modules and parameters than tensors are stored.

    A configuration of a few bytes may ask for as many layers as it likes.
    """
    most = SPARE_PARTS + 16 * stored
    thread, count = threading.get_ident(), 0

    def counted(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise MismatchError(f"it has more than {most:,} parts, many more than are stored")

    with ExitStack() as stack:
        for register in (register_module_module_registration_hook, register_module_parameter_registration_hook):
            handle = register(counted)
            stack.callback(handle.remove)
        yield


def model_class_of(architecture: str) -> type[PreTrainedModel]:
    """A model class of transformers by its name."""
    try:
        model_class = getattr(transformers, architecture, None)
    except Exception as error:  # importing it may fail, for want of another library
        raise MismatchError(f"architecture {short(architecture)} cannot be imported: {one_line(error)}") from None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise MismatchError(
            f"architecture {short(architecture)} is not a model class of transformers {transformers.__version__}"
        )
    return model_class


@dataclass
class _Group:
    """Stored tensors that make one or more tensors in memory; `converter` is `None` for a plain renaming."""

    first_target: str
    converter: WeightConverter | None
    members: list[tuple[str, str]] = field(default_factory=list)  # (source pattern, stored name)


class NamedTensors:
    """One input of a merge, a base or a finetune, as tensors under the names that they have in memory.

    Attributes:
        source: where they are from.
        infos: name in memory -> shape and dtype. Tied tensors appear once, under the name transformers ties to.
        scratch: folder for temporary files, the system's by default.
        unexpected: stored names that the model has no place for.
    """

    def __init__(self, source: Source):
        self.source = source
        self.infos: dict[str, TensorInfo] = {}
        self.scratch: Path | None = None
        self.unexpected: list[str] = []

    @property
    def touched(self) -> Collection[str]:
        """Names of the tensors that may differ from the base's."""
        return self.infos.keys()

    @property
    def own(self) -> Collection[str]:
        """Names of the tensors that it wants for itself."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes of what it takes on disk."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def largest_conversion(self) -> int:
        """Bytes of the largest tensor that has to be made of others in memory; 0 where all are read as they are."""
        return 0

    def check_tied(self) -> None:
        """Raise if tensors that the configuration ties are stored with different values; here they are stored once."""

    def deviation(self, name: str) -> Tensor | StoredVector:
        """What is elected: the tensor, or what is known of its difference from the base's."""
        return self.read(name)

    def extras(self) -> dict[str, Any]:
        """What the repo's configuration records of the task beside the usual."""
        return {}

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from a file where there is one."""
        raise NotImplementedError


class Checkpoint(NamedTensors):
    """The tensors of a whole checkpoint, under the names they have in `skeleton`."""

    def __init__(self, source: Source, skeleton: PreTrainedModel):
        super().__init__(source)
        self._skeleton = skeleton
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
                f"{self.source.label}: cannot make {group.first_target} of {names}, ...: {one_line(error)}"
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

    @property
    def largest_conversion(self) -> int:
        """Bytes of the largest tensor that has to be made of others in memory; 0 where all are read as they are."""
        converted = (name for name, group in self._groups.items() if group.converter and name in self.infos)
        return max((self.infos[name].nbytes for name in converted), default=0)

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
            self._spilled = {n: spill(tensor, self.scratch) for n, tensor in self._convert(group, members).items()}
        return self._spilled[name]


def tied_names(skeleton: PreTrainedModel) -> dict[str, str]:
    """Alias -> name that it is tied to."""
    return dict(skeleton.all_tied_weights_keys)


def is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter belongs to the task's head.

    A head is what a class adds to its body (`base_model_prefix`), unless it maps to the vocabulary: that one is the
    same for all tasks and is merged.
    """
    if model.get_output_embeddings() is not None:
        return False
    body = model.base_model_prefix
    if body and hasattr(model, body):
        return not name.startswith(f"{body}.")
    return _HEAD.match(name) is not None


def spill(tensor: Tensor, folder: Path | None, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of the tensor, of another dtype if one is given, that lives in an unnamed temporary file."""
    dtype = dtype or tensor.dtype
    if tensor.numel() == 0:
        return tensor.to(dtype)
    with tempfile.NamedTemporaryFile(prefix="emr-hf-", dir=folder) as file:
        reserve(file.fileno(), tensor.numel() * dtype.itemsize)
        copy = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=dtype)
        copy.copy_(tensor.reshape(-1))
    return copy.reshape(tensor.shape)
