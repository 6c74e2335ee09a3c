"""One forward pass in which every dimension of every tensor is labelled.

Each operation that reaches the dispatcher unites, splits, cuts or freezes labels by its rule (`rules.py`). One without
a rule freezes all that it touches, so that what is not understood costs symmetries and never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .atoms import Factors, freeze, frozen, resolved, size, unite


@dataclass(frozen=True)
class Dim:
    """Label of one dimension of a tensor.

    Attributes:
        factors: what it is a product of.
        sources: the parameters' dimensions that it is, or is a part of, as pairs of a parameter's number and a
            dimension; none if it is an activation's.
    """

    factors: Factors
    sources: frozenset[tuple[int, int]] = frozenset()

    @property
    def size(self) -> int:
        return size(self.factors)


Label = list[Dim]


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation reads or makes, dimension by dimension, and the index that runs along each."""

    dims: list[Factors]
    indices: Sequence[Hashable]


@dataclass(frozen=True)
class Event:
    """An operation, written with indices as in `einsum`.

    Attributes:
        operands: what it reads and makes. In a rearrangement (a view) the indices mean nothing.
        mixed: indices along which the values of the result depend on each other, as in a softmax.
        rearranges: whether it only rearranges.
    """

    operands: Sequence[Operand]
    mixed: frozenset[Hashable] = frozenset()
    rearranges: bool = False


class NoRule(Exception):
    """A rule meets a form of its operation that it does not know."""


@dataclass(frozen=True)
class Call:
    """One call of an operation: its arguments by name, what came back, and the former strides of what it wrote to."""

    name: str
    arguments: dict[str, Any]
    result: Any
    strides: list[tuple[int, ...]]

    def __getitem__(self, name: str) -> Any:
        if name not in self.arguments:
            raise NoRule(f"no rule for this form of {self.name}")
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the arguments."""
        return _tensors(self.arguments)

    @property
    def first(self) -> Tensor:
        """The tensor that comes back, the first if there are several."""
        return self.result if isinstance(self.result, Tensor) else self.result[0]


Rule = Callable[["Trace", Call], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of these aten operations, and of their in-place forms."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Trace(TorchDispatchMode):
    """Labels the dimensions of all tensors that are met while it is active.

    Attributes:
        events: what happened, for the search for units within units.
        kept: dimensions of parameters that are looked up, though a product may sum over them elsewhere: those of an
            embedding that is tied to the last layer.
        contracted: dimensions of parameters that a product sums over, as in [`Dim`].
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.contracted: set[tuple[int, int]] = set()
        self.kept: set[tuple[int, int]] = set()
        self._labels: Any = WeakTensorKeyDictionary()
        self._deferred: Any = WeakTensorKeyDictionary()
        self._overwritten: dict[int, str] = {}

    # Labels

    def give(self, tensor: Tensor, label: Label) -> None:
        """Set a tensor's label."""
        self._labels[tensor] = label

    def known(self, tensor: Tensor) -> Label | None:
        """A tensor's label if it has one."""
        return self._labels.get(tensor)

    def of(self, tensor: Tensor) -> Label:
        """A tensor's label. One that the trace has not seen made is a constant, whose units cannot move."""
        label = self.known(tensor)
        if tensor in self._deferred:
            self.freeze(*self._deferred.pop(tensor))
        if label is None:
            label = [Dim(factors) for factors in _of_constant(tensor)]
            self.give(tensor, label)
        elif [dim.size for dim in label] != list(tensor.shape):
            label = self._refrozen(tensor, label, "resized in place")
        elif self._overwritten and (reason := self._overwritten.get(_storage(tensor))):
            label = self._refrozen(tensor, label, reason)
        return label

    def _refrozen(self, tensor: Tensor, label: Label, reason: str) -> Label:
        self.freeze(label, reason)
        label = self.fixed(tensor.shape, reason)
        self.give(tensor, label)
        return label

    def fixed(self, shape: Iterable[int], reason: str) -> Label:
        """A label that keeps all in its order."""
        return [Dim(frozen(count, reason)) for count in shape]

    def freeze(self, label: Iterable[Dim], reason: str) -> None:
        """Keep the order along these dimensions."""
        for dim in label:
            freeze(dim.factors, reason)

    def defer(self, tensor: Tensor, label: Label, reason: str) -> None:
        """Keep the order along these dimensions if the tensor is ever read. Often only its shape is asked for."""
        self._deferred[tensor] = (label, reason)

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        arguments = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        arguments |= dict(zip((a.name for a in schema.arguments), args)) | kwargs
        written = [arguments.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        strides = [tensor.stride() for tensor in _tensors(written)]
        result = func(*args, **kwargs)
        call = Call(schema.name.replace("::", "."), arguments, result, strides)
        self._apply(func, call, list(_tensors(written)))
        return result

    def _apply(self, func: Any, call: Call, written: list[Tensor]) -> None:
        before = [(tensor, [list(dim.factors) for dim in self.of(tensor)]) for tensor in written]
        try:
            self._rule_of(func, call)(self, call)
        except NoRule as missing:
            self._freeze_all(call, str(missing))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # A form of the operation that its rule was not written for costs symmetries, not the run.
            self._freeze_all(call, f"no rule for this form of {call.name}")
        # By-products that a rule leaves out vary with what they were made of.
        for tensor in _tensors(call.result):
            if self.known(tensor) is None:
                self.defer(tensor, [dim for operand in call.tensors() for dim in self.of(operand)], "a by-product")
        for tensor, dims in before:
            self._overwrite(tensor, dims, call)

    def _rule_of(self, func: Any, call: Call) -> Rule:
        name = call.name.removeprefix("aten.")
        found = RULES.get(name) or (RULES.get(name[:-1]) if name.endswith("_") else None)
        if found is None and call.name.startswith("aten.") and torch.Tag.pointwise in func.tags:
            found = None if torch.Tag.nondeterministic_seeded in func.tags else RULES["pointwise"]
        if found is None:
            raise NoRule(f"no rule for {call.name}")
        return found

    def _freeze_all(self, call: Call, reason: str) -> None:
        for tensor in call.tensors():
            self.freeze(self.of(tensor), reason)
        for tensor in _tensors(call.result):
            self.give(tensor, self.fixed(tensor.shape, reason))

    def _overwrite(self, tensor: Tensor, before: list[Factors], call: Call) -> None:
        """Where what was constant is written over, views of it carry labels that no longer hold: nothing may move."""
        after = self.known(tensor) or []
        if len(after) == len(before) and all(
            _constants(old) <= _constants(new.factors) for old, new in zip(before, after)
        ):
            return
        reason = f"written over by {call.name}"
        self._overwritten[_storage(tensor)] = reason
        self.freeze(after, reason)
        for other in call.tensors():
            self.freeze(self.of(other), reason)

    # What rules are made of

    def record(self, *operands: tuple[Label, Sequence[Hashable]], mixed: Iterable[Hashable] = ()) -> None:
        """Note an operation: labels of what it reads and makes, each with its indices."""
        noted = [Operand([dim.factors for dim in label], tuple(indices)) for label, indices in operands]
        self.events.append(Event(noted, frozenset(mixed)))

    def rearranged(self, result: Tensor, label: Label) -> None:
        """Set the label of a result that is another arrangement of the argument."""
        self.give(result, label)
        self.events.append(Event([Operand([dim.factors for dim in label], range(len(label)))], rearranges=True))

    def broadcast(self, labels: Sequence[Label], dims: int) -> Label:
        """Unite the dimensions of tensors that are broadcast against each other; the label of what comes of it."""
        united: Label = []
        for place in range(-dims, 0):
            meet = [label[place] for label in labels if len(label) >= -place]
            united.append(_united(meet))
        return united

    def contract(self, *dims: Dim) -> None:
        """Unite dimensions that a product sums over."""
        _united(dims)
        for dim in dims:
            self.contracted |= dim.sources


def _united(dims: Sequence[Dim]) -> Dim:
    factors: Factors = []
    for dim in dims:
        factors = unite(factors, dim.factors)
    # A parameter computed from parameters is still one; met by an activation, the result is an activation.
    sources = frozenset().union(*(dim.sources for dim in dims)) if all(dim.sources for dim in dims) else frozenset()
    return Dim(factors, sources)


def _constants(factors: Factors) -> int:
    return size(factor for factor in resolved(factors) if isinstance(factor, int))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _of_constant(tensor: Tensor) -> Iterator[Factors]:
    """Along a dimension where all values are equal a constant fits any order."""
    looked_at = 0 < tensor.numel() <= 1 << 20 and not tensor.is_meta
    for dim, count in enumerate(tensor.shape):
        same = looked_at and count > 1 and bool((tensor == tensor.narrow(dim, 0, 1)).all())
        yield [count] if same else frozen(count, "meets a constant")
