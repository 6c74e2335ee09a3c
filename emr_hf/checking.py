"""Every check of a merge that needs no tensor: configurations and headers alone."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from .adapters import binding, ia3
from .adapters.delta import AdapterCheckpoint
from .adapters.layers import require_peft
from .centre import stand_in
from .checkpoint import Checkpoint, NamedTensors, build_skeleton, is_head, tied_names
from .disk import writing
from .errors import CheckpointError, MismatchError, OptionError, RepoError, check_choice, one_line, short
from .format import LAYOUTS, tensors_of
from .hub import MERGED_REPO
from .json_file import read_json
from .plan import Plan, dtype_name
from .publication import Target, check_holds_no_input, check_target
from .recipe import Recipe, patterns
from .repo import GENERATION_CONFIG, SIDE_FILES, check_own
from .report import human
from .sources import MERGEABLE_DTYPES, Adapter, Source, open_input, open_source
from .storage import TensorInfo

# Sizes that must agree for one model's weights to mean anything in the other; names of PreTrainedConfig and of the
# common vision configurations. A field that a configuration lacks is not compared.
_STRUCTURE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "encoder_layers",
    "decoder_layers",
    "depths",
    "hidden_sizes",
    "num_experts",
    "num_local_experts",
    "tie_word_embeddings",
)


def check(recipe: Recipe, out: str | Path | None = None, overwrite: bool = False, save_as: str = "model") -> Plan:
    """Validate a merge without reading a tensor.

    Args:
        recipe: what to merge.
        out (*optional*): where; the folder and the free disk space are checked if it is given.
        overwrite: whether `out` may hold a merged repo already.
        save_as: `"model"` or `"peft"`, see [`merge`].

    Raises:
        EMRError: the first thing that is wrong, of the subclass that says what kind.
    """
    check_choice("save_as", save_as, LAYOUTS)
    if save_as == "peft" and recipe.method == "levels":
        raise OptionError("save_as='peft': method='levels' replaces the base, beside which an adapter is loaded")
    if save_as == "peft" and isinstance(recipe.base, PreTrainedModel) and not recipe.base.config.name_or_path:
        raise OptionError("save_as='peft': the base is a loaded model without a path: an adapter has to name its base")
    if save_as == "peft":
        require_peft()
    target = None if out is None else check_target(out, MERGED_REPO, overwrite)
    if recipe.align is not None:
        from .alignment.folders import check_alignment

        check_alignment(recipe)
    base, sources = _open_inputs(recipe)
    if save_as == "peft" and recipe.base is None and all(source.adapter is None for source in sources.values()):
        raise OptionError("save_as='peft': no base is given: an adapter has to name its base")
    plan = make_plan(recipe, base, sources, save_as)
    if recipe.method == "levels" and plan.vectors is not None:
        raise OptionError(
            "method='levels' replaces the base, but the base of (IA)³ vectors is one: use 'fit' or 'emr'"
        )
    if target is not None:
        with writing(target.out):
            check_space(plan, target)
    return plan


def _open_inputs(recipe: Recipe) -> tuple[Source, dict[str, Source]]:
    """The base and the finetunes, adapters completed by the base."""
    base = open_source(recipe.base, "base") if recipe.base is not None else None
    inputs = {task: open_input(reference, task) for task, reference in recipe.finetunes.items()}
    adapters = [finetune for finetune in inputs.values() if isinstance(finetune, Adapter)]
    if base is None:
        base = binding.open_base(adapters) if adapters else stand_in(inputs)  # type: ignore[arg-type]
    sources = {task: bound(finetune, base) for task, finetune in inputs.items()}
    for task, names in recipe.labels.items():
        _name_labels(sources[task], names)
    return base, sources


def _name_labels(source: Source, names: Sequence[str]) -> None:
    if len(names) != source.config.num_labels:
        raise MismatchError(f"{source.label}: has {source.config.num_labels} labels, the recipe names {len(names)}")
    source.config = deepcopy(source.config)  # a loaded model keeps its own
    source.config.id2label = dict(enumerate(names))
    source.config.label2id = {name: index for index, name in enumerate(names)}


def bound(finetune: Source | Adapter, base: Source) -> Source:
    """An input as a finetune of the base."""
    return binding.bind(finetune, base) if isinstance(finetune, Adapter) else finetune


def make_plan(recipe: Recipe, base: Source, sources: Mapping[str, Source], save_as: str) -> Plan:
    """Decide what is merged, what is kept for each task, and what the repo will hold."""
    architecture = common_architecture(sources)
    _check_side_files(base)
    for source in sources.values():
        check_finetune(base, source)
    default = sources[recipe.default_task or next(iter(sources))]
    dtype = _main_dtype(base)
    skeleton = build_skeleton(default, dtype)
    base_checkpoint = Checkpoint(base, skeleton)
    finetunes = {task: finetune_of(source, skeleton, base_checkpoint) for task, source in sources.items()}
    plan = Plan(
        recipe=recipe,
        base=base_checkpoint,
        finetunes=finetunes,
        architecture=architecture,
        config=skeleton.config,
        skeleton=skeleton,
        dtype=dtype,
        save_as=save_as,
    )
    _use_vectors(plan)
    fill_plan(plan)
    plan.warnings = _warnings(plan)
    return plan


def finetune_of(source: Source, skeleton: PreTrainedModel, base: NamedTensors) -> NamedTensors:
    """A finetune's tensors, whatever it is stored as."""
    return Checkpoint(source, skeleton) if source.adapter is None else AdapterCheckpoint(source, skeleton, base)


def _use_vectors(plan: Plan) -> None:
    """Merge in the adapters' own space if all of them are (IA)³."""
    adapters = [c for c in plan.finetunes.values() if isinstance(c, AdapterCheckpoint) and c.kind == "IA3"]
    if len(adapters) < len(plan.finetunes):
        return
    settings = ia3.common_settings(adapter.layers for adapter in adapters)
    if settings is not None:
        use_vectors(plan, settings)


def use_vectors(plan: Plan, settings: dict[str, Any]) -> None:
    """Turn a plan into one in the space of (IA)³ vectors with these settings."""
    plan.vectors = settings
    plan.skeleton = ia3.vector_skeleton(plan.skeleton, settings)
    plan.base = ia3.VectorCheckpoint(plan.base, plan.skeleton)
    plan.finetunes = {task: ia3.VectorCheckpoint(c, plan.skeleton) for task, c in plan.finetunes.items()}


def fill_plan(plan: Plan) -> None:
    """Sort the tensors, and list what is written."""
    _assign(plan)
    _list_skipped(plan)
    plan.dtypes = _load_dtypes(plan.skeleton, plan.dtype)
    plan.outputs = _outputs(plan)


def common_architecture(sources: Mapping[str, Source]) -> str:
    """The one class that all finetunes are of."""
    first, *others = sources.values()
    if first.architecture is None:
        raise MismatchError(f"{first.label}: config.json names no architecture: expected one, such as BertForMaskedLM")
    for source in others:
        if source.architecture != first.architecture:
            raise MismatchError(
                f"{source.label}: its architecture is {source.architecture}, that of {first.label} is "
                f"{first.architecture}: all finetunes must be of one class"
            )
    return first.architecture


def check_finetune(base: Source, source: Source) -> None:
    """Raise if a finetune cannot be one of the base, by their configurations, or has files that cannot be used."""
    _check_same_structure(base, source)
    _check_label_names(source)
    _check_side_files(source)


def _check_same_structure(base: Source, source: Source) -> None:
    if source.config.model_type != base.config.model_type:
        raise MismatchError(
            f"{source.label}: model type {source.config.model_type}, the base is {base.config.model_type}: "
            "a finetune must have the base's architecture"
        )
    pairs = [(base.config, source.config)]
    for key in base.config.sub_configs:
        pairs.append((getattr(base.config, key), getattr(source.config, key)))
    for ours, theirs in pairs:
        for name in ("vocab_size", *_STRUCTURE):
            expected, found = getattr(ours, name, None), getattr(theirs, name, None)
            if expected is not None and found is not None and expected != found:
                what = "another vocabulary size" if name == "vocab_size" else "another architecture"
                raise MismatchError(
                    f"{source.label}: {what}: {name} is {short(found)}, that of the base is {short(expected)}"
                )


def _check_label_names(source: Source) -> None:
    for index, name in (source.config.id2label or {}).items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{source.label}: id2label calls label {index} {short(name)}: expected a text; correct its "
                "config.json, or give labels in the recipe"
            )


def _check_side_files(source: Source) -> None:
    """Raise where a file that goes into the repo cannot be read, or transformers would not take it."""
    label, folder = source.label, source.folder
    if folder is None:
        return
    for name in (*SIDE_FILES, GENERATION_CONFIG):
        if os.path.isfile(folder / name):
            check_own(folder / name, folder)
            if not os.access(folder / name, os.R_OK):
                raise CheckpointError(f"{label}: cannot read {folder / name}: no permission")
    if os.path.lexists(path := folder / "tokenizer_config.json"):
        read_json(path, label)
    if os.path.lexists(path := folder / GENERATION_CONFIG):
        settings = read_json(path, label)
        try:
            GenerationConfig.from_dict(settings).validate()
        except Exception as error:  # its own checks meet values of any type
            raise CheckpointError(f"{label}: transformers cannot use {path}: {one_line(error)}") from None


def _main_dtype(source: Source) -> torch.dtype:
    """The dtype of most of a source's elements."""
    elements: dict[torch.dtype, int] = {}
    for info in source.storage.infos.values():
        if info.dtype in MERGEABLE_DTYPES:
            elements[info.dtype] = elements.get(info.dtype, 0) + info.numel
    if not elements:
        raise CheckpointError(
            f"{source.label}: {source.name} holds no tensor of F32, BF16, F16 or F64: nothing to merge"
        )
    return max(elements, key=lambda dtype: elements[dtype])


def _assign(plan: Plan) -> None:
    """Sort the model's tensors into merged, private and kept."""
    aliases = tied_names(plan.skeleton)
    parameters = dict(plan.skeleton.named_parameters(remove_duplicate=False))
    places = plan.skeleton.state_dict()
    expressions = [re.compile(pattern) for pattern in patterns(plan.recipe.private, places)]
    touched = {name for checkpoint in plan.finetunes.values() for name in checkpoint.touched}
    own = {name for checkpoint in plan.finetunes.values() for name in checkpoint.own}
    for name, place in places.items():
        if name in aliases or name in (plan.skeleton._keys_to_ignore_on_save or ()):
            continue  # the latter transformers computes anew
        for checkpoint in plan.finetunes.values():
            if name not in checkpoint.infos:
                raise _missing(plan, checkpoint, name)
        if name not in touched:
            _check_shape(plan, name, place.shape)
            plan.kept.append(name)
            continue
        why = "an adapter has its own" if name in own else None
        why = _why_private(plan, name, name in parameters, expressions) or why
        if name in parameters:
            _check_dtypes(plan, name, with_base=why is None)
        if why is None:
            _check_shape(plan, name, parameters[name].shape)
            plan.merged.append(name)
        else:
            plan.private[name] = why
            if why in ("head", "buffer"):
                _check_own_shape(plan, name, place.shape)
    if not plan.merged:
        reasons = ", ".join(sorted(set(plan.private.values())))
        raise MismatchError(f"nothing to merge: every tensor of {plan.architecture} is private ({reasons})")


def _missing(plan: Plan, checkpoint: NamedTensors, name: str) -> MismatchError:
    source = checkpoint.source
    hint = ""
    if source.adapter is not None:
        hint = ": the adapter was saved without its head (modules_to_save)"
    if plan.repo is not None and not is_head(plan.skeleton, name):
        hint = ": this repo has kept no base of it, as each task has its own; give a finetune that has it too"
    return MismatchError(f"{source.label}: {name} is missing from {source.name}: {plan.architecture} needs it{hint}")


def _why_private(plan: Plan, name: str, is_parameter: bool, expressions: Sequence[re.Pattern[str]]) -> str | None:
    if any(expression.search(name) for expression in expressions):
        return "asked for by the recipe"
    if not is_parameter:
        return "buffer"
    if is_head(plan.skeleton, name):
        return "head"
    if name not in plan.base.infos:
        return "not in the base"
    for task, checkpoint in plan.finetunes.items():
        expected, found = plan.base.infos[name].shape, checkpoint.infos[name].shape
        if found != expected and name not in checkpoint.own:
            raise MismatchError(
                f"{task}: another architecture: {name} is {list(found)}, that of the base is {list(expected)}; "
                "to keep it for each task by itself, list it under private"
            )
    return None


def _check_own_shape(plan: Plan, name: str, shape: torch.Size) -> None:
    """Raise MismatchError if a tensor of a finetune's own is not of the shape that its configuration says."""
    for checkpoint in plan.finetunes.values():
        found = checkpoint.infos[name].shape
        if found == tuple(shape):
            continue
        own = build_skeleton(checkpoint.source, plan.dtype).state_dict().get(name)
        if own is not None and found != tuple(own.shape):
            raise MismatchError(
                f"{checkpoint.source.label}: {name} is {list(found)}, but {list(own.shape)} by its configuration, of "
                f"{checkpoint.source.config.num_labels} labels: correct its config.json"
            )


def _check_dtypes(plan: Plan, name: str, with_base: bool) -> None:
    for checkpoint in ([plan.base] if with_base else []) + list(plan.finetunes.values()):
        dtype = checkpoint.infos[name].dtype
        if dtype not in MERGEABLE_DTYPES:
            raise CheckpointError(
                f"{checkpoint.source.label}: {name} is {dtype_name(dtype)}, as in a quantised checkpoint: "
                "expected float32, bfloat16, float16 or float64"
            )


def _check_shape(plan: Plan, name: str, expected: torch.Size) -> None:
    """The checkpoints agree with each other by now; they have to agree with their configuration too."""
    found = plan.base.infos[name].shape
    if found != tuple(expected):
        raise MismatchError(
            f"{name} is {list(found)} in all checkpoints, but {list(expected)} by the configuration of "
            f"{plan.default_task}: correct its config.json"
        )


def _list_skipped(plan: Plan) -> None:
    for checkpoint in (plan.base, *plan.finetunes.values()):
        label = checkpoint.source.label
        for name in checkpoint.unexpected:
            plan.skipped.append((label, name, f"not part of {plan.architecture}"))
    for name in plan.base.infos:
        if name in plan.private:
            plan.skipped.append(("base", name, f"each task has its own, {plan.private[name]}"))


def _outputs(plan: Plan) -> dict[str, TensorInfo]:
    """Everything the repo will hold."""
    base = {name: TensorInfo(plan.base.infos[name].shape, plan.dtypes[name]) for name in (*plan.merged, *plan.kept)}
    infos = {key: plan.finetunes[task].infos for task, key in plan.task_keys.items()}
    private = {key: {name: own[name] for name in plan.private} for key, own in infos.items()}
    return tensors_of(base, plan.merged, private, plan.recipe.tau_dtype, plan.save_as)


def _load_dtypes(skeleton: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtypes that `from_pretrained(dtype=dtype)` gives; stored so, they load and save again unchanged."""
    dtypes = {name: tensor.dtype for name, tensor in skeleton.state_dict().items()}
    kept = skeleton._get_dtype_plan(dtype)
    if kept:
        matcher, pattern_of_group, _ = build_glob_alternation(list(kept))
        for name in dtypes:
            if (match := matcher.search(name)) is not None and match.lastgroup is not None:
                dtypes[name] = kept[pattern_of_group[match.lastgroup]]
    return dtypes


def _warnings(plan: Plan) -> list[str]:
    warnings = []
    if plan.recipe.align is not None:
        warnings.append(f"align: all models are in memory while they are aligned, {human(plan.bytes_finetunes)}")
    if plan.recipe.base is None and plan.finetunes[plan.default_task].source.adapter is None:
        warnings.append(
            f"no base is given: {plan.base.source.name} stands for it. Finetunes of one model should have it as their "
            "base"
        )
    try:
        plan.config.validate()
    except Exception as error:  # of its own, or what they make of a value of any type
        warnings.append(
            f"{plan.default_task}: transformers loads a model with its config.json, but does not save one, as "
            f"emr-hf export would: {one_line(error)}"
        )
    seen: dict[object, str] = {}
    for task, checkpoint in plan.finetunes.items():
        source = checkpoint.source
        where = source.folder.resolve() if source.folder else id(source.model)
        if source.folder and plan.base.source.folder and where == plan.base.source.folder.resolve():
            warnings.append(f"{task}: is the base itself; its task vector is zero")
        if where in seen:
            warnings.append(f"{task}: is the same checkpoint as {seen[where]}")
        seen.setdefault(where, task)
        warnings += config_differences(plan, task)
        if isinstance(checkpoint, AdapterCheckpoint):
            warnings += checkpoint.tied_targets()
        dtype = _main_dtype(source)
        if source.adapter is None and dtype.itemsize < plan.dtype.itemsize:
            warnings.append(
                f"{task}: is {dtype_name(dtype)} and the base {dtype_name(plan.dtype)}; rounding becomes part of "
                "its task vector. Better give the base as it was when the finetune started from it"
            )
    return warnings


# What may differ between finetunes' configurations without changing the model that the weights make.
_HARMLESS = (
    "_name_or_path architectures dtype finetuning_task id2label label2id num_labels problem_type task_specific_params "
    "transformers_version use_cache output_attentions output_hidden_states return_dict torch_dtype"
).split()


def config_differences(plan: Plan, task: str) -> list[str]:
    """The repo has one configuration, the default task's: what another finetune has otherwise is lost."""
    ours, theirs = plan.config.to_dict(), plan.finetunes[task].source.config.to_dict()
    return [
        f"{task}: {name} is {short(theirs.get(name))}, but the merged model has {plan.default_task}'s "
        f"{short(ours.get(name))}"
        for name in sorted(ours.keys() | theirs.keys())
        if name not in _HARMLESS and "dropout" not in name and ours.get(name) != theirs.get(name)
    ]


def check_space(plan: Plan, target: Target) -> None:
    """Take a target into a plan; raise RepoError where that would delete an input, or the disk has no room."""
    plan.target = target
    plan.warnings += target.notes
    sources = [checkpoint.source for checkpoint in (plan.base, *plan.finetunes.values())]
    if plan.repo is None:
        check_holds_no_input(target, [(source.label, path) for source in sources for path in source.paths])
    parent = next(parent for parent in target.out.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < plan.bytes_out:
        raise RepoError(f"no space for {target.out}: needs {human(plan.bytes_out)}, {human(free)} are free")
