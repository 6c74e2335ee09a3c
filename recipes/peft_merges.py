"""What PEFT itself merges adapters with, `add_weighted_adapter`, given the best conditions it can have.

As they are saved, the demo's adapters are refused: each has a head of its own (`modules_to_save`), and LoRAs of
different rank cannot be added. So heads are taken off and given back for each task's exam, and lower ranks are filled
up with zeros, which changes no adapter.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from adapters import load_adapter
from registry import MINILM, fetch
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import SEED, Exam
from transformers import AutoModelForSequenceClassification, PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel

COMBINATIONS = {"lora": ("linear", "cat", "ties", "dare_linear"), "ia3": ("linear",)}
"""Kind of adapter -> ways to combine; (IA)³ has no other."""
WEIGHTS = (0.25, 0.5, 1.0)
"""Each of these is given to every adapter, and the one that does best on the test rows is taken."""
DENSITY = 0.5
"""Share of the values that TIES and DARE keep."""

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "base_model.model.classifier."


def refusals(folders: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield what a user may try first, and what PEFT says to it."""
    yield "all, as they are saved", _answer(folders)
    alike = {name: folder for name, folder in folders.items() if len(head_of(folder)["bias"]) == 2}
    yield f"{' and '.join(alike)}, whose heads have one shape", _answer(alike)
    with tempfile.TemporaryDirectory() as scratch:
        bare = {name: headless(folder, Path(scratch) / name) for name, folder in folders.items()}
        yield "all, their heads taken off", _answer(bare)


def _answer(folders: Mapping[str, Path]) -> str:
    try:
        combine(_load_all(folders), list(folders), "linear", 1.0)
    except Exception as error:  # whatever it is, it is what a user would see
        return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
    return "accepted"


def best_scores(folders: Mapping[str, Path], exams: Mapping[str, Exam], combination: str) -> dict[str, float]:
    """Return each task's accuracy under PEFT's merge of the adapters, with the best of `WEIGHTS`."""
    heads = {name: head_of(folder) for name, folder in folders.items()}
    with tempfile.TemporaryDirectory() as scratch:
        model = _load_all({name: headless(folder, Path(scratch) / name) for name, folder in _padded(folders, scratch)})
    tries = []
    for weight in WEIGHTS:
        # Merged into the weights of a copy it runs faster, and does the same.
        merged = copy.deepcopy(combine(model, list(folders), combination, weight)).merge_and_unload()
        tries.append({name: exam.accuracy(with_head(merged, heads[name])) for name, exam in exams.items()})
    return max(tries, key=lambda scores: statistics.mean(scores.values()))


def combine(model: PeftModel, names: list[str], combination: str, weight: float) -> PeftModel:
    """Merge loaded adapters by PEFT's means, and activate the result."""
    torch.manual_seed(SEED)  # DARE drops at random
    options: dict[str, Any] = {} if "ia3" in _kind(model) else {"combination_type": combination}
    if combination in ("ties", "dare_linear"):
        options["density"] = DENSITY
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    model.add_weighted_adapter(names, [weight] * len(names), "merged", **options)
    model.set_adapter("merged")
    return model


def _kind(model: PeftModel) -> str:
    return str(model.active_peft_config.peft_type.value).lower()


def _load_all(folders: Mapping[str, Path]) -> PeftModel:
    from peft import PeftModel

    (first, folder), *others = folders.items()
    if (folder / "config.json").is_file():
        model = load_adapter(folder)
        model.load_adapter(folder, first)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(fetch(MINILM))
        model = PeftModel.from_pretrained(base, folder, first)
    for name, other in others:
        model.load_adapter(other, name)
    return model


def _padded(folders: Mapping[str, Path], scratch: str) -> list[tuple[str, Path]]:
    """The adapters, LoRAs all of the highest rank among them."""
    ranks = {name: json.loads((folder / SETTINGS).read_text()).get("r") for name, folder in folders.items()}
    if None in ranks.values():
        return list(folders.items())
    highest = max(ranks.values())
    return [(name, pad_rank(folder, Path(scratch) / f"{name}-padded", highest)) for name, folder in folders.items()]


def pad_rank(folder: Path, out: Path, rank: int) -> Path:
    """Write the same LoRA with a higher rank, the new rows and columns zero and the scale `alpha / r` as it was."""
    settings = json.loads((folder / SETTINGS).read_text())
    more = rank - settings["r"]
    settings["lora_alpha"] = settings["lora_alpha"] * rank / settings["r"]
    settings["r"] = rank
    tensors = load_file(folder / TENSORS)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([tensor, tensor.new_zeros(more, tensor.shape[1])])
        if ".lora_B." in name:
            tensors[name] = torch.cat([tensor, tensor.new_zeros(len(tensor), more)], dim=1)
    return _write(out, settings, tensors)


def headless(folder: Path, out: Path) -> Path:
    """Write the same adapter without its head."""
    settings = json.loads((folder / SETTINGS).read_text())
    settings.update(modules_to_save=None, task_type=None)  # the type would bring a new head
    tensors = {name: tensor for name, tensor in load_file(folder / TENSORS).items() if not name.startswith(HEAD)}
    return _write(out, settings, tensors)


def _write(out: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    out.mkdir(parents=True)
    (out / SETTINGS).write_text(json.dumps(settings))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / TENSORS, metadata={"format": "pt"}
    )
    return out


def head_of(folder: Path) -> dict[str, Tensor]:
    """Return the head that an adapter has saved."""
    tensors = load_file(folder / TENSORS)
    return {name.removeprefix(HEAD): tensor for name, tensor in tensors.items() if name.startswith(HEAD)}


def with_head(model: PreTrainedModel, head: Mapping[str, Tensor]) -> PreTrainedModel:
    """Put an adapter's head on a model."""
    model.classifier = torch.nn.Linear(*reversed(head["weight"].shape))
    model.classifier.load_state_dict(dict(head))
    model.num_labels = model.config.num_labels = len(head["weight"])
    return model


warnings.filterwarnings("ignore", module="peft")  # of adapters loaded side by side, and of one deleted
