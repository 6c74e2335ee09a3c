"""Tasks added to and removed from a finished repo, without the finetunes it was made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .checking import bound, check_space
from .errors import OptionError, UnknownTaskError, short
from .finished import FinishedRepo
from .format import mask_name, model_name, scale_name, tau_name
from .hub import MERGED_REPO
from .merging import elect, write_repo
from .plan import Plan
from .publication import check_outside, claim
from .repo import WeightsWriter
from .report import MergeReport
from .sources import Reference, open_input


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
        OptionError: the repo has a task of that name, or was merged with `method="levels"`.
        EMRError: as for [`merge`].
    """
    target = claim(out, MERGED_REPO, overwrite)
    old = FinishedRepo(repo)
    check_outside(old.folder, Path(out))
    if old.config.method == "levels":
        raise OptionError(f"{repo} holds two levels for each weight, to which no task can be added: merge again")
    if task in old.config.tasks:
        raise OptionError(f"{short(task)} is a task of {repo} already: choose another name, or remove it first")
    source = bound(open_input(finetune, task), old.base)
    plan = old.plan([*old.config.tasks], old.config.default_task, source)
    check_space(plan, target)
    return write_repo(plan, target, lambda writer: _keep_account(old.report, elect(plan, writer, progress)))


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
    target = claim(out, MERGED_REPO, overwrite)
    old = FinishedRepo(repo)
    check_outside(old.folder, Path(out))
    old.config.entry(task)
    tasks = [name for name in old.config.tasks if name != task]
    if not tasks:
        raise OptionError(f"{short(task)} is the only task of {repo}: a merge of nothing is the base")
    if default_task is not None and default_task not in tasks:
        raise UnknownTaskError(default_task, tasks)
    kept_default = old.config.default_task if old.config.default_task in tasks else tasks[0]
    plan = old.plan(tasks, default_task or kept_default)
    check_space(plan, target)
    return write_repo(plan, target, lambda writer: _copy_merge(old, plan, writer))


def _keep_account(before: MergeReport, report: MergeReport) -> MergeReport:
    """Count an old task's losses from its first merge, of which only what it kept was elected now."""
    for task, old in before.tasks.items():
        new = report.tasks[task]
        length = new.length if old.length is None else old.length
        lost = (old.lost or 0.0) + (new.relative_error * (new.length or 0.0) / length if length else 0.0)
        kept = replace(old, rescaler=new.rescaler, density=new.density, lost=lost, length=length)
        report.tasks[task] = replace(kept, private_elements=new.private_elements)
    for entry in report.tensors.values():
        entry["tasks"] = {task: values for task, values in entry["tasks"].items() if task not in before.tasks}
    report.keep_tensors(before.tensors)
    report.bytes_finetunes = before.bytes_finetunes + sum(
        numbers.nbytes for task, numbers in report.tasks.items() if task not in before.tasks
    )
    return report


def _copy_merge(old: FinishedRepo, plan: Plan, writer: WeightsWriter) -> MergeReport:
    """Copy the unified vector and the masks of the tasks that stay."""
    for name in plan.merged:
        if plan.save_as == "model":
            writer.write(model_name(name), plan.base.read(name))
        for stored in (tau_name(name), scale_name(name)):
            if stored in old.storage.infos:
                writer.write(stored, old.storage.read(stored))
        for task, key in plan.task_keys.items():
            stored = mask_name(old.config.entry(task)["key"], name)
            writer.write(mask_name(key, name), old.storage.read(stored))
    gone = [numbers for task, numbers in old.report.tasks.items() if task not in plan.finetunes]
    report = replace(
        old.report,
        tasks={task: old.report.tasks[task] for task in plan.tasks},
        bytes_out=plan.bytes_out,
        bytes_modulators=plan.bytes_modulators,
        bytes_finetunes=old.report.bytes_finetunes - sum(n.nbytes for n in gone) if all(n.nbytes for n in gone) else 0,
        warnings=list(plan.warnings),
        tensors={},
    )
    report.keep_tensors(old.report.tensors)
    return report
