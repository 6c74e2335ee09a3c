"""Publishing a repo."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi

from .card import make_card
from .configuration import EMRConfig
from .errors import RepoError
from .repo import CARD_NAME, REPORT_NAME, is_merged_repo, write_shim
from .report import MergeReport

if TYPE_CHECKING:
    from .modeling import EMRMergedModel


def write_repo_files(folder: Path, config: EMRConfig, repo_id: str) -> None:
    """Write what a repo holds beside weights and configuration: the `auto_map` shim, the report and the card."""
    write_shim(folder, sorted({path.rpartition(".")[2] for path in config.auto_map.values()}))
    MergeReport.from_dict(config.report).save(folder / REPORT_NAME)
    (folder / CARD_NAME).write_text(make_card(config, repo_id), encoding="utf-8")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """Upload a merged repo, its card made for `repo_id`.

    Args:
        folder: a merged repo.
        repo_id: such as `"me/bert-emr"`; created if it does not exist.
        private (*optional*): visibility of a new repo, the account's default if not given.
        token (*optional*): as everywhere in huggingface_hub.
        kwargs: as `HfApi.upload_folder`: `commit_message`, `revision`, `create_pr`.

    Raises:
        RepoError: `folder` is no merged repo.
    """
    folder = Path(folder)
    if not is_merged_repo(folder):
        raise RepoError(f"{folder} is no merged repo: expected what `emr-hf merge` or save_pretrained wrote")
    card = make_card(EMRConfig.from_pretrained(folder), repo_id)
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    api = HfApi(token=token)
    created = api.create_repo(repo_id, private=private, exist_ok=True)
    kwargs.setdefault("commit_message", "Upload a model merged by EMR-Merging")
    return api.upload_folder(repo_id=created.repo_id, folder_path=folder, **kwargs)


def push_model(model: EMRMergedModel, repo_id: str, *, max_shard_size: str | int = "5GB", **kwargs: Any) -> CommitInfo:
    """Save a model to a temporary folder and upload it; arguments as [`push_folder`]."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return push_folder(folder, repo_id, **kwargs)
