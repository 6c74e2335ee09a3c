"""What a merged repo's task is worth on labelled data, beside its own finetune if that is there."""

from __future__ import annotations

import math
import numbers
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, find_adapter_config_file

from .adapters.binding import base_reference, check_kind
from .adapters.layers import require_peft
from .adapters.settings import check_ranks, usable_settings
from .configuration import EMRConfig
from .errors import OptionError, RepoError, one_line, short
from .exporting import plain_model
from .finished import FinishedRepo
from .heads import architectures_of
from .labelled import LabelledData, label_ids, read_data
from .merging import working_device
from .opening import config_of, open_merged, read_settings
from .repo import SIDE_FILES, TASKS_FOLDER, layout_of
from .report import table
from .sources import HUB_ERRORS, Adapter, adapter_settings, as_folder, open_input, read_config
from .storage import open_adapter

_KINDS = {"SequenceClassification": "text", "ImageClassification": "image"}
_AUTO = {"text": AutoModelForSequenceClassification, "image": AutoModelForImageClassification}


@dataclass
class Evaluation:
    """What [`evaluate_task`] measures.

    Attributes:
        repo, task, data: what was measured, and on what.
        rows: how many rows.
        metrics: name -> value, of the merged model. In the JSON of `emr-hf eval` NaN and infinities are `null`.
        compared: the individual finetune, if one was given.
        compared_metrics: the same of it.
        agreement: share of the rows for which both say the same.
        seconds: wall time of the merged model's predictions.
    """

    repo: str
    task: str
    data: str
    rows: int
    metrics: dict[str, Any]
    compared: str | None = None
    compared_metrics: dict[str, Any] = field(default_factory=dict)
    agreement: float | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        header = ["metric", "merged", *(["individual", "kept"] if self.compared else [])]
        rows = []
        for name, value in self.metrics.items():
            row = [name, _text(value)]
            if self.compared:
                other = self.compared_metrics.get(name)
                row += [
                    _text(other),
                    f"{value / other:.1%}" if _is_finite(value) and _is_finite(other) and other else "",
                ]
            rows.append(row)
        lines = [f"{self.repo}: {self.task} on {self.rows} rows of {self.data}", "", *table(header, rows)]
        if self.agreement is not None:
            lines += ["", f"individual: {self.compared}; both say the same of {self.agreement:.1%} of the rows"]
        return "\n".join(lines)


def _text(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def evaluate_task(
    repo: str | Path,
    data: str | Path,
    task: str | None = None,
    *,
    config: str | None = None,
    split: str | None = None,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    metrics: str | Sequence[str] = "accuracy",
    batch_size: int = 32,
    rows: int | None = None,
    device: str = "cpu",
    compare: str | Path | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Measure one task of a merged repo on labelled data: text, pairs of texts, or images, with one label each.

    Args:
        repo: a merged repo of either layout: a folder or a Hub id.
        data: a `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet` file, a folder that `Dataset.save_to_disk` wrote or
            `datasets.load_dataset` reads, or the Hub id of a data set, `name[:split]`. In a `.tsv` file quotes are
            characters like any other.
        task (*optional*): the repo's default task, if not given.
        config (*optional*): of several in one data set of the Hub or a folder: `"sst2"` of `nyu-mll/glue`.
        split (*optional*): of the data, where it has several.
        text_column (*optional*): the column of texts or images, or two columns of a pair; found by its name if it is
            called as usual (`text`, `sentence`; `text` and `text_pair`, `premise` and `hypothesis`; `image`).
        label_column (*optional*): `label` or `labels`, if not given. Labels are names or ids of the task's.
        metrics (*optional*, defaults to `"accuracy"`): one or more that `evaluate.load` knows or finds at a path;
            `"f1:macro"` for its `average="macro"`.
        batch_size (*optional*, defaults to 32): rows at a time.
        rows (*optional*): only so many, the first ones.
        device (*optional*, defaults to `"cpu"`): where to compute, such as `"cuda"`.
        compare (*optional*): the task's own finetune, a folder or Hub id, to measure on the same rows; or another
            merged repo, a folder, that has the task.
        progress (*optional*): whether to show a progress bar; by default where stderr is a terminal.

    Raises:
        UnknownTaskError: with the nearest names.
        OptionError: the repo does not classify; the data cannot be read, lacks a column or has labels that the task
            does not; an unknown metric, or none; `datasets` or `evaluate` is not installed. All before a model is
            loaded. Or, before anything is predicted, the finetune of `compare` cannot be loaded or lacks weights, such
            as the head. Or, while predicting, a tokenizer makes ids that the model does not have, or an image after
            the first cannot be opened.
        CheckpointError: files of the finetune of `compare` cannot be read, or it is an adapter that cannot be used.
        RepoError: not a merged repo.
    """
    for name, value in (("batch_size", batch_size), ("rows", rows)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise OptionError(f"{name}={short(value)}: expected a whole number, at least 1")
    where = working_device(None, device)
    side, repo_settings = _open(repo)
    task = repo_settings.default_task if task is None else task
    entry = repo_settings.entry(task)
    kind = _kind_of(repo_settings, task)
    measures = _measures([metrics] if isinstance(metrics, str) else metrics)
    found = read_data(data, config, split, text_column, label_column, rows, kind)
    references = label_ids(found.labels, found.label_names, entry["id2label"], task)
    for name, measure in measures.items():
        _measured(name, measure, references, references)  # what cannot be computed is told before the model works
    prepare = _preparer(kind, side, entry["tokenizer"] or "", repo)
    other = None if compare is None else _Other(compare, kind, task, entry["id2label"], prepare)

    def predict(model: PreTrainedModel, prepare: Any) -> list[int]:
        return _predictions(model.to(where), prepare, found, batch_size, progress)  # type: ignore[arg-type]

    finished = FinishedRepo(repo)
    # First the finetune, of which more may be wrong than of a repo that has been opened.
    theirs = [] if other is None else [other.ids[index] for index in predict(other.model(), other.prepare)]
    started = time.perf_counter()
    ours = predict(plain_model(finished, task), prepare)
    result = Evaluation(str(repo), task, str(data), len(references), {}, seconds=time.perf_counter() - started)
    result.metrics = _all_measured(measures, ours, references)
    if other is not None:
        result.compared, result.compared_metrics = str(compare), _all_measured(measures, theirs, references)
        result.agreement = sum(a == b for a, b in zip(ours, theirs)) / len(ours)
    return result


def _open(repo: str | Path) -> tuple[Path, EMRConfig]:
    """The folder with the tokenizers and the configuration of a merged repo; no weights are fetched."""
    folder = Path(repo)
    if os.path.exists(folder):
        return folder, open_merged(folder).config
    names = (CONFIG_NAME, ADAPTER_CONFIG_NAME, *SIDE_FILES, *(f"{TASKS_FOLDER}/*/{name}" for name in SIDE_FILES))
    try:
        folder = Path(snapshot_download(str(repo), allow_patterns=list(names)))
    except HUB_ERRORS as error:
        raise RepoError(f"{repo} is no merged repo, neither here nor on the Hub: {one_line(error)}") from None
    if (layout := layout_of(folder)) is None:
        raise RepoError(f"{repo} is no merged repo: its configuration is of another kind")
    return folder, config_of(read_settings(folder, layout), layout, folder)


def _kind_of(config: EMRConfig, task: str) -> str:
    """`"text"` or `"image"`."""
    architecture = str(config.base_architecture)
    kind = next((kind for suffix, kind in _KINDS.items() if architecture in architectures_of(suffix)), None)
    if kind is None:
        raise OptionError(
            f"{architecture} cannot be evaluated: expected a model that classifies texts, pairs of texts or images "
            "(...ForSequenceClassification, ...ForImageClassification)"
        )
    entry = config.entry(task)
    if len(entry["id2label"]) < 2 or entry["problem_type"] in ("regression", "multi_label_classification"):
        problem = entry["problem_type"] or f"of {len(entry['id2label'])} label"
        raise OptionError(f"{task} ({problem}) cannot be evaluated: expected a task with one of several labels a row")
    return kind


# Metrics

Measure = Callable[[list[int], list[int]], Mapping[str, Any]]


def _accuracy(predictions: list[int], references: list[int]) -> Mapping[str, Any]:
    return {"accuracy": sum(a == b for a, b in zip(predictions, references)) / len(references)}


def _measures(names: Sequence[str]) -> dict[str, Measure]:
    """Metrics by name; accuracy needs neither the library nor the network."""
    if not names:
        raise OptionError("metrics: expected at least one, got none")
    return {name: _accuracy if name == "accuracy" else _loaded(name) for name in names}


def _loaded(name: str) -> Measure:
    try:
        import evaluate
    except ImportError:
        raise OptionError(
            f"metric {short(name)} needs the library evaluate, which is not installed: pip install 'emr_hf[eval]'"
        ) from None
    path, _, average = name.partition(":")
    try:
        metric = evaluate.load(path)
    except Exception as error:  # a metric is a script, fetched or local, that may fail in any way
        raise OptionError(f"metric {short(name)} cannot be loaded: {one_line(error)}") from None
    options = {"average": average} if average else {}
    return lambda predictions, references: metric.compute(predictions=predictions, references=references, **options)


def _measured(name: str, measure: Measure, predictions: list[int], references: list[int]) -> Mapping[str, Any]:
    try:
        return measure(predictions, references)
    except Exception as error:  # another library's, or a script's
        raise OptionError(f"metric {short(name)} cannot be computed of labels: {one_line(error)}") from None


def _all_measured(measures: Mapping[str, Measure], predictions: list[int], references: list[int]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, measure in measures.items():
        for key, value in _measured(name, measure, predictions, references).items():
            stem, _, average = name.partition(":")
            label = f"{key}:{average}" if average else key
            results[label if label not in results else f"{stem} {label}"] = _plain(value)
    return results


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return value.tolist() if hasattr(value, "tolist") else value


# Predictions


class _Texts:
    """Makes batches of texts, or of pairs."""

    def __init__(self, folder: Path | str, subfolder: str = ""):
        self.tokenizer = AutoTokenizer.from_pretrained(folder, subfolder=subfolder)

    def one_by_one(self, model: PreTrainedModel) -> bool:
        """Whether the model would not know padding for what it is."""
        known = getattr(model.config.get_text_config(), "pad_token_id", None)
        return self.tokenizer.pad_token is None or self.tokenizer.pad_token_id != known

    def __call__(self, columns: Sequence[Sequence[str]], model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
        longest = min(self.tokenizer.model_max_length, _positions(model))
        limit = {"max_length": longest} if longest < _UNLIMITED else {}
        batch = self.tokenizer(
            *map(list, columns),
            truncation=bool(limit),
            padding=not self.one_by_one(model),
            return_tensors="pt",
            **limit,
        )
        known, largest = _vocabulary(model), int(batch["input_ids"].max())
        if known is not None and largest >= known:
            raise OptionError(
                f"{self.tokenizer.name_or_path}: its tokenizer makes the id {largest} "
                f"({self.tokenizer.convert_ids_to_tokens(largest)!r}), but the model has embeddings of {known} tokens "
                "only: another model's tokenizer?"
            )
        return batch


_UNLIMITED = 10**9


def _positions(model: PreTrainedModel) -> int:
    """How many tokens the model takes; where positions are counted from the padding's on, as RoBERTa's, fewer."""
    for name, module in model.named_modules():
        first = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and first is not None:
            return len(module.weight) - first - 1
    return getattr(model.config, "max_position_embeddings", None) or _UNLIMITED


def _vocabulary(model: PreTrainedModel) -> int | None:
    """How many tokens the model has embeddings of, `None` where they are no table."""
    try:
        return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    except (NotImplementedError, AttributeError):
        return None


class _Images:
    """Makes batches of images."""

    def __init__(self, folder: Path | str, subfolder: str = ""):
        self.processor = AutoImageProcessor.from_pretrained(folder, subfolder=subfolder)

    def one_by_one(self, model: PreTrainedModel) -> bool:
        return False

    def __call__(self, columns: Sequence[Sequence[Any]], model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
        colours = getattr(model.config, "num_channels", 3) != 1
        images = [image.convert("RGB" if colours else "L") for image in columns[0]]
        return self.processor(images, return_tensors="pt")


def _preparer(kind: str, folder: Path | str, subfolder: str, owner: str | Path) -> _Texts | _Images:
    try:
        return _Texts(folder, subfolder) if kind == "text" else _Images(folder, subfolder)
    except Exception as error:  # a tokenizer's files may be wrong in many ways
        what = "tokenizer" if kind == "text" else "image processor"
        raise OptionError(f"{owner} has no {what} that can be loaded: {one_line(error)}") from None


class _Other:
    """The individual finetune, opened before any work starts.

    Attributes:
        prepare: its own tokenizer or image processor, or the repo's where it has none.
        ids: what its label ids are in the merged task.
    """

    def __init__(
        self, place: str | Path, kind: str, task: str, id2label: Mapping[int, str], prepare: _Texts | _Images
    ):
        self._place, self._kind, self._task = str(place), kind, task
        self._finished = FinishedRepo(place) if layout_of(Path(place)) is not None else None
        self._adapter = None if self._finished is not None else self._find_adapter()
        theirs: Mapping[int, str] = id2label
        self.prepare = prepare
        if self._finished is not None:
            entry = self._finished.config.entry(task)
            theirs = entry["id2label"]
            self.prepare = _preparer(kind, self._finished.folder, entry["tokenizer"] or "", place)
        elif self._adapter is None:
            theirs = {int(index): name for index, name in (self._config().id2label or {}).items()}
            if any(os.path.isfile(Path(place) / name) for name in SIDE_FILES):
                self.prepare = _preparer(kind, place, "", place)
        if len(theirs) != len(id2label):
            raise OptionError(
                f"{place} has {len(theirs)} labels, {task} has {len(id2label)}: another task's finetune?"
            )
        by_name = {label: index for index, label in id2label.items()}
        same = sorted(theirs.values()) == sorted(by_name)
        self.ids = {int(index): by_name[label] if same else int(index) for index, label in theirs.items()}
        self._count = len(id2label)

    def _find_adapter(self) -> Adapter | None:
        """The finetune if it is an adapter, which says where its base is."""
        folder = as_folder(self._place)
        try:
            if find_adapter_config_file(self._place) is None:
                return None
        except Exception as error:  # the Hub, or what is no name of a repo there
            raise OptionError(
                f"compare={short(self._place)} is no model here or on the Hub: {one_line(error)}"
            ) from None
        if folder is None:
            found = open_input(self._place, "compare")
            if not isinstance(found, Adapter):
                return None
        else:
            settings = adapter_settings("compare", folder)
            found = Adapter("compare", self._place, settings, open_adapter("compare", folder), None, folder)
        require_peft()
        check_kind(found)
        base_reference([found])  # it has to say what it was trained on
        return found

    def _config(self) -> PreTrainedConfig:
        if (folder := as_folder(self._place)) is not None:
            return read_config("compare", folder)
        try:
            return AutoConfig.from_pretrained(self._place, trust_remote_code=False)
        except Exception as error:  # the Hub, or what a configuration's class raises
            raise OptionError(
                f"compare={short(self._place)} is no model here or on the Hub: {one_line(error)}"
            ) from None

    def model(self) -> PreTrainedModel:
        """The model.

        Raises:
            OptionError: transformers cannot load it, or it lacks weights, which would be random.
        """
        if self._finished is not None:
            return plain_model(self._finished, self._task)
        try:
            model, missing = self._loaded()
        except Exception as error:  # whatever transformers says of a checkpoint that does not fit
            raise OptionError(f"compare={short(self._place)} cannot be loaded: {one_line(error)}") from None
        if missing:
            raise OptionError(
                f"compare={short(self._place)} has no {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}: "
                f"expected a finetune of {self._task} with its head"
            )
        return model

    def _loaded(self) -> tuple[PreTrainedModel, list[str]]:
        """The model, and the names of the weights that it has from nowhere."""
        adapter = self._adapter
        model, info = _AUTO[self._kind].from_pretrained(
            self._place if adapter is None else str(adapter.base),
            revision=(adapter and adapter.base_revision) or "main",
            num_labels=self._count,
            output_loading_info=True,
        )
        if adapter is not None:  # loaded by itself, as transformers tells nothing of a base's missing weights
            usable_settings(adapter.settings, model)
            check_ranks(adapter.settings, adapter.storage.infos)
            model.load_adapter(str(adapter.folder))
        modules = dict(model.named_modules())

        def is_adapters(name: str) -> bool:
            paths = accumulate(name.split("."), "{}.{}".format)
            return any(hasattr(modules.get(path), "modules_to_save") for path in paths)

        return model, sorted(name for name in info["missing_keys"] if not is_adapters(name))


@torch.no_grad()
def _predictions(
    model: PreTrainedModel, prepare: _Texts | _Images, data: LabelledData, batch_size: int, progress: bool | None
) -> list[int]:
    """Label ids in the order of the rows."""
    model.eval()
    order = list(range(len(data)))
    if isinstance(prepare, _Texts):  # rows of like length together need little padding
        order.sort(key=lambda row: -sum(len(column[row]) for column in data.columns))
    step = 1 if prepare.one_by_one(model) else batch_size
    found = [0] * len(order)
    with tqdm(
        total=len(order), desc="evaluating", unit=" rows", disable=None if progress is None else not progress
    ) as bar:
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            batch = prepare([[column[row] for row in rows] for column in data.columns], model)
            inputs = {name: values.to(model.device) for name, values in batch.items()}
            for row, index in zip(rows, model(**inputs).logits.argmax(-1).tolist()):
                found[row] = index
            bar.update(len(rows))
    return found
