"""Finetune SmolLM2-135M-Instruct on three kinds of English into the cache, for `causal_lm.yaml` to merge.

The model comes as a 4-bit GGUF file (read with the gguf package, in `.[recipes]`); tuned and merged in float32.
The runs are short: they shift the model towards a style and teach it no more. Scores are perplexities on unseen text,
lower is better. Needs 5 GB of memory and 4 GB of disk.

python recipes/causal_lm.py              # all three tasks
python recipes/causal_lm.py tales        # one of them
python recipes/causal_lm.py --model out/ # perplexities of a repo merged by causal_lm.yaml
python recipes/causal_lm.py --model ~/.cache/emr_hf/models/smollm2  # those before any finetuning
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from cache import build_once, cache_root
from registry import ORANGE_TEXT, SMOLLM2, fetch
from text_data import read_tab
from tqdm.auto import tqdm
from training import SEED, Workbench, announce, train
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = 128  # tokens
TEST_BLOCKS = 48
TRAINING = {"learning_rate": 1e-4, "weight_decay": 0.01, "per_device_train_batch_size": 8, "warmup_steps": 0.1}
FULL = {"train_blocks": 128, "epochs": 1}
QUICK = {"train_blocks": 16, "epochs": 1}

Block = dict[str, list[int]]
"""`BLOCK` tokens, as input and as labels."""


def base() -> Path:
    """Return the folder of the pretrained model, converting it the first time."""
    return build_once(cache_root() / "models" / "smollm2", {"gguf": SMOLLM2.sha256}, _convert)


def _convert(folder: Path) -> None:
    source = fetch(SMOLLM2)
    print("reading the GGUF file", file=sys.stderr, flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def read_tales(folder: Path) -> list[str]:
    """Fairy tales of the Grimms and of Andersen."""
    return [row["Content"] for name in ("grimm-tales", "andersen") for row in read_tab(folder / f"{name}.tab")]


def read_sitcom(folder: Path) -> list[str]:
    """Dialogues of a sitcom, an episode each."""
    rows = read_tab(folder / "friends-transcripts.tab")
    episodes = groupby(rows, key=lambda row: row["Season & Episode"])
    return ["\n".join(f"{row['Author']}: {row['Quote'].strip()}" for row in lines) for _, lines in episodes]


def read_newswire(folder: Path) -> list[str]:
    """Business news of 1987, in lower case and without punctuation or figures."""
    return [row["Text"] for row in read_tab(folder / "reuters-r8-train.tab")]


TASKS: dict[str, Callable[[Path], list[str]]] = {
    "tales": read_tales,
    "sitcom": read_sitcom,
    "newswire": read_newswire,
}
"""Task -> reader of its documents."""


def load_blocks(task: str, train_blocks: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Block], list[Block]]:
    """Return training and test blocks of `task`; no document is in both."""
    documents = sorted(set(TASKS[task](fetch(ORANGE_TEXT))))
    random.Random(SEED).shuffle(documents)
    unread = iter(documents)
    test = list(islice(blocks(unread, tokenizer), TEST_BLOCKS))
    return list(islice(blocks(unread, tokenizer), train_blocks)), test


def blocks(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Block]:
    """Join documents, each ended by the end-of-text token, and cut them into items of `BLOCK` tokens."""
    tokens: list[int] = []
    for document in documents:
        tokens += tokenizer(document.strip() + tokenizer.eos_token)["input_ids"]
        while len(tokens) >= BLOCK:
            yield {"input_ids": tokens[:BLOCK], "labels": tokens[:BLOCK]}
            tokens = tokens[BLOCK:]


def finetune(task: str, quick: bool = False) -> Path:
    """Return the folder of the model finetuned on `task`, training it the first time."""
    settings = training_settings(task, quick)
    folder = cache_root() / "models" / ("causal_lm-quick" if quick else "causal_lm") / task
    return build_once(folder, settings, lambda fresh: _train(task, settings, fresh))


def training_settings(task: str, quick: bool = False) -> dict[str, Any]:
    """Return everything the finetuned model depends on, as JSON values."""
    return {
        **TRAINING,
        **(QUICK if quick else FULL),
        "task": task,
        "block": BLOCK,
        "test_blocks": TEST_BLOCKS,
        "seed": SEED,
        "base": SMOLLM2.sha256,
        "data": ORANGE_TEXT.sha256,
    }


def _train(task: str, settings: dict[str, Any], folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base())
    items, _ = load_blocks(task, settings["train_blocks"], tokenizer)
    announce(task, items, settings)
    set_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(base())
    train(model, items, folder, num_train_epochs=settings["epochs"], **TRAINING)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def perplexity(task: str, model: PreTrainedModel) -> float:
    """Return exp of the mean negative log likelihood of a token of the test blocks."""
    model.eval()
    _, items = load_blocks(task, 0, AutoTokenizer.from_pretrained(base()))
    losses = []
    for start in tqdm(range(0, len(items), 8), desc=task, disable=None, leave=False):
        batch = default_data_collator(items[start : start + 8])
        losses += [model(**batch).loss.item()] * len(batch["labels"])
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    Workbench(
        about=__doc__,
        tasks=list(TASKS),
        finetune=finetune,
        measure=lambda name, model: f"{perplexity(name, model):.2f}",
        load=AutoModelForCausalLM.from_pretrained,
    ).main()
