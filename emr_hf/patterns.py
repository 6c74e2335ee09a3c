"""Regular expressions of others, refused where matching them could take for ever.

`re` backtracks: `(a+)+!` takes twice the time for each letter more. How many steps that is on a given text can be
counted without taking them: an expression is a graph of states, and the number of ways to reach a state after each
letter follows from those before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from .errors import OptionError, short

LONGEST_PATTERN = 100_000  # characters; reading a longer one takes seconds by itself
MOST_STATES = 100_000
MOST_STEPS = 1_000_000  # for one text: some milliseconds
MOST_STEPS_IN_ALL = 100_000_000
MOST_COUNTED = 10_000_000  # states that are followed to count them: seconds
ANY_TEXT: Sequence[None] = (None,) * 100
"""Stands for every text of up to 100 characters, about as long as names in a model become."""

_CLASSES = {
    ops.CATEGORY_DIGIT: r"\d",
    ops.CATEGORY_NOT_DIGIT: r"\D",
    ops.CATEGORY_SPACE: r"\s",
    ops.CATEGORY_NOT_SPACE: r"\S",
    ops.CATEGORY_WORD: r"\w",
    ops.CATEGORY_NOT_WORD: r"\W",
}
_TOO_LARGE = "is too large: expected fewer, or smaller, repetitions"


def check_pattern(pattern: str, where: str, names: Iterable[str] | None = None, *, search: bool = False) -> None:
    """Raise OptionError unless `re` can match a pattern in a bounded number of steps.

    Args:
        pattern: the regular expression.
        where: names it in the error, such as `"target_modules"`.
        names (*optional*): the texts that it is for; by default any text of up to 100 characters. With an empty list
            only the expression itself is looked at.
        search (*optional*): whether it may begin anywhere in a text (`re.search`), not at its start only.

    Raises:
        OptionError: it is no regular expression, too long, refers back to a group, or would take too many steps.
    """
    try:
        graph = _Graph(pattern)
        graph.check([ANY_TEXT] if names is None else sorted(set(names)), search)
    except re.error as error:
        raise OptionError(f"{where}: {short(pattern)} is not a regular expression: {error}") from None
    except (RecursionError, OverflowError, MemoryError):
        raise OptionError(f"{where}: {short(pattern)} is nested too deeply, or too large") from None
    except _RefusedError as error:
        raise OptionError(f"{where}: {short(pattern)} {error}") from None


class _RefusedError(Exception):
    """An expression that is not matched; the message says why."""


class _Graph:
    """A regular expression as states.

    A state either takes one letter and leads to the next one, or takes none and leads to several. Where `re` tries one
    after the other, all are counted, also those that it would not come to: no assertion is evaluated.

    Attributes:
        atoms: of each state, what letter it takes, as `re` parses it; `None` for a state that takes none.
        leads: of each state, those that follow.
        weights: of each state, steps that it takes beside its own.
    """

    def __init__(self, pattern: str):
        if len(pattern) > LONGEST_PATTERN:
            raise _RefusedError(f"has {len(pattern):,} characters: expected at most {LONGEST_PATTERN:,}")
        tree = parser.parse(pattern)
        self.atoms: list[Any] = []
        self.leads: list[list[int]] = []
        self.weights: list[int] = []
        self._accepted: dict[tuple[int, str], bool] = {}
        self._closures: dict[int, tuple[dict[int, int], int]] = {}
        self._known = 0  # entries of all of them
        self._any_case = bool(tree.state.flags & re.IGNORECASE)
        self.start = self._sequence(tree, self._add())

    def _add(self, atom: Any = None, leads: Iterable[int] = (), weight: int = 0) -> int:
        if len(self.atoms) >= MOST_STATES:
            raise _RefusedError(_TOO_LARGE)
        self.atoms.append(atom)
        self.leads.append(list(leads))
        self.weights.append(weight)
        return len(self.atoms) - 1

    def _sequence(self, items: Any, end: int) -> int:
        for op, argument in reversed(list(items)):
            end = self._item(op, argument, end)
        return end

    def _item(self, op: Any, argument: Any, end: int) -> int:
        """The state where one item of an expression begins; after it comes the state `end`."""
        if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
            if op is ops.IN and self._any_case:
                self._check_size(argument)
            return self._add((op, argument), [end])
        if op is ops.BRANCH:
            return self._add(None, [self._sequence(branch, end) for branch in argument[1]])
        if op is ops.SUBPATTERN:
            return self._group(argument, end)
        if op is ops.ATOMIC_GROUP:
            return self._sequence(argument, end)
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
            return self._repeat(argument, end)
        if op in (ops.ASSERT, ops.ASSERT_NOT):
            return self._assertion(argument, end)
        if op is ops.AT:
            return self._add(None, [end])
        if op is ops.FAILURE:
            return self._add()
        raise _RefusedError("refers back to a group: write out what it may be")

    def _check_size(self, items: Any) -> None:
        """`re` goes through every letter of a range whose case does not matter."""
        if sum(argument[1] - argument[0] for op, argument in items if op is ops.RANGE) > 10_000:
            raise _RefusedError("has a range of too many letters")

    def _group(self, argument: Any, end: int) -> int:
        _, added, _, items = argument
        self._any_case = self._any_case or bool(added & re.IGNORECASE)
        return self._sequence(items, end)

    def _repeat(self, argument: Any, end: int) -> int:
        least, most, items = argument
        if most is ops.MAXREPEAT:
            if items.getwidth()[0] == 0:
                raise _RefusedError("repeats without end what may be empty")
            loop = self._add(None, [end])
            self.leads[loop].append(self._sequence(items, loop))
            end = loop
        else:
            after = end
            for _ in range(most - least):
                end = self._add(None, [self._sequence(items, end), after])
        for _ in range(least):
            end = self._sequence(items, end)
        return end

    def _assertion(self, argument: Any, end: int) -> int:
        direction, items = argument
        nowhere = self._add()
        inside = self._sequence(items, nowhere)
        if direction > 0:
            return self._add(None, [inside, end])
        (ways, steps), width = self._closure(inside), items.getwidth()[1]
        for _ in range(width):  # what stands before is as long as the expression, whatever it is
            ways, more = self._step(ways, None)
            steps += self._bounded(more)
        return self._add(None, [end], steps)

    def _closure(self, state: int) -> tuple[dict[int, int], int]:
        """The states with a letter that a state leads to -> in how many ways; and the steps that it takes."""
        waiting = [state]
        while waiting:
            current = waiting[-1]
            missing = [] if self.atoms[current] else [s for s in self.leads[current] if s not in self._closures]
            if current in self._closures or not missing:
                waiting.pop()
                self._closures.setdefault(current, self._joined(current))
            waiting += missing
        return self._closures[state]

    def _joined(self, state: int) -> tuple[dict[int, int], int]:
        if self.atoms[state] is not None:
            return {state: 1}, 1
        ways: dict[int, int] = {}
        steps = 1 + self.weights[state]
        for lead in self.leads[state]:
            inner, more = self._closures[lead]
            steps = self._bounded(steps + more)
            for target, count in inner.items():
                ways[target] = ways.get(target, 0) + count
        self._known += len(ways)
        if self._known > 10 * MOST_STATES:
            raise _RefusedError(_TOO_LARGE)
        return ways, steps

    def _bounded(self, steps: int) -> int:
        if steps > MOST_STEPS:
            raise _RefusedError(
                f"may take more than {MOST_STEPS:,} steps to match: write it without repetitions inside repetitions"
            )
        return steps

    def _step(self, ways: dict[int, int], letter: str | None) -> tuple[dict[int, int], int]:
        """The states after a letter, and the steps that it takes to get there."""
        found: dict[int, int] = {}
        steps = 0
        for state, count in ways.items():
            steps += count
            if letter is None or self._takes(state, letter):
                targets, more = self._closure(self.leads[state][0])
                steps = self._bounded(steps + count * more)
                for target, number in targets.items():
                    found[target] = found.get(target, 0) + count * number
        return found, steps

    def check(self, texts: Sequence[Sequence[str | None]], search: bool) -> None:
        """Raise unless each text is matched in few enough steps. Of sorted texts, what two begin with is done once."""
        begin = self._closure(self.start)
        reached = [begin]  # after each letter of the text before: its states, and all steps up to there
        before: Sequence[str | None] = ()
        total = counted = 0
        for text in texts:
            del reached[_common(text, before) + 1 :]
            for letter in text[len(reached) - 1 :]:
                ways, steps = self._step(reached[-1][0], letter)
                if search:
                    steps += begin[1]
                    ways = {state: ways.get(state, 0) + begin[0].get(state, 0) for state in {**ways, **begin[0]}}
                reached.append((ways, self._bounded(reached[-1][1] + steps)))
                counted += len(ways)
            before = text
            total += reached[-1][1]
            if total > MOST_STEPS_IN_ALL or counted > MOST_COUNTED:
                raise _RefusedError(f"takes too many steps to match {len(texts):,} names: write it more simply")

    def _takes(self, state: int, letter: str) -> bool:
        key = state, letter
        if key not in self._accepted:
            letters = {letter, letter.lower(), letter.upper(), letter.casefold()} if self._any_case else {letter}
            self._accepted[key] = any(_takes(self.atoms[state], one) for one in letters)
        return self._accepted[key]


def _common(one: Sequence[str | None], other: Sequence[str | None]) -> int:
    """How many letters two texts begin with alike."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other))
    return sum(1 for _ in alike)


def _takes(item: Any, letter: str) -> bool:
    """True if an item of a parsed expression takes a letter, which is several where case does not matter."""
    op, argument = item
    if op is ops.LITERAL:
        return letter == chr(argument)
    if op is ops.NOT_LITERAL:
        return letter != chr(argument)
    if op is ops.IN:
        negated = argument[0][0] is ops.NEGATE
        return negated != any(_takes(inner, letter) for inner in argument[negated:])
    if op is ops.RANGE:
        return any(argument[0] <= ord(one) <= argument[1] for one in letter)
    if op is ops.CATEGORY:
        return re.fullmatch(_CLASSES[argument], letter[:1]) is not None
    return True  # ANY
