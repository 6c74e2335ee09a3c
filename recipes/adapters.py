"""Train PEFT adapters of MiniLM on the text tasks into the cache: what `lora.py` and `ia3.py` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import build_once, cache_root
from registry import MINILM, fetch
from text import make_exam, train_classifier, training_settings
from text_data import ALL_TASKS, TASKS, TextTask
from training import SEED, Workbench, seeded
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Kind:
    """A kind of adapter and how it is trained.

    Args:
        name: of its folder in the cache and of its recipe.
        learning_rate: far above a full finetune's, as is usual for adapters.
        epochs: passes over the rows.
        settings: task -> fields of PEFT's configuration, but for the task type.
    """

    name: str
    learning_rate: float
    epochs: int
    settings: dict[str, dict[str, Any]]

    def config(self, task: str) -> PeftConfig:
        """Return the configuration of the adapter for `task`; its type has PEFT save the head too."""
        from peft import IA3Config, LoraConfig

        config_class = {"lora": LoraConfig, "ia3": IA3Config}[self.name]
        return config_class(task_type="SEQ_CLS", **self.settings[task])


def _lora(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["query", "key", "value", "dense"]}


_IA3 = {
    "target_modules": ["key", "value", "intermediate.dense", "output.dense"],
    "feedforward_modules": ["output.dense"],
}

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "lora",
            learning_rate=1e-3,
            epochs=3,
            settings={
                "newsgroups": _lora(16),
                "reuters": _lora(16),
                "tweets": _lora(4),
                "polarity": _lora(4),
                "bbc": _lora(4),
                "hedging": _lora(4),
                "spam": _lora(4),
                "supersense": _lora(16),
            },
        ),
        Kind("ia3", learning_rate=1e-2, epochs=3, settings=dict.fromkeys(ALL_TASKS, _IA3)),
    )
}
"""LoRA of two ranks, and (IA)³."""


def adapters_folder(kind: Kind, quick: bool = False, seed: int = SEED) -> Path:
    """Return the folder with one adapter per task."""
    return cache_root() / "models" / seeded("adapters-quick" if quick else "adapters", seed) / kind.name


def adapter_settings(kind: Kind, task: TextTask, quick: bool = False, seed: int = SEED) -> dict[str, Any]:
    """Return everything the adapter depends on, as JSON values."""
    changes = {"epochs": kind.epochs, "learning_rate": kind.learning_rate, "seed": seed}
    return training_settings(task, quick, adapter={"kind": kind.name, **kind.settings[task.name]}, **changes)


def train_adapter(kind: Kind, task: TextTask, quick: bool = False, seed: int = SEED) -> Path:
    """Return the folder of the adapter trained on `task`, training it the first time."""
    settings = adapter_settings(kind, task, quick, seed)
    folder = adapters_folder(kind, quick, seed) / task.name
    return build_once(folder, settings, lambda fresh: _train(kind, task, settings, fresh))


def _train(kind: Kind, task: TextTask, settings: dict[str, Any], folder: Path) -> None:
    from peft import get_peft_model

    model = train_classifier(task, settings, folder, lambda model: get_peft_model(model, kind.config(task.name)))
    model.config.save_pretrained(folder)  # an adapter has no place for the labels' names


def load_adapter(folder: Path) -> PreTrainedModel:
    """Return MiniLM with an adapter of [`train_adapter`]."""
    from peft import PeftModel

    config = AutoConfig.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(fetch(MINILM), config=config)
    return PeftModel.from_pretrained(base, folder)


def load(folder: Path) -> PreTrainedModel:
    """Return the model in a folder, an adapter's or a merged repo's."""
    is_adapter = (folder / "adapter_config.json").is_file()
    return load_adapter(folder) if is_adapter else AutoModelForSequenceClassification.from_pretrained(folder)


def workbench(kind: str, about: str) -> Workbench:
    """Return the command line of a kind's recipe."""
    return Workbench(
        about=about,
        tasks=list(TASKS),
        finetune=lambda name, quick: train_adapter(KINDS[kind], TASKS[name], quick),
        measure=lambda name, model: f"{make_exam(TASKS[name]).accuracy(model):.1%}",
        load=load,
    )
