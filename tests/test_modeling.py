"""EMRMergedModel: switching, dtypes, and life among transformers, accelerate and PEFT."""

from __future__ import annotations

import copy
import pickle
import random
import subprocess
import sys

import accelerate
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
    GenerationConfig,
    MarianMTModel,
    Trainer,
    TrainingArguments,
)

import emr_hf
from emr_hf.sites import install
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


def test_switching_in_inference_mode_leaves_ordinary_parameters(bert_repo):
    model = AutoModelForSequenceClassification.from_pretrained(bert_repo)
    with torch.inference_mode():
        model.set_task("mnli.v1")  # a head of another shape
        model(**batch())
    assert not any(parameter.is_inference() for parameter in model.parameters())
    fresh = AutoModelForSequenceClassification.from_pretrained(bert_repo, emr_task="items")
    assert same_weights(model.set_task("items").model, fresh.model)


def test_an_interrupted_switch_is_made_good_by_the_next(bert_repo, model, monkeypatch):
    rebuild, calls = emr_hf.bits.rebuild, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return rebuild(*args, **kwargs)

    monkeypatch.setattr(emr_hf.bits, "rebuild", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.set_task("items")
    monkeypatch.setattr(emr_hf.bits, "rebuild", rebuild)
    assert model.active_task == "glue/sst2"
    fresh = AutoModelForSequenceClassification.from_pretrained(bert_repo)
    assert same_weights(model.set_task("glue/sst2").model, fresh.model)
    assert same_weights(model, fresh)


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


def test_assigned_weights_are_copied_before_they_are_rebuilt_in_place(bert_repo, model):
    other = AutoModelForSequenceClassification.from_pretrained(bert_repo, emr_task="items")
    model.load_state_dict(other.state_dict(), assign=True)
    other.load_state_dict(other.state_dict(), assign=True)
    for task in TASKS:
        fresh = AutoModelForSequenceClassification.from_pretrained(bert_repo, emr_task=task)
        assert same_weights(model.set_task(task).model, fresh.model)
        assert same_weights(other.model, fresh.model) == (task == "items")
    assert same_weights(other.set_task("mnli.v1").model, model.set_task("mnli.v1").model)


def test_an_empty_model_takes_a_state_dict(bert_repo, model):
    config = emr_hf.EMRConfig.from_pretrained(bert_repo)
    with accelerate.init_empty_weights(include_buffers=False):
        empty = emr_hf.EMRMergedModelForSequenceClassification(config)
    empty.load_state_dict(model.state_dict(), assign=True, strict=False)
    assert same_weights(empty.set_task("items").model, model.set_task("items").model)


def test_what_is_set_in_the_configuration_reaches_the_wrapped_model(tmp_path):
    classifier = next(t for t in tiny.ALL if t.architecture == "GPT2ForSequenceClassification")
    inputs = tiny.write_inputs(classifier, tmp_path)
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_hidden_states=True)
    assert model(**batch()).hidden_states is not None
    model.config.pad_token_id = 7
    model.config.output_hidden_states = False
    assert model.model.config.pad_token_id == 7
    assert model(**batch()).hidden_states is None
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert again.config.pad_token_id == again.model.config.pad_token_id == 7
    assert not again.config.output_hidden_states
    with pytest.raises(emr_hf.OptionError, match="num_labels"):
        model.config.num_labels = 5


def test_a_tied_private_tensor_stays_tied_and_loads_without_a_word(tmp_path, caplog):
    inputs = tiny.write_inputs(tiny.GPT2, tmp_path)
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out", private=["wte"])
    caplog.clear()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not caplog.records, caplog.text
    own = load_file(inputs.finetunes["b"] / "model.safetensors")["transformer.wte.weight"]
    model.set_task("b")
    assert torch.equal(model.model.lm_head.weight, own)
    assert model.model.lm_head.weight is model.model.transformer.wte.weight
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()


def test_tied_private_tensors_of_another_shape_stay_tied():
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.weight = one.weight
    install([(one, "weight"), (other, "weight")], torch.ones(5, 3))
    assert one.weight is other.weight
    assert one.out_features == other.out_features == 5


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
    with pytest.raises(emr_hf.RepoError, match="emr_format: .* version 99"):
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
        model.set_task("items").model.cpu(), emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="items").model
    )


def test_an_offloaded_model_is_an_error_never_silence(bert_repo, tmp_path):
    device_map = {"model.bert.embeddings": "cpu", "model.bert.encoder": "disk", "model.bert.pooler": "cpu",
                  "model.classifier": "cpu", "model.dropout": "cpu", "emr": "cpu"}  # fmt: skip
    with pytest.raises(emr_hf.OffloadedError, match="export"):
        AutoModelForSequenceClassification.from_pretrained(bert_repo, device_map=device_map, offload_folder=tmp_path)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloading_after_loading_is_an_error_and_offloading_the_wrapped_model_is_right(bert_repo, tmp_path, offload):
    def offloaded(module):
        if offload == "cpu":
            return accelerate.cpu_offload(
                module, "cpu", state_dict={k: v.clone() for k, v in module.state_dict().items()}
            )
        return accelerate.disk_offload(module, tmp_path / "weights", "cpu")

    inputs = batch()
    model = AutoModelForSequenceClassification.from_pretrained(bert_repo, emr_task="items")
    expected = model(**inputs).logits
    offloaded(model.model)
    assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(emr_hf.OffloadedError):
        model.set_task("mnli.v1")
    other = AutoModelForSequenceClassification.from_pretrained(bert_repo)
    accelerate.hooks.add_hook_to_module(other, accelerate.hooks.ModelHook())
    other.model.bert.pooler.dense.to("meta")
    with pytest.raises(emr_hf.OffloadedError, match="merge_and_unload"):
        other(**inputs)


def test_a_bank_that_is_away_is_an_offloaded_model(model):
    model.emr.tau.to("meta")
    with pytest.raises(emr_hf.OffloadedError):
        model.set_task("items")


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
    model.train().requires_grad_(True)
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    model(**batch(), labels=torch.tensor([0, 1])).loss.backward()
    assert model.model.bert.encoder.layer[0].output.dense.weight.grad.abs().sum() > 0


def rows():
    return [{"input_ids": [5 + i, 6, 7], "labels": i % 2} for i in range(8)]


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


def test_generation_settings_follow_the_task_where_they_differ(tmp_path):
    inputs = tiny.write_inputs(tiny.GPT2, tmp_path)
    config = GenerationConfig.from_pretrained(inputs.finetunes["b"])
    config.max_new_tokens = 3
    config.save_pretrained(inputs.finetunes["b"])
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", emr_task="b")
    assert model.generation_config.max_new_tokens == 3
    model.save_pretrained(tmp_path / "again")
    assert model.generation_config.max_new_tokens == 3
    for repo in ("out", "again"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / repo)
        assert [model.set_task(task).generation_config.max_new_tokens for task in "abc"] == [None, 3, None]
    emr_hf.export(tmp_path / "out", "b", tmp_path / "plain")
    assert GenerationConfig.from_pretrained(tmp_path / "plain").max_new_tokens == 3


def test_what_transformers_computes_anew_need_not_be_stored(tmp_path):
    """Marian saves no sinusoidal positions."""
    settings = {**tiny.LAYERS, "vocab_size": 96, "decoder_vocab_size": 96, "max_position_embeddings": 64,
                "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
    marian = tiny.Tiny("MarianMTModel", "MarianConfig", settings)
    inputs = tiny.write_inputs(marian, tmp_path)
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out", emr_task="b")
    emr_hf.export(tmp_path / "out", "b", tmp_path / "plain")
    plain = MarianMTModel.from_pretrained(tmp_path / "plain")
    inputs = {"input_ids": torch.randint(5, 90, (2, 7)), "decoder_input_ids": torch.randint(5, 90, (2, 4))}
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_training_the_merged_weights_is_refused_at_the_first_step(model, bert_repo, tmp_path):
    trainer = Trainer(model, training_arguments(tmp_path, max_steps=1), train_dataset=rows())
    with pytest.raises(emr_hf.EMRError, match="merge_and_unload"):
        trainer.train()
    plain = model.merge_and_unload("items")
    Trainer(plain, training_arguments(tmp_path, max_steps=1, save_strategy="no"), train_dataset=rows()).train()


def test_adapters_are_not_saved_into_the_repo(model, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is an extra of the tests")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(emr_hf.EMRError, match="adapters are attached"):
        model.save_pretrained(tmp_path / "out")


def test_embeddings_cannot_be_resized_for_all_tasks_at_once(model):
    with pytest.raises(emr_hf.EMRError, match="merge_and_unload"):
        model.resize_token_embeddings(120)
