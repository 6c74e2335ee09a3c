"""Symmetries found by tracing: true (the function stays), and complete (what should move does)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from emr_hf.alignment.layout import Symmetries
from emr_hf.alignment.symmetry import SymmetryError, symmetries, verify
from tests import tiny

EXACT, FLOAT32 = 1e-9, 1e-5


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """With norms, biases and statistics that are not all alike, else a wrong order would not show."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        scale = 0.3 if parameter.dim() < 2 else 0.1
        parameter += torch.randn(parameter.shape, generator=generator) * scale
    return tiny.move(model.eval(), 3)


def build(architecture: str, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return shaken(getattr(transformers, architecture)._from_config(config))


def free(found: Symmetries, name: str) -> list[list[str]]:
    """Names of the groups along each axis."""
    return [[f for segment in axis for f in segment if isinstance(f, str)] for axis in found.tensors[name]]


def share(found: Symmetries, model: nn.Module) -> tuple[int, int]:
    names = [name for name, _ in model.named_parameters()]
    return sum(any(free(found, name)) for name in names), len(names)


def traced(model: nn.Module, example: Any, tolerance: float = EXACT, **options: Any) -> Symmetries:
    found = symmetries(model, example, **options)
    assert verify(model, example, found, **options) < tolerance
    return found


@dataclass(frozen=True)
class Case:
    """An architecture, how many groups, nested groups and parameters with a group it has at least."""

    tiny: tiny.Tiny
    groups: int
    nested: int
    covered: int
    tolerance: float = EXACT
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.tiny.architecture


def _t(architecture: str, config: str, settings: dict[str, Any], inputs: Callable[[], Any] = tiny._token_ids):
    return tiny.Tiny(architecture, config, settings, inputs)


def _known(architecture: str, number: int = 0) -> tiny.Tiny:
    return [case for case in tiny.ALL if case.architecture == architecture][number]


def _images32() -> dict[str, Any]:
    return tiny._images(32)


_GQA = {**tiny.TEXT, "num_key_value_heads": 2}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_OPT = {"vocab_size": 96, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64}  # fmt: skip
_EFFICIENT = {"image_size": 32, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280,
              "num_block_repeats": [1, 1], "kernel_sizes": [3, 5], "in_channels": [32, 16], "out_channels": [16, 16],
              "strides": [1, 2], "expand_ratios": [1, 2], "depthwise_padding": []}  # fmt: skip
_SPEECH = {**tiny.TEXT, "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [4, 4],
           "num_feat_extract_layers": 2,
           "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 4}  # fmt: skip
_SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
              "patch_sizes": [3, 3], "strides": [4, 2], "num_attention_heads": [1, 2],
              "mlp_ratios": [2, 2]}  # fmt: skip
_MODERN = {**tiny.TEXT, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}

# Groups, groups within groups, parameters with a group along an axis. FLOAT32: the norm or the softmax is computed in
# float32 whatever the model's type is.
CASES: list[Case] = [
    Case(_known("ViTForImageClassification"), 9, 4, 39),
    Case(_known("Dinov2ForImageClassification"), 9, 4, 43),
    Case(_known("CLIPModel"), 18, 8, 77),
    Case(_known("BertForSequenceClassification"), 10, 4, 40),
    Case(_known("RobertaForSequenceClassification"), 10, 4, 40),
    Case(_known("DistilBertForSequenceClassification"), 10, 4, 39),
    Case(_known("DebertaV2ForSequenceClassification"), 11, 4, 48),
    Case(_known("DebertaForSequenceClassification"), 7, 0, 40, FLOAT32),
    Case(_known("AlbertForSequenceClassification"), 7, 2, 26),
    Case(_known("GPT2LMHeadModel"), 9, 4, 28),
    Case(_known("LlamaForCausalLM", 0), 9, 4, 21, FLOAT32),
    Case(_known("LlamaForCausalLM", 1), 9, 4, 20, FLOAT32),
    Case(_known("Qwen2MoeForCausalLM"), 11, 4, 35, FLOAT32),
    Case(_known("MixtralForCausalLM"), 9, 4, 21, FLOAT32),
    Case(_known("T5ForConditionalGeneration"), 20, 12, 47, FLOAT32),
    Case(_known("BartForConditionalGeneration"), 23, 12, 91),
    Case(_known("WhisperForConditionalGeneration"), 25, 12, 89),
    Case(_known("ResNetForImageClassification"), 4, 0, 19),
    Case(_known("ConvNextForImageClassification"), 4, 0, 29),
    Case(_t("Qwen2ForCausalLM", "Qwen2Config", _GQA), 9, 4, 27, FLOAT32),
    Case(_t("Qwen3ForCausalLM", "Qwen3Config", {**_GQA, "head_dim": 8}), 9, 4, 21, FLOAT32),
    Case(_t("MistralForCausalLM", "MistralConfig", _GQA), 9, 4, 21, FLOAT32),
    Case(_t("Gemma2ForCausalLM", "Gemma2Config", {**_GQA, "head_dim": 8}), 9, 4, 24, FLOAT32),
    Case(_t("Phi3ForCausalLM", "Phi3Config", {**_GQA, "pad_token_id": 0}), 9, 4, 15, FLOAT32),
    Case(_t("OPTForCausalLM", "OPTConfig", _OPT), 9, 4, 36),
    Case(_t("GPTNeoXForCausalLM", "GPTNeoXConfig", tiny.TEXT), 5, 0, 28),
    Case(_t("BloomForCausalLM", "BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
         5, 0, 29),
    Case(_t("ModernBertForSequenceClassification", "ModernBertConfig", _MODERN), 6, 0, 17),
    Case(_t("DeiTForImageClassification", "DeiTConfig", tiny.VISION, tiny._images), 9, 4, 40),
    Case(_t("SwinForImageClassification", "SwinConfig", _SWIN, _images32), 18, 8, 78),
    Case(_t("ConvNextV2ForImageClassification", "ConvNextV2Config",
            {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}, _images32), 4, 0, 31),
    Case(_t("MobileNetV2ForImageClassification", "MobileNetV2Config",
            {"image_size": 32, "depth_multiplier": 0.35}, _images32), 25, 0, 157),
    Case(_t("EfficientNetForImageClassification", "EfficientNetConfig", _EFFICIENT, _images32), 7, 0, 30),
    Case(_t("RegNetForImageClassification", "RegNetConfig",
            {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}, _images32),
         11, 2, 36),
    Case(_t("BitForImageClassification", "BitConfig",
            {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4}, _images32), 14, 7, 24),
    Case(_t("SegformerForImageClassification", "SegformerConfig", _SEGFORMER, _images32), 10, 2, 53),
    Case(_t("Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH, lambda: {"input_values": torch.randn(2, 400)}), 12, 4, 45),
    Case(_t("MambaForCausalLM", "MambaConfig",
            {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}), 7, 0, 22, FLOAT32),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case}" for i, case in enumerate(CASES)])
def test_the_function_stays_and_nearly_all_moves(case: Case) -> None:
    config = case.tiny.config()
    config._experts_implementation = "eager"  # grouped products have no float64
    model, example = build(case.tiny.architecture, config), case.tiny.inputs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = traced(model, example, case.tolerance)
    nested = sum(group.parent is not None for group in found.groups.values())
    assert (len(found.groups), nested, share(found, model)[0]) == (case.groups, case.nested, case.covered)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name, tensor in model.state_dict().items():
        assert len(found.tensors[name]) == tensor.dim()


def model_of(architecture: str, number: int = 0) -> tuple[nn.Module, Any]:
    case = _known(architecture, number)
    return build(architecture, case.config()), case.inputs()


def test_vit_heads_dims_neurons_and_residual() -> None:
    found = symmetries(*model_of("ViTForImageClassification"))
    ((residual,),) = free(found, "vit.layernorm.weight")[:1]
    layer = "vit.layers.0"
    (heads, dims), stream = free(found, f"{layer}.attention.q_proj.weight")
    assert stream == [residual] and free(found, f"{layer}.attention.k_proj.weight") == [[heads, dims], [residual]]
    (same, values), _ = free(found, f"{layer}.attention.v_proj.weight")
    assert same == heads and values != dims
    assert found.groups[dims].parent == found.groups[values].parent == heads and found.groups[heads].parent is None
    assert free(found, f"{layer}.attention.o_proj.weight") == [[residual], [heads, values]]
    (neurons,), _ = free(found, f"{layer}.mlp.fc1.weight")
    assert free(found, f"{layer}.mlp.fc2.weight") == [[residual], [neurons]]
    assert free(found, "classifier.weight") == [[], [residual]]
    assert "output" in found.frozen["classifier.weight"]
    assert found.contracted[f"{layer}.mlp.fc1.weight"] == (1,)


def test_llama_keys_serve_groups_of_queries() -> None:
    found = symmetries(*model_of("LlamaForCausalLM"))
    attention = "model.layers.0.self_attn"
    (kv, group), _ = free(found, f"{attention}.q_proj.weight")
    assert found.tensors[f"{attention}.q_proj.weight"][0] == ((kv, group, 8),)  # rotary: the dims stay
    assert found.tensors[f"{attention}.k_proj.weight"][0] == ((kv, 8),)
    (same, values), _ = free(found, f"{attention}.v_proj.weight")
    assert same == kv and found.groups[group].parent == kv and found.groups[values].parent == kv
    assert free(found, f"{attention}.o_proj.weight")[1] == [kv, group, values]
    gate = free(found, "model.layers.0.mlp.gate_proj.weight")
    assert gate[0] and gate == free(found, "model.layers.0.mlp.up_proj.weight")


def test_a_tied_head_has_the_embeddings_layout() -> None:
    found = symmetries(*model_of("LlamaForCausalLM", 1))
    assert found.tensors["lm_head.weight"] == found.tensors["model.embed_tokens.weight"]
    assert found.contracted["model.embed_tokens.weight"] == (1,)
    assert free(found, "lm_head.weight") == [[], ["model.embed_tokens"]]  # looked up as well: it gives the name


def test_fused_projections_are_concatenations() -> None:
    found = symmetries(*model_of("GPT2LMHeadModel"))
    _, segments = found.tensors["transformer.h.0.attn.c_attn.weight"]
    assert len(segments) == 3 and segments[0] == segments[1] != segments[2] and segments[0][0] == segments[2][0]


def test_a_base_model_keeps_its_residual_stream_unless_told_otherwise() -> None:
    model, example = model_of("BertModel")
    assert free(symmetries(model, example), "embeddings.LayerNorm.weight") == [[]]
    assert free(traced(model, example, outputs=["pooler_output"]), "embeddings.LayerNorm.weight") != [[]]
    with pytest.raises(SymmetryError, match="pooler_outptu.*Did you mean 'pooler_output'"):
        symmetries(model, example, outputs=["pooler_outptu"])


# Small models by hand


class Grouped(nn.Module):
    """A residual network with GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.first, self.second, self.head = nn.GroupNorm(4, 8), nn.GroupNorm(3, 12), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x)).relu()
        x = x + self.back(self.second(self.inner(x)).relu())
        return self.head(x.mean((2, 3)))


def test_channels_lie_within_groups_of_group_norm() -> None:
    found = traced(shaken(Grouped()), torch.randn(2, 3, 8, 8))
    ((groups, channels),) = free(found, "second.weight")
    assert (found.groups[groups].size, found.groups[channels].size) == (3, 4)
    assert found.groups[channels].parent == groups
    assert free(found, "back.weight")[:2] == [free(found, "stem.weight")[0], [groups, channels]]


def test_mlp_of_plain_modules() -> None:
    model = shaken(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)))
    model.train()
    found = traced(model, torch.randn(4, 6))
    assert all(module.training for module in model.modules())
    assert {name: group.size for name, group in found.groups.items()} == {"0": 8}
    assert found.tensors["1.running_mean"] == found.tensors["0.bias"] == ((("0",),),)
    assert found.contracted == {"0.weight": (1,), "4.weight": (1,)}
    assert ("2", "output", 0) in [(site.module, site.kind, site.position) for site in found.sites]
    assert all(site.layout == (((4,),), (("0",),)) for site in found.sites)


class Between(nn.Module):
    """Two linear layers with something between them, of `(batch, heads, dims)`."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 12):
        super().__init__()
        self.a, self.between = nn.Linear(5, 12), between
        self.b = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x).view(-1, 4, 3)).flatten(1))


@pytest.mark.parametrize(
    ("between", "free_axes", "nested", "width"),
    [
        (lambda x: x.tanh(), 2, 1, 12),
        (lambda x: x.softmax(1), 2, 0, 12),  # mixes the heads while their dims are apart
        (lambda x: x.softmax(2), 2, 1, 12),
        (lambda x: x.flatten(1).softmax(1), 2, 1, 12),
        (lambda x: x - x.mean(1, keepdim=True), 2, 0, 12),
        (lambda x: x - x.mean(2, keepdim=True), 2, 1, 12),
        (lambda x: x.sum(1), 2, 0, 3),
        (lambda x: x @ x.mT, 1, 0, 16),  # each head with each: twice along an axis of b, so they stay
        (lambda x: x.mT @ x, 1, 0, 9),  # summed over heads, dims by dims: those stay
        (lambda x: x.cumsum(2), 1, 0, 12),
        (lambda x: x.cumsum(1), 1, 0, 12),
        (lambda x: x[..., ::2], 1, 0, 8),
        (lambda x: x.roll(1, 2), 1, 0, 12),
        (lambda x: x.flip(1), 1, 0, 12),
        (lambda x: x.sort(1).values, 1, 0, 12),
        (lambda x: x * torch.arange(3.0, dtype=x.dtype), 1, 0, 12),
        (lambda x: x * torch.full((4, 3), 2.0), 2, 1, 12),
        (lambda x: x + x.argmax(2, keepdim=True), 1, 0, 12),
        (lambda x: torch.fft.fft(x).real, 0, 0, 12),
        (lambda x: x.as_strided((len(x), 4, 3), (12, 1, 4)), 0, 0, 12),
    ],
)
def test_what_lies_between_decides(
    between: Callable[[Tensor], Tensor], free_axes: int, nested: int, width: int
) -> None:
    model = shaken(Between(between, width))
    found = traced(model, torch.randn(4, 5))
    assert len(free(found, "a.weight")[0]) == free_axes
    assert sum(group.parent is not None for group in found.groups.values()) == nested


def _written_in_place(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 4, 3, dtype=x.dtype)
    view = out[:, 1:]
    view[:] = x[:, :3]
    return out + x


def _constant_written_over(x: Tensor) -> Tensor:
    out = torch.ones(len(x), 1, 1, dtype=x.dtype).expand(-1, 4, 3) * 1.0
    flat = out.view(-1, 12)
    out.mul_(x)
    return flat * torch.arange(12.0, dtype=x.dtype)


def _unsqueezed_in_place(x: Tensor) -> Tensor:
    return x.clone().transpose_(1, 2)


@pytest.mark.parametrize("between", [_written_in_place, _constant_written_over, _unsqueezed_in_place])
def test_writing_in_place_is_sound(between: Callable[[Tensor], Tensor]) -> None:
    traced(shaken(Between(between)), torch.randn(4, 5))


@torch.library.custom_op("emr_hf_tests::weighted", mutates_args=())
def weighted(x: Tensor) -> Tensor:
    return x * torch.arange(x.shape[-1], dtype=x.dtype)


def test_an_operation_without_a_rule_freezes_and_says_so() -> None:
    found = traced(shaken(Between(lambda x: weighted(x))), torch.randn(4, 5))
    assert not found.groups and found.frozen["a.weight"] == "axis 0: no rule for emr_hf_tests.weighted"


def test_rows_of_positions_that_the_example_is_too_short_for_stay() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.head = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.positions[: x.shape[1]]).tanh())

    found = symmetries(shaken(Positions()), torch.randn(2, 5, 4))
    assert not found.groups


# The interface


def test_a_wrong_symmetry_is_found_and_named() -> None:
    model, example = model_of("ViTForImageClassification")
    found = symmetries(model, example)
    name = "vit.layers.1.mlp.fc1"
    wrong = replace(found, tensors={**found.tensors, f"{name}.bias": (((48,),),)})
    with pytest.raises(SymmetryError, match=f"by the order of {name} ") as raised:
        verify(model, example, wrong)
    assert "fc1 (" in str(raised.value) and "layers.0" not in str(raised.value)


def test_stored_and_loaded(tmp_path: Any) -> None:
    model, example = model_of("GPT2LMHeadModel")
    found = symmetries(model, example)
    found.save(tmp_path / "symmetries.json")
    assert Symmetries.load(tmp_path / "symmetries.json") == found


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        ("model", torch.ones(1), "expected an nn.Module, got str"),
        (nn.Linear(2, 2), None, "expected an example.*got NoneType"),
        (nn.Linear(2, 2), {}, "holds no tensor"),
        (nn.Linear(2, 2), torch.ones(0, 2), "only empty ones"),
        (nn.Linear(2, 2), {"x": torch.ones(1, 2)}, r"Linear does not run on the example \(x\).*unexpected keyword"),
        (nn.Linear(2, 2), torch.ones(1, 3), r"Linear does not run on the example \(1 positional\).*shapes"),
    ],
)
def test_errors(model: Any, example: Any, message: str) -> None:
    with pytest.raises(SymmetryError, match=message):
        symmetries(model, example)


def test_scaled_dot_product_with_shared_keys() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = nn.Linear(6, 24), nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(24, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).view(2, 5, -1, 6).transpose(1, 2) for p in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    found = traced(shaken(Attention()), torch.randn(2, 5, 6))
    kv, group, dims = free(found, "q.weight")[0]
    assert free(found, "k.weight")[0] == [kv, dims]
    assert [found.groups[name].parent for name in (kv, group, dims)] == [None, kv, kv]
