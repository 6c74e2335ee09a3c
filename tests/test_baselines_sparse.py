"""TIES and DARE against cases worked out by hand and against the paper's description, written out."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from emr_hf.baselines import dare_linear, dare_ties, task_arithmetic, ties
from emr_hf.errors import OptionError

MERGES = [ties, dare_linear, dare_ties]


@pytest.fixture
def base():
    return {"a": torch.randn(6, 5), "b": torch.randn(10)}


@pytest.fixture
def finetunes(base):
    return {task: {n: w + torch.randn_like(w) * (1 + (n == "a")) for n, w in base.items()} for task in "xyz"}


def ties_as_published(taus, density):
    """Algorithm 1, an element at a time."""
    trimmed = []
    for tau in taus:
        order = sorted(range(len(tau)), key=lambda i: -abs(tau[i]))
        kept = set(order[: int(density * len(tau))])
        trimmed.append([value if i in kept else 0.0 for i, value in enumerate(tau)])
    merged = []
    for column in zip(*trimmed):
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [value for value in column if value * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged)


def flat(weights, base):
    return torch.cat([(weights[name] - base[name]).reshape(-1) for name in base]).tolist()


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_trims_the_whole_vector_as_published(base, finetunes, density):
    expected = ties_as_published([flat(weights, base) for weights in finetunes.values()], density)
    merged = ties(base, finetunes, density, scale=0.7)
    torch.testing.assert_close(torch.tensor(flat(merged, base)), 0.7 * expected)


def test_ties_can_trim_each_tensor(base, finetunes):
    merged = ties(base, finetunes, 0.3, trim="tensor")
    for name, w in base.items():
        taus = [(weights[name] - w).reshape(-1).tolist() for weights in finetunes.values()]
        torch.testing.assert_close((merged[name] - w).reshape(-1), ties_as_published(taus, 0.3))


def test_ties_by_hand():
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    finetunes = {
        "x": {"a": torch.tensor([4.0, 3.0]), "b": torch.tensor([1.0, 0.5])},
        "y": {"a": torch.tensor([2.0, -5.0]), "b": torch.tensor([0.1, 0.2])},
    }
    by_vector = ties(base, finetunes, 0.5)  # left: (4, 3, 0, 0) and (2, -5, 0, 0)
    assert by_vector["a"].tolist() == [3, -5] and by_vector["b"].tolist() == [0, 0]
    by_tensor = ties(base, finetunes, 0.5, trim="tensor")  # left: (4, 0, 1, 0) and (0, -5, 0, .2)
    assert by_tensor["a"].tolist() == [4, -5]
    torch.testing.assert_close(by_tensor["b"], torch.tensor([1.0, 0.2]))


def test_dare_linear_is_task_arithmetic_on_average(base, finetunes):
    runs = [dare_linear(base, finetunes, 0.5, 0.4, seed) for seed in range(600)]
    expected = task_arithmetic(base, finetunes, 0.4)
    for name in base:
        mean = torch.stack([run[name] for run in runs]).mean(0)
        torch.testing.assert_close(mean, expected[name], rtol=0, atol=0.3)


def test_dare_rescales_what_it_keeps():
    base, tuned = {"w": torch.zeros(4000)}, {"x": {"w": torch.ones(4000)}}
    for merge in (dare_linear, dare_ties):
        merged = merge(base, tuned, 0.25)["w"]
        assert set(merged.tolist()) == {0, 4}
        assert abs((merged != 0).float().mean() - 0.25) < 0.03


@pytest.mark.parametrize("merge", [dare_linear, dare_ties])
def test_dare_is_drawn_from_the_seed_alone(base, finetunes, merge):
    state = torch.get_rng_state()
    first = merge(base, finetunes, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other = merge(base, finetunes, seed=3), merge(base, finetunes, seed=4)
    assert all(torch.equal(first[name], again[name]) for name in base)
    assert any(not torch.equal(first[name], other[name]) for name in base)


def test_nothing_is_dropped_at_density_one(base, finetunes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(dare_linear(base, finetunes, 1.0, 0.4), task_arithmetic(base, finetunes, 0.4))
        torch.testing.assert_close(dare_ties(base, finetunes, 1.0), ties(base, finetunes, 1.0))


@pytest.mark.parametrize("merge", MERGES)
def test_result_is_of_the_base_and_of_what_is_shared(base, finetunes, merge):
    base = {name: w.to(torch.bfloat16) for name, w in base.items()} | {"ids": torch.arange(3), "head": torch.ones(2)}
    before = {name: w.clone() for name, w in base.items()}
    merged = merge(base, finetunes)
    assert {name: (w.shape, w.dtype) for name, w in merged.items()} == {
        "a": ((6, 5), torch.bfloat16),
        "b": ((10,), torch.bfloat16),
    }
    torch.testing.assert_close(base, before, rtol=0, atol=0)


@pytest.mark.parametrize("merge", MERGES)
def test_bad_options(base, finetunes, merge, monkeypatch):
    for density in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(OptionError, match="density="):
            merge(base, finetunes, density)
    with pytest.raises(OptionError, match="at least one finetune"):
        merge(base, {})
    monkeypatch.setitem(sys.modules, "peft.utils", None)
    with pytest.raises(OptionError, match=r"pip install 'emr_hf\[adapters\]'"):
        merge(base, finetunes)


def test_unknown_trim(base, finetunes):
    with pytest.raises(OptionError, match="trim='layer' is unknown: expected one of global, tensor"):
        ties(base, finetunes, trim="layer")
