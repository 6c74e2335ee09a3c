"""Every verb that reads a repo, a recipe, an adapter or a checkpoint, and what each gives, to be compared."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import transformers
from damaged_recipes import NAME
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from specimens import Specimen, digests, weights_of
from torch import nn

import emr_hf
from emr_hf import cli

Result = dict[str, str]
"""Name of a part -> digest of it."""


@dataclass(frozen=True)
class Job:
    """A verb at work on a damaged thing.

    Attributes:
        specimen: the sound one.
        where: folder of the damaged one.
        target: folder of `out` alone.
    """

    specimen: Specimen
    where: Path
    target: Path

    @property
    def out(self) -> Path:
        return self.target / "out"

    @property
    def task(self) -> str:
        """The task that is exported and evaluated."""
        return self.specimen.tasks[-1]

    @property
    def base(self) -> Path:
        return self.where if self.specimen.folder == self.specimen.base else self.specimen.base

    @property
    def finetunes(self) -> dict[str, Path]:
        given = self.specimen.inputs
        return {task: self.where if path == self.specimen.folder else path for task, path in given.items()}


@dataclass(frozen=True)
class Verb:
    """One way to use a thing.

    Attributes:
        act: does it.
        collect: what came of it, when it has succeeded; what is wrong with that is an error of any kind.
        writes: whether `out` has to be complete or absent afterwards.
        stock: whether another library's function is called, which may fail before it comes to this package.
    """

    act: Callable[[Job], Any]
    collect: Callable[[Job, Any], Result] = lambda job, given: given if isinstance(given, dict) else {}
    writes: bool = False
    stock: bool = False


class CommandError(Exception):
    """A command line ended otherwise than it may: its status or a traceback."""


class Refused(Exception):
    """A command line ended with status 1 or 2, and said why."""


def command(*arguments: object) -> str:
    """Run a command line; what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 2
    if "Traceback" in err.getvalue() or status not in (0, 1, 2):
        raise CommandError(f"status {status}: {err.getvalue()[-300:]}")
    if status:
        said = err.getvalue().strip()
        raise Refused(said[max(0, said.rfind("\nemr-hf")) :].strip())  # before that it has said what it will do
    return out.getvalue()


# Merged repos


_COMPUTED = ("position_ids", "token_type_ids", "inv_freq", "original_inv_freq")
"""Buffers that no file holds."""


def _tasks_of(model: Any, wrapped: nn.Module, tasks: tuple[str, ...]) -> Result:
    found: Result = {}
    for task in tasks:
        model.set_task(task)
        # Not the state dict: for PEFT that is the base's, whatever the task.
        tensors = {**dict(wrapped.named_buffers()), **dict(wrapped.named_parameters(remove_duplicate=False))}
        found |= digests({task: {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in _COMPUTED}})
    return found


def _load(job: Job, **options: Any) -> Result:
    model = emr_hf.EMRMergedModel.from_pretrained(job.where, **options)
    return _tasks_of(model, model.model, job.specimen.tasks)


def _auto(job: Job) -> Result:
    model = getattr(transformers, job.specimen.auto_class).from_pretrained(job.where)
    return _tasks_of(model, model.model, job.specimen.tasks)


def _peft(job: Job) -> Result:
    base = getattr(transformers, job.specimen.auto_class).from_pretrained(job.specimen.base)
    model = peft.PeftModel.from_pretrained(base, job.where)
    found = _tasks_of(model.base_model.model, model.base_model.model, job.specimen.tasks)
    own = {name: value for name, value in found.items() if ".emr_bank." not in name}
    return {name.replace(".ia3_l.default", ".ia3_l.unified"): value for name, value in own.items()}


def _save(job: Job) -> None:
    emr_hf.EMRMergedModel.from_pretrained(job.where).save_pretrained(job.out)


def _repo_at_out(job: Job, given: Any) -> Result:
    base = job.specimen.base if job.specimen.layout == "peft" else None
    return digests(weights_of(job.out, base))


def _inspect(job: Job) -> Result:
    found = emr_hf.inspect(job.where)
    assert str(found)
    return _seen(vars(found))


def _seen(found: Mapping[str, Any]) -> Result:
    return {
        "architecture": str(found["architecture"]),
        "parts": str(sorted(found["parts"].items())),
        "tasks": str(sorted(found["tasks"])),
    }


def _exported(job: Job, given: Any) -> Result:
    """The export as transformers loads it."""
    model_class = getattr(transformers, job.specimen.auto_class)
    model, info = model_class.from_pretrained(job.out, output_loading_info=True)
    problems = {name: str(value) for name, value in info.items() if value}
    return {**digests({job.task: model.state_dict()}), **problems}


def _adapter(job: Job, given: Any) -> Result:
    return digests({job.task: load_file(job.out / "adapter_model.safetensors")})


def _evaluate(job: Job, **options: Any) -> Result:
    data = str(job.specimen.data)
    found = emr_hf.evaluate_task(options.pop("repo", job.where), data, job.task, progress=False, **options)
    return {name: str(value) for name, value in {**found.metrics, **found.compared_metrics}.items()}


def _push(job: Job, push: Callable[[], Any]) -> None:
    """Push to a Hub that is a folder, `out`."""

    def upload_folder(api: HfApi, *, folder_path: Any, repo_id: str, **options: Any) -> Any:
        folder = Path(folder_path)
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.glob("**/*")) if path.is_file()]
        patterns = {name: options.get(name) for name in ("allow_patterns", "ignore_patterns")}
        for name in filter_repo_objects(names, **patterns):
            (job.out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, job.out / name)
        return SimpleNamespace(commit_url="https://huggingface.co/me/x")

    HfApi.create_repo = lambda api, repo_id, **options: SimpleNamespace(repo_id=repo_id)  # type: ignore
    HfApi.upload_folder = upload_folder  # type: ignore[assignment, method-assign]
    push()


def _command(*words: str, **also: Any) -> Verb:
    """A command line, in which `{where}` and the like stand for what a job has."""

    def act(job: Job) -> str:
        return command(*(_filled(job, word) for word in words))

    return Verb(act, **also)


def _filled(job: Job, word: str) -> str:
    specimen = job.specimen
    places = {"{where}": job.where, "{out}": job.out, "{recipe}": job.where / NAME, "{task}": job.task}
    places |= {"{first}": specimen.tasks[0], "{new}": specimen.new, "{repo}": specimen.repo, "{data}": specimen.data}
    return str(places.get(word, word))


_TO_OUT: dict[str, Any] = {"collect": _repo_at_out, "writes": True}

_SHARED: Mapping[str, Verb] = {
    "inspect": Verb(_inspect),
    "export": Verb(lambda job: emr_hf.export(job.where, job.task, job.out), _exported, writes=True),
    "remove": Verb(lambda job: emr_hf.remove_task(job.where, job.specimen.tasks[0], job.out), **_TO_OUT),
    "push": Verb(lambda job: _push(job, lambda: emr_hf.push_folder(job.where, "me/x")), _repo_at_out),
    "cli-inspect": _command(
        "inspect", "{where}", "--format", "json", collect=lambda job, text: _seen(json.loads(text))
    ),
    "cli-export": _command("export", "{where}", "{out}", "--task", "{task}", collect=_exported, writes=True),
    "cli-remove": _command("remove", "{where}", "{first}", "{out}", "--format", "json", **_TO_OUT),
    "cli-push": Verb(lambda job: _push(job, lambda: command("push", job.where, "me/x")), _repo_at_out),
}
_WRAPPED: Mapping[str, Verb] = {
    "load": Verb(_load),
    "mapped": Verb(lambda job: _load(job, emr_memory="mapped")),
    "auto": Verb(_auto, stock=True),
    "save": Verb(_save, _repo_at_out),
}
_ADDED: Mapping[str, Verb] = {
    "add": Verb(lambda job: emr_hf.add_task(job.where, "new", job.specimen.new, job.out, progress=False), **_TO_OUT),
    "cli-add": _command("add", "{where}", "new", "{new}", "{out}", **_TO_OUT),
}
_LORA: Mapping[str, Verb] = {
    "export-lora": Verb(
        lambda job: emr_hf.export(job.where, job.task, job.out, save_as="lora", rank=2), _adapter, writes=True
    ),
}
_EVALUATED: Mapping[str, Verb] = {
    "evaluate": Verb(_evaluate),
    "cli-eval": _command("eval", "{where}", "--data", "{data}", "--task", "{task}"),
}
_VECTORS: Mapping[str, Verb] = {
    "export-ia3": Verb(lambda job: emr_hf.export(job.where, job.task, job.out, save_as="ia3"), _adapter, writes=True),
}


def repo_verbs(specimen: Specimen) -> dict[str, Verb]:
    """The verbs for a merged repo."""
    keeps_base = specimen.new is not None  # of two levels for each weight neither is the base
    return {
        **(_WRAPPED if specimen.layout == "model" else {"peft": Verb(_peft, stock=True)}),
        **_SHARED,
        **(_LORA if keeps_base and not specimen.vectors else {}),
        **(_ADDED if specimen.new else {}),
        **(_EVALUATED if specimen.data else {}),
        **(_VECTORS if specimen.vectors else {}),
    }


# What is merged


def _check(job: Job) -> None:
    assert str(emr_hf.check(emr_hf.Recipe(job.base, job.finetunes), job.out))


def _merge(job: Job, **options: Any) -> None:
    emr_hf.merge(job.base, job.finetunes, job.out, progress=False, **options)


def _adapter_at_out(job: Job, given: Any) -> Result:
    """What the tasks add to a base that is not there."""
    return digests(weights_of(job.out))


def _recipe_of(job: Job) -> Path:
    """A recipe file for what is given by folders."""
    path = job.target.parent / "given.yaml"
    path.write_text(json.dumps({"base": str(job.base), "tasks": {t: str(f) for t, f in job.finetunes.items()}}))
    return path


def _add_input(job: Job) -> None:
    emr_hf.add_task(str(job.specimen.repo), "new", job.where, job.out, progress=False)


def _align(job: Job) -> None:
    emr_hf.align_recipe(emr_hf.Recipe(None, job.finetunes), job.out)


def _aligned(job: Job, given: Any) -> Result:
    return digests({path.parent.name: load_file(path) for path in sorted(job.out.glob("*/model.safetensors"))})


def input_verbs(specimen: Specimen) -> dict[str, Verb]:
    """The verbs for a checkpoint or an adapter."""
    found = {
        "check": Verb(_check),
        "merge": Verb(_merge, **_TO_OUT),
        "merge-peft": Verb(lambda job: _merge(job, save_as="peft"), _adapter_at_out, writes=True),
        "cli-check": Verb(lambda job: command("check", _recipe_of(job), job.out)),
        "cli-merge": Verb(lambda job: command("merge", _recipe_of(job), job.out), **_TO_OUT),
    }
    if specimen.repo is not None:
        found["add"] = Verb(_add_input, **_TO_OUT)
        found["cli-add"] = _command("add", "{repo}", "new", "{where}", "{out}", **_TO_OUT)
    if specimen.data is not None:
        found["compare"] = Verb(lambda job: _evaluate(job, repo=specimen.repo, compare=job.where))
    if specimen.name.startswith("bert-finetune"):
        found["align"] = Verb(_align, _aligned, writes=True)
    return found


def _recipe_check(job: Job) -> None:
    assert str(emr_hf.check(emr_hf.Recipe.load(job.where / NAME), job.out))


def _recipe_merge(job: Job) -> None:
    emr_hf.merge_recipe(emr_hf.Recipe.load(job.where / NAME), job.out, progress=False)


def recipe_verbs(specimen: Specimen) -> dict[str, Verb]:
    """The verbs for a recipe."""
    return {
        "check": Verb(_recipe_check),
        "merge": Verb(_recipe_merge, **_TO_OUT),
        "cli-check": _command("check", "{recipe}", "{out}"),
        "cli-merge": _command("merge", "{recipe}", "{out}", "--format", "json", **_TO_OUT),
    }


VERBS: Mapping[str, Callable[[Specimen], dict[str, Verb]]] = {
    "repo": repo_verbs,
    "recipe": recipe_verbs,
    "adapter": input_verbs,
    "input": input_verbs,
}


def reference_of(specimen: Specimen) -> Result:
    """What [`weights_of`] says of a repo, which no code of the package has read."""
    return digests(weights_of(specimen.folder, specimen.base if specimen.layout == "peft" else None))
