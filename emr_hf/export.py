"""One task of a merged repo as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import RepoError, one_line
from .modeling import EMRMergedModel
from .repo import atomic_folder, copy_side_files, open_repo, parse_size, side_files_of


def export(repo: str | Path, task: str, out: str | Path, *, max_shard_size: str | int = "5GB") -> None:
    """Write one task as a checkpoint that transformers loads without emr_hf, equal to the live model bit for bit.

    Args:
        repo: a merged repo, a folder or a Hub id.
        task: one of its tasks.
        out: a new folder, which appears complete or not at all.
        max_shard_size (*optional*, defaults to `"5GB"`): of one file.

    Raises:
        UnknownTaskError: with the nearest names.
        RepoError: `out` exists.
    """
    shard_bytes = parse_size(max_shard_size)
    model = load_repo(repo, emr_task=task)
    with atomic_folder(Path(out)) as folder:
        tokenizer = model.config.entry(task)["tokenizer"] or ""
        model.merge_and_unload(task).save_pretrained(folder, max_shard_size=shard_bytes)
        copy_side_files(side_files_of(repo) / tokenizer, folder)


def load_repo(repo: str | Path, **kwargs: Any) -> EMRMergedModel:
    """[`EMRMergedModel.from_pretrained`], with one clear error for what is no merged repo."""
    if Path(repo).exists():
        open_repo(Path(repo))
    try:
        return EMRMergedModel.from_pretrained(repo, **kwargs)
    except (OSError, ValueError) as error:
        raise RepoError(f"{repo} is no merged repo, neither here nor on the Hub: {one_line(error)}") from error
