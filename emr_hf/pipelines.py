"""Pipelines that take the task with the call: `pipe(text, emr_task="mnli")`.

The stock pipelines work too, on the model's active task; given an unknown argument they hand it to the tokenizer.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    ImageClassificationPipeline,
    TextClassificationPipeline,
    TokenClassificationPipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY


class _PerCallTask:
    """Adds `emr_task` to a pipeline. As in `forward`, the task stays active afterwards."""

    model: Any
    tokenizer: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._tokenizers: dict[str | None, Any] = {None: self.tokenizer}

    def _sanitize_parameters(self, emr_task: str | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        steps = super()._sanitize_parameters(**kwargs)  # type: ignore[misc]
        if emr_task is None:
            return steps
        self.model.config.entry(emr_task)
        preprocess, forward, postprocess = ({**step, "emr_task": emr_task} for step in steps)
        return preprocess, forward, postprocess

    def preprocess(self, inputs: Any, *args: Any, emr_task: str | None = None, **kwargs: Any) -> Any:
        self._use(emr_task)
        return super().preprocess(inputs, *args, **kwargs)  # type: ignore[misc]

    def _forward(self, model_inputs: Any, emr_task: str | None = None, **kwargs: Any) -> Any:
        self._use(emr_task)
        return super()._forward(model_inputs, **kwargs)  # type: ignore[misc]

    def postprocess(self, model_outputs: Any, *args: Any, emr_task: str | None = None, **kwargs: Any) -> Any:
        self._use(emr_task)  # labels are read from the model's configuration
        return super().postprocess(model_outputs, *args, **kwargs)  # type: ignore[misc]

    def _use(self, emr_task: str | None) -> None:
        """Switch the model, and the tokenizer where the task has its own."""
        if emr_task is not None:
            self.model.set_task(emr_task)
        folder = self.model.config.entry(self.model.active_task)["tokenizer"]
        if folder not in self._tokenizers:
            repo = self.model.config.name_or_path
            self._tokenizers[folder] = AutoTokenizer.from_pretrained(repo, subfolder=folder)
        self.tokenizer = self._tokenizers[folder]


class EMRTextClassificationPipeline(_PerCallTask, TextClassificationPipeline):  # type: ignore[misc]
    """`TextClassificationPipeline` with `emr_task` in every call."""


class EMRTokenClassificationPipeline(_PerCallTask, TokenClassificationPipeline):  # type: ignore[misc]
    """`TokenClassificationPipeline` with `emr_task` in every call."""


class EMRImageClassificationPipeline(_PerCallTask, ImageClassificationPipeline):  # type: ignore[misc]
    """`ImageClassificationPipeline` with `emr_task` in every call."""


def register() -> None:
    """Make `pipeline("emr-text-classification", model=repo)` and its siblings known to transformers."""
    for task, pipeline_class, auto_class, kind in (
        ("emr-text-classification", EMRTextClassificationPipeline, AutoModelForSequenceClassification, "text"),
        ("emr-token-classification", EMRTokenClassificationPipeline, AutoModelForTokenClassification, "text"),
        ("emr-image-classification", EMRImageClassificationPipeline, AutoModelForImageClassification, "image"),
    ):
        if task not in PIPELINE_REGISTRY.supported_tasks:
            PIPELINE_REGISTRY.register_pipeline(task, pipeline_class, auto_class, type=kind)
