"""One wrapper class for every Auto class of transformers: pipelines compare class names with the Auto mapping."""

from __future__ import annotations

import re

import transformers
from transformers import AutoConfig, AutoModel, GenerationMixin
from transformers.models.auto import modeling_auto

from .configuration import EMRConfig
from .modeling import DelegatedGeneration, EMRMergedModel
from .repo import SHIM_NAME

_GENERATIVE = ("CausalLM", "Seq2SeqLM", "SpeechSeq2Seq", "ImageTextToText", "MultimodalLM")
# Auto classes by what users ask for first: some architectures belong to several.
_PREFERRED = ("SequenceClassification", "ImageClassification", *_GENERATIVE, "MaskedLM")


def architectures_of(auto_class: str) -> set[str]:
    """Names of the architectures that an Auto class of transformers knows."""
    names: set[str] = set()
    for classes in getattr(transformers, auto_class)._model_mapping._model_mapping.values():
        names.update([classes] if isinstance(classes, str) else classes)
    return names


def _make_head_class(suffix: str) -> type[EMRMergedModel]:
    generative = suffix in _GENERATIVE
    bases = (DelegatedGeneration, EMRMergedModel, GenerationMixin) if generative else (EMRMergedModel,)
    doc = f"[`EMRMergedModel`] for `AutoModelFor{suffix}`."
    return type(f"EMRMergedModelFor{suffix}", bases, {"__module__": __name__, "__doc__": doc, "_auto_suffix": suffix})


def _auto_suffixes() -> list[str]:
    found = (re.fullmatch(r"AutoModelFor(\w+)", name) for name in dir(modeling_auto))
    suffixes = [match[1] for match in found if match and hasattr(getattr(transformers, match[0]), "_model_mapping")]
    return [*_PREFERRED, *(suffix for suffix in suffixes if suffix not in _PREFERRED)]


HEAD_CLASSES = {suffix: _make_head_class(suffix) for suffix in _auto_suffixes()}
globals().update({head.__name__: head for head in HEAD_CLASSES.values()})


def head_class(architecture: str) -> type[EMRMergedModel]:
    """The wrapper's class for an architecture; [`EMRMergedModel`] itself for a body without a head."""
    for suffix, head in HEAD_CLASSES.items():
        if architecture in architectures_of(f"AutoModelFor{suffix}"):
            return head
    return EMRMergedModel


def auto_map(model_class: type[EMRMergedModel]) -> dict[str, str]:
    """`config.auto_map` of a repo: where to find its classes if emr_hf is not imported."""
    module = SHIM_NAME.removesuffix(".py")
    auto_name = model_class.__name__.replace("EMRMergedModel", "AutoModel")
    names = {"AutoConfig": EMRConfig.__name__, "AutoModel": model_class.__name__, auto_name: model_class.__name__}
    return {auto: f"{module}.{name}" for auto, name in names.items()}


def register() -> None:
    """Make the Auto classes and pipelines of transformers know merged repos."""
    AutoConfig.register(EMRConfig.model_type, EMRConfig, exist_ok=True)
    AutoModel.register(EMRConfig, EMRMergedModel, exist_ok=True)
    for suffix, head in HEAD_CLASSES.items():
        getattr(transformers, f"AutoModelFor{suffix}").register(EMRConfig, head, exist_ok=True)
