"""Tiny PEFT adapters of every kind, trained on nothing: their values are random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import PreTrainedModel

from tests import tiny

BERT_LORA = {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 5}
BERT_IA3 = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}


def write_base(architecture: tiny.Tiny, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A base without its head, as finetunes start from."""
    torch.manual_seed(7)
    base_class = getattr(transformers, architecture.base_architecture or architecture.architecture)
    base_class._from_config(architecture.config(), dtype=dtype).save_pretrained(folder)
    return folder


def load(architecture: str, base: Path, **options: Any) -> PreTrainedModel:
    """The base under a head of its own, float32."""
    model_class = getattr(transformers, architecture)
    return tiny.quietly(model_class.from_pretrained, base, **{"dtype": torch.float32, **options})


@torch.no_grad()
def write_adapter(
    folder: Path,
    architecture: str,
    base: Path,
    settings: dict[str, Any],
    seed: int = 0,
    kind: str = "LORA",
    scale: float = 0.2,
    **options: Any,
) -> Path:
    """Save an adapter by PEFT's own means.

    Args:
        settings: fields of its configuration.
        options: of `from_pretrained` of the model, such as `num_labels`.
    """
    torch.manual_seed(seed + 100)
    config_class = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config}[kind]
    model = peft.get_peft_model(load(architecture, base, **options), config_class(**settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += scale * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def merged_model(folder: Path, architecture: str, base: Path, **options: Any) -> PreTrainedModel:
    """The adapter merged into its base by PEFT."""
    model = peft.PeftModel.from_pretrained(load(architecture, base, **options), folder)
    return model.merge_and_unload().eval()
