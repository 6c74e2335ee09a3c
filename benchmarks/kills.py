"""Verbs that write, killed at every kind of moment: what is left at the target, and what the next run makes of it.

    python benchmarks/kills.py [--seed 0] [--kills 100] [--verb merge add ...] [--only merge-17] [--out table.md]

A child does a verb onto a target that is empty, or that holds what an earlier run wrote, and is killed (SIGKILL):
every other time at a step on the disk (the opening, renaming, syncing or removing of a file), one of all that the verb
takes or of the last fifth of them, where the target appears; else after a random time. Then the target has to be as it
was, or complete, and right to the bit; beside it there may be leftovers with names of their own and nothing else; and
the same verb once more has to succeed and to leave none of them. `save_pretrained` promises less: what is there
afterwards loads as the old or as the new model, or not at all, with an error of this package's.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":  # before torch is imported
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from children import Limits, kill_child, one_thread, run_steps  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from specimens import digests, full_models, warm, weights_of  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402

import emr_hf  # noqa: E402
from emr_hf.report import markdown_table  # noqa: E402
from tests import tiny  # noqa: E402

STATES = ("as it was", "complete", "refused", "wrong")
LEFTOVER = re.compile(r"\..*(partial|replaced).*")
_EVENTS = frozenset(
    "open os.rename os.mkdir os.rmdir os.remove os.link os.symlink os.truncate os.chmod os.scandir os.listdir "
    "shutil.copyfile shutil.rmtree ctypes.dlsym".split()
)
_PATCHED = ("fsync", "fdatasync", "pwrite", "posix_fallocate", "ftruncate")
TASKS = ("glue/sst2", "mnli.v1")


@dataclass(frozen=True)
class World:
    """Models, and repos made of them.

    Attributes:
        repo: a merged repo, the input of verbs that change one.
        earlier: another merge of the same, sharded, with a file of its owner's: what is overwritten.
    """

    folder: Path

    @property
    def models(self) -> Path:
        return self.folder / "models"

    @property
    def base(self) -> Path:
        return self.models / "base"

    @property
    def finetunes(self) -> dict[str, Path]:
        return {task: self.models / f"finetune-{index}" for index, task in enumerate(TASKS)}

    @property
    def new(self) -> Path:
        return self.models / f"finetune-{len(TASKS)}"

    @property
    def repo(self) -> Path:
        return self.folder / "repo"

    @property
    def earlier(self) -> Path:
        return self.folder / "earlier"

    @property
    def aligned(self) -> Path:
        return self.folder / "aligned"

    def build(self) -> None:
        """Write it all."""
        full_models(tiny.BERT, self.models, TASKS)
        emr_hf.merge(self.base, self.finetunes, self.repo, progress=False)
        emr_hf.merge(self.base, self.finetunes, self.earlier, method="fit", max_shard_size="60KB", progress=False)
        (self.earlier / "notes.txt").write_text("the owner's")
        first, second = self.finetunes.values()
        emr_hf.align_recipe(emr_hf.Recipe(None, {"one": second, "two": first}), self.aligned)


@dataclass(frozen=True)
class Scene:
    """A verb onto a target of one kind.

    Attributes:
        act: world, where the repo is that it reads, `out`, and whether to overwrite.
        look: what is at a target.
        before: what is there at first.
        in_place: whether that is also what is read.
        weaker: whether a target may be refused afterwards.
    """

    act: Callable[[World, Path, Path, bool], object]
    look: Callable[[Path], dict[str, str]]
    before: str | None = None
    in_place: bool = False
    weaker: bool = False


def _repo_at(out: Path) -> dict[str, str]:
    model = emr_hf.EMRMergedModel.from_pretrained(out)
    found: dict[str, str] = {}
    for task in model.tasks:
        model.set_task(task)
        found |= digests({task: model.model.state_dict()})
    by_format = digests(weights_of(out))
    other = [name for name, value in by_format.items() if found.get(name) != value]
    tokenizers = {str(path.relative_to(out)): path.read_bytes().hex() for path in sorted(out.glob("tasks/*/*"))}
    return {**found, **{f"{name}, by docs/format.md": by_format[name] for name in other}, **tokenizers}


def _export_at(out: Path) -> dict[str, str]:
    return digests({"": AutoModelForSequenceClassification.from_pretrained(out).state_dict()})


def _alignment_at(out: Path) -> dict[str, str]:
    paths = sorted(out.glob("*/model.safetensors"))
    found = digests({path.parent.name: load_file(path) for path in paths})
    return {**found, "symmetries": str((out / "symmetries.json").is_file())}


def _merge(world: World, repo: Path, out: Path, overwrite: bool) -> None:
    emr_hf.merge(world.base, world.finetunes, out, overwrite=overwrite, progress=False)


def _add(world: World, repo: Path, out: Path, overwrite: bool) -> None:
    emr_hf.add_task(repo, "new", world.new, out, overwrite=overwrite, progress=False)


def _remove(world: World, repo: Path, out: Path, overwrite: bool) -> None:
    emr_hf.remove_task(repo, TASKS[0], out, overwrite=overwrite)


def _export(world: World, repo: Path, out: Path, overwrite: bool) -> None:
    emr_hf.export(repo, TASKS[1], out)


def _align(world: World, repo: Path, out: Path, overwrite: bool) -> None:
    first, second = world.finetunes.values()
    emr_hf.align_recipe(emr_hf.Recipe(None, {"one": first, "two": second}), out, overwrite=overwrite)


def _save(world: World, repo: Path, out: Path, overwrite: bool) -> None:
    emr_hf.EMRMergedModel.from_pretrained(world.repo).save_pretrained(out)


SCENES: Mapping[str, Mapping[str, Scene]] = {
    "merge": {"a new folder": Scene(_merge, _repo_at), "over a repo": Scene(_merge, _repo_at, "earlier")},
    "add": {"a new folder": Scene(_add, _repo_at), "in place": Scene(_add, _repo_at, "repo", in_place=True)},
    "remove": {"a new folder": Scene(_remove, _repo_at), "in place": Scene(_remove, _repo_at, "repo", in_place=True)},
    "export": {"a new folder": Scene(_export, _export_at)},
    "align": {"a new folder": Scene(_align, _alignment_at), "over another": Scene(_align, _alignment_at, "aligned")},
    "save_pretrained": {
        "a new folder": Scene(_save, _repo_at, weaker=True),
        "over a repo": Scene(_save, _repo_at, "earlier", weaker=True),
    },
}


class Steps:
    """Count the steps on the disk below a folder, and die at one of them.

    Args:
        below: the folder.
        at: number of the step; `None` to count only.
        late: whether to die after it, where that can be known, not before.
    """

    def __init__(self, below: Path, at: int | None = None, late: bool = False):
        self.below, self.at, self.late, self.count = str(below), at, late, 0

    def watch(self) -> None:
        """From now on, until the process ends."""
        for name in _PATCHED:
            if hasattr(os, name):
                setattr(os, name, self._watched(getattr(os, name)))
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and any(self._is_ours(argument) for argument in arguments):
            self._step()

    def _is_ours(self, argument: object) -> bool:
        if isinstance(argument, bytes):
            argument = os.fsdecode(argument)
        return isinstance(argument, (str, Path)) and (self.below in str(argument) or argument == "renameat2")

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            if not self.late:
                self._step()
            result = function(*arguments)
            if self.late:
                self._step()
            return result

        return watched

    def _step(self) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Kill:
    """What became of one.

    Attributes:
        state: of `STATES`.
        leftovers: beside the target.
        problem: what should not be; empty where all is well.
    """

    name: str
    verb: str
    mode: str
    moment: str
    state: str = ""
    leftovers: list[str] = field(default_factory=list)
    problem: str = ""


class Theatre:
    """Scenes, played in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log"
        self.world = World(folder / "world")
        self.stage = folder / "stage"
        self.expected: dict[tuple[str, str], tuple[dict[str, str] | None, dict[str, str], set[str]]] = {}
        self.steps: dict[tuple[str, str], int] = {}
        self.seconds: dict[tuple[str, str], float] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._child(lambda: self.world.build())

    def _child(self, work: Callable[[], Any]) -> Any:
        """The result of work, or its error's name and text under `error`, of this package's under `refused`."""

        def step(_: str) -> dict[str, Any]:
            try:
                return {"result": work()}
            except emr_hf.EMRError as error:
                return {"refused": f"{type(error).__name__}: {error}"}
            except Exception as error:
                return {"error": f"{type(error).__name__}: {error}"}

        return run_steps(["work"], step, Limits(cpu=120), self.log)["work"]

    @property
    def out(self) -> Path:
        return self.stage / "out"

    def _set(self, scene: Scene) -> None:
        shutil.rmtree(self.stage, ignore_errors=True)
        self.stage.mkdir()
        if scene.before is not None:
            shutil.copytree(self.world.folder / scene.before, self.out)

    def _act(self, scene: Scene, again: bool = False) -> None:
        repo = self.out if scene.in_place and not again else self.world.repo
        scene.act(self.world, repo, self.out, scene.before is not None or again)

    def rehearse(self, verb: str, mode: str) -> None:
        """Record what is at the target before and after, and how many steps lie between.

        Raises:
            RuntimeError: the verb fails.
        """
        scene = SCENES[verb][mode]
        self._set(scene)
        old = None if scene.before is None else self._child(lambda: scene.look(self.out))["result"]

        def act() -> int:
            steps = Steps(self.stage)
            steps.watch()
            self._act(scene)
            return steps.count

        started = time.monotonic()
        counted = self._child(act)
        self.seconds[verb, mode] = time.monotonic() - started
        new = self._child(lambda: scene.look(self.out))
        if "result" not in counted or "result" not in new or os.listdir(self.stage) != ["out"]:
            raise RuntimeError(f"{verb}, {mode}: {counted}, {new}, {os.listdir(self.stage)}")
        self.steps[verb, mode] = counted["result"]
        self.expected[verb, mode] = (old, new["result"], _files(self.out))

    def play(self, seed: int, verb: str, number: int) -> Kill:
        """One kill, and what comes after it."""
        random = Random(f"{seed}:{verb}:{number}")
        modes = list(SCENES[verb])
        mode = modes[number % len(modes)]
        scene = SCENES[verb][mode]
        if (verb, mode) not in self.steps:
            self.rehearse(verb, mode)
        while True:  # until it dies before its end
            moment = self._kill(scene, verb, mode, random, by_step=number // len(modes) % 2 == 0)
            if moment:
                break
        kill = Kill(f"{verb}-{number}", verb, mode, moment)
        self._examine(kill, scene)
        return kill

    def _kill(self, scene: Scene, verb: str, mode: str, random: Random, by_step: bool) -> str:
        """Set the scene and kill the verb; at which moment, or nothing where it came to its end."""
        self._set(scene)
        if not by_step:
            after = random.uniform(0, 1.2 * self.seconds[verb, mode])
            killed = kill_child(lambda: self._act(scene), self.log, after)
            return f"after {after:.3f} s" if killed else ""
        last = self.steps[verb, mode]
        at, late = random.randint(random.choice([1, last * 4 // 5]), last), random.random() < 0.5

        def work() -> None:
            Steps(self.stage, at, late).watch()
            self._act(scene)

        return f"step {at} of {last}" if kill_child(work, self.log) else ""

    def _examine(self, kill: Kill, scene: Scene) -> None:
        old, new, files = self.expected[kill.verb, kill.mode]
        beside = sorted(set(os.listdir(self.stage)) - {"out"})
        kill.leftovers = [name for name in beside if LEFTOVER.fullmatch(name)]
        found: dict[str, Any] = {"result": None}
        if self.out.exists() or self.out.is_symlink():
            found = self._child(lambda: scene.look(self.out))
        kill.state, kill.problem = _judged(found, old, new, scene.weaker)
        if strangers := [name for name in beside if name not in kill.leftovers]:
            kill.problem = kill.problem or f"beside the target there is {strangers}"
        if not kill.problem:
            kill.problem = self._again(kill, scene, new, files)

    def _again(self, kill: Kill, scene: Scene, new: dict[str, str], files: set[str]) -> str:
        """What is wrong after the same verb once more."""
        if kill.verb == "export":
            shutil.rmtree(self.out, ignore_errors=True)  # it never replaces anything
        done = self._child(lambda: self._act(scene, again=True))
        if "result" not in done:
            return f"once more: {done}"
        found = self._child(lambda: scene.look(self.out))
        if found.get("result") != new:
            return f"once more, the target is not right: {str(found)[:200]}"
        if left := sorted(set(os.listdir(self.stage)) - {"out"}):
            return f"once more, and there is still {left}"
        if (others := _files(self.out) ^ files) and others != {"notes.txt"}:
            return f"once more, and the target's files are others: {sorted(others)}"
        return ""


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _judged(found: dict[str, Any], old: dict | None, new: dict, weaker: bool) -> tuple[str, str]:
    """State of a target, and what is wrong with it."""
    if "result" in found:
        if found["result"] == new:
            return "complete", ""
        if found["result"] == old:
            return "as it was", ""
        return "wrong", "the target holds neither the old nor the new"
    if "refused" in found:
        return "refused", "" if weaker else f"the target is refused: {found['refused'][:200]}"
    return "wrong", f"the target cannot be read: {str(found)[:200]}"


def table(kills: Sequence[Kill]) -> list[str]:
    """Verb by state, in Markdown."""
    rows = []
    for verb, mode in dict.fromkeys((kill.verb, kill.mode) for kill in kills):
        group = [kill for kill in kills if (kill.verb, kill.mode) == (verb, mode)]
        states = Counter(kill.state for kill in group)
        left, bad = sum(bool(kill.leftovers) for kill in group), sum(bool(kill.problem) for kill in group)
        rows.append([verb, mode, *map(str, (len(group), *(states[state] for state in STATES), left, bad))])
    return markdown_table(["verb", "onto", "kills", *STATES, "with leftovers", "problems"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Verbs that write, killed at every kind of moment.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=100, help="of each verb")
    parser.add_argument("--verb", nargs="+", choices=list(SCENES), default=list(SCENES))
    parser.add_argument("--only", metavar="VERB-NUMBER", help="one kill, whose folder is kept")
    parser.add_argument("--out", type=Path, help="file for the table and the problems")
    options = parser.parse_args(arguments)
    one_thread()
    warm()
    folder = Path(tempfile.mkdtemp(prefix="emr-hf-kills-"))
    theatre = Theatre(folder)
    if options.only:
        verb, _, number = options.only.rpartition("-")
        print(theatre.play(options.seed, verb, int(number)), theatre.stage, sep="\n")
        return 0
    try:
        kills = [theatre.play(options.seed, verb, number) for verb in options.verb for number in range(options.kills)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    problems = [f"* {kill.name}, {kill.mode}, {kill.moment}: {kill.problem}" for kill in kills if kill.problem]
    text = "\n".join([f"seed {options.seed}", "", *table(kills), "", *problems]) + "\n"
    if options.out is not None:
        options.out.write_text(text)
    print(text)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
