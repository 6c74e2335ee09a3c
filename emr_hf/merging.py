"""The streaming merge: from a checked plan to a repo on disk."""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import bits, distributed, election, shares
from .adapters.export import save_adapters
from .bits import StoredVector
from .checking import check
from .configuration import EMRConfig, task_entry
from .disk import writing
from .distributed import ALONE, PARTNER_TIMEOUT, Team
from .election import TAU_DTYPES, Partial, Sums, TensorElection, TensorSums, torch_threads
from .errors import MismatchError, NonFiniteError, OptionError, naming, one_line, short
from .fitting import TensorFit
from .format import mask_name, model_name, private_name, rescaler_name, scale_name, tau_name
from .heads import auto_map, wrapper_name
from .hub import MERGED_REPO, carry_files, write_repo_files
from .mapped_files import guarded_reads
from .opening import check_finite, open_merged
from .plan import Plan, dtype_name
from .publication import Target, atomic_folder, check_target, claim
from .recipe import Recipe
from .repo import GENERATION_CONFIG, TASKS_FOLDER, WeightsWriter, copy_side_files, create_weights, same_side_files
from .report import MergeReport, TaskReport, TensorNumbers
from .sources import Reference, Source
from .suspicions import suspicious
from .threads import run_all

Job = Callable[[], tuple[str, Partial]]
"""Does a block of a merged tensor; returns the tensor's name, and what the block adds to its sums."""
JobsOf = Callable[[str], Iterable[Job]]


def merge(
    base: Reference | None,
    finetunes: Mapping[str, Reference],
    out: str | Path,
    *,
    save_as: str = "model",
    method: str = "emr",
    rescale: str | None = None,
    tau_dtype: str = "float32",
    default_task: str | None = None,
    private: str | Sequence[str] = (),
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool | None = None,
    threads: int | None = None,
    device: str = "cpu",
    partner_timeout: float = PARTNER_TIMEOUT,
) -> MergeReport:
    """Merge finetunes of one base into a repo (EMR-Merging, arXiv 2405.17461).

    Tensors are streamed: memory does not grow with the number or the size of the models.

    Where `accelerate launch` or `torchrun` has started several processes, or torch.distributed is initialised, they
    share the work out, and the repo is the same to the bit: every process has to make the same call, and gets the same
    report, or the same error. Those on several machines have to see `out` and folders of models under the same paths.

    Args:
        base: the pretrained model: a folder, a Hub id (`"me/repo@revision"`) or a loaded model; `None` to take the one
            that the adapters name.
        finetunes: task -> finetune, each as `base`, or the folder or Hub id of a LoRA or (IA)³ adapter. LoRAs are
            merged in the space of the weights, (IA)³ adapters among themselves in that of their vectors.
        out: folder of the repo. It appears complete or not at all.
        save_as: `"model"`, a repo with the base in it for [`EMRMergedModel`] and the Auto classes, or `"peft"`, an
            adapter without it for `PeftModel.from_pretrained(base, out)`; of (IA)³ adapters also one ordinary adapter
            a task, in `adapters/<task>`.
        method, rescale, tau_dtype, default_task, private, max_shard_size: see [`Recipe`].
        overwrite (*optional*): replace a merged repo at `out`.
        progress (*optional*): whether to show a progress bar; by default where stderr is a terminal. Of several
            processes the main one shows it.
        threads (*optional*): to work with in each process, as many as torch has by default. The result is the same to
            the bit.
        device (*optional*, defaults to `"cpu"`): where to compute, such as `"cuda"`: with several processes, that of
            each. The result is the same.
        partner_timeout (*optional*, defaults to 300): seconds after which the other processes give up one that shows
            no life: stopped, hung with its machine or out of reach. One that works, however long, shows life.

    Returns:
        the report that is also saved in the repo.

    Raises:
        EMRError: of the subclass that says what kind of input is wrong; nothing is left on disk.
    """
    recipe = Recipe(base, finetunes, rescale, tau_dtype, default_task, private, max_shard_size, method=method)
    return merge_recipe(
        recipe,
        out,
        save_as=save_as,
        overwrite=overwrite,
        progress=progress,
        threads=threads,
        device=device,
        partner_timeout=partner_timeout,
    )


def merge_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    save_as: str = "model",
    overwrite: bool = False,
    progress: bool | None = None,
    threads: int | None = None,
    device: str = "cpu",
    partner_timeout: float = PARTNER_TIMEOUT,
    tell: Callable[[Plan], object] | None = None,
) -> MergeReport:
    """[`merge`], for a [`Recipe`]. `tell` is given the plan before a tensor is read, in the main process."""

    def prepare() -> Plan:
        working_device(threads, device)  # before any reading
        return check(recipe, out, overwrite, save_as)

    with distributed.team(device, partner_timeout) as team, ExitStack() as stack:
        notes = team.lead(lambda: claim(out, MERGED_REPO, overwrite).notes)
        plan = team.each(prepare)
        if recipe.align is not None:
            asked, as_given = recipe, plan
            recipe = stack.enter_context(_aligned(recipe, Path(out), team))
            plan = team.each(prepare)
            _name_as_given(plan, as_given)
            plan.recipe = replace(recipe, align=asked.align)
        if team.size > 1 and len(set(team.together(lambda: shares.fingerprint(plan)))) > 1:
            raise MismatchError("the processes of this merge do not merge the same: all must be given the same inputs")
        plan.warnings += notes
        if tell is not None and team.is_main:
            tell(plan)
        return run(plan, out, overwrite=overwrite, progress=progress, threads=threads, device=device, team=team)


@contextmanager
def _aligned(recipe: Recipe, out: Path, team: Team) -> Iterator[Recipe]:
    """The recipe with the finetunes aligned, in a temporary folder beside `out`."""
    from .alignment.folders import aligned_recipe

    if team.size > 1:
        raise OptionError("align: several processes cannot share an alignment out: align first (emr-hf align)")
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix="emr-hf-", dir=parent) as folder:
        yield aligned_recipe(recipe, Path(folder) / "aligned")


def _name_as_given(plan: Plan, given: Plan) -> None:
    """Name the inputs by what was aligned, not by the temporary folders of what came of it."""
    for ours, theirs in zip((plan.base, *plan.finetunes.values()), (given.base, *given.finetunes.values())):
        ours.source.name, ours.source.revision = theirs.source.name, theirs.source.revision


def run(
    plan: Plan,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool | None = None,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    team: Team = ALONE,
) -> MergeReport:
    """Carry out a plan of [`check`]; see [`merge`]."""
    device = working_device(threads, device)
    target = check_target(out, MERGED_REPO, overwrite)
    if plan.target is not None and plan.target.out == target.out:
        target = plan.target  # as it was before the inputs were looked at
    return write_repo(plan, target, lambda writer: elect(plan, writer, progress, threads, device, team), team=team)


def working_device(threads: int | None, device: torch.device | str) -> torch.device:
    """Where to work: of several GPUs this process' own.

    Raises:
        OptionError: this machine has no such device, or there is no such number of threads.
    """
    if threads is not None and threads < 1:
        raise OptionError(f"threads={threads}: expected at least 1")
    try:
        where = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"device={short(device)}: {one_line(error)}") from None
    if where.type == "meta":
        raise OptionError(f"device={short(str(device))}: expected one that computes")
    return where


@torch.no_grad()
def write_repo(
    plan: Plan,
    target: Target,
    fill: Callable[[WeightsWriter], MergeReport],
    team: Team = ALONE,
) -> MergeReport:
    """Write a repo.

    Args:
        plan: what it holds.
        target: where, as it was checked.
        fill: writes unified vector and masks; returns the report, of which the rescalers are written.
        team: the processes that call this.
    """
    started = time.perf_counter()
    checkpoints = (plan.base, *plan.finetunes.values())
    storages = [checkpoint.source.storage for checkpoint in checkpoints]
    with writing(target.out), guarded_reads(storages) as check_inputs, ExitStack() as stack:

        def begin() -> Path:
            folder = stack.enter_context(atomic_folder(target))
            for checkpoint in checkpoints:
                checkpoint.scratch = folder
                checkpoint.check_tied()
            create_weights(folder, plan.outputs, plan.recipe.max_shard_size, plan.save_as)
            return folder

        folder = team.lead(begin)
        for checkpoint in checkpoints:
            checkpoint.scratch = folder
        writer = team.each(lambda: shares.open_writer(plan, folder, team))
        report = fill(writer)
        team.each(check_inputs)  # each process has mapped them by itself
        shares.take_over(writer, team)

        def finish() -> MergeReport:
            _finish(plan, writer, report, target.out.name, started)
            check_inputs()
            open_merged(folder)  # a file that somebody removed meanwhile is missed before anything is published
            return report

        report = team.lead(finish)
        team.conclude(stack.close)  # the folder becomes `out`
        return report


def _finish(plan: Plan, writer: WeightsWriter, report: MergeReport, name: str, started: float) -> None:
    """Write what is not merged, and all that is no tensor."""
    _write_private(plan, writer)
    _write_kept(plan, writer)
    for task, key in plan.task_keys.items():
        writer.write(rescaler_name(key), torch.tensor(report.tasks[task].rescaler))
    writer.close()
    report.seconds = time.perf_counter() - started
    config = _config(plan, writer.folder, report)
    if plan.save_as == "model":
        config.save_pretrained(writer.folder)
    else:
        save_adapters(writer.folder, config, _base_location(plan))
    report.digests = write_repo_files(writer.folder, config, name, report.tensors).digests
    if plan.repo is not None:
        carry_files(plan.repo, writer.folder)


def elect(
    plan: Plan,
    writer: WeightsWriter,
    progress: bool | None,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    team: Team = ALONE,
) -> MergeReport:
    """Elect the merged tensors into the files of a repo, each process its share."""
    count = torch.get_num_threads() if threads is None else threads
    names = shares.share_of(plan, team)
    disable = not team.is_main or (None if progress is None else not progress)
    stop = writer.folder / "stop"  # where one process has failed, the others need not go on

    def goes_on() -> bool:
        team.check()
        return not stop.exists()

    def one_pass(jobs_of: JobsOf) -> dict[str, TensorSums]:
        def share() -> dict[str, TensorSums]:
            try:
                jobs = (job for name in names if goes_on() for job in jobs_of(name))
                return _summed(run_all(jobs, count), bar)
            except Exception:
                with suppress(OSError):
                    stop.touch()
                raise

        return {name: sums for found in team.together(share) for name, sums in found.items()}

    recipe = plan.recipe
    passes = 2 if recipe.method == "fit" else 1
    total = passes * sum(plan.base.infos[name].numel for name in names)
    with (
        torch_threads(1),  # blocks are too small to share, and waiting for a busy core costs many times the work
        tqdm(total=total, desc="merging", unit=" elements", unit_scale=True, disable=disable) as bar,
    ):
        if recipe.method == "emr" and recipe.tau_dtype in TAU_DTYPES:
            return _report(plan, one_pass(lambda name: _elections(plan, writer, name, device)))
        rescalers = torch.ones(len(plan.tasks))
        if recipe.method == "fit":
            first = one_pass(lambda name: _elections(plan, None, name, device))
            rescalers = torch.tensor(_rescalers(plan, first, "least_squares"))
        return _report(plan, one_pass(lambda name: _fits(plan, writer, name, rescalers, device)))


def _base_location(plan: Plan) -> tuple[str, str | None]:
    """Where the base is to be found again, and its revision: by the name that an adapter has for it, if it has one."""
    base = plan.base.source
    adapters = [checkpoint.source.adapter for checkpoint in plan.finetunes.values()]
    named = next((adapter for adapter in adapters if adapter is not None and adapter.base), None)
    if base.revision is not None:
        return base.name, base.revision
    if named is not None:
        return str(named.base), named.base_revision
    return (str(base.folder.resolve()) if base.folder else str(base.config.name_or_path or base.name)), None


def _summed(results: Iterable[tuple[str, Partial]], bar: tqdm) -> dict[str, TensorSums]:
    """The sums of each tensor, whose blocks follow each other."""
    found = {}
    for name, blocks in groupby(results, key=itemgetter(0)):
        parts = []
        for _, part in blocks:
            parts.append(part)
            bar.update(part.numel)
        found[name] = TensorSums.total(parts)
    return found


class _Scratch(threading.local):
    """Tensors for what a block elects, one set a thread: new ones would be new pages for every block."""

    held = torch.empty(0, dtype=torch.uint8)

    def take(self, numel: int, tau_dtype: torch.dtype, tasks: int) -> tuple[Tensor, list[Tensor]]:
        packed, tau_bytes = bits.packed_size(numel), numel * tau_dtype.itemsize
        if self.held.numel() < tau_bytes + tasks * packed:
            self.held = torch.empty(tau_bytes + tasks * packed, dtype=torch.uint8)
        masks = self.held[tau_bytes : tau_bytes + tasks * packed].view(tasks, packed)
        return self.held[:tau_bytes].view(tau_dtype), list(masks)


_scratch = _Scratch()


def _inputs(plan: Plan, name: str) -> tuple[Tensor, list[Tensor | StoredVector]]:
    """A merged tensor's base and finetunes."""
    # Task vectors are differences from the base as it is stored: what they are added to again.
    with _naming(plan, name):
        base = plan.base.read(name).to(plan.stored_dtype(name))
        return base, [checkpoint.deviation(name) for checkpoint in plan.finetunes.values()]


def _naming(plan: Plan, name: str) -> AbstractContextManager[None]:
    return naming(name, plan.base.infos[name].shape, ["base", *plan.tasks])


def _elections(plan: Plan, writer: WeightsWriter | None, name: str, device: torch.device | str) -> Iterator[Job]:
    """The blocks of a merged tensor, each to be elected, into the files if there are any."""
    base, finetunes = _inputs(plan, name)
    tensor = TensorElection(base, finetunes, device)
    tau_dtype = TAU_DTYPES[plan.recipe.tau_dtype] if writer is not None else torch.float32

    def job(block: slice) -> tuple[str, Partial]:
        tau, masks = _scratch.take(block.stop - block.start, tau_dtype, len(finetunes))
        with _naming(plan, name):
            part = tensor.run(block, tau, masks)
        if writer is not None:
            writer.write(tau_name(name), tau, block.start)
            _write_block(plan, writer, name, tensor.base[block], masks, block.start)
        return name, part

    return (partial(job, block) for block in tensor.blocks())


def _fits(
    plan: Plan, writer: WeightsWriter, name: str, rescalers: Tensor, device: torch.device | str
) -> Iterator[Job]:
    """The blocks of a merged tensor, each to be fitted into the files."""
    tensor = TensorFit(*_inputs(plan, name), plan.recipe.method, plan.recipe.tau_dtype, rescalers, device)

    def job(block: slice) -> tuple[str, Partial]:
        with _naming(plan, name):
            fitted = tensor.run(block)
        if fitted.scales is None:
            writer.write(tau_name(name), fitted.tau, block.start)
        else:
            writer.write(tau_name(name), fitted.tau, tensor.code_bytes(block.start))
            writer.write(scale_name(name), fitted.scales, tensor.row(block.start))
        _write_block(plan, writer, name, fitted.base, fitted.masks, block.start)
        return name, fitted.partial

    return (partial(job, block) for block in tensor.blocks())


def _write_block(
    plan: Plan, writer: WeightsWriter, name: str, base: Tensor, masks: Sequence[Tensor], start: int
) -> None:
    for key, mask in zip(plan.task_keys.values(), masks):
        writer.write(mask_name(key, name), mask, start // 8)
    if plan.save_as == "model":
        writer.write(model_name(name), base, start)


def _write_private(plan: Plan, writer: WeightsWriter) -> None:
    for index, (task, key) in enumerate(plan.task_keys.items()):
        for name in plan.private:
            value = plan.finetunes[task].read(name)
            if (bad := election.first_non_finite(value)) is not None:
                raise NonFiniteError(index, bad, float(value.reshape(-1)[bad])).located(name, value.shape, task)
            writer.write(private_name(key, name), value)


def _write_kept(plan: Plan, writer: WeightsWriter) -> None:
    """What no finetune touches goes from the base into the repo as it is."""
    if plan.save_as == "model":
        for name in plan.kept:
            value = plan.base.read(name)
            check_finite(value, name, plan.base.source.label, infinite=True)
            writer.write(model_name(name), value)


def _rescalers(plan: Plan, found: Mapping[str, TensorSums], mode: str) -> list[float]:
    """Every task's, from the sums of all merged tensors."""
    tensors = [found[name].tasks for name in plan.merged]
    return [election.rescaler(parts, mode) for parts in zip(*tensors)]


def _report(plan: Plan, found: Mapping[str, TensorSums]) -> MergeReport:
    """What the sums of all merged tensors tell."""
    tensors = [found[name] for name in plan.merged]
    sums = {task: [tensor.tasks[index] for tensor in tensors] for index, task in enumerate(plan.tasks)}
    square = math.fsum(tensor.square for tensor in tensors)
    rounding = math.fsum(tensor.square_rounding for tensor in tensors)
    rescalers = _rescalers(plan, found, str(plan.recipe.rescale))
    report = MergeReport(
        base=plan.base.source.name,
        base_revision=plan.base.source.revision,
        architecture=plan.architecture,
        rescale=str(plan.recipe.rescale),
        method=plan.recipe.method,
        tau_dtype=plan.recipe.tau_dtype,
        tau_rounding=(rounding / square) ** 0.5 if square else 0.0,
        merged_tensors=len(plan.merged),
        merged_elements=sum(plan.base.infos[name].numel for name in plan.merged),
        bytes_out=plan.bytes_out,
        bytes_finetunes=plan.bytes_finetunes,
        bytes_modulators=plan.bytes_modulators,
        seconds=0.0,
        warnings=list(plan.warnings),
    )
    for (task, checkpoint), rescaler in zip(plan.finetunes.items(), rescalers):
        total = Sums.total(sums[task])
        report.tasks[task] = TaskReport(
            rescaler=rescaler,
            density=total.density,
            relative_error=total.relative_error(rescaler),
            cosine=total.cosine,
            sign_conflict=total.sign_conflict,
            private_elements=sum(checkpoint.infos[name].numel for name in plan.private),
            source=checkpoint.source.name,
            revision=checkpoint.source.revision,
            length=total.square_tau**0.5,
            nbytes=checkpoint.nbytes,
            adapter=checkpoint.source.adapter is not None,
        )
    for name, tensor in zip(plan.merged, tensors):
        rows = zip(report.tasks.items(), tensor.tasks)
        report.tensors[name] = {
            "elements": plan.base.infos[name].numel,
            "tasks": {task: _numbers(own, numbers.rescaler) for (task, numbers), own in rows},
        }
    errors = {task: numbers.relative_error for task, numbers in report.tasks.items()}
    report.warnings += suspicious(plan, {task: Sums.total(parts) for task, parts in sums.items()}, errors)
    return report


def _numbers(sums: Sums, rescaler: float) -> list[float]:
    """What a report says of one task in one tensor, in six digits."""
    values = sums.relative_error(rescaler), sums.cosine, sums.sign_conflict, sums.square_tau**0.5
    error, cosine, conflict, length = (float(f"{value:.6g}") for value in values)
    return list(TensorNumbers(error, cosine, conflict, length, sums.nonzero))


def _config(plan: Plan, folder: Path, report: MergeReport) -> EMRConfig:
    """The repo's configuration; writes the tokenizers and generation settings that it names."""
    tokenizers = _copy_tokenizers(plan, folder)
    generation = {task: _generation_settings(plan, task) for task in plan.tasks}
    if (settings := generation[plan.default_task]) is not None:
        (folder / GENERATION_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    differ = any(settings != generation[plan.default_task] for settings in generation.values())
    tasks = {}
    for index, (task, key) in enumerate(plan.task_keys.items()):
        source = plan.finetunes[task].source
        tasks[task] = task_entry(
            source.config,
            **{
                **plan.finetunes[task].extras(),
                "key": key,
                "index": index,
                "private": {name: _spec(plan, key, name) for name in plan.private},
                "source": source.name,
                "revision": source.revision,
                "tokenizer": tokenizers[task],
                "generation_config": (generation[task] or {}) if differ else None,
            },
        )
    base_config = type(plan.config).from_dict(plan.config.to_dict())
    base_config.dtype = plan.dtype
    base_config.name_or_path = ""  # it may be a path of this machine
    wrapper = wrapper_name(plan.architecture)
    return EMRConfig(
        base_config=base_config,
        base_architecture=plan.architecture,
        base_model_name_or_path=plan.base.source.name,
        base_revision=plan.base.source.revision,
        tasks=tasks,
        default_task=plan.default_task,
        merged_parameters=plan.merged,
        vectors=plan.vectors,
        tensors=_record(plan),
        tau_dtype=plan.recipe.tau_dtype,
        method=plan.recipe.method,
        recipe=plan.recipe.published(report.base, {task: numbers.source for task, numbers in report.tasks.items()}),
        report=report.without_tensors(),
        dtype=plan.dtype,
        architectures=[wrapper],
        auto_map=auto_map(wrapper),  # type: ignore[call-arg]
    )


def _generation_settings(plan: Plan, task: str) -> dict[str, Any] | None:
    """The task's own, an adapter's being those of its base; what a repo records of a task is what it is."""
    checkpoint = plan.finetunes[task]
    if "generation_config" in (known := checkpoint.extras()):
        return known["generation_config"]
    own = _stored_generation_settings(checkpoint.source)
    return (
        own if own is not None or checkpoint.source.adapter is None else _stored_generation_settings(plan.base.source)
    )


def _stored_generation_settings(source: Source) -> dict[str, Any] | None:
    if source.model is not None:
        return source.model.generation_config.to_diff_dict() if source.model.can_generate() else None
    path = source.folder / GENERATION_CONFIG if source.folder else None
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None


def _record(plan: Plan) -> dict[str, Any]:
    """Shape and dtype of the base's tensors that the repo holds, or that are merged beside a base kept elsewhere."""
    names = (*plan.merged, *plan.kept) if plan.save_as == "model" else plan.merged
    return {name: [list(plan.base.infos[name].shape), dtype_name(plan.dtypes[name])] for name in names}


def _spec(plan: Plan, key: str, name: str) -> list[Any]:
    info = plan.outputs[private_name(key, name)]
    return [list(info.shape), dtype_name(info.dtype)]


def _copy_tokenizers(plan: Plan, folder: Path) -> dict[str, str | None]:
    """The default task's tokenizer at the root, others in a folder of their own where they differ."""
    default = plan.finetunes[plan.default_task].source
    for source in (default, plan.base.source):
        if source.folder is not None and copy_side_files(source.folder, folder):
            break
    places: dict[str, str | None] = {}
    for task, key in plan.task_keys.items():
        own = plan.finetunes[task].source.folder
        if own is None or same_side_files(own, folder) or not copy_side_files(own, folder / TASKS_FOLDER / key):
            places[task] = None  # a loaded model, the shared tokenizer, or none at all
        else:
            places[task] = f"{TASKS_FOLDER}/{key}"
    return places
