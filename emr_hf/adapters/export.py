"""A merge, or one of its tasks, as adapters that stock PEFT loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from .. import bits
from ..configuration import EMRConfig
from ..format import mask_name, private_name, rescaler_name, tau_name
from ..heads import WRAPPER
from ..repo import ADAPTERS_FOLDER, open_repo
from ..storage import Storage
from .binding import PREFIX, TASK_TYPES
from .ia3 import VECTOR
from .layers import ADAPTER, plain_name, require_peft

_PLAIN_TASK_TYPES = ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM")


def save_adapters(folder: Path, config: EMRConfig, base: tuple[str, str | None]) -> None:
    """Write the settings of a merge that is an adapter; of (IA)³ adapters, one ordinary adapter a task beside it.

    Args:
        folder: where the tensors are written already.
        config: the merge's.
        base: where the base is, and its revision.
    """
    require_peft()
    from .tuner import EMRPeftConfig

    settings = base_settings(config, base)
    if settings["task_type"] not in _PLAIN_TASK_TYPES:
        settings["task_type"] = None  # PEFT's classes for the others want modules to save
    EMRPeftConfig(emr=config.to_dict(), inference_mode=True, **settings).save_pretrained(str(folder))
    if config.vectors is not None:
        storage, folders = open_repo(folder), adapter_folders(config.tasks)
        for task in config.tasks:
            write_ia3(config, storage, task, folder / ADAPTERS_FOLDER / folders[task], base)


def base_settings(config: EMRConfig, base: tuple[str, str | None]) -> dict[str, Any]:
    """What every `adapter_config.json` says of base and task."""
    return {"base_model_name_or_path": base[0], "revision": base[1], "task_type": task_type(config)}


def task_type(config: EMRConfig) -> str | None:
    """PEFT's name for what the wrapped model is for, `None` where it has none."""
    suffix = str((config.architectures or [WRAPPER])[0]).removeprefix(f"{WRAPPER}For")
    return TASK_TYPES.get(suffix)


def adapter_folders(tasks: Iterable[str]) -> dict[str, str]:
    """Task -> folder of its adapter: its name where that can be one and lies in no other's, else a number."""
    folders: dict[str, str] = {}
    reserved = {ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME}
    names = [task for task in tasks if len(task) < 100 and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", task)]
    for index, task in enumerate(tasks):
        inside = any(task != other and task.startswith(f"{other}/") for other in names)
        usable = task in names and not inside and not reserved & set(task.split("/"))
        folders[task] = task if usable else f"task-{index}"
        while folders[task] in [*names, *list(folders.values())[:-1]] and not usable:
            folders[task] += "_"
    return folders


@torch.no_grad()
def write_ia3(config: EMRConfig, storage: Storage, task: str, folder: Path, base: tuple[str, str | None]) -> None:
    """Write one task of a merge of vectors as an ordinary (IA)³ adapter, `l = 1 + lambda M tau`.

    Args:
        config: the merge's.
        storage: its tensors.
        task: one of its tasks.
        folder: where to.
        base: where the base is, and its revision.
    """
    entry = config.entry(task)
    key, own = entry["key"], entry["adapter"]
    rescaler = storage.read(rescaler_name(key))
    tensors = {}
    for name in config.merged_parameters or []:
        if name in entry["vectors"]:
            tau, packed = storage.read(tau_name(name)), storage.read(mask_name(key, name))
            tensors[_peft_name(name)] = bits.rebuild(torch.ones(tau.shape), tau, packed, rescaler)
    for name in entry["private"]:
        if VECTOR not in name or name in entry["vectors"]:
            tensors[_peft_name(name)] = storage.read(private_name(key, name))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps({**own, **base_settings(config, base), "inference_mode": True}, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def _peft_name(name: str) -> str:
    return PREFIX + plain_name(name.removesuffix(f".{ADAPTER}"))
