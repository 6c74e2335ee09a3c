"""PEFT's own layers: put into a model, filled, merged and taken out again. The only file that knows PEFT's insides."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from .settings import usable_settings

ADAPTER = "unified"
"""Name under which an adapter's layers are in a model; a stored adapter's names do not hold it."""


def require_peft() -> None:
    """Raise OptionError where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise OptionError("adapters need PEFT: pip install 'emr_hf[adapters]'") from None


def inject(model: nn.Module, settings: dict[str, Any], adapter: str = ADAPTER) -> Any:
    """Put an adapter's layers into a model, in place, with values still to come.

    Args:
        model: on any device; on the meta device nothing is allocated.
        settings: content of an `adapter_config.json`.
        adapter: name of the adapter in the model.

    Returns:
        PEFT's configuration object.

    Raises:
        OptionError: a setting that is of a wrong type, or that PEFT could not work with in a bounded time.
        ValueError: what PEFT has to say of settings that do not fit the model.
    """
    require_peft()
    from peft import IA3Config, LoraConfig, inject_adapter_in_model

    used: dict[str, Any] = {**usable_settings(settings, model), "inference_mode": True}
    if settings["peft_type"] == "LORA":
        used["init_lora_weights"] = False  # values come from the file
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")  # about training and merging
        if on_meta:  # PEFT itself would allocate each layer before it gives it up again, whatever rank the file says
            stack.enter_context(torch.device("meta"))
        config = (LoraConfig if settings["peft_type"] == "LORA" else IA3Config)(**used)
        inject_adapter_in_model(config, model, adapter, low_cpu_mem_usage=on_meta)
    return config


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and layer of every module that PEFT has replaced, outermost ones only; whole saved modules are left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = (*inside, f"{path}.")
            if not isinstance(module, ModulesToSaveWrapper):
                yield path, module


def touched_parameters(layer: nn.Module) -> list[str]:
    """Names, as in the module without PEFT, of the parameters that merging a layer changes."""
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    inner: Any = layer
    if isinstance(layer, ParamWrapper):  # one for each parameter, one inside the other
        names = []
        while isinstance(inner, ParamWrapper):
            names.append(inner.parameter_name)
            inner = inner.base_layer
        return names
    if isinstance(layer, MultiheadAttention):
        return ["in_proj_weight", "out_proj.weight"]
    has_bias = getattr(getattr(layer, "base_layer", None), "bias", None) is not None
    scales_bias = isinstance(layer, IA3Layer) and not layer.is_feedforward
    moves_bias = bool(getattr(layer, "lora_bias", {}).get(ADAPTER))
    return ["weight", "bias"] if has_bias and (scales_bias or moves_bias) else ["weight"]


def plain_name(name: str) -> str:
    """A parameter's name without what PEFT inserts into it."""
    infixes = ("base_layer", "original_module", "token_adapter")
    return ".".join(part for part in name.split(".") if part not in infixes)


def place_of(stored: str, places: Collection[str]) -> str | None:
    """The model's own tensor that a stored one is, `None` for one of PEFT's layers."""
    name = plain_name(stored)
    # With biases PEFT saves the copy of a whole module under its inner name, the adapter's name in it or not.
    candidates = (name, re.sub(r"\.modules_to_save\.", ".", name), re.sub(r"\.modules_to_save\.[^.]+\.", ".", name))
    return next((candidate for candidate in candidates if candidate in places), None)


def stored_names(model: Any, config: Any) -> dict[str, Any]:
    """Every tensor that PEFT saves of an injected model -> its value, without `base_model.model.`."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.peft_config = {ADAPTER: config}
        return get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)


def names_in_layers(model: Any, config: Any, stored: list[str]) -> dict[str, str]:
    """Stored name -> name in the injected model, for the tensors that belong to PEFT's layers."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils.other import AuxiliaryTrainingWrapper

    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    remapped: dict[str, Any] = tuner._remap_adapter_state_dict_for_load(
        model=model,
        config=config,
        adapter_name=ADAPTER,
        state_dict=dict(zip(stored, stored)),  # type: ignore[arg-type]
    )
    names = {origin: name for name, origin in remapped.items()}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for ours, theirs in module.adapter_state_dict_load_map(ADAPTER).items():
                if f"{path}.{ours}" in names:
                    names[f"{path}.{ours}"] = f"{path}.{theirs}"
    return names


def merged(layer: Any) -> nn.Module:
    """Merge a layer, as PEFT's `merge_and_unload` does, and give the plain module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(layer, "unload_and_optionally_merge_module"):
            return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        layer.merge()
        return layer.get_base_layer()


def unload(model: nn.Module, merge: bool = True) -> None:
    """Take PEFT's layers out of a model, merged or not."""
    for path, layer in list(adapted_layers(model)):
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, merged(layer) if merge else layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
