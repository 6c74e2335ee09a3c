"""(IA)³ adapters in their own space: vectors that scale activations, with a base value of one.

Electing the vectors is electing the weights: a vector l makes W of W0 * l, so the task vector of the weights is
W0 * (l - 1), and signs and largest magnitudes are those of l - 1. Only the rescaler is another one, and a vector is
hundreds of times smaller than its weight.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint import NamedTensors
from ..storage import TensorInfo
from .delta import AdapterCheckpoint
from .layers import ADAPTER, adapted_layers, inject, plain_name
from .settings import own_settings

VECTOR = ".ia3_l."


def common_settings(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Settings of one (IA)³ adapter with the vectors of all.

    Args:
        layers: of each adapter, path -> PEFT's layer.

    Returns:
        the settings, or `None` if a module is scaled in different ways.
    """
    feedforward: dict[str, bool] = {}
    for of_adapter in layers:
        for path, layer in of_adapter.items():
            if feedforward.setdefault(path, bool(layer.is_feedforward)) != layer.is_feedforward:
                return None
    return {
        "peft_type": "IA3",
        "target_modules": _any_of(feedforward),
        "feedforward_modules": _any_of(path for path, inputs in feedforward.items() if inputs),
    }


def _any_of(paths: Any) -> str:
    """A regular expression for exactly these paths: PEFT takes names in a list for endings."""
    return "|".join(re.escape(path) for path in sorted(paths)) or "(?!)"


def inject_vectors(model: nn.Module, settings: dict[str, Any]) -> None:
    """Put (IA)³ layers into a model, their vectors ones, frozen."""
    inject(model, settings)
    for _, layer in adapted_layers(model):
        layer.ia3_l[ADAPTER] = nn.Parameter(_ones(layer, ADAPTER), requires_grad=False)


def inject_vector_buffers(model: nn.Module, settings: dict[str, Any], adapter: str) -> None:
    """[`inject_vectors`] for a merge that is itself the adapter: its vectors are no values of its own to be loaded."""
    from peft.tuners._buffer_dict import BufferDict

    inject(model, settings, adapter)
    for _, layer in adapted_layers(model):
        layer.ia3_l = BufferDict({adapter: _ones(layer, adapter)}, persistent=False)


def _ones(layer: Any, adapter: str) -> Tensor:
    """On the layer's device, and float32 also in a narrower model, as PEFT has its vectors."""
    return torch.ones(layer.ia3_l[adapter].shape, dtype=torch.float32, device=layer.base_layer.weight.device)


def vector_skeleton(skeleton: PreTrainedModel, settings: dict[str, Any]) -> PreTrainedModel:
    """A copy of a skeleton with the vectors of [`common_settings`]."""
    model = deepcopy(skeleton)
    inject_vectors(model, settings)
    return model


def vector_names(model: nn.Module) -> list[str]:
    """Names of the vectors in a model of [`inject_vectors`]."""
    return [name for name, _ in model.named_parameters() if VECTOR in name]


class VectorCheckpoint(NamedTensors):
    """A base or an (IA)³ adapter of it, under the names of a skeleton with vectors.

    Args:
        checkpoint: the same in the space of the weights.
        skeleton: see [`vector_skeleton`].
    """

    def __init__(self, checkpoint: NamedTensors, skeleton: PreTrainedModel):
        super().__init__(checkpoint.source)
        self.unexpected = checkpoint.unexpected
        self._checkpoint = checkpoint
        self._vectors = {name: tuple(skeleton.get_parameter(name).shape) for name in vector_names(skeleton)}
        self._stored = checkpoint.values if isinstance(checkpoint, AdapterCheckpoint) else {}
        names = {name: plain_name(name) for name in skeleton.state_dict() if name not in self._vectors}
        self._plain = {name: plain for name, plain in names.items() if plain in checkpoint.infos}
        self.infos = {name: checkpoint.infos[plain] for name, plain in self._plain.items()}
        self.infos |= {name: TensorInfo(shape, torch.float32) for name, shape in self._vectors.items()}

    def extras(self) -> dict[str, Any]:
        """What it takes to write the task as an (IA)³ adapter again."""
        if self.source.adapter is None:
            return {}
        return {"adapter": own_settings(self.source.adapter.settings), "vectors": sorted(self._stored)}

    @property
    def touched(self) -> Collection[str]:
        return {*self._stored, *self.own}

    @property
    def own(self) -> Collection[str]:
        return {name for name, plain in self._plain.items() if plain in self._checkpoint.own}

    @property
    def nbytes(self) -> int:
        return self._checkpoint.nbytes

    def check_tied(self) -> None:
        self._checkpoint.check_tied()

    def read(self, name: str) -> Tensor:
        """A vector, of ones where the adapter has none; another tensor as it is."""
        if name in self._stored:
            return self.source.storage.read(self._stored[name]).to(torch.float32)
        if name in self._vectors:
            return torch.ones(self._vectors[name])
        return self._checkpoint.read(self._plain[name])
