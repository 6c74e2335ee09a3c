"""Whole models aligned and averaged: the function stays, a shuffled copy is recovered, and folders come out alike."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertTokenizer

import emr_hf
from emr_hf import ActivationError, CheckpointError, MismatchError, NonFiniteError, OptionError, RecipeError, RepoError
from emr_hf.alignment import matching
from emr_hf.alignment.aligning import made_example
from emr_hf.alignment.averaging import agreement
from emr_hf.alignment.folders import folder_names
from emr_hf.alignment.layout import Symmetries
from emr_hf.alignment.symmetry import output_tensors, stored_tensors
from emr_hf.cli import main
from tests import tiny
from tests.test_symmetry import CASES, Grouped

ARCHITECTURES = (
    "ViTForImageClassification Dinov2ForImageClassification CLIPModel SwinForImageClassification "
    "BertForSequenceClassification RobertaForSequenceClassification DistilBertForSequenceClassification "
    "GPT2LMHeadModel LlamaForCausalLM Qwen2ForCausalLM T5ForConditionalGeneration BartForConditionalGeneration "
    "WhisperForConditionalGeneration ResNetForImageClassification BitForImageClassification "
    "ConvNextForImageClassification MobileNetV2ForImageClassification EfficientNetForImageClassification"
).split()
ALIGNED = [case.tiny for case in CASES if case.tiny.architecture in ARCHITECTURES]
# Wide last layers would take most of the time.
NARROW: dict[str, dict[str, Any]] = {
    "MobileNetV2ForImageClassification": {"finegrained_output": False},
    "EfficientNetForImageClassification": {"width_coefficient": 0.1, "hidden_dim": 128},
}
BERT, RESNET, VIT = tiny.BERT, tiny.RESNET, next(t for t in tiny.ALL if t.architecture == "ViTForImageClassification")
every_architecture = pytest.mark.parametrize("kind", ALIGNED, ids=[f"{i}-{kind}" for i, kind in enumerate(ALIGNED)])

pytestmark = pytest.mark.filterwarnings("ignore:.* samples for the .* units")


@torch.no_grad()
def random(model: nn.Module, seed: int) -> nn.Module:
    """With all parameters and statistics random, so that no two units are alike."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.3 if parameter.dim() < 2 else 0.1
        parameter += torch.randn(parameter.shape, generator=generator) * scale
    return tiny.move(model.eval(), seed)  # type: ignore[arg-type]


def build(kind: tiny.Tiny, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    config = kind.config(**{**NARROW.get(kind.architecture, {}), **settings})
    return random(getattr(transformers, kind.architecture)._from_config(config), seed)


def mlp(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 8), nn.ReLU())
    return random(nn.Sequential(*layers, nn.Linear(8, classes)), seed)


def images(count: int = 3, rows: int = 4, size: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"pixel_values": torch.randn(rows, 3, size, size, generator=generator)} for _ in range(count)]


def rows(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


@torch.no_grad()
def shuffled(model: nn.Module, found: Symmetries, seed: int = 0) -> nn.Module:
    """A copy of the model with its units in a random order."""
    copy = deepcopy(model)
    tensors = stored_tensors(copy)
    for name, value in found.permute(tensors, found.random(torch.Generator().manual_seed(seed))).items():
        tensors[name].copy_(value.clone())
    return copy


def outputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        return output_tensors(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))


def assert_computes_the_same(model: nn.Module, other: nn.Module, inputs: Any, tolerance: float = 1e-4) -> None:
    got, want = outputs(model, inputs), outputs(other, inputs)
    assert got.keys() == want.keys()
    for name, value in want.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * max(scale, 1))


def same(tensor: Tensor, model: nn.Module, name: str) -> bool:
    return torch.equal(tensor, model.state_dict()[name])


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    state, theirs = model.state_dict(), other.state_dict()
    return state.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in state.items())


# ---- architectures


@every_architecture
def test_an_aligned_model_computes_the_same(kind: tiny.Tiny) -> None:
    a, b, example = build(kind, 1), build(kind, 2), kind.inputs()
    before = deepcopy(b)
    plan = emr_hf.align(a, b, example=example)
    aligned = plan.apply(b)
    assert not same_weights(aligned, b) and same_weights(b, before)
    assert_computes_the_same(aligned, b, example)
    assert plan.objective[-1] > plan.objective[0]


@every_architecture
def test_a_shuffled_copy_is_recovered(kind: tiny.Tiny) -> None:
    a, example = build(kind, 1), kind.inputs()
    b = shuffled(a, emr_hf.symmetries(a, example))
    assert not same_weights(a, b)
    # Weights alone stay in a local optimum where hundreds of outputs of a layer are all out of order at first.
    data = [kind.inputs() for _ in range(4)] if kind.architecture.startswith("EfficientNet") else None
    plan = emr_hf.align(a, b, example=example, data=data)
    aligned = plan.apply(b)
    # Of units within a head weights do not tell, as it belongs to a task.
    assert {name for name, tensor in a.state_dict().items() if not same(tensor, aligned, name)} <= plan.private
    assert_computes_the_same(aligned, a, example)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    "architecture",
    ["ViTForImageClassification", "BertForSequenceClassification", "BitForImageClassification",
     "Qwen2ForCausalLM"],
)  # fmt: skip
def test_a_shuffled_copy_is_recovered_with_data(architecture: str, weight: float) -> None:
    kind = next(kind for kind in ALIGNED if kind.architecture == architecture)
    a, batches = build(kind, 1), [kind.inputs() for _ in range(5)]
    b = shuffled(a, emr_hf.symmetries(a, batches[0]))
    plan = emr_hf.align(a, b, data=batches, weight=weight)
    assert same_weights(plan.apply(b), a) and plan.weight == weight


@pytest.mark.parametrize("make", [mlp, lambda seed: random(Grouped(), seed)], ids=["mlp", "group norm"])
@pytest.mark.parametrize("method", ["mudsc", "git-rebasin", "activations"])
def test_a_plain_module_is_recovered_by_each_method(make: Callable[[int], nn.Module], method: str) -> None:
    a = make(1)
    data = rows() if isinstance(a, nn.Sequential) else [batch["pixel_values"] for batch in images(size=12)]
    b = shuffled(a, emr_hf.symmetries(a, data[0]))
    plan = emr_hf.align(a, b, data=data, method=method)
    assert same_weights(plan.apply(b), a)
    assert plan.weight == {"mudsc": 0.5, "git-rebasin": 1.0, "activations": 0.0}[method]
    assert_computes_the_same(plan.apply(b), b, data[0])


@every_architecture
def test_transformers_models_need_no_example(kind: tiny.Tiny) -> None:
    model = build(kind, 1)
    if model.main_input_name == "input_features":
        with pytest.raises(OptionError, match="Whisper.* does not tell what it takes: expected an example, or data"):
            emr_hf.align(model, model)
        return
    assert emr_hf.symmetries(model, made_example(model)).tensors == emr_hf.symmetries(model, kind.inputs()).tensors


# ---- plans


def test_a_plan_leaves_the_models_as_they_are() -> None:
    a, b = build(BERT, 1), build(BERT, 2).train()
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (a, b)]
    aligned = emr_hf.align(a, b, data=[BERT.inputs()]).apply(b)
    for model, state in zip((a, b), states):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in b.modules()) and not any(module.training for module in a.modules())
    assert all(module.training for module in aligned.modules())
    assert [p.requires_grad for p in aligned.parameters()] == [p.requires_grad for p in b.parameters()]
    assert not {t.data_ptr() for t in aligned.parameters()} & {t.data_ptr() for t in b.parameters()}


def test_a_plan_holds_for_finetunes_too() -> None:
    a, b = build(BERT, 1), build(BERT, 2)
    plan, finetune, inputs = emr_hf.align(a, b), build(BERT, 2, num_labels=5), BERT.inputs()
    tiny.move(finetune, 8)
    assert_computes_the_same(plan.apply(finetune), finetune, inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 64, "num_attention_heads": 8}, r"has 64 units along axis \d, expected 32"),
        ({"intermediate_size": 64}, r"intermediate.*has 64 units along axis 0, expected 48"),
        ({"intermediate_size": 40}, r"intermediate.*has 40 units along axis 0, expected 48"),
        ({"num_hidden_layers": 1}, "the model has no tensor 'bert.encoder.layer.1"),
    ],
)
def test_a_plan_refuses_another_architecture(settings: dict[str, int], message: str) -> None:
    plan = emr_hf.align(build(BERT, 1), build(BERT, 2))
    with pytest.raises(MismatchError, match=message):
        plan.apply(build(BERT, 2, **settings))


def test_a_plan_is_for_models() -> None:
    plan = emr_hf.align(mlp(1), mlp(2), example=rows()[0])
    with pytest.raises(OptionError, match="model: expected an nn.Module, got OrderedDict"):
        plan.apply(mlp(2).state_dict())  # type: ignore[arg-type]


def test_a_merged_model_is_refused(bert_repo: Path) -> None:
    """Its task's weights are written anew when it is switched, in the old order."""
    merged = emr_hf.EMRMergedModel.from_pretrained(bert_repo)
    with pytest.raises(OptionError, match="model 1: a merged model .* export the task first"):
        emr_hf.align(build(BERT, 1), merged)


def test_the_number_of_heads_does_not_show_in_shapes() -> None:
    with pytest.raises(
        MismatchError, match="model 1 does not have the first's units bert.encoder.layer.0.*self.query:0"
    ):
        emr_hf.align(build(BERT, 1), build(BERT, 2, num_attention_heads=2))


class TwoHeads(nn.Module):
    def __init__(self, second: bool):
        super().__init__()
        self.body, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        self.head_too = nn.Linear(12, 3) if second else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).relu()
        return self.head(x) + (self.head_too(x) if self.head_too is not None else 0)


def test_private_tensors_may_be_missing_but_not_unknown() -> None:
    one, two = random(TwoHeads(False), 1), random(TwoHeads(True), 2)
    plan = emr_hf.align(two, one, data=rows(), private="^head")
    assert_computes_the_same(plan.apply(one), one, rows()[0])
    with pytest.raises(MismatchError, match="model 1 and the first do not both have head_too.bias"):
        emr_hf.align(one, two, data=rows(), private="^head")
    with pytest.raises(MismatchError, match="the aligned models have no tensor 'head_too"):
        emr_hf.align(one, one, data=rows()).apply(two)


def test_models_may_differ_in_precision() -> None:
    a, b = build(RESNET, 1), build(RESNET, 2).to(torch.bfloat16)
    assert emr_hf.align(a, b).apply(b).dtype == torch.bfloat16
    assert emr_hf.align(b, a).apply(a).dtype == torch.float32


def test_tied_embeddings_stay_tied() -> None:
    a, b = build(tiny.GPT2, 1), build(tiny.GPT2, 2)
    aligned = emr_hf.align(a, b).apply(b)
    assert aligned.lm_head.weight is aligned.transformer.wte.weight
    assert_computes_the_same(aligned, b, tiny.GPT2.inputs())


@pytest.mark.parametrize("data", [None, [tiny.BERT.inputs()]])
def test_half_precision(data: Any) -> None:
    a = build(BERT, 1).to(torch.bfloat16)
    b = shuffled(a, emr_hf.symmetries(a, BERT.inputs()))
    plan = emr_hf.align(a, b, data=data, weight=0.8)
    assert same_weights(plan.apply(b), a)
    assert emr_hf.average([a, plan.apply(b)]).dtype == torch.bfloat16
    images_a, images_b = (build(VIT, seed).to(torch.bfloat16) for seed in (1, 2))
    emr_hf.align(images_a, images_b)  # the example that is made is of the model's dtype


def test_a_plan_tells_what_it_did() -> None:
    a, b = mlp(1), mlp(2)
    plan = emr_hf.align(a, b, data=rows(), weight="auto")
    first, *lines = str(plan).splitlines()
    assert first == f"2 models, weight {plan.weight:g}"
    assert lines[0] == "2 groups of units along 9 of 11 tensors, 2 in another order"
    assert lines[1].startswith("similarity of matched units ") and len(lines) == 2 + 9


def test_three_models_are_aligned_to_the_first() -> None:
    a = mlp(1)
    found = emr_hf.symmetries(a, rows()[0])
    models = [a, shuffled(a, found, 1), shuffled(a, found, 2)]
    plan = emr_hf.align(*models, data=rows())
    for number, model in enumerate(models):
        assert same_weights(plan.apply(model, number), a)
    with pytest.raises(OptionError, match="number=None: expected one of 0 to 2"):
        plan.apply(models[1])
    for number in (3, -1, "b"):
        with pytest.raises(OptionError, match=f"number={number!r}: expected one of 0 to 2"):
            plan.apply(models[1], number)
    averaged = emr_hf.average([plan.apply(model, number) for number, model in enumerate(models)])
    assert_computes_the_same(averaged, a, rows()[0], 1e-5)


def test_a_seed_decides() -> None:
    a, b = build(BERT, 1), build(BERT, 2)
    first, second = (emr_hf.align(a, b, seed=4) for _ in range(2))
    assert first.objective == second.objective and same_weights(first.apply(b), second.apply(b))


def test_heads_do_not_count() -> None:
    a, b, c = build(BERT, 1), build(BERT, 2), build(BERT, 2, num_labels=7)
    c.bert.load_state_dict(b.bert.state_dict())
    plans = [emr_hf.align(a, other) for other in (b, c)]
    assert plans[0].private == {"classifier.weight", "classifier.bias"}
    assert plans[0].objective == plans[1].objective
    assert_computes_the_same(plans[1].apply(c), c, BERT.inputs())


# ---- what data may be


def test_a_generator_is_read_as_often_as_needed() -> None:
    a, b, c = mlp(1), mlp(2), mlp(3)
    once = emr_hf.align(a, b, c, data=(batch for batch in rows()))
    again = emr_hf.align(a, b, c, data=rows())
    assert once.objective == again.objective


@pytest.mark.parametrize("form", ["labelled", "tuples", "inputs", "masked", "loader"])
def test_forms_of_data(form: str) -> None:
    a, b = build(BERT, 1), build(BERT, 2)
    tokens = [torch.randint(5, 90, (4, 6)) for _ in range(3)]
    data: Any = {
        "labelled": [
            {"input_ids": t, "labels": torch.zeros(4, dtype=torch.long), "return_dict": True} for t in tokens
        ],
        "tuples": [(t, torch.zeros(4)) for t in tokens],
        "inputs": tokens,
        "masked": [{"input_ids": t, "attention_mask": (torch.arange(6) < 4).long().expand(4, 6)} for t in tokens],
        "loader": torch.utils.data.DataLoader([{"input_ids": row} for t in tokens for row in t], batch_size=4),
    }[form]
    assert_computes_the_same(emr_hf.align(a, b, data=data).apply(b), b, BERT.inputs())


def test_too_few_samples_are_told() -> None:
    with pytest.warns(UserWarning, match="1 samples for the 12 units of 0: expected at least 12"):
        emr_hf.align(mlp(1), mlp(2), data=[torch.randn(1, 6)])


# ---- weight="auto"


def test_where_activations_are_compared() -> None:
    a, b, data = build(BERT, 1), build(BERT, 2), [BERT.inputs() for _ in range(5)]
    everywhere, last = (emr_hf.align(a, b, data=data, sites=sites) for sites in ("all", "last"))
    assert everywhere.objective != last.objective
    assert_computes_the_same(last.apply(b), b, data[0])


def test_auto_takes_the_weight_that_agrees_best() -> None:
    a, b, data = mlp(1), mlp(2), rows()
    plan = emr_hf.align(a, b, data=data, weight="auto")
    assert list(plan.scores) == [tenths / 10 for tenths in range(1, 10)]
    assert plan.scores[plan.weight] == max(plan.scores.values())
    for weight, score in plan.scores.items():
        alone = emr_hf.align(a, b, data=data, weight=weight)
        models = {"a": a, "b": alone.apply(b)}
        assert score == pytest.approx(agreement(emr_hf.average(models, data=data), models, data), abs=1e-6)


def test_auto_takes_the_weight_of_the_best_metric() -> None:
    seen: list[float] = []

    def metric(model: nn.Module) -> float:
        seen.append(float(model[0].weight.detach().abs().sum()))
        return seen[-1]

    plan = emr_hf.align(mlp(1), mlp(2), data=rows(), weight="auto", metric=metric)
    assert len(seen) == 2 * len(plan.scores) and max(seen) == pytest.approx(plan.scores[plan.weight])
    assert plan.scores[plan.weight] == max(plan.scores.values())


def test_a_metric_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(OptionError, match="metric: expected numbers, got nan with weight 0.1"):
        emr_hf.align(mlp(1), mlp(2), data=rows(), weight="auto", metric=lambda model: float("nan"))


def test_a_given_weight_is_not_scored() -> None:
    plan = emr_hf.align(mlp(1), mlp(2), data=rows(), weight=0.2)
    assert plan.weight == 0.2 and plan.scores == {}


# ---- averages


def test_average_of_a_list() -> None:
    models = [mlp(seed) for seed in (1, 2, 3)]
    averaged = emr_hf.average(models)
    for name, tensor in averaged.state_dict().items():
        if tensor.is_floating_point():
            want = torch.stack([model.state_dict()[name] for model in models]).mean(0)
            torch.testing.assert_close(tensor, want, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(tensor, models[0].state_dict()[name])
    assert not averaged.training and not same_weights(averaged, models[0])


def test_average_of_a_mapping_shares_all_but_the_heads() -> None:
    models = {"five": mlp(1, classes=5), "seven": mlp(2, classes=7)}
    averaged = emr_hf.average(models)
    five, seven = averaged["five"].state_dict(), averaged["seven"].state_dict()
    for name in five:
        assert (five[name].data_ptr() == seven[name].data_ptr()) == (not name.startswith("6."))
    for task, model in averaged.items():
        assert torch.equal(model[6].weight, models[task][6].weight)
        assert model(torch.randn(2, 6)).shape == (2, int(model[6].out_features))


def test_private_tensors_stay() -> None:
    models = {"a": mlp(1), "b": mlp(2)}
    averaged = emr_hf.average(models, private=["6.weight", "6.bias"])
    assert all(torch.equal(averaged[task][6].weight, models[task][6].weight) for task in models)
    of_list = emr_hf.average(list(models.values()), private=["6.weight", "6.bias"])
    assert torch.equal(of_list[6].weight, models["a"][6].weight)


def test_transformers_models_keep_their_labels() -> None:
    a, b = build(BERT, 1, num_labels=5), build(BERT, 2, num_labels=7)
    plan = emr_hf.align(a, b)
    averaged = emr_hf.average({"a": a, "b": plan.apply(b)}, private=plan.private)
    assert [model.config.num_labels for model in averaged.values()] == [5, 7]
    first, second = (model.bert.encoder.layer[0].output.dense.weight for model in averaged.values())
    assert first is second
    assert torch.equal(averaged["a"].classifier.weight, a.classifier.weight)


def test_tied_weights_are_averaged_once() -> None:
    averaged = emr_hf.average([build(tiny.GPT2, 1), build(tiny.GPT2, 2)])
    assert averaged.lm_head.weight is averaged.transformer.wte.weight
    want = (build(tiny.GPT2, 1).transformer.wte.weight + build(tiny.GPT2, 2).transformer.wte.weight) / 2
    torch.testing.assert_close(averaged.lm_head.weight, want)


@pytest.mark.parametrize("form", ["list", "mapping"])
def test_batch_norm_is_estimated_on_the_data(form: str) -> None:
    a, b, data = mlp(1), mlp(2), rows()
    models: Any = [a, b] if form == "list" else {"a": a, "b": b}
    a.train(), a[4].eval()
    a[1].momentum = 0.3
    averaged = emr_hf.average(models, data=(batch for batch in data))
    for model in [averaged] if form == "list" else averaged.values():
        inputs = [model[0](batch).detach() for batch in data]
        torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0))
        torch.testing.assert_close(model[1].running_var, torch.stack([x.var(0) for x in inputs]).mean(0))
        assert int(model[1].num_batches_tracked) == len(data)
    first = averaged if form == "list" else averaged["a"]
    assert first[1].momentum == 0.3
    assert [module.training for module in first] == [True, True, True, True, False, True, True]


def test_dropout_is_off_while_statistics_are_estimated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6)).train()
    data = rows(1)
    averaged = emr_hf.average([model, model], data=data)
    torch.testing.assert_close(averaged[1].running_mean, data[0].mean(0))


@pytest.mark.parametrize(
    ("models", "options", "error", "message"),
    [
        ([], {}, OptionError, "expected at least one model to average, got none"),
        ({}, {}, OptionError, "expected at least one model to average, got none"),
        ([nn.Linear(2, 3), nn.Linear(3, 4)], {}, MismatchError, "no tensor in common"),
        ([mlp(), mlp(1)], {"data": []}, OptionError, "data: expected at least one batch, got none"),
        ([mlp(), mlp(1)], {"private": "6.weight"}, OptionError, "private='6.weight': expected names of tensors"),
        (
            [mlp(), mlp(1)],
            {"private": ["6.wieght"]},
            OptionError,
            "no model has a tensor '6.wieght'. Did you mean '6.weight'",
        ),
        ([mlp(), "model"], {}, OptionError, "model 1: expected an nn.Module, got str"),
        (mlp(), {}, OptionError, "expected models to average, in a list or by task, got one Seq"),
        ([mlp(), mlp(1)], {"data": [torch.ones(1, 6)]}, OptionError, "statistics of BatchNorm cannot be estimated"),
        (
            [mlp(), mlp(1)],
            {"data": torch.ones(3, 6)},
            OptionError,
            "expected batches, such as a list of them, got Ten",
        ),
    ],
)
def test_average_refuses(models: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        emr_hf.average(models, **options)


# ---- errors


def never() -> Iterator[Any]:
    raise AssertionError("read before the arguments were checked")
    yield


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, "weight=1.5: expected a number from 0 to 1, or 'auto'"),
        ({"weight": -0.1}, "weight=-0.1"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"weight": "best"}, "weight='best'"),
        ({"weight": None}, "weight=None"),
        ({"weight": [0.5]}, r"weight=\[0.5\]"),
        ({"method": "mudcs"}, "method='mudcs' is unknown. Did you mean 'mudsc'"),
        ({"sites": "lats"}, "sites='lats': expected 'all' or 'last'"),
        ({"method": ["mudsc"]}, r"method=\['mudsc'\] is unknown"),
    ],
)
def test_options_are_checked_before_data_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        emr_hf.align(mlp(1), mlp(2), data=never(), **options)


@pytest.mark.parametrize(
    ("models", "options", "error", "message"),
    [
        ([], {}, OptionError, "expected two or more models, got 0"),
        ([mlp()], {}, OptionError, "expected two or more models, got 1"),
        ([mlp(), mlp().state_dict()], {}, OptionError, "model 1: expected an nn.Module, got OrderedDict"),
        ([mlp(), nn.Linear(6, 3)], {}, MismatchError, "model 1 is a Linear, the first a Sequential"),
        ([mlp(), mlp(1, classes=4)], {}, MismatchError, r"6.\w+ of model 1 has shape .*name it as private if"),
        ([mlp(), mlp()[:4]], {}, MismatchError, "model 1 and the first do not both have 4.bias"),
        ([mlp(), mlp(1)], {"weight": "auto", "metric": len}, OptionError, "weight='auto' needs data: without"),
        ([mlp(), mlp(1)], {"weight": 0}, OptionError, "weight=0 needs data"),
        ([mlp(), mlp(1)], {"method": "activations"}, OptionError, "method='activations' needs data"),
        ([mlp(), mlp(1)], {"data": rows()[0]}, OptionError, "expected batches, such as a list of them, got Tensor"),
        ([mlp(), mlp(1)], {"data": {"x": rows()[0]}}, OptionError, "such as a list of them, got dict"),
        ([mlp(), mlp(1)], {}, OptionError, "Sequential does not tell what it takes: expected an example, or data"),
        ([mlp(), mlp(1)], {"data": []}, OptionError, "data: expected at least one batch, got none"),
        ([mlp(), mlp(1)], {"data": [], "example": torch.ones(2, 6)}, ActivationError, "expected at least one"),
        ([mlp(), mlp(1)], {"data": [torch.full((2, 6), torch.nan)]}, ActivationError, "holds NaN or Inf"),
        ([mlp(), mlp(1)], {"data": [torch.ones(2, 5)]}, emr_hf.SymmetryError, "does not run on the example"),
        ([mlp(), mlp(1)], {"data": 5}, OptionError, "data: expected batches, such as a list of them, got int"),
        (
            [mlp(), mlp(1)],
            {"data": ["text"]},
            OptionError,
            "expected batches that are or begin with a tensor, got str",
        ),
        ([mlp(), mlp(1)], {"private": "("}, OptionError, "'\\(' is not a regular expression"),
    ],
)
def test_align_refuses(models: list[Any], options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        emr_hf.align(*models, **options)


def test_private_tensors_may_have_any_shape() -> None:
    a, b = mlp(1), mlp(2, classes=4)
    plan = emr_hf.align(a, b, example=rows()[0], private=r"^6\.")
    assert plan.private == {"6.weight", "6.bias"}
    assert_computes_the_same(plan.apply(b), b, rows()[0])


def test_a_weight_that_is_not_finite_is_located() -> None:
    a, b = mlp(1), mlp(2)
    with torch.no_grad():
        b[4].weight[2, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model 1: 4.weight\[2, 3\] is nan"):
        emr_hf.align(a, b, example=rows()[0])
    with pytest.raises((NonFiniteError, ActivationError)):
        emr_hf.align(a, b, data=rows())


# ---- folders


def write(folder: Path, count: int = 2, kind: tiny.Tiny = BERT) -> dict[str, Path]:
    """Checkpoints of unrelated models, the first with a tokenizer."""
    tasks = {}
    for index in range(count):
        tasks[f"task {index}"] = folder / f"input-{index}"
        build(kind, index + 1, num_labels=index + 2).save_pretrained(tasks[f"task {index}"])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    BertTokenizer(vocab={word: place for place, word in enumerate(words)}).save_pretrained(tasks["task 0"])
    return tasks


def recipe_file(folder: Path, tasks: Mapping[str, Path], **fields: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"tasks": {task: str(place) for task, place in tasks.items()}, **fields}))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("inputs"))


def data_file(folder: Path, **tensors: Tensor) -> Path:
    save_file(tensors or {"input_ids": torch.randint(5, 90, (40, 6))}, folder / "data.safetensors")
    return folder / "data.safetensors"


def assert_aligned(out: Path, inputs: Mapping[str, Path]) -> None:
    ids = {"input_ids": torch.randint(5, 90, (3, 6))}
    for task, folder in inputs.items():
        got, want = (
            AutoModelForSequenceClassification.from_pretrained(place)
            for place in (out / task.replace(" ", "-"), folder)
        )
        assert_computes_the_same(got, want, ids)
        assert same_weights(got, want) == (task == "task 0")


def test_align_writes_a_folder_a_task(inputs: dict[str, Path], tmp_path: Path) -> None:
    data_file(tmp_path)
    path = recipe_file(tmp_path, inputs, align={"weight": 0.3, "data": "data.safetensors"})  # by the recipe's folder
    plan = emr_hf.align_recipe(emr_hf.Recipe.load(path), tmp_path / "out")
    assert plan.weight == 0.3
    assert_aligned(tmp_path / "out", inputs)
    assert (tmp_path / "out/task-0/tokenizer.json").is_file()
    assert not (tmp_path / "out/task-1/tokenizer.json").exists()
    assert Symmetries.load(tmp_path / "out/symmetries.json") == plan.symmetries
    assert sorted(place.name for place in (tmp_path / "out").iterdir()) == ["symmetries.json", "task-0", "task-1"]


def test_align_at_the_command_line(inputs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    recipe, out = str(recipe_file(tmp_path, inputs)), str(tmp_path / "out")
    assert main(["align", recipe, out]) == 0
    assert capsys.readouterr().out.startswith("2 models, weight 1\n")
    assert_aligned(tmp_path / "out", inputs)
    assert main(["align", recipe, out]) == 1
    assert "exists: choose another folder or give overwrite=True" in capsys.readouterr().err
    assert main(["align", recipe, out, "--overwrite"]) == 0


def test_only_an_alignment_is_replaced(inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("precious")
    with pytest.raises(RepoError, match="exists and is no folder of aligned models: it will not be touched"):
        emr_hf.align_recipe(emr_hf.Recipe(None, inputs), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_nothing(inputs: dict[str, Path], tmp_path: Path, overwrite: bool) -> None:
    broken = tmp_path / "broken"
    model = build(BERT, 3)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = torch.inf
    model.save_pretrained(broken)
    recipe = emr_hf.Recipe(None, {**inputs, "broken": broken})
    with pytest.raises(NonFiniteError, match="inf"):
        emr_hf.align_recipe(recipe, tmp_path / "deep/out", overwrite=overwrite)
    assert not (tmp_path / "deep").exists()


def test_a_recipe_with_a_base_is_not_aligned(inputs: dict[str, Path], tmp_path: Path) -> None:
    base = str(inputs["task 0"])
    with pytest.raises(RecipeError, match="finetunes of one base lie alike already"):
        emr_hf.align_recipe(emr_hf.Recipe(base, inputs), tmp_path / "out")
    with pytest.raises(RecipeError, match="finetunes of one base lie alike already"):
        emr_hf.Recipe.load(recipe_file(tmp_path, inputs, base=base, align={}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wieght": 0.5}, "align: unknown field 'wieght'. Did you mean 'weight'"),
        (0.5, "align=0.5: expected a mapping"),
        ({"data": "no.safetensors"}, "no.safetensors does not exist"),
        ({"data": "."}, "is a folder: expected a regular file"),
        ({"data": 5}, "data=5: expected a safetensors file"),
        ({"seed": "x"}, "seed='x': expected a whole number"),
        ({"method": [["x"] * 100] * 100}, "method=.* is unknown"),
        ({"weight": 2}, "weight=2"),
        ({"method": "mudcs"}, "Did you mean 'mudsc'"),
        ({"sites": "first"}, "sites='first'"),
        ({"weight": "auto"}, "'auto' needs data"),
    ],
)
def test_wrong_fields(inputs: dict[str, Path], tmp_path: Path, fields: Any, message: str, capsys: Any) -> None:
    recipe, out = str(recipe_file(tmp_path, inputs, align=fields)), str(tmp_path / "out")
    for arguments in (["align", recipe, out], ["check", recipe], ["merge", recipe, out]):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1 and len(error) < 1000
    assert not (tmp_path / "out").exists()


def test_data_from_a_named_pipe_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    """To open one that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "data.safetensors")
    recipe = emr_hf.Recipe(None, inputs, align={"data": tmp_path / "data.safetensors"})
    for work in (emr_hf.check, lambda recipe: emr_hf.align_recipe(recipe, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="align: data: .*named pipe"):
            work(recipe)


def test_scipy_is_missed_by_the_check(inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'emr_hf\[align\]'"):
        emr_hf.check(emr_hf.Recipe(None, inputs, align={}))


def test_a_full_disk_is_one_error_and_leaves_nothing(inputs: dict[str, Path], tmp_path: Path) -> None:
    """The library that writes the weights has an error of its own, which is no OSError."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    tasks = {task: str(folder) for task, folder in inputs.items()}
    align = f"emr_hf.align_recipe(emr_hf.Recipe(None, {tasks}), {str(tmp_path / 'out')!r})"
    script = f"import emr_hf\n{limit}\ntry: {align}\nexcept emr_hf.RepoError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.stdout.startswith(f"cannot write {tmp_path / 'out'}: "), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_private_expression_that_backtracks_is_refused() -> None:
    with pytest.raises(OptionError, match="private: .* steps"):
        emr_hf.align(build(BERT, 1), build(BERT, 2), private=r"(([a-z._0-9])+)+!")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": torch.ones(4, 3), "attention_mask": torch.ones(3, 3)}, "expected the same number in all"),
        ({"input_ids": torch.ones(0, 3)}, "expected the same number in all"),
        ({"input_ids": torch.tensor(1)}, "expected the same number in all"),
    ],
)
def test_wrong_data(inputs: dict[str, Path], tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    recipe = emr_hf.Recipe(None, inputs, align={"data": data_file(tmp_path, **tensors)})
    with pytest.raises(CheckpointError, match=message):
        emr_hf.align_recipe(recipe, tmp_path / "out")


def test_a_data_file_that_is_none(inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "data.safetensors").write_text("no tensors")
    recipe = emr_hf.Recipe(None, inputs, align={"data": tmp_path / "data.safetensors"})
    with pytest.raises(CheckpointError, match="cannot read"):
        emr_hf.align_recipe(recipe, tmp_path / "out")


@pytest.mark.parametrize("tasks", [("a/b", "a b"), ("a.", "a"), ("é/", "é-"), ("a", "A"), ("symmetries.json", "b")])
def test_tasks_whose_folders_would_be_one(tasks: tuple[str, str]) -> None:
    with pytest.raises(OptionError, match="expected names that make different folders"):
        folder_names(dict.fromkeys(tasks))


def test_task_names_make_plain_folders() -> None:
    assert folder_names(dict.fromkeys(["glue/sst2", "..", "mnli.v1"])) == {
        "glue/sst2": "glue-sst2",
        "..": "task",
        "mnli.v1": "mnli.v1",
    }


def test_loaded_models_are_aligned(tmp_path: Path) -> None:
    models = {"a": build(BERT, 1), "b": build(BERT, 2)}
    before = deepcopy(models)
    emr_hf.align_recipe(emr_hf.Recipe(None, models), tmp_path / "out")
    assert all(same_weights(models[task], before[task]) for task in models)
    got = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/b")
    assert_computes_the_same(got, models["b"], BERT.inputs())


def test_adapters_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(emr_hf.EMRError, match="adapter"):
        emr_hf.align_recipe(emr_hf.Recipe(None, {**inputs, "c": adapter}), tmp_path / "out")


def test_a_missing_tensor_is_not_made_up(inputs: dict[str, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(inputs["task 1"], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="b: broken has no bert.encoder.layer.0.output.dense.weight"):
        emr_hf.align_recipe(emr_hf.Recipe(None, {"a": inputs["task 0"], "b": broken}), tmp_path / "out")


def test_an_alignment_may_be_aligned_again_in_place(inputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    emr_hf.align_recipe(emr_hf.Recipe(None, inputs), out)
    places = {"task 0": out / "task-0", "task 1": out / "task-1"}
    emr_hf.align_recipe(emr_hf.Recipe(None, places, align={"seed": 7}), out, overwrite=True)
    assert_aligned(out, inputs)


def test_a_recipe_is_aligned_and_merged(inputs: dict[str, Path], tmp_path: Path) -> None:
    data_file(tmp_path)
    path = recipe_file(tmp_path, inputs, align={"method": "mudsc", "seed": 3, "data": "data.safetensors"})
    report = emr_hf.merge_recipe(emr_hf.Recipe.load(path), tmp_path / "out", progress=False)
    assert list(report.tasks) == list(inputs)
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    ids = {"input_ids": torch.randint(5, 90, (3, 6))}
    for task, folder in inputs.items():
        model.set_task(task)
        assert_computes_the_same(model, AutoModelForSequenceClassification.from_pretrained(folder), ids)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["data.safetensors", "out", "recipe.yaml"]
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text()
    assert model.config.recipe["align"] == {"method": "mudsc", "seed": 3}
    assert model.config.recipe["tasks"] == {task: folder.name for task, folder in inputs.items()}


# ---- many to one


def test_zipped_models_share_all_but_the_heads() -> None:
    a, b, data = mlp(1), mlp(2, classes=4), rows()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = emr_hf.zip_models(a, b, data=data, private=r"^6\.")
    assert [model(data[0]).shape[1] for model in (first, second)] == [3, 4]
    for name, tensor in first.state_dict().items():
        other = second.state_dict()[name]
        assert name.startswith("6.") or tensor.data_ptr() == other.data_ptr()
    copy = shuffled(a, emr_hf.symmetries(a, data[0]))
    same, _ = emr_hf.zip_models(a, copy, example=data[0])
    assert_computes_the_same(same, a, data[0])
