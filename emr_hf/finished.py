"""A finished repo as an input: what it has kept of its base and of its tasks, under the names of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import bits
from .adapters import ia3
from .adapters.delta import AdapterCheckpoint
from .adapters.layers import adapted_layers, plain_name
from .bits import StoredVector
from .checking import check_finetune, common_architecture, config_differences, fill_plan, finetune_of, use_vectors
from .checkpoint import Checkpoint, NamedTensors, build_skeleton
from .configuration import EMRConfig
from .errors import MismatchError
from .format import mask_name, model_name, private_name, rescaler_name, scale_name, tau_name
from .json_file import read_json
from .lowbit import BITS, Codes
from .opening import fetch_repo
from .plan import Plan
from .recipe import Recipe
from .repo import GENERATION_CONFIG, REPORT_NAME
from .report import MergeReport, read_tensors
from .sources import Source, open_source
from .storage import TensorInfo


class FinishedRepo:
    """A merged repo of either layout, its tensors by their headers.

    Args:
        repo: a folder or a Hub id.

    Raises:
        RepoError: it is no merged repo.

    Attributes:
        base_place, base_revision: where the base came from, or is.
        report: of the last merge.
    """

    def __init__(self, repo: str | Path):
        opened = fetch_repo(repo)
        self.folder, self.layout, self.config = opened.folder, opened.layout, opened.config
        self.storage, self._settings = opened.storage, opened.settings
        self.report = MergeReport.from_dict(self.config.report)
        self.report.keep_tensors(read_tensors(self.folder / REPORT_NAME))
        self.base_place, self.base_revision = self._place_of_base()

    def _place_of_base(self) -> tuple[str, str | None]:
        if self.layout == "model":
            return str(self.config.base_model_name_or_path), self.config.base_revision
        return str(self._settings["base_model_name_or_path"]), self._settings.get("revision")

    @cached_property
    def base(self) -> Source:
        """The base, in the repo or where the repo says it is."""
        place, revision = self.base_place, self.base_revision
        if self.layout == "peft":
            return open_source(f"{place}@{revision}" if revision else place, "base")
        # No folder: it is not the base's own, by which an adapter could be known to belong to it.
        return Source("base", place, self._plain_config(), self.storage, revision)

    def _plain_config(self) -> Any:
        config = deepcopy(self.config.base_config)
        config.architectures = [self.config.base_architecture]
        return config

    def plan(self, tasks: list[str], default_task: str, new: Source | None = None) -> Plan:
        """A plan with these tasks of the repo, and a new one."""
        sources = {task: self.source(task) for task in tasks}
        if new is not None:
            check_finetune(self.base, new)
            sources[new.label] = new
        dtype: Any = self.config.dtype
        skeleton = build_skeleton(sources[default_task], dtype)
        base = self._base_checkpoint(skeleton)
        plan = Plan(
            recipe=self._recipe(sources, default_task),
            base=base,
            finetunes={} if new is None else {new.label: finetune_of(new, skeleton, base)},
            architecture=common_architecture(sources),
            config=skeleton.config,
            skeleton=skeleton,
            dtype=dtype,
            save_as=self.layout,
            repo=self.folder,
        )
        if self.config.vectors is not None:
            use_vectors(plan, self._common_vectors(plan))
        plan.finetunes = {**{task: FinishedTask(sources[task], self, plan.base) for task in tasks}, **plan.finetunes}
        fill_plan(plan)
        plan.warnings = config_differences(plan, new.label) if new is not None else []
        return plan

    def task(self, task: str, skeleton: PreTrainedModel) -> FinishedTask:
        """What the repo has kept of a task, where weights are merged, under the names of a skeleton."""
        return FinishedTask(self.source(task), self, self._base_checkpoint(skeleton))

    def _base_checkpoint(self, skeleton: PreTrainedModel) -> NamedTensors:
        return FinishedBase(self.base, self.config) if self.layout == "model" else Checkpoint(self.base, skeleton)

    def _common_vectors(self, plan: Plan) -> dict[str, Any]:
        """Settings of the (IA)³ layers of the repo and of a new adapter together."""
        layers = [dict(adapted_layers(ia3.vector_skeleton(plan.skeleton, self.config.vectors)))]
        for task, checkpoint in plan.finetunes.items():
            if not (isinstance(checkpoint, AdapterCheckpoint) and checkpoint.kind == "IA3"):
                raise MismatchError(f"{task}: this repo merges (IA)³ vectors: only (IA)³ adapters can be added to it")
            layers.append(checkpoint.layers)
        settings = ia3.common_settings(layers)
        if settings is None:
            raise MismatchError(
                f"{next(iter(plan.finetunes))}: it scales the inputs of a module of which this repo scales the "
                "outputs, or the other way round"
            )
        return settings

    def source(self, task: str) -> Source:
        """A task as a finetune, with the configuration of a plain checkpoint."""
        entry = self.config.entry(task)
        config = self._plain_config()
        config.id2label = dict(entry["id2label"])
        config.label2id = {label: index for index, label in config.id2label.items()}
        config.problem_type = entry["problem_type"]
        folder = self.folder / (entry["tokenizer"] or "")
        return Source(task, entry["source"], config, self.storage, entry["revision"], folder)

    def _recipe(self, sources: dict[str, Source], default_task: str) -> Recipe:
        known = self.config.recipe
        return Recipe(
            base=known["base"],
            finetunes={task: source.name for task, source in sources.items()},
            method=self.config.method,
            rescale=known["rescale"],
            tau_dtype=self.config.tau_dtype,
            default_task=default_task,
            private=known.get("private", ()),
        )


class FinishedBase(NamedTensors):
    """The base in a repo, under the names it has without (IA)³ layers."""

    def __init__(self, source: Source, config: EMRConfig):
        super().__init__(source)
        prefix = model_name("")
        names = [name.removeprefix(prefix) for name in source.storage.infos if name.startswith(prefix)]
        self._stored = {
            plain_name(name) if config.vectors else name: model_name(name) for name in names if ia3.VECTOR not in name
        }
        self.infos = {name: source.storage.infos[stored] for name, stored in self._stored.items()}

    def read(self, name: str) -> Tensor:
        return self.source.storage.read(self._stored[name])


class FinishedTask(NamedTensors):
    """What a repo has kept of a task."""

    def __init__(self, source: Source, repo: FinishedRepo, base: NamedTensors):
        super().__init__(source)
        self._base, self._entry, self._storage = base, repo.config.entry(source.label), repo.storage
        self._folder, self._tau_dtype = repo.folder, repo.config.tau_dtype
        self._merged = set(repo.config.merged_parameters or [])
        self._private = {name: private_name(self.key, name) for name in self._entry["private"]}
        vectors = {name: TensorInfo(base.infos[name].shape, torch.float32) for name in self._merged}
        self.infos = {**base.infos, **vectors}
        self.infos |= {name: self._storage.infos[stored] for name, stored in self._private.items()}

    @property
    def key(self) -> str:
        """The task's key in the repo."""
        return str(self._entry["key"])

    @property
    def touched(self) -> Collection[str]:
        return {*self._merged, *self._private}

    @property
    def own(self) -> Collection[str]:
        return self._private.keys()

    @property
    def nbytes(self) -> int:
        names = [mask_name(self.key, name) for name in self._merged] + [*self._private.values()]
        return sum(self._storage.infos[name].nbytes for name in names)

    def extras(self) -> dict[str, Any]:
        settings = self._entry.get("generation_config")
        path = self._folder / GENERATION_CONFIG
        if settings is None and path.is_file():
            settings = read_json(path, self.source.label)
        own: dict[str, Any] = {name: self._entry[name] for name in ("adapter", "vectors") if name in self._entry}
        return {**own, "generation_config": settings}

    def deviation(self, name: str) -> Tensor | StoredVector:
        if name not in self._merged:
            return self._base.read(name)
        rescaler = self._storage.read(rescaler_name(self.key))
        return StoredVector(self._vector(name), self._storage.read(mask_name(self.key, name)), rescaler)

    def _vector(self, name: str) -> Tensor | Codes:
        stored = self._storage.read(tau_name(name))
        if scale_name(name) not in self._storage.infos:
            return stored
        scales, shape = self._storage.read(scale_name(name)), torch.Size(self.infos[name].shape)
        return Codes(stored, scales, BITS[self._tau_dtype], shape)

    def read(self, name: str) -> Tensor:
        """The task's tensor, a merged one rebuilt."""
        if name in self._private:
            return self._storage.read(self._private[name])
        known = self.deviation(name)
        if isinstance(known, Tensor):
            return known
        out = torch.empty(known.tau.shape, dtype=torch.float32)
        return bits.rebuild(self._base.read(name), known.tau, known.packed, known.rescaler, out=out)
