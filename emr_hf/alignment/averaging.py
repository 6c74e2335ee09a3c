"""Averages of aligned models, with re-estimated BatchNorm and a head for each task."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import MismatchError, OptionError, nearest, one_line, short
from .similarity import evaluating, run_on
from .symmetry import output_tensors, stored_tensors


@overload
def average(
    models: Sequence[nn.Module], *, data: Iterable[Any] | None = ..., private: Collection[str] = ...
) -> nn.Module: ...
@overload
def average(
    models: Mapping[str, nn.Module], *, data: Iterable[Any] | None = ..., private: Collection[str] = ...
) -> dict[str, nn.Module]: ...
@torch.no_grad()
def average(
    models: Sequence[nn.Module] | Mapping[str, nn.Module],
    *,
    data: Iterable[Any] | None = None,
    private: Collection[str] = (),
) -> nn.Module | dict[str, nn.Module]:
    """Average aligned models, `W = mean_t W_t`, in float32.

    Args:
        models: aligned models: a list for one averaged model, or task -> model for one a task, each with its task's
            own private tensors, such as its head. These share all other tensors in memory.
        data (*optional*): unlabelled batches, with which the statistics of BatchNorm are estimated anew, as the paper
            does; without it they are averaged as the weights are.
        private (*optional*): names of tensors that stay each task's own, such as `plan.private`. Tensors that are
            missing somewhere or have another shape are so too. Of a list of models the first model's are kept.

    Returns:
        new models, of the first model's dtype; integer tensors are the first's.

    Raises:
        OptionError: there is no model, `private` names a tensor that none of them has, or there is no batch.
        MismatchError: they have no tensor in common.
    """
    if isinstance(models, nn.Module):
        raise OptionError(f"expected models to average, in a list or by task, got one {type(models).__name__}")
    members = list(models.values()) if isinstance(models, Mapping) else list(models)
    states = _states(members)
    check_data(data)
    _check_names(private, states)
    merged = deepcopy(members[0])
    shared = []
    for name, tensor in stored_tensors(merged).items():
        if all(name in state and state[name].shape == tensor.shape for state in states) and name not in private:
            shared.append(name)
            if tensor.is_floating_point():
                tensor.copy_(sum(state[name].to(tensor.device).float() for state in states) / len(states))  # type: ignore[arg-type]
    if not shared:
        raise MismatchError("the models have no tensor in common")
    if data is not None:
        estimate_statistics(merged, data)
    if not isinstance(models, Mapping):
        return merged
    return {task: with_own(merged, model, set(shared)) for task, model in models.items()}


def _states(models: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    if not models:
        raise OptionError("expected at least one model to average, got none")
    for number, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise OptionError(f"model {number}: expected an nn.Module, got {type(model).__name__}")
    return [stored_tensors(model) for model in models]


def _check_names(private: Collection[str], states: Sequence[Mapping[str, Tensor]]) -> None:
    if isinstance(private, str):
        raise OptionError(f"private={short(private)}: expected names of tensors, such as a plan's private")
    known = {name for state in states for name in state}
    for name in private:
        if name not in known:
            raise OptionError(f"private: no model has a tensor {short(name)}.{nearest(name, known)}")


def check_data(data: object) -> None:
    """Raise OptionError where data is no collection of batches but, say, one of them."""
    if data is not None and (isinstance(data, (Mapping, Tensor, str)) or not isinstance(data, Iterable)):
        raise OptionError(f"data: expected batches, such as a list of them, got {type(data).__name__}")


def with_own(merged: nn.Module, model: nn.Module, shared: Collection[str]) -> nn.Module:
    """A copy of a model whose shared parameters and buffers are those of the merged one."""
    ours = stored_tensors(merged)
    memo = {id(tensor): ours[name] for name, tensor in stored_tensors(model).items() if name in shared}
    return deepcopy(model, memo)


@torch.no_grad()
def estimate_statistics(model: nn.Module, data: Iterable[Any]) -> None:
    """Replace the running mean and variance of each BatchNorm by their averages over the batches, in place.

    Only the BatchNorm layers are in training mode while the batches run: dropout stays off. Nothing is done to a model
    without BatchNorm.

    Raises:
        OptionError: there is no batch, or one has a single value for each channel.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = {norm: norm.momentum for norm in norms}
    seen = False
    with evaluating(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.training = True
            for batch in data:
                run_on(model, batch)
                seen = True
        except ValueError as error:
            raise OptionError(f"data: statistics of BatchNorm cannot be estimated: {one_line(error)}") from error
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
    if not seen:
        raise OptionError("data: expected at least one batch, got none")


@torch.no_grad()
def agreement(averaged: Mapping[str, nn.Module], models: Mapping[str, nn.Module], data: Iterable[Any]) -> float:
    """How well averaged models keep what the models they are made of compute on unlabelled data.

    Returns:
        the mean over the models of the Pearson correlation of all numbers in their outputs, at most 1.
    """
    sums: dict[str, Tensor] = {}
    for batch in data:
        for task, model in models.items():
            with evaluating(model), evaluating(averaged[task]):
                pair = [_flat(output_tensors(run_on(each, batch))) for each in (model, averaged[task])]
            a, b = (values.double() for values in pair)
            row = torch.stack([torch.ones_like(a).sum(), a.sum(), b.sum(), a @ a, b @ b, a @ b])
            sums[task] = sums.get(task, 0) + row
    return sum(_correlation(*row.tolist()) for row in sums.values()) / max(len(sums), 1)


def _flat(outputs: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.float().flatten() for tensor in outputs.values()])


def _correlation(count: float, a: float, b: float, aa: float, bb: float, ab: float) -> float:
    variance = (aa - a * a / count) * (bb - b * b / count)
    return (ab - a * b / count) / variance**0.5 if variance > 0 else 0.0
