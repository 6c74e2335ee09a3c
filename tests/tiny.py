"""Tiny models of many architectures, built in process, and finetunes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 8, "num_channels": 3}
VISION: dict[str, Any] = {
    **IMAGE,
    **{k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")},
}
LAYERS: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "d_model": 32,
}


def _token_ids(**extra: Any) -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 90, (2, 7)), **extra}


def _images(size: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


@dataclass(frozen=True)
class Tiny:
    """One architecture: class, configuration, and inputs that it takes."""

    architecture: str
    config_class: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Any]] = _token_ids
    base_architecture: str | None = None
    auto_class: str = "AutoModel"
    generates: bool = False
    labels: bool = False

    def config(self, **extra: Any) -> Any:
        return getattr(transformers, self.config_class)(**{**self.settings, **extra})

    def __str__(self) -> str:
        return self.architecture


BERT = Tiny("BertForSequenceClassification", "BertConfig", TEXT, labels=True, base_architecture="BertModel",
            auto_class="AutoModelForSequenceClassification")  # fmt: skip
GPT2 = Tiny(
    "GPT2LMHeadModel",
    "GPT2Config",
    {
        "vocab_size": 96,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    auto_class="AutoModelForCausalLM",
    generates=True,
)
_MOE = {
    **TEXT,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
LLAMA = Tiny("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2}, generates=True,
             auto_class="AutoModelForCausalLM")  # fmt: skip
QWEN2_MOE = Tiny("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _MOE, auto_class="AutoModelForCausalLM", generates=True)
MIXTRAL = Tiny(
    "MixtralForCausalLM",
    "MixtralConfig",
    {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4},
    auto_class="AutoModelForCausalLM",
    generates=True,
)
RESNET = Tiny(
    "ResNetForImageClassification",
    "ResNetConfig",
    {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    inputs=lambda: _images(32),
    labels=True,
    base_architecture="ResNetModel",
    auto_class="AutoModelForImageClassification",
)

CLIP_SETTINGS: dict[str, Any] = {
    "text_config": {**TEXT, "eos_token_id": 2, "bos_token_id": 1},
    "vision_config": VISION,
    "projection_dim": 16,
}
DEBERTA_SETTINGS: dict[str, Any] = {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

ALL: Sequence[Tiny] = (
    BERT,
    Tiny("RobertaForSequenceClassification", "RobertaConfig", TEXT, base_architecture="RobertaForMaskedLM",
         labels=True, auto_class="AutoModelForSequenceClassification"),
    Tiny("DistilBertForSequenceClassification", "DistilBertConfig",
         {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
         base_architecture="DistilBertModel", labels=True, auto_class="AutoModelForSequenceClassification"),
    Tiny("DebertaV2ForSequenceClassification", "DebertaV2Config",
         DEBERTA_SETTINGS, base_architecture="DebertaV2Model",
         labels=True, auto_class="AutoModelForSequenceClassification"),
    Tiny("DebertaForSequenceClassification", "DebertaConfig", DEBERTA_SETTINGS,
         base_architecture="DebertaModel", labels=True, auto_class="AutoModelForSequenceClassification"),
    Tiny("AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 16},
         base_architecture="AlbertModel", labels=True, auto_class="AutoModelForSequenceClassification"),
    Tiny("BertForTokenClassification", "BertConfig", TEXT, base_architecture="BertForMaskedLM", labels=True,
         auto_class="AutoModelForTokenClassification"),
    Tiny("BertForMaskedLM", "BertConfig", TEXT, auto_class="AutoModelForMaskedLM"),
    Tiny("BertModel", "BertConfig", TEXT),
    Tiny("ViTForImageClassification", "ViTConfig", VISION, inputs=_images, base_architecture="ViTModel", labels=True,
         auto_class="AutoModelForImageClassification"),
    Tiny("Dinov2ForImageClassification", "Dinov2Config", {**VISION, "mlp_ratio": 2}, inputs=_images,
         base_architecture="Dinov2Model", labels=True, auto_class="AutoModelForImageClassification"),
    Tiny("ConvNextForImageClassification", "ConvNextConfig",
         {"num_channels": 3, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
         inputs=lambda: _images(32), base_architecture="ConvNextModel", labels=True,
         auto_class="AutoModelForImageClassification"),
    RESNET,
    Tiny("CLIPModel", "CLIPConfig",
         CLIP_SETTINGS,
         inputs=lambda: {**_token_ids(), **_images()}, auto_class="AutoModel"),
    Tiny("CLIPForImageClassification", "CLIPConfig",
         CLIP_SETTINGS,
         inputs=_images, base_architecture="CLIPModel", labels=True, auto_class="AutoModelForImageClassification"),
    GPT2,
    Tiny("GPT2ForSequenceClassification", "GPT2Config", {**GPT2.settings, "pad_token_id": 0}, labels=True,
         base_architecture="GPT2LMHeadModel", auto_class="AutoModelForSequenceClassification"),
    LLAMA,
    Tiny("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2, "tie_word_embeddings": True},
         auto_class="AutoModelForCausalLM", generates=True),
    QWEN2_MOE,
    MIXTRAL,
    Tiny("T5ForConditionalGeneration", "T5Config",
         {"vocab_size": 96, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4,
          "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
         inputs=lambda: _token_ids(decoder_input_ids=torch.randint(5, 90, (2, 4))), generates=True,
         auto_class="AutoModelForSeq2SeqLM"),
    Tiny("BartForConditionalGeneration", "BartConfig",
         {**LAYERS, "vocab_size": 96, "max_position_embeddings": 64, "decoder_start_token_id": 2, "pad_token_id": 1,
          "bos_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": None},
         inputs=lambda: _token_ids(decoder_input_ids=torch.randint(5, 90, (2, 4))), generates=True,
         auto_class="AutoModelForSeq2SeqLM"),
    Tiny("WhisperForConditionalGeneration", "WhisperConfig",
         {**LAYERS, "vocab_size": 96, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 24,
          "decoder_start_token_id": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
         inputs=lambda: {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(5, 90, (2, 4))},
         generates=True, auto_class="AutoModelForSpeechSeq2Seq"),
)  # fmt: skip


@dataclass
class Inputs:
    """Folders of a base and its finetunes, and the finetunes' state dicts in memory."""

    base: Path
    finetunes: dict[str, Path] = field(default_factory=dict)


@torch.no_grad()
def move(model: PreTrainedModel, seed: int, scale: float = 0.02) -> PreTrainedModel:
    """Give a model a task vector of its own: some tensors dense, some sparse, BatchNorm statistics too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        step = torch.randn(parameter.shape, generator=generator) * scale
        keep = torch.rand(parameter.shape, generator=generator) > 0.3
        parameter += (step * keep).to(parameter.dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer += torch.randn(buffer.shape, generator=generator).to(buffer.dtype)
        if name.endswith("running_var"):
            buffer *= 1 + torch.rand(buffer.shape, generator=generator).to(buffer.dtype)
        if name.endswith("num_batches_tracked"):
            buffer += seed + 1
    return model


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call without the warnings that a base without a head gives."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return function(*args, **kwargs)
    finally:
        transformers.logging.set_verbosity(verbosity)


def label_names(task: str, count: int) -> dict[str, Any]:
    return {
        "id2label": {i: f"{task}-{i}" for i in range(count)},
        "label2id": {f"{task}-{i}": i for i in range(count)},
    }


def write_inputs(
    tiny: Tiny,
    folder: Path,
    tasks: Sequence[str] = ("a", "b", "c"),
    dtype: torch.dtype = torch.float32,
    scale: float = 0.02,
    **save_options: Any,
) -> Inputs:
    """Write a base and one finetune a task; the second task has three labels, the others two."""
    torch.manual_seed(7)
    base_class = getattr(transformers, tiny.base_architecture or tiny.architecture)
    inputs = Inputs(folder / "base")
    base = base_class._from_config(tiny.config(), dtype=dtype)
    base.save_pretrained(inputs.base, **save_options)
    for index, task in enumerate(tasks):
        inputs.finetunes[task] = folder / f"finetune-{index}"
        labels = label_names(task, 3 if index == 1 else 2) if tiny.labels else {}
        model_class = getattr(transformers, tiny.architecture)
        model = quietly(model_class.from_pretrained, inputs.base, dtype=dtype, **labels)
        move(model, index, scale).save_pretrained(inputs.finetunes[task], **save_options)
    return inputs
