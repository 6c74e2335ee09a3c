"""Labels of tensor dimensions, and what it means that two dimensions are the same.

A dimension is labelled with *factors* whose product, in row-major order, it is. A factor is an [`Atom`], a set of
units of which it is not yet known whether they may be put in any order, or a plain integer: that many units along
which the tensor is constant (it has been expanded), so that it does not matter how they are ordered.

Three things happen to atoms, and none is ever undone. *United* with another, they are one from then on. *Split*, an
atom is a product of two. *Cut*, it is a concatenation of parts, each a product of factors. An atom can also be
*frozen*: its units stay in their order, for a reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

Factors = list["Atom | int"]


class Atom:
    """A set of units, perhaps found to be another one, a product or a concatenation.

    Attributes:
        size: how many units.
        frozen: why they have to stay in their order; `None` while they need not.
    """

    __slots__ = ("size", "frozen", "_same", "_product", "_parts")

    def __init__(self, size: int, frozen: str | None = None, parts: list[Factors] | None = None):
        self.size, self.frozen = size, frozen
        self._same: Atom | None = None
        self._product: tuple[Atom, Atom] | None = None
        self._parts = parts

    def root(self) -> Atom:
        """The atom that stands for all those united with this one."""
        root = self
        while root._same is not None:
            root = root._same
        while self._same is not None:
            self._same, self = root, self._same
        return root

    def __repr__(self) -> str:
        return f"Atom({self.size}{f', {self.frozen!r}' if self.frozen else ''})"


def size(factors: Iterable[Atom | int]) -> int:
    """How many units the product has."""
    return math.prod(factor if isinstance(factor, int) else factor.size for factor in factors)


def resolved(factors: Iterable[Atom | int]) -> Factors:
    """The factors as they are known now: roots that are no products; neighbouring constant factors are one."""
    found: Factors = []
    for factor in factors:
        if isinstance(factor, Atom):
            root = factor.root()
            found.extend(resolved(root._product) if root._product else [root] if root.size != 1 else [])
        elif found and isinstance(found[-1], int):
            found[-1] *= factor
        elif factor != 1:
            found.append(factor)
    return found


def freeze(factors: Iterable[Atom | int], reason: str) -> None:
    """Keep these units in their order. The first reason stands."""
    for factor in resolved(factors):
        if isinstance(factor, Atom) and factor.frozen is None:
            parts, factor._parts, factor.frozen = factor._parts, None, reason
            for part in parts or ():
                freeze(part, reason)


def frozen(count: int, reason: str) -> Factors:
    """Factors of a dimension whose units have to stay in their order."""
    return [Atom(count, frozen=reason)] if count != 1 else []


def free(count: int) -> Factors:
    """Factors of a dimension of which nothing is known yet."""
    return [Atom(count)] if count != 1 else []


def constant(factors: Iterable[Atom | int]) -> bool:
    """Whether the tensor is constant along the dimension."""
    return not any(isinstance(factor, Atom) for factor in resolved(factors))


def settled(factors: Iterable[Atom | int]) -> bool:
    """Whether nothing along the dimension can move."""
    return all(isinstance(factor, int) or factor.frozen is not None for factor in resolved(factors))


def _reason(factors: Factors, default: str) -> str:
    reasons = (factor.frozen for factor in factors if isinstance(factor, Atom) and factor.frozen)
    return next(reasons, default)


def _split(factor: Atom | int, left: int) -> Factors:
    """A product of `left` and the rest; both are frozen where the factor is."""
    if isinstance(factor, int):
        return [left, factor // left]
    if factor._parts is not None:
        freeze([factor], "a concatenation is viewed as a product")
    pair = Atom(left, factor.frozen), Atom(factor.size // left, factor.frozen)
    factor._product = pair
    return list(pair)


def unite(first: Factors, second: Factors) -> Factors:
    """Two dimensions have to be ordered alike; the factors of what comes of them.

    Dimensions of size 1 and constant ones fit any other.
    """
    a, b = resolved(first), resolved(second)
    if not a or constant(a):
        return b or a
    if not b or constant(b):
        return a
    done: Factors = []
    while a and b:
        left, right = size(a[:1]), size(b[:1])
        if left == right:
            done.append(_merge(a.pop(0), b.pop(0)))
        elif max(left, right) % min(left, right) == 0:
            # Splitting may change any of the factors that are still to come: one atom can stand in both.
            longer = a if left > right else b
            longer[:1] = _split(longer[0], min(left, right))
            a, b = _unmerged(a), _unmerged(b)
        else:
            reason = _reason(a + b, "met in two ways of splitting it")
            freeze(a + b, reason)
            return done + frozen(size(a), reason)
    return resolved(done)


def _unmerged(factors: Factors) -> Factors:
    """As [`resolved`], but constant neighbours stay apart, so that a split is not undone."""
    return [found for factor in factors for found in (resolved([factor]) if isinstance(factor, Atom) else [factor])]


def _merge(a: Atom | int, b: Atom | int) -> Atom | int:
    if isinstance(a, int) or isinstance(b, int):
        return b if isinstance(a, int) else a
    if a is b:
        return a
    if a.frozen or b.frozen:
        freeze([a, b], a.frozen or b.frozen or "")
    elif a._parts is not None and b._parts is not None:
        _unite_parts(a, b)
    a, b = a.root(), b.root()
    if a is not b:
        keeps, joins = (b, a) if b._parts is not None else (a, b)
        joins._same, joins._parts = keeps, None
        if joins.frozen or keeps.frozen:
            freeze([keeps], joins.frozen or "")
    return a.root()


def _unite_parts(a: Atom, b: Atom) -> None:
    cuts = sorted({*_ends(parts(a)), *_ends(parts(b))})
    sizes = [end - start for start, end in zip([0, *cuts], cuts)]
    for ours, theirs in zip(cut([a], sizes), cut([b], sizes)):
        together = unite(ours, theirs)
        if settled(together):
            freeze([*ours, *theirs], _reason(together, "constant"))


def _ends(pieces: Iterable[Factors]) -> list[int]:
    return list(accumulate(size(piece) for piece in pieces))


def parts(atom: Atom) -> list[Factors]:
    """What the atom is a concatenation of, all the way down; itself if it is none."""
    root = atom.root()
    if root._parts is None:
        return [[root]]
    return [piece for part in root._parts for piece in _pieces(part)]


def _pieces(part: Factors) -> list[Factors]:
    factors = resolved(part)
    return parts(factors[0]) if len(factors) == 1 and isinstance(factors[0], Atom) else [factors]


def segments(factors: Iterable[Atom | int]) -> list[Factors]:
    """The dimension as a concatenation of products; an atom with parts within a product is left as it is."""
    return _pieces(resolved(factors))


def divide(factors: Factors, sizes: Sequence[int]) -> list[Factors]:
    """A dimension viewed as several, of these sizes; frozen where that cuts through units."""
    queue = resolved(factors)
    divided: list[Factors] = []
    for place, count in enumerate(sizes):
        taken = _take(queue, count)
        if taken is None:
            reason = _reason(resolved(factors), "viewed in a way that cuts through units")
            freeze(factors, reason)
            return divided + [frozen(count, reason) for count in sizes[place:]]
        found, queue = taken
        divided.append(found)
    return divided


def _take(queue: Factors, count: int) -> tuple[Factors, Factors] | None:
    """The first factors, whose product is `count`, and the rest."""
    queue, taken = list(queue), []
    while count > 1:
        have = size(queue[:1])
        if count % have == 0:
            taken.append(queue.pop(0))
            count //= have
        elif have % count == 0:
            queue[:1] = _split(queue[0], count)
            queue = _unmerged(queue)
        else:
            run = next((i for i, factor in enumerate(queue) if not settled([factor])), len(queue))
            if run < 2:
                return None
            queue[:run] = frozen(size(queue[:run]), _reason(queue[:run], "constant"))
    return taken, queue


def cut(factors: Factors, sizes: Sequence[int]) -> list[Factors]:
    """A dimension taken apart into pieces of these sizes, one behind the other."""
    whole = resolved(factors)
    if constant(whole):
        return [[count] if count != 1 else [] for count in sizes]
    atom = whole[0]
    if settled(whole) or len(whole) > 1 or isinstance(atom, int):
        reason = _reason(whole, "cut across a product")
        freeze(whole, reason)
        return [frozen(count, reason) for count in sizes]
    if len(sizes) == 1:
        return [whole]
    if atom._parts is None:
        atom._parts = [free(count) for count in sizes]
        return [list(part) for part in atom._parts]
    return _regrouped(atom, sizes)


def _regrouped(atom: Atom, sizes: Sequence[int]) -> list[Factors]:
    """The parts of a concatenation, cut further and joined so that they have these sizes."""
    ends = list(accumulate(sizes))
    fine: list[tuple[int, Factors]] = []  # where it ends, and what it is
    start = 0
    for part in parts(atom):
        stop = start + size(part)
        inner = [end for end in ends if start < end < stop] + [stop]
        lengths = [end - begin for begin, end in zip([start, *inner], inner)]
        fine += zip(inner, cut(part, lengths) if len(inner) > 1 else [part])
        start = stop
    grouped = []
    for begin, end in zip([0, *ends], ends):
        grouped.append(joined([piece for stop, piece in fine if begin < stop <= end]))
    return grouped


def joined(pieces: Sequence[Factors]) -> Factors:
    """A concatenation of these dimensions.

    A part that is constant gets a label of its own: two concatenations that are united keep the parts of one, and a
    constant part of that one would hide what the other has there.
    """
    pieces = [resolved(piece) for piece in pieces]
    if len(pieces) == 1:
        return pieces[0]
    total = sum(map(size, pieces))
    if all(map(settled, pieces)):
        return frozen(total, next((_reason(piece, "") for piece in pieces if not constant(piece)), "concatenated"))
    return [Atom(total, parts=[_labelled(piece) for piece in pieces])]


def _labelled(factors: Factors) -> Factors:
    return [Atom(factor) if isinstance(factor, int) else factor for factor in factors]


def is_cut(factor: Atom | int) -> bool:
    """Whether the factor is a concatenation."""
    return isinstance(factor, Atom) and factor.root()._parts is not None
