"""What can be damaged of a merged repo, a recipe, an adapter and a checkpoint, and what then cannot be told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import damaged_files as files
from damage import (
    ALL,
    LONG,
    NONE,
    OUTSIDE,
    Damage,
    DoesNotApply,
    Path_,
    Raw,
    at,
    spoil_field,
    spoil_text,
    write_json,
)

Family = Callable[[Path, Random], Damage]

EVALUATE = frozenset({"evaluate", "cli-eval"})
ADD = frozenset({"add", "cli-add"})
IA3 = frozenset({"export-ia3"})
_RARE = ("base_config", "report", "auto_map", "emr", "merged_parameters")


def _config(folder: Path) -> tuple[Path, Path_]:
    """The file with a repo's configuration, and where in it that is."""
    if (folder / "adapter_config.json").is_file():
        return folder / "adapter_config.json", ("emr",)
    return folder / "config.json", ()


def _repo_accepts(path: Path_) -> frozenset[str]:
    """Verbs that may do something else, and soundly, with another value of a repo's field."""
    path = path[1:] if path[0] == "emr" else path
    top = path[0] if path else ""
    if top == "base_config":
        return EVALUATE
    if top in ("method", "recipe"):
        return ADD  # another election is another merge
    if top == "tasks" and len(path) > 2 and path[2] in ("id2label", "problem_type", "tokenizer", "generation_config"):
        return EVALUATE
    if top == "tasks" and len(path) > 2 and path[2] in ("vectors", "adapter"):
        return IA3
    return EVALUATE if top in ("id2label", "problem_type") else NONE


def repo_field(folder: Path, random: Random, *below: str) -> Damage:
    """A field of a repo's configuration."""
    file, under = _config(folder)
    under = (*under, *below)
    try:
        usable = isinstance(at(json.loads(file.read_text()), under), dict)
    except KeyError:
        usable = False
    if not usable:
        raise DoesNotApply
    return spoil_field(file, random, _repo_accepts, _RARE, under)


def peft_field(folder: Path, random: Random) -> Damage:
    """A field of `adapter_config.json` around a merge."""
    file, under = _config(folder)
    if not under:
        raise DoesNotApply
    return spoil_field(file, random, _repo_accepts, ("emr",))


HOSTILE_PATTERNS = (
    "(([a-z._0-9])+)+!",
    "(a|a|.)*(a|a|.)*$^",
    "(.*.*.*.*.*)*x$",
    "(?:[\\w.]+)+(?:[\\w.]+)+!",
    "[" * 200,
    "(?P<a>x)(?P=a){1000000000}",
    "(" * 5000 + ")" * 5000,
    "a{4294967296}",
    ".*",
    "",
    "|".join(f"x{i}" for i in range(50_000)),
)


def hostile_vectors(folder: Path, random: Random) -> Damage:
    """Settings of (IA)³ layers that would hang or ask for memory."""
    file, under = _config(folder)
    document = json.loads(file.read_text())
    known = at(document, under)["vectors"] or {"peft_type": "IA3"}
    label, value = random.choice(
        [
            ("a LoRA of rank 10^9", {"peft_type": "LORA", "target_modules": ["query"], "r": 10**9}),
            ("a LoRA of rank 8", {"peft_type": "LORA", "target_modules": ["query"], "r": 8}),
            ("no type", {"target_modules": ["query"]}),
            ("all modules", {"peft_type": "IA3", "target_modules": "all-linear"}),
            ("10^5 modules", {"peft_type": "IA3", "target_modules": [f"m{i}" for i in range(100_000)]}),
            *[("a hostile pattern", {"peft_type": "IA3", "target_modules": p}) for p in HOSTILE_PATTERNS],
            *[("a hostile pattern", {**known, "target_modules": p}) for p in HOSTILE_PATTERNS],
        ]
    )
    at(document, under)["vectors"] = value
    write_json(file, document)
    shown = f"{label}: {json.dumps(value)[:80]}"
    return Damage(f"{file.name}: vectors = {shown}", (file.name, "vectors", "target_modules"))


def hostile_recipe_record(folder: Path, random: Random) -> Damage:
    """Patterns in what a repo records of its recipe."""
    file, under = _config(folder)
    document = json.loads(file.read_text())
    pattern = random.choice(HOSTILE_PATTERNS)
    at(document, under)["recipe"]["private"] = [pattern]
    write_json(file, document)
    return Damage(f"{file.name}: recipe.private = {pattern[:60]!r}", (file.name, "recipe", "private"), ADD)


def paths_out(folder: Path, random: Random) -> Damage:
    """A task's tokenizer somewhere else."""
    file, under = _config(folder)
    document = json.loads(file.read_text())
    task = random.choice(list(at(document, under)["tasks"]))
    places = (
        f"../{OUTSIDE}",
        f"@{OUTSIDE}@",
        f"tasks/../../{OUTSIDE}",
        "..",
        ".",
        "/",
        "a\0b",
        LONG,
        "tasks/t9",
        "tasks",
    )
    value = random.choice(places)
    at(document, under)["tasks"][task]["tokenizer"] = value
    write_json(file, document)
    return Damage(f"{file.name}: tokenizer of {task} = {value[:60]!r}", (file.name, "tokenizer", task), EVALUATE)


def _harmless(path: Path_) -> frozenset[str]:
    return EVALUATE


def side_file(folder: Path, random: Random, spoil: Callable[..., Damage]) -> Damage:
    """A tokenizer's or the generation's settings, or the report."""
    known = ("tokenizer_config.json", "generation_config.json", "emr_report.json", "tokenizer.json")
    found = [path for path in sorted(folder.rglob("*.json")) if path.name in known]
    if not found:
        raise DoesNotApply
    file = random.choice(found)
    return spoil(file, random)


def _side_field(file: Path, random: Random) -> Damage:
    return spoil_field(file, random, _harmless)


def _side_text(file: Path, random: Random) -> Damage:
    return spoil_text(file, random, EVALUATE)


REPO: Sequence[Family] = (
    repo_field,
    repo_field,
    repo_field,
    lambda folder, random: repo_field(folder, random, "tasks"),
    lambda folder, random: repo_field(folder, random, "tasks"),
    lambda folder, random: repo_field(folder, random, "base_config"),
    lambda folder, random: repo_field(folder, random, "vectors"),
    peft_field,
    hostile_vectors,
    hostile_recipe_record,
    paths_out,
    lambda folder, random: spoil_text(_config(folder)[0], random),
    files.remove_tensor,
    files.remove_tensor,
    files.add_tensor,
    files.rename_tensor,
    files.reshape_tensor,
    files.reshape_tensor,
    files.cast_tensor,
    files.not_finite,
    files.not_finite,
    files.spoil_header,
    files.spoil_header,
    files.spoil_index,
    files.replace_file,
    files.replace_file,
    files.add_file,
    lambda folder, random: side_file(folder, random, _side_field),
    lambda folder, random: side_file(folder, random, _side_text),
)


# Full checkpoints


def _input_accepts(path: Path_) -> frozenset[str]:
    """Fields of a checkpoint's configuration that say what it is, so that another value is another input."""
    return ALL if path[0] in ("dtype", "torch_dtype", "id2label", "label2id", "num_labels", "problem_type") else NONE


def input_field(folder: Path, random: Random) -> Damage:
    """A field of a checkpoint's `config.json`."""
    return spoil_field(folder / "config.json", random, _input_accepts)


def foreign_code(folder: Path, random: Random) -> Damage:
    """Code of a checkpoint's own, which nobody may run."""
    file = folder / "config.json"
    document = json.loads(file.read_text())
    mark = folder.parent / files.MARK
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass C: pass\nclass M: pass\n")
    document["auto_map"] = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoModelForSequenceClassification": "own.M"}
    label = random.choice(["beside the model type", "with an unknown model type", "in the tokenizer"])
    if label == "with an unknown model type":
        document["model_type"] = "own"
    if label == "in the tokenizer":
        settings = {"auto_map": {"AutoTokenizer": ["own.C", None]}, "tokenizer_class": "C"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        write_json(file, document)
    return Damage(f"code of its own {label}", ("config.json", "model_type", "own"))


def quantised(folder: Path, random: Random) -> Damage:
    """A checkpoint that says it is quantised."""
    file = folder / "config.json"
    document = json.loads(file.read_text())
    values: Sequence[Any] = ({"quant_method": "gptq"}, {}, [], "x", {"quant_method": None}, {"load_in_4bit": True}, 1)
    document["quantization_config"] = value = random.choice(values)
    write_json(file, document)
    return Damage(f"config.json: quantization_config = {value}", ("config.json", "quant", folder.name))


def _of_input(family: Family, folder: Path, random: Random) -> Damage:
    """A base without a tensor is another base, whose finetunes have it for themselves."""
    found = family(folder, random)
    return replace(found, accept=ALL) if folder.name == "base" else found


INPUT: Sequence[Family] = (
    input_field,
    input_field,
    lambda folder, random: spoil_text(folder / "config.json", random),
    partial(_of_input, files.remove_tensor),
    partial(_of_input, files.rename_tensor),
    files.add_tensor,
    files.reshape_tensor,
    files.reshape_tensor,
    files.cast_input_tensor,
    files.not_finite,
    files.spoil_header,
    files.spoil_header,
    files.spoil_index,
    files.replace_file,
    files.replace_file,
    files.add_file,
    files.spoil_pickle,
    foreign_code,
    quantised,
    lambda folder, random: side_file(folder, random, _side_field),
    lambda folder, random: side_file(folder, random, _side_text),
)


# Adapters

_SCALES = ("lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "fan_in_fan_out", "r", "rank_pattern")


def _adapter_accepts(path: Path_) -> frozenset[str]:
    """Settings that only scale what an adapter adds, and those that say which task it is for."""
    return ALL if path[0] in (*_SCALES, "task_type", "feedforward_modules", "base_model_name_or_path") else NONE


def adapter_field(folder: Path, random: Random) -> Damage:
    """A field of `adapter_config.json`."""
    return spoil_field(folder / "adapter_config.json", random, _adapter_accepts)


HOSTILE_SETTINGS: Sequence[Mapping[str, Any]] = (
    {"r": 10**9},
    {"r": 10**18},
    {"r": 0},
    {"r": -1},
    {"r": 2.5},
    {"rank_pattern": {".*": 10**9}},
    {"rank_pattern": {"(([a-z._0-9])+)+!": 4}},
    {"alpha_pattern": {"(([a-z._0-9])+)+!": 4}},
    {"alpha_pattern": {".*": float("nan")}},
    {"lora_alpha": float("nan")},
    {"lora_alpha": 1e308},
    {"lora_alpha": Raw("1e999")},
    *({"target_modules": pattern} for pattern in HOSTILE_PATTERNS),
    *({"exclude_modules": pattern} for pattern in HOSTILE_PATTERNS),
    *({"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": p} for p in HOSTILE_PATTERNS),
    {"target_modules": [f"m{i}" for i in range(100_000)]},
    {"target_modules": "all-linear"},
    {"target_parameters": ["(([a-z._0-9])+)+!"]},
    {"layers_to_transform": [10**9]},
    {"layers_to_transform": 0},
    {"layer_replication": [[0, 10**6]]},
    {"modules_to_save": [".*", ""]},
    {"modules_to_save": ["bert"]},
    {"trainable_token_indices": [10**12]},
    {"trainable_token_indices": {"word_embeddings": list(range(96))}},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    {"init_lora_weights": "corda", "corda_config": {"cache_file": f"../{OUTSIDE}/config.json"}},
    {"use_dora": True},
    {"use_qalora": True, "qalora_group_size": 0},
    {"megatron_config": {"x": 1}, "megatron_core": "os"},
    {"megatron_config": {"x": 1}, "megatron_core": "own"},
    {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
    {"runtime_config": {"ephemeral_gpu_offload": True}},
    {"arrow_config": {"top_k": 1}},
    {"bias": "all"},
    {"bias": "nonsense"},
    {"lora_bias": True},
    {"peft_type": "EMR"},
    {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9},
    {"peft_type": "LOHA"},
    {"peft_type": "OFT", "oft_block_size": 10**9},
    {"peft_type": "LN_TUNING"},
    {"peft_type": "VERA", "r": 10**9},
    {"task_type": "NONSENSE"},
    {"feedforward_modules": ["nowhere"]},
    {"base_model_name_or_path": f"../{OUTSIDE}"},
    {"revision": "x/../../y"},
)


def hostile_adapter(folder: Path, random: Random) -> Damage:
    """Settings that ask PEFT for what is not there, for memory or for time."""
    file = folder / "adapter_config.json"
    document = json.loads(file.read_text())
    changes = random.choice(HOSTILE_SETTINGS)
    write_json(file, {**document, **changes})
    accept = ALL if all(_adapter_accepts((name,)) for name in changes) or "use_qalora" in changes else NONE
    words = ["lora_A", "lora_embedding_A"] if {"r", "rank_pattern"} & changes.keys() else []
    words += [value for value in changes.values() if isinstance(value, str) and value.isalpha()]
    return Damage(f"{file.name}: {str(dict(changes))[:120]}", (file.name, *changes, *words), accept)


ADAPTER: Sequence[Family] = (
    adapter_field,
    adapter_field,
    hostile_adapter,
    hostile_adapter,
    lambda folder, random: spoil_text(folder / "adapter_config.json", random),
    files.remove_tensor,
    files.add_tensor,
    files.rename_tensor,
    files.reshape_tensor,
    files.reshape_tensor,
    files.cast_input_tensor,
    files.not_finite,
    files.spoil_header,
    files.replace_file,
    files.add_file,
    files.spoil_pickle,
)
