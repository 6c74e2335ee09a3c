"""Publishing a repo."""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from transformers import PreTrainedModel

from .card import make_card
from .configuration import EMRConfig, repo_config
from .errors import RepoError, one_line
from .repo import CARD_NAME, REPORT_NAME, is_written_by_us, layout_of, open_repo, write_shim
from .report import MergeReport, Tensors, read_tensors
from .sources import HUB_ERRORS


def write_repo_files(folder: Path, config: EMRConfig, repo_id: str, tensors: Tensors) -> None:
    """Write what a repo holds beside weights and configuration: the `auto_map` shim, the report and the card.

    Args:
        tensors: the report's, which the configuration does not have.
    """
    if layout_of(folder) == "model":
        write_shim(folder, sorted({path.rpartition(".")[2] for path in config.auto_map.values()}))
    report = MergeReport.from_dict(config.report)
    report.keep_tensors(tensors)
    report.save(folder / REPORT_NAME)
    card = make_card(config, repo_id, str(layout_of(folder)))
    (folder / CARD_NAME).write_text(card, encoding="utf-8")


def saved_tensors(repo: str | Path, revision: str | None = None) -> Tensors:
    """`tensors` of the report in a merged repo, a folder or a Hub id; empty where it has none."""
    if not str(repo):
        return {}  # of a model that came from nowhere; as a path it would be the current directory
    if Path(repo).is_dir():
        return read_tensors(Path(repo) / REPORT_NAME)
    with suppress(*HUB_ERRORS):
        return read_tensors(Path(hf_hub_download(str(repo), REPORT_NAME, revision=revision)))
    return {}


def carry_files(repo: Path, folder: Path) -> None:
    """Take what a repo's owner has put beside it, and a card of their own, along into a changed repo."""
    for path in repo.rglob("*"):
        place = path.relative_to(repo)
        if path.is_file() and place.parts[0] != ".git" and not is_written_by_us(place):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)
    if _is_own_card(repo):
        shutil.copyfile(repo / CARD_NAME, folder / CARD_NAME)


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
        RepoError: `folder` is no merged repo, or the Hub refuses.
    """
    folder = Path(folder)
    open_repo(folder)
    _address_card(folder, repo_id)
    kwargs.setdefault("commit_message", "Upload a model merged by EMR-Merging")
    api = HfApi(token=token)
    try:
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=created.repo_id, folder_path=folder, **kwargs)
    except HUB_ERRORS as error:
        raise RepoError(f"cannot push {folder} to {repo_id!r}: {one_line(error)}") from error


def _address_card(folder: Path, repo_id: str) -> None:
    """Name the Hub repo in the card, unless its owner has written another card."""
    if not _is_own_card(folder):
        card = make_card(repo_config(folder), repo_id, str(layout_of(folder)))
        (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _is_own_card(folder: Path) -> bool:
    """Whether the card is not the one this package has written."""
    path = folder / CARD_NAME
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    named = re.search(r'from_pretrained\((?:base, )?"(.+?)"\)', card)
    return bool(card) and not (named and card == make_card(repo_config(folder), named[1], str(layout_of(folder))))


def push_model(
    model: PreTrainedModel, repo_id: str, *, max_shard_size: str | int = "5GB", **kwargs: Any
) -> CommitInfo:
    """Save a model to a temporary folder and upload it; arguments as [`push_folder`]."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return push_folder(folder, repo_id, **kwargs)
