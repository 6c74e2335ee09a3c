"""The format of a merged repo (docs/format.md) as code: names, versions, and which tensors there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from . import lowbit
from .bits import packed_size
from .election import TAU_DTYPES
from .storage import TensorInfo

FORMAT_VERSION = 3
MODEL_TYPE = "emr_merged"
PEFT_TYPE = "EMR"
LAYOUTS = ("model", "peft")
"""A model with its base, or an adapter for a base kept elsewhere."""


def flat_name(name: str) -> str:
    """A parameter's name as one buffer's: dots would make it a module's path."""
    return name.replace(".", "__")


def model_name(name: str) -> str:
    """Where the base's tensor stands in a repo."""
    return f"model.{name}"


def tau_name(name: str) -> str:
    """Where its part of the unified vector stands."""
    return f"emr.tau.{flat_name(name)}"


def scale_name(name: str) -> str:
    """Where the scales of its rows stand, if the vector is in codes."""
    return f"emr.scale.{flat_name(name)}"


def mask_name(key: str, name: str) -> str:
    """Where a task's mask of it stands."""
    return f"emr.mask.{key}.{flat_name(name)}"


def private_name(key: str, name: str) -> str:
    """Where a task's own tensor stands."""
    return f"emr.private.{key}.{flat_name(name)}"


def rescaler_name(key: str) -> str:
    """Where a task's lambda stands."""
    return f"emr.rescaler.{key}"


# The bank's place in a model that PEFT has put it into, and that in PEFT's file, which leaves out the adapter's name.
PEFT_MODULE, PEFT_BANKS = "emr", "emr_bank"
PEFT_PREFIX = f"base_model.model.{PEFT_MODULE}.{PEFT_BANKS}."


def stored_name(name: str, layout: str) -> str:
    """Name in the file of what is called `name` in a repo with a base."""
    return name if layout == "model" else PEFT_PREFIX + name.removeprefix("emr.")


PARTS = ("base", "tau", "scale", "mask", "private", "rescaler")


def part_of(name: str) -> str:
    """Which of `PARTS` a tensor of a repo belongs to."""
    return "base" if name.startswith("model.") else name.split(".")[1]


def tensors_of(
    base: Mapping[str, TensorInfo],
    merged: Sequence[str],
    private: Mapping[str, Mapping[str, TensorInfo]],
    tau_dtype: str,
    layout: str,
) -> dict[str, TensorInfo]:
    """Name, shape and dtype of every tensor of a merged repo: base first, then the vector, then task by task.

    Args:
        base: tensors of the base in the repo; with the layout `"peft"` only the merged ones count, by their shapes.
        merged: names of the merged ones among them.
        private: task's key -> its own tensors.
        tau_dtype: what the unified vector is stored in.
        layout: one of `LAYOUTS`.
    """
    tensors = {model_name(name): info for name, info in base.items()} if layout == "model" else {}
    for name in merged:
        shape = base[name].shape
        if lowbit.is_packed(tau_dtype, shape):
            tensors[tau_name(name)], tensors[scale_name(name)] = lowbit.infos(tau_dtype, shape)
        else:
            tensors[tau_name(name)] = TensorInfo(shape, TAU_DTYPES.get(tau_dtype, torch.float32))
    for key, own in private.items():
        tensors |= {mask_name(key, name): TensorInfo((packed_size(base[name].numel),), torch.uint8) for name in merged}
        tensors |= {private_name(key, name): info for name, info in own.items()}
        tensors[rescaler_name(key)] = TensorInfo((), torch.float32)
    return tensors
