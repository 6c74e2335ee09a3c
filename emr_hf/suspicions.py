"""What only the tensors of a merge tell, and its user should know: equal, dominating and nearly equal finetunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import election
from .bits import StoredVector
from .election import Sums
from .finished import FinishedTask
from .plan import Plan


def suspicious(plan: Plan, totals: Mapping[str, Sums], errors: Mapping[str, float]) -> list[str]:
    """What only the tensors tell: a finetune equal to the base or to another one, a dominating one, one that is lost.

    Args:
        plan: what was merged.
        totals: task -> its sums over all merged tensors.
        errors: task -> relative L2 error of what is rebuilt.
    """
    warnings = []
    seen: dict[tuple[float, ...], str] = {}

    def known(start: str) -> bool:
        return any(warning.startswith(start) for warning in plan.warnings)

    for task, total in totals.items():
        if total.nonzero == 0 and not known(f"{task}: is the base itself"):
            warnings.append(f"{task}: every merged tensor equals the base's; its task vector is zero")
        fingerprint = tuple(vars(total).values())
        if total.nonzero and fingerprint in seen and not known(f"{task}: is the same checkpoint"):
            warnings.append(f"{task}: its merged tensors are those of {seen[fingerprint]}")
        seen.setdefault(fingerprint, task)
    return warnings + _dominating(totals, plan.recipe.method) + _lost(errors) + _near_duplicates(plan, totals)


_DOMINATES = {
    "emr": "it wins most elections and the other tasks lose accuracy",
    "fit": "the fit serves it first and keeps less of the other tasks",
    "levels": "the two levels serve it first and keep less of the other tasks",
}


def _dominating(totals: Mapping[str, Sums], method: str, times: float = 4.0) -> list[str]:
    """Every method loses much where one task vector is far longer than the others (docs: when to use it)."""
    lengths = {task: total.square_tau**0.5 for task, total in totals.items()}
    if len(lengths) < 2:
        return []
    longest = max(lengths, key=lambda task: lengths[task])
    rest = sorted(length for task, length in lengths.items() if task != longest)
    median = rest[len(rest) // 2]
    if lengths[longest] <= times * median or median == 0:
        return []
    return [
        f"{longest}: its task vector is {lengths[longest] / median:.1f} times as long as the others' median; "
        f"{_DOMINATES[method]}"
    ]


def _lost(errors: Mapping[str, float]) -> list[str]:
    """Tasks that are nearer to the base than to what is rebuilt of them."""
    lost = {task: error for task, error in errors.items() if error > 1}
    if not lost:
        return []
    told = ", ".join(f"{error:.2f}" for error in lost.values())
    return [
        f"{', '.join(lost)}: further from what is rebuilt than from the base (relative error {told}): "
        "measure what is kept (emr-hf eval --compare)"
    ]


def _near_duplicates(plan: Plan, totals: Mapping[str, Sums], cosine: float = 0.95, share: float = 0.92) -> list[str]:
    """Two finetunes of nearly one direction outvote the others; the sums of each by itself do not tell them.

    Of a task that a repo has already only a part of its task vector is left, so that no cosine tells a copy. But what
    is left has the finetune's own signs: a copy has all of them, a finetune of cosine 0.95 nine tenths and more, one
    of cosine 0.7 less than 0.9, others about half. Two such tasks are not compared: they were when they were merged.
    """
    cosines, agreeing = _sampled_likeness(plan)
    stored = [isinstance(checkpoint, FinishedTask) for checkpoint in plan.finetunes.values()]
    warnings = []
    for index, task in enumerate(plan.tasks):
        if stored[index]:
            continue
        near = {}
        for place, other in enumerate(plan.tasks[:index]):
            alike = agreeing[index, place] > share if stored[place] else cosines[index, place] > cosine
            if alike and vars(totals[task]) != vars(totals[other]):  # else a warning says that they are equal
                near[place] = float(cosines[index, place])
        if near:
            place = max(near, key=lambda place: near[place])
            found, advice = f"cosine {near[place]:.3f} of their task vectors over a sample", "merge one of them"
            if stored[place]:
                found = f"{agreeing[index, place]:.1%} equal signs over a sample of what the repo keeps of the first"
                advice = "keep one of them"
            warnings.append(f"{plan.tasks[place]} and {task}: nearly the same finetune ({found}): {advice}")
    return warnings


def _sampled_likeness(plan: Plan, tensors: int = 8, elements: int = election.UNIT) -> tuple[Tensor, Tensor]:
    """How alike task vectors are over the middle of a few tensors, spread over the model.

    Returns:
        `(N, N)` float64 cosines, and shares: of what the column's task moves, what the row's moves the same way.
    """
    matrices = [name for name in plan.merged if len(plan.base.infos[name].shape) > 1] or plan.merged
    count = min(tensors, len(matrices))
    gram, same = torch.zeros(2, len(plan.tasks), len(plan.tasks), dtype=torch.float64)
    for name in (matrices[(2 * place + 1) * len(matrices) // (2 * count)] for place in range(count)):
        numel = plan.base.infos[name].numel
        start = max(numel - elements, 0) // 2 // 8 * 8
        where = slice(start, min(start + elements, numel))
        base = plan.base.read(name).reshape(-1)[where].to("cpu", plan.stored_dtype(name))
        taus = _sample(base, [checkpoint.deviation(name) for checkpoint in plan.finetunes.values()], where)
        up, down = (taus > 0).to(torch.float64), (taus < 0).to(torch.float64)
        gram += taus @ taus.T
        same += up @ up.T + down @ down.T
    lengths = gram.diagonal().sqrt()
    cosines = gram / (lengths[:, None] * lengths).clamp_min(torch.finfo(torch.float64).tiny)
    return cosines, same / same.diagonal().clamp_min(1)


def _sample(base: Tensor, given: Sequence[Tensor | StoredVector], where: slice) -> Tensor:
    """`(N, elements)` float64 task vectors, of some elements of a tensor."""
    parts = [
        values[where]
        if isinstance(values, StoredVector)
        else election.task_vector(values.reshape(-1)[where].cpu(), base)
        for values in given
    ]
    return torch.stack(parts).to(torch.float64)
