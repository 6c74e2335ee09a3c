"""The method, against the reference computation and its invariants."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import emr_hf
from emr_hf import bits, election

ORACLES = Path(__file__).parents[2] / "shared" / "oracles"
TASKS = st.integers(1, 6)
SIZES = st.integers(1, 40)


def oracle_names():
    return sorted(folder.name for folder in ORACLES.iterdir()) if ORACLES.is_dir() else ["absent"]


def load_oracle(name):
    if not ORACLES.is_dir():
        pytest.skip(f"the oracles' folder is absent: {ORACLES}")
    folder = ORACLES / name
    count = len(list(folder.glob("task_*.safetensors")))
    finetunes = {str(i): load_file(folder / f"task_{i}.safetensors") for i in range(count)}
    return load_file(folder / "base.safetensors"), finetunes, load_file(folder / "expected.safetensors")


@pytest.mark.parametrize("name", oracle_names())
def test_vector_and_masks_equal_the_reference(name):
    base, finetunes, expected = load_oracle(name)
    merge = emr_hf.merge_state_dicts(base, finetunes)
    assert {f"tau.{n}" for n in merge.tau} == {n for n in expected if n.startswith("tau.")}
    for tensor, tau in merge.tau.items():
        assert torch.equal(tau, expected[f"tau.{tensor}"])
        for task, masks in merge.masks.items():
            assert torch.equal(masks[tensor], expected[f"mask.{task}.{tensor}"].bool())


@pytest.mark.parametrize("name", oracle_names())
@pytest.mark.parametrize("mode", ["global", "tensor_mean"])
def test_rescalers_equal_the_reference(name, mode):
    base, finetunes, expected = load_oracle(name)
    merge = emr_hf.merge_state_dicts(base, finetunes, rescale=mode)
    torch.testing.assert_close(
        torch.tensor(list(merge.rescalers.values()), dtype=torch.float32),
        expected[f"rescaler.{mode}"],
        rtol=1e-6,
        atol=0,
    )


# Random task vectors with zeros, exact sign ties, tiny and large magnitudes.
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-30, -1e-30, 1e-42, 3e8, -3e8]),
    st.floats(-4, 4, width=32, allow_subnormal=True),
)


@st.composite
def task_vectors(draw):
    tasks, size = draw(TASKS), draw(SIZES)
    rows = draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=tasks, max_size=tasks))
    return torch.tensor(rows, dtype=torch.float32)


def exact_sign(column):
    return 1.0 if math.fsum(column) > 0 else -1.0


@given(task_vectors())
@settings(max_examples=100)
def test_the_sign_is_that_of_the_exact_sum(taus):
    exact = [exact_sign(column) for column in taus.T.double().tolist()]
    assert election.sign_of_sum(taus).tolist() == exact


@given(task_vectors(), st.randoms(use_true_random=False))
@settings(max_examples=80)
def test_the_order_of_tasks_changes_nothing_but_the_order(taus, random):
    order = list(range(len(taus)))
    random.shuffle(order)
    base = {"w": torch.zeros(taus.shape[1])}
    first = emr_hf.merge_state_dicts(base, {str(i): {"w": taus[i]} for i in range(len(taus))})
    second = emr_hf.merge_state_dicts(base, {str(i): {"w": taus[i]} for i in order})
    assert torch.equal(first.tau["w"], second.tau["w"])
    assert first.rescalers == second.rescalers
    assert all(torch.equal(first.masks[t]["w"], second.masks[t]["w"]) for t in first.masks)


@given(task_vectors())
@settings(max_examples=100)
def test_masks_never_enlarge_the_distance_and_are_empty_where_nothing_moved(taus):
    tau = election.elect(taus)
    for tau_t in taus:
        mask = election.mask(tau_t, tau)
        masked = torch.where(mask, tau, 0)
        assert ((tau_t - masked).abs() <= (tau_t - tau).abs()).all()
        assert not mask[tau_t == 0].any()
        assert (tau_t[mask].sign() == tau[mask].sign()).all()


@given(task_vectors())
@settings(max_examples=80)
def test_the_vector_has_the_largest_magnitude_of_the_elected_sign(taus):
    tau = election.elect(taus)
    for element, column in zip(tau.tolist(), taus.T.tolist()):
        sign = exact_sign(column)
        agreeing = [abs(v) for v in column if v * sign > 0]
        assert element == sign * max(agreeing, default=0.0)


def test_a_sum_of_exactly_zero_elects_the_negative_sign_as_the_reference_does():
    taus = torch.tensor([[1.0, 0.5, 0.0], [-1.0, 0.25, 0.0], [0.0, -0.75, -0.0]])
    assert election.elect(taus).tolist() == [-1.0, -0.75, 0.0]
    assert not election.elect(taus).signbit()[2]


def test_cancellation_beyond_float64_is_summed_exactly():
    taus = torch.tensor([[1e20], [1.0], [-1e20]])
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        assert election.sign_of_sum(taus[order]).tolist() == [1.0]


def test_small_half_precision_differences_are_not_lost():
    base = {"w": torch.zeros(2, dtype=torch.float16)}
    tiny = torch.tensor([1e-4, -1e-4], dtype=torch.float16)  # their product is 0 in float16
    merge = emr_hf.merge_state_dicts(base, {"a": {"w": tiny}, "b": {"w": tiny * 2}})
    assert merge.masks["a"]["w"].all()
    assert merge.masks["b"]["w"].all()


def test_the_papers_rescaler_is_not_the_least_squares_one():
    merge = emr_hf.merge_state_dicts(
        {"w": torch.zeros(2)}, {"a": {"w": torch.tensor([1.0, -0.9])}, "b": {"w": torch.tensor([0.0, 1.0])}}
    )
    assert merge.rescalers["a"] == pytest.approx(1.9)
    assert merge.sums["a"].relative_error(merge.rescalers["a"]) ** 2 * (1 + 0.81) == pytest.approx(1.62)


def test_an_all_zero_task_vector_has_rescaler_one_and_an_empty_mask():
    base = {"w": torch.ones(5)}
    merge = emr_hf.merge_state_dicts(base, {"same": base, "other": {"w": torch.arange(5.0)}})
    assert merge.rescalers["same"] == 1.0
    assert not merge.masks["same"]["w"].any()
    assert merge.sums["same"].relative_error(1.0) == 0.0


def elected_in_blocks(base, finetunes, blocks, tau_dtype=torch.float32):
    """Vector, masks and sums of a tensor, block by block; each block is a number of units."""
    tau = torch.empty(base.shape, dtype=tau_dtype)
    masks = [torch.empty(bits.packed_size(len(base)), dtype=torch.uint8) for _ in finetunes]
    tensor = election.TensorElection(base, finetunes)
    starts = [0, *itertools.accumulate(units * election.UNIT for units in blocks)]
    parts = []
    for start, stop in itertools.pairwise(starts):
        block = slice(start, min(stop, len(base)))
        packed = slice(start // 8, bits.packed_size(block.stop))
        parts.append(tensor.run(block, tau[block], [mask[packed] for mask in masks]))
    return tau, masks, election.TensorSums.total(parts[::-1])


@pytest.mark.parametrize("tau_dtype", [torch.float32, torch.bfloat16])
def test_neither_blocks_nor_their_order_show(tau_dtype):
    size = election.UNIT * 3 + 1029
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(size, generator=generator)
    finetunes = [base + torch.randn(size, generator=generator) for _ in range(3)]
    whole = elected_in_blocks(base, finetunes, [4], tau_dtype)
    for blocks in ([1, 1, 1, 1], [2, 2], [1, 3]):
        tau, masks, sums = elected_in_blocks(base, finetunes, blocks, tau_dtype)
        assert torch.equal(tau, whole[0])
        assert all(torch.equal(*pair) for pair in zip(masks, whole[1]))
        assert sums == whole[2]
    taus = torch.stack([election.task_vector(f, base) for f in finetunes])
    assert torch.equal(whole[0], election.elect(taus).to(tau_dtype))


@given(st.lists(values, min_size=1, max_size=3 * election.SEGMENT), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_whole_sums_have_no_order_and_are_right(values, random):
    segments = election.in_segments(torch.tensor(values).abs())
    scale = election.scales(segments.amax(-1))
    terms, units = segments * scale[:, None], 1 / scale.double()
    assert float(terms.max()) < 1
    total = election.whole_sums(terms, units)
    shuffled = torch.stack([part[random.sample(range(len(part)), len(part))] for part in terms])
    assert torch.equal(total, election.whole_sums(shuffled, units))
    bound = (units * election.SEGMENT * 2.0**-27).sum()
    assert float(total.sum()) == pytest.approx(
        math.fsum(segments.double().flatten().tolist()), abs=float(bound), rel=0
    )


def test_sums_of_a_real_size_are_those_of_float64():
    tau = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 1e-3
    merge = emr_hf.merge_state_dicts({"w": torch.zeros(1 << 20)}, {"a": {"w": tau}, "b": {"w": tau.roll(1)}})
    for task, vector in (("a", tau), ("b", tau.roll(1))):
        sums, kept = merge.sums[task], merge.tau["w"].double() * merge.masks[task]["w"]
        expected = {
            "abs_tau": vector.double().abs().sum(),
            "abs_kept": kept.abs().sum(),
            "square_tau": vector.double().square().sum(),
            "square_kept": kept.square().sum(),
            "product": (vector * kept).sum(),
        }
        assert {name: getattr(sums, name) for name in expected} == pytest.approx(
            {name: float(value) for name, value in expected.items()}, rel=1e-9
        )


def test_what_is_not_shared_is_private():
    base = {"w": torch.zeros(3), "ids": torch.arange(3), "head": torch.zeros(2)}
    finetune = {"w": torch.ones(3), "ids": torch.arange(3), "head": torch.zeros(4), "extra": torch.ones(1)}
    merge = emr_hf.merge_state_dicts(base, {"a": finetune})
    assert list(merge.tau) == ["w"]
    assert merge.private == {"a": ["ids", "head", "extra"]}


@pytest.mark.parametrize("where", ["base", "b"])
def test_a_nan_is_located(where):
    base, finetunes = {"w": torch.zeros(2, 3)}, {"a": {"w": torch.ones(2, 3)}, "b": {"w": torch.ones(2, 3)}}
    (base if where == "base" else finetunes[where])["w"][1, 2] = torch.nan
    with pytest.raises(emr_hf.NonFiniteError, match=rf"{where}: w\[1, 2\] is nan"):
        emr_hf.merge_state_dicts(base, finetunes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (({"w": torch.zeros(2)}, {}), "at least one finetune"),
        (({"w": torch.zeros(2)}, {"a": {"v": torch.zeros(2)}}), "no floating-point tensor in common"),
        (({"w": torch.zeros(2)}, {"a": {"w": torch.zeros(2)}}, "median"), "rescale='median' is unknown"),
    ],
)
def test_unusable_arguments(arguments, message):
    with pytest.raises(emr_hf.OptionError, match=message):
        emr_hf.merge_state_dicts(*arguments)


@given(st.integers(0, 70), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_masks_pack_to_one_bit(size, random):
    mask = torch.tensor([random.random() < 0.5 for _ in range(size)], dtype=torch.bool)
    packed = bits.pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(size / 8),)
    assert torch.equal(bits.unpack(packed, mask.shape), mask)
    assert [bool(packed[i // 8] >> (i % 8) & 1) for i in range(size)] == mask.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (13,), (7, 13), (3, 1 << 15)])
def test_rebuild_is_the_formula_rounded_once(dtype, shape):
    base = torch.randn(shape).to(dtype)
    base.view(-1)[0] = -0.0
    tau, mask, scale = torch.randn(shape), torch.rand(shape) > 0.5, torch.tensor(0.87)
    mask.view(-1)[0] = False
    expected = torch.where(mask, base.float() + scale * tau, base.float()).to(dtype)
    rebuilt = bits.rebuild(base, tau, bits.pack(mask), scale)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(rebuilt.view(integer), expected.view(integer))


def test_rebuild_writes_through_a_transposed_view():
    storage = torch.zeros(4, 3)
    base, tau, mask = torch.randn(3, 4), torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    bits.rebuild(base, tau, bits.pack(mask), torch.tensor(1.0), out=storage.T)
    assert torch.equal(storage.T, base + tau)


@given(st.data())
@settings(max_examples=80)
def test_one_bfloat16_finetune_comes_back_bit_for_bit(data):
    """Exact wherever a weight shrank by less than 2**15, or to zero: float32 holds both ends of such a step."""
    size = data.draw(SIZES)
    floats = st.floats(-1e4, 1e4, width=16, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 2**-8)
    draw = st.lists(floats, min_size=size, max_size=size)
    base, finetune = (torch.tensor(data.draw(draw), dtype=torch.bfloat16) for _ in range(2))
    finetune = torch.where(finetune.abs().float() * 2**15 < base.abs().float(), 0, finetune)
    merge = emr_hf.merge_state_dicts({"w": base}, {"a": {"w": finetune}})
    assert merge.rescalers["a"] == 1.0
    packed = bits.pack(merge.masks["a"]["w"])
    assert torch.equal(bits.rebuild(base, merge.tau["w"], packed, torch.tensor(1.0)), finetune)
