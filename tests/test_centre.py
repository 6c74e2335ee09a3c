"""Merges without a base: of one or two finetunes the first stands for it, of more their median."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import emr_hf
from emr_hf import MismatchError, NonFiniteError, OptionError
from emr_hf.centre import MedianStorage, stand_in
from emr_hf.sources import open_source
from tests import tiny
from tests.test_aligning import build

BERT, RESNET = tiny.BERT, tiny.RESNET
BASELESS = "no base is given"


def models(kind: tiny.Tiny, count: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Unrelated models, the second task with three labels."""
    names = [f"task {index}" for index in range(count)]
    return {
        task: build(kind, index + 1, num_labels=3 if index == 1 else 2).to(dtype) for index, task in enumerate(names)
    }


def folders(kind: tiny.Tiny, count: int, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    for task, model in models(kind, count, dtype).items():
        model.save_pretrained(folder / task)
    return {task: folder / task for task in models(kind, count)}


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a merged repo, by name."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def assert_each_task_is_its_model(out: Path, finetunes: dict[str, Any], kind: tiny.Tiny, tolerance: float) -> None:
    merged, inputs = emr_hf.EMRMergedModel.from_pretrained(out), kind.inputs()
    for task, model in finetunes.items():
        merged.set_task(task)
        with torch.no_grad():
            want, got = model.eval()(**inputs).logits, merged.eval()(**inputs).logits
        torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [BERT, RESNET, tiny.GPT2], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_are_kept_exactly(kind: tiny.Tiny, count: int, tmp_path: Path) -> None:
    finetunes = models(kind, count)
    report = emr_hf.merge(None, finetunes, tmp_path / "out")
    assert_each_task_is_its_model(tmp_path / "out", finetunes, kind, 1e-4)
    assert [numbers.rescaler for numbers in report.tasks.values()] == pytest.approx([1.0] * count)
    assert report.tasks["task 0"].density == 0 and any(BASELESS in warning for warning in report.warnings)


def test_half_precision_is_kept_to_the_bit(tmp_path: Path) -> None:
    finetunes = models(BERT, 2, torch.bfloat16)
    emr_hf.merge(None, finetunes, tmp_path / "out")
    merged = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    for task, model in finetunes.items():
        merged.set_task(task)
        state = merged.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_of_three_the_median_is_the_base(tmp_path: Path) -> None:
    finetunes = models(BERT, 3)
    report = emr_hf.merge(None, finetunes, tmp_path / "out")
    name = "bert.encoder.layer.1.output.dense.weight"
    (base,) = (tensor for key, tensor in stored(tmp_path / "out").items() if key.endswith(f"model.{name}"))
    states = [model.state_dict()[name] for model in finetunes.values()]
    assert torch.equal(base, torch.stack(states).median(0).values)
    assert report.base == "the median of task 0, task 1, task 2"
    assert any(BASELESS in warning and report.base in warning for warning in report.warnings)
    merged = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    for task in finetunes:
        merged.set_task(task)
        assert merged(**BERT.inputs()).logits.shape == (2, 3 if task == "task 1" else 2)


def test_folders_and_loaded_models_give_the_same(tmp_path: Path) -> None:
    emr_hf.merge(None, folders(BERT, 3, tmp_path), tmp_path / "of folders")
    emr_hf.merge(None, models(BERT, 3), tmp_path / "of models")
    ours, theirs = stored(tmp_path / "of folders"), stored(tmp_path / "of models")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_merge_may_mix_dtypes(tmp_path: Path) -> None:
    finetunes = models(BERT, 3)
    finetunes["task 1"].to(torch.bfloat16)
    emr_hf.merge(None, finetunes, tmp_path / "out")
    assert emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_the_plan_tells_what_stands_for_the_base(tmp_path: Path) -> None:
    two, three = (emr_hf.check(emr_hf.Recipe(None, models(BERT, count))) for count in (2, 3))
    assert any(BASELESS in warning for warning in two.warnings)
    assert any("the median of task 0, task 1, task 2 stands for it" in warning for warning in three.warnings)
    assert BASELESS in str(two)
    aligned = emr_hf.check(emr_hf.Recipe(None, models(BERT, 2), align={"weight": 1}))
    assert any("align: all models are in memory" in warning for warning in aligned.warnings)


def test_an_adapter_has_to_name_its_base(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="save_as='peft': no base is given"):
        emr_hf.merge(None, models(BERT, 2), tmp_path / "out", save_as="peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [2, 3])
def test_finetunes_of_other_sizes_are_refused(count: int, tmp_path: Path) -> None:
    finetunes = models(BERT, count)
    finetunes["task 1"] = build(BERT, 2, intermediate_size=64)
    with pytest.raises(MismatchError, match="task 1: another architecture: intermediate_size is 64"):
        emr_hf.merge(None, finetunes, tmp_path / "out")


@pytest.mark.parametrize("count", [2, 3])
def test_a_weight_that_is_not_finite_is_its_finetune(count: int, tmp_path: Path) -> None:
    finetunes = models(BERT, count)
    with torch.no_grad():
        finetunes["task 1"].bert.pooler.dense.weight[1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"task 1: bert.pooler.dense.weight\[1, 2\] is nan"):
        emr_hf.merge(None, finetunes, tmp_path / "out")


def test_a_task_is_added_and_removed(tmp_path: Path) -> None:
    emr_hf.merge(None, models(BERT, 2), tmp_path / "out")
    other = build(BERT, 9)
    emr_hf.add_task(tmp_path / "out", "other", other, tmp_path / "more")
    emr_hf.remove_task(tmp_path / "more", "task 1", tmp_path / "less")
    assert emr_hf.EMRMergedModel.from_pretrained(tmp_path / "less").tasks == ["task 0", "other"]


# ---- the median


def files(tmp_path: Path, *states: dict[str, Tensor]) -> MedianStorage:
    config = BERT.config(architectures=["BertModel"])
    sources = []
    for index, state in enumerate(states):
        config.save_pretrained(tmp_path / f"{index}")
        save_file(state, tmp_path / f"{index}/model.safetensors", {"format": "pt"})
        sources.append(open_source(tmp_path / f"{index}", f"{index}"))
    return MedianStorage([source.storage for source in sources])


@pytest.mark.parametrize("count", [3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_median_is_some_finetunes_own_weight(
    count: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emr_hf.centre._PIECE", 7)
    tensors = [torch.randn(4, 5).to(dtype) for _ in range(count)]
    median = files(tmp_path, *({"w": tensor} for tensor in tensors)).read("w")
    in_order = torch.stack(tensors).sort(0).values
    assert torch.equal(median, in_order[(count - 1) // 2]) and median.dtype == dtype


def test_the_median_has_what_all_have(tmp_path: Path) -> None:
    storage = files(
        tmp_path,
        {"w": torch.zeros(2), "head": torch.zeros(3), "only": torch.zeros(1), "count": torch.tensor(1)},
        {"w": torch.ones(2), "head": torch.zeros(4), "count": torch.tensor(5)},
        {"w": torch.full((2,), 0.5), "head": torch.zeros(4), "count": torch.tensor(9)},
    )
    assert set(storage.infos) == {"w", "count"}
    assert torch.equal(storage.read("w"), torch.full((2,), 0.5)) and storage.read("count") == 1


def test_of_dtypes_the_first_counts(tmp_path: Path) -> None:
    storage = files(
        tmp_path, *({"w": torch.ones(2, dtype=dtype)} for dtype in (torch.bfloat16, torch.float32, torch.float16))
    )
    assert storage.read("w").dtype == storage.infos["w"].dtype == torch.bfloat16


def test_the_stand_in_leaves_the_finetunes_alone(tmp_path: Path) -> None:
    finetunes = {task: open_source(folder, task) for task, folder in folders(BERT, 3, tmp_path).items()}
    base = stand_in(finetunes)
    base.config.num_labels = 11
    assert base.label == "base" and [source.label for source in finetunes.values()] == list(finetunes)
    assert finetunes["task 0"].config.num_labels == 2
    two = stand_in({task: finetunes[task] for task in ("task 0", "task 1")})
    assert two.label == "task 0" and two.name == finetunes["task 0"].name


def test_with_batchnorm_the_first_stands_for_the_base(tmp_path: Path) -> None:
    """Its statistics, each task's own, do not follow a median of weights."""
    finetunes = models(RESNET, 3)
    report = emr_hf.merge(None, finetunes, tmp_path / "out")
    name = "resnet.embedder.embedder.convolution.weight"
    (base,) = (tensor for key, tensor in stored(tmp_path / "out").items() if key.endswith(f"model.{name}"))
    assert torch.equal(base, finetunes["task 0"].state_dict()[name])
    assert any(BASELESS in warning for warning in report.warnings)
