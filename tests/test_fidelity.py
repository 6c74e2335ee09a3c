"""The benchmark of accuracy kept: its parts, and all of it on tiny networks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "recipes")]

import domain as one_domain  # noqa: E402
import domains  # noqa: E402
import fidelity  # noqa: E402
import methods  # noqa: E402


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMR_HF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def domain():
    return domains.build("text", seed=0, rows=0, quick=True)


def result(**accuracies):
    """Of methods' accuracies on tasks a, b, ..."""
    entries = {
        method: {"accuracy": dict(zip("abc", values)), "total": 4000, "beside": 1000, "figures": {}, "chosen": None}
        for method, values in accuracies.items()
    }
    tasks = {task: {"test rows": 5} for task, _ in zip("abc", accuracies["individual"])}
    return fidelity.Result("text", 0, tasks, entries)


def test_rows_are_cut_without_overlap():
    test, validation = one_domain.cut(range(1000), 500)
    assert (test, validation) == (range(500), range(500, 700))
    assert one_domain.cut(range(600), 500)[1] == range(500, 600)
    with pytest.raises(ValueError, match="580 test rows leave 20 of 600"):
        one_domain.cut(range(600), 580)


def test_kept_is_the_ratio_of_means():
    found = result(individual=[1.0, 0.5], EMR=[0.9, 0.25])
    assert found.kept("EMR") == pytest.approx(1.15 / 1.5)
    assert found.ratios("EMR") == pytest.approx({"a": 0.9, "b": 0.5})


def test_several_seeds_show_their_spread():
    results = [result(individual=[1.0, 1.0], EMR=[0.8, 1.0]), result(individual=[1.0, 1.0], EMR=[1.0, 1.0])]
    header, _, _, emr = fidelity.accuracy_table(results)
    assert header == "| method | a | b | mean | kept | mean of ratios | on disk | beside the base |"
    assert emr.startswith("| EMR | 90.0% ± 14.1 | 100.0% ± 0.0 | 95.0% ± 7.1 | 95.0% ± 7.1 |")
    assert emr.endswith("| 4.0 kB | 1.0 kB |")
    assert fidelity.accuracy_table(results[:1])[3].startswith("| EMR | 80.0% | 100.0% | 90.0% | 90.0% | 90.0% |")


def test_correlation_is_over_repos_and_tasks():
    found = result(individual=[1.0, 1.0, 1.0], EMR=[0.9, 0.8, 0.7])
    found.entries["EMR"]["figures"] = {
        task: {"relative_error": error, "cosine": -error, "sign_conflict": error}
        for task, error in zip("abc", (0.1, 0.2, 0.3))
    }
    pytest.importorskip("scipy")
    assert next(fidelity.correlation_lines([found])) == "- relative error: -1.00 over 3 pairs of repo and task"


def test_scores_are_kept(domain, monkeypatch):
    chosen = ["individual", "weight average", "task arithmetic best", "EMR"]
    first = fidelity.measure(domain, chosen, 0, quick=True)
    assert list(first.entries) == chosen
    assert first.entries["task arithmetic best"]["chosen"] in methods.SCALES
    assert set(first.entries["EMR"]["figures"]) == set(domain.tasks)

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(one_domain.Data, "exam", never)
    again = fidelity.measure(domains.build("text", seed=0, rows=0, quick=True), chosen, 0, quick=True)
    assert again.entries == json.loads(json.dumps(first.entries))
    with pytest.raises(AssertionError, match="measured again"):
        fidelity.measure(domain, ["elect"], 0, quick=True)


def test_a_rival_that_is_not_there_is_left_out(domain, monkeypatch, capsys):
    monkeypatch.delenv("EMR_MERGEKIT", raising=False)
    assert list(fidelity.measure(domain, ["individual", "mergekit TIES"], 0, quick=True).entries) == ["individual"]
    assert "mergekit TIES: left out: EMR_MERGEKIT names no Python" in capsys.readouterr().err


def test_elect_mask_and_rescale_are_emr(domain, tmp_path):
    given = methods.Checkpoints(domain)
    weights = {}
    given.with_weights = lambda task, rebuilt: weights.setdefault(task, rebuilt)
    given.score = lambda task, model, split: 0.0
    made = methods.ablation(given, tmp_path, mask=True, rescale=True)
    repo = methods.CONTENDERS["EMR"](methods.Checkpoints(domain), tmp_path)
    for task in domain.tasks:
        made.score(task)
        merged = domain.auto.from_pretrained(tmp_path / "repo").set_task(task).model.state_dict()
        for name, weight in weights[task].items():
            torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6)
    # The repo's files have headers, and masks of whole bytes.
    assert made.total == pytest.approx(repo.total, rel=0.2)


def test_a_merge_in_one_scale_is_linear_in_it(domain, tmp_path):
    given = methods.Checkpoints(domain)
    weights = {}
    given.with_weights = lambda task, merged: weights.setdefault(task, merged)
    given.score = lambda task, model, split: 0.0
    methods.best_scale(given, tmp_path, "ties", scales=[0.3], density=0.2).score("words0")
    for name, expected in methods.ties(given.base, given.finetunes, density=0.2, scale=0.3).items():
        torch.testing.assert_close(weights["words0"][name], expected)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_adapters_are_merged_in_their_own_space(name):
    adapters = domains.build(name, seed=0, rows=0, quick=True)
    given = methods.Checkpoints(adapters)
    assert all("ia3_" in tensor for tensor in given.base) == (name == "ia3")
    assert not any("embeddings" in tensor or "classifier" in tensor for tensor in given.base)
    batch = {"input_ids": torch.tensor([[7, 30, 40]])}
    same = given.with_weights("words0", given.finetunes["words0"]).eval()
    torch.testing.assert_close(same(**batch).logits, adapters.load("words0").eval()(**batch).logits)


def test_probe_reads_what_is_there(domain):
    generator = torch.Generator().manual_seed(0)

    class Backbone(torch.nn.Module):
        base_model = property(lambda self: lambda hidden: type("Output", (), {"last_hidden_state": hidden}))

    def rows(count):
        hidden = torch.randn(count, 2, 4, generator=generator)
        return [{"hidden": states, "labels": int(states[0, 1] > 0)} for states in hidden]

    data = one_domain.Data(rows(200), [], rows(100), torch.utils.data.default_collate)
    assert methods.probe(Backbone(), data) > 0.9
    assert 0.3 < data.majority() < 0.7


def test_smoke(tmp_path):
    """Everything but the command line's defaults, with a figure where matplotlib is there."""
    pytest.importorskip("matplotlib")
    arguments = ["--domains", "text", "glyphs", "--seeds", "0", "1", "--methods", "EMR", "frozen probe", "TIES"]
    files = ["--json", str(tmp_path / "all.json"), "--figure", str(tmp_path / "all.svg")]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "fidelity.py", "--quick", *arguments, *files],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "all.json").read_text())
    assert [(one["domain"], one["seed"]) for one in content["results"]] == [
        (name, seed) for name in ("text", "glyphs 2", "glyphs 3") for seed in (0, 1)
    ]
    assert "| EMR |" in done.stdout and "kept, of N tasks | 2 | 3" in done.stdout
    assert "<svg" in (tmp_path / "all.svg").read_text()
