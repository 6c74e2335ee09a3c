"""Pipelines that take the task with the call: `pipe(text, emr_task="mnli")`, or `pipe(texts, emr_task=[...])`.

The stock pipelines work too, on the model's active task; given an unknown argument they hand it to the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils.data import Dataset
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

from . import mixed
from .errors import OptionError

_ACTIVE = object()  # the task that the model is on, also in a pipeline that was made with a task of its own


class _PerCallTask:
    """Adds `emr_task` to a pipeline. As in `forward`, one task stays active afterwards.

    With a list of tasks, one for each of a list of inputs, the inputs of each task run together, through its own
    tokenizer, head and labels; results come as a list in the order of the inputs, and the model is on the task that it
    was on afterwards.
    """

    model: Any
    tokenizer: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._tokenizers: dict[str | None, Any] = {None: self.tokenizer}

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        emr_task, run = kwargs.get("emr_task"), super().__call__  # type: ignore[misc]
        if not mixed.is_per_row(emr_task):
            return run(inputs, *args, **kwargs)
        if isinstance(inputs, str) or not isinstance(inputs, (Sequence, Dataset)):
            raise OptionError(f"a list of tasks needs a list of inputs, got {type(inputs).__name__}")
        names = mixed.names_of(emr_task, self.model.config, len(inputs))  # type: ignore[arg-type]
        kwargs["emr_task"] = _ACTIVE
        with self.model._lock:
            groups = mixed.group_rows(names, self.model.active_task) if names else {}
            found = self.model._by_task(groups, lambda rows: run([inputs[row] for row in rows], *args, **kwargs))
        by_row = {row: result for rows, results in zip(groups.values(), found) for row, result in zip(rows, results)}
        return [by_row[row] for row in range(len(names))]

    def _sanitize_parameters(self, emr_task: Any = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        steps = super()._sanitize_parameters(**kwargs)  # type: ignore[misc]
        if emr_task is None:
            return steps
        if emr_task is _ACTIVE:
            emr_task = None
        else:
            self.model.config.entry(emr_task)
        preprocess, forward, postprocess = ({**step, "emr_task": emr_task} for step in steps)
        return preprocess, forward, postprocess

    def preprocess(self, inputs: Any, *args: Any, emr_task: str | None = None, **kwargs: Any) -> Any:
        self._use_tokenizer(emr_task)
        return super().preprocess(inputs, *args, **kwargs)  # type: ignore[misc]

    def _forward(self, model_inputs: Any, emr_task: str | None = None, **kwargs: Any) -> Any:
        with self._task(emr_task):
            return super()._forward(model_inputs, **kwargs)  # type: ignore[misc]

    def postprocess(self, model_outputs: Any, *args: Any, emr_task: str | None = None, **kwargs: Any) -> Any:
        self._use_tokenizer(emr_task)
        with self._task(emr_task):  # labels are read from the model's configuration
            return super().postprocess(model_outputs, *args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _task(self, emr_task: str | None) -> Iterator[None]:
        """No other thread switches inside the block; the task stays active after it."""
        with self.model._lock:
            if emr_task is not None:
                self.model.set_task(emr_task)
            yield

    def _use_tokenizer(self, emr_task: str | None) -> None:
        """That of the task where it has its own."""
        folder = self.model.config.entry(emr_task or self.model.active_task)["tokenizer"]
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


register()
