"""BitDelta and ternary task vectors: weights and bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emr_hf.baselines import bitdelta, ternary
from emr_hf.errors import OptionError, UnknownTaskError

MATRIX, NORM, WORDS = "layer.0.dense.weight", "layer.0.norm.weight", "embeddings.word.weight"


@pytest.fixture
def base():
    return {MATRIX: torch.randn(3, 5), NORM: torch.randn(5), WORDS: torch.randn(7, 5)}


@pytest.fixture
def finetunes(base):
    return {task: {name: w + torch.randn_like(w) for name, w in base.items()} for task in "xy"}


def test_bitdelta_by_hand():
    base = {"h.0.w.weight": torch.ones(2, 2)}
    tasks = bitdelta(base, {"x": {"h.0.w.weight": torch.tensor([[2.0, -2.0], [1.0, 5.0]])}})
    assert tasks.rebuild("x")["h.0.w.weight"].tolist() == [[3, -1], [3, 3]]  # deltas 1, -3, 0, 4
    assert tasks.nbytes == 1 + 4


def test_bitdelta_keeps_all_but_matrices_of_blocks(base, finetunes):
    tasks = bitdelta(base, finetunes)
    for task, weights in finetunes.items():
        rebuilt = tasks.rebuild(task)
        assert torch.equal(rebuilt[NORM], weights[NORM]) and torch.equal(rebuilt[WORDS], weights[WORDS])
        tau = weights[MATRIX] - base[MATRIX]
        torch.testing.assert_close(rebuilt[MATRIX], base[MATRIX] + tau.sign() * tau.abs().mean())
    assert tasks.nbytes == 2 * (2 + 4 + 5 * 4 + 35 * 4)


def test_bitdelta_of_every_tensor(base, finetunes):
    tasks = bitdelta(base, finetunes, every_tensor=True)
    assert tasks.nbytes == 2 * (2 + 1 + 5 + 3 * 4)
    tau = finetunes["y"][NORM] - base[NORM]
    torch.testing.assert_close(tasks.rebuild("y")[NORM], base[NORM] + tau.sign() * tau.abs().mean())


@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=20), st.floats(-1, 1))
def test_bitdelta_has_the_best_scale_for_its_signs(values, step):
    tau = torch.tensor(values)
    delta = bitdelta({"w": torch.zeros_like(tau)}, {"x": {"w": tau}}, every_tensor=True).rebuild("x")["w"]
    signs = torch.where(tau < 0, -1.0, 1.0)
    error, other = (tau - delta).square().sum(), (tau - delta - step * signs).square().sum()
    assert error <= other + 1e-4


def test_ternary_by_hand():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    finetune = {"a": torch.tensor([3.0, -4.0, 1.0, 0.0]), "b": torch.tensor([5.0, 0.1, 0.2, -0.3])}
    by_tensor = ternary(base, {"x": finetune}, 0.5)
    first = 12.5**0.5
    torch.testing.assert_close(by_tensor.rebuild("x")["a"], torch.tensor([first, -first, 0, 0]))
    assert by_tensor.nbytes == 2 * (1 + 1 + 4)
    by_task = ternary(base, {"x": finetune}, 0.375, "task")  # left: 3, -4, 5
    scale = (50 / 3) ** 0.5
    torch.testing.assert_close(by_task.rebuild("x")["a"], torch.tensor([scale, -scale, 0, 0]))
    torch.testing.assert_close(by_task.rebuild("x")["b"], torch.tensor([scale, 0, 0, 0]))
    assert by_task.nbytes == 2 * (1 + 1) + 4


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ternary_keeps_exactly_the_largest_magnitudes(density):
    tau = torch.randn(9, 11)
    delta = ternary({"w": torch.zeros(9, 11)}, {"x": {"w": tau}}, density).rebuild("x")["w"]
    count = int(density * 99)
    kept = delta != 0
    assert kept.sum() == count
    assert kept.all() or tau[kept].abs().min() > tau[~kept].abs().max()
    assert torch.equal(delta.sign()[kept], tau.sign()[kept])
    torch.testing.assert_close(delta.norm(), tau[kept].norm())


def test_equal_magnitudes_are_not_all_kept():
    delta = ternary({"w": torch.zeros(8)}, {"x": {"w": torch.ones(8)}}, 0.5).rebuild("x")["w"]
    assert sorted(delta.tolist()) == [0] * 4 + [1] * 4


@pytest.mark.parametrize("compress", [bitdelta, ternary])
def test_a_finetune_that_did_not_move_is_the_base(base, compress):
    rebuilt = compress(base, {"x": base}).rebuild("x")
    assert all(torch.equal(rebuilt[name], w) for name, w in base.items())


@pytest.mark.parametrize("compress", [bitdelta, ternary])
def test_result_is_of_the_base_and_of_what_is_shared(base, finetunes, compress):
    base = {name: w.to(torch.bfloat16) for name, w in base.items()} | {
        "ids": torch.arange(3),
        "none": torch.ones(0).bfloat16(),
    }
    for weights in finetunes.values():
        weights |= {"none": torch.ones(0), "own": torch.ones(1)}
    tasks = compress(base, finetunes)
    rebuilt = tasks.rebuild("x")
    assert rebuilt.keys() == base.keys() - {"ids"}
    assert all(w.shape == base[name].shape and w.dtype == torch.bfloat16 for name, w in rebuilt.items())
    rebuilt[MATRIX].zero_(), rebuilt[NORM].zero_()
    assert all(tasks.rebuild("x")[name].any() for name in (MATRIX, NORM))


def test_bad_options(base, finetunes):
    for density in (0, 1.5, float("nan")):
        with pytest.raises(OptionError, match="density="):
            ternary(base, finetunes, density)
    with pytest.raises(OptionError, match="scale_per='row' is unknown"):
        ternary(base, finetunes, scale_per="row")
    for compress in (bitdelta, ternary):
        with pytest.raises(OptionError, match="at least one finetune"):
            compress(base, {})
    with pytest.raises(UnknownTaskError, match="holds: x, y"):
        bitdelta(base, finetunes).rebuild("z")
