"""Tasks added to and removed from a finished repo, without the finetunes it was made of."""

from __future__ import annotations

import json
from collections.abc import Collection
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME

from . import bits
from .adapters import ia3
from .adapters.delta import AdapterCheckpoint
from .adapters.layers import plain_name
from .bits import StoredVector
from .checking import (
    bound,
    check_finetune,
    check_space,
    common_architecture,
    config_differences,
    fill_plan,
    finetune_of,
    use_vectors,
)
from .checkpoint import Checkpoint, build_skeleton
from .configuration import EMRConfig, repo_config
from .errors import MismatchError, OptionError, UnknownTaskError
from .merging import elect, write_repo
from .plan import Plan
from .recipe import Recipe
from .repo import (
    GENERATION_CONFIG,
    WeightsWriter,
    check_target,
    fetch_repo,
    layout_of,
    mask_name,
    model_name,
    open_repo,
    private_name,
    rescaler_name,
    tau_name,
)
from .report import MergeReport
from .sources import Reference, Source, open_input, open_source
from .storage import TensorInfo


def add_task(
    repo: str | Path,
    task: str,
    finetune: Reference,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool | None = None,
) -> MergeReport:
    """Add a task to a merged repo, whose finetunes need not be there any more.

    The election is held again between what the repo has kept of each old task, `lambda M tau`, and the new task
    vector. So this is not the merge of all finetunes: an old task that lost an element in the first merge cannot win
    it back, and each loses a little more. The report says at most how much (`lost`).

    Args:
        repo: a merged repo, of either layout: a folder or a Hub id.
        task: name of the new task.
        finetune: as for [`merge`].
        out: folder of the changed repo, which may be `repo` itself. It appears complete or not at all.
        overwrite (*optional*): replace a merged repo at `out`.
        progress (*optional*): as for [`merge`].

    Raises:
        OptionError: the repo has a task of that name.
        EMRError: as for [`merge`].
    """
    check_target(Path(out), overwrite)
    old = _Repo(fetch_repo(repo))
    if task in old.config.tasks:
        raise OptionError(f"{task!r} is a task of {repo} already: choose another name, or remove it first")
    source = bound(open_input(finetune, task), old.base)
    plan = old.plan([*old.config.tasks], old.config.default_task, source)
    check_space(plan, Path(out))
    return write_repo(plan, out, overwrite, lambda writer: _keep_account(old.report, elect(plan, writer, progress)))


def remove_task(
    repo: str | Path,
    task: str,
    out: str | Path,
    *,
    default_task: str | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Remove a task from a merged repo. The others stay as they are, to the bit: nothing is elected again.

    Args:
        repo: a merged repo, of either layout: a folder or a Hub id.
        task: the task to remove.
        out, overwrite: as for [`add_task`].
        default_task (*optional*): active after loading; the repo's, or the first one left, by default.

    Raises:
        UnknownTaskError: the repo has no such task.
        OptionError: it is the only one.
    """
    check_target(Path(out), overwrite)
    old = _Repo(fetch_repo(repo))
    old.config.entry(task)
    tasks = [name for name in old.config.tasks if name != task]
    if not tasks:
        raise OptionError(f"{task!r} is the only task of {repo}: a merge of nothing is the base")
    if default_task is not None and default_task not in tasks:
        raise UnknownTaskError(default_task, tasks)
    kept_default = old.config.default_task if old.config.default_task in tasks else tasks[0]
    plan = old.plan(tasks, default_task or kept_default)
    check_space(plan, Path(out))
    return write_repo(plan, out, overwrite, lambda writer: _copy_merge(old, plan, writer))


def _keep_account(before: MergeReport, report: MergeReport) -> MergeReport:
    """Count an old task's losses from its first merge, of which only what it kept was elected now."""
    for task, old in before.tasks.items():
        new = report.tasks[task]
        length = old.length or new.length or 1.0
        lost = (old.lost or 0.0) + new.relative_error * (new.length or 0.0) / length
        kept = replace(old, rescaler=new.rescaler, density=new.density, lost=lost, length=length)
        report.tasks[task] = replace(kept, private_elements=new.private_elements)
    report.bytes_finetunes = before.bytes_finetunes + sum(
        numbers.nbytes for task, numbers in report.tasks.items() if task not in before.tasks
    )
    return report


def _copy_merge(old: _Repo, plan: Plan, writer: WeightsWriter) -> MergeReport:
    """Copy the unified vector and the masks of the tasks that stay."""
    for name in plan.merged:
        if plan.save_as == "model":
            writer.view(model_name(name)).copy_(plan.base.read(name))
        writer.view(tau_name(name)).copy_(old.storage.read(tau_name(name)))
        for task, key in plan.task_keys.items():
            stored = mask_name(old.config.entry(task)["key"], name)
            writer.view(mask_name(key, name)).copy_(old.storage.read(stored))
    gone = [numbers for task, numbers in old.report.tasks.items() if task not in plan.finetunes]
    return replace(
        old.report,
        tasks={task: old.report.tasks[task] for task in plan.tasks},
        bytes_out=plan.bytes_out,
        bytes_modulators=plan.bytes_modulators,
        bytes_finetunes=old.report.bytes_finetunes - sum(numbers.nbytes for numbers in gone),
        warnings=[],
    )


class _Repo:
    """A merged repo as the input of another merge."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = repo_config(folder)
        self.layout = str(layout_of(folder))
        self.storage = open_repo(folder)
        self.report = MergeReport.from_dict(self.config.report)
        self.base = self._open_base()

    def _open_base(self) -> Source:
        config = self.config
        name, revision = str(config.base_model_name_or_path), config.base_revision
        if self.layout == "peft":
            settings = json.loads((self.folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
            place = settings["base_model_name_or_path"]
            return open_source(f"{place}@{settings['revision']}" if settings.get("revision") else place, "base")
        # No folder: it is not the base's own, by which an adapter could be known to belong to it.
        return Source("base", name, self._plain_config(), self.storage, revision)

    def _plain_config(self) -> Any:
        config = deepcopy(self.config.base_config)
        config.architectures = [self.config.base_architecture]
        return config

    def plan(self, tasks: list[str], default_task: str, new: Source | None = None) -> Plan:
        """A plan with these tasks of the repo, and a new one."""
        sources = {task: self._source(task) for task in tasks}
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
        plan.finetunes = {**{task: _RepoTask(sources[task], self, plan.base) for task in tasks}, **plan.finetunes}
        fill_plan(plan)
        plan.warnings = config_differences(plan, new.label) if new is not None else []
        return plan

    def _base_checkpoint(self, skeleton: PreTrainedModel) -> Checkpoint:
        return _RepoBase(self.base, self.config) if self.layout == "model" else Checkpoint(self.base, skeleton)

    def _common_vectors(self, plan: Plan) -> dict[str, Any]:
        """Settings of the (IA)³ layers of the repo and of a new adapter together."""
        models = [ia3.vector_skeleton(plan.skeleton, self.config.vectors)]
        for task, checkpoint in plan.finetunes.items():
            if not (isinstance(checkpoint, AdapterCheckpoint) and checkpoint.kind == "IA3"):
                raise MismatchError(f"{task}: this repo merges (IA)³ vectors: only (IA)³ adapters can be added to it")
            models.append(checkpoint.model)
        settings = ia3.common_settings(models)
        if settings is None:
            raise MismatchError(
                f"{next(iter(plan.finetunes))}: it scales the inputs of a module of which this repo scales the "
                "outputs, or the other way round"
            )
        return settings

    def _source(self, task: str) -> Source:
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
            rescale=known["rescale"],
            tau_dtype=self.config.tau_dtype,
            default_task=default_task,
            private=known.get("private", ()),
        )


class _RepoBase(Checkpoint):
    """The base in a repo, under the names it has without (IA)³ layers."""

    def __init__(self, source: Source, config: EMRConfig):
        self.source, self.scratch, self.unexpected = source, None, []
        prefix = model_name("")
        names = [name.removeprefix(prefix) for name in source.storage.infos if name.startswith(prefix)]
        self._stored = {
            plain_name(name) if config.vectors else name: model_name(name) for name in names if ia3.VECTOR not in name
        }
        self.infos = {name: source.storage.infos[stored] for name, stored in self._stored.items()}

    @property
    def largest_conversion(self) -> int:
        return 0

    def check_tied(self) -> None:
        """They are stored once."""

    def read(self, name: str) -> Tensor:
        return self.source.storage.read(self._stored[name])


class _RepoTask(Checkpoint):
    """What a repo has kept of a task."""

    def __init__(self, source: Source, repo: _Repo, base: Checkpoint):
        self.source, self.scratch, self.unexpected = source, None, []
        self._base, self._entry, self._storage = base, repo.config.entry(source.label), repo.storage
        self._folder = repo.folder
        self._merged = set(repo.config.merged_parameters or [])
        self._private = {name: private_name(self.key, name) for name in self._entry["private"]}
        infos = {name: self._storage.infos[tau_name(name)] for name in self._merged}
        self.infos = {**base.infos, **{name: TensorInfo(info.shape, torch.float32) for name, info in infos.items()}}
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

    @property
    def largest_conversion(self) -> int:
        return 0

    def check_tied(self) -> None:
        """They are stored once."""

    def extras(self) -> dict[str, Any]:
        settings = self._entry.get("generation_config")
        path = self._folder / GENERATION_CONFIG
        if settings is None and path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
        own: dict[str, Any] = {name: self._entry[name] for name in ("adapter", "vectors") if name in self._entry}
        return {**own, "generation_config": settings}

    def deviation(self, name: str) -> Tensor | StoredVector:
        if name not in self._merged:
            return self._base.read(name)
        rescaler = self._storage.read(rescaler_name(self.key))
        return StoredVector(
            self._storage.read(tau_name(name)), self._storage.read(mask_name(self.key, name)), rescaler
        )

    def read(self, name: str) -> Tensor:
        """The task's tensor, a merged one rebuilt."""
        if name in self._private:
            return self._storage.read(self._private[name])
        known = self.deviation(name)
        if isinstance(known, Tensor):
            return known
        out = torch.empty(known.tau.shape, dtype=torch.float32)
        return bits.rebuild(self._base.read(name), known.tau, known.packed, known.rescaler, out=out)
