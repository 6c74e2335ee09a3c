"""Merge finetunes of one pretrained model into one, and become any of its tasks (EMR-Merging, arXiv 2405.17461)."""

from __future__ import annotations

import importlib
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .after_import import after_import

if TYPE_CHECKING:
    from .adapters.lora import LoraReport
    from .adapters.tuner import EMRPeftConfig as EMRPeftConfig
    from .alignment.aligning import AlignmentPlan, align
    from .alignment.averaging import average
    from .alignment.folders import align_recipe
    from .alignment.layout import Symmetries
    from .alignment.symmetry import symmetries, verify
    from .alignment.zipping import zip_models
    from .checking import check
    from .configuration import EMRConfig
    from .editing import add_task, remove_task
    from .errors import (
        ActivationError,
        CheckpointError,
        EMRError,
        MismatchError,
        NonFiniteError,
        OffloadedError,
        OptionError,
        ProcessError,
        RecipeError,
        RepoError,
        SymmetryError,
        TensorError,
        UnknownTaskError,
    )
    from .evaluation import Evaluation, evaluate_task
    from .exporting import export
    from .hub import push_folder
    from .in_memory import Merge, merge_state_dicts
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

__version__ = "0.1.0"

# Public name -> where it is. Imported when first asked for: `emr-hf --help` needs neither torch nor transformers.
_PLACES = {
    **dict.fromkeys(
        (
            "ActivationError",
            "CheckpointError",
            "EMRError",
            "MismatchError",
            "NonFiniteError",
            "OffloadedError",
            "OptionError",
            "ProcessError",
            "RecipeError",
            "RepoError",
            "SymmetryError",
            "TensorError",
            "UnknownTaskError",
        ),
        "errors",
    ),
    **dict.fromkeys(
        ("EMRImageClassificationPipeline", "EMRTextClassificationPipeline", "EMRTokenClassificationPipeline"),
        "pipelines",
    ),
    "AlignmentPlan": "alignment.aligning",
    "EMRConfig": "configuration",
    "EMRMergedModel": "modeling",
    "EMRPeftConfig": "adapters.tuner",
    "Evaluation": "evaluation",
    "Inspection": "inspection",
    "LoraReport": "adapters.lora",
    "Merge": "in_memory",
    "MergeReport": "report",
    "Plan": "plan",
    "Recipe": "recipe",
    "Symmetries": "alignment.layout",
    "TaskReport": "report",
    "add_task": "editing",
    "align": "alignment.aligning",
    "align_recipe": "alignment.folders",
    "average": "alignment.averaging",
    "check": "checking",
    "evaluate_task": "evaluation",
    "export": "exporting",
    "inspect": "inspection",
    "merge": "merging",
    "merge_recipe": "merging",
    "merge_state_dicts": "in_memory",
    "push_folder": "hub",
    "remove_task": "editing",
    "symmetries": "alignment.symmetry",
    "verify": "alignment.symmetry",
    "zip_models": "alignment.zipping",
}

__all__ = [
    "ActivationError",
    "AlignmentPlan",
    "CheckpointError",
    "EMRConfig",
    "EMRError",
    "EMRImageClassificationPipeline",
    "EMRMergedModel",
    "EMRTextClassificationPipeline",
    "EMRTokenClassificationPipeline",
    "Evaluation",
    "Inspection",
    "LoraReport",
    "Merge",
    "MergeReport",
    "MismatchError",
    "NonFiniteError",
    "OffloadedError",
    "OptionError",
    "Plan",
    "ProcessError",
    "Recipe",
    "RecipeError",
    "RepoError",
    "Symmetries",
    "SymmetryError",
    "TaskReport",
    "TensorError",
    "UnknownTaskError",
    "add_task",
    "align",
    "align_recipe",
    "average",
    "check",
    "evaluate_task",
    "export",
    "inspect",
    "merge",
    "merge_recipe",
    "merge_state_dicts",
    "push_folder",
    "remove_task",
    "symmetries",
    "verify",
    "zip_models",
    *(["EMRPeftConfig"] if find_spec("peft") else []),
]


def __getattr__(name: str) -> Any:
    # Beside the public names the classes of `auto`, one for each Auto class; only transformers knows the list.
    place = _PLACES.get(name, "auto" if name.startswith("EMRMergedModelFor") else None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{place}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


# What transformers and PEFT have to know of us these modules tell them when they are imported: once it is of use.
for _theirs, _ours in (
    ("transformers.models.auto.configuration_auto", "configuration"),
    ("transformers.models.auto.modeling_auto", "auto"),
    ("transformers.pipelines", "pipelines"),
    ("peft", "adapters.tuner"),
):
    after_import(_theirs, partial(importlib.import_module, f".{_ours}", __name__))
