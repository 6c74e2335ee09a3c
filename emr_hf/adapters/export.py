"""A merge, or one of its tasks, as adapters that stock PEFT loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from .. import bits
from ..configuration import EMRConfig
from ..heads import WRAPPER
from ..repo import ADAPTERS_FOLDER, mask_name, open_repo, private_name, rescaler_name, tau_name
from ..storage import Storage
from .binding import PREFIX, TASK_TYPES
from .layers import ADAPTER, require_peft


def save_adapters(folder: Path, config: EMRConfig, base: tuple[str, str | None]) -> None:
    """Write the settings of a merge that is an adapter; of (IA)³ adapters, one ordinary adapter a task beside it.

    Args:
        folder: where the tensors are written already.
        config: the merge's.
        base: where the base is, and its revision.
    """
    require_peft()
    from .tuner import EMRPeftConfig

    settings: dict[str, Any] = {
        "base_model_name_or_path": base[0],
        "revision": base[1],
        "task_type": task_type(config),
    }
    EMRPeftConfig(emr=config.to_dict(), inference_mode=True, **settings).save_pretrained(str(folder))
    if config.vectors is not None:
        storage = open_repo(folder)
        for task in config.tasks:
            write_ia3(config, storage, task, folder / ADAPTERS_FOLDER / adapter_folder(config, task), settings)


def task_type(config: EMRConfig) -> str | None:
    """PEFT's name for what the wrapped model is for, `None` where it has none."""
    suffix = str((config.architectures or [WRAPPER])[0]).removeprefix(f"{WRAPPER}For")
    return TASK_TYPES.get(suffix)


def adapter_folder(config: EMRConfig, task: str) -> str:
    """A task's name where it can be a folder's, else its key."""
    return task if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", task) else str(config.entry(task)["key"])


@torch.no_grad()
def write_ia3(config: EMRConfig, storage: Storage, task: str, folder: Path, settings: dict[str, Any]) -> None:
    """Write one task of a merge of vectors as an ordinary (IA)³ adapter, `l = 1 + lambda M tau`.

    Args:
        config: the merge's.
        storage: its tensors.
        task: one of its tasks.
        folder: where to.
        settings: fields of `adapter_config.json` that the merge knows better than the task's adapter.
    """
    entry = config.entry(task)
    key, own = entry["key"], entry["adapter"]
    rescaler = storage.read(rescaler_name(key))
    tensors = {}
    for name in config.merged_parameters or []:
        tau, packed = storage.read(tau_name(name)), storage.read(mask_name(key, name))
        vector = bits.rebuild(torch.ones(tau.shape), tau, packed, rescaler)
        if name in entry["vectors"]:
            tensors[PREFIX + name.removesuffix(f".{ADAPTER}")] = vector
    for name in entry["private"]:
        tensors[PREFIX + name] = storage.read(private_name(key, name))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps({**own, **settings, "inference_mode": True}, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
