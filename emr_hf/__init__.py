"""Merge finetunes of one pretrained model into one, and become any of its tasks (EMR-Merging, arXiv 2405.17461)."""

from transformers.utils import is_peft_available

from . import auto, pipelines
from .adapters.lora import LoraReport
from .auto import HEAD_CLASSES
from .checking import check
from .configuration import EMRConfig
from .editing import add_task, remove_task
from .election import Merge, merge_state_dicts
from .errors import (
    CheckpointError,
    EMRError,
    MismatchError,
    NonFiniteError,
    OffloadedError,
    OptionError,
    RecipeError,
    RepoError,
    UnknownTaskError,
)
from .export import export
from .hub import push_folder
from .inspection import Inspection, inspect
from .merging import merge, merge_recipe
from .modeling import EMRMergedModel
from .pipelines import (
    EMRImageClassificationPipeline,
    EMRTextClassificationPipeline,
    EMRTokenClassificationPipeline,
)
from .plan import Plan
from .recipe import Recipe
from .report import MergeReport, TaskReport

_PEFT = []
if is_peft_available():
    from .adapters import tuner

    tuner.register()
    globals()["EMRPeftConfig"] = tuner.EMRPeftConfig
    _PEFT = ["EMRPeftConfig"]

__version__ = "0.1.0"

globals().update({head.__name__: head for head in HEAD_CLASSES.values()})
auto.register()
pipelines.register()

__all__ = [
    "CheckpointError",
    "EMRConfig",
    "EMRError",
    "EMRImageClassificationPipeline",
    "EMRMergedModel",
    "EMRTextClassificationPipeline",
    "EMRTokenClassificationPipeline",
    "Inspection",
    "LoraReport",
    "Merge",
    "MergeReport",
    "MismatchError",
    "NonFiniteError",
    "OffloadedError",
    "OptionError",
    "Plan",
    "Recipe",
    "RecipeError",
    "RepoError",
    "TaskReport",
    "UnknownTaskError",
    "add_task",
    "check",
    "export",
    "inspect",
    "merge",
    "merge_recipe",
    "merge_state_dicts",
    "push_folder",
    "remove_task",
    *_PEFT,
    *sorted(head.__name__ for head in HEAD_CLASSES.values()),
]
