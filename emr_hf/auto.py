"""The wrapper's classes, one for every Auto class, and their registration."""

from __future__ import annotations

import transformers
from transformers import AutoModel, GenerationMixin

from .configuration import EMRConfig
from .generation import DelegatedGeneration
from .heads import AUTO, GENERATIVE, WRAPPER, suffixes
from .modeling import EMRMergedModel


def _make_head_class(suffix: str) -> type[EMRMergedModel]:
    generative = suffix in GENERATIVE
    bases = (DelegatedGeneration, EMRMergedModel, GenerationMixin) if generative else (EMRMergedModel,)
    doc = f"[`EMRMergedModel`] for `{AUTO}For{suffix}`."
    return type(f"{WRAPPER}For{suffix}", bases, {"__module__": __name__, "__doc__": doc, "_auto_suffix": suffix})


HEAD_CLASSES = {suffix: _make_head_class(suffix) for suffix in suffixes()}
globals().update({head.__name__: head for head in HEAD_CLASSES.values()})


def register() -> None:
    """Make the Auto classes of transformers know merged repos."""
    AutoModel.register(EMRConfig, EMRMergedModel, exist_ok=True)
    for suffix, head in HEAD_CLASSES.items():
        getattr(transformers, f"{AUTO}For{suffix}").register(EMRConfig, head, exist_ok=True)


register()
