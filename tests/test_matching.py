"""Assignments against brute force, and the recovery of models whose units were put in another order."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor, nn

from emr_hf.alignment.layout import Axis, Group, Permutation, Site, Symmetries
from emr_hf.alignment.matching import assign, match, match_all, match_tree
from emr_hf.alignment.similarity import activation_similarity, weight_similarity
from emr_hf.errors import MismatchError, NonFiniteError, OptionError


def axes(*described: str | int) -> tuple[Axis, ...]:
    """A layout as one writes it: `"heads*dims"`, `"a + b"`, `7`."""
    return tuple(
        tuple(
            tuple(int(part) if part.isdigit() else part for part in piece.split("*"))
            for piece in str(axis).split(" + ")
        )
        for axis in described
    )


def linear(name: str, out: str | int, into: str | int, bias: bool = True) -> dict[str, tuple[Axis, ...]]:
    return {f"{name}.weight": axes(out, into)} | ({f"{name}.bias": axes(out)} if bias else {})


def contracted(layouts: dict[str, tuple[Axis, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: (1,) for name, layout in layouts.items() if len(layout) > 1}


def mlp() -> tuple[nn.Module, Symmetries, Tensor]:
    model = nn.Sequential(
        nn.Linear(6, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)
    )
    layouts = linear("0", "first", 6) | {"1.weight": axes("first"), "1.bias": axes("first")}
    layouts |= linear("3", "second", "first") | linear("5", 3, "second")
    groups = {"first": Group("first", 12), "second": Group("second", 10)}
    sites = [Site(str(place), "output", 0, axes(40, "first")) for place in (0, 1, 2)]
    sites += [Site("3", "input", 0, axes(40, "first")), Site("5", "input", 0, axes(40, "second"))]
    return model, Symmetries(groups, layouts, contracted(layouts), tuple(sites)), torch.randn(40, 6)


class Attention(nn.Module):
    """Four heads of 5, of which `heads // shared` have their own keys and values."""

    def __init__(self, shared: int = 1, fused: bool = False):
        super().__init__()
        self.key_heads, self.shared, self.fused = 4 // shared, shared, fused
        self.embed, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.sizes = [20, 20 // shared, 20 // shared]
        if fused:
            self.qkv = nn.Linear(8, sum(self.sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(8, size) for size in self.sizes)
        self.bias = nn.Parameter(torch.randn(4))
        self.o = nn.Linear(20, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        residual = self.embed(hidden)
        x = self.norm(residual)
        parts = self.qkv(x).split(self.sizes, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, 5)).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(self.shared, 1) for part in (k, v))
        steps = torch.arange(x.shape[1])
        scores = q @ k.transpose(-1, -2) - self.bias[:, None, None] * (steps[:, None] - steps)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head((residual + self.o(mixed)).mean(1))


def attention() -> tuple[nn.Module, Symmetries, Tensor]:
    layouts = linear("embed", "residual", 6) | {"norm.weight": axes("residual"), "norm.bias": axes("residual")}
    for name, dims in (("q", "dims"), ("k", "dims"), ("v", "values")):
        layouts |= linear(name, f"heads*{dims}", "residual")
    layouts |= linear("o", "residual", "heads*values") | linear("head", 3, "residual") | {"bias": axes("heads")}
    groups = [Group("residual", 8), Group("heads", 4), Group("dims", 5, "heads"), Group("values", 5, "heads")]
    sites = [Site(name, "output", 0, axes(8, 7, "heads*dims")) for name in "qk"]
    sites += [Site("v", "output", 0, axes(8, 7, "heads*values")), Site("q", "input", 0, axes(8, 7, "residual"))]
    sites += [Site("k", "input", 0, axes(8, 7, "residual")), Site("head", "input", 0, axes(8, "residual"))]
    spec = Symmetries({group.name: group for group in groups}, layouts, contracted(layouts), tuple(sites))
    return Attention(), spec, torch.randn(8, 7, 6)


def grouped_attention() -> tuple[nn.Module, Symmetries, Tensor]:
    layouts = linear("embed", "residual", 6) | {"norm.weight": axes("residual"), "norm.bias": axes("residual")}
    layouts |= linear("qkv", "keys*queries*dims + keys*dims + keys*values", "residual") | {
        "bias": axes("keys*queries")
    }
    layouts |= linear("o", "residual", "keys*queries*values") | linear("head", 3, "residual")
    groups = [Group("residual", 8), Group("keys", 2), Group("queries", 2, "keys")]
    groups += [Group("dims", 5, "keys"), Group("values", 5, "keys")]
    sites = (Site("head", "input", 0, axes(8, "residual")), Site("norm", "output", 0, axes(8, 7, "residual")))
    spec = Symmetries({group.name: group for group in groups}, layouts, contracted(layouts), sites)
    return Attention(shared=2, fused=True), spec, torch.randn(8, 7, 6)


def conv_batch_norm() -> tuple[nn.Module, Symmetries, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 10, 3),
        nn.BatchNorm2d(10),
        nn.ReLU(inplace=True),
        nn.Conv2d(10, 8, 3),
        nn.Flatten(1),
        nn.Linear(32, 2),
    )
    norm = {f"1.{name}": axes("first") for name in ("weight", "bias", "running_mean", "running_var")}
    layouts = {"0.weight": axes("first", 3, 3, 3), "0.bias": axes("first")} | norm
    layouts |= {"3.weight": axes("second", "first", 3, 3), "3.bias": axes("second"), "5.weight": axes(2, "second*4")}
    layouts |= {"5.bias": axes(2)}
    groups = {"first": Group("first", 10), "second": Group("second", 8)}
    sites = [Site(str(place), "output", 0, axes(9, "first", 4, 4)) for place in (0, 1, 2)]
    sites += [Site("3", "output", 0, axes(9, "second", 2, 2))]
    for buffer in (model[1].running_mean, model[1].running_var):
        buffer.uniform_(0.5, 1.5)
    return model, Symmetries(groups, layouts, contracted(layouts), tuple(sites)), torch.randn(9, 3, 6, 6)


def group_norm() -> tuple[nn.Module, Symmetries, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 2, 2))
    layouts = {"0.weight": axes("blocks*channels", 3, 3, 3), "0.bias": axes("blocks*channels")}
    layouts |= {"1.weight": axes("blocks*channels"), "1.bias": axes("blocks*channels")}
    layouts |= {"3.weight": axes(2, "blocks*channels", 2, 2), "3.bias": axes(2)}
    groups = {"blocks": Group("blocks", 4), "channels": Group("channels", 3, "blocks")}
    sites = (Site("1", "output", 0, axes(9, "blocks*channels", 4, 4)),)
    return model, Symmetries(groups, layouts, contracted(layouts), sites), torch.randn(9, 3, 6, 6)


MODELS = {
    make.__name__: make for make in (mlp, attention, grouped_attention, conv_batch_norm, group_norm)
}  # each a model, its symmetries and an input


def made(name: str, seed: int = 0) -> tuple[nn.Module, Symmetries, Tensor]:
    """A model all of whose parameters are random, norms' too."""
    torch.manual_seed(seed)
    model, spec, example = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval(), spec, example


def shuffled(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module, Symmetries, Tensor, Permutation]:
    """A model, and the same with its units in another order."""
    model, spec, example = made(name, seed)
    permutation = spec.random(torch.Generator().manual_seed(seed))
    other = MODELS[name]()[0].eval()
    other.load_state_dict(spec.permute(model.state_dict(), permutation))
    return model, other, spec, example, permutation


def batches(example: Tensor, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(example.shape, generator=generator) for _ in range(count)]


def equal(a: Permutation, b: Permutation) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- assignments


@pytest.mark.parametrize("seed", range(8))
def test_assign_is_the_best_of_all_permutations(seed: int) -> None:
    similarity = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))
    best = max(itertools.permutations(range(5)), key=lambda p: sum(similarity[i, j] for i, j in enumerate(p)))
    assert assign(similarity).tolist() == list(best)


NESTED = Symmetries(
    {"heads": Group("heads", 2), "dims": Group("dims", 3, "heads"), "parts": Group("parts", 2, "heads")}, {}
)
DEEP = Symmetries({"a": Group("a", 2), "b": Group("b", 2, "a"), "c": Group("c", 2, "b")}, {})


def every_permutation(spec: Symmetries) -> list[Permutation]:
    def orders(name: str) -> list[Tensor]:
        *outer, size = spec.shape(name)
        single = list(itertools.permutations(range(size)))
        places = int(torch.tensor(outer).prod()) if outer else 1
        return [torch.tensor(rows).view(spec.shape(name)) for rows in itertools.product(single, repeat=places)]

    return [dict(zip(spec.groups, choice)) for choice in itertools.product(*map(orders, spec.groups))]


def matched(spec: Symmetries, similarities: dict[str, Tensor], permutation: Permutation) -> float:
    """The mean similarity of matched units, by permuting the second model's units."""
    total, units = 0.0, 0
    for name, matrix in similarities.items():
        layout = (((len(matrix),),), (spec.chain(name),))
        diagonal = spec.permute_tensor(matrix, layout, permutation).diagonal()
        total, units = total + float(diagonal.sum()), units + len(diagonal)
    return total / units


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("without", [None, "heads", "parts"])
def test_nested_matching_is_the_best_of_all_permutations(seed: int, without: str | None) -> None:
    check_against_all(NESTED, "heads", seed, without)


@pytest.mark.parametrize("seed", range(3))
def test_three_levels_are_matched_best(seed: int) -> None:
    check_against_all(DEEP, "a", seed, None)


def check_against_all(spec: Symmetries, root: str, seed: int, without: str | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    similarities = {}
    for name in spec.groups:
        units = int(torch.tensor(spec.shape(name)).prod())
        if name != without:
            similarities[name] = torch.randn(units, units, generator=generator, dtype=torch.float64)
    permutation, value = match_tree(spec, root, similarities)
    assert {name: tuple(order.shape) for name, order in permutation.items()} == {
        name: spec.shape(name) for name in spec.groups
    }
    assert value == pytest.approx(matched(spec, similarities, permutation))
    assert value == pytest.approx(max(matched(spec, similarities, other) for other in every_permutation(spec)))


def test_a_group_without_evidence_keeps_its_order() -> None:
    permutation, value = match_tree(NESTED, "heads", {})
    assert equal(permutation, NESTED.identity()) and value == 0


# ---- recovery


@pytest.mark.parametrize("name", MODELS)
def test_the_toy_symmetries_keep_the_function(name: str) -> None:
    model, other, _, example, _ = shuffled(name)
    torch.testing.assert_close(model(example), other(example), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("source", ["weights", "inner", 0.0, 0.3, 1.0])
def test_a_shuffled_copy_is_recovered(name: str, source: str | float) -> None:
    model, other, spec, example, permutation = shuffled(name)
    most = 1.0
    states = model.state_dict(), other.state_dict()
    if source == "inner":
        matching = match(*states, spec, weight=1.0, measure="inner")
    elif source == "weights":
        matching = match(*states, spec)
    else:
        activation = activation_similarity(model, other, spec, batches(example))
        matching = match(*states, spec, activation, source)
        with_itself = activation_similarity(model, model, spec, batches(example))
        most = match(states[0], states[0], spec, with_itself, source).objective[0]
    assert equal(spec.compose(permutation, matching.permutation), spec.identity())
    recovered = spec.permute(other.state_dict(), matching.permutation)
    assert all(torch.equal(recovered[key], tensor) for key, tensor in model.state_dict().items())
    assert matching.objective[-1] == pytest.approx(most, abs=1e-5)


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_activations_alone_need_no_sweep(name: str) -> None:
    (model, spec, example), (other, *_) = made(name), made(name, 1)
    activation = activation_similarity(model, other, spec, batches(example))
    matching = match(model.state_dict(), other.state_dict(), spec, activation, 0.0)
    assert matching.sweeps == 0
    for root in spec.children(None):
        found, _ = match_tree(spec, root, activation)
        assert equal(found, {name: matching.permutation[name] for name in found})


def test_without_activations_of_a_group_its_weights_decide() -> None:
    (model, spec, example), (other, *_) = made("mlp"), made("mlp", 1)
    activation = activation_similarity(model, other, spec, batches(example))
    second = activation.pop("second")
    matching = match(model.state_dict(), other.state_dict(), spec, activation, 0.0)
    assert matching.sweeps > 0 and torch.equal(matching.permutation["first"], assign(activation["first"]))
    assert not torch.equal(matching.permutation["second"], assign(second))


@pytest.mark.parametrize("options", [{"weight": 0.3}, {"weight": 0.0}, {"weight": 1.0}])
def test_several_shuffled_copies_are_recovered(options: dict[str, float]) -> None:
    model, spec, example = made("attention")
    permutations = [spec.identity(), *(spec.random(torch.Generator().manual_seed(seed)) for seed in range(2))]
    models = []
    for permutation in permutations:
        models.append(MODELS["attention"]()[0])
        models[-1].load_state_dict(spec.permute(model.state_dict(), permutation))
    activations = {
        pair: activation_similarity(models[pair[0]], models[pair[1]], spec, batches(example))
        for pair in itertools.combinations(range(3), 2)
    }
    matching = match_all([other.state_dict() for other in models], spec, activations, **options)
    for applied, found in zip(permutations, matching.permutations):
        assert equal(spec.compose(applied, found), spec.identity())


# ---- sweeps


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"measure": "inner"}])
def test_the_objective_never_falls(name: str, options: dict[str, str]) -> None:
    (model, spec, _), (other, *_) = made(name), made(name, 1)
    matching = match(model.state_dict(), other.state_dict(), spec, max_sweeps=20, weight=1.0, **options)
    assert all(later >= earlier for earlier, later in itertools.pairwise(matching.objective))
    assert len(matching.objective) == matching.sweeps + 1 <= 21
    assert matching.objective[-1] > matching.objective[0]


def test_the_best_state_is_returned() -> None:
    """The objective that is reported is that of the permutation."""
    (model, spec, example), (other, *_) = made("mlp"), made("mlp", 1)
    activation = activation_similarity(model, other, spec, batches(example))
    matching = match(model.state_dict(), other.state_dict(), spec, activation, 0.5)
    aligned = nn.Sequential(*MODELS["mlp"]()[0]).eval()
    aligned.load_state_dict(spec.permute(other.state_dict(), matching.permutation))
    again = activation_similarity(model, aligned, spec, batches(example))
    diagonals = []
    for name in spec.groups:
        weights = weight_similarity(model.state_dict(), aligned.state_dict(), spec, name)
        diagonals.append((weights + again[name]).diagonal() / 2)
    assert matching.sweeps > 0
    assert matching.objective[-1] == pytest.approx(float(torch.cat(diagonals).mean()), abs=1e-5)


def test_a_seed_decides() -> None:
    (model, spec, _), (other, *_) = made("attention"), made("attention", 1)
    runs = [match(model.state_dict(), other.state_dict(), spec, seed=seed) for seed in (3, 3)]
    assert equal(runs[0].permutation, runs[1].permutation) and runs[0].objective == runs[1].objective


def test_inner_products_rise_with_every_sweep() -> None:
    """Git re-basin's potential: each step solves one group of the sum of all inner products."""
    for seed in range(5):
        (model, spec, _), (other, *_) = made("mlp", seed), made("mlp", seed + 50)
        matching = match(model.state_dict(), other.state_dict(), spec, weight=1.0, measure="inner")
        assert all(later > earlier for earlier, later in itertools.pairwise(matching.objective))


# ---- errors


def test_heads_of_other_shapes_have_to_be_skipped() -> None:
    model, other, spec, _, permutation = shuffled("mlp")
    state = dict(other.state_dict()) | {"5.weight": torch.randn(4, 10), "5.bias": torch.randn(4)}
    with pytest.raises(MismatchError, match=r"5.weight has shape \(3, 10\) in one model and \(4, 10\)"):
        match(model.state_dict(), state, spec)
    matching = match(model.state_dict(), state, spec, skip=["5.weight", "5.bias"])
    assert equal(spec.compose(permutation, matching.permutation), spec.identity())


def test_a_weight_that_is_not_finite_is_located() -> None:
    model, spec, _ = made("mlp")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["3.weight"][1, 2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"model 1: 3.weight\[1, 2\] is inf"):
        match(model.state_dict(), state, spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, "weight is 1.5: expected a number from 0 to 1"),
        ({"measure": "cosine"}, "measure is 'cosine': expected 'pearson' or 'inner'"),
        ({"measure": "inner", "activation": {}}, "expected none"),
        ({"activation": {"first": torch.zeros(3, 3)}}, r"first is \(3, 3\): expected \(12, 12\)"),
        ({"activation": {"third": torch.zeros(3, 3)}}, "third is"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    model, spec, _ = made("mlp")
    with pytest.raises(OptionError, match=message):
        match(model.state_dict(), model.state_dict(), spec, **options)


def test_assign_refuses_what_is_not_finite_or_square() -> None:
    with pytest.raises(OptionError, match="square matrix of finite numbers"):
        assign(torch.tensor([[0.0, float("nan")], [0.0, 0.0]]))
    with pytest.raises(OptionError, match=r"\(2, 3\)"):
        assign(torch.zeros(2, 3))


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(OptionError, match=r"emr_hf\[align\]"):
        assign(torch.eye(2))
