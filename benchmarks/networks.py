"""Small networks of `fidelity.py`: trained here, into the cache, with a short loop."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))

from cache import RECORD, build_once, cache_root  # noqa: E402
from domain import Data, Domain, Task  # noqa: E402
from training import seeded  # noqa: E402

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Training:
    """How a small network is trained: AdamW, the rate rising over the first tenth and falling along a cosine.

    Args:
        shift: pixels by which pictures are moved at random in each direction, at most.
    """

    steps: int
    batch: int
    rate: float
    weight_decay: float = 0.05
    shift: int = 0


@dataclass(frozen=True)
class SmallTask:
    """A task of a small network: number of labels, what its rows depend on, as JSON values, and the rows."""

    labels: int
    source: Mapping[str, Any]
    read: Callable[[], Data]


@dataclass(frozen=True)
class Network:
    """A small network to finetune.

    Args:
        name: of its folder in the cache.
        config: its shape.
        auto: Auto class.
        training: of a finetune.
        pretraining, pretrained_on: of the base; `None` for one of random weights.
        adapter: what is trained in place of all weights.
    """

    name: str
    config: PreTrainedConfig
    auto: Any
    training: Training
    pretraining: Training | None = None
    pretrained_on: SmallTask | None = None
    adapter: PeftConfig | None = None

    def folder(self, seed: int) -> Path:
        return cache_root() / "models" / seeded(self.name, seed)

    def shape(self) -> dict[str, Any]:
        # Without the version: an update of transformers is no reason to train again.
        return {key: value for key, value in self.config.to_diff_dict().items() if key != "transformers_version"}


def base_of(network: Network) -> Path:
    """Return the folder of the pretrained network, without head, training it the first time."""
    settings = {"network": network.shape(), "seed": 0}
    if network.pretrained_on is not None:
        settings |= {"training": vars(network.pretraining), "data": dict(network.pretrained_on.source)}

    def build(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = type(network.config)(**network.config.to_diff_dict())
            config.num_labels = network.pretrained_on.labels if network.pretrained_on else 2
            model = network.auto.from_config(config)
            if network.pretrained_on is not None:
                data = network.pretrained_on.read()
                print(f"pretraining {network.name} on {len(data.train)} items", file=sys.stderr, flush=True)
                fit(model, data, network.pretraining)
        model.base_model.save_pretrained(folder)

    return build_once(network.folder(0) / "base", settings, build)


def small_domain(network: Network, name: str, seed: int, tasks: Mapping[str, SmallTask]) -> Domain:
    """Return the finetunes of a small network, training those that the cache lacks."""
    base = base_of(network)
    base_record = (base / RECORD).read_text()
    made = {}
    for index, (task, small) in enumerate(tasks.items()):
        settings = {
            "base": hashlib.sha256(base_record.encode()).hexdigest(),
            "training": vars(network.training),
            "adapter": network.adapter and str(network.adapter.peft_type.value),
            "data": dict(small.source),
            "labels": small.labels,
            "seed": 1000 * seed + index,
        }
        folder = build_once(
            network.folder(seed) / task,
            settings,
            lambda fresh, s=settings, t=small: _finetune(network, base, t, s, fresh),
        )
        made[task] = Task(folder, settings, small.read)
    adapter = network.adapter and str(network.adapter.peft_type.value).lower()
    return Domain(name, seed, base, made, network.auto, adapter=adapter)


def _finetune(network: Network, base: Path, task: SmallTask, settings: Mapping[str, Any], folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        model = network.auto.from_pretrained(base, num_labels=task.labels)
        if network.adapter is not None:
            from peft import get_peft_model

            model = get_peft_model(model, network.adapter)
        data = task.read()
        print(f"finetuning {network.name} on {folder.name}: {len(data.train)} items", file=sys.stderr, flush=True)
        fit(model, data, network.training)
    model.save_pretrained(folder)
    model.config.save_pretrained(folder)  # an adapter has no place for the number of labels


def fit(model: PreTrainedModel, data: Data, training: Training) -> None:
    """Train a model, in random order drawn from torch's generator."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.rate, total_steps=training.steps, pct_start=0.1)
    order = itertools.chain.from_iterable(torch.randperm(len(data.train)).tolist() for _ in itertools.count())
    model.train()
    for _ in range(training.steps):
        batch = dict(data.collate([data.train[row] for row in itertools.islice(order, training.batch)]))
        if training.shift:
            batch["pixel_values"] = shifted(batch["pixel_values"], training.shift)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def shifted(images: Tensor, most: int) -> Tensor:
    """Return images, (n, channels, height, width), each moved at random; what leaves one side enters the other."""
    moves = torch.randint(-most, most + 1, (len(images), 2)).tolist()
    return torch.stack([image.roll(move, dims=(1, 2)) for image, move in zip(images, moves)])
