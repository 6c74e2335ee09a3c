"""Tiny sound models to damage: bases, finetunes, adapters and merged repos of every layout, and what they hold.

[`weights_of`] reads a merged repo by docs/format.md alone, in numpy, and so is a reference for every reader.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizer, GenerationConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import emr_hf

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests import adapters, tiny  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the"]
BITS = {"int8": 8, "int4": 4, "int2": 2}
Weights = dict[str, dict[str, Tensor]]
"""Task -> name in memory -> tensor."""


@dataclass(frozen=True)
class Specimen:
    """One sound thing of a kind, and what is needed to use it.

    Attributes:
        name: unique within its kind.
        folder: what is damaged.
        tasks: of the repo, in order; of inputs, the tasks they are merged as.
        base: folder of the base.
        inputs: task -> folder of the finetune or adapter, the damaged one among them.
        new: folder of a finetune that can be added to the repo.
        repo: a merged repo to which the damaged input is added.
        data: labelled rows.
        auto_class: that loads an exported task.
        options: of the merge.
        layout: `"model"` or `"peft"`.
        vectors: whether (IA)³ vectors are merged.
    """

    name: str
    folder: Path
    tasks: tuple[str, ...]
    base: Path
    inputs: Mapping[str, Path]
    new: Path | None = None
    repo: Path | None = None
    data: Path | None = None
    auto_class: str = "AutoModelForSequenceClassification"
    options: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "model"
    vectors: bool = False


def write_tokenizer(folder: Path, words: list[str]) -> None:
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)


@dataclass(frozen=True)
class Models:
    """A base, finetunes of it, and one more to add."""

    base: Path
    finetunes: dict[str, Path]
    new: Path
    auto_class: str


def full_models(architecture: tiny.Tiny, folder: Path, tasks: tuple[str, ...], **options: Any) -> Models:
    """Write a base and full finetunes of it."""
    inputs = tiny.write_inputs(architecture, folder, (*tasks, "new"), **options)
    finetunes = {task: inputs.finetunes[task] for task in tasks}
    if architecture is tiny.BERT:
        for index, path in enumerate(inputs.finetunes.values()):
            write_tokenizer(path, WORDS if index != 1 else [*WORDS[:5], *reversed(WORDS[5:])])
    if architecture is tiny.LLAMA:
        for index, path in enumerate(inputs.finetunes.values()):
            GenerationConfig(max_new_tokens=5 + index, bos_token_id=1, eos_token_id=2).save_pretrained(path)
    return Models(inputs.base, finetunes, inputs.finetunes["new"], architecture.auto_class)


def _adapted(kind: str, folder: Path, first: dict[str, Any], second: dict[str, Any]) -> Models:
    base = adapters.write_base(tiny.BERT, folder / "base")
    written = {
        task: adapters.write_adapter(
            folder / task, tiny.BERT.architecture, base, {**settings, "task_type": "SEQ_CLS"}, seed, kind, **labels
        )
        for seed, (task, settings, labels) in enumerate(
            (("a", first, {"num_labels": 3}), ("b", second, {}), ("new", first, {}))
        )
    }
    return Models(base, {task: written[task] for task in "ab"}, written["new"], "AutoModelForSequenceClassification")


def _as_bin(models: Models, folder: Path) -> Models:
    """The same models with their weights in `pytorch_model.bin`."""

    def convert(path: Path) -> Path:
        shutil.copytree(path, folder / path.name)
        torch.save(load_file(path / "model.safetensors"), folder / path.name / "pytorch_model.bin")
        (folder / path.name / "model.safetensors").unlink()
        return folder / path.name

    finetunes = {task: convert(path) for task, path in models.finetunes.items()}
    return Models(convert(models.base), finetunes, convert(models.new), models.auto_class)


def models_of(folder: Path) -> dict[str, Models]:
    """Write all bases, finetunes and adapters."""
    bert = full_models(tiny.BERT, folder / "bert", ("glue/sst2", "mnli.v1"))
    lora = {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 5}
    rslora = {"target_modules": ["query", "output.dense"], "r": 5, "use_rslora": True, "bias": "lora_only"}
    ia3 = {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}
    return {
        "bert": bert,
        "llama": full_models(tiny.LLAMA, folder / "llama", ("a", "b")),
        "resnet": full_models(tiny.RESNET, folder / "resnet", ("a", "b")),
        "sharded": full_models(tiny.BERT, folder / "sharded", ("a", "b"), max_shard_size="60KB"),
        "bin": _as_bin(bert, folder / "bin"),
        "lora": _adapted("LORA", folder / "lora", lora, rslora),
        "ia3": _adapted("IA3", folder / "ia3", ia3, {"target_modules": ["query", "value"], "feedforward_modules": []}),
    }


REPOS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "int8": ("bert", {"tau_dtype": "int8", "method": "fit"}),
    "int2": ("bert", {"tau_dtype": "int2"}),
    "levels": ("bert", {"tau_dtype": "int4", "method": "levels"}),
    "sharded": ("bert", {"max_shard_size": "60KB"}),
    "llama": ("llama", {"tau_dtype": "bfloat16"}),
    "resnet": ("resnet", {}),
    "ia3": ("ia3", {}),
    "peft-full": ("bert", {"save_as": "peft"}),
    "peft-ia3": ("ia3", {"save_as": "peft"}),
}


def build(folder: Path) -> dict[str, list[Specimen]]:
    """Write every specimen, by kind. Computes: call it in a child of what forks others."""
    folder.mkdir(parents=True)
    models = models_of(folder / "models")
    data = folder / "rows.csv"
    data.write_text("text,label\na good film,0\nthe bad film,1\ngood good,1\na film,0\n")
    repos = [_repo(folder / "repos", name, models, data) for name in REPOS]
    return {"repo": repos, **inputs_of(models, {repo.name: repo.folder for repo in repos})}


def _repo(folder: Path, name: str, models: Mapping[str, Models], data: Path) -> Specimen:
    source, options = REPOS[name]
    used = models[source]
    out = folder / name
    emr_hf.merge(used.base, used.finetunes, out, progress=False, **options)
    return Specimen(
        name, out, tuple(used.finetunes), used.base, used.finetunes,
        new=None if options.get("method") == "levels" else used.new,
        data=data if source == "bert" else None,
        auto_class=used.auto_class, layout=options.get("save_as", "model"), vectors=source == "ia3",
    )  # fmt: skip


def inputs_of(models: Mapping[str, Models], repos: Mapping[str, Path]) -> dict[str, list[Specimen]]:
    """Specimens that are merged: finetunes and bases, adapters, and recipes of the same."""
    found: dict[str, list[Specimen]] = {"input": [], "adapter": [], "recipe": []}
    for name, used in models.items():
        kind = "adapter" if name in ("lora", "ia3") else "input"
        task, path = list(used.finetunes.items())[-1]
        repo = repos["bert"] if name in ("bert", "lora", "bin") else repos.get(name)
        given = (tuple(used.finetunes), used.base, used.finetunes)
        common = {"auto_class": used.auto_class, "vectors": name == "ia3"}
        found[kind].append(Specimen(f"{name}-finetune", path, *given, repo=repo, **common))
        if kind == "input":
            found[kind].append(Specimen(f"{name}-base", used.base, *given, **common))
        if name in ("bert", "llama", "lora"):
            found["recipe"].append(Specimen(name, path.parent, *given, **common))
    return found


def weights_of(folder: Path, base: Path | None = None) -> Weights:
    """The weights of every task of a merged repo, by docs/format.md.

    Args:
        base: of a repo without one; without it only what tasks have of their own is told.
    """
    config, stored = _content(folder)
    known = {n.removeprefix("model."): t for n, t in stored.items() if n.startswith("model.")}
    if base is not None and not known:
        known = _base_of(config, base)
    found: Weights = {}
    for task, entry in config["tasks"].items():
        key, own = entry["key"], dict(known)
        for name in config["merged_parameters"]:
            own[name] = _rebuilt(stored, config["tau_dtype"], key, name, known.get(name))
        for name, (shape, _) in entry["private"].items():
            own[name] = stored[f"emr.private.{key}.{_flat(name)}"]
            if list(own[name].shape) != shape:
                raise ValueError(f"{name} is {list(own[name].shape)}, config.json says {shape}")
        found[task] = own
    return found


def _content(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if (folder / "adapter_config.json").is_file():
        prefix = "base_model.model.emr.emr_bank."
        tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())["emr"]
        return config, {f"emr.{name.removeprefix(prefix)}": tensor for name, tensor in tensors.items()}
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return json.loads((folder / "config.json").read_text()), found


def _base_of(config: dict[str, Any], base: Path) -> dict[str, Tensor]:
    prefix = "bert."  # of the base model inside the one with a head
    if config["vectors"] is not None:
        return {name: torch.ones(1) for name in config["merged_parameters"]}
    return {prefix + name: tensor for name, tensor in load_file(base / "model.safetensors").items()}


def _flat(name: str) -> str:
    return name.replace(".", "__")


def _rebuilt(stored: Mapping[str, Tensor], tau_dtype: str, key: str, name: str, base: Tensor | None) -> Tensor:
    """`base + lambda * mask * tau`, in float32."""
    flat = _flat(name)
    tau, scale = stored[f"emr.tau.{flat}"], stored.get(f"emr.scale.{flat}")
    shape = tau.shape if scale is None else base.shape if base is not None else None
    assert shape is not None
    dense = tau.float().numpy().reshape(-1)
    if scale is not None:
        dense = _decoded(tau.numpy(), scale.numpy(), BITS[tau_dtype], shape.numel())
    bits = np.unpackbits(stored[f"emr.mask.{key}.{flat}"].numpy(), bitorder="little")[: dense.size].astype(bool)
    rescaler = np.float32(stored[f"emr.rescaler.{key}"].item())
    start = torch.zeros(shape) if base is None else base.expand(shape)
    before = start.float().numpy().reshape(-1)
    after = np.where(bits, before + rescaler * dense, before)
    return torch.from_numpy(after).reshape(shape).to(start.dtype)


def _decoded(codes: np.ndarray, scales: np.ndarray, width: int, count: int) -> np.ndarray:
    bits = np.unpackbits(codes, bitorder="little")[: count * width].reshape(count, width)
    values = (bits << np.arange(width)).sum(1).astype(np.float32) - np.float32((2**width - 1) / 2)
    return values * np.repeat(scales, count // scales.size)


def digest(tensor: Tensor) -> str:
    """Shape, dtype and values of a tensor in a few letters; a number that is not finite stands out."""
    values = tensor.detach().cpu().contiguous()
    if values.is_floating_point() and not torch.isfinite(values).all():
        return "not finite"
    content = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{values.dtype} {list(values.shape)} {hashlib.blake2b(content, digest_size=8).hexdigest()}"


def digests(weights: Weights) -> dict[str, str]:
    """Of every tensor of every task, one entry."""
    return {f"{task}: {name}": digest(tensor) for task, own in weights.items() for name, tensor in own.items()}


def warm() -> None:
    """Import what children will need, which each would otherwise do by itself; no warnings and bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for module in ("datasets", "datasets.packaged_modules.csv.csv", "evaluate", "scipy.optimize", "scipy.linalg"):
        importlib.import_module(module)
    for name in emr_hf.__all__:
        getattr(emr_hf, name)
    for tiny_model in (tiny.BERT, tiny.LLAMA, tiny.RESNET):
        get_checkpoint_conversion_mapping(tiny_model.config().model_type)
        for name in (tiny_model.architecture, tiny_model.auto_class):
            getattr(transformers, name)
