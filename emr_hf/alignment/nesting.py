"""Which units lie within others: dimensions within a head, channels within a group of GroupNorm.

The units of `d` lie within those of `H` if they can be put in another order in each unit of `H`. That holds if every
tensor that has `d` has `H` as well, once, and every operation on such tensors runs the same index along `H` in all of
them: a batched product does, or a sum over both at once; a product of two tensors with a head each does not, and the
weight of a norm that is shared by all heads has no `H`. Where values along `H` depend on each other, as in a softmax,
those along `d` have to as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

from .atoms import Atom, Factors, segments
from .tracing import Event

Segments = list[list[Atom]]  # of one dimension; only what is free
Dims = list[Segments]


def free_segments(factors: Factors) -> Segments:
    """The free atoms of each product of which the dimension is a concatenation."""
    return [
        [factor for factor in product if isinstance(factor, Atom) and factor.frozen is None]
        for product in segments(factors)
    ]


def parents(stored: Iterable[Dims], events: Sequence[Event]) -> dict[Atom, Atom]:
    """For each atom that lies within another, the innermost such.

    Args:
        stored: the dimensions of parameters and buffers. A layout needs that there a unit stands behind those that it
            lies within, in the same product.
        events: the operations.
    """
    before = _standing_before(stored)
    wanted = {atom for atom, others in before.items() if others}
    noted = _events_by_atom(events, wanted)
    allowed = {
        atom: [other for other in others if all(_within(atom, other, event) for event in noted[atom])]
        for atom, others in before.items()
    }
    chains: dict[Atom, list[Atom]] = {}
    # An atom stands behind all that it may lie within, so that those with fewer in front of them come first.
    for atom in sorted(before, key=lambda atom: len(before[atom])):
        options = [[*chains[other], other] for other in allowed[atom] if set(chains[other]) <= set(allowed[atom])]
        chains[atom] = max(options, key=len, default=[])
    return {atom: chain[-1] for atom, chain in chains.items() if chain}


def _standing_before(stored: Iterable[Dims]) -> dict[Atom, list[Atom]]:
    """For each atom those that stand in front of it, in the same product, wherever it is stored."""
    before: dict[Atom, list[Atom]] = {}
    for dims in stored:
        for product in (product for dim in dims for product in dim):
            for place, atom in enumerate(product):
                known = before.get(atom, product[:place])
                before[atom] = [other for other in known if other in product[:place]]
    return before


Noted = tuple[list[tuple[Dims, Sequence[Hashable]]], frozenset[Hashable], bool]


def _events_by_atom(events: Sequence[Event], wanted: set[Atom]) -> dict[Atom, list[Noted]]:
    """For each atom the operations in which it is met, with those operands alone that have it."""
    found: dict[Atom, list[Noted]] = defaultdict(list)
    for event in events:
        operands = [([free_segments(dim) for dim in each.dims], each.indices) for each in event.operands]
        met = {atom for dims, _ in operands for dim in dims for product in dim for atom in product}
        for atom in met & wanted:
            having = [(dims, indices) for dims, indices in operands if _has(dims, atom)]
            found[atom].append((having, event.mixed, event.rearranges))
    return found


def _has(dims: Dims, atom: Atom) -> bool:
    return any(atom in product for dim in dims for product in dim)


def _within(atom: Atom, other: Atom, event: Noted) -> bool:
    """Whether an operation allows for `atom` another order in each unit of `other`."""
    operands, mixed, rearranges = event
    running = set()
    for dims, indices in operands:
        place = _place_of(atom, other, dims)
        if place is None:
            return False
        running.add(indices[place])
        own = {index for dim, index in zip(dims, indices) if _has([dim], atom)}
        if indices[place] in mixed and not own <= mixed:
            return False
    return rearranges or len(running) == 1


def _place_of(atom: Atom, other: Atom, dims: Dims) -> int | None:
    """The dimension along which `other` is, for every unit of `atom` in the tensor; `None` if there is no such."""
    places = [place for place, dim in enumerate(dims) if _has([dim], other)]
    if len(places) != 1:
        return None
    (place,) = places
    for here, dim in enumerate(dims):
        for product in dim:
            if atom not in product:
                continue
            inside = product if here == place else dims[place][0]
            if inside.count(other) != 1 or product.count(atom) != 1 or (here != place and len(dims[place]) != 1):
                return None
    return place
