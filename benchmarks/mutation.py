"""Damaged repos, recipes, adapters and checkpoints, given to every verb that reads them: what becomes of it.

    python benchmarks/mutation.py [--seed 0] [--cases 2000] [--kind repo ...] [--reader load ...] [--only repo-17]
        [--journal cases.jsonl] [--out table.md]

Each case is one damage to a copy of a tiny sound thing, read by every verb for its kind in a child process with limits
of memory and time. Outcomes:

* right: the verb did what it does with the sound thing, to the bit; or something else that is sound, where nothing
  tells it from what was meant, as with a label of another name;
* told: an error of this package's, of one line, that names the file, the field or the tensor;
* vague: an error of this package's that does not;
* wrong: success with other weights, with numbers that are not finite, or with files written or read where they may not
  be; or an error that leaves half of a repo;
* raw: another exception, or a command line with a traceback or an exit status other than 0, 1 and 2;
* signal, hang: the process died, or had no end: it was busy, or waited, for too long.

A case depends on seed, kind and number alone: `--only repo-17` does it again and keeps its folder. With `--journal` an
interrupted run goes on where it was. Changes of weights that leave finite numbers are no damage here: headers do not
tell them.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":  # before torch is imported
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import catalog  # noqa: E402
import damaged_recipes  # noqa: E402
from children import Limits, one_thread, run_steps  # noqa: E402
from damage import ALL, OUTSIDE, SECRET, Damage, DoesNotApply, write_outside  # noqa: E402
from damaged_files import MARK  # noqa: E402
from readers import VERBS, CommandError, Job, Refused, Result, Verb, reference_of  # noqa: E402
from specimens import Specimen, build, warm  # noqa: E402

from emr_hf import EMRError  # noqa: E402
from emr_hf.report import markdown_table  # noqa: E402

OUTCOMES = ("right", "told", "vague", "wrong", "raw", "signal", "hang")
BAD = frozenset({"wrong", "raw", "signal", "hang"})
FAMILIES: Mapping[str, Sequence[catalog.Family]] = {
    "repo": catalog.REPO,
    "recipe": damaged_recipes.RECIPE,
    "adapter": catalog.ADAPTER,
    "input": catalog.INPUT,
}
SHARES = {"repo": 0.5, "recipe": 0.15, "adapter": 0.15, "input": 0.2}
_SOUND = Damage("nothing", ())
_LOADING = ("load", "mapped", "auto", "peft")


@dataclass(frozen=True)
class Reading:
    """What became of one damaged thing under one verb."""

    case: str
    kind: str
    specimen: str
    verb: str
    damage: str
    outcome: str
    text: str = ""


class Workshop:
    """Sound specimens in a folder, what every verb gives of them, and a place to damage copies."""

    def __init__(self, folder: Path, limits: Limits):
        self.folder, self.limits = folder, limits
        self.log = folder / "log"
        self.specimens: dict[str, list[Specimen]] = {}
        self._expected: dict[tuple[str, str], dict[str, Result]] = {}

    def build(self) -> None:
        """Write the specimens, in a child: what computes may start threads."""

        def work(_: str) -> dict[str, Any]:
            (self.folder / "specimens").write_bytes(pickle.dumps(build(self.folder / "sound")))
            return {}

        found = run_steps(["build"], work, Limits(cpu=300), self.log)["build"]
        if found:
            raise RuntimeError(f"the specimens cannot be built: {found}: {self.log.read_text()[-2000:]}")
        self.specimens = pickle.loads((self.folder / "specimens").read_bytes())

    def expected(self, kind: str, specimen: Specimen, verbs: Mapping[str, Verb]) -> dict[str, Result]:
        """What verbs give of a sound specimen.

        Raises:
            RuntimeError: a verb fails, gives something else the second time, or not what docs/format.md says.
        """
        known = self._expected.setdefault((kind, specimen.name), {})
        missing = {name: verb for name, verb in verbs.items() if name not in known}
        first, second = (self._sound(kind, specimen, missing) for _ in range(2))
        reference = reference_of(specimen) if kind == "repo" else {}
        for name, found in first.items():
            if found["outcome"] != "right" or found != second[name]:
                raise RuntimeError(
                    f"{kind} {specimen.name}: {name} of a sound one: {found['outcome']} {found['text']}"
                )
            known[name] = found["result"]
            other = [part for part, value in reference.items() if name in _LOADING and known[name].get(part) != value]
            if other:
                raise RuntimeError(f"{kind} {specimen.name}: {name} is not what docs/format.md says: {other[:5]}")
        return known

    def _sound(self, kind: str, specimen: Specimen, verbs: Mapping[str, Verb]) -> dict[str, dict[str, Any]]:
        job, _ = self._copy(kind, specimen)
        return run_steps(list(verbs), lambda name: attempt(job, verbs[name], _SOUND, None), self.limits, self.log)

    def _copy(self, kind: str, specimen: Specimen) -> tuple[Job, Path]:
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        write_outside(place / OUTSIDE)
        where = place / specimen.folder.name
        shutil.copytree(specimen.folder, where)
        if kind == "recipe":
            damaged_recipes.write_recipe(where, specimen.inputs)
        return Job(specimen, where, place / "target"), where

    def damaged(self, seed: int, kind: str, number: int) -> tuple[Job, Damage]:
        """The copy of a case, and what was done to it."""
        random = Random(f"{seed}:{kind}:{number}")
        families = FAMILIES[kind]
        while True:
            job, where = self._copy(kind, random.choice(self.specimens[kind]))
            try:
                return job, families[number % len(families)](where, random)
            except DoesNotApply:
                continue

    def readings(self, seed: int, kind: str, number: int, readers: Iterable[str] | None) -> list[Reading]:
        """Do a case."""
        specimen = self.damaged(seed, kind, number)[0].specimen
        verbs = {n: verb for n, verb in VERBS[kind](specimen).items() if readers is None or n in readers}
        expected = self.expected(kind, specimen, verbs)
        job, damage = self.damaged(seed, kind, number)

        def work(name: str) -> dict[str, Any]:
            return attempt(job, verbs[name], damage, expected[name], name)

        found = run_steps(list(verbs), work, self.limits, self.log)
        common = (f"{kind}-{number}", kind, specimen.name)
        return [Reading(*common, name, _printable(damage.what), **found[name]) for name in verbs]


def attempt(job: Job, verb: Verb, damage: Damage, expected: Result | None, name: str = "") -> dict[str, Any]:
    """Use a damaged thing: `outcome` and `text`, and the `result` of a sound one."""
    shutil.rmtree(job.target, ignore_errors=True)
    job.target.mkdir()
    before = _outside(job)
    result: Result = {}
    try:
        given = verb.act(job)
    except (Exception, SystemExit) as error:
        outcome, text = judge(error, verb, damage)
    else:
        outcome, text = "right", ""
        try:
            result = verb.collect(job, given)
            wrong = _difference(result, expected, damage.accept & {name, *ALL})
        except Exception as error:
            wrong = f"its result cannot be read: {type(error).__name__}: {error}"
        if wrong:
            outcome, text = "wrong", wrong
    if (effect := _side_effect(job, verb, outcome, before)) and outcome not in BAD:
        outcome, text = "wrong", effect
    found: dict[str, Any] = {"outcome": outcome, "text": _printable(text)}
    return {**found, "result": result} if expected is None else found


def _printable(text: str) -> str:
    """One line that any terminal shows."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text[:1000].split()))[:300]


def _difference(result: Result, expected: Result | None, accepted: Iterable[str]) -> str:
    """How a result differs from the right one."""
    endless = [name for name, value in result.items() if value == "not finite"]
    if endless:
        return f"{len(endless)} tensors are not finite, such as {endless[0]}"
    if expected is None or any(accepted):
        return ""
    other = [name for name in {**expected, **result} if expected.get(name) != result.get(name)]
    if not other:
        return ""
    first = other[0]
    return f"{len(other)} of {len(expected)} differ: {first} is {result.get(first)}, not {expected.get(first)}"


def judge(error: BaseException, verb: Verb, damage: Damage) -> tuple[str, str]:
    """Outcome of an exception, and its text."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, (EMRError, Refused)):
        message = str(error)
        named = any(name.lower() in message.lower() for name in damage.names)
        return ("told" if named and "\n" not in message and len(message) < 2000 else "vague"), text
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if "/emr_hf/" in frame.filename]
    if verb.stock and not places:
        return "told", text
    where = f"{Path(places[-1].filename).name}:{places[-1].lineno}" if places else "?"
    return "raw", text if isinstance(error, CommandError) else f"{text[:200]} at {where}"


def _outside(job: Job) -> dict[str, bytes]:
    folder = job.where.parent / OUTSIDE
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _side_effect(job: Job, verb: Verb, outcome: str, before: Mapping[str, bytes]) -> str:
    """What a verb has done that it may not, whatever it gave."""
    place = job.where.parent
    if (place / MARK).exists():
        (place / MARK).rmdir()
        return "code of the input was run"
    if _outside(job) != before:
        shutil.rmtree(place / OUTSIDE)
        write_outside(place / OUTSIDE)
        return "a file outside was changed"
    strangers = {path.name for path in place.iterdir()} - {OUTSIDE, job.where.name, "target", "given.yaml"}
    if strangers:
        return f"beside the repo there is now {sorted(strangers)}"
    left = sorted(path.name for path in job.target.iterdir())
    if verb.writes and left != (["out"] if outcome in ("right", "wrong") else []):
        return f"the target's folder holds {left} after {outcome}"
    for path in job.target.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(job.target.resolve()):
            return f"{path.name} is a link out of the repo"
        if path.is_file() and SECRET.encode() in path.read_bytes():
            return f"{path.name} holds the content of a file outside"
    return ""


# Results


def table(readings: Sequence[Reading]) -> list[str]:
    """Kind by verb by outcome, in Markdown."""
    counts = Counter((reading.kind, reading.verb, reading.outcome) for reading in readings)
    rows = []
    for kind in FAMILIES:
        verbs = list(dict.fromkeys(reading.verb for reading in readings if reading.kind == kind))
        rows += [[kind, verb, *(str(counts[kind, verb, outcome]) for outcome in OUTCOMES)] for verb in verbs]
    total = Counter(reading.outcome for reading in readings)
    rows.append(["all", "all", *(str(total[outcome]) for outcome in OUTCOMES)])
    return markdown_table(["kind", "reader", *OUTCOMES], rows)


def listing(readings: Iterable[Reading], outcomes: Iterable[str]) -> Iterator[str]:
    """The readings of some outcomes, those with the same text together."""
    groups: dict[tuple[str, str, str], list[Reading]] = {}
    for reading in readings:
        if reading.outcome in outcomes:
            groups.setdefault((reading.outcome, reading.kind, _shape(reading.text)), []).append(reading)
    for (outcome, kind, _), group in sorted(groups.items(), key=lambda item: (item[0][:2], -len(item[1]))):
        verbs = ", ".join(dict.fromkeys(reading.verb for reading in group))
        cases = list(dict.fromkeys(f"{reading.case} ({reading.specimen}): {reading.damage}" for reading in group))
        yield f"* **{outcome}**, {kind}, {len(group)} times ({verbs}): {group[0].text or '-'}"
        yield from (f"    * {case}" for case in cases[:3])
        if len(cases) > 3:
            yield f"    * and {len(cases) - 3} more cases"


def _shape(text: str) -> str:
    """A message without what differs from case to case."""
    return "".join("#" if letter.isdigit() else letter for letter in text.partition(":")[0] + text[-30:])


def numbers_of(cases: int, kinds: Sequence[str]) -> list[tuple[str, int]]:
    """The cases of a run: as many of each kind as its share says."""
    whole = sum(SHARES[kind] for kind in kinds)
    return [(kind, number) for kind in kinds for number in range(round(cases * SHARES[kind] / whole))]


def _journal(path: Path | None) -> list[Reading]:
    if path is None or not path.exists():
        return []
    return [Reading(**json.loads(line)) for line in path.read_text().splitlines()]


def run(
    workshop: Workshop,
    cases: Iterable[tuple[str, int]],
    seed: int,
    readers: Iterable[str] | None = None,
    tell: Callable[[Reading], object] = lambda reading: None,
) -> list[Reading]:
    """Do cases; `tell` is given every reading as it comes."""
    found = []
    for kind, number in cases:
        for reading in workshop.readings(seed, kind, number, readers):
            tell(reading)
            found.append(reading)
    return found


def prepared(folder: Path, limits: Limits) -> Workshop:
    """A workshop in a new folder."""
    one_thread()
    warm()
    workshop = Workshop(folder, limits)
    workshop.build()
    return workshop


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Damaged inputs, read by every verb, in children under limits.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--kind", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--reader", nargs="+", help="only these verbs")
    parser.add_argument("--only", metavar="KIND-NUMBER", help="one case, whose folder is kept")
    parser.add_argument("--journal", type=Path, help="file of the readings, with which a run goes on")
    parser.add_argument("--out", type=Path, help="file for the table and the list of what went wrong")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="emr-hf-mutation-"))
    try:
        if options.only:
            return _only(folder, options)
        return _all(folder, options)
    finally:
        if not options.only:
            shutil.rmtree(folder, ignore_errors=True)


def _only(folder: Path, options: argparse.Namespace) -> int:
    kind, _, number = options.only.rpartition("-")
    workshop = prepared(folder, Limits())
    readings = run(workshop, [(kind, int(number))], options.seed, options.reader)
    print(f"{options.only}: {readings[0].specimen}: {readings[0].damage}\n{folder / 'case'}")
    for reading in readings:
        print(f"{reading.verb:12} {reading.outcome:7} {reading.text}")
    return int(any(reading.outcome in BAD for reading in readings))


def _all(folder: Path, options: argparse.Namespace) -> int:
    known = _journal(options.journal)
    done = {reading.case for reading in known}
    cases = [case for case in numbers_of(options.cases, options.kind) if "{}-{}".format(*case) not in done]
    workshop = prepared(folder, Limits())

    def tell(reading: Reading) -> None:
        if options.journal is not None:
            with options.journal.open("a") as file:
                file.write(json.dumps(asdict(reading)) + "\n")
        if sys.stderr.isatty():
            print(f"\r{reading.case:14}", end="", file=sys.stderr)

    readings = known + run(workshop, cases, options.seed, options.reader, tell)
    count = len({reading.case for reading in readings})
    lines = [f"{count} cases, seed {options.seed}, {len(readings)} readings", "", *table(readings), ""]
    lines += listing(readings, (*sorted(BAD), "vague"))
    text = "\n".join(lines) + "\n"
    if options.out is not None:
        options.out.write_text(text)
    print(text)
    return int(any(reading.outcome in BAD for reading in readings))


if __name__ == "__main__":
    sys.exit(main())
