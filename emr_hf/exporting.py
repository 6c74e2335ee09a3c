"""One task of a merged repo as a plain checkpoint or as an ordinary adapter."""

from __future__ import annotations

import warnings
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from .adapters.export import write_ia3
from .adapters.lora import LoraReport, check_rank, write_lora
from .checkpoint import model_class_of
from .errors import EMRError, OptionError, RepoError, check_choice, one_line, short
from .finished import FinishedRepo
from .mapped_files import guarded_reads
from .modeling import EMRMergedModel
from .publication import Kind, atomic_folder, claim
from .repo import copy_side_files, parse_size

FORMS = ("model", "lora", "ia3")
_EXPORT = Kind("folder that may be replaced", lambda folder: False, lambda folder, place: False)


def export(
    repo: str | Path,
    task: str,
    out: str | Path,
    *,
    save_as: str = "model",
    rank: int | None = None,
    max_shard_size: str | int = "5GB",
) -> LoraReport | None:
    """Write one task so that transformers or PEFT loads it without emr_hf.

    Args:
        repo: a merged repo of either layout, a folder or a Hub id.
        task: one of its tasks.
        out: a new folder, which appears complete or not at all.
        save_as (*optional*, defaults to `"model"`): `"model"`, a checkpoint equal to the live model bit for bit;
            `"lora"`, a LoRA of the given rank by truncated SVD, an approximation; `"ia3"`, where (IA)³ adapters were
            merged, an (IA)³ adapter.
        rank (*optional*): of the LoRA.
        max_shard_size (*optional*, defaults to `"5GB"`): of one file of a checkpoint.

    Returns:
        what a LoRA keeps of the task; nothing for the others, which are exact.

    Raises:
        UnknownTaskError: with the nearest names.
        OptionError: an unknown form, a LoRA without rank, or a form that the repo cannot take.
        RepoError: `out` exists.
    """
    shard_bytes = parse_size(max_shard_size)
    check_choice("save_as", save_as, FORMS)
    if (rank is not None) != (save_as == "lora"):
        raise OptionError(f"save_as={save_as!r}, rank={short(rank)}: a LoRA needs a rank, and nothing else has one")
    target = claim(out, _EXPORT)
    for note in target.notes:
        warnings.warn(note, stacklevel=2)
    finished = FinishedRepo(repo)
    entry = finished.config.entry(task)
    if save_as != "ia3":
        finished.base  # noqa: B018 - found, or missed, before anything is written
    with atomic_folder(target) as folder, guarded_reads([finished.storage]) as check_repo:
        report = None
        if save_as == "model":
            _save(plain_model(finished, task), folder, shard_bytes)
        elif save_as == "lora":
            report = write_lora(finished, task, folder, check_rank(rank))
        else:
            _write_ia3(finished, task, folder)
        copy_side_files(finished.folder / (entry["tokenizer"] or ""), folder)
        check_repo()
    return report


def _save(model: PreTrainedModel, folder: Path, shard_bytes: int) -> None:
    try:
        model.save_pretrained(folder, max_shard_size=shard_bytes)
    except (ValueError, StrictDataclassError) as error:  # settings that it takes, but does not write
        if isinstance(error, EMRError):
            raise
        raise RepoError(f"transformers does not save {type(model).__name__}: {one_line(error)}") from error


def plain_model(repo: FinishedRepo, task: str) -> PreTrainedModel:
    """The task as a model without anything of ours, or of PEFT's."""
    if repo.layout == "model":
        return EMRMergedModel.from_pretrained(repo.folder, emr_task=task).merge_and_unload(task)
    from peft import PeftModel

    base_class = model_class_of(str(repo.config.base_architecture))
    base = base_class.from_pretrained(repo.base_place, revision=repo.base_revision or "main")
    model = PeftModel.from_pretrained(base, str(repo.folder))
    model.set_task(task)
    return model.merge_and_unload()


def _write_ia3(repo: FinishedRepo, task: str, folder: Path) -> None:
    if repo.config.vectors is None:
        raise OptionError(
            f"{repo.folder} merges weights, of which none are (IA)³ vectors: use --as lora or --as model"
        )
    write_ia3(repo.config, repo.storage, task, folder, (repo.base_place, repo.base_revision))
