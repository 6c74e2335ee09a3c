"""The switch between tasks: the places in a model that follow the task, and the bank they are rebuilt from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from . import bits
from .bank import EMRBank
from .configuration import EMRConfig
from .election import TAU_DTYPES
from .sites import Site, install, site_of


class Switch:
    """Where in a model the tensors of a merge are, and how they become a task's.

    Args:
        model: the model that becomes the tasks.
        config: the merge's.

    Attributes:
        sites: merged parameter -> its owner: PEFT may rename the path to a module, not the module.
        private_sites: name of a private tensor -> its owners, several if it is tied: it may change its shape, and so
            its Parameter.
        bank: the merge's tensors, empty at first; who owns the switch registers it as a module.
    """

    def __init__(self, model: PreTrainedModel, config: EMRConfig):
        self.model, self.config = model, config
        self.sites: dict[str, Site] = {name: self.site_of(name) for name in config.merged_parameters or []}
        names = sorted({name for entry in config.tasks.values() for name in entry["private"]})
        aliases = model.all_tied_weights_keys
        same = {name: [name, *(alias for alias in aliases if aliases[alias] == name)] for name in names}
        self.private_sites = {name: [self.site_of(n) for n in owners] for name, owners in same.items()}
        self.private_names = [n for owners in same.values() for n in owners]
        shapes = {name: self.shape_of(name) for name in self.sites}
        private = {entry["key"]: _private_spec(entry["private"]) for entry in config.tasks.values()}
        self.bank = EMRBank(shapes, TAU_DTYPES[config.tau_dtype], private)

    def site_of(self, name: str) -> Site:
        """Where a tensor is."""
        return site_of(self.model, name)

    def shape_of(self, name: str) -> torch.Size:
        """Shape of a merged parameter."""
        module, attr = self.sites[name]
        return getattr(module, attr).shape

    def offloaded(self) -> list[str]:
        """Names of the tensors that are away, so that no switch can rewrite them or read them."""
        away = [name for name, (module, attr) in self.sites.items() if getattr(module, attr).is_meta]
        return away + [name for name, buffer in self.bank.named_buffers() if buffer.is_meta]

    @torch.inference_mode(False)  # a Parameter made in inference mode could never be switched or trained again
    @torch.no_grad()
    def become(self, task: str) -> None:
        """Rebuild a task's weights in place, and install its private tensors, labels and generation settings."""
        entry = self.config.entry(task)
        for name in self.sites:
            self.rebuild(name, entry["key"])
        for name, owners in self.private_sites.items():
            install(owners, self.bank.private_of(entry["key"], name))
        self.config.apply_task(task)
        self.follow_labels(self.config.num_labels)
        self.use_generation_config(task)

    def use_generation_config(self, task: str) -> None:
        """Tasks have generation settings of their own only where these differ."""
        settings = self.config.entry(task).get("generation_config")
        if settings is not None:
            self.model.generation_config = GenerationConfig.from_dict(settings)

    def rebuild(self, name: str, key: str) -> None:
        """One parameter of a task. What the model holds before the first time is the base."""
        module, attr = self.sites[name]
        parameter, bank = getattr(module, attr), self.bank
        if not bank.base.has(name):
            bank.base.put(name, parameter.detach().clone(), persistent=False)
            parameter.requires_grad_(False)  # these weights are rebuilt, training them would be lost
        base, tau, packed = bank.base.get(name), bank.tau.get(name), bank.mask_of(key, name)
        bits.rebuild(base, tau, packed, bank.rescaler.get(key), out=parameter)

    def follow_labels(self, count: int | None) -> None:
        """Modules that keep the number of labels themselves."""
        for module in self.model.modules():
            if "num_labels" in vars(module):
                vars(module)["num_labels"] = count

    @torch.no_grad()
    def restore_base(self) -> None:
        """Give the merged parameters the base's values back."""
        for name, (module, attr) in self.sites.items():
            if self.bank.base.has(name) and hasattr(module, attr):  # PEFT may have deleted a vector
                getattr(module, attr).copy_(self.bank.base.get(name))

    @torch.no_grad()
    def take_base(self) -> None:
        """What the merged parameters hold now is the base."""
        for name, (module, attr) in self.sites.items():
            self.bank.base.get(name).copy_(getattr(module, attr).detach())

    @torch.inference_mode(False)
    @torch.no_grad()
    def become_base(self) -> None:
        """The base's merged weights; private tensors, labels and generation settings are the default task's."""
        self.restore_base()
        entry = self.config.entry(self.config.default_task)
        for name, owners in self.private_sites.items():
            install(owners, self.bank.private_of(entry["key"], name))
        self.config.apply_task(self.config.default_task)
        self.follow_labels(self.config.num_labels)
        self.use_generation_config(self.config.default_task)


def _private_spec(private: dict[str, Any]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (torch.Size(shape), getattr(torch, dtype)) for name, (shape, dtype) in private.items()}


def owners_of(switch: Switch, model: nn.Module) -> dict[str, str]:
    """Name in `model` of every place of a merged parameter, tied ones too -> the parameter's name in the merge."""
    merged = {id(getattr(module, attr)): name for name, (module, attr) in switch.sites.items()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: merged[id(parameter)] for name, parameter in named if id(parameter) in merged}
