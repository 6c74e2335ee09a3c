"""EMRMergedModel: one model that becomes any of its tasks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from . import mixed
from .adapters.layers import unload
from .bank import EMRBank
from .configuration import EMRConfig
from .errors import EMRError, MismatchError, OffloadedError, OptionError, RepoError, check_choice, one_line, short
from .format import part_of
from .heads import architectures_of, auto_map, auto_name, wrapper_name
from .hub import MERGED_REPO, push_folder, push_model, saved_tensors, write_repo_files
from .loading import build_wrapped, check_files, check_values
from .plan import dtype_name
from .publication import updated_folder
from .repo import copy_side_files, is_weights_file, layout_of, open_repo, side_files_of
from .signature import DelegatedSignature
from .storage import open_folder
from .switching import Switch, owners_of

T = TypeVar("T")
MEMORY = ("resident", "mapped")
FOUND_BY = (SAFE_WEIGHTS_INDEX_NAME, CONFIG_NAME)
"""Files by which a reader finds all others of a repo."""

_loading_since: ContextVar[float] = ContextVar("when the load of a model began", default=0.0)


class EMRMergedModel(PreTrainedModel):
    """A model merged by EMR-Merging (arXiv 2405.17461): base, unified task vector, and per task masks and a rescaler.

    At any time the wrapped model, `self.model`, holds the weights of the active task. A switch rebuilds them in place
    from the stored base, `W = base + lambda * mask * tau` (`emr_hf.bits.rebuild`), so it neither drifts nor moves a
    weight to another address. These weights are frozen: what is trained of them would belong to no task. Train an
    adapter on top, or what `merge_and_unload` gives.

    Threads may share a model. It has a lock, held for a forward and for `generate`, together with the switch that
    `emr_task=` asks for; for `set_task`; and for the whole block of `use_task`. So no call sees half a switch, and
    with `emr_task=` or inside `use_task` it runs on the task that it names. `set_task` and a call after it are two
    steps, between which another thread may switch. Not covered: what a model compiled by `torch.compile` does without
    `emr_task=`, several CUDA streams, and loading, saving, moving or unloading while others use the model.

    A key-value cache filled under one task is of no use to another.

    Args:
        config: see [`EMRConfig`].
        emr_task (*optional*): the task to load with, `config.default_task` by default.
        emr_memory (*optional*, defaults to `"resident"`): where base, unified vector and masks are: `"resident"` in
            memory, or `"mapped"` from the repo's files, which must then stay as they are: only the active weights are
            in memory of the process, the rest is the system's page cache. What has to be cast on loading is in memory
            either way. A forward reads no file; a switch raises RepoError once a file has been changed.
        emr_device (*optional*): a device for base, unified vector and masks, such as `"cpu"` for a model on a GPU: a
            third of its memory, and each switch sends them over. The model's own by default.

    Attributes:
        emr_pad (`bool`): the default of `emr_pad` in [`EMRMergedModel.forward`], for callers that cannot pass it, such
            as `Trainer.predict`.

    Example:

    ```python
    model = EMRMergedModel.from_pretrained("me/bert-emr")
    model.tasks                                    # ['sst2', 'mnli']
    model.set_task("mnli")
    with model.use_task("sst2"):
        model(**batch)
    model(**batch, emr_task="mnli")
    model(**batch, emr_task=["sst2", "mnli", "sst2"])  # a task for every row
    ```
    """

    config: EMRConfig
    config_class = EMRConfig
    # Not "model": transformers would take every name in the checkpoint for one of the wrapped model's.
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _auto_suffix: str | None = None
    emr_pad = False
    _mapped_from: Path | None = None

    def __init__(
        self,
        config: EMRConfig,
        emr_task: str | None = None,
        emr_memory: str = "resident",
        emr_device: str | torch.device | None = None,
    ):
        super().__init__(config)
        check_choice("emr_memory", emr_memory, MEMORY)
        try:
            place = None if emr_device is None else torch.device(emr_device)
        except RuntimeError as error:
            raise OptionError(f"emr_device={short(emr_device)}: {one_line(error)}") from None
        self._initial_task = emr_task or config.default_task
        if config.tasks:
            config.entry(self._initial_task)
        self._check_architecture()
        self.model = build_wrapped(config)
        self._active: str | None = None
        self._half_switched = self._is_base = False
        self._lock = mixed.Lock()
        try:
            self._switch = Switch(self.model, config, mapped=emr_memory == "mapped")
        except AttributeError as error:
            raise RepoError(f"the merge does not fit {config.base_architecture}: {one_line(error)}") from None
        self.emr = self._switch.bank
        self.emr.place = place
        self._keys_to_ignore_on_load_missing = [rf"^model\.{re.escape(name)}$" for name in self._switch.private_names]
        self.register_state_dict_post_hook(_save_base_weights)
        self.register_load_state_dict_pre_hook(_restore_base)
        self.register_load_state_dict_post_hook(_take_loaded_base)
        self.post_init()
        self.all_tied_weights_keys = {
            alias: name
            for alias, name in self.all_tied_weights_keys.items()
            if name.removeprefix("model.") not in self._switch.private_sites
        }

    def _check_architecture(self) -> None:
        architecture = str(self.config.base_architecture)
        if self._auto_suffix and architecture not in architectures_of(self._auto_suffix):
            right = wrapper_name(architecture)
            raise MismatchError(
                f"{type(self).__name__} cannot hold {architecture}: load this repo as {right} ({auto_name(right)})"
            )

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing of the wrapper's own is trained; the wrapped model initialises itself."""

    # Loading and saving

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a merged repo. `EMRMergedModel` itself picks the head class that the repo names.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            emr_task, emr_memory, emr_device (*optional*): see [`EMRMergedModel`].
            kwargs: as `PreTrainedModel.from_pretrained`, but for `quantization_config`.
        """
        if kwargs.get("quantization_config") is not None:
            raise OptionError(
                "a merged model cannot be quantised on loading, its weights are rebuilt at full precision: "
                "use merge_and_unload(task) or `emr-hf export`, and quantise the result"
            )
        if cls is EMRMergedModel:
            cls = cls._class_of_repo(pretrained_model_name_or_path, kwargs)
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if kwargs.get("state_dict") is None and layout_of(folder) == "model":
            open_repo(folder)  # a broken index or header is named, of which transformers raises anything
        token = _loading_since.set(time.time())
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except (OSError, JSONDecodeError) as error:
            if isinstance(error, EMRError):
                raise
            raise RepoError(
                f"{pretrained_model_name_or_path}: transformers cannot read it: {one_line(error)}"
            ) from error
        finally:
            _loading_since.reset(token)

    @staticmethod
    def _class_of_repo(name_or_path: Any, kwargs: dict[str, Any]) -> type[EMRMergedModel]:
        config = kwargs.get("config")
        if not isinstance(config, EMRConfig):
            download = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            known = {key: kwargs[key] for key in download if kwargs.get(key) is not None}
            config = EMRConfig.from_pretrained(config or name_or_path, **known)
        heads: list[type[EMRMergedModel]] = EMRMergedModel.__subclasses__()
        wanted = wrapper_name(str(config.base_architecture))
        return next((head for head in heads if head.__name__ == wanted), EMRMergedModel)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        # The wrapped model's patterns must not match the names in the bank.
        return {f"model.*{pattern}": kept for pattern, kept in super()._get_dtype_plan(dtype).items()}

    @staticmethod
    def _load_pretrained_model(  # type: ignore[override]
        model: EMRMergedModel,
        state_dict: dict[str, Any] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> Any:
        if model._active is None and state_dict is None:  # else an adapter is put on top
            model._switch.open_files(checkpoint_files or ())
            check_files(model, [Path(file) for file in checkpoint_files or []], _loading_since.get())
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    @staticmethod
    def _finalize_model_loading(model: EMRMergedModel, load_config: Any, loading_info: Any) -> Any:
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if loading_info.missing_keys:
            raise RepoError(
                f"{model.config.name_or_path}: the tensor {min(loading_info.missing_keys)} is missing, which "
                f"{model.config.base_architecture} needs"
            )
        model.model.requires_grad_(False)  # what is rebuilt, or shared by all tasks, cannot be trained for one
        switch = model._switch
        switch.watch()
        with switch.reading():
            check_values(model)
            _take_into_memory(model, {id(getattr(*site)) for site in switch.sites.values()} if switch.mapped else None)
        if switch.mapped:
            model._mapped_from = Path(str(model.config.name_or_path)).resolve()
            switch.watch()
        else:
            switch.files = ()
        model.set_task(model._initial_task)
        return loading_info

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the whole repo: base, unified vector and every task, whichever task is active.

        Args:
            save_directory: the folder. Each file is written beside its place and renamed, the configuration last; what
                else a folder holds stays.
            push_to_hub (*optional*): upload it too, see [`EMRMergedModel.push_to_hub`].
            args, kwargs: as `PreTrainedModel.save_pretrained`.
        """
        names = ("repo_id", "private", "token", "commit_message", "revision", "create_pr")
        hub_options = {name: kwargs.pop(name) for name in names if name in kwargs}
        folder = Path(save_directory)
        is_main = self.should_save_on_this_rank(args[0] if args else kwargs.get("is_main_process", True))
        if folder.resolve() == self._mapped_from:
            raise OptionError(f"{folder} is what this model is mapped from: save it elsewhere")
        if getattr(self, "_hf_peft_config_loaded", False):  # an adapter of transformers' own: only that is saved
            return super().save_pretrained(save_directory, *args, **{**kwargs, "push_to_hub": push_to_hub})
        if not self._switch.sites.keys() <= {name for name, _ in self.model.named_parameters()}:
            raise EMRError(
                "adapters are attached to this model: save them by their own save_pretrained, or unload them"
            )
        self.set_task(self._active or self.config.default_task)
        # Names in memory are the names on disk: the bank's tensors have no other form.
        kwargs["save_original_format"] = False
        if not is_main or kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, *args, **kwargs)
        with updated_folder(folder, MERGED_REPO, FOUND_BY, is_weights_file) as staging, self._as_saved():
            with self._switch.reading():
                super().save_pretrained(staging, *args, **kwargs)
            self._record(staging)
            known = saved_tensors(str(self.config.name_or_path), getattr(self.config, "_commit_hash", None))
            write_repo_files(staging, self.config, folder.name, known)
            self._keep_tokenizers(staging, folder)
        if push_to_hub:
            push_folder(folder, **{"repo_id": folder.name, **hub_options})

    def _record(self, folder: Path) -> None:
        """Write down shapes and dtypes of the base's tensors as they have been saved, perhaps after a cast."""
        infos = open_folder(folder.name, folder).infos
        base = {name.removeprefix("model."): info for name, info in infos.items() if part_of(name) == "base"}
        self.config.tensors = {name: [list(info.shape), dtype_name(info.dtype)] for name, info in base.items()}
        self.config.save_pretrained(folder)

    def _keep_tokenizers(self, staging: Path, folder: Path) -> None:
        """Tokenizers that tasks have of their own belong to the repo; the shared one is saved by its owner."""
        own = {entry["tokenizer"] for entry in self.config.tasks.values() if entry["tokenizer"]}
        own = {path for path in own if not (folder / path).is_dir()}
        if own and str(self.config.name_or_path):  # an empty path would be the current directory
            source = side_files_of(str(self.config.name_or_path))
            for path in own:
                copy_side_files(source / path, staging / path)

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        """The configuration of a repo: the default task's labels, and where to find the classes."""
        generation_config = getattr(self.model, "generation_config", None)
        self.config.apply_task(self.config.default_task)
        self._switch.use_generation_config(self.config.default_task)
        self.config.architectures = [type(self).__name__]
        self.config.auto_map = auto_map(type(self).__name__)
        try:
            yield
        finally:
            self.config.apply_task(self._active or self.config.default_task)
            if generation_config is not None:
                self.model.generation_config = generation_config

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Save and upload, with a model card of its own. The tokenizer is pushed by itself, or use `emr-hf push`.

        Args:
            repo_id: such as `"me/bert-emr"`.
            kwargs: as [`push_folder`], and `max_shard_size`.
        """
        return push_model(self, repo_id, **kwargs)

    # Tasks

    @property
    def tasks(self) -> list[str]:
        """The tasks' names, in the order of merging."""
        return list(self.config.tasks)

    @property
    def active_task(self) -> str | None:
        """The task whose weights the model holds now; `None` before the first."""
        return self._active

    @torch.compiler.disable
    def set_task(self, task: str) -> EMRMergedModel:
        """Become a task: rebuild the merged weights in place, install its private tensors and labels.

        Args:
            task: one of `self.tasks`.

        Returns:
            the model itself.

        Raises:
            UnknownTaskError: with the nearest names.
            OffloadedError: part of the model is offloaded; nothing has been changed.
            RepoError: a file that the model is mapped from is not what it was; load the model again.
        """
        self.config.entry(task)
        with self._lock:
            if task != self._active or self._half_switched:
                self._check_in_memory(task)
                self._activate(task)
        return self

    def keep_ready(self, count: int) -> EMRMergedModel:
        """Hold the weights of the last `count` tasks, so that a switch back to one of them only changes pointers.

        Each beside the active one takes a model's memory, and the parameters' addresses are no longer always the same.

        Args:
            count: tasks, the active one among them; 1, as after loading, rebuilds in place.

        Returns:
            the model itself.
        """
        if count < 1:
            raise OptionError(f"keep_ready({count}): expected at least 1, the active task")
        with self._lock:
            self.set_task(self._active or self.config.default_task)
            self._switch.keep_ready(count, self._active)
        return self

    def prefetch(self, task: str) -> None:
        """Rebuild a task's weights in the background, for a `set_task` to come.

        Args:
            task: one of `self.tasks`.

        Raises:
            UnknownTaskError: with the nearest names.
            OptionError: there is no room for it beside the active task: see [`EMRMergedModel.keep_ready`].
        """
        key = self.config.entry(task)["key"]
        if self._switch.ready is None:
            raise OptionError("prefetch: no room beside the active task, call keep_ready(2) or more first")
        if task != self._active:
            self._switch.ready.prefetch(key)

    @contextmanager
    def use_task(self, task: str) -> Iterator[EMRMergedModel]:
        """Be a task inside a `with` block, and what the model was before afterwards.

        Other threads' calls wait for the end of the block: do not wait in it for a thread that uses the model.

        Example:

        ```python
        with model.use_task("sst2"):
            model(**batch)
        ```
        """
        with self._lock:
            before = self._active
            self.set_task(task)
            try:
                yield self
            finally:
                if before is not None:
                    self.set_task(before)

    def _by_task(self, groups: mixed.Groups, run: Callable[[list[int]], T]) -> list[T]:
        """Be each task in turn, call `run(rows)` on it, and be what the model was before afterwards."""
        with self._lock:
            if self._half_switched or groups.keys() != {self._active}:
                self._check_in_memory()
            before, settings = self._active or self.config.default_task, getattr(self.model, "generation_config", None)
            try:
                results = []
                for task, rows in groups.items():
                    self._become(task)
                    results.append(run(rows))
                return results
            finally:
                self._is_base = False
                self.set_task(before)
                if settings is not None:  # they may have been changed since the switch
                    self.model.generation_config = settings

    @torch.compiler.disable
    def _make_whole(self) -> None:
        """Finish what interrupted a switch has left half done: become the active task."""
        if self._half_switched and not self._is_base:
            self.set_task(self._active or self.config.default_task)

    def _become(self, task: str) -> None:
        """`set_task`, or the base: no task, so that the next `set_task` switches, whichever it asks for."""
        if task != mixed.BASE:
            self.set_task(task)
            return
        self._half_switched = True
        with self._switch.reading():
            self._switch.become_base()
        self._active, self._is_base = self.config.default_task, True

    def _check_vectors(self) -> None:
        if self.config.vectors is not None and "peft_config" in vars(self):
            raise EMRError(
                "this model merges (IA)³ vectors, whose layers PEFT takes for its own: no other adapter can be put on "
                "it; load the repo again, and put the adapter on what merge_and_unload(task) gives"
            )

    def _check_in_memory(self, task: str | None = None) -> None:
        self._check_vectors()
        if getattr(self, "_is_replica", False):
            raise EMRError("nn.DataParallel copies the active task only: set_task before the call, for all rows")
        if not isinstance(getattr(self, "emr", None), EMRBank):
            raise EMRError("merge_and_unload() has taken this model apart: load the repo again")
        if away := self._switch.offloaded(task):
            raise OffloadedError(
                f"{len(away)} tensors are offloaded ({away[0]}, ...) and cannot be switched: load the model without "
                "offloading, or export the task (emr-hf export) and offload that"
            )
        self._switch.check_files()

    def _activate(self, task: str) -> None:
        self._half_switched, self._is_base = True, False  # until the end: an interrupted switch is made good
        with self._switch.reading():
            self._switch.become(task)
        self._active, self._half_switched = task, False

    def _replicate_for_data_parallel(self) -> EMRMergedModel:
        replica = super()._replicate_for_data_parallel()
        replica._lock = mixed.Lock()  # replicas run side by side, perhaps while this model's lock is held
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMRMergedModel:
        """Move or cast. After a cast the weights are rebuilt from the cast base, as a load in that dtype has them."""
        before, was_half = self.dtype, self._half_switched
        if self._switch.ready is not None:
            self._switch.ready.clear()
        self._half_switched = self._active is not None  # until the end
        with self._switch.reading():
            super()._apply(fn, recurse)
        if self._switch.files:
            self._switch.watch()
        if self._active is not None and self.dtype != before:
            self._activate(self._active)
        else:
            self._half_switched = was_half
        return self

    def merge_and_unload(self, task: str | None = None) -> PreTrainedModel:
        """Give the wrapped model with a task's weights, and free everything else. This model is of no use afterwards.

        Args:
            task (*optional*): the active one by default.

        Returns:
            a plain model of class `config.base_architecture`, bit for bit the live model on that task.
        """
        self.set_task(task or self._active or self.config.default_task)
        if self.config.vectors is not None:
            unload(self.model)
        model = self.model.requires_grad_(True)
        self.emr = self._switch.bank = nn.Module()  # type: ignore[assignment]
        self._switch.files = ()
        self._active = None
        return model

    # Delegation

    @DelegatedSignature
    def forward(self, *args: Any, emr_task: Any = None, emr_pad: bool | None = None, **kwargs: Any) -> Any:
        """The wrapped model's `forward`.

        With a task for every row, the rows of each task go through the model together, and the model is on the task
        that it was on afterwards. What comes out is in row order, for each row what its task alone gives, to rounding;
        caches, and what else has no rows, are left out. The loss is the mean over all labels of the batch that are not
        -100 (over rows where labels are no classes). Tensors with as many rows as the batch, also in lists, tuples and
        dicts, are split; all else is given to every task. Models that pack several rows' images into one tensor cannot
        be split.

        Args:
            emr_task (*optional*): switch to this task first; it stays active. Or a task for every row: a list of
                names, or a list, array or tensor `(rows,)` of indices into `self.tasks`; `"__base__"` or -1 for the
                base's weights, with the default task's private tensors (such as its head) and labels.
            emr_pad (*optional*): with a task for every row, fill up `logits` with -inf to the width of the widest head
                of all tasks. Else, where the heads of a batch differ, `logits` is a list of a tensor for each row.
            args, kwargs: the wrapped model's.

        Raises:
            OptionError: not one task for every row, a cache of keys and values with them, or `"__base__"` (or -1) of a
                repo of method `"levels"`, which has no base.
            UnknownTaskError: with the nearest names.
            OffloadedError: the model was offloaded after loading, so its hooks hold the base's weights.
            EMRError: a loss is asked for in training mode, but nothing can be trained; or gradients are wanted of a
                batch of several tasks.
        """
        if emr_task is not None:
            return self._forward_as(emr_task, self.emr_pad if emr_pad is None else emr_pad, args, kwargs)
        if torch.compiler.is_compiling():
            if self._half_switched:
                self._make_whole()
            return self.model(*args, **kwargs)
        with self._lock:
            self._make_whole()
            self._check_forward(kwargs)
            return self.model(*args, **kwargs)

    @torch.compiler.disable(recursive=False)  # the wrapped model's forward is compiled, switches are not
    def _forward_as(self, emr_task: Any, emr_pad: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        with self._lock:
            if mixed.is_per_row(emr_task):
                self._check_forward(kwargs)
                return mixed.forward(self, emr_task, emr_pad, args, kwargs)
            self.set_task(emr_task)
            self._check_forward(kwargs)
            return self.model(*args, **kwargs)

    def _check_forward(self, kwargs: dict[str, Any]) -> None:
        self._check_vectors()
        if hasattr(self, "_hf_hook") and any(getattr(m, attr).is_meta for m, attr in self._switch.sites.values()):
            raise OffloadedError(
                "this model was offloaded after loading, with the base's weights instead of the task's: offload "
                "model.model, or what merge_and_unload(task) gives"
            )
        asks_loss = self.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
        if asks_loss and not any(parameter.requires_grad for parameter in self.parameters()):
            raise EMRError(
                "the merged weights are frozen, as every switch rebuilds them: train an adapter on top (PEFT), or "
                "what merge_and_unload(task) gives"
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise EMRError("a merged model's embeddings belong to all its tasks: merge_and_unload a task to change them")

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise EMRError("a merged model's embeddings belong to all its tasks: merge_and_unload a task to resize them")

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.get_encoder(*args, **kwargs)

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.get_decoder(*args, **kwargs)


def _take_into_memory(model: EMRMergedModel, merged: Collection[int] | None) -> None:
    """Copy what may be mapped from a file, so that nothing depends on it.

    Args:
        model: the model.
        merged: ids of the parameters that switches write, where the bank stays mapped and with it the base in them:
            then what no switch writes is copied, so that a forward reads no file.
    """
    part = model if merged is None else model.model
    for tensor in (*part.parameters(), *part.buffers()):
        if tensor.device.type == "cpu" and (merged is None or id(tensor) not in merged):
            tensor.data = tensor.data.clone()


def _save_base_weights(model: EMRMergedModel, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """What is saved as the model's weights is the base; private tensors are saved in the bank only."""
    if model._active is None:
        return  # not loaded yet: transformers asks for the names of all that needs memory
    for name, merged in owners_of(model._switch, model).items():
        if prefix + name in state_dict:
            state_dict[prefix + name] = model.emr.base.get(merged)
    for name in model._switch.private_names:
        state_dict.pop(f"{prefix}model.{name}", None)


def _restore_base(
    model: EMRMergedModel, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Before `load_state_dict`: what it leaves alone must be the base too, not some task's weights."""
    if local_metadata.get("assign_to_params_buffers"):  # what we rebuild in place must be ours
        ours = [name for name in state_dict if name.startswith(f"{prefix}model.")]
        state_dict.update({name: state_dict[name].clone() for name in ours})
    if model._active is not None:
        model._half_switched = True  # until the task is rebuilt, which an error in between prevents
        with model._switch.reading():
            model._switch.restore_base()


def _take_loaded_base(model: EMRMergedModel, incompatible_keys: Any) -> None:
    """After `load_state_dict` the live weights are the base: keep them as such and rebuild the task."""
    private = tuple(f"model.{name}" for name in model._switch.private_names)
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not key.endswith(private)] if private else missing
    if model._active is None:
        return
    model._switch.take_base()
    model._activate(model._active)
