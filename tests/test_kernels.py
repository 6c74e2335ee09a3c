"""The compiled loops give the bits of the torch code, which is their definition."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emr_hf import bits, election, kernels
from emr_hf.errors import NonFiniteError, OptionError

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the compiled loops were not built (no C++ compiler)")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = {"plain": 0, "fastest": 1}
EDGE = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-4, -1e-4, 0.5, 1.0, -1.0, 1 + 2**-7, 3e4, -3e4]


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setattr(kernels, "_level", LEVELS[request.param])


def outputs(base, finetunes, tau_dtype):
    masks = [torch.full((bits.packed_size(len(base)),), 255, dtype=torch.uint8) for _ in finetunes]
    return torch.full(base.shape, 7.0, dtype=tau_dtype), masks


def elect(base, finetunes, tau_dtype):
    """By the compiled loop; the definition is left to say what is wrong with bad input."""
    tau, masks = outputs(base, finetunes, tau_dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(election, "_elect_with_torch", refuse)
        return tau, masks, election.elect_block(base, finetunes, tau, masks)


class Refused(Exception):
    pass


def refuse(*args):
    raise Refused


def by_definition(base, finetunes, tau_dtype):
    tau, masks = outputs(base, finetunes, tau_dtype)
    return tau, masks, election._elect_with_torch(base, finetunes, tau, masks, 0, "cpu")


def assert_same(found, expected):
    assert torch.equal(as_bytes(found[0]), as_bytes(expected[0]))
    assert all(torch.equal(*pair) for pair in zip(found[1], expected[1]))
    assert torch.equal(found[2].counts, expected[2].counts)
    assert torch.equal(found[2].sums, expected[2].sums)
    assert torch.equal(found[2].squares, expected[2].squares)


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8)


def random_inputs(size, tasks, dtype, seed=0, step=1e-3):
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(size, generator=generator) * 0.02).to(dtype)
    scales = torch.rand(tasks, generator=generator) * step
    finetunes = [(base + torch.randn(size, generator=generator) * scale).to(dtype) for scale in scales]
    return base, finetunes


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("size", [1, 7, 8, 1023, 1024, 1025, election.UNIT, 2 * election.UNIT + 8 * 129 + 3])
@pytest.mark.parametrize("tasks", [1, 2, 5, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_election_of_any_dtype_size_and_number_of_tasks(size, tasks, dtype):
    base, finetunes = random_inputs(size, tasks, dtype)
    for tau_dtype in DTYPES:
        assert_same(elect(base, finetunes, tau_dtype), by_definition(base, finetunes, tau_dtype))


@st.composite
def adversarial(draw):
    """Few, awkward values, so that ties, cancellation and underflow abound."""
    size, tasks = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    value = st.one_of(st.sampled_from(EDGE), st.floats(-2e4, 2e4, width=16, allow_subnormal=True))
    size = draw(st.sampled_from([size, -(-size // 8) * 8]))  # whole eights of one dtype have a loop of their own
    few = st.lists(st.sampled_from(DTYPES), min_size=tasks + 1, max_size=tasks + 1)
    dtypes = draw(st.one_of(few, st.sampled_from(DTYPES).map(lambda dtype: [dtype] * (tasks + 1))))
    row = st.lists(value, min_size=size, max_size=size)
    tensors = [torch.tensor(draw(row), dtype=torch.float32).to(dtype) for dtype in dtypes]
    vectors = draw(st.lists(st.booleans(), min_size=tasks, max_size=tasks) | st.just([False] * tasks))
    finetunes = [election.TaskVector(t.float()) if vector else t for t, vector in zip(tensors[1:], vectors)]
    return tensors[0], finetunes, draw(st.sampled_from(DTYPES))


@pytest.mark.parametrize("chosen", LEVELS)
@given(adversarial())
@settings(max_examples=300, deadline=None)
def test_election_of_adversarial_values(chosen, inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_level", LEVELS[chosen])
        try:
            expected = by_definition(*inputs)
        except OptionError:
            with pytest.raises(Refused):
                elect(*inputs)
        else:
            assert_same(elect(*inputs), expected)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("spread", [1e-38, 1e-20, 1e-12, 1e-8])
def test_sums_that_cancel_are_decided_exactly(spread):
    """Terms too far apart for float64, in every order, beside exact ties."""
    big = torch.tensor([1.0, -1.0, 1e20, -1e20, 0.0, spread, -spread, 2 * spread])
    taus = torch.stack([big.roll(i) for i in range(8)])
    taus = torch.cat([taus, -taus[:3], taus[5:6] * 3])
    base = torch.zeros(8)
    finetunes = list(taus)
    assert_same(elect(base, finetunes, torch.float32), by_definition(base, finetunes, torch.float32))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-12, 1e12, 1e30, 3e38])
def test_any_magnitude(size):
    generator = torch.Generator().manual_seed(0)
    taus = [(torch.rand(2056, generator=generator) * 2 - 1) * size for _ in range(3)]
    for finetunes in (taus, [taus[0], taus[1] * 1e-3, taus[2] * 1e-6]):
        base = torch.zeros(2056)
        assert_same(elect(base, finetunes, torch.float32), by_definition(base, finetunes, torch.float32))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(-1, 3), (0, 0), (1, 1030)])
def test_what_is_not_finite_is_located(bad, where):
    base, finetunes = random_inputs(1031, 2, torch.float32)
    source, index = where
    [*finetunes, base][source][index] = bad
    with pytest.raises(Refused):
        elect(base, finetunes, torch.float32)
    with pytest.raises(NonFiniteError) as caught:
        election.elect_block(base, finetunes, *outputs(base, finetunes, torch.float32))
    assert (caught.value.source, caught.value.index) == where


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("tau_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 13, 4096, 70001])
def test_rebuild(base_dtype, tau_dtype, out_dtype, size, monkeypatch):
    generator = torch.Generator().manual_seed(size)
    edges = torch.tensor([*EDGE, 65504.0, -65504.0, 3e38, float("inf"), float("nan")])
    base = torch.cat([torch.randn(size, generator=generator), edges])[:size].to(base_dtype)
    tau = torch.randn(size, generator=generator).to(tau_dtype)
    packed = bits.pack(torch.rand(size, generator=generator) > 0.4)
    rescaler = torch.tensor(1.3)
    with monkeypatch.context() as patch:
        patch.setattr(bits, "_rebuild_with_torch", refuse)
        found = bits.rebuild(base, tau, packed, rescaler, out=torch.empty(size, dtype=out_dtype))
    monkeypatch.setattr(kernels, "_library", None)
    expected = bits.rebuild(base, tau, packed, rescaler, out=torch.empty(size, dtype=out_dtype))
    assert torch.equal(as_bytes(found), as_bytes(expected))


@pytest.mark.parametrize("setting, expected", [("off", "False"), ("plain", "True"), ("", "True")])
def test_the_environment_chooses(setting, expected):
    code = "from emr_hf import kernels; print(kernels.available())"
    environment = {"EMR_HF_KERNELS": setting, "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == expected
