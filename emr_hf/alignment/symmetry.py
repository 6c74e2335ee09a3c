"""The symmetries of a model, found by watching it compute, with no table of architectures.

[`symmetries`] runs the model once on an example and labels every dimension of every tensor on the way
(`tracing.py`); what no operation has pinned down can be put in any order. [`verify`] puts all of it in a random order,
and compares what the model computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SymmetryError, nearest, one_line, short
from . import sums as _rules  # noqa: F401  registers all rules
from .atoms import Atom, Factors, freeze, is_cut, resolved, segments
from .layout import Axis, Group, Layout, Permutation, Site, Symmetries
from .nesting import free_segments, parents
from .tracing import Dim, Label, Trace

Example = Mapping[str, Any] | Tensor | tuple[Any, ...] | list[Any]

# Not worth a note: nobody expects these to move.
_EXPECTED = ("rows of an embedding", "within a kernel", "input of the model", "along space or time")
_ON_THE_WAY = ("hidden_states", "attentions", "past_key_values", "router_logits")


def symmetries(model: nn.Module, example: Example, *, outputs: Sequence[str] | None = None) -> Symmetries:
    """Find the groups of units whose order makes no difference to what a model computes.

    The model runs once, in evaluation mode, without gradients; it is left as it was. Sound rather than complete: what
    an operation without a rule touches stays in its order, and `Symmetries.frozen` says why.

    Only what the example makes the model compute is seen. Parameters that it does not use stay in their order; where
    they would share units with others, as in a mixture with a module for each expert, the result holds only for inputs
    that do not use them either: give an example that uses all. Values that leave PyTorch and come back, through
    `numpy` or `tolist`, pass for constants.

    Args:
        model (`nn.Module`): any; a `PreTrainedModel` or not.
        example (`Mapping`, `Tensor` or `tuple`): what to call it with: keyword arguments, one argument, or several. A
            small batch will do.
        outputs (`Sequence[str]`, *optional*): the fields of the output that have to stay as they are. By default all
            that hold a tensor, but not `hidden_states`, `attentions`, `past_key_values`, `router_logits` and their
            like, and, if there is a head's output (a field whose name holds `logits` or ends in `_embeds`), not
            `last_hidden_state`, its like, and the outputs of inner models either.

    Returns:
        [`Symmetries`].
    """
    _check(model, example)
    trace = Trace()
    tensors = stored_tensors(model)
    numbers = _label_stored(trace, tensors, model)
    for tensor in _leaves(example):
        trace.give(tensor, trace.fixed(tensor.shape, "input of the model"))
    met: list[_Met] = []
    with _watching(model, trace, met), _as_before(model):
        output = _call(model, example, trace)
        for tensor in output_tensors(output, outputs).values():
            trace.freeze(trace.of(tensor), "output of the model")
    labels = {name: trace.known(tensor) or [] for name, tensor in tensors.items()}
    return _Findings(trace, model, labels, numbers, met).symmetries()


# Running the model


def _check(model: object, example: object) -> None:
    if not isinstance(model, nn.Module):
        raise SymmetryError(f"expected an nn.Module, got {type(model).__name__}")
    if not isinstance(example, (Mapping, Tensor, tuple, list)):
        raise SymmetryError(
            f"expected an example to call the model with (keyword arguments, a tensor or a tuple), "
            f"got {type(example).__name__}"
        )
    if not any(tensor.numel() for tensor in _leaves(example)):
        raise SymmetryError("the example holds no tensor, or only empty ones: the model cannot run on it")


def _leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _call(model: nn.Module, example: Any, mode: Any = None) -> Any:
    args = () if isinstance(example, Mapping) else (example,) if isinstance(example, Tensor) else tuple(example)
    kwargs = example if isinstance(example, Mapping) else {}
    try:
        with torch.no_grad(), ExitStack() as stack:
            if mode is not None:
                stack.enter_context(mode)
            return model(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        given = ", ".join(kwargs) if kwargs else f"{len(args)} positional"
        raise SymmetryError(
            f"{type(model).__name__} does not run on the example ({given}): {one_line(error)}"
        ) from error


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module's mode and all buffers are what they were.

    PyTorch's fused transformer layers, which are one opaque operation, are off inside.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers.items():
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)


def output_tensors(output: Any, fields: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The tensors that count as what a model computes, by name; see `outputs` in [`symmetries`]."""
    named = dict(output) if isinstance(output, Mapping) else {"output": output}
    if fields is None:
        fields = _fields(named)
    for field in fields:
        if field not in named:
            raise SymmetryError(
                f"the model's output has no {short(field)}.{nearest(field, named)} It has: {', '.join(named)}"
            )
    found: dict[str, Tensor] = {}
    for field in fields:
        inner = output_tensors(named[field]) if isinstance(named[field], Mapping) else {}
        inner = inner or {str(place): tensor for place, tensor in enumerate(_leaves(named[field]))}
        found |= {f"{field}.{place}": tensor for place, tensor in inner.items()}
    return found


def _fields(named: Mapping[str, Any]) -> list[str]:
    fields = [name for name in named if not name.endswith(_ON_THE_WAY)]
    if any("logits" in name or name.endswith("_embeds") for name in fields):
        fields = [name for name in fields if "last_hidden_state" not in name and not isinstance(named[name], Mapping)]
    return fields


# Labels of what is stored, and of what passes through modules


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that a checkpoint holds, under all their names."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def _label_stored(trace: Trace, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[int, list[str]]:
    """Free labels for floating-point parameters and buffers; the names of each, by its number in `Dim.sources`."""
    numbers: dict[int, list[str]] = {}
    by_id: dict[int, int] = {}
    by_storage: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        number = by_id.setdefault(id(tensor), len(by_id))
        numbers.setdefault(number, []).append(name)
        if trace.known(tensor) is not None:
            continue
        trace.give(tensor, _label_of_stored(trace, tensor, number))
        other = by_storage.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        if other is not tensor and tensor.untyped_storage().data_ptr():
            # Two tensors on one storage that are not one: nothing is known of what either's order is in the other.
            trace.freeze([*trace.of(other), *trace.of(tensor)], "shares its storage with another tensor")
    return numbers


def _label_of_stored(trace: Trace, tensor: Tensor, number: int) -> Label:
    if not tensor.is_floating_point():
        return trace.fixed(tensor.shape, "integers")
    return [
        Dim([Atom(count)] if count != 1 else [], frozenset({(number, dim)})) for dim, count in enumerate(tensor.shape)
    ]


_Met = tuple[str, str, int, Label]


@contextmanager
def _watching(model: nn.Module, trace: Trace, met: list[_Met]) -> Iterator[None]:
    """Note the labels of what goes into and comes out of each module, the first time that it is called."""
    seen: set[tuple[str, str]] = set()

    def note(name: str, kind: str, values: Any) -> None:
        if (name, kind) in seen:
            return
        seen.add((name, kind))
        for place, value in enumerate(_entries(values)):
            label = trace.known(value) if isinstance(value, Tensor) else None
            if label is not None:
                met.append((name, kind, place, list(label)))

    def watch(stack: ExitStack, name: str, module: nn.Module) -> None:
        before = module.register_forward_pre_hook(lambda _, inputs: note(name, "input", inputs))
        after = module.register_forward_hook(lambda _, inputs, output: note(name, "output", output))
        stack.callback(before.remove)
        stack.callback(after.remove)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            watch(stack, name, module)
        yield


def _entries(values: Any) -> Sequence[Any]:
    if isinstance(values, Mapping):
        return list(values.values())
    return values if isinstance(values, (tuple, list)) else [values]


# From labels to groups and layouts


class _Findings:
    """What a trace has found, put into words."""

    def __init__(
        self,
        trace: Trace,
        model: nn.Module,
        labels: dict[str, Label],
        numbers: dict[int, list[str]],
        met: list[_Met],
    ):
        self.trace, self.labels, self.numbers, self.met = trace, labels, numbers, met
        self.parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.contracted: dict[str, tuple[int, ...]] = {}
        for number, dim in sorted(trace.contracted):
            for name in numbers[number]:
                self.contracted[name] = (*self.contracted.get(name, ()), dim)

    def symmetries(self) -> Symmetries:
        self._hold_what_is_not_used()
        while self._hold_what_no_layout_says():
            pass
        stored = [[free_segments(dim.factors) for dim in label] for label in self.labels.values()]
        within = parents(stored, self.trace.events)
        names = self._names()
        groups = self._groups(names, within)
        return Symmetries(
            groups=groups,
            tensors={name: _layout(label, names) for name, label in self.labels.items()},
            contracted=self.contracted,
            sites=tuple(self._sites(names)),
            frozen=dict(self._reasons()),
        )

    def _hold_what_is_not_used(self) -> None:
        """Freeze what only lies in the tensors: another example may use it, as it may more rows of positions."""
        operands = (operand for event in self.trace.events if not event.rearranges for operand in event.operands)
        used = {atom for each in operands for dim in each.dims for product in free_segments(dim) for atom in product}
        for label in self.labels.values():
            for product in (product for dim in label for product in free_segments(dim.factors)):
                freeze([atom for atom in product if atom not in used], "not used on the example")

    def _hold_what_no_layout_says(self) -> bool:
        """Freeze concatenations within a product and units that stand twice in one; whether there were any."""
        held = False
        for label in self.labels.values():
            for product in (product for dim in label for product in segments(dim.factors)):
                atoms = [factor for factor in product if isinstance(factor, Atom) and factor.frozen is None]
                for atom in atoms:
                    if len(product) > 1 and is_cut(atom):
                        freeze([atom], "a concatenation within a product")
                        held = True
                    elif atoms.count(atom) > 1:
                        freeze([atom], "stands twice along a dimension")
                        held = True
        return held

    def _names(self) -> dict[Atom, str]:
        """A group is named after the first parameter that has it along a dimension that is kept, else after any."""
        names: dict[Atom, str] = {}
        looked_up = {(name, dim) for number, dim in self.trace.kept for name in self.numbers[number]}
        for kept in (True, False):
            for name in self.parameters:
                summed = [dim for dim in self.contracted.get(name, ()) if (name, dim) not in looked_up]
                for dim, described in enumerate(self.labels[name]):
                    if (dim not in summed) is kept:
                        self._name_along(described.factors, name, names)
        return names

    def _name_along(self, factors: Factors, parameter: str, names: dict[Atom, str]) -> None:
        atoms = list(dict.fromkeys(atom for product in free_segments(factors) for atom in product))
        stem = parameter.removesuffix(".weight")
        for place, atom in enumerate(atoms):
            if atom not in names:
                name = stem if len(atoms) == 1 else f"{stem}:{place}"
                taken, count = set(names.values()), 1
                while name in taken:
                    name, count = f"{stem}:{place + count}", count + 1
                names[atom] = name

    def _groups(self, names: dict[Atom, str], within: dict[Atom, Atom]) -> dict[str, Group]:
        groups: dict[str, Group] = {}

        def add(atom: Atom) -> None:
            parent = within.get(atom)
            if parent is not None:
                add(parent)
            groups.setdefault(names[atom], Group(names[atom], atom.size, names[parent] if parent else None))

        for atom in names:
            add(atom)
        return groups

    def _sites(self, names: dict[Atom, str]) -> Iterator[Site]:
        for module, kind, position, label in self.met:
            layout = _layout(label, names)
            if any(isinstance(factor, str) for axis in layout for product in axis for factor in product):
                yield Site(module, kind, position, layout)

    def _reasons(self) -> Iterator[tuple[str, str]]:
        for name in self.parameters:
            for dim, described in enumerate(self.labels[name]):
                factors = (factor for product in segments(described.factors) for factor in product)
                reasons = (factor.frozen for factor in factors if isinstance(factor, Atom) and factor.frozen)
                reason = next((reason for reason in reasons if reason not in _EXPECTED), None)
                if reason:
                    yield name, f"axis {dim}: {reason}"
                    break


def _layout(label: Label, names: Mapping[Atom, str]) -> Layout:
    return tuple(_axis(dim.factors, names) for dim in label)


def _axis(factors: Factors, names: Mapping[Atom, str]) -> Axis:
    axis: list[tuple[str | int, ...]] = []
    for product in segments(factors):
        segment: list[str | int] = []
        for factor in resolved(product):
            found: str | int = names.get(factor, factor.size) if isinstance(factor, Atom) else factor
            if isinstance(found, int) and segment and isinstance(segment[-1], int):
                segment[-1] *= found
            else:
                segment.append(found)
        plain = (segment or [1])[0] if len(segment) <= 1 else None
        if axis and isinstance(plain, int) and len(axis[-1]) == 1 and isinstance(axis[-1][0], int):
            axis[-1] = (axis[-1][0] + plain,)
        else:
            axis.append(tuple(segment) or (1,))
    return tuple(axis)


# Checking


def verify(
    model: nn.Module,
    example: Example,
    found: Symmetries,
    *,
    outputs: Sequence[str] | None = None,
    trials: int = 2,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> float:
    """Put the units of all groups in a random order, in a float64 copy of the model, and compare what it computes.

    Args:
        model (`nn.Module`): as given to [`symmetries`], with the same `example` and `outputs`.
        found ([`Symmetries`]): what is to be checked.
        trials (`int`, *optional*, defaults to 2): how many random orders.
        seed (`int`, *optional*, defaults to 0): of the orders.
        tolerance (`float`, *optional*, defaults to 1e-4): the largest difference that passes, relative to the
            largest value of the output. The differences are near 1e-14 where a model computes in the precision of
            its weights, and near 1e-6 where it computes a part in float32 whatever they are.

    Returns:
        The largest difference.

    Raises:
        SymmetryError: a difference is larger. Names the groups that make one by themselves.
    """
    copy = _Copy(model, example, found, outputs)
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for _ in range(trials):
        permutation = found.random(generator)
        difference = copy.difference(permutation)
        if not difference <= tolerance:
            raise SymmetryError(_blame(copy, found, permutation, difference, tolerance))
        worst = max(worst, difference)
    return worst


class _Copy:
    """A float64 copy of a model that can be given its units in another order."""

    def __init__(self, model: nn.Module, example: Example, found: Symmetries, outputs: Sequence[str] | None):
        _check(model, example)
        self.model, self.found, self.outputs = deepcopy(model).double().eval(), found, outputs
        self.example = torch.utils._pytree.tree_map(_double, example)
        try:
            _call(self.model, self.example)
        except SymmetryError:  # Some operations have no float64: grouped products of experts.
            self.model, self.example = deepcopy(model).eval(), example
        self.tensors = stored_tensors(self.model)
        unknown = [name for name in found.tensors if name not in self.tensors]
        if unknown:
            raise SymmetryError(f"the model has no tensor {short(unknown[0])}.{nearest(unknown[0], self.tensors)}")
        self.values = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        self.expected = self._outputs()

    def _outputs(self) -> dict[str, Tensor]:
        return output_tensors(_call(self.model, self.example), self.outputs)

    @torch.no_grad()
    def difference(self, permutation: Permutation) -> float:
        """The largest difference of any output, relative to that output's largest value."""
        for name, value in self.found.permute(self.values, permutation).items():
            self.tensors[name].copy_(value)
        return max(_relative(want, got) for want, got in zip(self.expected.values(), self._outputs().values()))


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _relative(want: Tensor, got: Tensor) -> float:
    """NaN if either holds one, so that it passes no tolerance."""
    want, got = want.double(), got.double()
    if not want.numel():
        return 0.0
    scale = want[want.isfinite()].abs().max() if want.isfinite().any() else want.new_ones(())
    apart = torch.where(want == got, 0.0, (want - got).abs())
    return float(apart.max() / scale.clamp_min(1e-30))


def _blame(copy: _Copy, found: Symmetries, permutation: Permutation, difference: float, tolerance: float) -> str:
    alone = {name: copy.difference({**found.identity(), name: permutation[name]}) for name in found.groups}
    guilty = [f"{name} ({size:.1e})" for name, size in alone.items() if not size <= tolerance]
    by = f"by the order of {', '.join(guilty)}" if guilty else "though no group does so by itself"
    return f"the model's output changes {by}: by {difference:.1e} with all groups, the tolerance is {tolerance:.1e}"
