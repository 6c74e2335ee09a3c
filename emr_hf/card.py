"""The model card of a merged repo."""

from __future__ import annotations

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .configuration import EMRConfig
from .heads import auto_name
from .report import MergeReport, markdown_table

TAGS = ["merge", "emr-merging", "model-merging", "emr_hf"]

_TEXT = """\
# {title}

{count} finetunes of {base} in one {kind}, {how}:
{parts}. It becomes any of its tasks, and has to be told which.

{usage}

## Tasks

{table}

{summary}

## Recipe

```yaml
{recipe}```
"""

_EMR = "[EMR-Merging](https://arxiv.org/abs/2405.17461)"
_HOW = {
    "emr": f"merged by {_EMR} with `emr_hf`",
    "fit": f"merged with `emr_hf` by a least-squares fit in the form of {_EMR}",
    "levels": f"merged with `emr_hf` in the form of {_EMR}",
}
_PARTS = "one unified task vector, and per task a 1-bit mask per weight and a rescaler"
_LEVELS = "two values for each weight, and per task one bit per weight that picks one of them"

_USAGE = {
    "model": """\
```python
import emr_hf
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo_id}")
model.tasks  # {tasks}
model.set_task({task!r})
```

Without the `import`, `trust_remote_code=True` does the same; either way `pip install emr_hf` comes first.""",
    "peft": """\
```python
import emr_hf
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained({base!r}{revision})
model = PeftModel.from_pretrained(base, "{repo_id}")
model.tasks  # {tasks}
model.set_task({task!r})
```

`pip install 'emr_hf[adapters]'` comes first. The base is not part of this repo.""",
}


def make_card(config: EMRConfig, repo_id: str, layout: str = "model") -> str:
    """The card as Markdown with metadata.

    Args:
        config: of the repo.
        repo_id: its Hub id, or a local folder's name.
        layout: `"model"`, or `"peft"` for a merge without its base.
    """
    wrapper = (config.architectures or [""])[0]
    report = MergeReport.from_dict(config.report)
    base = str(config.base_model_name_or_path)
    text = _TEXT.format(
        title=repo_id.rpartition("/")[2],
        count=len(config.tasks),
        base=f"[{base}](https://huggingface.co/{base})" if _is_hub_id(base) else base,
        kind="model" if layout == "model" else "adapter",
        how=_HOW[config.method],
        parts=_LEVELS if config.method == "levels" else f"{'the base, ' if layout == 'model' else ''}{_PARTS}",
        usage=_USAGE[layout].format(
            auto_class=auto_name(wrapper),
            repo_id=repo_id,
            base=base,
            revision=f", revision={config.base_revision!r}" if config.base_revision else "",
            tasks=list(config.tasks),
            task=config.default_task,
        ),
        table="\n".join(_task_table(config, report)),
        summary=report.summary(),
        recipe=yaml.safe_dump(config.recipe, sort_keys=False, allow_unicode=True),
    )
    sources = [base, *(entry["source"] for entry in config.tasks.values())]
    metadata = ModelCardData(
        library_name="transformers" if layout == "model" else "peft",  # what the Hub's widgets and pipelines go by
        pipeline_tag=pipeline_tag(wrapper),
        base_model=[source for source in dict.fromkeys(sources) if _is_hub_id(source)] or None,
        base_model_relation="merge" if layout == "model" else "adapter",
        tags=TAGS,
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}"


def _task_table(config: EMRConfig, report: MergeReport) -> list[str]:
    header, rows = report.rows()
    labels = {task: ", ".join(list(entry["id2label"].values())[:6]) for task, entry in config.tasks.items()}
    more = {task: ", ..." if len(entry["id2label"]) > 6 else "" for task, entry in config.tasks.items()}
    if "Classification" not in str(config.base_architecture):
        return markdown_table(header, rows)
    return markdown_table([*header, "labels"], [[*row, labels[row[0]] + more[row[0]]] for row in rows])


def pipeline_tag(wrapper: str) -> str | None:
    """The pipeline for a wrapper's class, by transformers' own registry."""
    from transformers.pipelines import PIPELINE_REGISTRY  # which imports every kind of processor

    auto_class = auto_name(wrapper)
    for task, entry in PIPELINE_REGISTRY.supported_tasks.items():
        if auto_class in [model_class.__name__ for model_class in entry["pt"]]:
            return str(task)
    return None


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name  # a bare name may be a local folder's
