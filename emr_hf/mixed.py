"""Batches whose rows belong to different tasks: split by task, and what comes out put back in row order.

And the lock that makes a switch and the call that it is for one step. `model` is an [`EMRMergedModel`] throughout.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import ModelOutput

from .errors import EMRError, OptionError, short
from .recipe import BASE

CACHES = ("past_key_values", "cache_params", "mems")
"""Names, in inputs and outputs, of what a model remembers: of no use to another task."""

Groups = dict[str, list[int]]
"""Task -> its rows in the batch."""


class Lock:
    """A re-entrant lock. A copied or pickled model gets a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


# Tasks by row


def is_per_row(emr_task: object) -> bool:
    """Whether `emr_task` says the task of every row, and is not the name of one task for all."""
    return not isinstance(emr_task, str) and (isinstance(emr_task, Sequence) or hasattr(emr_task, "tolist"))


def names_of(emr_task: Any, config: Any, size: int) -> list[str]:
    """The task of every row, by name.

    Args:
        emr_task: names, or indices into the model's tasks; `"__base__"`, or -1, for the base.
        config: the model's.
        size: rows in the batch.

    Raises:
        OptionError: not one for every row, or neither a name nor an index.
        UnknownTaskError: with the nearest names.
    """
    values = emr_task.tolist() if hasattr(emr_task, "tolist") else list(emr_task)
    if not isinstance(values, list):
        raise OptionError(f"emr_task: expected one task for all rows or one for every row, got {short(emr_task)}")
    if len(values) != size:
        raise OptionError(f"emr_task: expected a task for each of {size} rows, got {len(values)}")
    return [_name_of(value, row, config) for row, value in enumerate(values)]


def _name_of(value: object, row: int, config: Any) -> str:
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, Integral) and not isinstance(value, bool):
        names = {-1: BASE, **dict(enumerate(config.tasks))}
        value = names.get(int(value), value)
    elif not isinstance(value, str):
        raise OptionError(
            f"emr_task, row {row}: expected a name or an index into the model's tasks, "
            f"got {short(value)} ({type(value).__name__})"
        )
    if value != BASE:
        config.entry(value)
    elif config.method == "levels":
        raise OptionError(f"emr_task, row {row}: this repo holds two levels for each weight and no base to run")
    return str(value)


def group_rows(names: Sequence[str], active: str) -> Groups:
    """The rows of every task, those of the active one first; a batch without rows is the active task's."""
    groups: Groups = {active: []} if active in names or not names else {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    return groups


# Inputs


def named_arguments(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, all by name."""
    signature = inspect.signature(function)
    signature.bind_partial(*args, **kwargs)  # raises TypeError as the call would
    return {**dict(zip(signature.parameters, args)), **kwargs}


def count_rows(inputs: Mapping[str, Any], names: Sequence[str]) -> int:
    """Rows of a batch: those of the first of `names` that is a tensor, or of any tensor.

    Raises:
        OptionError: there is none.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    for name in (*names, "input_ids", "inputs_embeds", *tensors):
        if name in tensors:
            return len(tensors[name])
    raise OptionError(f"emr_task for every row: expected a tensor with rows, got {', '.join(inputs) or 'no input'}")


def take_rows(value: Any, rows: list[int], size: int) -> Any:
    """Some rows of an input.

    Tensors of `size` rows are indexed, also inside of lists, tuples and dicts. Of a list of `size` dicts, lists or
    tensors, such as the labels of a detection model, the rows' are taken. Anything else stays as it is.
    """
    if isinstance(value, Tensor):
        return value[rows] if _has_rows(value, size) else value
    if isinstance(value, Mapping):
        taken = {key: take_rows(item, rows, size) for key, item in value.items()}
        return type(value)(**taken) if isinstance(value, ModelOutput) else taken
    if isinstance(value, (list, tuple)):
        one_a_row = len(value) == size and not any(_has_rows(item, size) for item in value)
        if one_a_row and all(isinstance(item, (Tensor, Mapping, list, tuple)) for item in value):
            return type(value)([value[row] for row in rows])
        return type(value)([take_rows(item, rows, size) for item in value])
    return value


def take_inputs(inputs: Mapping[str, Any], rows: list[int], size: int) -> dict[str, Any]:
    """Some rows of all inputs, see [`take_rows`]."""
    if rows == list(range(size)):
        return dict(inputs)
    taken = {name: take_rows(value, rows, size) for name, value in inputs.items()}
    positions = inputs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[1] == size:
        taken["position_ids"] = positions[:, rows]  # (axes, rows, tokens), in models that see images
    return taken


def _has_rows(value: object, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    given = [name for name in CACHES if inputs.get(name) is not None]
    if given:
        raise OptionError(
            f"{given[0]} with a task for every row: what one task remembers is of no use to another, "
            "call the model with one task, or without it"
        )


def _check_gradients(model: Any, inputs: Mapping[str, Any], groups: Groups) -> None:
    if not torch.is_grad_enabled() or groups.keys() == {_active(model)}:
        return
    tensors = [*model.parameters(), *(value for value in inputs.values() if isinstance(value, Tensor))]
    if any(tensor.requires_grad for tensor in tensors):
        raise EMRError(
            "a batch of several tasks cannot be trained on: the switch to the next task overwrites weights that the "
            "backward pass of the last one needs; use torch.no_grad(), or batches of the active task"
        )


# Outputs


def join(parts: Sequence[Any], rows: Sequence[list[int]]) -> Any:
    """One output of all groups, in row order.

    Args:
        parts: each group's.
        rows: each group's rows.

    Returns:
        tensors of one shape: one tensor; of several shapes: a list of a tensor for each row; tuples, lists and
        outputs: the same of what is in them. `None` for what has no rows, as a scalar or a cache.
    """
    first = parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        return _join_tensors(parts, rows) if all(_has_rows(part, len(r)) for part, r in zip(parts, rows)) else None
    if all(isinstance(part, dict) for part in parts):
        joined = {name: join([part.get(name) for part in parts], rows) for name in first}
        return type(first)(**joined)
    if all(isinstance(part, (list, tuple)) and len(part) == len(first) for part in parts):
        items = [join(items, rows) for items in zip(*parts)]
        return type(first)(items) if any(item is not None for item in items) else None
    return None


def _join_tensors(parts: Sequence[Tensor], rows: Sequence[list[int]]) -> Tensor | list[Tensor]:
    order = [row for group in rows for row in group]
    if len({part.shape[1:] for part in parts}) > 1:
        by_row = dict(zip(order, (row for part in parts for row in part)))
        return [by_row[row] for row in sorted(by_row)]
    joined = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    return joined if order == sorted(order) else joined[torch.tensor(order).argsort().to(joined.device)]


def widen(logits: Sequence[Tensor], labels: Sequence[int], widest: int) -> list[Tensor]:
    """Logits of heads of several widths, filled up with -inf to one width.

    Args:
        logits: each group's, `(rows, ..., labels)`, or `(rows, labels, height, width)`.
        labels: each group's number of labels. Logits of another width, such as a vocabulary's, are filled up to the
            widest among them only.
        widest: number of labels of the widest head.
    """
    axis = 1 if logits[0].dim() == 4 else -1
    width = max(part.shape[axis] for part in logits)
    if all(part.shape[axis] == count for part, count in zip(logits, labels)):
        width = max(width, widest)
    after = (0, 0) * 2 if axis == 1 else ()  # `pad` counts from the last axis
    return [F.pad(part, (*after, 0, width - part.shape[axis]), value=float("-inf")) for part in logits]


def count_labels(wrapped: Any, inputs: Mapping[str, Any], rows: int) -> int:
    """What a group's loss is the mean of: labels that are not -100, or rows where the labels are no classes.

    Args:
        wrapped: the wrapped model after the forward, which writes the problem type that it found.
        inputs: the group's.
        rows: the group's number of rows.
    """
    labels = inputs.get("labels")
    by_row = wrapped.config.problem_type == "regression" or wrapped.loss_type == "ForCTC"
    if not isinstance(labels, Tensor) or labels.is_floating_point() or by_row:
        return rows
    if labels.dim() > 1 and _shifts_labels(wrapped):
        labels = labels[..., 1:]
    return int((labels != -100).sum())


def _shifts_labels(wrapped: Any) -> bool:
    if wrapped.config.is_encoder_decoder:
        return False
    if wrapped.loss_type is None:  # transformers takes the causal loss where a class's name tells it none
        return wrapped.can_generate()
    return LOSS_MAPPING.get(wrapped.loss_type) is ForCausalLMLoss


def join_losses(losses: Sequence[Tensor], counts: Sequence[int], total: Any) -> Tensor:
    """The mean loss of a batch from its groups' means. A group in which nothing counts has no loss, but NaN."""
    counted = [loss * (count / total) for loss, count in zip(losses, counts) if count]
    return torch.stack(counted).sum(0) if counted else losses[0]


# Calls


def _active(model: Any) -> str:
    return model.active_task or model.config.default_task


@torch.compiler.disable  # to compile the rows of one task after the other, compile `model.model`
def forward(model: Any, emr_task: Any, pad: bool, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The forward of a batch with a task for every row: one of the wrapped model for each task in it.

    Args:
        model: the merged model; on the task that it was on again afterwards.
        emr_task: see [`names_of`].
        pad: fill up logits with -inf to the widest head of all the model's tasks.
        args, kwargs: of the wrapped model's `forward`.

    Returns:
        the output that the wrapped model gives, or a tuple, see [`join`]; without caches.
    """
    wrapped = model.model
    inputs = named_arguments(wrapped.forward, args, kwargs)
    size = count_rows(inputs, (wrapped.main_input_name,))
    groups = group_rows(names_of(emr_task, model.config, size), _active(model))
    _check_inputs(inputs)
    _check_gradients(model, inputs, groups)
    as_dict = inputs.get("return_dict")
    as_dict = wrapped.config.return_dict if as_dict is None else as_dict
    if not as_dict:
        inputs["return_dict"] = True
    if "use_cache" in inspect.signature(wrapped.forward).parameters:
        inputs["use_cache"] = False
    batch_items = inputs.pop("num_items_in_batch", None)

    def run(rows: list[int]) -> tuple[Any, int, int]:
        part = take_inputs(inputs, rows, size)
        output = wrapped(**part)
        return output, count_labels(wrapped, part, len(rows)), wrapped.config.num_labels

    outputs, counts, labels = zip(*model._by_task(groups, run))
    rows = list(groups.values())
    if not isinstance(outputs[0], dict):
        return join(outputs, rows)
    parts = {name: [output.get(name) for output in outputs] for name in outputs[0] if name not in CACHES}
    if pad and _all_tensors(parts.get("logits")):
        widest = max(len(entry["id2label"]) for entry in model.config.tasks.values())
        parts["logits"] = widen(parts["logits"], labels, widest)
    joined = {name: join(values, rows) for name, values in parts.items()}
    if _all_tensors(parts.get("loss")):
        is_counted = batch_items is not None and not torch.is_floating_point(inputs["labels"])
        joined["loss"] = join_losses(parts["loss"], counts, batch_items if is_counted else sum(counts))
    joined_output: Any = type(outputs[0])(**joined)
    return joined_output if as_dict else joined_output.to_tuple()


def _all_tensors(values: list[Any] | None) -> bool:
    return values is not None and all(isinstance(value, Tensor) for value in values)


def generate(model: Any, emr_task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Generation with a task for every row, each with its task's settings.

    Args:
        model: the merged model; on the task that it was on again afterwards.
        emr_task: see [`names_of`].
        args, kwargs: of the wrapped model's `generate`.

    Returns:
        the sequences in row order, `(rows x num_return_sequences, tokens)`, filled up on the right with
        `pad_token_id`, or the first `eos_token_id` where there is none.
    """
    wrapped = model.model
    inputs = named_arguments(wrapped.generate, args, kwargs)
    size = count_rows(inputs, ("inputs", wrapped.main_input_name))
    groups = group_rows(names_of(emr_task, model.config, size), _active(model))
    _check_inputs(inputs)
    given = inputs.get("generation_config")
    if inputs.get("streamer") is not None:
        raise OptionError("a streamer with a task for every row: tasks generate one after the other, not side by side")
    if _setting("return_dict_in_generate", inputs, given or wrapped.generation_config):
        raise OptionError("return_dict_in_generate with a task for every row: only the sequences can be joined")
    inputs["return_dict_in_generate"] = False
    allowed = inputs.get("prefix_allowed_tokens_fn")
    settings = vars(GenerationConfig())
    by_row = {name: value for name, value in inputs.items() if name not in settings}

    def run(rows: list[int]) -> tuple[Tensor, Any]:
        part = {**inputs, **take_inputs(by_row, rows, size)}
        if allowed is not None:  # it is asked by row
            part["prefix_allowed_tokens_fn"] = lambda row, tokens: allowed(rows[row], tokens)
        return wrapped.generate(**part), _fill_token(inputs, given or wrapped.generation_config)

    sequences, fill = zip(*model._by_task(groups, run))
    return join_sequences(sequences, list(groups.values()), fill)


def _setting(name: str, inputs: Mapping[str, Any], config: Any) -> Any:
    """What `generate` goes by: an argument, or else a configuration's field."""
    value = inputs.get(name)
    return getattr(config, name, None) if value is None else value


def _fill_token(inputs: Mapping[str, Any], config: Any) -> Any:
    pad, eos = (_setting(name, inputs, config) for name in ("pad_token_id", "eos_token_id"))
    eos = eos.reshape(-1).tolist() if isinstance(eos, Tensor) else eos
    return pad if pad is not None else eos[0] if isinstance(eos, (list, tuple)) else eos


def join_sequences(sequences: Sequence[Tensor], rows: Sequence[list[int]], fill: Sequence[int | None]) -> Tensor:
    """Generated tokens of all groups, in row order, as long as the longest.

    Args:
        sequences: each group's, `(rows x k, tokens)`, the k of a row one after the other.
        rows: each group's rows.
        fill: each group's token to fill up with.

    Raises:
        OptionError: lengths differ, and there is no such token.
    """
    longest = max(tokens.shape[1] for tokens in sequences)
    by_row: dict[int, Tensor] = {}
    for tokens, group, token in zip(sequences, rows, fill):
        if tokens.shape[1] < longest:
            if token is None:
                raise OptionError("generated sequences differ in length: pass a pad_token_id to fill them up with")
            tokens = F.pad(tokens, (0, longest - tokens.shape[1]), value=int(token))
        by_row.update(zip(group, tokens.split(len(tokens) // max(len(group), 1))))
    return torch.cat([by_row[row] for row in sorted(by_row)]) if by_row else sequences[0]
