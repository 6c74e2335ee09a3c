"""The least-squares fits, the vector in few bits, and repos of both."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

import emr_hf
from emr_hf import bits, election, fitting, kernels, lowbit
from emr_hf.configuration import EMRConfig
from emr_hf.errors import NonFiniteError, OptionError, RecipeError
from emr_hf.format import tau_name
from emr_hf.repo import open_repo
from tests import tiny

LOOPS = {"compiled": kernels.fits, "torch": lambda taus: False}


@pytest.fixture(params=LOOPS)
def loops(request, monkeypatch):
    if request.param == "compiled" and not kernels.available():
        pytest.skip("the compiled loops were not built (no C++ compiler)")
    monkeypatch.setattr(kernels, "fits", LOOPS[request.param])


def task_vectors(tasks, numel=60):
    """Random ones, some elements of them unmoved, equal or opposite."""
    taus = torch.distributions.Laplace(0.0, 1.0).sample((tasks, numel))
    taus[:, :5] = 0
    taus[:, 5:10] = taus[0, 5:10].clone()
    taus[0, 10:15] = -taus[-1, 10:15]
    taus[0, 15:20] = 0
    return taus


def subsets(tasks):
    """Every choice of tasks, as a column of bools."""
    return (torch.tensor(chosen)[:, None] for chosen in itertools.product([False, True], repeat=tasks))


def error_of(taus, tau, rescalers):
    """Squares left by a vector and the masks that go with it, by element."""
    masks, _ = fitting.compare(taus, tau, None, rescalers, False)
    kept = torch.stack([bits.unpack(mask, tau.shape) for mask in masks])
    return (taus - rescalers[:, None] * kept * tau).square().sum(0)


@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
def test_no_vector_and_masks_explain_more(loops, tasks):
    taus, rescalers = task_vectors(tasks), torch.rand(tasks) + 0.2
    best = taus.square().sum(0)
    for chosen in subsets(tasks):
        weights = rescalers[:, None] * chosen
        level = (weights * taus).sum(0) / weights.square().sum(0).clamp_min(1e-9)
        best = torch.minimum(best, (taus - weights * level).square().sum(0))
    found = error_of(taus, fitting.fit_vector(taus, rescalers), rescalers)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
def test_no_two_levels_are_nearer(loops, tasks):
    values = task_vectors(tasks)
    best = torch.full_like(values[0], float("inf"))
    for chosen in subsets(tasks):
        sides = [side for side in (chosen, ~chosen) if side.any()]
        means = [(values * side).sum(0) / side.sum() for side in sides]
        errors = [((values - mean).square() * side).sum(0) for mean, side in zip(means, sides)]
        best = torch.minimum(best, torch.stack(errors).sum(0))
    low, high = fitting.two_levels(values)
    found = torch.minimum((values - low).square(), (values - high).square()).sum(0)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)
    assert torch.equal(low[5:10], values[0, 5:10]) and torch.equal(high[5:10], values[0, 5:10])


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e20, 1e30])
def test_small_and_large_numbers_are_fitted_as_others_are(loops, size):
    taus = task_vectors(2)
    vector = fitting.fit_vector(taus * size, torch.ones(2))
    torch.testing.assert_close(vector / size, fitting.fit_vector(taus, torch.ones(2)), rtol=1e-4, atol=1e-6)
    low, high = fitting.two_levels(taus * size)
    assert torch.equal(low, (taus * size).amin(0)) and torch.equal(high, (taus * size).amax(0))


@pytest.mark.parametrize("method", ["fit", "levels"])
def test_what_overflows_is_an_error(method):
    finetunes = {str(task): {"w": torch.full((4,), 1.5e38 if task else -1e38)} for task in range(4)}
    with pytest.raises(OptionError, match=r"^w: .* overflows in float32"):
        emr_hf.merge_state_dicts({"w": torch.zeros(4)}, finetunes, method=method)


@pytest.mark.parametrize("values", [(1e5,), (1e5, 1e5), (1e5, 1e6)])
def test_a_level_that_the_base_cannot_hold_is_an_error(values):
    finetunes = {str(value): {"w": torch.full((4,), value)} for value in values}
    with pytest.raises(OptionError, match=r"^w: a weight's level, in the base's dtype, overflows in float16"):
        emr_hf.merge_state_dicts({"w": torch.zeros(4, dtype=torch.float16)}, finetunes, method="levels")


@pytest.mark.skipif(not kernels.available(), reason="the compiled loops were not built (no C++ compiler)")
@pytest.mark.parametrize("level", [0, 1])
@given(data=st.data())
@settings(max_examples=40)
def test_the_compiled_loops_give_the_bits_of_the_definition(level, data):
    tasks, numel = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 41))
    edge = st.sampled_from([0.0, -0.0, 1e-45, 1e-20, -1e-20, 1e-4, -1e-4, 0.5, 1.0, -1.0, 3e4, -3e4])
    values = data.draw(st.lists(edge | st.floats(-8, 8, width=32), min_size=tasks * numel, max_size=tasks * numel))
    taus = torch.tensor(values, dtype=torch.float32).reshape(tasks, numel)
    rescalers = torch.tensor(data.draw(st.lists(st.floats(0.125, 8, width=32), min_size=tasks, max_size=tasks)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_level", level)
        found = fitting.fit_vector(taus, rescalers), *fitting.two_levels(taus)
        patch.setattr(kernels, "fits", LOOPS["torch"])
        expected = fitting.fit_vector(taus, rescalers), *fitting.two_levels(taus)
    assert all(torch.equal(*pair) for pair in zip(found, expected))


@pytest.mark.skipif(not kernels.available(), reason="the compiled loops were not built (no C++ compiler)")
@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("numel", [1, 7, 1000, 1 << 14, 40001])
def test_the_compiled_comparison_gives_the_bits_of_the_definition(level, shifted, numel, monkeypatch):
    taus = task_vectors(3, numel) * 10.0 ** torch.randint(-30, 3, (1, numel))
    used, rescalers = taus[:2].mean(0), torch.tensor([0.0, 0.7, 1.3])
    used[::5] = 0
    shift = used.roll(1) * 0.5 if shifted else None
    monkeypatch.setattr(kernels, "_level", level)
    masks, part = fitting.compare(taus, used, shift, rescalers, shifted)
    monkeypatch.setattr(kernels, "takes", lambda *tensors: False)
    expected_masks, expected = fitting.compare(taus, used, shift, rescalers, shifted)
    assert all(torch.equal(*pair) for pair in zip(masks, expected_masks))
    assert torch.equal(part.counts, expected.counts) and torch.equal(part.sums, expected.sums)


def test_the_sums_are_those_of_float64():
    taus, used, shift = task_vectors(4, 40001), torch.randn(40001), 0.1 * torch.randn(40001)
    masks, part = fitting.compare(taus, used, shift, torch.ones(4), True)
    moves = torch.stack([bits.unpack(mask, used.shape) for mask in masks]).double() * used + shift
    expected = [taus.abs(), moves.abs(), taus.double().square(), moves.square(), taus * moves]
    torch.testing.assert_close(
        part.sums.sum(0).T, torch.stack([one.double().sum(1) for one in expected]), rtol=1e-6, atol=1e-6
    )
    assert part.counts[:, 0].tolist() == taus.count_nonzero(1).tolist()
    assert part.counts[:, 2].tolist() == (taus * moves > 0).sum(1).tolist()


def test_more_tasks_than_the_compiled_loops_take_are_left_to_torch():
    taus = task_vectors(257, 3)
    assert not kernels.fits(taus)
    low, high = fitting.two_levels(taus)
    assert (low <= high).all()


@given(
    tasks=st.integers(1, 5),
    numel=st.integers(1, 30),
    lengths=st.lists(st.sampled_from([0.0, 0.01, 1.0, 1.0, 30.0]), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_the_fit_is_never_further_off_than_emr(tasks, numel, lengths, seed):
    """Whatever N and however long the task vectors: the squares left of all tasks together."""
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.zeros(numel)}
    moves = torch.randn(tasks, numel, generator=generator) * torch.tensor(lengths[:tasks])[:, None]
    finetunes = {str(task): {"w": move} for task, move in enumerate(moves)}

    def left(**options):
        merge = emr_hf.merge_state_dicts(base, finetunes, **options)
        numbers = [(merge.sums[task], merge.rescalers[task]) for task in finetunes]
        return sum(sums.relative_error(rescaler) ** 2 * sums.square_tau for sums, rescaler in numbers)

    rounding = 1e-6 * float(moves.double().square().sum())  # of differences of float32 numbers' squares
    fitted = left(method="fit", rescale="least_squares")
    assert fitted <= left(rescale="least_squares") + rounding
    assert fitted <= left() + rounding
    assert left(method="levels") <= fitted + rounding or tasks > 2


def test_of_tasks_of_one_direction_the_fit_keeps_each_length():
    """Where EMR's vector is right but for its length, rescalers find it; one level for all could not."""
    move = torch.randn(50)
    merge = emr_hf.merge_state_dicts(
        {"w": torch.zeros(50)}, {"a": {"w": move}, "b": {"w": 0.1 * move}}, method="fit", rescale="least_squares"
    )
    for task, scale in {"a": 1.0, "b": 0.1}.items():
        torch.testing.assert_close(merge.rescalers[task] * merge.masks[task]["w"] * merge.tau["w"], scale * move)


@pytest.mark.parametrize("method", fitting.METHODS)
def test_in_memory_and_in_a_repo_are_the_same(bert_inputs, tmp_path, method):
    out = tmp_path / "out"
    report = emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, out, method=method)
    load = AutoModelForSequenceClassification.from_pretrained
    finetunes = {task: tiny.quietly(load, folder).state_dict() for task, folder in bert_inputs.finetunes.items()}
    base = tiny.quietly(load, bert_inputs.base).state_dict()
    shared = EMRConfig.from_pretrained(out).merged_parameters
    merge = emr_hf.merge_state_dicts({name: base[name] for name in shared}, finetunes, method=method)
    model = load(out)
    for task in finetunes:
        weights = model.set_task(task).model.state_dict()
        for name, expected in merge.rebuild(base, task).items():
            assert torch.equal(weights[name], expected), (task, name)
        assert report.tasks[task].rescaler == pytest.approx(merge.rescalers[task])
    with pytest.raises(emr_hf.UnknownTaskError, match="'item'. Did you mean 'items'"):
        merge.rebuild(base, "item")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_levels_of_two_tasks_lose_nothing(tmp_path, dtype):
    inputs = tiny.write_inputs(tiny.BERT, tmp_path, tasks=("one", "two"), dtype=dtype)
    report = emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out", method="levels")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    for task, folder in inputs.finetunes.items():
        expected = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        weights = model.set_task(task).model.state_dict()
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-8)
        assert report.tasks[task].relative_error < 1e-3


# The vector in few bits


@pytest.mark.parametrize("width", lowbit.BITS.values())
@pytest.mark.parametrize("shape", [(3, 33), (16, 40), (8, 12, 3), (2, 3, 32)])
def test_codes_give_a_value_near_each_element_and_of_its_sign(width, shape):
    values = torch.randn(shape)
    codes, scales = lowbit.encode(values.reshape(-1, lowbit.columns_of(shape)), width)
    stored = lowbit.Codes(codes, scales, width, values.shape)
    info, scale_info = lowbit.infos(f"int{width}", shape)
    assert (codes.shape, scales.shape) == (info.shape, scale_info.shape)
    assert torch.equal(stored.dense().sign(), values.sign())
    assert ((stored.dense() - values).norm() / values.norm()) < {8: 0.01, 4: 0.2, 2: 0.6}[width]
    step = 8 if values.numel() > 8 else 1
    pieces = [stored[start : min(start + step, values.numel())] for start in range(0, values.numel(), step)]
    assert torch.equal(torch.cat(pieces), stored.dense().flatten())


@pytest.mark.skipif(not kernels.available(), reason="the compiled loops were not built (no C++ compiler)")
@pytest.mark.parametrize("width", lowbit.BITS.values())
@pytest.mark.parametrize("level", [0, 1])
def test_compiled_decoding_gives_the_bits_of_the_definition(width, level, monkeypatch):
    values = torch.randn(5, 37)
    codes = lowbit.Codes(*lowbit.encode(values, width), width, values.shape)
    pieces = [slice(start, stop) for start in (0, 8, 40, 176) for stop in (start + 1, start + 8, 185)]
    monkeypatch.setattr(kernels, "_level", level)
    found = [codes[piece] for piece in pieces]
    monkeypatch.setattr(kernels, "takes", lambda *tensors: False)
    for piece, values in zip(pieces, found):
        assert torch.equal(values, codes[piece])


def test_rows_are_what_a_scale_is_worth():
    shapes = {
        (8, 31): None,
        (8, 32): 32,
        (64,): None,
        (1, 64): None,
        (2, 1, 64): 64,
        (16, 4, 3, 3): 36,
        (16, 1, 3, 3): None,
    }
    assert {shape: lowbit.columns_of(shape) for shape in shapes} == shapes
    assert lowbit.columns_of((4, 48, 64)) == 64  # experts in one tensor have a scale for each output


@pytest.mark.parametrize("width", [4, 2])
def test_zeros_do_not_widen_the_error_of_the_rest(width):
    rows = torch.randn(16, 768)
    sparse = rows * (torch.rand_like(rows) > 0.9)
    moved = sparse != 0

    def error(values):
        stored = lowbit.Codes(*lowbit.encode(values, width), width, values.shape).dense()
        return float((stored - values)[moved].norm() / values[moved].norm())

    assert error(sparse) < 1.1 * error(rows)


@pytest.mark.parametrize("width", lowbit.BITS.values())
@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e30])
def test_codes_of_small_and_large_numbers(width, size):
    rows = torch.randn(4, 64) * size
    stored = lowbit.Codes(*lowbit.encode(rows, width), width, rows.shape).dense()
    assert ((stored - rows).double().norm() / rows.double().norm()) < {8: 0.02, 4: 0.2, 2: 0.6}[width]


@pytest.mark.parametrize("width", lowbit.BITS.values())
def test_rows_of_zeros_and_of_one_value_have_codes(width):
    rows = torch.stack([torch.zeros(8), torch.full((8,), -3.0)])
    codes, scales = lowbit.encode(rows, width)
    stored = lowbit.Codes(codes, scales, width, rows.shape).dense()
    torch.testing.assert_close(stored, rows)


def test_rebuilding_from_codes_is_rebuilding_from_their_values():
    base, values = torch.randn(40, 33), torch.randn(40, 33)
    packed, rescaler = bits.pack(values > 0.3), torch.tensor(1.7)
    codes = lowbit.Codes(*lowbit.encode(values, 4), 4, values.shape)
    expected = bits.rebuild(base, codes.dense(), packed, rescaler)
    assert torch.equal(bits.rebuild(base, codes, packed, rescaler), expected)
    transposed = torch.empty(33, 40).T
    assert torch.equal(bits.rebuild(base, codes, packed, rescaler, out=transposed), expected)


# Repos


@pytest.mark.parametrize("method", fitting.METHODS)
@pytest.mark.parametrize("tau_dtype", ["float32", "bfloat16", *lowbit.BITS])
def test_every_tier_loads_as_it_was_measured(bert_inputs, tmp_path, method, tau_dtype):
    """The weights of each task are as far from the finetune's as the report says, before and after saving again."""
    out, again = tmp_path / "out", tmp_path / "again"
    report = emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, out, method=method, tau_dtype=tau_dtype)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    model.set_task(model.tasks[1])
    model.save_pretrained(again)
    reloaded = AutoModelForSequenceClassification.from_pretrained(again, emr_memory="mapped")
    base = tiny.quietly(AutoModelForSequenceClassification.from_pretrained, bert_inputs.base).state_dict()
    for task, folder in bert_inputs.finetunes.items():
        finetune = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        weights, same = (one.set_task(task).model.state_dict() for one in (model, reloaded))
        assert all(torch.equal(weights[name], same[name]) for name in weights)
        merged = model.config.merged_parameters
        error = sum((weights[name] - finetune[name]).double().square().sum() for name in merged)
        length = sum((finetune[name] - base[name]).double().square().sum() for name in merged)
        assert (error / length) ** 0.5 == pytest.approx(report.tasks[task].relative_error, rel=1e-4, abs=1e-6)
    assert open_repo(out).infos == open_repo(again).infos
    assert model.config.method == method and model.config.tau_dtype == tau_dtype
    recipe = emr_hf.Recipe(bert_inputs.base, bert_inputs.finetunes, method=method, tau_dtype=tau_dtype)
    assert f"method={method}" in str(emr_hf.check(recipe)) and f"tau in {tau_dtype}" in str(emr_hf.check(recipe))


def test_fewer_bits_are_fewer_bytes(bert_inputs, tmp_path):
    sizes = [
        emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / dtype, tau_dtype=dtype).bytes_out
        for dtype in ("float32", "bfloat16", "int8", "int4", "int2")
    ]
    assert sizes == sorted(sizes, reverse=True)
    stored = open_repo(tmp_path / "int4")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert stored.infos[tau_name(name)].nbytes * 8 == stored.infos[f"model.{name}"].numel * 4
    assert stored.infos[tau_name(name.replace("weight", "bias"))].dtype == torch.float32


@pytest.mark.parametrize("options", [{"method": "fit"}, {"method": "levels"}, {"tau_dtype": "int4"}])
def test_threads_and_shards_change_no_bit(bert_inputs, tmp_path, options, monkeypatch):
    monkeypatch.setattr(fitting, "BLOCK", 512)  # several blocks a tensor
    found = []
    for index, (threads, size) in enumerate([(1, "5GB"), (3, "20KB")]):
        out = tmp_path / str(index)
        emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, out, threads=threads, max_shard_size=size, **options)
        found.append(open_repo(out))
    for name in found[0].infos:
        assert torch.equal(*(repo.read(name) for repo in found)), name


@pytest.mark.parametrize("options", [{"method": "fit", "tau_dtype": "int8"}, {"tau_dtype": "int4"}])
def test_tasks_come_and_go(bert_inputs, tmp_path, options):
    tasks = dict(bert_inputs.finetunes)
    third, finetune = tasks.popitem()
    emr_hf.merge(bert_inputs.base, tasks, tmp_path / "two", **options)
    emr_hf.add_task(tmp_path / "two", third, finetune, tmp_path / "three")
    emr_hf.remove_task(tmp_path / "three", third, tmp_path / "left")
    three, left = (AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("three", "left"))
    assert three.config.method == options.get("method", "emr") and three.tasks == [*tasks, third]
    for task in tasks:
        weights = three.set_task(task).model.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in left.set_task(task).model.state_dict().items())


def test_what_two_levels_cannot_do(bert_inputs, bert_repo, tmp_path):
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out", method="levels")
    task, finetune = next(iter(bert_inputs.finetunes.items()))
    with pytest.raises(OptionError, match="no task can be added"):
        emr_hf.add_task(tmp_path / "out", "another", finetune, tmp_path / "more")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with pytest.raises(OptionError, match="no base to run"):
        model(input_ids=torch.ones(2, 3, dtype=torch.long), emr_task=[task, "__base__"])
    with pytest.raises(OptionError, match="replaces the base"):
        emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "peft", method="levels", save_as="peft")
    with pytest.raises(OptionError, match="rescale='global': method='levels' has none"):
        emr_hf.Recipe(bert_inputs.base, bert_inputs.finetunes, method="levels", rescale="global")
    assert not (tmp_path / "peft").exists()


def test_an_unknown_method_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("base: b\ntasks: {a: x}\nmethod: best\n")
    with pytest.raises(RecipeError, match="method='best' is unknown: expected one of emr, fit, levels"):
        emr_hf.Recipe.load(tmp_path / "recipe.yaml")
    with pytest.raises(OptionError, match="tau_dtype='int3' is unknown: expected one of float32, .*int4, int2"):
        emr_hf.Recipe("b", {"a": "x"}, tau_dtype="int3")


@pytest.mark.parametrize("method", ["fit", "levels"])
def test_a_number_that_is_none_is_located(bert_inputs, tmp_path, method):
    broken = AutoModelForSequenceClassification.from_pretrained(bert_inputs.finetunes["mnli.v1"])
    with torch.no_grad():
        broken.bert.pooler.dense.weight[1, 2] = float("nan")
    finetunes = {**bert_inputs.finetunes, "mnli.v1": broken}
    with pytest.raises(NonFiniteError, match=r"mnli.v1: .*bert.pooler.dense.weight.*\[1, 2\]"):
        emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_peft_loads_a_fit_in_few_bits(tmp_path):
    peft = pytest.importorskip("peft")
    inputs = tiny.write_inputs(tiny.BERT, tmp_path, tasks=("one", "two"))
    out = tmp_path / "adapter"
    emr_hf.merge(inputs.base, inputs.finetunes, out, method="fit", tau_dtype="int4", save_as="peft")
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "model", method="fit", tau_dtype="int4")
    base = tiny.quietly(AutoModelForSequenceClassification.from_pretrained, inputs.base)
    adapted = peft.PeftModel.from_pretrained(base, out)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    for task in inputs.finetunes:
        adapted.set_task(task)
        found = dict(adapted.get_base_model().named_parameters())
        for name, weight in model.set_task(task).model.named_parameters():
            if name in model.config.merged_parameters:
                assert torch.equal(found[name], weight), name


def test_rescalers_by_least_squares_and_none(bert_inputs):
    assert election.rescaler([election.Sums(4, product=3.0, square_kept=2.0)], "least_squares") == 1.5
    assert election.rescaler([election.Sums(4)], "least_squares") == 1.0
    assert election.rescaler([election.Sums(4, abs_tau=3.0, abs_kept=2.0)], "none") == 1.0
