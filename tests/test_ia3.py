"""(IA)³ adapters: merged in the space of their vectors, and given back as ordinary adapters."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import emr_hf
from emr_hf.adapters.export import adapter_folders
from emr_hf.errors import OptionError
from tests import adapters, tiny
from tests.adapters import BERT_IA3
from tests.test_merging import load_folder
from tests.test_sources import copy_of, edit_json

SEQ_CLS = {"task_type": "SEQ_CLS"}
T5 = next(t for t in tiny.ALL if str(t) == "T5ForConditionalGeneration")
ELEVEN = [f"task {index}" for index in range(11)]


def write_ia3(folder, base, seed=0, **options):
    settings = {**BERT_IA3, **SEQ_CLS, **options.pop("settings", {})}
    return adapters.write_adapter(folder, tiny.BERT.architecture, base, settings, seed, "IA3", **options)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A base, an adapter with three labels, and one that scales fewer and other modules."""
    folder = tmp_path_factory.mktemp("ia3")
    base = adapters.write_base(tiny.BERT, folder / "base")
    other = {"target_modules": ["query", "value"], "feedforward_modules": []}
    found = {
        "a": write_ia3(folder / "a", base, 0, num_labels=3),
        "glue/b": write_ia3(folder / "b", base, 1, settings=other),
    }
    return tiny.Inputs(base, found)


@pytest.fixture(scope="module")
def eleven(tmp_path_factory):
    """The paper's setting: eleven adapters of one encoder-decoder model."""
    folder = tmp_path_factory.mktemp("eleven")
    base = adapters.write_base(T5, folder / "base")
    settings = {"task_type": "SEQ_2_SEQ_LM"}  # k, v and wo by PEFT's own defaults
    return tiny.Inputs(
        base,
        {
            task: adapters.write_adapter(folder / str(seed), T5.architecture, base, settings, seed, "IA3")
            for seed, task in enumerate(ELEVEN)
        },
    )


def vectors_of(folder):
    return {n: t for n, t in load_file(folder / "adapter_model.safetensors").items() if "ia3_l" in n}


def test_eleven_adapters_are_merged_as_vectors_around_one(eleven, tmp_path):
    report = emr_hf.merge(None, eleven.finetunes, tmp_path / "out")
    found = {task: vectors_of(folder) for task, folder in eleven.finetunes.items()}
    reference = emr_hf.merge_state_dicts({n: torch.ones_like(t) for n, t in found["task 0"].items()}, found)
    assert {t: n.rescaler for t, n in report.tasks.items()} == reference.rescalers
    stored = load_folder(tmp_path / "out")
    for name, tau in reference.tau.items():
        flat = name.removeprefix("base_model.model.").replace(".", "__") + "__unified"
        assert torch.equal(stored[f"emr.tau.{flat}"], tau)
    assert len([name for name in stored if name.startswith("emr.tau.")]) == len(reference.tau)


def test_eleven_tasks_are_each_what_their_adapter_would_be(eleven, tmp_path):
    emr_hf.merge(None, eleven.finetunes, tmp_path / "out")
    emr_hf.merge(None, eleven.finetunes, tmp_path / "peft", save_as="peft")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    stock = None
    for index, task in enumerate(ELEVEN):
        folder = str(tmp_path / "peft" / "adapters" / f"task-{index}")  # a blank is no name for a folder
        if stock is None:
            stock = peft.PeftModel.from_pretrained(adapters.load(T5.architecture, eleven.base), folder, task).eval()
        else:
            stock.load_adapter(folder, task)
        stock.set_adapter(task)
        batch = T5.inputs()
        with torch.no_grad():
            assert torch.equal(model(**batch, emr_task=task).logits, stock(**batch).logits), task
    options = {"max_new_tokens": 4, "do_sample": False}
    ids = T5.inputs()["input_ids"]
    assert torch.equal(model.generate(input_ids=ids, **options), stock.generate(input_ids=ids, **options))


def test_one_adapter_is_pefts_merge_of_it_bit_for_bit(bert, tmp_path):
    """Vectors between 1/2 and 2 are exact; for one outside 1 + (l - 1) may be a rounding away."""
    emr_hf.merge(bert.base, {"a": bert.finetunes["a"]}, tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out").eval()
    stock = peft.PeftModel.from_pretrained(
        adapters.load(tiny.BERT.architecture, bert.base, num_labels=3), bert.finetunes["a"]
    ).eval()
    batch = tiny.BERT.inputs()
    assert torch.equal(model(**batch).logits, stock(**batch).logits)
    expected, found = stock.merge_and_unload().state_dict(), model.merge_and_unload().state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_plan_says_which_space(bert):
    plan = emr_hf.check(emr_hf.Recipe(None, bert.finetunes))
    assert "(IA)³ vectors" in str(plan)
    assert plan.vectors is not None and all("ia3_l" in name for name in plan.merged)


def test_vectors_are_fitted_but_have_no_levels(bert, tmp_path):
    with pytest.raises(OptionError, match="the base of .* vectors is one"):
        emr_hf.merge(bert.base, bert.finetunes, tmp_path / "levels", method="levels")
    found = {}
    for method in ("emr", "fit"):
        options = {"method": method, "rescale": "least_squares", "tau_dtype": "int4"}  # rows of one have no codes
        report = emr_hf.merge(bert.base, bert.finetunes, tmp_path / method, **options)
        found[method] = sum((task.relative_error * task.length) ** 2 for task in report.tasks.values())
    assert found["fit"] <= found["emr"]


def test_electing_vectors_elects_the_weights(bert, tmp_path):
    """In the space of the weights, with a full finetune beside them, masks are the vectors' masks."""
    emr_hf.merge(None, bert.finetunes, tmp_path / "vectors")
    full = {}
    for (task, folder), count in zip(bert.finetunes.items(), (3, 2)):
        full[task] = tmp_path / f"full-{count}"
        adapters.merged_model(folder, tiny.BERT.architecture, bert.base, num_labels=count).save_pretrained(full[task])
    emr_hf.merge(bert.base, full, tmp_path / "weights")
    one = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "vectors")
    other = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "weights")
    name = "bert.encoder.layer.0.attention.self.value"
    for task in bert.finetunes:
        key = one.config.entry(task)["key"]
        vector = emr_hf.bits.unpack(one.emr.mask_of(key, f"{name}.ia3_l.unified"), (32, 1))
        weight = emr_hf.bits.unpack(other.emr.mask_of(key, f"{name}.weight"), (32, 32))
        assert torch.equal(vector.expand(32, 32), weight)


def test_a_recipe_with_other_finetunes_is_merged_as_weights(bert, tmp_path):
    tiny.move(adapters.load(tiny.BERT.architecture, bert.base), 4).save_pretrained(tmp_path / "full")
    finetunes = {"full": tmp_path / "full", "a": bert.finetunes["a"]}
    plan = emr_hf.check(emr_hf.Recipe(bert.base, finetunes))
    expected = adapters.merged_model(bert.finetunes["a"], tiny.BERT.architecture, bert.base, num_labels=3).state_dict()
    assert plan.vectors is None
    for name in plan.merged:
        assert torch.equal(plan.finetunes["a"].read(name), expected[name]), name


def test_modules_scaled_in_different_ways_are_merged_as_weights(bert, tmp_path):
    other = write_ia3(tmp_path / "b", bert.base, 2, settings={"feedforward_modules": ["value"]})
    plan = emr_hf.check(emr_hf.Recipe(None, {"a": bert.finetunes["a"], "b": other}))
    assert plan.vectors is None
    assert "bert.encoder.layer.0.attention.self.value.weight" in plan.merged


def test_the_repo_saves_and_loads_the_same(bert, tmp_path):
    emr_hf.merge(None, bert.finetunes, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").set_task("glue/b")
    model.save_pretrained(tmp_path / "again")
    one, other = load_folder(tmp_path / "out"), load_folder(tmp_path / "again")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_vectors_stay_float32_in_a_bfloat16_model(bert, tmp_path):
    emr_hf.merge(None, bert.finetunes, tmp_path / "out")
    narrow = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    wide = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    name = "bert.encoder.layer.0.attention.self.value.ia3_l.unified"
    assert torch.equal(narrow.model.get_parameter(name), wide.model.get_parameter(name))
    assert narrow.model.bert.encoder.layer[0].attention.self.query.base_layer.weight.dtype == torch.bfloat16


def test_a_task_is_exported_as_an_ordinary_adapter_and_as_a_plain_model(bert, tmp_path, recwarn):
    emr_hf.merge(None, bert.finetunes, tmp_path / "out")
    emr_hf.export(tmp_path / "out", "glue/b", tmp_path / "adapter", save_as="ia3")
    emr_hf.export(tmp_path / "out", "glue/b", tmp_path / "plain")
    base = adapters.load(tiny.BERT.architecture, bert.base)
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not [str(w.message) for w in recwarn if "missing" in str(w.message)]
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out", emr_task="glue/b").eval()
    batch = tiny.BERT.inputs()
    assert torch.equal(stock(**batch).logits, model(**batch).logits)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    assert type(plain).__name__ == tiny.BERT.architecture
    torch.testing.assert_close(plain(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)
    with pytest.raises(emr_hf.OptionError, match="--as ia3"):
        emr_hf.export(tmp_path / "out", "a", tmp_path / "lora", save_as="lora", rank=2)


def test_ordinary_adapters_keep_their_own_settings_and_keys(bert, tmp_path):
    emr_hf.merge(None, bert.finetunes, tmp_path / "out", save_as="peft")
    for task, folder in bert.finetunes.items():
        written = tmp_path / "out" / "adapters" / task
        before = json.loads((folder / "adapter_config.json").read_text())
        after = json.loads((written / "adapter_config.json").read_text())
        assert before == {**after, "base_model_name_or_path": before["base_model_name_or_path"]}
        one = load_file(folder / "adapter_model.safetensors")
        other = load_file(written / "adapter_model.safetensors")
        assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in other.items()}


def test_what_others_wrote_beside_an_adapters_settings_is_not_written_again(bert, tmp_path):
    odd = copy_of(bert.finetunes["a"], tmp_path / "odd")
    mapping = {"base_model_class": "system", "parent_library": "os"}
    edit_json(odd / "adapter_config.json", auto_mapping=mapping, home="/home/me")
    emr_hf.merge(bert.base, {"odd": odd}, tmp_path / "out", save_as="peft")
    after = json.loads((tmp_path / "out" / "adapters" / "odd" / "adapter_config.json").read_text())
    assert after["auto_mapping"] is None and "home" not in after
    assert "/home/me" not in (tmp_path / "out" / "adapter_config.json").read_text()


@pytest.mark.parametrize("name", ["target_modules", "feedforward_modules", "exclude_modules"])
def test_a_pattern_that_backtracks_is_named(bert, tmp_path, name):
    bad = copy_of(bert.finetunes["a"], tmp_path / "bad")
    edit_json(bad / "adapter_config.json", **{name: r"(([a-z._0-9])+)+!"})
    with pytest.raises(emr_hf.CheckpointError, match=f"bad: adapter_config.json: {name}: .* steps"):
        emr_hf.check(emr_hf.Recipe(None, {"bad": bad}))


def test_it_is_small(bert, tmp_path):
    report = emr_hf.merge(None, bert.finetunes, tmp_path / "out", save_as="peft")
    assert report.bytes_out == report.bytes_modulators
    weights = emr_hf.merge(None, bert.finetunes, tmp_path / "model")
    assert weights.bytes_modulators == report.bytes_modulators < weights.bytes_out / 30


def test_vectors_of_a_wrong_shape_are_named(bert, tmp_path):
    bad = copy_of(bert.finetunes["a"], tmp_path / "bad")
    edit_json(bad / "adapter_config.json", feedforward_modules=["value"])
    with pytest.raises(emr_hf.MismatchError, match=r"bad: .*ia3_l is \[1, 32\], expected \[32, 1\]"):
        emr_hf.check(emr_hf.Recipe(None, {"bad": bad}))


def test_without_peft_the_extra_is_named(bert, tmp_path, monkeypatch):
    emr_hf.merge(None, bert.finetunes, tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(emr_hf.OptionError, match=r"pip install 'emr_hf\[adapters\]'"):
        emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    with pytest.raises(emr_hf.OptionError, match=r"pip install 'emr_hf\[adapters\]'"):
        emr_hf.check(emr_hf.Recipe(None, bert.finetunes))


def test_every_task_has_a_folder_of_its_own():
    tasks = ["t1", "b c", "task-1", "a", "a/b", "../x", "mnli.v1", "x/adapter_config.json", "é", "n" * 300, "glue/b"]
    folders = adapter_folders(tasks)
    assert list(folders) == tasks and len(set(folders.values())) == len(tasks)
    assert {task for task in tasks if folders[task] == task} == {"t1", "task-1", "a", "mnli.v1", "é", "glue/b"}
    for one in folders.values():
        assert not one.startswith((".", "/")) and ".." not in one and len(one) < 100
        assert not any(other.startswith(f"{one}/") for other in folders.values())


def test_vectors_kept_private_are_written_too(bert, tmp_path, recwarn):
    emr_hf.merge(None, bert.finetunes, tmp_path / "out", save_as="peft", private="attention.self.value")
    base = adapters.load(tiny.BERT.architecture, bert.base)
    stock = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / "glue" / "b").eval()
    merged = peft.PeftModel.from_pretrained(adapters.load(tiny.BERT.architecture, bert.base), tmp_path / "out").eval()
    merged.set_task("glue/b")
    assert not [str(w.message) for w in recwarn if "missing" in str(w.message)]
    batch = tiny.BERT.inputs()
    assert torch.equal(stock(**batch).logits, merged(**batch).logits)


def test_no_path_of_this_machine_is_published(bert, tmp_path):
    emr_hf.merge(None, bert.finetunes, tmp_path / "out")
    assert str(bert.base.parent) not in (tmp_path / "out" / "config.json").read_text()


def test_no_other_adapter_goes_onto_vectors(bert, tmp_path):
    """PEFT would take their layers for its own, and turn them off with the adapter."""
    emr_hf.merge(None, bert.finetunes, tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(emr_hf.EMRError, match="no other adapter can be put on it"):
        adapted(**tiny.BERT.inputs())
    with pytest.raises(emr_hf.EMRError, match="no other adapter can be put on it"):
        model.set_task("glue/b")


@pytest.mark.parametrize("space", ["vectors", "weights"])
def test_nothing_of_a_merge_of_adapters_is_trainable(bert, tmp_path, space):
    finetunes = dict(bert.finetunes)
    if space == "weights":
        settings = {**adapters.BERT_LORA, **SEQ_CLS}
        finetunes["c"] = adapters.write_adapter(tmp_path / "c", tiny.BERT.architecture, bert.base, settings)
    emr_hf.merge(None, finetunes, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").train()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(emr_hf.EMRError, match="frozen"):
        model(**tiny.BERT.inputs(), labels=torch.zeros(2, dtype=torch.long))
    assert all(parameter.requires_grad for parameter in model.merge_and_unload("a").parameters())
