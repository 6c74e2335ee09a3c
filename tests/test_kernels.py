"""The compiled loops give the bits of the torch code, which is their definition."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emr_hf import bits, election, fitting, kernels, lowbit
from emr_hf.bits import StoredVector
from emr_hf.election import TaskVector, TensorElection
from emr_hf.errors import EMRError, NonFiniteError, OptionError, TensorError
from emr_hf.lowbit import Codes

compiled = pytest.mark.skipif(not kernels.available(), reason="the compiled loops were not built (no C++ compiler)")
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


@compiled
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


@compiled
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


@compiled
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


@compiled
@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-12, 1e12, 1e30, 3e38])
def test_any_magnitude(size):
    generator = torch.Generator().manual_seed(0)
    taus = [(torch.rand(2056, generator=generator) * 2 - 1) * size for _ in range(3)]
    for finetunes in (taus, [taus[0], taus[1] * 1e-3, taus[2] * 1e-6]):
        base = torch.zeros(2056)
        assert_same(elect(base, finetunes, torch.float32), by_definition(base, finetunes, torch.float32))


@compiled
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


@compiled
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


@compiled
@pytest.mark.parametrize("setting, expected", [("off", "False"), ("plain", "True"), ("", "True")])
def test_the_environment_chooses(setting, expected):
    code = "from emr_hf import kernels; print(kernels.available())"
    environment = {**os.environ, "EMR_HF_KERNELS": setting}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == expected


# Lengths: no loop is entered with a tensor that is shorter or longer than the loop takes it to be

NUMEL, TASKS, COLUMNS = 320, 3, 40
ROWS = NUMEL // COLUMNS


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def mask_of(numel=NUMEL):
    return zeros(bits.packed_size(numel), dtype=torch.uint8)


def sums_of(tasks=TASKS):
    return zeros(1, tasks, 5, dtype=torch.float64)


def counts_of(columns, tasks=TASKS):
    return zeros(tasks, columns, dtype=torch.int64)


def codes_of(**changes):
    given = {"codes": zeros(NUMEL // 2, dtype=torch.uint8), "scales": torch.ones(ROWS), "bits": 4}
    return Codes(**{**given, "shape": torch.Size((ROWS, COLUMNS)), **changes})


# Name -> a function and arguments that it takes. Every tensor of them is changed in turn, see `spoiled`.
LOOPS = {
    "elect": lambda: (kernels.elect, {
        "base": zeros(NUMEL), "finetunes": [zeros(NUMEL) for _ in range(TASKS)], "are_vectors": [False, True, False],
        "tau": zeros(NUMEL), "masks": [mask_of() for _ in range(TASKS)], "sums": sums_of(), "counts": counts_of(2),
        "squares": zeros(1, 2, dtype=torch.float64)}),
    "rebuild": lambda: (kernels.rebuild, {
        "base": zeros(NUMEL), "tau": zeros(NUMEL), "packed": mask_of(), "minus_rescaler": -1.0, "out": zeros(NUMEL)}),
    "fit_vector": lambda: (kernels.fit_vector, {"taus": zeros(TASKS, NUMEL), "rescalers": torch.ones(TASKS)}),
    "two_levels": lambda: (kernels.two_levels, {"values": zeros(TASKS, NUMEL)}),
    "compare": lambda: (kernels.compare, {
        "taus": zeros(TASKS, NUMEL), "used": zeros(NUMEL), "shift": zeros(NUMEL), "rescalers": torch.ones(TASKS),
        "of_moves": True, "masks": [mask_of() for _ in range(TASKS)], "sums": sums_of(), "counts": counts_of(3)}),
    "decode": lambda: (kernels.decode, {
        "codes": zeros(NUMEL // 2, dtype=torch.uint8), "scales": torch.ones(ROWS), "bits": 4, "start": 0,
        "count": NUMEL, "columns": COLUMNS}),
}  # fmt: skip

PUBLIC = {
    "elect_block": lambda: (election.elect_block, {
        "base": zeros(NUMEL), "finetunes": [zeros(NUMEL) for _ in range(TASKS)], "tau": zeros(NUMEL),
        "masks": [mask_of() for _ in range(TASKS)]}),
    "elect_block, of a vector": lambda: (
        lambda base, vector, tau, packed: election.elect_block(base, [TaskVector(vector)], tau, [packed]),
        {"base": zeros(NUMEL), "vector": zeros(NUMEL), "tau": zeros(NUMEL), "packed": mask_of()}),
    "election of a tensor": lambda: (
        lambda base, finetunes: TensorElection(base, finetunes).run(slice(0, NUMEL), zeros(NUMEL), [mask_of()] * 2),
        {"base": zeros(NUMEL), "finetunes": [zeros(NUMEL), zeros(NUMEL)]}),
    "fit of a tensor": lambda: (
        lambda base, finetunes, rescalers: fitting.TensorFit(base, finetunes, "fit", "float32", rescalers),
        {"base": zeros(NUMEL), "finetunes": [zeros(NUMEL), zeros(NUMEL)], "rescalers": torch.ones(2)}),
    "rebuild": lambda: (bits.rebuild, {
        "base": zeros(ROWS, COLUMNS), "tau": zeros(ROWS, COLUMNS), "packed": mask_of(), "rescaler": torch.ones(1),
        "out": zeros(ROWS, COLUMNS)}),
    "rebuild_part": lambda: (bits.rebuild_part, {
        "base": zeros(NUMEL), "tau": zeros(NUMEL), "packed": mask_of(), "rescaler": torch.ones(1),
        "out": zeros(NUMEL), "part": slice(8, 64)}),
    "stored vector": lambda: (
        lambda tau, packed, rescaler: StoredVector(tau, packed, rescaler)[0:NUMEL],
        {"tau": zeros(NUMEL), "packed": mask_of(), "rescaler": torch.ones(1)}),
    "codes": lambda: (
        lambda codes, scales: codes_of(codes=codes, scales=scales).dense(),
        {"codes": zeros(NUMEL // 2, dtype=torch.uint8), "scales": torch.ones(ROWS)}),
    "unpack": lambda: (lambda packed: bits.unpack(packed, (ROWS, COLUMNS)), {"packed": mask_of()}),
    "fit_vector": lambda: (fitting.fit_vector, {"taus": zeros(TASKS, NUMEL), "rescalers": torch.ones(TASKS)}),
    "compare": lambda: (fitting.compare, {
        "taus": zeros(TASKS, NUMEL), "used": zeros(NUMEL), "shift": zeros(NUMEL), "rescalers": torch.ones(TASKS),
        "of_moves": True}),
}  # fmt: skip


def spoiled(tensor):
    """Shorter, longer, of one element, and of a dtype that is narrower, so that the same number are fewer bytes."""
    flat = tensor.reshape(-1)
    yield "shorter", flat[:-1].clone()
    yield "longer", torch.cat([flat, flat[:1]])
    if flat.numel() > 1:
        yield "of one element", flat[:1].clone()
    yield "of another dtype", tensor.to(torch.bool)


def strided(tensor):
    yield "with gaps", torch.stack([tensor.reshape(-1)] * 2, -1)[:, 0].view(-1, 1)[:, 0]


# Rescalers are copied to contiguous float32; scales may be those of more rows than are decoded.
FINE = {
    *((loop, "rescalers", label) for loop in ("fit_vector", "compare") for label in ("of another dtype", "with gaps")),
    ("decode", "scales", "longer"),
}


def cases(functions, *ways):
    return [
        (name, argument, index, label)
        for name, make in functions.items()
        for argument, value in make()[1].items()
        for index, tensor in enumerate(value if isinstance(value, list) else [value])
        if isinstance(tensor, torch.Tensor)
        for way in ways
        for label, _ in way(tensor)
    ]


def call_with(functions, name, argument, index, label, *ways):
    function, arguments = functions[name]()
    value = arguments[argument]
    tensor = value[index] if isinstance(value, list) else value
    bad = next(bad for way in ways for found, bad in way(tensor) if found == label)
    arguments[argument] = [*value[:index], bad, *value[index + 1 :]] if isinstance(value, list) else bad
    return function(**arguments)


@compiled
@pytest.mark.parametrize("name", LOOPS)
def test_the_loops_take_what_has_the_right_length(name):
    function, arguments = LOOPS[name]()
    function(**arguments)


@compiled
@pytest.mark.parametrize("name, argument, index, label", cases(LOOPS, spoiled, strided))
def test_no_loop_is_given_a_tensor_of_another_length(name, argument, index, label):
    fine = (name, argument, label) in FINE
    with nullcontext() if fine else pytest.raises(TensorError, match="expected.*got"):
        call_with(LOOPS, name, argument, index, label, spoiled, strided)


@compiled
def test_the_loops_take_no_less_and_no_more_than_there_is_of_anything():
    function, given = LOOPS["elect"]()
    for changes in ({"masks": given["masks"][:2]}, {"are_vectors": [False]}, {"finetunes": given["finetunes"][:1]}):
        with pytest.raises(TensorError, match="expected.*got"):
            function(**{**given, **changes})
    function, given = LOOPS["compare"]()
    for changes in ({"masks": given["masks"] * 2}, {"taus": zeros(NUMEL)}, {"taus": zeros(0, NUMEL)}):
        with pytest.raises(TensorError, match="expected.*got"):
            function(**{**given, **changes})
    with pytest.raises(TensorError, match="at most 256 tasks, got 257"):
        kernels.two_levels(zeros(257, 8))
    with pytest.raises(TensorError, match="at most 256 tasks, got 257"):
        kernels.fit_vector(zeros(257, 8), torch.ones(257))
    function, given = LOOPS["decode"]()
    for changes in ({"start": 8}, {"start": -8}, {"columns": COLUMNS - 1}, {"columns": 0}, {"bits": 3}):
        with pytest.raises(TensorError, match="expected"):
            function(**{**given, **changes})


@pytest.fixture(params=["compiled", "torch"])
def either(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(kernels, "_library", None)
    elif not kernels.available():
        pytest.skip("the compiled loops were not built (no C++ compiler)")


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("name", PUBLIC)
def test_right_lengths_are_taken(name):
    function, arguments = PUBLIC[name]()
    function(**arguments)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("name, argument, index, label", cases(PUBLIC, spoiled))
def test_compiled_or_not_the_same_lengths_are_refused(name, argument, index, label):
    with pytest.raises(TensorError, match="expected.*got"):
        call_with(PUBLIC, name, argument, index, label, spoiled)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("part", [slice(0, NUMEL + 8), slice(-8, 8), slice(4, 16), slice(16, 8), slice(0, 16, 2)])
def test_parts_beyond_a_tensor_are_refused(part):
    values = zeros(NUMEL)
    for take in (
        lambda: codes_of()[part],
        lambda: StoredVector(values, mask_of(), torch.ones(()))[part],
        lambda: bits.rebuild_part(values, codes_of(), mask_of(), torch.ones(()), zeros(NUMEL), part),
    ):
        with pytest.raises(TensorError, match="expected a part of 320 elements"):
            take()


@pytest.mark.usefixtures("either")
def test_the_rows_of_codes_are_those_of_the_shape():
    """As many scales as divide the elements would otherwise pass for longer rows."""
    for scales in (1, 2, ROWS // 2, ROWS * 2):
        with pytest.raises(TensorError, match=f"scales: expected {ROWS} elements, got {scales}"):
            codes_of(scales=torch.ones(scales))
    with pytest.raises(TensorError, match="expected 8, 4 or 2, got 3"):
        codes_of(bits=3, codes=zeros(NUMEL * 3 // 8, dtype=torch.uint8))


@pytest.mark.usefixtures("either")
def test_shapes_that_have_the_same_number_of_elements_are_not_taken_for_each_other():
    given = {"base": zeros(2, 4), "tau": zeros(2, 4), "packed": mask_of(8), "rescaler": torch.ones(())}
    for changes in ({"base": zeros(4, 2)}, {"tau": zeros(8)}, {"out": zeros(8)}):
        with pytest.raises(TensorError, match=r"expected shape \[.*got \["):
            bits.rebuild(**{**given, **changes})
    with pytest.raises(TensorError, match="expected shape"):
        TensorElection(zeros(2, 4), [zeros(4, 2)])


@pytest.mark.usefixtures("either")
def test_an_election_of_nothing_is_refused():
    for nothing in (
        lambda: TensorElection(zeros(8), []),
        lambda: election.elect_block(zeros(8), [], zeros(8), []),
        lambda: fitting.TensorFit(zeros(8), [], "emr", "float32", zeros(0)),
    ):
        with pytest.raises(EMRError, match="at least one finetune"):
            nothing()


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_any_floating_point_dtype_is_taken(dtype):
    base, tau, packed = torch.randn(20).to(dtype), torch.randn(20).to(dtype), bits.pack(torch.rand(20) > 0.5)
    expected = bits.rebuild(base.float(), tau.float(), packed, torch.tensor(0.5))
    assert torch.equal(bits.rebuild(base, tau, packed, torch.tensor(0.5), out=zeros(20)), expected)
    tensor = TensorElection(base, [tau, base])
    by_float = TensorElection(base.float(), [tau.float(), base.float()])
    found, wanted = (zeros(20), mask_of(20)), (zeros(20), mask_of(20))
    tensor.run(slice(0, 20), found[0], [found[1], mask_of(20)])
    by_float.run(slice(0, 20), wanted[0], [wanted[1], mask_of(20)])
    assert all(torch.equal(*pair) for pair in zip(found, wanted))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_torch_changes_nothing(default):
    """Values are float32 whatever the dtype is that a model happens to be built in."""
    values = torch.randn(ROWS, COLUMNS)
    codes = Codes(*lowbit.encode(values, 4), 4, values.shape)
    stored = StoredVector(codes, bits.pack(values > 0.2), torch.tensor(1.3))
    taus = torch.randn(TASKS, NUMEL)
    before = torch.get_default_dtype()

    def results():
        return (codes.dense(), stored[0:NUMEL], fitting.fit_vector(taus, torch.ones(TASKS, dtype=torch.float32)),
                *fitting.two_levels(taus))  # fmt: skip

    expected = results()
    torch.set_default_dtype(default)
    try:
        found = results()
    finally:
        torch.set_default_dtype(before)
    assert all(one.dtype == torch.float32 and torch.equal(one, other) for one, other in zip(found, expected))
