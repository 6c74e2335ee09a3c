"""SHA-256 digests of a repo's tensor files, in its report: they find damage, not who rewrites the report as well."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import hf_hub_download

from .errors import CheckpointError, RepoError, short
from .json_file import read_json
from .repo import REPORT_NAME
from .sources import HUB_ERRORS

FIELD = "digests"
_LARGEST = 1 << 30  # bytes of a report, which has numbers of every task in every tensor


def digests_of(folder: Path) -> dict[str, str]:
    """Relative path of each tensor file in a repo -> its SHA-256, in hexadecimal digits."""
    files = sorted(folder.rglob("*.safetensors"))
    return {file.relative_to(folder).as_posix(): _digest(file) for file in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded(report: Path) -> dict[str, str]:
    """The digests in a report's file; empty where an older version wrote it, or there is none.

    Raises:
        RepoError: the report is damaged.
    """
    if not report.exists():
        return {}
    try:
        found = read_json(report, report.parent.name, largest=_LARGEST).get(FIELD, {})
    except CheckpointError as error:
        raise RepoError(str(error)) from None
    if not isinstance(found, dict) or not all(isinstance(digest, str) for digest in found.values()):
        raise RepoError(f"{report}: {FIELD} is {short(found)}: expected an object of files and their digests")
    return found


def verify(folder: Path) -> None:
    """Compare a repo's tensor files with the digests in its report.

    Raises:
        RepoError: one differs, is missing or has no digest, or there are none at all.
    """
    known = recorded(folder / REPORT_NAME)
    if not known:
        raise RepoError(
            f"{folder}: its {REPORT_NAME} has no digests, as that of an older emr_hf: nothing to verify by"
        )
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")}
    if odd := sorted(found ^ known.keys()):
        what = "has no digest" if odd[0] in found else "is missing"
        raise RepoError(f"{folder}: {odd[0]} {what}: the folder is not what its {REPORT_NAME} was made for")
    _compare(known, ((name, folder / name) for name in known))


def _compare(known: dict[str, str], files: Iterable[tuple[str, Path]]) -> None:
    for name, path in files:
        if (found := _digest(path)) != known[name]:
            raise RepoError(
                f"{path} has SHA-256 {found[:16]}..., its {REPORT_NAME} says {short(known[name][:16])}: it is damaged "
                "or was changed; download or merge it again"
            )


def verify_downloaded(repo_id: str, files: Iterable[Path], revision: str | None, since: float) -> None:
    """[`verify`] the files of a Hub repo that have just been downloaded.

    Args:
        repo_id: the repo.
        files: tensor files in the Hub's cache.
        revision: their commit.
        since: seconds since the epoch: what was there before has been verified before.
    """
    young = [file for file in files if file.stat().st_ctime >= since]
    if not young:
        return
    try:
        report = Path(hf_hub_download(repo_id, REPORT_NAME, revision=revision))
    except HUB_ERRORS:
        return  # a repo without a report has no digests
    known = recorded(report)
    _compare(known, ((file.name, file) for file in young if file.name in known))
