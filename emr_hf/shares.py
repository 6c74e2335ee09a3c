"""What each process of a merge does of it: that all mean the same merge, whose share a tensor is, and where that goes.

Processes on other machines than the main one write files of their own, which it takes over: over a network file
system a machine writes whole pages, and of one that two machines write each would keep but its own part.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from .distributed import Team, divide
from .errors import ProcessError
from .format import mask_name, model_name, scale_name, tau_name
from .plan import Plan
from .repo import WeightsWriter, create_weights
from .storage import SafetensorsStorage

SAMPLES, SAMPLE_BYTES = 64, 4096
"""Of a file, for [`fingerprint`]."""


def fingerprint(plan: Plan) -> str:
    """What all processes must agree on: the recipe, what is to be written, and the inputs, of which samples tell."""
    settings = {name: value for name, value in vars(plan.recipe).items() if name not in ("base", "finetunes")}
    sources = [checkpoint.source for checkpoint in (plan.base, *plan.finetunes.values())]
    told = [(source.label, source.revision) for source in sources]
    digest = hashlib.sha256(repr((settings, plan.save_as, told, plan.merged, plan.outputs)).encode())
    for folder in (source.folder for source in sources if source.folder is not None):
        for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
            digest.update(_sampled(path))
    return digest.hexdigest()


def _sampled(path: Path) -> bytes:
    """A file's size, and bytes from all over it."""
    size = path.stat().st_size
    parts = [str(size).encode()]
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(size * index // SAMPLES)
            parts.append(file.read(SAMPLE_BYTES))
    return b"".join(parts)


def share_of(plan: Plan, team: Team) -> list[str]:
    """The merged tensors that are this process' part of the work."""
    return divide({name: plan.base.infos[name].nbytes for name in plan.merged}, team.size)[team.rank]


def open_writer(plan: Plan, folder: Path, team: Team) -> WeightsWriter:
    """What this process writes its share with: into the repo's files, or on another machine into its own.

    Args:
        folder: the repo, in which the main process has made the files.

    Raises:
        ProcessError: this machine does not see the folder.
    """
    if team.is_near:
        return WeightsWriter(folder, plan.outputs, plan.save_as)
    if not folder.is_dir():
        raise ProcessError(
            f"process {team.rank}, on another machine than the main one, does not see {folder.parent}: expected an "
            "output folder on a file system that all machines share, under one path"
        )
    tensors = {name: plan.outputs[name] for name in _written_for(plan, share_of(plan, team)) if name in plan.outputs}
    files = _files(folder, team.rank)
    files.mkdir()
    if tensors:
        create_weights(files, tensors, plan.recipe.max_shard_size)
    return WeightsWriter(folder, tensors, files=files)


def _files(folder: Path, rank: int) -> Path:
    return folder / f"part-{rank}"


def _written_for(plan: Plan, merged: list[str]) -> list[str]:
    """The names that an election or a fit writes for merged tensors, and perhaps some that it does not."""
    keys = plan.task_keys.values()
    return [
        written
        for name in merged
        for written in (model_name(name), tau_name(name), scale_name(name), *(mask_name(key, name) for key in keys))
    ]


def _copy(files: Path, writer: WeightsWriter) -> None:
    part = SafetensorsStorage(files.name, sorted(files.glob("*.safetensors")))
    for name in part.infos:
        writer.write(name, part.read(name))


def take_over(writer: WeightsWriter, team: Team) -> None:
    """Copy what other machines have written into the repo's files; all processes call this, the main one copies.

    The main one's writer is told what the others have written, so that it can say what nobody has.
    """

    def let_go() -> None:
        if not team.is_near:
            writer.close()  # only then do other machines see it

    def copy() -> None:
        for rank in team.far:
            files = _files(writer.folder, rank)
            _copy(files, writer)
            shutil.rmtree(files)  # no longer mapped: NFS would keep a file that is

    if team.far:
        team.each(let_go)
        team.lead(copy)
    for rank, written in enumerate(team.together(lambda: writer.written)):
        if team.is_main and rank and rank not in team.far:
            writer.count(written)
