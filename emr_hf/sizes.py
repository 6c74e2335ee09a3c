"""Sizes that a configuration names, compared with what is stored: what is built of it must not be far larger."""

from __future__ import annotations

import re

from .errors import CheckpointError, short

# Numbers of parts, for each of which a model or its configuration makes something; and sizes of tensors.
_PARTS = re.compile(r"(^|_)(num|n|number)_|(layers?|blocks?|heads?|experts?|labels|stages?|depths?|groups?)$")
_SIZES = re.compile(r"(size|sizes|dims?|dimension|width|length|positions|embeddings|vocab|ctx|channels|ratio|model)$")
_MOST_PARTS, _LARGEST_SIZE = 1 << 17, 1 << 24


def check_sizes(where: str, value: object, stored: int, name: str = "") -> None:
    """Raise CheckpointError where a configuration is of something far larger than the largest stored dimension.

    Args:
        where: for the message.
        value: of the configuration, or of a field of it.
        stored: the largest size of any stored tensor.
        name: of the field.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            check_sizes(where, inner, stored, str(key))
    elif isinstance(value, list):
        for inner in value:
            check_sizes(where, inner, stored, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = _LARGEST_SIZE if _SIZES.search(name) else _MOST_PARTS if _PARTS.search(name) else value
        if value > max(most, stored):
            raise CheckpointError(f"{where}: {name} is {short(value)}, but no stored tensor is of such a size")
