"""Publishing a repo."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from .card import make_card
from .configuration import EMRConfig
from .digests import digests_of
from .errors import RepoError, one_line, short
from .json_file import read_json
from .opening import config_of, open_merged, read_settings
from .publication import Kind
from .repo import CARD_NAME, NAMING_FILES, REPORT_NAME, check_own, is_own, is_written_by_us, layout_of, write_shim
from .report import MergeReport, Tensors, read_tensors
from .sources import HUB_ERRORS


def write_repo_files(folder: Path, config: EMRConfig, repo_id: str, tensors: Tensors) -> MergeReport:
    """Write what a repo holds beside weights and configuration: the `auto_map` shim, the report and the card.

    Args:
        tensors: the report's, which the configuration does not have.

    Returns:
        the report that was written, with the digests of the weights that are there.
    """
    if layout_of(folder) == "model":
        write_shim(folder, sorted({path.rpartition(".")[2] for path in config.auto_map.values()}))
    report = MergeReport.from_dict(config.report)
    report.keep_tensors(tensors)
    report.digests = digests_of(folder)
    report.save(folder / REPORT_NAME)
    card = make_card(config, repo_id, str(layout_of(folder)))
    (folder / CARD_NAME).write_text(card, encoding="utf-8")
    return report


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
    """Take what a repo's owner has put beside it, and a card of their own, along into a changed repo.

    Links out of the repo are left out: what they lead to is not the repo's.
    """
    for path in repo.rglob("*"):
        place = path.relative_to(repo)
        if path.is_file() and place.parts[0] != ".git" and not is_written_by_us(place) and is_own(path, repo):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)
    if _is_own_card(repo) and is_own(repo / CARD_NAME, repo):
        shutil.copyfile(repo / CARD_NAME, folder / CARD_NAME)


def _owns(folder: Path, place: Path) -> bool:
    return is_written_by_us(place) and not (str(place) == CARD_NAME and _is_own_card(folder))


MERGED_REPO = Kind("merged repo", lambda folder: layout_of(folder) is not None, _owns)
"""What merges and changes of a merge write, and may replace."""


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
    opened = open_merged(folder)
    for name in opened.storage.infos:
        opened.storage.read(name)  # numbers that are none are not published
    for path in folder.rglob("*"):
        check_own(path, folder)
    for warning in _local_paths(folder):
        warnings.warn(warning, stacklevel=2)
    _address_card(folder, opened.config, repo_id)
    kwargs.setdefault("commit_message", "Upload a model merged by EMR-Merging")
    api = HfApi(token=token)
    try:
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=created.repo_id, folder_path=folder, **kwargs)
    except HUB_ERRORS as error:
        raise RepoError(f"cannot push {folder} to {short(repo_id)}: {one_line(error)}") from error


def _local_paths(folder: Path) -> list[str]:
    """A warning for each settings file that names something by a path of this machine."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        if path.name in (CONFIG_NAME, ADAPTER_CONFIG_NAME, *NAMING_FILES):
            settings = read_json(path, folder.name)
            for name in ("base_model_name_or_path", "name_or_path", "_name_or_path"):
                value = settings.get(name)
                if isinstance(value, str) and (Path(value).is_absolute() or value.startswith((".", "~"))):
                    found.append(
                        f"{path}: {name} is {short(value)}, a path of this machine: nobody else can follow it, and "
                        "everybody can read it; write a Hub id there"
                    )
    return found


def _address_card(folder: Path, config: EMRConfig, repo_id: str) -> None:
    """Name the Hub repo in the card, unless its owner has written another card."""
    if not _is_own_card(folder):
        card = make_card(config, repo_id, str(layout_of(folder)))
        (folder / CARD_NAME).write_text(card, encoding="utf-8")


def _is_own_card(folder: Path) -> bool:
    """Whether the card is not the one this package has written."""
    path = folder / CARD_NAME
    try:
        card = path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return True
    named = re.search(r'from_pretrained\((?:base, )?"(.+?)"\)', card)
    if not card or named is None:
        return bool(card)
    try:
        layout = str(layout_of(folder))
        return card != make_card(config_of(read_settings(folder, layout), layout, folder), named[1], layout)
    except RepoError:
        return True  # of a damaged repo nobody can tell


def push_model(
    model: PreTrainedModel, repo_id: str, *, max_shard_size: str | int = "5GB", **kwargs: Any
) -> CommitInfo:
    """Save a model to a temporary folder and upload it; arguments as [`push_folder`]."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return push_folder(folder, repo_id, **kwargs)
