"""EMRMergedModel: switching, dtypes, and life among transformers, accelerate and PEFT."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import emr_hf
from tests import tiny

TASKS = ["glue/sst2", "mnli.v1", "items"]


@pytest.fixture
def model(bert_repo):
    return AutoModelForSequenceClassification.from_pretrained(bert_repo)


@pytest.fixture(scope="module")
def gpt2_repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    inputs = tiny.write_inputs(tiny.GPT2, folder)
    emr_hf.merge(inputs.base, inputs.finetunes, folder / "out")
    return folder / "out"


def batch():
    return {"input_ids": torch.randint(5, 90, (2, 7))}


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Switching


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_switches_end_bit_equal_to_a_fresh_load(bert_repo, dtype):
    model = AutoModelForSequenceClassification.from_pretrained(bert_repo, dtype=dtype)
    choices = random.Random(0)
    for _ in range(1000):
        model.set_task(choices.choice(TASKS))
    for task in TASKS:
        fresh = AutoModelForSequenceClassification.from_pretrained(bert_repo, dtype=dtype, emr_task=task)
        assert next(fresh.model.parameters()).dtype == dtype
        assert same_weights(model.set_task(task).model, fresh.model)
        assert same_weights(model, fresh)


def test_labels_and_problem_type_follow_the_task(model):
    model.set_task("mnli.v1")
    assert model.config.num_labels == model.model.num_labels == model.model.config.num_labels == 3
    assert model.config.id2label[2] == model.model.config.id2label[2] == "mnli.v1-2"
    assert model.config.label2id == {f"mnli.v1-{i}": i for i in range(3)}
    assert model(**batch()).logits.shape == (2, 3)
    loss = model(**batch(), labels=torch.tensor([0, 2])).loss
    assert loss.isfinite()
    assert model.config.problem_type is None
    model.set_task("items")
    assert model.model.config.problem_type is None, "a labelled forward must not leak into the next task"
    assert model(**batch(), labels=torch.tensor([0, 1])).logits.shape == (2, 2)


def test_use_task_and_emr_task(model):
    inputs = batch()
    model.set_task("items")
    with model.use_task("mnli.v1") as inner:
        assert inner.active_task == "mnli.v1"
        inside = model(**inputs).logits
    assert model.active_task == "items"
    assert torch.equal(model(**inputs, emr_task="mnli.v1").logits, inside)
    assert model.active_task == "mnli.v1"
    with pytest.raises(ZeroDivisionError), model.use_task("items"):
        raise ZeroDivisionError
    assert model.active_task == "mnli.v1"


@pytest.mark.parametrize("name", ["mnli", "MNLI.v1", None, 3])
def test_an_unknown_task_is_refused_with_the_nearest_names(model, name):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(emr_hf.UnknownTaskError, match="This model holds: glue/sst2, mnli.v1, items") as error:
        model.set_task(name)
    if isinstance(name, str):
        assert "Did you mean 'mnli.v1'" in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_unknown_task_on_loading(bert_repo):
    with pytest.raises(emr_hf.UnknownTaskError, match="Did you mean 'items'"):
        AutoModelForSequenceClassification.from_pretrained(bert_repo, emr_task="item")


def test_switching_keeps_every_address(model):
    model.set_task("glue/sst2")
    before = {name: p.data_ptr() for name, p in model.model.named_parameters()}
    model.set_task("items")  # a head of the same shape
    assert before == {name: p.data_ptr() for name, p in model.model.named_parameters()}


# Saving and loading


@pytest.mark.parametrize("active", TASKS)
def test_saving_from_any_task_writes_the_same_repo(bert_repo, tmp_path, active):
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task=active)
    model(**batch(), labels=torch.tensor([0, 1]))
    model.save_pretrained(tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (bert_repo, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("config.json", "emr_report.json", "modeling_emr_hf.py"):
        assert (tmp_path / name).read_text() == (bert_repo / name).read_text()
    assert model.active_task == active
    assert model.config.id2label[0] == f"{active}-0"


def test_sharded_repos_load(bert_inputs, bert_repo, tmp_path):
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out", max_shard_size="10KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    sharded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", emr_task="items")
    whole = AutoModelForSequenceClassification.from_pretrained(bert_repo, emr_task="items")
    assert same_weights(sharded.model, whole.model)


def test_the_general_class_and_automodel_pick_the_head_class(bert_repo):
    for load in (emr_hf.EMRMergedModel, AutoModel):
        assert type(load.from_pretrained(bert_repo)).__name__ == "EMRMergedModelForSequenceClassification"


def test_a_wrong_auto_class_names_the_right_one(bert_repo):
    with pytest.raises(emr_hf.MismatchError, match="AutoModelForSequenceClassification"):
        AutoModelForTokenClassification.from_pretrained(bert_repo)


def test_load_state_dict_takes_what_state_dict_gave(bert_repo, model):
    other = AutoModelForSequenceClassification.from_pretrained(bert_repo, emr_task="items")
    expected = copy.deepcopy(other.model.state_dict())
    other.load_state_dict(model.state_dict())
    assert other.active_task == "items"
    assert all(torch.equal(expected[name], value) for name, value in other.model.state_dict().items())


def test_copies_and_pickles_switch_on_their_own(model):
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.set_task("mnli.v1")
        assert model.active_task == "glue/sst2"
        assert same_weights(twin.model, copy.deepcopy(model).set_task("mnli.v1").model)


def test_merge_and_unload_gives_the_plain_model(model):
    inputs = batch()
    expected = model(**inputs, emr_task="mnli.v1").logits
    plain = model.merge_and_unload("mnli.v1")
    assert type(plain) is BertForSequenceClassification
    assert torch.equal(plain(**inputs).logits, expected)
    assert plain.config.id2label == {i: f"mnli.v1-{i}" for i in range(3)}
    with pytest.raises(emr_hf.EMRError, match="load the repo again"):
        model.set_task("items")


def test_the_repo_loads_where_emr_hf_is_not_imported(bert_repo):
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForSequenceClassification as A\n"
        f"model = A.from_pretrained({str(bert_repo)!r}, trust_remote_code=True)\n"
        "assert model.set_task('items').active_task == 'items'\n"
        "assert type(model) is sys.modules['emr_hf'].EMRMergedModelForSequenceClassification\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_newer_format_is_refused(bert_repo, tmp_path):
    config = emr_hf.EMRConfig.from_pretrained(bert_repo).to_dict()
    with pytest.raises(emr_hf.RepoError, match="upgrade emr_hf"):
        emr_hf.EMRConfig(**{**config, "emr_format": 99})


# Dtypes and devices


def test_loading_in_another_dtype_leaves_vector_and_rescaler_exact(bert_repo):
    model = AutoModelForSequenceClassification.from_pretrained(bert_repo, dtype=torch.bfloat16)
    stored = load_file(bert_repo / "model.safetensors")
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    for name, buffer in model.emr.named_buffers():
        if name.startswith(("tau.", "mask.", "rescaler.")):
            assert buffer.dtype == stored[f"emr.{name}"].dtype
            assert torch.equal(buffer, stored[f"emr.{name}"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_equals_loading_in_that_dtype(bert_repo, model, dtype):
    model.set_task("mnli.v1").to(dtype)
    loaded = AutoModelForSequenceClassification.from_pretrained(bert_repo, dtype=dtype, emr_task="mnli.v1")
    assert same_weights(model.model, loaded.model)
    assert same_weights(model.set_task("items"), loaded.set_task("items"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parts_that_a_model_keeps_in_float32_do_not_touch_the_masks(tmp_path, dtype):
    t5 = next(t for t in tiny.ALL if t.architecture == "T5ForConditionalGeneration")
    inputs = tiny.write_inputs(t5, tmp_path, dtype=dtype)
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out", emr_task="b")
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert {n: t.dtype for n, t in first.items()} == {n: t.dtype for n, t in second.items()}
    assert all(torch.equal(first[name], second[name]) for name in first)
    wo = model.model.encoder.block[0].layer[1].DenseReluDense.wo.weight
    assert wo.dtype == (torch.float32 if dtype == torch.float16 else dtype)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(bert_repo, device_map):
    model = AutoModelForSequenceClassification.from_pretrained(bert_repo, device_map=device_map)
    assert same_weights(
        model.set_task("items").model, emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="items").model
    )


def test_an_offloaded_model_is_an_error_never_silence(bert_repo, tmp_path):
    device_map = {"model.bert.embeddings": "cpu", "model.bert.encoder": "disk", "model.bert.pooler": "cpu",
                  "model.classifier": "cpu", "model.dropout": "cpu", "emr": "cpu"}  # fmt: skip
    with pytest.raises(emr_hf.OffloadedError, match="export"):
        AutoModelForSequenceClassification.from_pretrained(bert_repo, device_map=device_map, offload_folder=tmp_path)


def test_quantising_on_load_is_refused(bert_repo):
    from transformers import BitsAndBytesConfig

    with pytest.raises(emr_hf.OptionError, match="merge_and_unload"):
        AutoModelForSequenceClassification.from_pretrained(bert_repo, quantization_config=BitsAndBytesConfig())


# Among others


def test_compiled_models_do_not_recompile_on_a_switch(model):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    inputs = batch()
    with torch.no_grad():
        for task in ("glue/sst2", "items", "glue/sst2", "items"):
            model.set_task(task)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert counter.frame_count == 1


def test_gradient_checkpointing(model):
    model.train()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    model(**batch(), labels=torch.tensor([0, 1])).loss.backward()
    assert model.model.bert.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def dataset():
    rows = [
        {"input_ids": torch.randint(5, 90, (7,)), "labels": i % 2, "text": "not a model's argument"} for i in range(8)
    ]
    return rows


def training_arguments(tmp_path, **options):
    return TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, **options)


def test_trainer_evaluates_the_active_task_and_drops_foreign_columns(model, tmp_path):
    import datasets

    data = datasets.Dataset.from_list([{**row, "input_ids": row["input_ids"].tolist()} for row in dataset()])
    trainer = Trainer(model, training_arguments(tmp_path), eval_dataset=data)
    assert trainer.evaluate()["eval_loss"] > 0
    predictions = trainer.predict(data).predictions
    with torch.no_grad():
        expected = model(torch.tensor(data["input_ids"])).logits.numpy()
    assert predictions == pytest.approx(expected, abs=1e-6)


def test_lora_trains_on_top_and_the_repo_stays_as_it_was(model, bert_repo, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is an extra of the tests")
    import datasets

    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    data = datasets.Dataset.from_list([{**row, "input_ids": row["input_ids"].tolist()} for row in dataset()])
    options = {"max_steps": 3, "learning_rate": 0.1, "save_strategy": "no"}
    Trainer(adapted, training_arguments(tmp_path / "run", **options), train_dataset=data).train()
    trained = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
    assert len(trained) == 4
    assert all(p.abs().sum() > 0 for p in trained.values())
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForSequenceClassification.from_pretrained(bert_repo)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    inputs = batch()
    adapted.eval()
    torch.testing.assert_close(again(**inputs).logits, adapted(**inputs).logits)
    model.set_task("items")
    fresh.set_task("items")
    torch.testing.assert_close(again(**inputs).logits, adapted(**inputs).logits)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generate_options(gpt2_repo, options):
    model = AutoModelForCausalLM.from_pretrained(gpt2_repo)
    inputs = batch()
    settings = {**options, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**inputs, emr_task="b", **settings)
    plain = copy.deepcopy(model).merge_and_unload("b")
    assert torch.equal(found, plain.generate(**inputs, **settings))


def test_the_generation_config_is_the_wrapped_models(gpt2_repo, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(gpt2_repo)
    model.generation_config.max_new_tokens = 3
    assert model.model.generation_config.max_new_tokens == 3
    assert model.generate(**batch()).shape[1] <= 10
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 3


def test_embeddings_cannot_be_resized_for_all_tasks_at_once(model):
    with pytest.raises(emr_hf.EMRError, match="merge_and_unload"):
        model.resize_token_embeddings(120)
