"""Whether alignment helps to merge models that share no initialisation, what to merge them by, and what it costs.

    python benchmarks/alignment.py [--architectures vit] [--seeds 0 1 2] [--cache DIR] [--figure FILE.svg]

Three parts, each a Markdown table or more:

* two: two models, each trained on half of a data set's classes (`halves.py`), merged into one with a head for each
  half: the average of both as they are, aligned in several ways, and with units merged many to one;
* emr: EMR-Merging of two and of four such models, with several tensors in place of the base they do not have;
* cost: seconds that an alignment takes, against the width of a ViT.

Where a model has BatchNorm, its statistics are estimated anew on unlabelled training images after every merge into
one set of weights, the average of unaligned models included. Under EMR they stay each task's own, as in `emr_hf`.

Every finished row is kept in the cache, timings too, and an interrupted run goes on from there: after a change of the
library remove `results/` from it. Models that the cache lacks are trained, some minutes each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from halves import (
    ARCHITECTURES,
    CLASSES,
    HALVES,
    TWO_HALVES,
    load_half,
    logits,
    trained,
    training_settings,
    unlabelled,
)
from measuring import circumstances, machine_line, write_json
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTConfig
from transformers.utils import logging

import emr_hf
from emr_hf.alignment.aligning import private_tensors
from emr_hf.report import markdown_table

sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))

from cache import build_once, cache_root  # noqa: E402

HEAD = "^classifier"
"""The parameters that stay each half's own."""
IMAGES = 1024
"""Unlabelled, of all halves together: to align by, and to estimate BatchNorm on."""

Models = Mapping[str, nn.Module]
"""Half -> the model that answers for it."""


@dataclass(frozen=True)
class Case:
    """Trained models to merge, one for each half.

    Args:
        architecture: a key of `ARCHITECTURES`.
        seed: of the training, the choice of unlabelled images, and the alignment.
        halves: keys of `HALVES`.
        cache: where data, models and results are kept.
        quick: models and images are few: a smoke test.
    """

    architecture: str
    seed: int
    halves: tuple[str, ...]
    cache: Path
    quick: bool = False

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        return {half: trained(self.architecture, half, self.seed, self.cache, self.quick) for half in self.halves}

    @cached_property
    def data(self) -> list[Tensor]:
        return unlabelled(self.images, self.seed, self.halves, cache=self.cache)

    @property
    def images(self) -> int:
        return 256 if self.quick else IMAGES

    @cached_property
    def private(self) -> frozenset[str]:
        return private_tensors(list(self.models.values()), HEAD)

    def aligned(self, **options: Any) -> tuple[Models, float]:
        """Return the models with their units in the first one's order, and the weight of the weights' similarity."""
        plan = emr_hf.align(*self.models.values(), data=self.data, private=HEAD, seed=self.seed, **options)
        return {half: plan.apply(m, i) for i, (half, m) in enumerate(self.models.items())}, plan.weight

    def averaged(self, models: Models) -> Models:
        return emr_hf.average(models, data=self.data, private=self.private)

    @cached_property
    def half_and_half(self) -> Models:
        """The models aligned at weight 0.5: what several rows start from."""
        return self.aligned(weight=0.5)[0]


@dataclass(frozen=True)
class Merged:
    """The models of a row; `weight` where the alignment chose it by itself."""

    models: Models
    weight: float | None = None


ALIGNMENTS: dict[str, dict[str, Any]] = {
    "git re-basin": {"method": "git-rebasin"},
    "weights alone (1)": {"weight": 1.0},
    "activations alone (0)": {"method": "activations"},
    **{f"MuDSC {weight}": {"weight": weight} for weight in (0.3, 0.5, 0.7, 0.9)},
    "MuDSC auto": {"weight": "auto"},
}
"""Row -> how `emr_hf.align` is called; the number is the share of the weights' similarity."""
ZIPS = {f"zip {weight:g}": weight for weight in (0.0, 0.5, 1.0)}


def average_row(options: Mapping[str, Any]) -> Callable[[Case], Merged]:
    def merge(case: Case) -> Merged:
        models, weight = case.aligned(**options)
        return Merged(case.averaged(models), weight if options.get("weight") == "auto" else None)

    return merge


def zip_row(weight: float) -> Callable[[Case], Merged]:
    def merge(case: Case) -> Merged:
        pair = emr_hf.zip_models(
            *case.models.values(),
            data=case.data,
            weight=weight,
            private=HEAD,
            seed=case.seed,
            example=case.data[0][:2],
        )
        return Merged(dict(zip(case.models, pair)))

    return merge


TWO: dict[str, Callable[[Case], Merged]] = {
    "individual": lambda case: Merged(case.models),
    "average, not aligned": lambda case: Merged(case.averaged(case.models)),
    **{name: average_row(options) for name, options in ALIGNMENTS.items()},
    **{name: zip_row(weight) for name, weight in ZIPS.items()},
}
"""Row of the first part -> how it is made."""

REFERENCE = "MuDSC 0.5"
"""The library's default, which the other rows are compared with."""

STAND_INS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda values: values.mean(0),
    "first model": lambda values: values[0],
    "median": lambda values: values.median(0).values,  # of an even number the lower of the two in the middle
}
"""What stands for W0, from the models' values, (N, *shape)."""


def emr_models(models: Models, private: frozenset[str], stand_in: Callable[[Tensor], Tensor]) -> Models:
    """Return each task's model rebuilt from an EMR merge, `W0 + lambda_t M_t tau`.

    Heads and all buffers, BatchNorm's statistics among them, stay the task's own.
    """
    states = {
        half: {name: value.detach() for name, value in model.named_parameters() if name not in private}
        for half, model in models.items()
    }
    names = next(iter(states.values()))
    base = {name: stand_in(torch.stack([state[name] for state in states.values()])) for name in names}
    merge = emr_hf.merge_state_dicts(base, states)
    rebuilt = {}
    for half, model in models.items():
        rebuilt[half] = deepcopy(model)
        parameters = dict(rebuilt[half].named_parameters())
        with torch.no_grad():
            for name, tau in merge.tau.items():
                parameters[name].copy_(base[name] + merge.rescalers[half] * merge.masks[half][name] * tau)
    return rebuilt


def emr_row(stand_in: Callable[[Tensor], Tensor], aligned: bool) -> Callable[[Case], Merged]:
    def merge(case: Case) -> Merged:
        return Merged(emr_models(case.half_and_half if aligned else case.models, case.private, stand_in))

    return merge


EMR: dict[str, Callable[[Case], Merged]] = {
    "individual": lambda case: Merged(case.models),
    "average, not aligned": lambda case: Merged(case.averaged(case.models)),
    "average, aligned": lambda case: Merged(case.averaged(case.half_and_half)),
    **{
        f"EMR, W0 = {name}, {'' if aligned else 'not '}aligned": emr_row(stand_in, aligned)
        for name, stand_in in STAND_INS.items()
        for aligned in (False, True)
    },
}
"""Row of the second part -> how it is made."""

MIDDLE = {"EMR, W0 = middle, not aligned": emr_row(lambda values: values.quantile(0.5, dim=0), aligned=False)}
"""A row of four models alone: the mean of the two values in the middle, which of two models is their mean."""


def exam(models: Models, case: Case) -> dict[str, Any]:
    """Return the accuracy on each half's test images with its own head; of two halves also the joint one.

    For that all heads' logits are put side by side, as in `halves.joint_accuracy`.
    """
    pair = len(models) == 2
    own, joint = {}, []
    for index, (half, model) in enumerate(models.items()):
        images, labels = (part[: case.images if case.quick else None] for part in load_half(half, "test", case.cache))
        answers = {name: logits(each, images) for name, each in models.items() if pair or each is model}
        own[half] = _share(answers[half].argmax(-1) == labels)
        joint.append(_share(torch.cat([*answers.values()], -1).argmax(-1) == labels + index * CLASSES))
    return {"own": own, "joint": statistics.mean(joint) if pair else None}


def _share(right: Tensor) -> float:
    return right.double().mean().item()


def measured(case: Case, row: str, merge: Callable[[Case], Merged]) -> dict[str, Any]:
    """Return a row's accuracies, from the cache if they are there."""
    models = [training_settings(case.architecture, half, case.seed, case.quick) for half in case.halves]
    settings = {"row": row, "images": case.images, "models": models}
    name = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in row)
    place = Path("quick" if case.quick else "full", case.architecture, f"{len(case.halves)}-seed{case.seed}", name)

    def build(folder: Path) -> None:
        started = time.perf_counter()
        merged = merge(case)
        took = time.perf_counter() - started
        result = {**exam(merged.models, case), "weight": merged.weight, "seconds": took}
        print(f"{place}: {statistics.mean(result['own'].values()):.4f}, {took:.1f} s", file=sys.stderr, flush=True)
        write_json(folder / "result.json", result)

    folder = build_once(case.cache / "results" / "alignment" / place, settings, build)
    return json.loads((folder / "result.json").read_text())


Results = dict[str, dict[str, list[dict[str, Any]]]]
"""Row -> architecture -> a result for each seed."""


def results(
    rows: Mapping[str, Callable[[Case], Merged]], halves: Sequence[str], options: argparse.Namespace
) -> Results:
    found: Results = {row: {architecture: [] for architecture in options.architectures} for row in rows}
    for seed in options.seeds:  # in the outer loop: a complete set is there early
        for architecture in options.architectures:
            case = Case(architecture, seed, tuple(halves), options.cache, options.quick)
            for row, merge in rows.items():
                found[row][architecture].append(measured(case, row, merge))
    return found


# Tables


def points(values: Sequence[float]) -> str:
    """A mean in percent, with the standard deviation over the seeds."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def own(result: Mapping[str, Any]) -> float:
    return statistics.mean(result["own"].values())


def accuracy_table(found: Results, value: Callable[[Mapping[str, Any]], float]) -> list[str]:
    architectures = list(next(iter(found.values())))
    rows = [[row, *(points([value(one) for one in found[row][a]]) for a in architectures)] for row in found]
    return markdown_table(["", *architectures], rows)


def difference_table(found: Results, pairs: Mapping[str, str], header: str) -> list[str]:
    """Rows against other rows, case by case: the models are the same, so much of the spread drops out.

    Args:
        pairs: row -> the row it is compared with.
    """
    rows = []
    for row, reference in pairs.items():
        values, others = ([own(one) for ones in found[name].values() for one in ones] for name in (row, reference))
        apart = [100 * (value - other) for value, other in zip(values, others)]
        better = f"{sum(one > 0 for one in apart)} of {len(apart)}"
        rows.append([row, f"{statistics.mean(apart):+.1f}", f"{min(apart):+.1f}", f"{max(apart):+.1f}", better])
    return markdown_table([header, "mean", "least", "most", "better in"], rows)


def chosen_line(found: Results) -> str:
    """The weights that `weight="auto"` took, seed by seed."""
    weights = {name: [f"{one['weight']:g}" for one in ones] for name, ones in found["MuDSC auto"].items()}
    each = [f"{name} {', '.join(chosen)}" for name, chosen in weights.items()]
    return f"Weights that `auto` chose: {'; '.join(each)}."


# Cost


@dataclass(frozen=True)
class Size:
    """A ViT of 12 layers, heads of 32, an MLP of 4 times the width, and images to align by."""

    width: int
    image: int
    patch: int

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = ViTConfig(
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_attention_heads=self.width // 32,
            num_hidden_layers=12,
            image_size=self.image,
            patch_size=self.patch,
            num_labels=CLASSES,
        )
        return AutoModelForImageClassification.from_config(config).eval()


SIZES = [Size(width, 56, 14) for width in (96, 192, 384)]


SITES: dict[str, dict[str, Any] | None] = {"weights": None, "all": {}, "last": {"sites": "last"}}
"""What is timed -> how `emr_hf.align` is called with data; None for a call without."""


def cost(size: Size, count: int, cache: Path) -> dict[str, Any]:
    """Return the seconds of `emr_hf.align` by the weights alone, and with activations read in all or few places."""
    threads = torch.get_num_threads()
    settings = {"size": vars(size), "images": count, "threads": threads}

    def build(folder: Path) -> None:
        models = [size.build(seed) for seed in (0, 1)]
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(32, 3, size.image, size.image, generator=generator) for _ in range(count // 32)]
        taken = {}
        for name, options in SITES.items():
            wall, cpu = time.perf_counter(), time.process_time()
            emr_hf.align(*models, **({"data": images, **options} if options is not None else {}))
            taken[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            print(f"{size}, {name}: {taken[name]}", file=sys.stderr, flush=True)
        parameters = sum(parameter.numel() for parameter in models[0].parameters())
        write_json(folder / "result.json", {**settings, "parameters": parameters, "seconds": taken})

    place = f"{size.width}-{size.image}-{count}-threads{threads}"
    folder = build_once(cache / "results" / "alignment" / "cost" / place, settings, build)
    return json.loads((folder / "result.json").read_text())


def cost_table(costs: Sequence[Mapping[str, Any]]) -> list[str]:
    header = [
        "width",
        "parameters",
        "image / patch",
        "tokens",
        "weights alone",
        "weight 0.5",
        "weight 0.5, sites last",
    ]
    rows = [
        [
            str(one["size"]["width"]),
            f"{one['parameters'] / 1e6:.1f} M",
            f"{one['size']['image']} / {one['size']['patch']}",
            str(Size(**one["size"]).tokens),
            *(f"{one['seconds'][name]['wall']:.1f} ({one['seconds'][name]['cpu']:.1f})" for name in SITES),
        ]
        for one in costs
    ]
    return markdown_table(header, rows)


# Figure


def draw(found: Results, path: Path) -> None:
    """Draw a panel for each architecture: a dot for each seed, a bar at their mean."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--figure needs matplotlib: pip install matplotlib") from None
    matplotlib.rcParams.update({"svg.hashsalt": "alignment", "svg.fonttype": "none", "font.size": 9})
    architectures = list(next(iter(found.values())))
    figure = Figure(figsize=(1.6 + 2.1 * len(architectures), 3.9), layout="constrained")
    panels = figure.subplots(1, len(architectures), sharey=True, squeeze=False)[0]
    for panel, architecture in zip(panels, architectures):
        for place, row in enumerate(found):
            values = [100 * own(one) for one in found[row][architecture]]
            colour = _colour(row)
            panel.barh(place, statistics.mean(values), height=0.7, color=colour, alpha=0.35)
            panel.plot(values, [place] * len(values), "o", markersize=3.5, color=colour)
        panel.set_title(architecture)
        panel.set_xlim(0, 100)
        panel.set_xlabel("accuracy, own head, %")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(found)), list(found))
    panels[0].invert_yaxis()
    figure.savefig(path, metadata={"Date": None})


def _colour(row: str) -> str:
    families = {"MuDSC": "#1f6fb4", "zip": "#d9722b", "individual": "#333333", "average": "#a33b3b"}
    return next((colour for start, colour in families.items() if row.startswith(start)), "#7a7a7a")


# Command line


def parts(options: argparse.Namespace) -> Iterator[tuple[str, Any, list[str]]]:
    """Yield each part's name, numbers and lines."""
    if "two" in options.parts:
        found = results(TWO, TWO_HALVES, options)
        lines = ["Two models, accuracy with the half's own head, mean of both halves, %:", ""]
        default = {row: REFERENCE for row in found if row != REFERENCE}
        differences = difference_table(found, default, f"minus {REFERENCE}, points")
        lines += [*accuracy_table(found, own), "", *differences, "", chosen_line(found), ""]
        lines += ["Joint accuracy, all ten classes, %:", "", *accuracy_table(found, lambda one: one["joint"])]
        if options.figure is not None:
            draw(found, options.figure)
        yield "two", found, lines
    if "emr" in options.parts:
        for halves in (TWO_HALVES, tuple(HALVES)):
            found = results(EMR if len(halves) == 2 else {**EMR, **MIDDLE}, halves, options)
            title = f"{len(halves)} models, accuracy with the half's own head, mean of all halves, %:"
            unaligned = {row: row.replace(", aligned", ", not aligned") for row in found if row.endswith(", aligned")}
            differences = difference_table(found, unaligned, "minus the same not aligned, points")
            yield f"emr-{len(halves)}", found, [title, "", *accuracy_table(found, own), "", *differences]
    if "cost" in options.parts:
        count = 64 if options.quick else 512
        costs = [cost(size, count, options.cache) for size in (SIZES[:1] if options.quick else SIZES)]
        setting = f"ViTs of 12 layers, {count} images, {torch.get_num_threads()} thread(s)"
        title = f"Seconds of `align`, of processor time in brackets, {setting}:"
        yield "cost", costs, [title, "", *cost_table(costs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("two", "emr", "cost")
    parser.add_argument("--parts", nargs="+", choices=names, default=list(names))
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=cache_root(), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the first part; needs matplotlib")
    parser.add_argument("--quick", action="store_true", help="models of one epoch, few images: a smoke test")
    options = parser.parse_args()
    logging.set_verbosity_error()
    noted = circumstances()
    print(machine_line(noted))
    numbers = {}
    for name, found, lines in parts(options):
        numbers[name] = found
        print("", *lines, sep="\n", flush=True)
    write_json(options.json, {**noted, "images": IMAGES, "results": numbers})


if __name__ == "__main__":
    main()
