"""The part of an adapter's settings that PEFT is given: fields that a merge needs, with values it can work with.

An adapter comes from anywhere. Fields that make PEFT read data or import modules are left out, its patterns are those
that `re` can match in a bounded time, and what only training needs is not given.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import OptionError, check_choice, short
from ..patterns import check_pattern
from ..storage import TensorInfo

ALL_LINEAR = "all-linear"
_MOST_NAMES = 1000  # in a list, where the model has fewer modules
# What PEFT probes beside a model's own names: experts as they were called before transformers joined them.
_OLD_EXPERTS = ("w1", "w2", "w3", "gate", "gate_proj", "up_proj", "down_proj")
_PLAIN = re.compile(r"(?:[\w.^$-]|\\[.-])*")  # nothing is repeated

Check = Callable[[str, Any], None]


def _expect(name: str, value: object, right: bool, expected: str) -> None:
    if not right:
        raise OptionError(f"{name} is {short(value)}: expected {expected}")


def _is_whole(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _flag(name: str, value: Any) -> None:
    _expect(name, value, isinstance(value, bool), "true or false")


def _count(name: str, value: Any) -> None:
    _expect(name, value, _is_whole(value, 1), "a whole number above 0")


def _number(name: str, value: Any) -> None:
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    _expect(name, value, right and -sys.float_info.max <= value <= sys.float_info.max, "a finite number")


def _texts(name: str, value: Any) -> None:
    _expect(name, value, isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of names")


def _pattern(name: str, value: Any) -> None:
    if not isinstance(value, str):
        _texts(name, value)


def _bias(name: str, value: Any) -> None:
    check_choice(name, value, ("none", "all", "lora_only"))


def _layers(name: str, value: Any) -> None:
    right = _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value)))
    _expect(name, value, right, "numbers of layers")


def _tokens(name: str, value: Any) -> None:
    lists = value.values() if isinstance(value, dict) else [value]
    right = all(isinstance(tokens, list) and all(map(_is_whole, tokens)) for tokens in lists)
    _expect(name, value, right, "numbers of tokens")


def _values_of(check: Check) -> Check:
    def run(name: str, value: Any) -> None:
        _expect(name, value, isinstance(value, dict), "a mapping of patterns to numbers")
        for pattern, number in value.items():
            check(f"{name}: {short(pattern)}", number)

    return run


def _fields_of(**checks: Check) -> Check:
    def run(name: str, value: Any) -> None:
        _expect(name, value, isinstance(value, dict), "a mapping of settings")
        for field, check in checks.items():
            if value.get(field) is not None:
                check(f"{name}: {field}", value[field])

    return run


def _text(name: str, value: Any) -> None:
    _expect(name, value, isinstance(value, str), "a text")


_COMMON: dict[str, Check] = {
    "target_modules": _pattern,
    "exclude_modules": _pattern,
    "modules_to_save": _texts,
    "fan_in_fan_out": _flag,
}
FIELDS: dict[str, dict[str, Check]] = {
    "LORA": {
        **_COMMON,
        "r": _count,
        "lora_alpha": _number,
        "bias": _bias,
        "use_rslora": _flag,
        "use_dora": _flag,
        "lora_bias": _flag,
        "ensure_weight_tying": _flag,
        "layers_to_transform": _layers,
        "layers_pattern": _pattern,
        "rank_pattern": _values_of(_count),
        "alpha_pattern": _values_of(_number),
        "trainable_token_indices": _tokens,
        "target_parameters": _texts,
        "use_bdlora": _fields_of(
            target_modules_bd_a=_texts, target_modules_bd_b=_texts, nblocks=_count, match_strict=_flag
        ),
        "velora_config": _fields_of(num_groups=_count, scale=_number, init_type=_text),
    },
    "IA3": {**_COMMON, "feedforward_modules": _pattern},
}
"""Kind of adapter -> the fields of its configuration that PEFT is given, and a check of the value."""


def own_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an (IA)³ adapter's `adapter_config.json` that are written again with its task.

    Not among them is where its base is, which may be a path of this machine, nor a class of another library.
    """
    names = ("peft_type", "task_type", "peft_version", "inference_mode", "init_ia3_weights", *FIELDS["IA3"])
    own = {name: settings[name] for name in names if name in settings}
    mapping = settings.get("auto_mapping")
    library = str(mapping.get("parent_library")) if isinstance(mapping, dict) else ""
    return {**own, "auto_mapping": mapping if library.partition(".")[0] == "transformers" else None}


def usable_settings(settings: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The fields of `adapter_config.json` to build PEFT's configuration of.

    Args:
        settings: content of the file.
        model: what the layers will be put into; it is not changed.

    Raises:
        OptionError: the field that is of a wrong type or size, or whose pattern may be matched for ever.
    """
    kind = settings.get("peft_type")
    check_choice("peft_type", kind, FIELDS)
    checks = FIELDS[str(kind)]
    used = {name: settings[name] for name in checks if settings.get(name) is not None}
    for name, value in used.items():
        checks[name](name, value)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    rows = max((parameter.shape[0] for parameter in model.parameters() if parameter.dim()), default=0)
    _check_lengths(used, max(_MOST_NAMES, len(modules)), rows)
    names = [*modules, *_probed(model)]
    for name, written, pattern in _patterns(used):
        if not _PLAIN.fullmatch(written):
            check_pattern(pattern, name, names)
    return used


def check_ranks(settings: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> None:
    """Raise OptionError where a LoRA's settings name ranks larger than any stored factor has a side.

    PEFT allocates what they name. On the meta device that costs nothing, and the shapes are compared afterwards.
    """
    sizes = [size for name, info in stored.items() if "lora_" in name and info.numel for size in info.shape]
    most = max(sizes, default=0)
    ranks = settings.get("rank_pattern") or {}
    for name, rank in {"r": settings.get("r") or 0, **ranks}.items():
        if rank > most:
            raise OptionError(f"rank {short(name)} is {short(rank)}: the largest side of a stored factor is {most:,}")


def _check_lengths(used: Mapping[str, Any], most: int, rows: int) -> None:
    """Raise where a list would be gone through for longer than any that fits the model."""
    for name, value in used.items():
        if name == "trainable_token_indices":
            tokens = [token for part in (value.values() if isinstance(value, dict) else [value]) for token in part]
            _expect(name, value, max(tokens, default=0) < rows, f"numbers of tokens, of which the model has {rows:,}")
        elif isinstance(value, (list, dict)) and len(value) > most:
            raise OptionError(f"{name} has {len(value):,} entries: expected at most {most:,}")


def _probed(model: nn.Module) -> Iterator[str]:
    """Names of parameters, and what PEFT may look for in their place."""
    for name, _ in model.named_parameters(remove_duplicate=False):
        yield name
        path, _, last = name.rpartition(".")
        if last not in ("weight", "bias"):
            yield from (f"{path}.{old}" for old in _OLD_EXPERTS)


def _patterns(used: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Every pattern: its field, as it is written there, and as PEFT puts it together."""
    for name in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = used.get(name)
        if isinstance(value, str) and not (name == "target_modules" and value.lower() == ALL_LINEAR):
            yield name, value, value
    tied = used["target_modules"] if used.get("ensure_weight_tying") else None
    for name, value in (("modules_to_save", used.get("modules_to_save")), ("target_modules", tied)):
        for entry in value if isinstance(value, list) else ():
            yield name, entry, rf"(^|.*\.){entry}($|\..*)"
    layers = used.get("layers_pattern", [])
    for entry in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", entry, rf"(?:^|.*?\.){entry}\.(?P<idx>\d+)\."
    for name in ("rank_pattern", "alpha_pattern"):
        for entry in used.get(name, ()):
            yield name, entry, rf"(.*\.)?({entry})$"
