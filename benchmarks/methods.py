"""The contenders of `fidelity.py`: ways to keep the tasks of several finetunes, all given the same checkpoints.

A contender turns a domain into a score for each task and the bytes that have to be kept. Those of `emr_hf` write a
real repo, which is loaded and switched as a user would; the others rebuild weights in memory.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from domain import Data, Domain
from measuring import measure, mergekit_config, python_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import emr_hf
from emr_hf import election
from emr_hf.baselines import (
    CompressedTasks,
    bitdelta,
    dare_linear,
    task_arithmetic,
    ternary,
    ties,
    weight_average,
)
from emr_hf.baselines.vectors import top_magnitudes
from emr_hf.errors import OptionError

SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
"""What the best scale is chosen from, on the validation rows of all tasks."""
PROBE_ROWS = 1000
FIGURES = ("relative_error", "cosine", "sign_conflict", "density", "rescaler")
"""Of a merge's report, for each task."""

StateDict = Mapping[str, Tensor]


@dataclass
class Checkpoints:
    """A domain's weights, each read once.

    Args:
        domain: where they are.
    """

    domain: Domain

    @cached_property
    def _weights(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        base = self.domain.load_base()
        finetunes = {task: dict(self.domain.merged(self.domain.load(task))) for task in self.domain.tasks}
        # A tensor that no LoRA is on would count as so many zeros of a task vector.
        names = [
            name
            for name in election.shared_names(base, finetunes)
            if any(not torch.equal(weights[name], base[name]) for weights in finetunes.values())
        ]
        return (
            {name: base[name] for name in names},
            {task: {name: weights[name] for name in names} for task, weights in finetunes.items()},
        )

    @property
    def base(self) -> dict[str, Tensor]:
        """The base's tensors of those that some finetune has moved, heads aside."""
        return self._weights[0]

    @property
    def finetunes(self) -> dict[str, dict[str, Tensor]]:
        """Task -> the same tensors of its finetune."""
        return self._weights[1]

    @cached_property
    def heads(self) -> int:
        """Bytes of all heads."""
        return sum(self.domain.head_bytes(self.domain.load(task)) for task in self.domain.tasks)

    def with_weights(self, task: str, weights: StateDict) -> PreTrainedModel:
        """Return a task's finetune, its head as it is, with other weights in place of those named."""
        model = self.domain.load(task)
        unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"{task}: the model has no {unexpected[0]}")
        return model

    def score(self, task: str, model: PreTrainedModel, split: str = "test") -> float:
        return self.domain.tasks[task].data.exam(split).accuracy(model)


@dataclass(frozen=True)
class Made:
    """What a contender has made of a domain.

    Args:
        score: task -> accuracy on its test rows.
        total: bytes on disk of everything that the tasks need, base and heads included.
        beside: of these what is not the base's as it is.
        figures: task -> figures of the weights.
        chosen: the scale, where one was chosen.
    """

    score: Callable[[str], float]
    total: int
    beside: int
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    chosen: float | None = None


Make = Callable[..., Made]
"""Checkpoints, scratch folder, and the contender's options by name -> what it made."""


@dataclass(frozen=True)
class Contender:
    """A way to keep the tasks, and its options, as JSON values: scores are kept under these."""

    make: Make
    options: Mapping[str, Any] = field(default_factory=dict)
    applies: Callable[[Domain], bool] = lambda domain: True

    def __call__(self, given: Checkpoints, scratch: Path) -> Made:
        return self.make(given, scratch, **self.options)


def weights_bytes(folder: Path) -> int:
    """Return the size of the weights' files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _nbytes(weights: StateDict) -> int:
    # Tied tensors are stored once.
    return sum({weight.data_ptr(): weight.nbytes for weight in weights.values()}.values())


# One by one


def individual(given: Checkpoints, scratch: Path) -> Made:
    """Every finetune as it is."""
    domain = given.domain
    beside = sum(weights_bytes(task.folder) for task in domain.tasks.values())
    base = weights_bytes(domain.base) if domain.adapter else 0
    return Made(lambda task: given.score(task, domain.load(task)), beside + base, beside)


def base_and_head(given: Checkpoints, scratch: Path) -> Made:
    """The base with every task's own head, which was trained on something else."""
    total = weights_bytes(given.domain.base) + given.heads
    return Made(lambda task: given.score(task, given.with_weights(task, given.base)), total, given.heads)


def majority(given: Checkpoints, scratch: Path) -> Made:
    """The most frequent label of the training rows."""
    return Made(lambda task: given.domain.tasks[task].data.majority(), 0, 0)


def frozen_probe(given: Checkpoints, scratch: Path) -> Made:
    """The base as it is under a head trained by itself: logistic regression on features of `PROBE_ROWS` rows."""
    domain = given.domain
    model = domain.auto.from_pretrained(domain.base)
    total = weights_bytes(domain.base) + given.heads
    return Made(lambda task: probe(model, domain.tasks[task].data), total, given.heads)


@torch.inference_mode()
def features(model: PreTrainedModel, data: Data, split: str) -> tuple[Tensor, Tensor]:
    """Return features, (n, d), and labels, (n,), of a split.

    The features are the mean of the tokens' last states; of pictures the class token's and the mean of the others.
    """
    model.eval()
    items, parts, labels = getattr(data, split)[:PROBE_ROWS], [], []
    for start in range(0, len(items), 64):
        batch = dict(data.collate(items[start : start + 64]))
        labels.append(batch.pop("labels"))
        states = model.base_model(**batch).last_hidden_state  # (b, tokens, width)
        if "attention_mask" in batch:
            real = batch["attention_mask"].unsqueeze(-1)
            parts.append((states * real).sum(1) / real.sum(1))
        else:
            parts.append(torch.cat([states[:, 0], states[:, 1:].mean(1)], dim=-1))
    return torch.cat(parts), torch.cat(labels)


def probe(model: PreTrainedModel, data: Data) -> float:
    """Return the accuracy on the test rows of logistic regression, with a penalty of `||W||^2 / 2n`, on the features.

    The features are standardised by the training rows.
    """
    (x, y), (x_test, y_test) = (features(model, data, split) for split in ("train", "test"))
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_test = ((part.clone() - mean) / deviation for part in (x, x_test))
    y, y_test = y.clone(), y_test.clone()  # made in inference mode, they cannot be trained with
    linear = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(linear(x), y) + linear.weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    return (linear(x_test).argmax(-1) == y_test).float().mean().item()


# One set of weights for all tasks


def one_model(given: Checkpoints, scratch: Path, merge: str, **options: Any) -> Made:
    """A merge into one model, under each task's own head."""
    return _one(given, MERGES[merge](given.base, given.finetunes, **options))


MERGES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "weight average": weight_average,
    "task arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare_linear,
}


def _one(given: Checkpoints, weights: StateDict, chosen: float | None = None) -> Made:
    vectors = _nbytes(weights) if given.domain.adapter == "ia3" else 0  # other tensors take the place of the base's
    total = weights_bytes(given.domain.base) + vectors + given.heads
    score = partial(_score_with, given, lambda task: weights)
    return Made(score, total, _nbytes(weights) + given.heads, chosen=chosen)


def _score_with(given: Checkpoints, weights_of: Callable[[str], StateDict], task: str, split: str = "test") -> float:
    return given.score(task, given.with_weights(task, weights_of(task)), split)


def best_scale(given: Checkpoints, scratch: Path, merge: str, scales: list[float], **options: Any) -> Made:
    """A merge into one model with the scale that does best on the validation rows."""
    # All these merges are linear in the scale, so one at scale 1 tells the rest.
    whole = MERGES[merge](given.base, given.finetunes, scale=1.0, **options)

    def scaled(scale: float) -> dict[str, Tensor]:
        return {name: torch.lerp(given.base[name].float(), whole[name].float(), scale) for name in whole}

    def validated(scale: float) -> float:
        weights = scaled(scale)
        return statistics.mean(
            _score_with(given, lambda task: weights, task, "validation") for task in given.finetunes
        )

    chosen = max(scales, key=validated)
    return _one(given, scaled(chosen), chosen)


def mergekit(given: Checkpoints, scratch: Path, merge: str, **parameters: float) -> Made:
    """A merge that mergekit makes, in an environment of its own, of the tensors without their architecture.

    Raises:
        OptionError: no environment is named.
    """
    if "EMR_MERGEKIT" not in os.environ:
        raise OptionError("EMR_MERGEKIT names no Python that has mergekit")
    base, *files = (scratch / f"{index}.safetensors" for index in range(1 + len(given.finetunes)))
    for file, weights in zip((base, *files), (given.base, *given.finetunes.values())):
        save_file({name: weight.contiguous().clone() for name, weight in weights.items()}, file)
    config, out = mergekit_config(scratch / "mergekit.yaml", merge, base, files, parameters), scratch / "merged"
    python = python_of(Path(os.environ["EMR_MERGEKIT"]))
    run = "from mergekit.scripts.merge_raw_pytorch import main; main()"
    measure([python, "-c", run, str(config), str(out), "--random-seed", "0"])
    return _one(
        given, {name: weight for file in out.glob("*.safetensors") for name, weight in load_file(file).items()}
    )


# The base, and something small for each task


def compressed(given: Checkpoints, scratch: Path, method: str, **options: Any) -> Made:
    """Task vectors compressed one by one."""
    tasks: CompressedTasks = {"bitdelta": bitdelta, "ternary": ternary}[method](given.base, given.finetunes, **options)
    beside = tasks.nbytes + given.heads
    return Made(partial(_score_with, given, tasks.rebuild), weights_bytes(given.domain.base) + beside, beside)


def ablation(given: Checkpoints, scratch: Path, mask: bool, rescale: bool) -> Made:
    """EMR-Merging without its masks, its rescalers or both; without masks these are `sum |tau_t| / sum |tau|`."""
    taus = {name: _task_vectors(given, name) for name in given.base}
    unified = {name: election.elect(vectors) for name, vectors in taus.items()}
    order = list(given.finetunes)

    def kept(task: str) -> dict[str, Tensor]:
        if not mask:
            return unified
        row = order.index(task)
        return {name: tau * election.mask(taus[name][row], tau) for name, tau in unified.items()}

    def rebuilt(task: str) -> dict[str, Tensor]:
        deltas, row, scale = kept(task), order.index(task), 1.0
        if rescale:
            scale = _ratio((vectors[row] for vectors in taus.values()), deltas.values())
        return {
            name: (given.base[name].float() + scale * delta.view_as(given.base[name])).to(given.base[name])
            for name, delta in deltas.items()
        }

    elements = sum(tau.numel() for tau in unified.values())
    masks = len(order) * elements // 8 if mask else 0
    beside = 4 * elements + masks + given.heads
    return Made(partial(_score_with, given, rebuilt), weights_bytes(given.domain.base) + beside, beside)


def _task_vectors(given: Checkpoints, name: str) -> Tensor:
    """Return a tensor's task vectors, (tasks, n)."""
    base = given.base[name]
    return torch.stack([election.task_vector(weights[name], base).flatten() for weights in given.finetunes.values()])


def varied(
    given: Checkpoints, scratch: Path, prepare: str | None = None, rescaled: str | None = None, **options: Any
) -> Made:
    """A merge in memory of task vectors that were changed before, or with other rescalers.

    Args:
        prepare: `"trim"`, the fifth of the largest magnitudes of each tensor, the rest zero; `"3 bits"`, an eighth
            of each tensor's range a step, zero among them (as TVQ, arXiv 2503.06921); `"normalise"`, all task
            vectors as long as the mean, which rescalers undo.
        rescaled: give what is rebuilt the finetune's mean magnitude, of each `"tensor"` or of the whole `"task"`.
        options: of `emr_hf.merge_state_dicts`.
    """
    lengths = {task: _length(given, task) for task in given.finetunes}
    mean = statistics.mean(lengths.values())
    scales = {task: mean / length if prepare == "normalise" else 1.0 for task, length in lengths.items()}
    base = {name: weight.float() for name, weight in given.base.items()}
    changed = {
        task: {
            name: weight + scales[task] * _prepared(weights[name] - weight, prepare) for name, weight in base.items()
        }
        for task, weights in given.finetunes.items()
    }
    merge = emr_hf.merge_state_dicts(base, changed, **options)

    def rebuilt(task: str) -> dict[str, Tensor]:
        moves = {
            name: merge.masks[task][name] * tau + (merge.base.get(name, base[name]) - base[name])
            for name, tau in merge.tau.items()
        }
        targets = {name: changed[task][name] - base[name] for name in moves}
        rescalers = dict.fromkeys(moves, merge.rescalers[task])
        if rescaled == "tensor":
            rescalers = {name: _ratio([targets[name]], [moves[name]]) for name in moves}
        if rescaled == "task":
            rescalers = dict.fromkeys(moves, _ratio(targets.values(), moves.values()))
        return {name: base[name] + rescalers[name] / scales[task] * move for name, move in moves.items()}

    elements, tasks = sum(tau.numel() for tau in merge.tau.values()), len(given.finetunes)
    beside = elements * (32 + tasks) // 8 + given.heads + (rescaled == "tensor") * 4 * tasks * len(base)
    return Made(partial(_score_with, given, rebuilt), weights_bytes(given.domain.base) + beside, beside)


def two_bits(given: Checkpoints, scratch: Path) -> Made:
    """Two levels for each weight, and again for what they leave: two vectors, and two bits a weight and task."""
    base = {name: weight.float() for name, weight in given.base.items()}
    first = emr_hf.merge_state_dicts(base, given.finetunes, method="levels")
    left = {}
    for task, weights in given.finetunes.items():
        near = first.rebuild(base, task)
        left[task] = {name: base[name] + (weights[name] - near[name]) for name in base}
    second = emr_hf.merge_state_dicts(base, left, method="levels")

    def rebuilt(task: str) -> dict[str, Tensor]:
        parts = first.rebuild(base, task), second.rebuild(base, task)
        return {name: parts[0][name] + (parts[1][name] - base[name]) for name in base}

    bits = 2 * 32 + 2 * len(given.finetunes)  # both starts are one tensor, in the base's place
    beside = sum(weight.numel() for weight in base.values()) * bits // 8 + given.heads
    return Made(partial(_score_with, given, rebuilt), weights_bytes(given.domain.base) + beside, beside)


def _ratio(above: Iterable[Tensor], below: Iterable[Tensor]) -> float:
    """Return the quotient of two sums of magnitudes; 1 for nothing by nothing."""
    sums = [sum(float(tensor.double().abs().sum()) for tensor in tensors) for tensors in (above, below)]
    return sums[0] / sums[1] if sums[1] else 1.0


def _length(given: Checkpoints, task: str) -> float:
    """Return the L2 norm of a task vector."""
    squares = (
        float((weight - given.base[name]).double().square().sum()) for name, weight in given.finetunes[task].items()
    )
    return sum(squares) ** 0.5


def _prepared(tau: Tensor, how: str | None) -> Tensor:
    if how == "trim":
        return tau * top_magnitudes(tau, 0.2)
    if how == "3 bits":
        step = (tau.max() - tau.min()) / 7
        return (tau / step).round() * step if step > 0 else tau
    return tau


def merged_repo(given: Checkpoints, scratch: Path, **options: Any) -> Made:
    """A repo that `emr_hf.merge` writes with these options."""
    domain = given.domain
    folders = {name: task.folder for name, task in domain.tasks.items()}
    out = scratch / "repo"
    report = emr_hf.merge(domain.base, folders, out, progress=False, **options)
    model = domain.auto.from_pretrained(out)
    return Made(
        lambda task: given.score(task, model.set_task(task)),
        total=weights_bytes(out),
        beside=report.bytes_modulators,
        figures={task: {name: getattr(numbers, name) for name in FIGURES} for task, numbers in report.tasks.items()},
    )


def _merge(**options: Any) -> Contender:
    return Contender(merged_repo, options)


def _one_model(merge: str, **options: Any) -> Contender:
    return Contender(one_model, {"merge": merge, **options})


def _best(merge: str, **options: Any) -> Contender:
    return Contender(best_scale, {"merge": merge, "scales": list(SCALES), **options})


INDIVIDUAL = "individual"
BASE = "base + head"
CONTENDERS = {
    INDIVIDUAL: Contender(individual),
    BASE: Contender(base_and_head),
    "majority": Contender(majority, applies=lambda domain: domain.classifies),
    "frozen probe": Contender(frozen_probe, applies=lambda domain: domain.classifies and domain.adapter is None),
    "weight average": _one_model("weight average"),
    "task arithmetic .3": _one_model("task arithmetic", scale=0.3),
    "task arithmetic best": _best("task arithmetic"),
    "TIES": _one_model("ties", density=0.2),
    "TIES best": _best("ties", density=0.2),
    "DARE": _one_model("dare", density=0.1, scale=0.3),
    "mergekit TIES": Contender(mergekit, {"merge": "ties", "density": 0.2, "weight": 1.0}),
    "mergekit DARE-TIES": Contender(mergekit, {"merge": "dare_ties", "density": 0.2, "weight": 1.0}),
    "mergekit model stock": Contender(mergekit, {"merge": "model_stock"}),
    "BitDelta": Contender(compressed, {"method": "bitdelta"}),
    "BitDelta everywhere": Contender(compressed, {"method": "bitdelta", "every_tensor": True}),
    "ternary": Contender(compressed, {"method": "ternary", "density": 0.1}),
    "elect": Contender(ablation, {"mask": False, "rescale": False}),
    "elect + mask": Contender(ablation, {"mask": True, "rescale": False}),
    "elect + rescale": Contender(ablation, {"mask": False, "rescale": True}),
    "EMR": _merge(),
    "EMR tensor_mean": _merge(rescale="tensor_mean"),
    "EMR least_squares": _merge(rescale="least_squares"),
    "EMR per tensor": Contender(varied, {"rescaled": "tensor"}),
    "EMR trimmed": Contender(varied, {"prepare": "trim"}),
    "EMR of 3 bits": Contender(varied, {"prepare": "3 bits"}),
    "EMR normalised": Contender(varied, {"prepare": "normalise"}),
    "EMR int8": _merge(tau_dtype="int8"),
    "EMR int4": _merge(tau_dtype="int4"),
    "fit": _merge(method="fit"),
    "fit least_squares": _merge(method="fit", rescale="least_squares"),
    "fit per tensor": Contender(varied, {"method": "fit", "rescaled": "tensor"}),
    "fit int8": _merge(method="fit", tau_dtype="int8"),
    "fit int4": _merge(method="fit", tau_dtype="int4"),
    "fit int2": _merge(method="fit", tau_dtype="int2"),
    "levels": _merge(method="levels"),
    "levels rescaled": Contender(varied, {"method": "levels", "rescaled": "task"}),
    "levels twice": Contender(two_bits),
    "levels int8": _merge(method="levels", tau_dtype="int8"),
    "levels int4": _merge(method="levels", tau_dtype="int4"),
    "levels int2": _merge(method="levels", tau_dtype="int2"),
}
"""Name -> contender, in the order of the tables."""
