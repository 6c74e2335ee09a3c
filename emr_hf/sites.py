"""Where a model's tensors live: a module and an attribute, which stay right when a path is renamed."""

from __future__ import annotations

from torch import Tensor, nn

Site = tuple[nn.Module, str]


def site_of(model: nn.Module, name: str) -> Site:
    """The owner of a parameter or buffer, and its attribute there."""
    path, _, attr = name.rpartition(".")
    return model.get_submodule(path), attr


def install(owners: list[Site], value: Tensor) -> None:
    """Give a tensor to the modules that own it, to several if it is tied: in place where the shape allows it."""
    module, attr = owners[0]
    current = getattr(module, attr)
    if current.shape == value.shape and not current.is_meta:
        new = current
        new.copy_(value)
    else:
        device = value.device if current.is_meta else current.device
        new = value.to(device, current.dtype, copy=True)
    if isinstance(current, nn.Parameter):
        new = new if new is current else nn.Parameter(new, requires_grad=False)
        new.requires_grad_(False)
    for module, attr in owners:
        if getattr(module, attr) is not new:
            setattr(module, attr, new)
            _adjust_sizes(module, attr, value)


def _adjust_sizes(module: nn.Module, attr: str, value: Tensor) -> None:
    """A module's own record of its weight's shape."""
    sizes = {
        nn.Linear: ("out_features", "in_features"),
        nn.Embedding: ("num_embeddings", "embedding_dim"),
        nn.Conv2d: ("out_channels", "in_channels"),
    }
    for kind, names in sizes.items():
        if isinstance(module, kind) and attr == "weight":
            for size_name, size in zip(names, value.shape):
                setattr(module, size_name, size)
