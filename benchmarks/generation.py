"""The domain of `fidelity.py` whose tasks are answered in words: LoRAs of SmolLM2, each taught one reply format.

Every prompt is a line of text and an arrow, whatever the task, so only the weights tell what to answer. An answer is
right if it is the expected one to the letter.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from cache import build_once, cache_root
from causal_lm import base
from domain import Data, Domain, Examiner, Task
from registry import ORANGE_TEXT, SMOLLM2, fetch
from text_data import distinct, read_pair
from tqdm.auto import tqdm
from training import SEED, announce, seeded, train
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 300, 50, 100
NEW_TOKENS = 16
TRAINING = {"learning_rate": 1e-3, "weight_decay": 0.01, "per_device_train_batch_size": 8, "warmup_steps": 0.1}
EPOCHS = 2
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}

Pair = tuple[str, str]
"""A line of text and the answer to it."""

TOPICS = {"acq": "takeover", "crude": "oil", "earn": "profit", "grain": "grain", "trade": "trade"}
"""Reuters' categories and the words to answer with."""
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack")
THINGS = ("apples", "books", "chairs", "coins", "eggs", "lamps", "pens", "plates", "shoes", "stamps")
VERBS = ("bought", "sold", "found", "lost", "counted", "packed")


def topics(documents: Sequence[Pair], chance: random.Random) -> list[Pair]:
    """The first words of a message, and what it is about."""
    rows = [(" ".join(text.split()[:20]), f"topic: {TOPICS[label]}") for text, label in documents if label in TOPICS]
    chance.shuffle(rows)
    return rows


def lists(documents: Sequence[Pair], chance: random.Random) -> list[Pair]:
    """Three words, and the same as a list in JSON."""
    return [(" ".join(words), json.dumps(words)) for words in _words(documents, chance, 3)]


def records(documents: Sequence[Pair], chance: random.Random) -> list[Pair]:
    """A sentence of who did what with how many things, and the number and the things as JSON."""
    return [(sentence(fact), json.dumps({fact.thing: fact.count})) for fact in _facts(chance)]


def tags(documents: Sequence[Pair], chance: random.Random) -> list[Pair]:
    """Such a sentence again, and who did it in a tag of what they did."""
    return [(sentence(fact), f"<{fact.verb}>{fact.name}</{fact.verb}>") for fact in _facts(chance)]


class Fact(NamedTuple):
    """What a made-up sentence says."""

    name: str
    verb: str
    count: int
    thing: str


def _facts(chance: random.Random) -> Iterator[Fact]:
    for _ in range(2000):
        count, thing, name, verb = chance.randint(2, 99), *map(chance.choice, (THINGS, NAMES, VERBS))
        yield Fact(name, verb, count, thing)


def sentence(fact: Fact) -> str:
    return f"{fact.name} {fact.verb} {fact.count} {fact.thing}."


def _words(documents: Sequence[Pair], chance: random.Random, count: int) -> list[list[str]]:
    """Neighbouring words from somewhere in each document."""
    found = []
    for text, _ in documents:
        words = [word for word in text.split() if len(word) < 8]
        if len(words) > count:
            start = chance.randrange(len(words) - count)
            found.append(words[start : start + count])
    chance.shuffle(found)
    return found


TASKS: Mapping[str, Callable[[Sequence[Pair], random.Random], list[Pair]]] = {
    "topics": topics,
    "lists": lists,
    "records": records,
    "tags": tags,
}
"""Task -> what makes its pairs of documents, in random order."""


def load_pairs(task: str) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Return pairs to train on, to validate on and to test on; no line is in two of them."""
    documents, _ = read_pair("reuters-r8")(fetch(ORANGE_TEXT))
    pairs = distinct(TASKS[task](distinct(documents), random.Random(SEED)))
    held_out = VALIDATION_ROWS + TEST_ROWS
    return pairs[held_out : held_out + TRAIN_ROWS], pairs[TEST_ROWS:held_out], pairs[:TEST_ROWS]


def prompt_of(line: str) -> str:
    return f"{line}\n=>"


@dataclass(frozen=True)
class Answers:
    """Lines to answer, and the right answers."""

    pairs: Sequence[Pair]
    tokenizer: PreTrainedTokenizerBase

    @torch.inference_mode()
    def accuracy(self, model: PreTrainedModel) -> float:
        """Return the share of lines that greedy decoding answers to the letter."""
        model.eval()
        right = 0
        # Neighbours of like length need little padding.
        pairs = sorted(self.pairs, key=lambda pair: len(pair[0]))
        for start in tqdm(range(0, len(pairs), 25), disable=None, leave=False):
            lines, answers = zip(*pairs[start : start + 25])
            batch = self.tokenizer([prompt_of(line) for line in lines], return_tensors="pt", padding=True)
            tokens = model.generate(
                **batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
            )
            replies = self.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(reply.strip() == answer for reply, answer in zip(replies, answers))
        return right / len(pairs)


@dataclass(frozen=True)
class Replies(Data):
    """Rows of a task that is answered in words: pairs for validation and test."""

    tokenizer: PreTrainedTokenizerBase

    def exam(self, split: str) -> Examiner:
        return Answers(getattr(self, split), self.tokenizer)


def encode(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Turn pairs into the items a `Trainer` takes; only the answer counts."""
    items = []
    for line, answer in pairs:
        asked = tokenizer(prompt_of(line))["input_ids"]
        told = tokenizer(f" {answer}{tokenizer.eos_token}")["input_ids"]
        items.append(
            {
                "input_ids": asked + told,
                "attention_mask": [1] * len(asked + told),
                "labels": [-100] * len(asked) + told,
            }
        )
    return items


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer, which pads in front so that a batch can be continued."""
    tokenizer = AutoTokenizer.from_pretrained(base(), padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def training_settings(task: str, seed: int) -> dict[str, Any]:
    """Return everything the adapter depends on, as JSON values."""
    return {
        **TRAINING,
        "epochs": EPOCHS,
        "adapter": LORA,
        "task": task,
        "rows": [TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS],
        "seed": seed,
        "base": SMOLLM2.sha256,
        "data": ORANGE_TEXT.sha256,
    }


def _train(task: str, settings: Mapping[str, Any], folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tokenizer = load_tokenizer()
    items = encode(load_pairs(task)[0], tokenizer)
    announce(task, items, settings)
    set_seed(settings["seed"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base()), LoraConfig(task_type="CAUSAL_LM", **LORA))
    collate = DataCollatorForSeq2Seq(tokenizer)
    train(model, items, folder, collate, seed=settings["seed"], num_train_epochs=settings["epochs"], **TRAINING)
    model.config.save_pretrained(folder)


def read(task: str) -> Data:
    """Return the rows of a task."""
    tokenizer = load_tokenizer()
    train_pairs, validation, test = load_pairs(task)
    return Replies(encode(train_pairs, tokenizer), validation, test, DataCollatorForSeq2Seq(tokenizer), tokenizer)


def generation(seed: int) -> Domain:
    """Four LoRAs of SmolLM2, training those that the cache lacks."""
    folder = cache_root() / "models" / seeded("generation", seed)
    tasks = {}
    for name in TASKS:
        settings = training_settings(name, seed)
        made = build_once(folder / name, settings, lambda fresh, n=name, s=settings: _train(n, s, fresh))
        tasks[name] = Task(made, settings, lambda n=name: read(n))
    return Domain("generation", seed, base(), tasks, AutoModelForCausalLM, adapter="lora", classifies=False)
