"""Stock pipelines on the active task, and ours with the task in the call."""

from __future__ import annotations

import logging
import shutil
from functools import partial

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, BertTokenizer

import emr_hf
from tests import tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "the"]
pipeline = partial(transformers.pipeline, device="cpu")  # where the models are that it is compared with


def write_tokenizer(folder, words):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)


@pytest.fixture(scope="module")
def repo(bert_inputs, tmp_path_factory):
    """A repo whose last task has a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("pipelines")
    finetunes = {}
    for task, path in bert_inputs.finetunes.items():
        finetunes[task] = folder / path.name
        shutil.copytree(path, finetunes[task])
        write_tokenizer(finetunes[task], WORDS if task != "items" else [*WORDS[:5], *reversed(WORDS[5:])])
    emr_hf.merge(bert_inputs.base, finetunes, folder / "out")
    return folder / "out"


def expected_label(repo, task, text, words=WORDS):
    model = AutoModelForSequenceClassification.from_pretrained(repo, emr_task=task)
    ids = torch.tensor([[2, *(words.index(word) for word in text.split()), 3]])
    with torch.no_grad():
        scores = model(ids).logits.softmax(-1)[0]
    return {"label": f"{task}-{int(scores.argmax())}", "score": pytest.approx(float(scores.max()), abs=1e-5)}


def test_the_stock_pipeline_loads_without_a_word_and_follows_set_task(repo, caplog):
    with caplog.at_level(logging.WARNING):
        pipe = pipeline("text-classification", model=str(repo))
    assert not caplog.records, caplog.text
    assert pipe("a good film") == [expected_label(repo, "glue/sst2", "a good film")]
    pipe.model.set_task("mnli.v1")
    assert pipe("a good film") == [expected_label(repo, "mnli.v1", "a good film")]


def test_the_stock_pipeline_starts_with_the_task_asked_for(repo):
    pipe = pipeline("text-classification", model=str(repo), model_kwargs={"emr_task": "mnli.v1"})
    assert pipe("a film") == [expected_label(repo, "mnli.v1", "a film")]


@pytest.mark.parametrize("by_name", [True, False])
def test_our_pipeline_takes_the_task_with_the_call(repo, by_name):
    if by_name:
        pipe = pipeline("emr-text-classification", model=str(repo))
    else:
        kind = emr_hf.EMRTextClassificationPipeline
        pipe = pipeline("text-classification", model=str(repo), pipeline_class=kind)
    texts = ["a good film", "the bad film", "bad"]
    for task in ("mnli.v1", "glue/sst2", "mnli.v1"):
        found = pipe(texts, emr_task=task, batch_size=2)
        assert found == [expected_label(repo, task, text) for text in texts]
    assert pipe("bad") == [expected_label(repo, "mnli.v1", "bad")], "the task stays active"


def test_our_pipeline_uses_the_tasks_own_tokenizer(repo):
    pipe = pipeline("emr-text-classification", model=str(repo))
    words = [*WORDS[:5], *reversed(WORDS[5:])]
    assert pipe("a good film", emr_task="items") == [expected_label(repo, "items", "a good film", words)]
    assert pipe("a good film", emr_task="mnli.v1") == [expected_label(repo, "mnli.v1", "a good film")]


def test_our_pipeline_refuses_an_unknown_task_before_any_work(repo):
    pipe = pipeline("emr-text-classification", model=str(repo))
    with pytest.raises(emr_hf.UnknownTaskError, match="Did you mean 'items'"):
        pipe("a good film", emr_task="itms")


def test_image_classification(tmp_path):
    from PIL import Image
    from transformers import ViTImageProcessor

    vit = next(t for t in tiny.ALL if t.architecture == "ViTForImageClassification")
    inputs = tiny.write_inputs(vit, tmp_path)
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "out")
    pipe = pipeline("emr-image-classification", model=str(tmp_path / "out"))
    assert len(pipe(Image.new("RGB", (16, 16)), emr_task="b")) == 3
    assert pipe(Image.new("RGB", (16, 16)), emr_task="a")[0]["label"].startswith("a-")
