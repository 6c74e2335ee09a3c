"""How alike the units of two models are: by what they compute on the same data, and by their weights.

Both measures are a Pearson correlation, so neither depends on the scale of a unit (MuDSC, arXiv 2403.01753). A matrix
has an entry for each unit of the first model and each of the second, the units of a group in row-major order of its
chain, ancestors first.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ActivationError, MismatchError, OptionError, short
from .layout import Layout, Segment, Site, Symmetries

CHUNK = 1 << 22  # elements that are centred at a time: bounds the float64 copies
CONSTANT = 1e-7  # a deviation below this share of the mean is rounding of float32
STATISTICS = ("running_mean", "running_var")  # of BatchNorm: measured, not learned
UNUSED = ("labels",)  # of a batch: a head may lack, or differ in, what they need


class Moments:
    """Means, squares and products of the units of two models, gathered in one pass.

    Each chunk of samples is centred on its own mean and merged into the rest by Chan's rule, in float64, so that a
    large common offset costs no digits.

    Args:
        matched (`bool`, *optional*, defaults to `False`): only compare unit `i` with unit `i`, at a cost linear in the
            number of units.

    Example:
        >>> moments = Moments()
        >>> moments.add(torch.randn(5, 100), torch.randn(7, 100))
        >>> moments.correlation().shape
        torch.Size([5, 7])
    """

    def __init__(self, matched: bool = False):
        self.matched = matched
        self.count = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add samples, `a` of shape (units, samples) and `b` of shape (units, samples)."""
        columns = max(CHUNK // max(len(a), len(b), 1), 1)
        for part_a, part_b in zip(a.split(columns, 1), b.split(columns, 1)):
            if part_a.shape[1]:
                self._add(part_a, part_b)

    def _add(self, a: Tensor, b: Tensor) -> None:
        mean_a, a = _centred(a)
        mean_b, b = _centred(b)
        if not self.count:
            self.mean_a, self.mean_b = torch.zeros_like(mean_a), torch.zeros_like(mean_b)
            self.square_a, self.square_b = torch.zeros_like(mean_a), torch.zeros_like(mean_b)
            self.cross = mean_a.new_zeros(len(a) if self.matched else (len(a), len(b)))
        total = self.count + a.shape[1]
        step_a, step_b, share = mean_a - self.mean_a, mean_b - self.mean_b, self.count * a.shape[1] / total
        self.square_a += _squares(a) + share * step_a**2
        self.square_b += _squares(b) + share * step_b**2
        if self.matched:
            self.cross += (a * b).sum(1, dtype=torch.float64) + share * step_a * step_b
        else:
            self.cross.add_(a @ b.T).addr_(step_a, step_b, alpha=share)
        self.mean_a += step_a * (a.shape[1] / total)
        self.mean_b += step_b * (a.shape[1] / total)
        self.count = total

    def correlation(self) -> Tensor:
        """Pearson correlations, float32 of shape (units of a, units of b) or (units,); 0 where one is constant."""
        scale_a = _scale(self.square_a, self.mean_a, self.count)
        scale_b = _scale(self.square_b, self.mean_b, self.count)
        scaled = self.cross * (scale_a if self.matched else scale_a[:, None]) * scale_b
        return scaled.clamp_(-1, 1).float()


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.mean(1, dtype=torch.float64)
    return mean, (rows - mean[:, None]).to(torch.promote_types(rows.dtype, torch.float32))


def _squares(rows: Tensor) -> Tensor:
    return (rows * rows).sum(1, dtype=torch.float64)


def _scale(square: Tensor, mean: Tensor, count: int) -> Tensor:
    constant = square <= count * (CONSTANT * mean) ** 2
    return torch.where(constant, 0.0, square.rsqrt())


# ---- weights


def weight_similarity(
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    spec: Symmetries,
    group: str,
    *,
    measure: str = "pearson",
    skip: Collection[str] = (),
    within: bool = False,
) -> Tensor:
    """How alike the weights of a group's units are.

    A unit's features are its rows and columns of all tensors that have the group along an axis: weights, biases, scale
    and shift of norms; not the running statistics of BatchNorm. The other axes are compared in the order they are in.
    Of a group with children, only tensors count that do not tell the children apart, such as a bias per head.

    Args:
        state_a, state_b: tensors by name. The second model's other groups stand in the order found so far.
        spec: the groups, and how they lie along the tensors' axes.
        group: whose units to compare.
        measure (`str`, *optional*, defaults to `"pearson"`): or `"inner"`, the inner product of the features as in
            git re-basin (arXiv 2209.04836).
        skip: names of tensors that do not count, such as the heads of different tasks.
        within (`bool`, *optional*, defaults to `False`): also compare each model's units with each other, as merging
            them needs.

    Returns:
        `Tensor`: float32 of shape (n, n), n the group's units over all ancestors, or (2n, 2n), the units of both
            models along both axes, where `within`. Zeros if no tensor has the group.
    """
    size = math.prod(spec.shape(group)) * (2 if within else 1)
    moments, product = Moments(), torch.zeros(size, size, dtype=torch.float64)
    for a, b in paired_rows(state_a, state_b, spec, group, skip):
        if within:
            a = b = torch.cat([a, b])
        if measure == "inner":
            product += (a.float() @ b.float().T).to(product.device)
        else:
            moments.add(a, b)
    return moments.correlation() if moments.count else product.float()


def matched_similarity(
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    spec: Symmetries,
    group: str,
    *,
    skip: Collection[str] = (),
) -> Tensor:
    """The diagonal of [`weight_similarity`], of shape (n,), at a cost linear in the number of weights."""
    moments = Moments(matched=True)
    for a, b in paired_rows(state_a, state_b, spec, group, skip):
        moments.add(a, b)
    return moments.correlation() if moments.count else torch.zeros(math.prod(spec.shape(group)))


def weighed(
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    spec: Symmetries,
    group: str,
    measure: str = "pearson",
) -> bool:
    """Whether the weights tell the group's units apart: a correlation takes two features."""
    features = sum(a.shape[1] for a, _ in paired_rows(state_a, state_b, spec, group))
    return features > (measure == "pearson")


def paired_rows(
    state_a: Mapping[str, Tensor],
    state_b: Mapping[str, Tensor],
    spec: Symmetries,
    group: str,
    skip: Collection[str] = (),
) -> Iterator[tuple[Tensor, Tensor]]:
    """The features of a group's units tensor by tensor, of both models, each of shape (units, features)."""
    for name in comparable(state_a, state_b, spec, skip):
        layout = spec.tensors[name]
        yield from zip(unit_rows(state_a[name], layout, spec, group), unit_rows(state_b[name], layout, spec, group))


def comparable(
    state_a: Mapping[str, Tensor], state_b: Mapping[str, Tensor], spec: Symmetries, skip: Collection[str] = ()
) -> Iterator[str]:
    """The tensors that both models have and that are learned; of those tied to each other, one."""
    seen: set[tuple[int, int]] = set()
    for name in spec.tensors:
        if name in skip or name.rpartition(".")[2] in STATISTICS or not (name in state_a or name in state_b):
            continue
        shapes = [tuple(state[name].shape) if name in state else None for state in (state_a, state_b)]
        if shapes[0] != shapes[1]:
            raise MismatchError(f"{name} has shape {shapes[0]} in one model and {shapes[1]} in the other: skip it?")
        storage = (state_a[name].data_ptr(), state_b[name].data_ptr())
        if state_a[name].is_floating_point() and state_a[name].numel() and storage not in seen:
            seen.add(storage)
            yield name


def unit_rows(tensor: Tensor, layout: Layout, spec: Symmetries, group: str) -> Iterator[Tensor]:
    """A tensor as (units, features), once for each segment that has the group and none of its descendants."""
    ancestors = spec.chain(group)
    below = {name for name in spec.groups if group in spec.chain(name)[:-1]}
    for dim, axis in enumerate(layout):
        start = 0
        for segment in axis:
            sizes = segment_sizes(segment, spec)
            if group in segment and below.isdisjoint(segment):
                part = tensor.narrow(dim, start, math.prod(sizes)).movedim(dim, 0).unflatten(0, sizes)
                order = [segment.index(name) for name in ancestors]
                yield part.movedim(order, list(range(len(order)))).reshape(math.prod(spec.shape(group)), -1)
            start += math.prod(sizes)


def segment_sizes(segment: Segment, spec: Symmetries) -> list[int]:
    """The size of each factor."""
    return [factor if isinstance(factor, int) else spec.groups[factor].size for factor in segment]


def combine(weights: Mapping[str, Tensor], activations: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """`weight * weights + (1 - weight) * activations` for each group; a group that only one of them has keeps that."""
    combined = {**weights, **activations}
    for name in weights.keys() & activations.keys():
        combined[name] = weight * weights[name].cpu() + (1 - weight) * activations[name].cpu()
    return combined


# ---- activations


class _Reading(NamedTuple):
    """Where at a site the units of a group can be compared."""

    site: Site
    group: str
    dim: int
    start: int  # of the group's segment along the axis
    units: int
    length: int  # of the axis
    repeats: bool  # the module's own tensors have the group, so it does at each of its calls


def activation_similarity(
    model_a: nn.Module,
    model_b: nn.Module,
    spec: Symmetries,
    batches: Iterable[Any],
    *,
    sites: str = "all",
    within: bool = False,
) -> dict[str, Tensor]:
    """How alike the units of two models are in what they compute on the same data.

    Reads the inputs and outputs of the modules without children, each tensor once, that have groups along just one
    axis, and there the segments that are the units of one group, such as each of a fused layer's three. All other axes
    count as samples, except positions that an `attention_mask` masks.

    Args:
        model_a, model_b: of the same architecture. Run in evaluation mode, each on its own device.
        spec: the groups, and the sites at which they can be read.
        batches: each a mapping of keyword arguments, the input itself, or a tuple or list that begins with it. Labels
            are not used.
        sites (`str`, *optional*, defaults to `"all"`): `"last"` reads a group where it is last seen, as the paper
            does. `"all"` averages the correlations over all its sites, and holds a matrix in float64 for each.
        within (`bool`, *optional*, defaults to `False`): also compare each model's units with each other.

    Returns:
        `dict[str, Tensor]`: for each group that can be read a float32 matrix of shape (n, n), n its units over all
        ancestors, or (2n, 2n), the units of both models along both axes, where `within`.
    """
    if sites not in ("all", "last"):
        raise OptionError(f"sites is {short(sites)}: expected 'all' or 'last'")
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise ActivationError("no batches: expected at least one")
    models = {"the first model": model_a, "the second model": model_b}
    moments: dict[_Reading, Moments] = {}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        readings = _chosen(_survey(model_a, spec, first), sites)
        for batch in chain([first], stream):
            rows_a, rows_b = (_read(model, who, readings, batch) for who, model in models.items())
            readings = [reading for reading in readings if _comparable(reading, rows_a, rows_b, moments)]
            for reading in readings:
                a, b = rows_a.pop(reading), rows_b.pop(reading)
                if within:
                    a = b = torch.cat([a, b.to(a.device)])
                moments.setdefault(reading, Moments()).add(a, b.to(a.device))
    _warn_if_few(moments, spec)
    return _averaged(moments)


def _averaged(moments: dict[_Reading, Moments]) -> dict[str, Tensor]:
    """For each group the mean of the correlations at its sites."""
    sites: dict[str, int] = {}
    averaged: dict[str, Tensor] = {}
    for reading, gathered in moments.items():
        correlation, group = gathered.correlation(), reading.group
        averaged[group] = averaged[group] + correlation if group in averaged else correlation
        sites[group] = sites.get(group, 0) + 1
    return {group: total / sites[group] for group, total in averaged.items()}


def _warn_if_few(moments: dict[_Reading, Moments], spec: Symmetries) -> None:
    """Correlations of n units from fewer than n samples: some are high by chance."""
    short = {reading.group: gathered.count for reading, gathered in moments.items() if gathered.count < reading.units}
    if short:
        group = max(short, key=lambda name: math.prod(spec.shape(name)))
        units = math.prod(spec.shape(group))
        advice = f"expected at least {units} (more or larger batches)"
        warnings.warn(f"{short[group]} samples for the {units} units of {group}: {advice}", stacklevel=3)


def _comparable(
    reading: _Reading, rows_a: dict[_Reading, Tensor], rows_b: dict[_Reading, Tensor], moments: dict[_Reading, Moments]
) -> bool:
    """Whether both models were seen there on as many samples; routing to experts may send them different ones."""
    counts = [rows[reading].shape[1] if reading in rows else 0 for rows in (rows_a, rows_b)]
    site = reading.site
    if counts[0] != counts[1]:
        warnings.warn(
            f"{site.module} ({site.kind}) saw {counts[0]} and {counts[1]} samples: not compared", stacklevel=3
        )
        moments.pop(reading, None)
    return counts[0] == counts[1] and counts[0] > 0


def _readings(model: nn.Module, spec: Symmetries) -> list[_Reading]:
    """What can be read, for a group that has sites at modules without children only there."""
    leaves = {name for name, module in model.named_modules() if not any(True for _ in module.children())}
    found = [reading for site in spec.sites for reading in _at(site, spec)]
    at_leaves = {reading.group for reading in found if reading.site.module in leaves}
    return [reading for reading in found if reading.site.module in leaves or reading.group not in at_leaves]


def _at(site: Site, spec: Symmetries) -> Iterator[_Reading]:
    """The segments of one axis, if the others have no groups, that are the units of a group and nothing else."""
    carrying = [dim for dim, axis in enumerate(site.layout) if any(_named(segment) for segment in axis)]
    if len(carrying) != 1:
        return
    axis, start = site.layout[carrying[0]], 0
    sizes = [math.prod(segment_sizes(segment, spec)) for segment in axis]
    own = [layout for name, layout in spec.tensors.items() if name.rpartition(".")[0] == site.module]
    for segment, size in zip(axis, sizes):
        group = segment[-1] if segment else 1
        if isinstance(group, str) and segment == spec.chain(group):
            repeats = any(group in part for layout in own for axis in layout for part in axis)
            yield _Reading(site, group, carrying[0], start, size, sum(sizes), repeats)
        start += size


def _named(segment: Segment) -> bool:
    return any(isinstance(factor, str) for factor in segment)


def _survey(model: nn.Module, spec: Symmetries, batch: Any) -> list[_Reading]:
    """The readings in the order in which the model comes by them, each tensor's first only."""
    order: list[_Reading] = []
    shown: dict[tuple[int, int], tuple[weakref.ref[Tensor], int]] = {}

    def note(reading: _Reading, tensor: Tensor) -> None:
        place = id(tensor), reading.start
        known, version = shown.get(place, (None, -1))
        again = known is not None and known() is tensor and version == _version(tensor)
        shown[place] = weakref.ref(tensor), _version(tensor)
        if not again and reading not in order:
            order.append(reading)

    _run(model, batch, _readings(model, spec), note)
    return order


def _version(tensor: Tensor) -> int:
    """How often it was written to; made in inference mode, a tensor does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _chosen(readings: list[_Reading], sites: str) -> list[_Reading]:
    """All of them, or of each group the last."""
    return readings if sites == "all" else list({reading.group: reading for reading in readings}.values())


def _read(model: nn.Module, who: str, readings: list[_Reading], batch: Any) -> dict[_Reading, Tensor]:
    """What a model computes at each site on one batch, of shape (units, samples)."""
    parts: dict[_Reading, list[Tensor]] = {}
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

    def note(reading: _Reading, tensor: Tensor) -> None:
        rows = tensor.detach().movedim(reading.dim, 0).narrow(0, reading.start, reading.units)
        if mask is not None and rows.shape[1:] == mask.shape:
            rows = rows[:, mask.to(rows.device).bool()]
        rows = rows.flatten(1).to(torch.promote_types(rows.dtype, torch.float32), copy=True)
        if not rows.isfinite().all():
            place = f"{reading.site.kind} of {reading.site.module or 'the whole model'}"
            raise ActivationError(f"{who} ({type(model).__name__}): {place} holds NaN or Inf, expected finite numbers")
        # A copy: a later operation may work in place.
        parts.setdefault(reading, []).append(rows)

    _run(model, batch, readings, note)
    return {reading: torch.cat(rows, 1) for reading, rows in parts.items()}


def _run(model: nn.Module, batch: Any, readings: list[_Reading], note: Callable[[_Reading, Tensor], None]) -> None:
    """Run the model on a batch and have `note` see what stands at each reading's site.

    The layout of a site is that of the module's first call. A module without weights, such as one ReLU for several
    layers, may see other groups later, of the same size even.
    """
    called: set[_Reading] = set()

    def note_once(reading: _Reading, tensor: Tensor) -> None:
        if reading.repeats or reading not in called:
            called.add(reading)
            note(reading, tensor)

    with ExitStack() as hooks:
        for reading in readings:
            hooks.enter_context(_hooked(model.get_submodule(reading.site.module), reading, note_once))
        run_on(model, batch)


@torch.no_grad()
def run_on(model: nn.Module, batch: Any) -> Any:
    """What a model returns for a batch: keyword arguments, the input, or a tuple or list that begins with it.

    Labels are left out; tensors go to the model's device.
    """
    device = device_of(model)
    if isinstance(batch, Mapping):
        return model(**{name: _to(value, device) for name, value in batch.items() if name not in UNUSED})
    return model(_to(batch[0] if isinstance(batch, tuple | list) else batch, device))


def device_of(model: nn.Module) -> torch.device:
    """Where a model is, by its first parameter; one without any takes what is on the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _hooked(module: nn.Module, reading: _Reading, note: Callable[[_Reading, Tensor], None]) -> RemovableHandle:
    site = reading.site

    def see(values: Sequence[Any]) -> None:
        value = values[site.position] if site.position < len(values) else None
        if (
            isinstance(value, Tensor)
            and value.dim() == len(site.layout)
            and value.shape[reading.dim] == reading.length
        ):
            note(reading, value)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see((*args, *kwargs.values()))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Mapping):
            output = list(output.values())
        see(output if isinstance(output, tuple | list) else [output])

    if site.kind == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and each of its modules in its own again at the end."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, was in training.items():
            module.training = was
