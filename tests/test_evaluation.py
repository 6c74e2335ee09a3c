"""`emr-hf eval`: a task measured on labelled data, beside its own finetune, and errors before any work."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from functools import partial

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, ViTImageProcessor

import emr_hf
from emr_hf import evaluation, labelled
from tests import adapters, tiny
from tests.test_pipelines import WORDS, write_tokenizer
from tests.test_sources import edit_json

TEXTS = ["a good film", "the bad film", "bad", "a good the film", "good", "film bad a"]
REVERSED = [*WORDS[:5], *reversed(WORDS[5:])]


@pytest.fixture(scope="module")
def inputs(bert_inputs, tmp_path_factory):
    """Finetunes with tokenizers, the last one with its own."""
    folder = tmp_path_factory.mktemp("evaluation")
    found = tiny.Inputs(bert_inputs.base)
    for task, path in bert_inputs.finetunes.items():
        found.finetunes[task] = folder / path.name
        shutil.copytree(path, found.finetunes[task])
        write_tokenizer(found.finetunes[task], WORDS if task != "items" else REVERSED)
    return found


@pytest.fixture(scope="module")
def repo(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation-repo") / "out"
    emr_hf.merge(inputs.base, inputs.finetunes, out)
    return out


@pytest.fixture
def run(run):
    return partial(run, "eval")


@torch.no_grad()
def predicted(folder, texts, words=WORDS, pairs=None, **options):
    """Label ids by the model itself, a row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    found = []
    for row, text in enumerate(texts):
        ids, types = [2, *(words.index(word) for word in text.split()), 3], []
        types = [0] * len(ids)
        if pairs:
            more = [*(words.index(word) for word in pairs[row].split()), 3]
            ids, types = ids + more, types + [1] * len(more)
        logits = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
        found.append(int(logits.argmax()))
    return found


def write_csv(path, texts, labels, header="text,label"):
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in zip(texts, labels))]) + "\n")
    return path


def test_accuracy_of_the_default_task_and_of_its_finetune(run, repo, inputs, tmp_path):
    labels = [0, 1, 0, 1, 0, 1]
    data = write_csv(tmp_path / "data.csv", TEXTS, labels)
    ours = predicted(repo, TEXTS)
    theirs = predicted(inputs.finetunes["glue/sst2"], TEXTS)
    result = run(repo, "--data", data, "--compare", inputs.finetunes["glue/sst2"], "--format", "json")
    assert result.status == 0, result.err
    found = json.loads(result.out)
    assert (found["task"], found["rows"]) == ("glue/sst2", 6)
    assert found["metrics"] == {"accuracy": sum(a == b for a, b in zip(ours, labels)) / 6}
    assert found["compared_metrics"] == {"accuracy": sum(a == b for a, b in zip(theirs, labels)) / 6}
    assert found["agreement"] == sum(a == b for a, b in zip(ours, theirs)) / 6
    text = run(repo, "--data", data, "--compare", inputs.finetunes["glue/sst2"]).out
    assert "accuracy" in text and "individual" in text and "kept" in text and "6 rows" in text


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_task_with_its_own_tokenizer_and_label_names(repo, tmp_path, batch_size):
    right = predicted(repo, TEXTS, REVERSED, emr_task="items")
    rows = [{"sentence": text, "labels": f"Items-{index}"} for text, index in zip(TEXTS, right)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = emr_hf.evaluate_task(repo, tmp_path / "data.jsonl", "items", batch_size=batch_size)
    assert found.metrics == {"accuracy": 1.0}
    assert emr_hf.evaluate_task(repo, tmp_path / "data.jsonl", "items", rows=2).rows == 2


def test_pairs_of_a_saved_data_set_with_splits_and_names_of_its_own(run, repo, tmp_path):
    pairs = list(reversed(TEXTS))
    right = predicted(repo, TEXTS, pairs=pairs, emr_task="mnli.v1")
    names = ["mnli.v1-2", "mnli.v1-0", "mnli.v1-1"]  # another order than the task's
    columns = {
        "premise": TEXTS,
        "hypothesis": pairs,
        "label": [names.index(f"mnli.v1-{index}") for index in right],
    }
    kinds = datasets.Features(
        premise=datasets.Value("string"), hypothesis=datasets.Value("string"), label=datasets.ClassLabel(names=names)
    )
    rows = datasets.Dataset.from_dict(columns, features=kinds)
    datasets.DatasetDict(dev=rows, test=rows.select(range(3))).save_to_disk(tmp_path / "saved")
    result = run(repo, "--data", tmp_path / "saved", "--task", "mnli.v1", "--split", "dev", "--format", "json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["metrics"] == {"accuracy": 1.0}
    options = ["--text-column", "premise", "hypothesis", "--label-column", "label"]
    result = run(repo, "--data", tmp_path / "saved", "--task", "mnli.v1", "--split", "test", *options)
    assert result.status == 0 and "1.0000" in result.out
    result = run(repo, "--data", tmp_path / "saved", "--task", "mnli.v1")
    assert result.status == 1 and "dev, test" in result.err
    result = run(repo, "--data", tmp_path / "saved", "--task", "mnli.v1", "--split", "tset")
    assert result.status == 1 and "Did you mean 'test'" in result.err


def test_a_data_set_of_several_configurations(run, repo, tmp_path, monkeypatch):
    folder = tmp_path / "glue"
    right = predicted(repo, TEXTS)
    for name, labels in (("sst2", right), ("other", [1 - label for label in right])):
        (folder / name).mkdir(parents=True)
        write_csv(folder / name / "validation.csv", TEXTS, labels)
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("sst2", "other"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, expected in (("sst2", "1.0000"), ("other", "0.0000")):
        result = run(repo, "--data", folder, "--config", name)
        assert result.status == 0 and expected in result.out, result.err
    assert "sst2" in fails(run, monkeypatch, repo, "--data", folder)
    assert "sst2" in fails(run, monkeypatch, repo, "--data", folder, "--config", "sst3")
    file = folder / "sst2" / "validation.csv"
    assert "config='sst2'" in fails(run, monkeypatch, repo, "--data", file, "--config", "sst2")


def test_a_split_is_not_ignored(run, repo, tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"text": TEXTS, "label": [0] * 6}).save_to_disk(tmp_path / "saved")
    assert "split='test'" in fails(run, monkeypatch, repo, "--data", tmp_path / "saved", "--split", "test")
    assert "split='b'" in fails(run, monkeypatch, repo, "--data", "me/data:a", "--split", "b")


def test_labels_are_names_or_ids():
    nli, stars = {0: "no", 1: "Yes", 2: "maybe"}, {index: str(index + 1) for index in range(5)}
    ids = partial(labelled.label_ids, task="nli")
    assert ids(["yes", "2", 0], None, nli) == [1, 2, 0]
    assert ids([0, 1, 2.0], ["yes", "maybe", "no"], nli) == [1, 2, 0]
    assert ids([0, 1], ["yes", "maybe", "hidden"], nli) == [1, 2]
    assert ids([0, 1], ["LABEL_0", "LABEL_1"], nli) == [0, 1]
    with pytest.raises(emr_hf.OptionError, match=r"nli does not have the labels 'hidden'\. It has: no \(0\)"):
        ids([0, 2], ["yes", "maybe", "hidden"], nli)
    for kind in (str, int, float):
        texts = "{:.0f}".format if kind is str else kind
        assert ids([texts(value) for value in (1, 2, 5)], None, stars) == [0, 1, 4]
        assert ids([texts(value) for value in (0, 1, 4)], None, stars) == [0, 1, 4]
    with pytest.raises(emr_hf.OptionError, match=r"does not have the labels 5\."):
        ids([0, 5], None, stars)


def test_kept_is_told_where_it_is_a_number():
    found = {"none": 0.0, "nan": float("nan"), "half": 0.4, "zero": 0.0}
    alone = {"none": 0.5, "nan": 0.5, "half": 0.8, "zero": 0.0}
    lines = str(emr_hf.Evaluation("repo", "task", "data", 2, found, "alone", alone)).splitlines()
    shares = {line.split()[0]: line.split()[-1] for line in lines if line.split()[:1] and line.split()[0] in found}
    assert shares == {"none": "0.0%", "nan": "0.5000", "half": "50.0%", "zero": "0.0000"}


def test_images_by_path(tmp_path):
    from PIL import Image

    vit = next(t for t in tiny.ALL if t.architecture == "ViTForImageClassification")
    inputs = tiny.write_inputs(vit, tmp_path)
    for folder in inputs.finetunes.values():
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out")
    for index in range(3):
        Image.new("RGB", (20, 20), (80 * index, 10, 200)).save(tmp_path / f"{index}.png")
    data = write_csv(tmp_path / "data.csv", ["0.png", "1.png", "2.png"], [0, 0, 0], "image,label")
    found = emr_hf.evaluate_task(tmp_path / "out", data, "a", compare=inputs.finetunes["a"])
    assert 0 <= found.metrics["accuracy"] <= 1 and found.rows == 3 and found.agreement is not None
    columns = {"img": [Image.new("RGB", (20, 20))] * 2, "label": [0, 1]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    assert emr_hf.evaluate_task(tmp_path / "out", tmp_path / "saved", "a").metrics == {"accuracy": 0.5}
    (tmp_path / "cut.png").write_bytes((tmp_path / "1.png").read_bytes()[:-30])
    os.mkfifo(tmp_path / "pipe.png")
    for row, names in enumerate((["out"], ["0.png", "cut.png"], ["0.png", "1.png", "pipe.png"])):
        data = write_csv(tmp_path / "bad.csv", names, [0] * len(names), "image,label")
        with pytest.raises(emr_hf.OptionError, match=f"row {row}: 'image' is no image"):
            emr_hf.evaluate_task(tmp_path / "out", data, "a")


def test_an_adapter_without_its_base(run, tmp_path):
    base = adapters.write_base(tiny.BERT, tmp_path / "base")
    write_tokenizer(base, WORDS)
    settings = {**adapters.BERT_IA3, "task_type": "SEQ_CLS"}
    finetunes = {}
    for seed, task in enumerate(("sst2", "mnli")):
        finetunes[task] = tmp_path / task
        adapters.write_adapter(finetunes[task], tiny.BERT.architecture, base, settings, seed, "IA3")
    emr_hf.merge(None, finetunes, tmp_path / "out", save_as="peft")
    data = write_csv(tmp_path / "data.csv", TEXTS, [0] * 6)
    result = run(tmp_path / "out", "--data", data, "--task", "mnli", "--compare", finetunes["mnli"])
    assert result.status == 0, result.err
    assert "both say the same" in result.out


METRIC = """
import datasets
import evaluate

class Wrong(evaluate.Metric):
    def _info(self):
        kind = datasets.Value("int32")
        features = datasets.Features({"predictions": kind, "references": kind})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, average="binary"):
        if average == "binary" and max(references) > 1:
            raise ValueError("please choose another average")
        return {"wrong": sum(p != r for p, r in zip(predictions, references))}
"""


@pytest.fixture
def metric(tmp_path):
    (tmp_path / "wrong.py").write_text(METRIC)
    return tmp_path / "wrong.py"


def test_a_metric_from_a_script(run, repo, tmp_path, metric):
    wrong = [1 - index for index in predicted(repo, TEXTS)]
    data = write_csv(tmp_path / "data.csv", TEXTS, wrong)
    result = run(repo, "--data", data, "--metric", "accuracy", metric, f"{metric}:macro", "--format", "json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["metrics"] == {"accuracy": 0.0, "wrong": 6, "wrong:macro": 6}


NAN = METRIC.replace('{"wrong": sum(p != r for p, r in zip(predictions, references))}', '{"wrong": float("nan")}')


def test_a_metric_of_nan_is_null_in_json(run, repo, tmp_path):
    (tmp_path / "nan.py").write_text(NAN)
    data = write_csv(tmp_path / "data.csv", TEXTS, [0] * 6)
    arguments = [repo, "--data", data, "--metric", tmp_path / "nan.py"]
    result = run(*arguments, "--format", "json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["metrics"] == {"wrong": None}
    assert "nan" in run(*arguments).out


def test_quotes_and_words_that_stand_for_nothing_are_text(run, repo, tmp_path):
    lines = ['"good film\t0', "bad\t1", 'bad"\t1', "null\t0", "NA\t0"]
    (tmp_path / "data.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    assert labelled.read_data(tmp_path / "data.tsv", *[None] * 5, "text").labels == [0, 1, 1, 0, 0]
    assert emr_hf.evaluate_task(repo, tmp_path / "data.tsv").rows == 5
    found = labelled.read_data(write_csv(tmp_path / "na.csv", ["NA", "null"], ["None", "n/a"]), *[None] * 5, "text")
    assert (found.columns, found.labels) == ([["NA", "null"]], ["None", "n/a"])


def merged(kind, folder, words=WORDS, **settings):
    """A repo of an architecture with a tokenizer of these words, and the inputs."""
    found = next(t for t in tiny.ALL if t.architecture == kind)
    found = replace(found, settings={**found.settings, **settings})
    inputs = tiny.write_inputs(found, folder)
    for path in inputs.finetunes.values():
        write_tokenizer(path, words)
    emr_hf.merge(inputs.base, inputs.finetunes, folder / "out")
    return folder / "out", inputs


def test_long_texts_where_positions_begin_after_the_padding(tmp_path):
    repo, inputs = merged("RobertaForSequenceClassification", tmp_path, pad_token_id=0)
    data = write_csv(tmp_path / "data.csv", ["good " * 200, "bad"], [0, 1])
    assert emr_hf.evaluate_task(repo, data, "a", compare=inputs.finetunes["a"]).agreement is not None
    model = AutoModelForSequenceClassification.from_pretrained(inputs.finetunes["a"])
    assert evaluation._positions(model) == 63
    model(input_ids=torch.full((1, 63), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 64), 5))


@pytest.mark.parametrize("pad", [None, 0, 7])
def test_rows_are_padded_only_by_what_the_model_takes_for_padding(tmp_path, pad):
    repo, inputs = merged("GPT2ForSequenceClassification", tmp_path, pad_token_id=pad)
    right = predicted_by(inputs.finetunes["a"])
    data = write_csv(tmp_path / "data.csv", TEXTS, right)
    found = emr_hf.evaluate_task(repo, data, "a", compare=inputs.finetunes["a"], batch_size=4)
    assert found.compared_metrics == {"accuracy": 1.0}


@torch.no_grad()
def predicted_by(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [[2, *(WORDS.index(word) for word in text.split()), 3] for text in TEXTS]
    kinds = "input_ids", "token_type_ids"
    batches = (dict(zip(kinds, torch.tensor([[ids], [[0] * len(ids)]]))) for ids in rows)
    return [int(model(**batch).logits.argmax()) for batch in batches]


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_told(run, tmp_path):
    repo, _ = merged("BertForSequenceClassification", tmp_path, [*WORDS, *(f"w{k}" for k in range(200))])
    data = write_csv(tmp_path / "data.csv", ["good", "w150"], [0, 1])
    result = run(repo, "--data", data, "--task", "a")
    assert result.status == 1 and result.err.count("\n") == 1
    assert "160 ('w150')" in result.err and "96 tokens" in result.err
    assert run(repo, "--data", data, "--task", "a", "--rows", "1").status == 0  # tokens that are not used do no harm


# Errors


def fails(run, monkeypatch, *arguments):
    """The message of a run that must fail before a model is loaded."""
    monkeypatch.setattr(evaluation, "plain_model", lambda *args: pytest.fail("a model was loaded"))
    result = run(*arguments)
    assert result.status == 1 and result.out == "", result.out
    assert result.err.startswith("emr-hf: ") and result.err.count("\n") == 1
    return result.err


def test_unknown_labels_are_named_with_the_known_ones(run, repo, tmp_path, monkeypatch):
    data = write_csv(tmp_path / "data.csv", TEXTS, ["glue/sst2-0", "good", "bad", "glue/sst2-1", "good", "2"])
    message = fails(run, monkeypatch, repo, "--data", data)
    assert "'good', 'bad', '2'" in message and "glue/sst2-0 (0), glue/sst2-1 (1)" in message
    data = write_csv(tmp_path / "ids.csv", TEXTS, [0, 1, -1, 0, 0, 0])
    assert "labels -1." in fails(run, monkeypatch, repo, "--data", data)


def test_missing_columns_rows_and_files(run, repo, tmp_path, monkeypatch):
    data = write_csv(tmp_path / "data.csv", TEXTS, [0] * 6, "review,class")
    assert "no column text or sentence" in fails(run, monkeypatch, repo, "--data", data)
    assert "'reveiw'. Did you mean 'review'" in fails(
        run, monkeypatch, repo, "--data", data, "--text-column", "reveiw"
    )
    assert "review, class" in fails(run, monkeypatch, repo, "--data", data, "--text-column", "review")
    three = ["--text-column", "review", "class", "review"]
    assert "one or two columns" in fails(run, monkeypatch, repo, "--data", data, *three)
    assert "no such file" in fails(run, monkeypatch, repo, "--data", tmp_path / "absent.csv")
    (tmp_path / "data.txt").write_text("a")
    assert ".parquet" in fails(run, monkeypatch, repo, "--data", tmp_path / "data.txt")
    assert "me/nothing" in fails(run, monkeypatch, repo, "--data", "me/nothing:test")
    data = write_csv(tmp_path / "gap.csv", ["good", "", "bad"], [0, 1, 0])
    assert "row 1: 'text' is None" in fails(run, monkeypatch, repo, "--data", data)
    (tmp_path / "broken.json").write_text("{")
    assert "cannot read" in fails(run, monkeypatch, repo, "--data", tmp_path / "broken.json")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt", ""])
def test_data_that_is_no_file_is_named(run, repo, tmp_path, monkeypatch, suffix):
    pipe, dangling = tmp_path / f"pipe{suffix}", tmp_path / f"dangling{suffix}"
    os.mkfifo(pipe)
    dangling.symlink_to(tmp_path / "nowhere")
    for path in (pipe, dangling):
        assert str(path) in fails(run, monkeypatch, repo, "--data", path)
    assert fails(run, monkeypatch, repo, "--data", "x" * 5000)


CHANGES = [
    ({"target_modules": r"(([a-z._0-9])+)+!"}, "target_modules"),
    ({"modules_to_save": [r"(([a-z._0-9])+)+!"]}, "modules_to_save"),
    ({"r": 10**9}, "rank 'r' is 1000000000"),
    ({"rank_pattern": {"query": 10**9}}, "rank 'query' is 1000000000"),
    ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
    ({"base_model_name_or_path": None}, "does not name its base"),
    ({"peft_type": None}, "no field 'peft_type'"),
]


@pytest.mark.parametrize(("changes", "named"), CHANGES, ids=[named for _, named in CHANGES])
def test_an_adapter_to_compare_with_is_checked_as_an_input_is(run, repo, tmp_path, monkeypatch, changes, named):
    base = adapters.write_base(tiny.BERT, tmp_path / "base")
    bad = adapters.write_adapter(tmp_path / "bad", tiny.BERT.architecture, base, adapters.BERT_LORA)
    edit_json(bad / "adapter_config.json", **changes)
    data = write_csv(tmp_path / "data.csv", TEXTS, [0] * 6)
    assert named in fails(run, monkeypatch, repo, "--data", data, "--compare", bad)


def test_bad_options(run, repo, inputs, tmp_path, monkeypatch, metric):
    data = write_csv(tmp_path / "data.csv", TEXTS, [0, 1, 2, 0, 1, 2])
    message = fails(run, monkeypatch, repo, "--data", data, "--task", "itms")
    assert "Did you mean 'items'" in message
    for option in ("--batch-size", "--rows"):
        assert "at least 1" in fails(run, monkeypatch, repo, "--data", data, option, "0")
    mnli = [repo, "--data", data, "--task", "mnli.v1"]
    assert "another average" in fails(run, monkeypatch, *mnli, "--metric", metric)
    assert "'no-such-metric' cannot be loaded" in fails(run, monkeypatch, *mnli, "--metric", "no-such-metric")
    assert "has 2 labels, mnli.v1 has 3" in fails(run, monkeypatch, *mnli, "--compare", inputs.finetunes["items"])
    assert "no model here" in fails(run, monkeypatch, *mnli, "--compare", tmp_path / "nowhere")
    with pytest.raises(emr_hf.OptionError, match="at least one"):
        emr_hf.evaluate_task(repo, data, metrics=[])
    assert "is no merged repo" in fails(run, monkeypatch, inputs.base, "--data", data)
    assert "is no merged repo" in fails(run, monkeypatch, tmp_path / "nowhere", "--data", data)


def test_a_finetune_that_lacks_weights_is_told_before_anything_is_predicted(run, repo, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "_predictions", lambda *args: pytest.fail("something was predicted"))
    data = write_csv(tmp_path / "data.csv", TEXTS, [0] * 6)
    message = fails(run, monkeypatch, repo, "--data", data, "--compare", inputs.base)
    assert str(inputs.base) in message and "has no classifier.bias, classifier.weight" in message
    broken = shutil.copytree(inputs.finetunes["glue/sst2"], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"xx")
    assert f"{str(broken)!r} cannot be loaded" in fails(run, monkeypatch, repo, "--data", data, "--compare", broken)
    base, headless = adapters.write_base(tiny.BERT, tmp_path / "base"), tmp_path / "headless"
    adapters.write_adapter(headless, tiny.BERT.architecture, base, adapters.BERT_LORA)
    assert "has no classifier.bias" in fails(run, monkeypatch, repo, "--data", data, "--compare", headless)


def test_a_repo_without_a_tokenizer_is_told(run, bert_repo, tmp_path, monkeypatch):
    data = write_csv(tmp_path / "data.csv", TEXTS, [0] * 6)
    assert "no tokenizer" in fails(run, monkeypatch, bert_repo, "--data", data)


@pytest.mark.parametrize("library", ["datasets", "evaluate"])
def test_a_missing_library_is_named_with_its_extra(run, repo, tmp_path, monkeypatch, library):
    data = write_csv(tmp_path / "data.csv", TEXTS, [0] * 6)
    monkeypatch.setitem(sys.modules, library, None)
    metric = "f1" if library == "evaluate" else "accuracy"
    assert "emr_hf[eval]" in fails(run, monkeypatch, repo, "--data", data, "--metric", metric)
    if library == "evaluate":
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, library, None)
        assert run(repo, "--data", data).status == 0


def test_what_does_not_classify_is_refused(run, tmp_path, monkeypatch):
    inputs = tiny.write_inputs(tiny.GPT2, tmp_path)
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out")
    data = write_csv(tmp_path / "data.csv", TEXTS, [0] * 6)
    message = fails(run, monkeypatch, tmp_path / "out", "--data", data)
    assert "GPT2LMHeadModel" in message and "ForSequenceClassification" in message
