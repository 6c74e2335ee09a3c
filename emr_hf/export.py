"""One task of a merged repo as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

from .modeling import EMRMergedModel
from .repo import GENERATION_CONFIG, SIDE_FILES, atomic_folder, copy_side_files


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
    with atomic_folder(Path(out)) as folder:
        model = EMRMergedModel.from_pretrained(repo, emr_task=task)
        tokenizer = model.config.entry(task)["tokenizer"]
        model.merge_and_unload(task).save_pretrained(folder, max_shard_size=max_shard_size)
        source = Path(repo)
        if not source.is_dir():
            patterns = [*SIDE_FILES, f"*/{GENERATION_CONFIG}", *(f"*/{name}" for name in SIDE_FILES)]
            source = Path(snapshot_download(str(repo), allow_patterns=patterns))
        copy_side_files(source / tokenizer if tokenizer else source, folder)
