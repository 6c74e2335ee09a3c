"""Generation by the wrapped model."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from . import mixed


class DelegatedGeneration:
    """Generation by the wrapped model, whose caches and inputs are its own."""

    model: Any

    @property
    def generation_config(self) -> GenerationConfig:
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if "model" in self._modules:  # type: ignore[attr-defined]
            self.model.generation_config = value

    def generate(self, *args: Any, emr_task: Any = None, **kwargs: Any) -> Any:
        """The wrapped model's `generate`, with the model's lock held.

        Args:
            emr_task (*optional*): switch to this task first; it stays active. Or a task for every row, as in
                [`EMRMergedModel.forward`]: sequences come in row order, `num_return_sequences` of a row one after the
                other, filled up on the right with `pad_token_id`; each task generates with its own settings.
            args, kwargs: the wrapped model's.

        Raises:
            OptionError: a task for every row together with `streamer`, `past_key_values` or
                `return_dict_in_generate`, or not one for every row.
        """
        with self._lock:  # type: ignore[attr-defined]
            if mixed.is_per_row(emr_task):
                return mixed.generate(self, emr_task, args, kwargs)
            if emr_task is not None:
                self.set_task(emr_task)  # type: ignore[attr-defined]
            self._make_whole()  # type: ignore[attr-defined]
            return self.model.generate(*args, **kwargs)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Reads the repo's settings, which are the default task's, after the task has been set."""
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]
        self._switch.use_generation_config(self.active_task)  # type: ignore[attr-defined]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.prepare_inputs_for_generation(*args, **kwargs)
