"""`forward` of the wrapper, seen by those who ask for its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


class DelegatedSignature:
    """A method whose signature is that of the wrapped model's `forward`.

    `Trainer` drops the dataset's columns that `forward` does not name, and pipelines probe it for arguments.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return _with_labels(self.function, getattr(owner, "_auto_suffix", None))
        bound = functools.partial(self.function, instance)
        if "model" in instance._modules:
            bound.__signature__ = _with_our_arguments(inspect.signature(instance.model.forward))  # type: ignore[attr-defined]
        return bound


def _with_labels(function: Callable[..., Any], suffix: str | None) -> Callable[..., Any]:
    """The method as a class's attribute. `Trainer` asks the class, not the model, which arguments are labels."""

    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    names = ("start_positions", "end_positions") if suffix == "QuestionAnswering" else ("labels",)
    labels = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    signature = inspect.signature(function)
    *others, kwargs_parameter = signature.parameters.values()
    forward.__signature__ = signature.replace(parameters=[*others, *labels, kwargs_parameter])  # type: ignore[attr-defined]
    return forward


def _with_our_arguments(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    position = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("emr_task", "emr_pad")]
    return signature.replace(parameters=[*parameters[:position], *ours, *parameters[position:]])
