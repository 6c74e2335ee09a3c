"""An adapter together with its base: which model it was trained on, and what it makes of it."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from copy import deepcopy
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..checkpoint import build_skeleton, is_head
from ..errors import CheckpointError, MismatchError, one_line, short
from ..format import PEFT_TYPE
from ..sources import (
    HUB_ERRORS,
    Adapter,
    Reference,
    Source,
    as_folder,
    commit_of,
    hub_snapshot,
    open_source,
    read_config,
)
from ..storage import MODEL_WEIGHTS
from .layers import require_peft

SUPPORTED = ("LORA", "IA3")

# Initialisations that replace the base's weights by what is left of them: the adapter alone does not tell the task.
_CHANGES_BASE = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
# Fields of LoraConfig that make more of a model than a weight can hold, or another model.
_NO_WEIGHT = {
    "kasa_config": "KaSA, which changes the base",
    "layer_replication": "layer replication, which changes the base",
    "alora_invocation_tokens": "activated LoRA, which depends on the input",
    "arrow_config": "Arrow routing, which depends on the input",
    "megatron_config": "layers of Megatron, which no model of transformers has",
}
TASK_TYPES = {
    "SequenceClassification": "SEQ_CLS",
    "CausalLM": "CAUSAL_LM",
    "Seq2SeqLM": "SEQ_2_SEQ_LM",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}
"""`X` of `AutoModelForX` -> PEFT's name for it."""
_AUTO_CLASSES = {name: f"AutoModelFor{suffix}" for suffix, name in TASK_TYPES.items()}
_AUTO_CLASSES["FEATURE_EXTRACTION"] = "AutoModel"
PREFIX = "base_model.model."


def check_kind(adapter: Adapter) -> None:
    """Raise CheckpointError unless the adapter is of a kind that can be merged into weights."""
    label, settings = adapter.label, adapter.settings
    if adapter.peft_type == PEFT_TYPE:
        raise CheckpointError(f"{label}: {adapter.name} is a merge already: give the adapters it was made of")
    if adapter.peft_type not in SUPPORTED:
        raise CheckpointError(
            f"{label}: {adapter.name} is a PEFT adapter of type {one_line(adapter.peft_type)}: expected one of "
            f"{', '.join(SUPPORTED)}"
        )
    start = settings.get("init_lora_weights")
    for prefix, name in _CHANGES_BASE.items():
        if isinstance(start, str) and start.lower().startswith(prefix):
            raise CheckpointError(
                f"{label}: {adapter.name} was initialised by {name}, which changes the base: save it as an ordinary "
                "LoRA (save_pretrained with path_initial_model_for_weight_conversion) and merge that"
            )
    for field, what in _NO_WEIGHT.items():
        if settings.get(field):
            raise CheckpointError(f"{label}: {adapter.name} uses {what}: it cannot be merged")


def base_reference(adapters: Sequence[Adapter]) -> Reference:
    """The base that the adapters name, for a recipe that names none.

    Raises:
        MismatchError: they name different ones.
        CheckpointError: none names one.
    """
    named = [adapter for adapter in adapters if adapter.base]
    if not named:
        adapter = adapters[0]
        raise CheckpointError(f"{adapter.label}: {adapter.name} does not name its base: give base in the recipe")
    first = next((adapter for adapter in named if adapter.base_revision), named[0])
    for other in named:
        if _hub_id(str(other.base)) != _hub_id(str(first.base)):
            raise MismatchError(
                f"{other.label}: was trained on {one_line(_base_of(other))}, {first.label} on "
                f"{one_line(_base_of(first))}: all adapters must have one base; if these are one, give it in the "
                "recipe"
            )
    return _base_of(first)  # revisions are compared when the base is known


def _hub_id(name: str) -> str:
    snapshot = hub_snapshot(name)
    return snapshot[0] if snapshot else name


def _base_of(adapter: Adapter) -> str:
    revision = adapter.base_revision
    return f"{adapter.base}@{revision}" if revision and as_folder(str(adapter.base)) is None else str(adapter.base)


def bind(adapter: Adapter, base: Source) -> Source:
    """The finetune that an adapter makes of its base: with the base's configuration, class and labels.

    Raises:
        CheckpointError: a kind of adapter that cannot be merged.
        MismatchError: another base, or another revision of it.
    """
    require_peft()
    check_kind(adapter)
    _check_base(adapter, base)
    config = deepcopy(base.config)
    config.architectures = [_architecture(adapter, base)]
    source = Source(
        adapter.label,
        adapter.name,
        config,
        adapter.storage,
        adapter.revision,
        adapter.folder,
        adapter=adapter,
        base=base,
    )
    _apply_labels(source)
    return source


def _check_base(adapter: Adapter, base: Source) -> None:
    if adapter.base is None:
        return
    if not _same_model(adapter.base, base):
        raise MismatchError(
            f"{adapter.label}: was trained on {one_line(adapter.base)}, the base is {base.name}: give the base that "
            "it was trained on, or correct base_model_name_or_path in its adapter_config.json if that is the same "
            "model"
        )
    if adapter.base_revision is None or base.revision is None or adapter.base_revision == base.revision:
        return
    try:
        commit = commit_of(base.name, adapter.base_revision)
    except HUB_ERRORS as error:
        raise CheckpointError(
            f"{adapter.label}: cannot look up revision {one_line(adapter.base_revision)} of {base.name}: "
            f"{one_line(error)}"
        ) from None
    if commit != base.revision:
        raise MismatchError(
            f"{adapter.label}: was trained on revision {one_line(adapter.base_revision)} of {base.name}, the base is "
            f"revision {base.revision}: give the base as {base.name}@{one_line(adapter.base_revision)}"
        )


def _same_model(named: str, base: Source) -> bool:
    """Whether a name and a source are one model: by folder or content where both are here, else by name."""
    folder, named = as_folder(named), _hub_id(named)
    if folder is not None and base.folder is not None:
        if folder.resolve() == base.folder.resolve() or _same_weights(folder, base.folder):
            return True
        return base.revision is not None and named == base.name
    if base.revision is not None and "/" in named and not Path(named).is_absolute():
        return named == base.name
    return Path(named).name == Path(base.name).name


def _same_weights(one: Path, other: Path) -> bool:
    files = [name for name in MODEL_WEIGHTS if isfile(one / name) or isfile(other / name)]
    return bool(files) and not any(filecmp.cmpfiles(one, other, files, shallow=False)[1:])


def _architecture(adapter: Adapter, base: Source) -> str:
    """Name of the class that the adapter was trained on."""
    task_type = adapter.settings.get("task_type")
    mapped = adapter.settings.get("auto_mapping")
    mapped = mapped.get("base_model_class") if isinstance(mapped, dict) else None
    if task_type is None:
        named = mapped if isinstance(mapped, str) and mapped else base.architecture
        if not named:
            raise MismatchError(f"{adapter.label}: neither {adapter.name} nor {base.name} names a model class")
        return named
    known = _AUTO_CLASSES.get(task_type, "") if isinstance(task_type, str) else ""
    auto_class = getattr(transformers, known, None)
    mapping: Mapping[Any, Any] = auto_class._model_mapping if auto_class else {}
    if type(base.config) not in mapping:
        raise MismatchError(
            f"{adapter.label}: {adapter.name} is for task type {short(task_type)}, for which "
            f"{base.config.model_type} has no class"
        )
    model_class = mapping[type(base.config)]
    return (model_class[0] if isinstance(model_class, tuple) else model_class).__name__


def _apply_labels(source: Source) -> None:
    """Labels from a config.json beside the adapter; without one, only their number is known, by the head's size."""
    assert source.adapter is not None
    count = _label_count(source)
    if source.folder is not None and (source.folder / CONFIG_NAME).is_file():
        saved: PreTrainedConfig = read_config(source.label, source.folder, source.storage)
        if count is not None and saved.num_labels != count:
            raise MismatchError(
                f"{source.label}: its head has {count} labels, its {CONFIG_NAME} names {saved.num_labels}: correct it"
            )
        source.config.id2label, source.config.label2id = saved.id2label, saved.label2id
        source.config.problem_type = saved.problem_type
    elif count is not None and count != source.config.num_labels:
        source.config.num_labels = count


def _label_count(source: Source) -> int | None:
    """Labels of the head that an adapter brings, `None` if it brings none."""
    skeleton = build_skeleton(source, torch.float32)
    known = skeleton.config.num_labels
    counts = set()
    for name, parameter in skeleton.named_parameters():
        info = source.storage.infos.get(f"{PREFIX}{name}")
        if info is not None and info.shape and parameter.shape[0] == known and is_head(skeleton, name):
            counts.add(info.shape[0])
    if len(counts) > 1:
        raise CheckpointError(f"{source.label}: its head has tensors for {sorted(counts)} labels: expected one number")
    return counts.pop() if counts else None


def open_base(adapters: Sequence[Adapter]) -> Source:
    """Open the base that the adapters name."""
    return open_source(base_reference(adapters), "base")
