"""Align whole models: find their symmetries, compare their units, match these, and put models in one order (MuDSC)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MismatchError, OptionError, nearest, short
from ..recipe import patterns as checked_patterns
from .averaging import agreement, average, check_data
from .layout import Axis, Permutation, Symmetries, described
from .matching import Matching, check_scipy, match_all
from .similarity import UNUSED, activation_similarity, device_of, segment_sizes
from .symmetry import Example, stored_tensors, symmetries

Data = Iterable[Any]
# What each method sets: the share of the weights' similarity and how weights are compared.
METHODS: dict[str, tuple[float | None, str]] = {
    "mudsc": (None, "pearson"),
    "git-rebasin": (1.0, "inner"),
    "activations": (0.0, "pearson"),
}
SWEEP = tuple(tenths / 10 for tenths in range(1, 10))


@dataclass(frozen=True)
class AlignmentPlan:
    """How the units of several models have to be ordered to lie alike.

    Attributes:
        symmetries: what may be put in another order, see [`Symmetries`].
        permutations: one for each model; that of the first is the identity.
        weight: the share of the weights' similarity that was used.
        objective: mean similarity of matched units at the start and after each sweep; it never falls.
        scores: weight -> score, where the weight was chosen among several.
        private: tensors that did not count, as they belong to a model's own task.
    """

    symmetries: Symmetries
    permutations: tuple[Permutation, ...]
    weight: float
    objective: tuple[float, ...]
    scores: Mapping[float, float] = field(default_factory=dict)
    private: frozenset[str] = frozenset()

    def apply(self, model: nn.Module, number: int | None = None) -> nn.Module:
        """A copy of a model with its units in the first model's order. It computes the same as the model.

        Args:
            model: one of those that were aligned, or another with its units in the same order, as its finetunes are.
            number (*optional*): which of the aligned models it is, counted from 0; of two models it is the second.

        Raises:
            OptionError: no model, no such number, or none given and more than two models.
            MismatchError: a tensor is missing or has another shape.
        """
        permutation = self.permutations[self._number(number)]
        _check_model("model", model)
        copy = deepcopy(model)
        tensors = stored_tensors(copy)
        for name in sorted(tensors.keys() - self.symmetries.tensors.keys()):
            raise MismatchError(f"the aligned models have no tensor {short(name)}: its order is not known")
        for name, layout in self.symmetries.tensors.items():
            if name in self.private and name not in tensors:
                continue
            if name not in tensors:
                raise MismatchError(f"the model has no tensor {short(name)}.{nearest(name, tensors)}")
            if tensors[name].dim() != len(layout):
                raise MismatchError(f"{name} has {tensors[name].dim()} axes, expected {len(layout)}")
            for dim, (size, axis) in enumerate(zip(tensors[name].shape, layout)):
                units = sum(math.prod(segment_sizes(segment, self.symmetries)) for segment in axis)
                if size != units and _has_group(axis):
                    raise MismatchError(f"{name} has {size} units along axis {dim}, expected {units}")
        with torch.no_grad():
            for name, value in self.symmetries.permute(tensors, permutation).items():
                if value is not tensors[name]:
                    tensors[name].copy_(value)
        return copy

    def _number(self, number: int | None) -> int:
        if number is None and len(self.permutations) == 2:
            return 1
        if not isinstance(number, int) or not 0 <= number < len(self.permutations):
            raise OptionError(
                f"number={short(number)}: expected one of 0 to {len(self.permutations) - 1}, a model's place"
            )
        return number

    def __str__(self) -> str:
        moved = [
            name
            for name, identity in self.symmetries.identity().items()
            if any(not torch.equal(permutation[name], identity) for permutation in self.permutations)
        ]
        free = sum(any(map(_has_group, layout)) for layout in self.symmetries.tensors.values())
        lines = [
            f"{len(self.permutations)} models, weight {self.weight:g}",
            f"{len(self.symmetries.groups)} groups of units along {free} of {len(self.symmetries.tensors)} tensors, "
            f"{len(moved)} in another order",
            f"similarity of matched units {self.objective[0]:.3f} at the start, {self.objective[-1]:.3f} at the end",
        ]
        lines += [f"weight {weight:g}: score {score:.4f}" for weight, score in self.scores.items()]
        return "\n".join(lines)


def _has_group(axis: Axis) -> bool:
    return any(isinstance(factor, str) for segment in axis for factor in segment)


def align(
    *models: nn.Module,
    data: Data | None = None,
    weight: float | str = 0.5,
    method: str = "mudsc",
    example: Example | None = None,
    private: str | Sequence[str] = (),
    metric: Callable[[nn.Module], float] | None = None,
    sites: str = "all",
    seed: int = 0,
) -> AlignmentPlan:
    """Find the order of units in which models of one architecture lie alike (MuDSC, arXiv 2403.01753).

    The models need not share an initialisation. They are left as they are.

    Args:
        models: two or more; the first keeps its order.
        data (*optional*): unlabelled batches: mappings of keyword arguments, inputs, or tuples that begin with the
            input. Without it only the weights decide.
        weight (*optional*, defaults to 0.5): share of the similarity of the weights, in [0, 1]; the rest is that of
            the activations. `"auto"` tries 0.1 to 0.9 and takes the one whose average of the models has the highest
            `metric`, or agrees best with the models' own outputs on the data.
        method (*optional*, defaults to `"mudsc"`): `"git-rebasin"` compares weights alone, by their inner product
            (arXiv 2209.04836), `"activations"` activations alone (the permutations of arXiv 2305.03053); these set
            the weight.
        example (*optional*): a small input to trace the model with; by default the first batch, or for a Transformers
            model without data one made of its configuration.
        private (*optional*): regular expressions; tensors they match do not count and may have any shape, as heads of
            Transformers models may.
        metric (*optional*): of an averaged model, the higher the better. Do not use what you report on.
        sites (*optional*, defaults to `"all"`): where activations are compared: wherever a group is seen, or where it
            is `"last"` seen, as in the paper, which takes less memory. A site of n units takes 8 n^2 bytes.
        seed (*optional*, defaults to 0): of the order in which groups are matched.

    Returns:
        an [`AlignmentPlan`]; `plan.apply(model_b)` puts a model in order.

    Raises:
        OptionError: an argument cannot be used, or no example can be made.
        MismatchError: the models are not of one architecture.
        SymmetryError: the model does not run on the example.
        ActivationError: an activation is NaN or infinite, or there is no batch.
        NonFiniteError: a weight is.
    """
    share, measure = check_options(method, weight, sites, data is not None)
    check_data(data)
    check_scipy()
    skip = private_tensors(models, private)
    if isinstance(data, Iterator):
        data = list(data)  # it is read more than once
    example = _example(models[0], example, data)
    if measure == "inner":
        data = None
    found = symmetries(models[0], example)
    for number, model in enumerate(models[1:], start=1):
        _check_alike(found, symmetries(model, _fitted(example, models[0], model)), number)
    pairs = combinations(range(len(models)), 2) if data is not None and share != 1 else ()
    activations = {
        (j, k): activation_similarity(models[j], models[k], found, data or (), sites=sites) for j, k in pairs
    }
    states = [{name: tensor.detach() for name, tensor in stored_tensors(model).items()} for model in models]

    def plan(share: float, scores: Mapping[float, float] | None = None) -> AlignmentPlan:
        matching: Matching = match_all(
            states, found, activations or None, share, measure=measure, skip=skip, seed=seed
        )
        return AlignmentPlan(found, matching.permutations, share, matching.objective, scores or {}, skip)

    if share is not None:
        return plan(share if activations else 1.0)
    scores = {tried: _score(plan(tried), models, data, metric) for tried in SWEEP}
    return plan(max(scores, key=lambda tried: scores[tried]), scores)


def _check_alike(first: Symmetries, other: Symmetries, number: int) -> None:
    """Raise MismatchError where another order of units than the first's leaves a model's function as it is.

    Tensors of the same shapes do not tell: there may be another number of heads.
    """
    for name in {**first.groups, **other.groups}:
        if first.groups.get(name) != other.groups.get(name):
            raise MismatchError(f"model {number} does not have the first's units {name}: expected one architecture")
    for name, ours in first.tensors.items():
        theirs = other.tensors.get(name, ours)
        if [axis for axis in ours if _has_group(axis)] != [axis for axis in theirs if _has_group(axis)]:
            raise MismatchError(
                f"{name} of model {number} is {described(theirs)}, in the first {described(ours)}: "
                "expected one architecture"
            )


def _fitted(example: Example, first: nn.Module, model: nn.Module) -> Example:
    """The first model's example on another's device, in its type of numbers."""
    device = device_of(model)

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, _dtype(model) if value.dtype == _dtype(first) else None)

    fitted: Example = torch.utils._pytree.tree_map(fit, example)
    return fitted


def check_options(method: str, weight: float | str, sites: str, has_data: bool) -> tuple[float | None, str]:
    """The share of the weights, `None` for that to be found, and how they are compared.

    Raises:
        OptionError: a value cannot be used, or not without data.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise OptionError(
            f"method={short(method)} is unknown.{nearest(method, METHODS)} Expected {', '.join(METHODS)}"
        )
    if weight != "auto" and not (isinstance(weight, (int, float)) and 0 <= weight <= 1):
        raise OptionError(f"weight={short(weight)}: expected a number from 0 to 1, or 'auto'")
    if sites not in ("all", "last"):
        raise OptionError(f"sites={short(sites)}: expected 'all' or 'last'")
    share, measure = METHODS[method]
    if share is None and weight != "auto":
        share = float(weight)
    if not share and not has_data:
        option = f"weight={short(weight)}" if method == "mudsc" else f"method={short(method)}"
        raise OptionError(f"{option} needs data: without it only the weights can be compared")
    return share, measure


def _score(
    plan: AlignmentPlan, models: Sequence[nn.Module], data: Data | None, metric: Callable[[nn.Module], float] | None
) -> float:
    """What the average of the models, aligned, is worth."""
    aligned = {str(number): plan.apply(model, number) for number, model in enumerate(models)}
    averaged = average(aligned, data=data, private=plan.private)
    if metric is not None:
        score = sum(float(metric(model)) for model in averaged.values()) / len(averaged)
        if math.isnan(score):
            raise OptionError(f"metric: expected numbers, got {score} with weight {plan.weight:g}")
        return score
    return agreement(averaged, aligned, data or ())


def private_tensors(models: Sequence[nn.Module], patterns: str | Sequence[str] = ()) -> frozenset[str]:
    """Names of the tensors that belong to a model's own task.

    Raises:
        OptionError: fewer than two models, or what is no model.
        MismatchError: the models are not of one architecture.
    """
    if len(models) < 2:
        raise OptionError(f"expected two or more models, got {len(models)}")
    for number, model in enumerate(models):
        _check_model(f"model {number}", model)
    first, *others = (stored_tensors(model) for model in models)
    patterns = checked_patterns(patterns, {name for state in (first, *others) for name in state})
    own = {name for name in first if is_private(models[0], name, patterns)}
    for number, (model, state) in enumerate(zip(models[1:], others), start=1):
        if type(model) is not type(models[0]):
            raise MismatchError(f"model {number} is a {type(model).__name__}, the first a {type(models[0]).__name__}")
        lacking = {name for name in first.keys() - state.keys() if name not in own}
        apart = sorted(lacking | (state.keys() - first.keys()))  # of what the first lacks no order would be known
        if apart:
            raise MismatchError(f"model {number} and the first do not both have {apart[0]}: expected one architecture")
        for name in (first.keys() & state.keys()) - own:
            if first[name].shape != state[name].shape:
                shapes = f"{tuple(state[name].shape)}, in the first {tuple(first[name].shape)}"
                raise MismatchError(f"{name} of model {number} has shape {shapes}: name it as private if it is a head")
    return frozenset(own)


def _check_model(label: str, model: object) -> None:
    from ..modeling import EMRMergedModel

    if not isinstance(model, nn.Module):
        raise OptionError(f"{label}: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, EMRMergedModel):
        raise OptionError(f"{label}: a merged model makes its weights anew for each task: export the task first")


def is_private(model: nn.Module, name: str, patterns: Sequence[str] = ()) -> bool:
    """Whether a tensor is of a head of a Transformers model, or matches one of the regular expressions."""
    from transformers import PreTrainedModel

    from ..checkpoint import is_head

    if any(re.search(pattern, name) for pattern in patterns):
        return True
    return isinstance(model, PreTrainedModel) and is_head(model, name)


def _example(model: nn.Module, example: Example | None, data: Data | None) -> Example:
    """What to trace the model with: two rows of the first batch will do."""
    if example is not None:
        return example
    for batch in data or ():
        device = device_of(model)
        if isinstance(batch, Mapping):
            return {name: _few(value, device) for name, value in batch.items() if name not in UNUSED}
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(first, Tensor):
            raise OptionError(f"data: expected batches that are or begin with a tensor, got {type(first).__name__}")
        return _few(first, device)
    if data is not None:
        raise OptionError("data: expected at least one batch, got none")
    return made_example(model)


def _few(value: Any, device: torch.device) -> Any:
    """Two rows; what has no rows is an option of the model."""
    return (value[:2] if value.dim() else value).to(device) if isinstance(value, Tensor) else value


def made_example(model: nn.Module) -> Example:
    """An input made of a Transformers model's configuration: ids, or an image.

    Raises:
        OptionError: the model does not tell what it takes.
    """
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    vision = getattr(config, "vision_config", config)
    if name == "pixel_values" or hasattr(config, "vision_config"):
        size = getattr(vision, "image_size", None) or 32
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        pixels = torch.randn(2, getattr(vision, "num_channels", 3), height, width, generator=generator)
        images: dict[str, Tensor] = {"pixel_values": pixels.to(_dtype(model))}
        text = getattr(config, "text_config", None)
        return images if text is None else {**images, **_ids(text, generator)}
    if name == "input_ids" and config is not None:
        ids = _ids(config, generator)
        return {**ids, "decoder_input_ids": ids["input_ids"]} if config.is_encoder_decoder else ids
    raise OptionError(f"{type(model).__name__} does not tell what it takes: expected an example, or data")


def _ids(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, config.get_text_config().vocab_size, (2, 8), generator=generator)}


def _dtype(model: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in model.parameters()), torch.float32)
