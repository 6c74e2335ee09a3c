"""EMRConfig: what a merged repo says of itself in config.json."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .errors import OptionError, RepoError, UnknownTaskError, one_line
from .format import FORMAT_VERSION, MODEL_TYPE
from .schema import check_configuration, check_version

# Fields that both configurations have and that are about the model as a whole.
_SHARED_FLAGS = ("output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward")


class EMRConfig(PreTrainedConfig):
    """Configuration of an [`EMRMergedModel`].

    Attributes that a task has (`id2label`, `num_labels`, `problem_type`) are those of the active task; those that only
    the wrapped model knows (`hidden_size`, `vocab_size`, ...) are read from `base_config`.

    Args:
        base_config: configuration of the wrapped model.
        base_architecture: its class, such as `"BertForSequenceClassification"`.
        base_model_name_or_path, base_revision: where the base came from.
        tasks: task -> `key` (its name in buffers and files), `index` (the order of merging), `id2label`,
            `problem_type`, `private` (name -> [shape, dtype]), `source`, `revision`, `tokenizer` (its folder in the
            repo, or `None` for the shared one), `generation_config` (`None` where all tasks have the same);
            where vectors are merged also `adapter` (settings of the (IA)³ adapter it was) and `vectors` (their names).
        default_task: active after loading.
        merged_parameters: names of the merged tensors.
        vectors: settings of the (IA)³ layers in the wrapped model whose vectors are merged; `None` where weights are.
        tau_dtype: what the unified vector is stored in.
        method: how vector and masks came about; with `"levels"` the base is not the pretrained model.
        recipe: what was merged, as in a recipe file, with published names.
        report: the numbers of [`MergeReport`].
        emr_format: version of the repo's format.
        tensors: name -> [shape, dtype] of the base's tensors in the repo, or beside an adapter of the merged ones;
            `None` in repos of older versions.

    Raises:
        RepoError: `from_dict`, and so whatever reads a configuration, of a field that is wrong.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "base_config": SubConfigSpec(AutoConfig, model_type="bert")
    }

    base_config: Any = None
    base_architecture: str | None = None
    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    tasks: Any = None
    default_task: str = ""
    merged_parameters: list[str] | None = None
    vectors: Any = None
    tau_dtype: str = "float32"
    method: str = "emr"
    recipe: Any = None
    report: Any = None
    emr_format: int = FORMAT_VERSION
    tensors: Any = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        place = f"{kwargs['name_or_path']}: " if kwargs.get("name_or_path") else ""
        try:
            check_configuration(config_dict)
            return super().from_dict(config_dict, **kwargs)
        except RepoError as error:
            raise RepoError(f"{place}{error}") from None
        except (ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
            raise RepoError(f"{place}transformers cannot use the configuration: {one_line(error)}") from error

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            content, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:  # it takes any JSON
            raise RepoError(f"{pretrained_model_name_or_path}: cannot read config.json: {one_line(error)}") from error
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))  # for messages; it is recorded anyway
        return content, kwargs

    def __post_init__(self, **kwargs: Any) -> None:
        check_version(self.emr_format)
        super().__post_init__(**kwargs)
        # JSON knows no integer keys and is written sorted: restore both.
        tasks = sorted((self.tasks or {}).items(), key=lambda item: item[1]["index"])
        self.tasks = {task: {**entry, "id2label": _int_keys(entry["id2label"])} for task, entry in tasks}
        for record in (self.recipe, self.report):
            if record is not None:
                record["tasks"] = {task: record["tasks"][task] for task in self.tasks}
        if self.recipe is not None:
            self.recipe = {name: self.recipe[name] for name in sorted(self.recipe, key=_recipe_order)}
        self.merged_parameters = self.merged_parameters or []
        vars(self.base_config).pop("auto_map", None)  # code of others, which is not in this repo
        self.is_encoder_decoder = self.base_config.is_encoder_decoder
        if self.tasks:
            self.default_task = self.default_task or next(iter(self.tasks))
            self.apply_task(self.default_task)

    def __getattr__(self, name: str) -> Any:
        # Only called for what the wrapper's configuration lacks.
        if name.startswith("_") or name in self.sub_configs_defaults or "base_config" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # What is read from the wrapped model's configuration is written there too.
        base = self.__dict__.get("base_config")
        if isinstance(base, PreTrainedConfig) and "_post_init_done" in self.__dict__:
            if name == "num_labels":
                raise OptionError("num_labels belongs to each task of a merged model and cannot be set for all")
            if name in _SHARED_FLAGS:
                setattr(base, name, value)
            elif name not in _own_names() and not name.startswith("_") and hasattr(base, name):
                setattr(base, name, value)
                return
        super().__setattr__(name, value)

    def entry(self, task: object) -> dict[str, Any]:
        """What is recorded of a task.

        Raises:
            UnknownTaskError: with the nearest names.
        """
        if not isinstance(task, str) or task not in self.tasks:
            raise UnknownTaskError(task, self.tasks)
        return self.tasks[task]

    def apply_task(self, task: str) -> None:
        """Take over the task's labels and problem type, here and in `base_config`."""
        entry = self.entry(task)
        for config in (self, self.base_config):
            config.id2label = copy.deepcopy(entry["id2label"])
            config.label2id = {label: index for index, label in entry["id2label"].items()}
            config.problem_type = entry["problem_type"]

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        return self.base_config.get_text_config(*args, **kwargs)

    def _get_generation_parameters(self) -> dict[str, Any]:
        return self.base_config._get_generation_parameters()


def task_entry(config: PreTrainedConfig, **entry: Any) -> dict[str, Any]:
    """A value of `EMRConfig.tasks`, with what follows the task taken from the finetune's configuration."""
    return {"id2label": dict(config.id2label or {}), "problem_type": config.problem_type, **entry}


@functools.cache
def _own_names() -> set[str]:
    """Attributes that the wrapper's configuration has itself."""
    return {f.name for f in dataclasses.fields(EMRConfig)} | set(dir(PreTrainedConfig))


def _recipe_order(field_name: str) -> tuple[int, str]:
    return ["base", "tasks", field_name].index(field_name), field_name


def _int_keys(id2label: dict[Any, str]) -> dict[int, str]:
    return {int(index): label for index, label in id2label.items()}


def register() -> None:
    """Make `AutoConfig` know merged repos."""
    AutoConfig.register(EMRConfig.model_type, EMRConfig, exist_ok=True)


register()
