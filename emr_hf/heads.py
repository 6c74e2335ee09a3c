"""Names of the wrapper's classes, one for every Auto class: pipelines compare class names with the Auto mapping."""

from __future__ import annotations

import functools
import re

import transformers

from .repo import SHIM_NAME

WRAPPER, AUTO = "EMRMergedModel", "AutoModel"
GENERATIVE = ("CausalLM", "Seq2SeqLM", "SpeechSeq2Seq", "ImageTextToText", "MultimodalLM")
# Some architectures belong to several Auto classes: by what users ask for first.
_PREFERRED = ("SequenceClassification", "ImageClassification", *GENERATIVE, "MaskedLM")


@functools.cache
def suffixes() -> list[str]:
    """`X` of every `AutoModelForX` of transformers."""
    from transformers.models.auto import modeling_auto  # which in turn imports what registers us, see __init__.py

    found = (re.fullmatch(rf"{AUTO}For(\w+)", name) for name in dir(modeling_auto))
    known = [match[1] for match in found if match and hasattr(getattr(transformers, match[0]), "_model_mapping")]
    return [*_PREFERRED, *(suffix for suffix in known if suffix not in _PREFERRED)]


@functools.cache
def architectures_of(suffix: str) -> set[str]:
    """Names of the architectures that `AutoModelFor<suffix>` knows."""
    names: set[str] = set()
    for classes in getattr(transformers, f"{AUTO}For{suffix}")._model_mapping._model_mapping.values():
        names.update([classes] if isinstance(classes, str) else classes)
    return names


def wrapper_name(architecture: str) -> str:
    """Name of the wrapper's class for an architecture; that of the general one for a body without a head."""
    found = (suffix for suffix in suffixes() if architecture in architectures_of(suffix))
    return next((f"{WRAPPER}For{suffix}" for suffix in found), WRAPPER)


def auto_name(wrapper: str) -> str:
    """Name of the Auto class that a wrapper's class stands for."""
    return wrapper.replace(WRAPPER, AUTO)


def auto_map(wrapper: str) -> dict[str, str]:
    """`config.auto_map` of a repo: where to find its classes if emr_hf is not imported."""
    module = SHIM_NAME.removesuffix(".py")
    names = {"AutoConfig": "EMRConfig", AUTO: wrapper, auto_name(wrapper): wrapper}
    return {auto: f"{module}.{name}" for auto, name in names.items()}
