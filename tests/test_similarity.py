"""Correlations of weights and activations against numpy, on data held as a whole."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emr_hf.alignment.layout import Group, Site, Symmetries
from emr_hf.alignment.similarity import (
    ActivationError,
    Moments,
    activation_similarity,
    combine,
    matched_similarity,
    unit_rows,
    weight_similarity,
)
from emr_hf.errors import OptionError
from tests.test_matching import MODELS, axes, batches, linear, made


def reference(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlations of rows by numpy, in float64."""
    with np.errstate(invalid="ignore"):  # constant rows
        whole = np.corrcoef(a.double().numpy(), b.double().numpy())
    return torch.from_numpy(whole[: len(a), len(a) :]).float()


# ---- moments


@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (1e4, 1.0), (-1e6, 10.0), (1e-4, 1e-6)])
@pytest.mark.parametrize("cuts", [[100], [1, 9, 90], [37, 63]])
def test_moments_are_those_of_all_data_at_once(offset: float, spread: float, cuts: list[int]) -> None:
    torch.manual_seed(0)
    common = torch.randn(4, 100)
    a = torch.cat([common, torch.randn(3, 100)]) * spread + offset
    b = (torch.cat([common * 0.5, torch.zeros(2, 100)]) + torch.randn(6, 100)) * spread + offset
    moments, matched = Moments(), Moments(matched=True)
    for part_a, part_b in zip(a.split(cuts, 1), b.split(cuts, 1)):
        moments.add(part_a, part_b)
        matched.add(part_a[:6], part_b)
    torch.testing.assert_close(moments.correlation(), reference(a, b), rtol=0, atol=1e-6)
    torch.testing.assert_close(matched.correlation(), reference(a[:6], b).diagonal(), rtol=0, atol=1e-6)


def test_moments_of_chunks_whose_means_differ() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(5, 20) + level for level in (0.0, 1e4, -50.0)]
    moments = Moments()
    for part in parts:
        moments.add(part, part.flip(0))
    whole = torch.cat(parts, 1)
    torch.testing.assert_close(moments.correlation(), reference(whole, whole.flip(0)), rtol=0, atol=1e-6)


def test_large_samples_are_added_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    a, b, moments = torch.randn(5, 100), torch.randn(7, 100), Moments()
    monkeypatch.setattr("emr_hf.alignment.similarity.CHUNK", 50)
    moments.add(a, b)
    assert moments.count == 100
    torch.testing.assert_close(moments.correlation(), reference(a, b), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -12345.678])
def test_constant_units_are_like_none(value: float) -> None:
    a = torch.randn(3, 1000)
    a[1] = value
    moments = Moments()
    moments.add(a, a)
    correlation = moments.correlation()
    assert torch.equal(correlation[1], torch.zeros(3)) and torch.equal(correlation[:, 1], torch.zeros(3))
    assert correlation[0, 0] == pytest.approx(1)


# ---- weights

SPEC = Symmetries(
    {"heads": Group("heads", 2), "shared": Group("shared", 3, "heads"), "dims": Group("dims", 4, "heads")}
    | {"residual": Group("residual", 5)},
    {
        "qk.weight": axes("heads*shared*dims + heads*dims", "residual"),
        "qk.bias": axes("heads*shared*dims + heads*dims"),
        "bias": axes(7, "heads"),
        "norm.weight": axes("residual"),
        "norm.running_mean": axes("residual"),
    },
)


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"qk.weight": (32, 5), "qk.bias": (32,), "bias": (7, 2), "norm.weight": (5,), "norm.running_mean": (5,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def features(tensors: dict[str, Tensor], group: str) -> Tensor:
    """The units' features, written out by hand."""
    weight, bias = tensors["qk.weight"], tensors["qk.bias"]
    queries, keys = weight[:24].view(2, 3, 4, 5), weight[24:].view(2, 4, 5)
    query_bias, key_bias = bias[:24].view(2, 3, 4, 1), bias[24:].view(2, 4, 1)
    if group == "dims":
        parts = [queries.transpose(1, 2).reshape(8, 15), keys.reshape(8, 5)]
        parts += [query_bias.transpose(1, 2).reshape(8, 3), key_bias.reshape(8, 1)]
    elif group == "shared":
        parts = [queries.reshape(6, 20), query_bias.reshape(6, 4)]
    elif group == "heads":
        parts = [tensors["bias"].T]
    else:
        parts = [weight.T, tensors["norm.weight"][:, None]]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("group", SPEC.groups)
def test_weights_are_compared_along_all_axes(group: str) -> None:
    a, b = state(0), state(1)
    expected = reference(features(a, group), features(b, group))
    found = weight_similarity(a, b, SPEC, group)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(matched_similarity(a, b, SPEC, group), expected.diagonal(), rtol=0, atol=1e-6)
    product = features(a, group) @ features(b, group).T
    torch.testing.assert_close(weight_similarity(a, b, SPEC, group, measure="inner"), product)
    both = torch.cat([features(a, group), features(b, group)])
    within = weight_similarity(a, b, SPEC, group, within=True)
    torch.testing.assert_close(within, reference(both, both), rtol=0, atol=1e-6)


def test_skipped_and_tied_tensors() -> None:
    a, b = state(0), state(1)
    skipped = weight_similarity(a, b, SPEC, "residual", skip=["norm.weight"])
    expected = reference(a["qk.weight"].T, b["qk.weight"].T)
    torch.testing.assert_close(skipped, expected, rtol=0, atol=1e-6)
    tied = Symmetries(SPEC.groups, {"one": SPEC.tensors["qk.weight"], "two": SPEC.tensors["qk.weight"]})
    a, b = (dict.fromkeys(("one", "two"), tensors["qk.weight"]) for tensors in (a, b))
    assert sum(rows.shape[1] for rows in unit_rows(a["one"], tied.tensors["one"], tied, "residual")) == 32
    torch.testing.assert_close(weight_similarity(a, b, tied, "residual"), expected, rtol=0, atol=1e-6)


def test_without_tensors_nothing_is_alike() -> None:
    spec = Symmetries({"heads": Group("heads", 2), "dims": Group("dims", 3, "heads")}, {"w": axes("heads*dims", 4)})
    tensors = {"w": torch.randn(6, 4)}
    assert torch.equal(weight_similarity(tensors, tensors, spec, "heads"), torch.zeros(2, 2))


def test_combine_goes_by_what_there_is() -> None:
    combined = combine({"a": torch.ones(1), "b": torch.ones(1)}, {"b": torch.zeros(1), "c": torch.zeros(1)}, 0.25)
    assert {name: float(value) for name, value in combined.items()} == {"a": 1.0, "b": 0.25, "c": 0.0}


# ---- activations


def hidden(model: nn.Module, data: list[Tensor], last: int) -> Tensor:
    """Outputs of the MLP's layers up to `last`, of shape (units, samples)."""
    with torch.no_grad():
        return torch.cat([model[: last + 1](batch) for batch in data]).T


def test_activations_are_compared_site_by_site() -> None:
    (a, spec, example), (b, *_) = made("mlp"), made("mlp", 1)
    data = batches(example)
    sites = [reference(hidden(a, data, last), hidden(b, data, last)).nan_to_num() for last in (0, 1, 2)]
    # The input of layer 3 is the output of layer 2: one tensor, read once.
    found = activation_similarity(a, b, spec, data)
    torch.testing.assert_close(found["first"], sum(sites) / 3, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["second"], reference(hidden(a, data, 4), hidden(b, data, 4)), rtol=0, atol=1e-5)
    last = activation_similarity(a, b, spec, data, sites="last")
    torch.testing.assert_close(last["first"], sites[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_within_holds_all_four_blocks(name: str) -> None:
    (a, spec, example), (b, *_) = made(name), made(name, 1)
    across = activation_similarity(a, b, spec, batches(example))
    both = activation_similarity(a, b, spec, batches(example), within=True)
    for group, matrix in across.items():
        n = len(matrix)
        torch.testing.assert_close(both[group][:n, n:], matrix, rtol=0, atol=1e-5)
        torch.testing.assert_close(both[group], both[group].T, rtol=0, atol=1e-6)
        own = activation_similarity(a, a, spec, batches(example))[group]
        torch.testing.assert_close(both[group][:n, :n], own, rtol=0, atol=1e-5)


class Masked(nn.Module):
    """Takes keyword arguments, of which a mask tells which positions are real, and calls one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.mix(input=self.mix(self.embed(input_ids)))}


MASKED = Symmetries(
    {"residual": Group("residual", 4)},
    {"embed.weight": axes(11, "residual"), "mix.weight": axes("residual", "residual")},
    sites=(Site("embed", "output", 0, axes(3, 5, "residual")), Site("mix", "input", 0, axes(3, 5, "residual"))),
)


def test_masked_positions_and_labels_do_not_count() -> None:
    torch.manual_seed(0)
    a, b = Masked(), Masked()
    ids, mask = torch.randint(0, 11, (3, 5)), torch.rand(3, 5) < 0.7
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.zeros(3)}
    found = activation_similarity(a, b, MASKED, [batch])["residual"]
    with torch.no_grad():
        rows = [model.embed(ids)[mask].T for model in (a, b)]
        twice = [torch.cat([model.embed(ids)[mask], model.mix(model.embed(ids))[mask]]).T for model in (a, b)]
    expected = (reference(*rows) + reference(*twice)) / 2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_batches_may_be_tensors_tuples_or_mappings() -> None:
    (a, spec, example), (b, *_) = made("mlp"), made("mlp", 1)
    found = [
        activation_similarity(a, b, spec, (make(batch) for batch in batches(example)))
        for make in (lambda x: x, lambda x: (x, "label"), lambda x: [x], lambda x: {"input": x, "labels": 3})
    ]
    for other in found[1:]:
        assert all(torch.equal(other[group], found[0][group]) for group in found[0])


def test_models_are_left_as_they_were() -> None:
    (a, spec, example), (b, *_) = made("conv_batch_norm"), made("conv_batch_norm", 1)
    a.train()
    a[1].eval()
    before = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    activation_similarity(a, b, spec, batches(example))
    assert [module.training for module in a] == [True, False, True, True, True, True] and a.training
    assert all(torch.equal(before[name], tensor) for name, tensor in a.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*a.modules(), *b.modules()))


def test_a_number_that_is_not_finite_is_located() -> None:
    (a, spec, example), (b, *_) = made("mlp"), made("mlp", 1)
    with torch.no_grad():
        b[1].weight[3] = float("nan")
    with pytest.raises(ActivationError, match=r"the second model \(Sequential\): output of 1 holds NaN or Inf"):
        activation_similarity(a, b, spec, batches(example))
    assert not any(module._forward_hooks for module in b.modules())


def test_few_samples_are_warned_of() -> None:
    (a, spec, example), (b, *_) = made("mlp"), made("mlp", 1)
    with pytest.warns(UserWarning, match="7 samples for the 12 units of first: expected at least 12"):
        activation_similarity(a, b, spec, [example[:7]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        activation_similarity(a, b, spec, [example[:7], example[:7]])


def test_each_segment_of_a_fused_layer_is_read() -> None:
    groups = {name: Group(name, size) for name, size in (("keys", 4), ("values", 3), ("other", 2))}
    layouts = linear("0", "keys + 2*other + values + keys", 5)
    sites = (Site("0", "output", 0, axes(30, "keys + 2*other + values + keys")),)
    spec = Symmetries(groups, layouts, sites=sites)
    torch.manual_seed(0)
    a, b, data = nn.Sequential(nn.Linear(5, 15)), nn.Sequential(nn.Linear(5, 15)), torch.randn(30, 5)
    found = activation_similarity(a, b, spec, [data])
    with torch.no_grad():
        rows_a, rows_b = a(data).T, b(data).T
    keys = [reference(rows_a[place : place + 4], rows_b[place : place + 4]) for place in (0, 11)]
    assert found.keys() == {"keys", "values"}
    torch.testing.assert_close(found["keys"], sum(keys) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["values"], reference(rows_a[8:11], rows_b[8:11]), rtol=0, atol=1e-6)


class OneActivation(nn.Module):
    """One ReLU for two layers of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x))))


def test_a_module_without_weights_is_read_at_its_first_call() -> None:
    layouts = linear("first", "units", 3) | linear("second", 4, "units")
    spec = Symmetries({"units": Group("units", 4)}, layouts, sites=(Site("relu", "output", 0, axes(9, "units")),))
    torch.manual_seed(0)
    a, b, data = OneActivation(), OneActivation(), torch.randn(50, 3)
    found = activation_similarity(a, b, spec, [data])["units"]
    with torch.no_grad():
        expected = reference(a.relu(a.first(data)).T, b.relu(b.first(data)).T)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class Routed(nn.Module):
    """Sends to its inner layer only what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(3, 4)
        self.gate = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(x[self.gate(x)[:, 0] > 0])


def test_other_samples_are_not_compared() -> None:
    spec = Symmetries({"units": Group("units", 4)}, {}, sites=(Site("expert", "output", 0, axes(9, "units")),))
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"expert \(output\) saw \d+ and \d+ samples: not compared"):
        assert activation_similarity(Routed(), Routed(), spec, [torch.randn(50, 3)]) == {}


def test_wrong_options() -> None:
    model, spec, example = made("mlp")
    with pytest.raises(OptionError, match="sites is 'first': expected 'all' or 'last'"):
        activation_similarity(model, model, spec, [example], sites="first")
    with pytest.raises(ActivationError, match="no batches"):
        activation_similarity(model, model, spec, [])
