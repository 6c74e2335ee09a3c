"""What is told of single tensors: in the report, in the tables and in the picture, and the warnings of a merge."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image

import emr_hf
from emr_hf import hub, inspection, suspicions
from emr_hf.layers import by_kind, by_layer, kind_of, worst_tensors
from emr_hf.plotting import plot_layers
from emr_hf.report import TensorNumbers, to_json
from tests import tiny
from tests.test_sources import stored_tensors


def saved_report(folder):
    return json.loads((folder / "emr_report.json").read_text())


# The report


def test_the_numbers_of_a_tensor_are_those_of_what_is_stored(bert_inputs, bert_repo):
    config, tensors = emr_hf.EMRConfig.from_pretrained(bert_repo), saved_report(bert_repo)["tensors"]
    assert list(tensors) == config.merged_parameters
    plain = {}
    for task, folder in bert_inputs.finetunes.items():
        plain[task] = transformers.BertForSequenceClassification.from_pretrained(folder).state_dict()
    model, stored = emr_hf.EMRMergedModel.from_pretrained(bert_repo), stored_tensors(bert_repo)
    for name in ("bert.encoder.layer.1.output.dense.weight", "bert.encoder.layer.0.output.LayerNorm.bias"):
        assert tensors[name]["elements"] == stored[f"model.{name}"].numel()
        for task, values in tensors[name]["tasks"].items():
            found = TensorNumbers(*values)
            base = stored[f"model.{name}"].double()
            delta = plain[task][name].double() - base
            kept = model.set_task(task).model.state_dict()[name].double() - base
            assert found.length == pytest.approx(float(delta.norm()), rel=1e-5)
            assert found.relative_error == pytest.approx(float((delta - kept).norm() / delta.norm()), rel=1e-4)
            assert found.cosine == pytest.approx(float((delta * kept).sum() / delta.norm() / kept.norm()), rel=1e-4)
            moved = int((delta != 0).sum())
            assert found.moved == moved
            assert found.sign_conflict == pytest.approx(1 - int((kept != 0).sum()) / moved, rel=1e-5)


def test_the_tensors_make_up_the_whole_and_are_not_in_the_configuration(bert_repo):
    report = saved_report(bert_repo)
    for task, whole in report["tasks"].items():
        parts = [TensorNumbers(*entry["tasks"][task]) for entry in report["tensors"].values()]
        square = math.fsum(part.length**2 for part in parts)
        error = math.fsum((part.relative_error * part.length) ** 2 for part in parts)
        assert math.sqrt(square) == pytest.approx(whole["length"], rel=1e-5)
        assert math.sqrt(error / square) == pytest.approx(whole["relative_error"], rel=1e-4)
    assert "tensors" not in json.loads((bert_repo / "config.json").read_text())["report"]
    text = (bert_repo / "emr_report.json").read_text()
    assert text.count("\n") < 8 * len(report["tensors"]) + 70  # a line for each task's numbers


def test_lists_of_numbers_are_on_one_line_and_texts_as_they_were():
    content = {"a": [1.5, -2e-7, 3], "b": ["[\n 1,\n 2\n]", "x"], "c": [], "d": [[1, 2], [3]]}
    assert json.loads(to_json(content)) == content
    assert '"a": [1.5, -2e-07, 3]' in to_json(content)


def test_a_saved_model_keeps_them(bert_repo, tmp_path):
    repo = shutil.copytree(bert_repo, tmp_path / "repo")
    model = emr_hf.EMRMergedModel.from_pretrained(repo)
    for folder in (tmp_path / "saved", repo):
        model.save_pretrained(folder)
        assert saved_report(folder)["tensors"] == saved_report(bert_repo)["tensors"]
        assert "tensors" not in json.loads((folder / "config.json").read_text())["report"]


def test_added_and_removed_tasks(bert_inputs, bert_repo, tmp_path):
    before = saved_report(bert_repo)["tensors"]
    torch.manual_seed(3)
    new = transformers.BertForSequenceClassification.from_pretrained(bert_inputs.finetunes["items"])
    tiny.move(new, 11)
    emr_hf.add_task(bert_repo, "new", new, tmp_path / "added")
    added = saved_report(tmp_path / "added")["tensors"]
    assert list(added) == list(before)
    for name, entry in added.items():
        assert {task: entry["tasks"][task] for task in before[name]["tasks"]} == before[name]["tasks"]
        assert len(entry["tasks"]["new"]) == 5
    emr_hf.remove_task(tmp_path / "added", "new", tmp_path / "removed")
    assert saved_report(tmp_path / "removed")["tensors"] == before


# The tables


def test_a_repo_with_an_older_report_prints_as_before(run, bert_repo, bert_inputs, tmp_path):
    old = shutil.copytree(bert_repo, tmp_path / "old")
    report = saved_report(old)
    del report["tensors"]
    (old / "emr_report.json").write_text(json.dumps(report))
    before = run("inspect", old).out
    assert "kind of layer" not in before
    assert run("inspect", bert_repo).out.startswith(before.rstrip("\n").replace(str(old), str(bert_repo)))
    result = run("inspect", old, "--plot", tmp_path / "report.png")
    assert result.status == 1 and "older" in result.err and not (tmp_path / "report.png").exists()
    (old / "emr_report.json").unlink()
    assert run("inspect", old).out == before
    emr_hf.add_task(old, "again", bert_inputs.finetunes["items"], tmp_path / "added")
    text = run("inspect", tmp_path / "added").out  # the new task only is known by tensor
    assert "its worst tensor" in text and "again" in text


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"tensors": None},
        {"tensors": []},
        {"tensors": {"p": None}},
        {"tensors": {"p": {"elements": 3}}},
        {"tensors": {"p": {"elements": "3", "tasks": {}}}},
        {"tensors": {"p": {"elements": 3, "tasks": {"items": [0.5, 1.0]}}}},
        {"tensors": {"p": {"elements": 3, "tasks": {"items": [0.5, None, 0, 0, 0]}}}},
        {"tensors": {"p": {"elements": 3, "tasks": {"items": [0.5, math.nan, 0, 0, 0]}}}},
    ],
)
def test_a_broken_report_is_as_none(run, bert_repo, bert_inputs, tmp_path, broken):
    repo = shutil.copytree(bert_repo, tmp_path / "repo")
    name = "bert.encoder.layer.0.output.dense.weight"
    (repo / "emr_report.json").write_text(json.dumps(broken).replace('"p"', json.dumps(name)))
    assert emr_hf.inspect(repo).tensors == {}
    assert run("inspect", repo).status == 0
    assert emr_hf.remove_task(repo, "items", tmp_path / "removed").tensors == {}
    emr_hf.EMRMergedModel.from_pretrained(repo).save_pretrained(tmp_path / "saved")
    assert saved_report(tmp_path / "saved")["tensors"] == {}


def test_a_model_from_nowhere_reads_nothing_of_the_current_directory(bert_repo, tmp_path, monkeypatch):
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo)
    model.config.name_or_path = ""
    monkeypatch.chdir(bert_repo)
    assert hub.saved_tensors("") == {}
    model.save_pretrained(tmp_path / "saved")
    assert saved_report(tmp_path / "saved")["tensors"] == {}


def test_inspect_tells_the_method_and_what_the_parts_are(run, bert_inputs, bert_repo, tmp_path):
    text = run("inspect", bert_repo).out
    assert "method   emr" in text and ": base " in text and ", scale " not in text
    assert emr_hf.inspect(bert_repo).method == "emr"
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out", method="levels", tau_dtype="int4")
    text = run("inspect", tmp_path / "out").out
    assert "method   levels" in text and "base (nearer level)" in text and ", scale " in text
    found = json.loads(run("inspect", tmp_path / "out", "--format", "json").out)
    assert found["method"] == "levels" and found["parts"]["base"] > 0


def test_inspect_tells_kinds_of_layers_and_worst_tensors(run, bert_repo):
    text = run("inspect", bert_repo).out
    assert "bert.encoder.layer.*.attention.self.query.weight" in text
    assert "norms" in text and "biases" in text and "its worst tensor" in text
    found = emr_hf.inspect(bert_repo)
    assert found.tensors == saved_report(bert_repo)["tensors"]
    assert json.loads(run("inspect", bert_repo, "--format", "json").out)["tensors"] == found.tensors


def test_a_hub_repos_report_is_fetched(bert_repo, monkeypatch):
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name))
        return str(bert_repo / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert hub.saved_tensors("me/merged") == saved_report(bert_repo)["tensors"]
    assert asked == [("me/merged", "emr_report.json")]
    monkeypatch.undo()
    assert hub.saved_tensors("me/merged") == {}  # not to be had


def entry(*tasks, elements=100, numbers=(0.5, 0.8, 0.2, 1.0, 90)):
    return {"elements": elements, "tasks": {task: list(numbers) for task in tasks}}


def test_kinds_go_by_names_of_any_architecture():
    assert kind_of("model.layers.13.mlp.experts.2.w1.weight") == "model.layers.*.mlp.experts.*.w1.weight"
    for name in ("model.layers.0.input_layernorm.weight", "h.0.ln_1.weight", "transformer.ln_f.weight", "bn1.weight"):
        assert kind_of(name) == "norms"
    assert kind_of("h.0.ln_1.bias") == kind_of("encoder.layer.0.attention.self.query.bias") == "biases"
    many = {f"part{k}.layers.{layer}.weight": entry("a", elements=k + 1) for k in range(30) for layer in range(2)}
    many |= {"norm.weight": entry("a"), "x.bias": entry("a")}
    kinds = by_kind(many)
    assert len(kinds) == 12 and [*kinds][-1] == "others" and "part29.layers.*.weight" in kinds
    assert sum(map(len, kinds.values())) == len(many)


def test_layers_go_by_stacks():
    one = by_layer(["bert.embeddings.word.weight", *(f"bert.encoder.layer.{k}.w" for k in (0, 10, 2)), "pooler.w"])
    assert list(one) == ["embeddings", "layer 0", "layer 2", "layer 10", "others"]
    two = by_layer(["shared.weight", "encoder.block.0.layer.1.w", "decoder.block.0.layer.0.w", "decoder.block.1.w"])
    assert list(two) == ["encoder 0", "decoder 0", "decoder 1", "others"]


def test_the_worst_tensor_is_one_that_matters():
    tensors = {
        "a.weight": entry("t", numbers=(0.5, 0.8, 0.2, 3.0, 90)),
        "b.weight": entry("t", numbers=(0.6, 0.8, 0.2, 4.0, 90)),
        "b.bias": entry("t", numbers=(0.9, 0.8, 0.2, 0.1, 90)),
    }
    worst = worst_tensors(tensors, ["t", "unknown"])
    assert list(worst) == ["t"] and worst["t"].tensor == "b.weight"
    assert worst["t"].share == pytest.approx(16 / 25.01)
    assert worst_tensors({"a": entry("t", numbers=(0, 1, 0, 0, 0))}, ["t"])["t"].share == 0


def test_many_tasks_are_told_by_mean_and_worst():
    tasks = [f"task-{index}" for index in range(9)]
    tensors = {"a.weight": entry(*tasks), "b.weight": entry("task-4", numbers=(0.9, 0.5, 0.4, 9.0, 90))}
    found = inspection.Inspection("r", "X", "b", tasks[0], "float32", 2, dict.fromkeys(tasks, {}), {}, {}, tensors)
    header, rows = found._kinds()
    assert header[-3:] == ["mean", "highest", "task"]
    assert rows == [["a.weight", "100", "0.500", "0.500", "task-0"], ["b.weight", "100", "0.900", "0.900", "task-4"]]


# The picture


def test_the_picture(run, bert_repo, tmp_path):
    result = run("inspect", bert_repo, "--plot", tmp_path / "report.png")
    assert result.status == 0 and result.err == f"emr-hf: wrote {tmp_path / 'report.png'}\n"
    assert "its worst tensor" in result.out
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    for suffix in (".svg", ".pdf"):
        assert emr_hf.inspect(bert_repo).plot(tmp_path / f"report{suffix}").stat().st_size > 1000


def test_many_layers_and_tasks_fit(tmp_path):
    tasks = [f"a task with $ and a rather long name, {index}" for index in range(30)]
    tensors = {f"model.layers.{layer}.w": entry(*tasks, numbers=(0.7, 0.7, 0.3, 1.0, 9)) for layer in range(80)}
    tensors["lm_head.weight"] = entry(*tasks[1:])
    plot_layers(tensors, tasks, tmp_path / "report.png", "me/merged")
    with Image.open(tmp_path / "report.png") as picture:
        assert 2000 < picture.height < 4000 and 2000 < picture.width < 5000


def test_a_picture_that_cannot_be_is_refused_before_any_work(run, bert_repo, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_read", lambda repo: pytest.fail("the repo was read"))
    for name, told in (("report.gif", ".png, .svg, .pdf"), ("report", ".png"), ("absent/report.png", "no folder")):
        result = run("inspect", bert_repo, "--plot", tmp_path / name)
        assert (result.status, result.out) == (1, "") and told in result.err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("inspect", bert_repo, "--plot", tmp_path / "report.png")
    assert result.status == 1 and "emr_hf[plot]" in result.err


# Warnings


def near(inputs, task, folder, share) -> Path:
    """A finetune that stands between another one and the base, with a little of its own."""
    model = transformers.BertForSequenceClassification.from_pretrained(inputs.finetunes[task])
    base = transformers.BertModel.from_pretrained(inputs.base).state_dict()
    with torch.no_grad():
        for name, parameter in model.bert.named_parameters():
            parameter.lerp_(base[name], share)
    tiny.move(model, 23, scale=0.002).save_pretrained(folder)
    return folder


def test_near_duplicates_are_told(bert_inputs, tmp_path):
    finetunes = {**bert_inputs.finetunes, "later": near(bert_inputs, "mnli.v1", tmp_path / "later", 0.3)}
    report = emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "out")
    [warning] = report.warnings
    assert warning.startswith("mnli.v1 and later: nearly the same finetune (cosine 0.9") and "merge one" in warning
    assert saved_report(tmp_path / "out")["warnings"] == [warning]
    again = emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "again", threads=1)
    assert again.warnings == [warning]


def test_what_is_equal_or_unlike_is_not_told_as_near(bert_inputs, bert_repo, tmp_path):
    assert saved_report(bert_repo)["warnings"] == []
    finetunes = {**bert_inputs.finetunes, "copy": shutil.copytree(bert_inputs.finetunes["items"], tmp_path / "copy")}
    warnings = emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "out").warnings
    assert warnings and not any("nearly the same" in warning for warning in warnings)


def warnings_of(merge, errors=None, known=()):
    plan = SimpleNamespace(tasks=[], finetunes={}, merged=[], recipe=SimpleNamespace(method="emr"), warnings=known)
    return suspicions.suspicious(plan, merge.sums, errors or {})


def test_what_is_known_of_a_task_is_told_once():
    base = {"w": torch.ones(8)}
    merge = emr_hf.merge_state_dicts(base, {"ba": base, "a": base, "moved": {"w": torch.zeros(8)}})
    assert [warning.split(":")[0] for warning in warnings_of(merge)] == ["ba", "a"]
    [warning] = warnings_of(merge, known=["ba: is the base itself"])
    assert warning.startswith("a: every merged tensor equals the base's")


def test_tasks_that_are_lost_are_told():
    generator = torch.Generator().manual_seed(0)
    finetunes = {task: {"w": torch.randn(4000, generator=generator)} for task in "abc"}
    finetunes["short"] = {"w": torch.randn(4000, generator=generator) / 7}
    merge = emr_hf.merge_state_dicts({"w": torch.zeros(4000)}, finetunes, method="levels")
    [warning] = warnings_of(merge, {task: sums.relative_error(1.0) for task, sums in merge.sums.items()})
    assert warning.startswith("short: further from what is rebuilt than from the base (relative error 2.1")


@pytest.mark.parametrize("method", ["emr", "fit"])
def test_a_copy_of_a_task_is_told_when_it_is_added(bert_inputs, tmp_path, method):
    later = near(bert_inputs, "mnli.v1", tmp_path / "later", 0.3)
    other = transformers.BertForSequenceClassification.from_pretrained(bert_inputs.finetunes["items"])
    tiny.move(other, 41).save_pretrained(tmp_path / "other")  # of items and of its own as much
    emr_hf.merge(bert_inputs.base, {**bert_inputs.finetunes, "later": later}, tmp_path / "out", method=method)
    for task, finetune, like in (
        ("copy", bert_inputs.finetunes["items"], "items"),
        ("again", near(bert_inputs, "items", tmp_path / "again", 0.3), "items"),
        ("other", tmp_path / "other", None),
    ):
        warnings = emr_hf.add_task(tmp_path / "out", task, finetune, tmp_path / f"out-{task}").warnings
        told = [warning.split(":")[0] for warning in warnings if "nearly the same" in warning]
        assert told == ([f"{like} and {task}"] if like else [])  # nothing of mnli.v1 and later, which are there


@pytest.mark.parametrize(
    ("method", "told"),
    [("emr", "wins most elections"), ("fit", "the fit serves it first"), ("levels", "the two levels serve it first")],
)
def test_a_dominating_task_is_told(bert_inputs, tmp_path, method, told):
    far = transformers.BertForSequenceClassification.from_pretrained(bert_inputs.finetunes["items"])
    finetunes = {**bert_inputs.finetunes, "far": tiny.move(far, 5, scale=0.5)}
    report = emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "out", method=method)
    first, *lost = report.warnings
    assert first.startswith("far: ") and "times as long" in first and told in first
    assert [warning.split(":")[0] for warning in lost] == ([] if method == "levels" else ["glue/sst2, mnli.v1, items"])
