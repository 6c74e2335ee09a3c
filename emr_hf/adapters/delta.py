"""An adapter as a full finetune: every weight it touches, as PEFT's own merge into a float32 base makes it.

The space of the weights is the only one where merging LoRAs is well defined: their factors are not unique, since
`(B R, R^-1 A)` is the same adapter for any invertible R.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME

from ..checkpoint import NamedTensors, spill, tied_names
from ..election import torch_threads
from ..errors import CheckpointError, MismatchError, OptionError, nearest, one_line, short
from ..sources import Source
from ..storage import TensorInfo
from .binding import PREFIX
from .layers import (
    adapted_layers,
    inject,
    merged,
    names_in_layers,
    place_of,
    plain_name,
    stored_names,
    touched_parameters,
)


class AdapterCheckpoint(NamedTensors):
    """The weights of a base with one adapter merged into it, one module at a time.

    Attributes:
        layers: path -> PEFT's layer in the skeleton, on the meta device.
        values: name in the skeleton with these layers -> stored name.
    """

    def __init__(self, source: Source, skeleton: PreTrainedModel, base: NamedTensors):
        assert source.adapter is not None
        super().__init__(source)
        self._base = base
        # PEFT's own merge runs on these, and a convolution's last bit depends on them.
        self._threads = torch.get_num_threads()
        model, config = injected_copy(source, skeleton)
        self.layers: dict[str, Any] = dict(adapted_layers(model))
        self._whole: dict[str, str]  # name in memory -> stored name
        self.values: dict[str, str] = {}  # name in the injected model -> stored name
        self._tied = tied_names(skeleton)
        self._sort_tensors(skeleton, model, config)
        self._layer_of = self._find_layers()
        self._touched = {*self._layer_of, *self._whole}
        modules = getattr(config, "modules_to_save", None) or ()
        self._own = {name for name in self._whole if any(f".{module}." in f".{name}" for module in modules)}
        self._drop_aliases(bool(getattr(config, "ensure_weight_tying", False)))
        self.infos = {**base.infos, **{name: source.storage.infos[stored] for name, stored in self._whole.items()}}
        for name in self._layer_of:
            if name not in self.infos:
                raise MismatchError(f"{source.label}: {name} is missing from the base, {source.name} changes it")
            self.infos[name] = TensorInfo(self.infos[name].shape, torch.float32)
        self._spilled: dict[str, Tensor] = {}

    def _sort_tensors(self, skeleton: PreTrainedModel, model: PreTrainedModel, config: Any) -> None:
        """Find the place of every stored tensor, and that none is missing or of a wrong shape."""
        label, infos = self.source.label, self.source.storage.infos
        places = skeleton.state_dict()
        expected = {f"{PREFIX}{name}": tensor for name, tensor in stored_names(model, config).items()}
        own_places = {stored: place_of(stored.removeprefix(PREFIX), places) for stored in infos}
        # With biases PEFT saves those of the original of a module that the adapter has replaced, too.
        replaced = {stored for stored in infos if ".original_module." in stored}
        self._whole = {name: s for s, name in own_places.items() if name is not None and s not in replaced}
        for name in expected:
            if name not in infos and place_of(name.removeprefix(PREFIX), places) not in self._whole:
                raise CheckpointError(f"{label}: {name} is missing from {self.source.name}{nearest(name, infos)}")
        in_layers = names_in_layers(model, config, [name.removeprefix(PREFIX) for name in infos])
        for stored, info in infos.items():
            if own_places[stored] is not None:
                continue
            if stored not in expected:
                raise CheckpointError(
                    f"{label}: {self.source.name} holds {stored}, for which {type(skeleton).__name__} with its "
                    f"adapter_config.json has no place"
                )
            elif not info.dtype.is_floating_point:
                raise CheckpointError(f"{label}: {stored} is {info.dtype}: expected floating-point numbers")
            elif info.shape != tuple(expected[stored].shape):
                raise MismatchError(
                    f"{label}: {stored} is {list(info.shape)}, expected {list(expected[stored].shape)}: the adapter "
                    "does not fit the base"
                )
            else:
                self.values[in_layers[stored.removeprefix(PREFIX)]] = stored

    def _find_layers(self) -> dict[str, str]:
        """Name in memory of each tensor that merging changes -> path of the layer that does."""
        layers: dict[str, str] = {}
        for path, layer in self.layers.items():
            for local in touched_parameters(layer):
                name = self._kept_name(f"{path}.{local}")
                if name in layers and not hasattr(layer, "base_layer"):
                    continue  # trained tokens: PEFT ties these itself
                if name in layers:
                    raise CheckpointError(
                        f"{self.source.label}: {self.source.name} changes {layers[name]} and {path}, which are tied: "
                        "untie them in the base"
                    )
                layers[name] = path
        return layers

    def _drop_aliases(self, tied_by_peft: bool) -> None:
        """Whole tensors that are tied: one place of two cannot have its own, unless PEFT has kept them equal."""
        for name in sorted(self._own):
            if not tied_by_peft and (name in self._tied or name in self._tied.values()):
                raise MismatchError(
                    f"{self.source.label}: {self.source.name} has {name} for itself (modules_to_save), which is tied: "
                    "train it with ensure_weight_tying=True, or untie the base"
                )
        self._whole = {name: stored for name, stored in self._whole.items() if name not in self._tied}
        self._own = {self._kept_name(name) for name in self._own}

    def _kept_name(self, name: str) -> str:
        """The one of a tied tensor's names under which it is kept."""
        return self._tied.get(name, name)

    def tied_targets(self) -> list[str]:
        """Warnings of tied tensors: merged, as PEFT does too, an adapter changes both places."""
        aliases = {name: alias for alias, name in self._tied.items()}
        return [
            f"{self.source.label}: changes {name}, which is tied to {aliases[name]}: merged it changes both, as with "
            "PEFT's merge_and_unload; the adapter by itself changes one"
            for name in self._layer_of
            if name in aliases
        ]

    @property
    def kind(self) -> str:
        """PEFT's name for the kind of adapter."""
        assert self.source.adapter is not None
        return self.source.adapter.peft_type

    @property
    def touched(self) -> Collection[str]:
        return self._touched

    @property
    def own(self) -> Collection[str]:
        """Names of the tensors that the adapter holds whole, as `modules_to_save` says."""
        return self._own

    @property
    def largest_conversion(self) -> int:
        return 2 * max((self.infos[name].nbytes for name in self._layer_of), default=0)  # the weight and its change

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.source.storage.infos.values())

    def read(self, name: str) -> Tensor:
        """The tensor: the base's, the adapter's own, or what merging its module gives, float32."""
        if name not in self._layer_of:
            stored = self._whole.get(name)
            return self._base.read(name) if stored is None else self.source.storage.read(stored)
        if name not in self._spilled:
            self._spilled |= self._merge(self._layer_of[name])
            _give_back_memory()
        return self._spilled.pop(name)

    def _merge(self, path: str) -> dict[str, Tensor]:
        """Merge one module. Its weights are in unnamed files all along: memory would grow with the adapters."""
        layer = deepcopy(self.layers[path])
        values = {name: self._value(path, name) for name in layer.state_dict()}
        layer.load_state_dict(values, assign=True)
        try:
            with torch_threads(self._threads):
                module: nn.Module = merged(layer)
        except Exception as error:  # whatever PEFT raises, the adapter cannot be merged
            raise CheckpointError(f"{self.source.label}: PEFT cannot merge {path}: {one_line(error)}") from error
        found = {self._kept_name(f"{path}.{name}"): value.detach() for name, value in module.named_parameters()}
        in_files = {value.data_ptr() for value in values.values()}
        return {
            name: value if value.data_ptr() in in_files else spill(value, self.scratch)
            for name, value in found.items()
            if self._layer_of.get(name) == path
        }

    def _value(self, path: str, name: str) -> Tensor:
        """A tensor of a layer, float32: PEFT merges in place, so what is mapped from an input is copied."""
        stored = self.values.get(f"{path}.{name}")
        if stored is not None:
            return self.source.storage.read(stored).to(torch.float32, copy=True)
        plain = self._kept_name(plain_name(f"{path}.{name}"))
        whole = self._whole.get(plain)
        value = self._base.read(plain) if whole is None else self.source.storage.read(whole)
        return spill(value, self.scratch, torch.float32)


def _give_back_memory() -> None:
    """Return freed pages to the system. glibc keeps them between small objects that live on, some for each adapter."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def injected_copy(source: Source, skeleton: PreTrainedModel) -> tuple[PreTrainedModel, Any]:
    """A copy of the skeleton with the adapter's layers, on the meta device, and PEFT's configuration.

    Raises:
        CheckpointError: the adapter's settings cannot be used, or do not fit the model.
    """
    assert source.adapter is not None
    model = deepcopy(skeleton)
    try:
        return model, inject(model, source.adapter.settings)
    except OptionError as error:
        raise CheckpointError(f"{source.label}: {source.name}: {ADAPTER_CONFIG_NAME}: {error}") from None
    except Exception as error:  # settings may make PEFT raise anything
        targets = source.adapter.settings.get("target_modules")
        raise CheckpointError(
            f"{source.label}: {source.name}, with target_modules {short(targets)}, does not fit "
            f"{type(model).__name__}: {one_line(error)}"
        ) from error
