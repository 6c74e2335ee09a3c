"""Weight average and task arithmetic against their formulas, written out."""

from __future__ import annotations

import doctest

import pytest
import torch

from emr_hf.baselines import linear, task_arithmetic, weight_average
from emr_hf.election import shared_names
from emr_hf.errors import OptionError


@pytest.fixture
def base():
    return {"a": torch.randn(3, 4), "b": torch.randn(5)}


@pytest.fixture
def finetunes(base):
    return {task: {name: w + torch.randn_like(w) for name, w in base.items()} for task in ("x", "y", "z")}


def test_weight_average_is_the_mean(base, finetunes):
    merged = weight_average(base, finetunes)
    for name in base:
        expected = (finetunes["x"][name] + finetunes["y"][name] + finetunes["z"][name]) / 3
        torch.testing.assert_close(merged[name], expected)


def test_task_arithmetic_adds_scaled_task_vectors(base, finetunes):
    merged = task_arithmetic(base, finetunes, 0.4)
    for name, w in base.items():
        torch.testing.assert_close(merged[name], w + 0.4 * sum(f[name] - w for f in finetunes.values()))


def test_one_finetune_at_scale_one_is_that_finetune(base, finetunes):
    merged = task_arithmetic(base, {"x": finetunes["x"]}, 1.0)
    torch.testing.assert_close(merged, finetunes["x"])


def test_scale_zero_is_the_base(base, finetunes):
    assert all(torch.equal(w, base[name]) for name, w in task_arithmetic(base, finetunes, 0.0).items())


def test_merges_only_what_all_share(base, finetunes):
    base |= {"head": torch.ones(2, 4), "missing": torch.ones(2), "ids": torch.arange(4), "mixed": torch.ones(2)}
    for i, weights in enumerate(finetunes.values()):
        weights |= {"head": torch.ones(2 + i, 4), "ids": torch.arange(4), "own": torch.ones(1)}
        weights["mixed"] = torch.ones(2) if i else torch.ones(2, dtype=torch.int64)
        if i:
            weights["missing"] = torch.ones(2)
    assert shared_names(base, finetunes) == ["a", "b"]
    assert weight_average(base, finetunes).keys() == {"a", "b"}


def test_result_has_the_base_dtype_and_is_summed_in_float32():
    # In bfloat16 each single step of 2 ** -9 would be rounded away.
    base = {"w": torch.ones(1, dtype=torch.bfloat16)}
    finetunes = {str(t): {"w": torch.full((1,), 1 + 2**-9)} for t in range(8)}
    merged = task_arithmetic(base, finetunes, 1.0)["w"]
    assert merged.dtype == torch.bfloat16
    assert merged.item() == 1 + 8 * 2**-9


def test_inputs_are_left_alone(base, finetunes):
    before = {name: w.clone() for name, w in base.items()}
    task_arithmetic(base, finetunes, 0.3)
    torch.testing.assert_close(base, before, rtol=0, atol=0)


@pytest.mark.parametrize("merge", [weight_average, lambda base, finetunes: task_arithmetic(base, finetunes, 0.3)])
def test_no_finetune_is_an_error(base, merge):
    with pytest.raises(OptionError, match="at least one finetune"):
        merge(base, {})


def test_example_in_the_docstring():
    result = doctest.testmod(linear)
    assert result.attempted and not result.failed
