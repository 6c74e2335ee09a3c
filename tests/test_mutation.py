"""Damaged repos, recipes, adapters and checkpoints, and killed verbs: a few of each, and the judge of both."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import emr_hf

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import children  # noqa: E402
import damage  # noqa: E402
import kills  # noqa: E402
import mutation  # noqa: E402
from readers import CommandError, Job, Refused, Verb  # noqa: E402
from specimens import Specimen  # noqa: E402


def run(script, *arguments):
    """A benchmark's status and what it printed: in a process of its own, as it forks and pytest has threads."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)


def counts(text):
    """Outcome -> how often, of the table's last row."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return dict(zip(rows[0][2:], map(int, rows[-1][2:])))


def test_nothing_damaged_is_read_wrongly():
    readers = ("load", "remove", "merge", "cli-export", "peft")
    done = run("mutation.py", "--seed", 3, "--cases", 48, "--reader", *readers)
    found = counts(done.stdout)
    assert {name: found[name] for name in sorted(mutation.BAD)} == dict.fromkeys(sorted(mutation.BAD), 0), done.stdout
    assert found["told"] > 20  # most damage is no other sound input
    assert done.returncode == 0


def test_a_kill_leaves_the_old_or_the_new():
    done = run("kills.py", "--seed", 3, "--kills", 3, "--verb", "merge", "export")
    assert "with leftovers" in done.stdout, done.stderr
    assert not re.findall(r"^\* .*", done.stdout, re.MULTILINE), done.stdout
    assert done.returncode == 0


# The judge


@pytest.fixture
def job(tmp_path):
    place = tmp_path / "case"
    damage.write_outside(place / damage.OUTSIDE)
    (place / "repo").mkdir()
    specimen = Specimen("tiny", place / "repo", ("a",), place / "base", {})
    return Job(specimen, place / "repo", place / "target")


def outcome(job, act, expected=None, accept=damage.NONE, **verb):
    found = mutation.attempt(job, Verb(act, **verb), damage.Damage("x", ("config.json", "field"), accept), expected)
    return found["outcome"]


def raising(error):
    def act(job):
        raise error

    return act


def writing(path, content="x"):
    def act(job):
        (job.target / path).parent.mkdir(parents=True, exist_ok=True)
        (job.target / path).write_text(content)
        return {}

    return act


def test_errors_are_told_apart(job):
    assert outcome(job, raising(emr_hf.EMRError("config.json: expected a number"))) == "told"
    assert outcome(job, raising(Refused("emr-hf: config.json: expected a number"))) == "told"
    assert outcome(job, raising(emr_hf.EMRError("something is wrong"))) == "vague"
    assert outcome(job, raising(emr_hf.EMRError("config.json:\nexpected a number"))) == "vague"
    assert outcome(job, raising(KeyError("config.json"))) == "raw"
    assert outcome(job, raising(CommandError("status 3"))) == "raw"
    assert outcome(job, raising(SystemExit(1))) == "raw"
    assert outcome(job, raising(KeyError("x")), stock=True) == "told"  # before it came to this package


def test_results_are_compared(job):
    assert outcome(job, lambda job: {"w": "1"}, {"w": "1"}) == "right"
    assert outcome(job, lambda job: {"w": "2"}, {"w": "1"}) == "wrong"
    assert outcome(job, lambda job: {}, {"w": "1"}) == "wrong"
    assert outcome(job, lambda job: {"w": "2"}, {"w": "1"}, damage.ALL) == "right"
    assert outcome(job, lambda job: {"w": "not finite"}, {"w": "1"}, damage.ALL) == "wrong"
    assert outcome(job, lambda job: 1, collect=raising_on_two) == "wrong"


def raising_on_two(job, given):
    raise ValueError("it cannot be read")


def test_what_is_written_where_it_may_not_be_is_found(job):
    assert outcome(job, writing("out/x"), writes=True) == "right"
    assert outcome(job, writing("../beside")) == "wrong"
    (job.where.parent / "beside").unlink()
    assert outcome(job, writing(f"../{damage.OUTSIDE}/notes.txt")) == "wrong"
    assert outcome(job, writing("out/x", f"... {damage.SECRET} ...")) == "wrong"
    assert outcome(job, writing(".out.partial-1/x"), writes=True) == "wrong"


def test_half_a_repo_after_an_error_is_found(job):
    def act(job):
        writing("out/x")(job)
        raise emr_hf.EMRError("config.json: expected a number")

    assert outcome(job, act, writes=True) == "wrong"
    assert outcome(job, act) == "told"


def test_a_child_that_dies_or_hangs_does_not_keep_the_others(tmp_path):
    def work(name):
        if name == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "wait":
            time.sleep(1000)
        while name == "busy":
            pass
        return {"outcome": "right"}

    names = ["one", "die", "two", "wait", "busy", "three"]
    found = children.run_steps(names, work, children.Limits(cpu=1, idle=2.0), tmp_path / "log")
    assert [found[name]["outcome"] for name in names] == ["right", "signal", "right", "hang", "hang", "right"]
    assert found["die"]["text"] == "SIGKILL"


def test_a_child_is_killed_at_the_step_that_was_asked_for(tmp_path):
    def act(at):
        kills.Steps(tmp_path, at).watch()
        for number in range(4):
            (tmp_path / str(number)).mkdir()

    assert children.kill_child(lambda: act(3), tmp_path / "log")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", "1"]


def test_an_end_before_the_kill_is_told(tmp_path):
    assert not children.kill_child(lambda: None, tmp_path / "log")


def test_a_target_is_the_old_the_new_or_wrong():
    old, new = {"w": "1"}, {"w": "2"}
    assert kills._judged({"result": old}, old, new, False) == ("as it was", "")
    assert kills._judged({"result": new}, old, new, False) == ("complete", "")
    assert kills._judged({"result": None}, None, new, False) == ("as it was", "")
    assert kills._judged({"result": {"w": "3"}}, old, new, False)[0] == "wrong"
    assert kills._judged({"result": None}, old, new, False)[0] == "wrong"
    assert kills._judged({"error": "x"}, old, new, True)[0] == "wrong"
    assert kills._judged({"refused": "x"}, old, new, True) == ("refused", "")
    assert kills._judged({"refused": "x"}, old, new, False)[1]


def test_every_case_is_the_same_again():
    cases = mutation.numbers_of(2000, ["repo", "recipe", "adapter", "input"])
    assert len(cases) == len(set(cases)) == 2000
    assert mutation.numbers_of(1000, ["repo", "recipe", "adapter", "input"]) != cases
    assert set(mutation.numbers_of(1000, ["recipe"])) == {("recipe", number) for number in range(1000)}


@pytest.mark.parametrize("value", [0, 5, True, 0.5, "x", [1, 2], {"a": 1, "b": 2}, None], ids=repr)
def test_wrong_values_differ_from_the_right_one(value):
    found = [new for _, new in damage.wrong_values(value)]
    assert len(found) > 20
    assert all(type(new) is not type(value) or new != value for new in found)


def test_json_is_written_with_what_python_has_no_value_for(tmp_path):
    file = tmp_path / "repo" / "x.json"
    file.parent.mkdir()
    damage.write_json(file, {"a": damage.Raw("1e999"), "b": [f"@{damage.OUTSIDE}@"], "c": float("nan")})
    assert '"a": 1e999' in file.read_text()
    assert str(tmp_path / damage.OUTSIDE) in file.read_text()
    assert "NaN" in file.read_text()
