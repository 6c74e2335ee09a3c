"""A merge as a PEFT adapter: one adapter that holds all tasks, for a base kept elsewhere, quantised if need be.

Imports PEFT: import this file only where that is installed.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from .. import bits
from ..configuration import EMRConfig
from ..errors import EMRError, MismatchError, RepoError, one_line
from ..format import PEFT_BANKS, PEFT_MODULE, PEFT_TYPE
from ..lowbit import Codes
from ..opening import check_finite, open_merged
from ..sites import Site, install, site_of
from ..switching import Switch, owners_of
from .ia3 import VECTOR, inject_vector_buffers
from .layers import ADAPTER, adapted_layers, unload


class _TypeName(str):
    """PEFT's enumeration of types is closed; this is what is asked of one of its members."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    name = value

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


@dataclass
class EMRPeftConfig(PeftConfig):
    """Settings of a merge as a PEFT adapter, `adapter_config.json` of what `emr-hf merge --as peft` writes.

    Args:
        emr: content of an [`EMRConfig`].
    """

    emr: dict[str, Any] | None = field(default=None, metadata={"help": "The merge's configuration"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _TypeName(PEFT_TYPE)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """PEFT's, once the merge has been checked.

        Raises:
            RepoError: it is damaged: see [`emr_hf.opening.open_merged`].
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if not folder.is_dir():
            options, _, _ = cls._split_kwargs(kwargs)
            for name in (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME):
                file = hf_hub_download(str(pretrained_model_name_or_path), name, subfolder=subfolder, **options)
                folder = Path(file).parent
        open_merged(folder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


class _AddDelta:
    """Forward hook of a quantised layer: `y + lambda F.linear(x, M tau)`."""

    def __init__(self, delta: Tensor, rescaler: Tensor):
        self.delta, self.rescaler = delta, rescaler

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if self.delta.dtype != x.dtype:
            self.delta = self.delta.to(x.dtype)
        return output + (functional.linear(x, self.delta) * self.rescaler).to(output.dtype)


class _TunerSwitch(Switch):
    """[`Switch`] on a base that has to come back, and of which linear layers may be quantised."""

    def __init__(self, model: PreTrainedModel, config: EMRConfig, adapter: str):
        self.adapter = adapter
        self.hooks: dict[str, Any] = {}
        self.originals: dict[str, Tensor] = {}
        super().__init__(model, config)
        config.base_config = model.config  # labels are the model's own
        self.labels = {name: getattr(model.config, name) for name in ("id2label", "label2id", "problem_type")}

    def site_of(self, name: str) -> Site:
        # In the model the vectors have the name of the adapter, which is the user's choice.
        return site_of(self.model, name.replace(f"{VECTOR}{ADAPTER}", f"{VECTOR}{self.adapter}"))

    def shape_of(self, name: str) -> torch.Size:
        module, attr = self.sites[name]
        if not _is_quantised(getattr(module, attr)):
            return super().shape_of(name)
        if attr != "weight" or not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            raise EMRError(f"{name} is quantised: of a quantised model only linear layers can follow a task")
        return torch.Size((module.out_features, module.in_features))  # type: ignore[arg-type]

    def become(self, task: str) -> None:
        for name, owners in self.private_sites.items():
            if name not in self.originals:
                self.originals[name] = getattr(*owners[0]).detach().clone()
        super().become(task)

    def rebuild(self, name: str, key: str) -> list[Callable[[], object]]:
        module, attr = self.sites[name]
        if not _is_quantised(getattr(module, attr)):
            return super().rebuild(name, key)
        self._remove_hook(name)
        vector, device = self.bank.vector(name), getattr(module, attr).device
        tau = vector.dense() if isinstance(vector, Codes) else vector
        delta = (tau * bits.unpack(self.bank.mask_of(key, name), tau.shape)).to(device)  # M tau, exactly
        hook = _AddDelta(delta, self.bank.rescaler.get(key).to(device))
        self.hooks[name] = module.register_forward_hook(hook)
        return []

    def _remove_hook(self, name: str) -> None:
        if name in self.hooks:
            self.hooks.pop(name).remove()

    @torch.inference_mode(False)
    @torch.no_grad()
    def leave(self) -> None:
        """Be the base again."""
        for name in self.sites:
            self._remove_hook(name)
        self.restore_base()
        for name, owners in self.private_sites.items():
            if name in self.originals:
                install(owners, self.originals[name])
        for name, value in self.labels.items():
            setattr(self.model.config, name, copy.deepcopy(value))
        self.follow_labels(self.model.config.num_labels)

    @property
    def quantised(self) -> list[str]:
        """Names of the quantised weights that the tasks change, by themselves or by a vector."""
        found = [name for name, (module, attr) in self.sites.items() if _is_quantised(getattr(module, attr))]
        layers = [(path, layer) for path, layer in adapted_layers(self.model) if hasattr(layer, "ia3_l")]
        return found + [path for path, layer in layers if _is_quantised(layer.get_base_layer().weight)]


def _is_quantised(weight: Tensor) -> bool:
    return not weight.is_floating_point() or type(weight.data) is not Tensor


class EMRLayer(nn.Module, BaseTunerLayer):
    """All there is of merges in a model that PEFT has put them into, a child of the model called `emr`.

    The weights of the active task are written into the model's own modules, as in [`EMRMergedModel`] and by the same
    code, so that a forward costs nothing extra; only a quantised layer gets a hook.
    """

    adapter_layer_names = (PEFT_BANKS,)

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.emr_bank = nn.ModuleDict()
        self._switches: dict[str, _TunerSwitch] = {}
        self._wanted: dict[str, str] = {}
        self._now: tuple[str, str] | None = None  # adapter and task whose weights the model holds
        self._fresh = False  # whether `_now` is to be relied on
        self._untouched: dict[str, dict[str, tuple[weakref.ref[Tensor], int]]] = {}  # banks before they are loaded
        self._active_adapter = []
        self._disable_adapters = False
        self.merged_adapters = []
        self.register_load_state_dict_post_hook(_has_new_values)
        # Encoders and towers are called by themselves too, before the model's own forward.
        parts = [module for name, module in model.named_modules() if name.count(".") < 2 and any(module.children())]
        self._handles = [module.register_forward_pre_hook(self._before_forward) for module in parts]
        self._handles.append(model.register_state_dict_post_hook(_save_base))
        self._handles.append(model.register_load_state_dict_pre_hook(_restore_base))

    def add(self, adapter: str, switch: _TunerSwitch) -> None:
        """Take in another merge."""
        self._switches[adapter] = switch
        self._wanted[adapter] = str(switch.config.default_task)
        self.emr_bank[adapter] = switch.bank
        self._move_adapter_to_device_of_base_layer(adapter)
        buffers = switch.bank.named_buffers()
        self._untouched[adapter] = {name: (weakref.ref(buffer), buffer._version) for name, buffer in buffers}

    def _check_loaded(self, adapter: str) -> None:
        """Raise RepoError if a merge's values have not come, or one is no number; asked once."""
        if adapter not in self._untouched:
            return
        before, bank = self._untouched[adapter], self._switches[adapter].bank
        for name, buffer in bank.named_buffers():
            old = before.get(name)
            if old is not None and old[0]() is buffer and old[1] == buffer._version:
                raise RepoError(f"adapter {adapter!r}: its file holds no {name}, which the merge demands")
            check_finite(buffer, name, f"adapter {adapter!r}")
        del self._untouched[adapter]

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        self.sync()

    def requires_grad_(self, requires_grad: bool = True) -> EMRLayer:
        """Nothing is trained. It is the last that transformers asks when it has loaded the values."""
        self.sync()
        return self

    def be_base(self) -> None:
        """Be the base, until the next forward or switch."""
        self._fresh = False  # from the start: an interrupted switch is made good by the next
        if self._now is not None:
            self._switches[self._now[0]].leave()
        self._now = None

    def base_tensors(self) -> dict[str, Tensor]:
        """Name in the model -> the base's value, of every tensor that the active task has changed."""
        if self._now is None:
            return {}
        switch = self._switches[self._now[0]]
        base = {name: switch.bank.base.get(merged) for name, merged in owners_of(switch, switch.model).items()}
        return {**base, **{name: switch.originals[name] for name in switch.private_sites if name in switch.originals}}

    def sync(self) -> None:
        """Make the model hold what it is asked to."""
        adapter = self.active_adapters[0] if self.active_adapters and not self._disable_adapters else None
        goal = None if adapter is None else (adapter, self._wanted[adapter])
        if self._fresh and goal == self._now:
            return
        if goal is None or self._now is None or goal[0] != self._now[0]:
            self.be_base()
        self._now, self._fresh = goal, False  # until the end: an interrupted switch is made good by the next
        if goal is not None:
            self._check_loaded(goal[0])
            self._switches[goal[0]].become(goal[1])
        self._fresh = True

    def _sync_if_begun(self) -> None:
        if self._fresh:
            self.sync()

    def _current(self) -> _TunerSwitch:
        if not self.active_adapters:
            raise EMRError("no merge is active: call set_adapter first")
        return self._switches[self.active_adapters[0]]

    @property
    def tasks(self) -> list[str]:
        """The tasks' names, in the order of merging."""
        return list(self._current().config.tasks)

    @property
    def active_task(self) -> str | None:
        """The task whose weights the model holds, or will at its next forward; `None` where adapters are disabled."""
        return None if self._disable_adapters or not self.active_adapters else self._wanted[self.active_adapters[0]]

    def set_task(self, task: str) -> None:
        """Become a task, see [`EMRMergedModel.set_task`]."""
        self._current().config.entry(task)
        self._wanted[self.active_adapters[0]] = task
        self.sync()

    @contextmanager
    def use_task(self, task: str) -> Iterator[None]:
        """Be a task inside a `with` block."""
        self._current()
        before = self._wanted[self.active_adapters[0]]
        self.set_task(task)
        try:
            yield
        finally:
            self.set_task(before)

    # What PEFT asks of a layer

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the merge; nothing of it is ever trained."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        names = [name for name in names if name in self._switches]
        if len(names) > 1:
            raise EMRError(f"one merge can be active at a time, not {', '.join(names)}")
        self._active_adapter = names
        self._sync_if_begun()

    def enable_adapters(self, enabled: bool) -> None:
        """Be the active task, or the base."""
        self._disable_adapters = not enabled
        self._sync_if_begun()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget a merge."""
        if adapter_name in self._switches:
            names = [name for name in self.active_adapters if name != adapter_name]
            others = [name for name in self._switches if name != adapter_name]
            self.set_adapter(names or others[:1])
            self.sync()
            del self._switches[adapter_name], self._wanted[adapter_name], self.emr_bank[adapter_name]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self._switches:
            self.emr_bank[adapter_name].to(device or self._switches[adapter_name].model.device)

    def _apply(self, fn: Any, recurse: bool = True) -> EMRLayer:
        self._fresh = False  # after a cast the weights are rebuilt from the cast base
        return super()._apply(fn, recurse)

    def remove(self, keep_task: bool) -> PreTrainedModel:
        """Leave the model with the active task's weights, or with the base's."""
        switch = next(iter(self._switches.values()))
        if keep_task and not self._disable_adapters and (quantised := self._current().quantised):
            raise EMRError(f"a task cannot be merged into quantised weights ({quantised[0]}, ...)")
        self._disable_adapters = not keep_task or self._disable_adapters
        self.sync()
        for handle in self._handles:
            handle.remove()
        return switch.model


def _has_new_values(layer: EMRLayer, incompatible_keys: Any) -> None:
    layer._fresh = False
    for switch in layer._switches.values():
        switch.take_masks()
    if not any(buffer.is_meta for buffer in layer.buffers()):
        layer.sync()


def _save_base(model: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """What is saved as the model's weights is the base, whichever task is active."""
    for name, value in getattr(model, PEFT_MODULE).base_tensors().items():
        if prefix + name in state_dict:
            state_dict[prefix + name] = value


def _restore_base(model: nn.Module, *_: Any) -> None:
    """Before `load_state_dict`: what is loaded, and what is left alone, is the base."""
    getattr(model, PEFT_MODULE).be_base()


class EMRTuner(BaseTuner):
    """What `PeftModel` holds for an adapter of [`EMRPeftConfig`]."""

    prefix = "emr_"
    tuner_layer_cls = EMRLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put a merge's places and its empty bank into a model; PEFT or transformers loads the values."""
        settings: Any = self.peft_config[adapter_name]
        config = EMRConfig.from_dict(copy.deepcopy(settings.emr))
        layer = getattr(model, PEFT_MODULE, None)
        _check_model(model, layer, config)
        assert isinstance(model, PreTrainedModel)
        if layer is not None:
            layer.be_base()  # labels and heads to come back to are the base's, not another merge's
        if config.vectors is not None:
            inject_vector_buffers(model, config.vectors, adapter_name)
        try:
            switch = _TunerSwitch(model, config, adapter_name)
        except AttributeError as error:
            raise MismatchError(f"the merge does not fit this {type(model).__name__}: {one_line(error)}") from error
        if layer is None:
            layer = EMRLayer(model)
            model.add_module(PEFT_MODULE, layer)
            model.set_task, model.use_task = layer.set_task, layer.use_task  # type: ignore[assignment]
        layer.add(adapter_name, switch)
        model.requires_grad_(False)
        self.set_adapter(self.active_adapters)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        """No module is replaced."""

    @property
    def layer(self) -> EMRLayer:
        """The merges in the model."""
        return getattr(self.model, PEFT_MODULE)

    @property
    def tasks(self) -> list[str]:
        """See [`EMRLayer.tasks`]."""
        return self.layer.tasks

    @property
    def active_task(self) -> str | None:
        """See [`EMRLayer.active_task`]."""
        return self.layer.active_task

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not needed: the weights of the active task are in place."""
        raise EMRError(
            "a task's weights are in place already: there is nothing to merge; merge_and_unload gives the model"
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        model = self.layer.remove(keep_task=merge)
        delattr(model, PEFT_MODULE)
        for name in ("set_task", "use_task", "peft_config"):
            vars(model).pop(name, None)
        unload(model, merge)
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        place = f"{PEFT_MODULE}.{PEFT_BANKS}.{adapter_name}."
        return {name: value for name, value in state_dict.items() if place in name}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{PEFT_BANKS}.{adapter_name}.", f".{PEFT_BANKS}.")


def _check_model(model: nn.Module, layer: object, config: EMRConfig) -> None:
    if type(model).__name__ != config.base_architecture:
        raise MismatchError(
            f"a merge of {config.base_architecture} is for a base of that class, not {type(model).__name__}"
        )
    if layer is not None and not isinstance(layer, EMRLayer):
        raise MismatchError(f"{type(model).__name__} has a module called {PEFT_MODULE!r} of its own")
    if config.vectors is not None and any(hasattr(module, "ia3_l") for _, module in adapted_layers(model)):
        raise MismatchError("this model holds the (IA)³ vectors of another merge: load the base again")


def register() -> None:
    """Make PEFT know [`EMRPeftConfig`]; its own `register_peft_method` takes only names of its enumeration."""
    name = _TypeName(PEFT_TYPE)
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = EMRPeftConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[name] = EMRTuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = EMRTuner.prefix  # type: ignore[index]


register()
