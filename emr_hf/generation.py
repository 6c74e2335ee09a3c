"""Generation by the wrapped model."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig


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

    def generate(self, *args: Any, emr_task: str | None = None, **kwargs: Any) -> Any:
        """The wrapped model's `generate`; `emr_task` switches first."""
        if emr_task is not None:
            self.set_task(emr_task)  # type: ignore[attr-defined]
        return self.model.generate(*args, **kwargs)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Reads the repo's settings, which are the default task's, after the task has been set."""
        super().adjust_generation_fn(*args, **kwargs)  # type: ignore[misc]
        self._switch.use_generation_config(self.active_task)  # type: ignore[attr-defined]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.prepare_inputs_for_generation(*args, **kwargs)
