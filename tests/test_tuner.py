"""A merge as a PEFT adapter: `PeftModel`, the Auto classes, and a base kept elsewhere or quantised."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

import emr_hf
from tests import adapters, tiny
from tests.adapters import BERT_IA3, BERT_LORA

SEQ_CLS = {"task_type": "SEQ_CLS"}
KINDS = ("lora", "ia3", "full")


def write_finetunes(kind, folder):
    """A base and two finetunes `a` and `b`, with three and two labels."""
    if kind == "full":
        inputs = tiny.write_inputs(tiny.BERT, folder, ("b", "a"))
        return inputs.base, {task: inputs.finetunes[task] for task in "ab"}
    base = adapters.write_base(tiny.BERT, folder / "base")
    first, second, peft_type = {
        "lora": (BERT_LORA, {**BERT_LORA, "r": 5, "use_dora": True}, "LORA"),
        "ia3": (BERT_IA3, {"target_modules": ["query", "value"], "feedforward_modules": []}, "IA3"),
    }[kind]
    architecture = tiny.BERT.architecture
    return base, {
        "a": adapters.write_adapter(
            folder / "a", architecture, base, {**first, **SEQ_CLS}, 0, peft_type, num_labels=3
        ),
        "b": adapters.write_adapter(folder / "b", architecture, base, {**second, **SEQ_CLS}, 1, peft_type),
    }


class Case:
    """Finetunes merged in both layouts, and the wrapper's logits on a batch."""

    def __init__(self, kind, folder):
        self.base, finetunes = write_finetunes(kind, folder)
        self.folder = folder / "peft"
        emr_hf.merge(self.base, finetunes, self.folder, save_as="peft")
        emr_hf.merge(self.base, finetunes, folder / "model")
        self.wrapper = emr_hf.EMRMergedModel.from_pretrained(folder / "model").eval()
        torch.manual_seed(3)
        self.batch = tiny.BERT.inputs()
        with torch.no_grad():
            self.logits = {task: self.wrapper(**self.batch, emr_task=task).logits for task in "ab"}

    def load_base(self, **options):
        torch.manual_seed(11)  # of the head that the base lacks
        return adapters.load(tiny.BERT.architecture, self.base, **options).eval()

    def load(self, **options):
        return peft.PeftModel.from_pretrained(self.load_base(), self.folder, **options).eval()

    def auto(self):
        return tiny.quietly(AutoModelForSequenceClassification.from_pretrained, self.folder).eval()

    @torch.no_grad()
    def assert_is(self, model, task):
        assert torch.equal(model(**self.batch).logits, self.logits[task])


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return Case("lora", tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def ia3(tmp_path_factory):
    return Case("ia3", tmp_path_factory.mktemp("ia3"))


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"adapter_name": "merged"}], ids=str)
def test_peft_loads_it_without_a_word_and_it_becomes_each_task(case, options):
    base = case.load_base()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = peft.PeftModel.from_pretrained(base, case.folder, **options).eval()
    assert model.tasks == ["a", "b"] and model.active_task == "a"
    case.assert_is(model, "a")
    for task in "bab":
        model.set_task(task)
        case.assert_is(model, task)
        assert model.config.num_labels == {"a": 3, "b": 2}[task]
    with model.use_task("a"):
        case.assert_is(model, "a")
    case.assert_is(model, "b")


def test_the_auto_class_loads_it(case, caplog):
    with caplog.at_level(logging.WARNING):
        model = AutoModelForSequenceClassification.from_pretrained(case.folder).eval()
    # The base has no head, of which transformers tells; of the adapter there is nothing to tell.
    assert not [r for r in caplog.records if ".emr" in r.getMessage() or "ia3_l" in r.getMessage()]
    assert type(model).__name__ == tiny.BERT.architecture
    case.assert_is(model, "a")
    model.set_task("b")
    case.assert_is(model, "b")
    assert model.active_adapters() == ["default"]


def test_pefts_auto_class_loads_it(case):
    case.assert_is(tiny.quietly(peft.AutoPeftModelForSequenceClassification.from_pretrained, case.folder).eval(), "a")


def base_logits(case):
    with torch.no_grad():
        return case.load_base()(**case.batch).logits


def test_disabled_it_is_the_base_with_its_own_head_and_labels(case):
    model = case.load()
    model.set_task("a")
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**case.batch).logits, base_logits(case))
        assert model.config.num_labels == 2 and model.active_task is None
    case.assert_is(model, "a")
    model = case.auto()
    case.assert_is(model, "a")
    model.disable_adapters()
    with torch.no_grad():
        assert model(**case.batch).logits.shape[-1] == 2
    model.enable_adapters()
    case.assert_is(model, "a")


def test_saved_again_it_is_the_same(case, tmp_path):
    before = load_file(case.folder / "adapter_model.safetensors")
    for name, model in (("peft", case.load(adapter_name="other")), ("auto", case.auto())):
        model.set_task("b")
        tiny.quietly(model.save_pretrained, tmp_path / name)
        folder = tmp_path / name / "other" if name == "peft" else tmp_path / name
        after = load_file(folder / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        case.assert_is(peft.PeftModel.from_pretrained(case.load_base(), folder).eval(), "a")


def test_the_vector_is_stored_once_and_no_base(case):
    names = load_file(case.folder / "adapter_model.safetensors")
    config = emr_hf.EMRPeftConfig.from_pretrained(case.folder)
    merged = config.emr["merged_parameters"]
    assert len([name for name in names if ".emr_bank.tau." in name]) == len(merged)
    assert len([name for name in names if ".emr_bank.mask." in name]) == 2 * len(merged)
    assert all(name.startswith("base_model.model.emr.emr_bank.") for name in names)
    assert sum(tensor.nbytes for tensor in names.values()) < os.path.getsize(case.base / "model.safetensors") * 2


def test_merged_and_unloaded_it_is_a_plain_model(case):
    model = case.load()
    model.set_task("b")
    plain = model.merge_and_unload()
    assert type(plain).__name__ == tiny.BERT.architecture and not hasattr(plain, "peft_config")
    expected = copy.deepcopy(case.wrapper).merge_and_unload("b").state_dict()
    found = plain.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not hasattr(plain, "set_task")


def test_unloaded_it_is_the_base(case):
    model = case.load()
    case.assert_is(model, "a")
    plain = model.unload()
    with torch.no_grad():
        assert torch.equal(plain(**case.batch).logits, base_logits(case))


def test_copies_and_pickles_are_independent(case):
    model = case.load()
    case.assert_is(model, "a")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.set_task("b")
        case.assert_is(other, "b")
        case.assert_is(model, "a")


def test_a_thousand_switches_do_not_drift(case):
    model = case.load()
    case.assert_is(model, "a")
    for index in range(1001):
        model.set_task("ab"[index % 2])
    case.assert_is(model, "a")


def test_after_a_cast_the_weights_are_rebuilt_from_the_cast_base(case):
    model = case.load()
    case.assert_is(model, "a")
    model.to(torch.bfloat16).float()
    rounded = peft.PeftModel.from_pretrained(case.load_base().to(torch.bfloat16).float(), case.folder).eval()
    with torch.no_grad():
        assert torch.equal(model(**case.batch).logits, rounded(**case.batch).logits)


def test_nothing_of_it_is_trained(case):
    model = peft.PeftModel.from_pretrained(case.load_base(), case.folder, is_trainable=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_two_merges_in_one_model(lora, tmp_path):
    finetunes = write_finetunes("full", tmp_path)[1]
    emr_hf.merge(lora.base, {"c": finetunes["a"]}, tmp_path / "other", save_as="peft")
    model = lora.load()
    lora.assert_is(model, "a")
    model.load_adapter(tmp_path / "other", "other")
    lora.assert_is(model, "a")
    model.set_adapter("other")
    assert model.tasks == ["c"]
    with torch.no_grad():
        emr_hf.merge(lora.base, {"c": finetunes["a"]}, tmp_path / "model")
        expected = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "model").eval()(**lora.batch).logits
        assert torch.equal(model(**lora.batch).logits, expected)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**lora.batch).logits, base_logits(lora))
        assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    model.set_adapter("default")
    lora.assert_is(model, "a")
    model.delete_adapter("default")
    with torch.no_grad():
        assert torch.equal(model(**lora.batch).logits, expected)


def test_bad_use_is_refused(lora, ia3, tmp_path):
    model = lora.load()
    with pytest.raises(emr_hf.UnknownTaskError, match="unknown task 'A'. Did you mean 'a'"):
        model.set_task("A")
    with pytest.raises(
        emr_hf.MismatchError, match="BertForSequenceClassification is for a base of that class, not BertModel"
    ):
        peft.PeftModel.from_pretrained(adapters.load("BertModel", lora.base), lora.folder)
    with pytest.raises(emr_hf.MismatchError, match="another merge"):
        ia3.load().load_adapter(ia3.folder, "again")
    with pytest.raises(emr_hf.CheckpointError, match="a: .*is a merge already"):
        emr_hf.check(emr_hf.Recipe(lora.base, {"a": lora.folder}))
    with pytest.raises(emr_hf.OptionError, match="save_as='adapter' is unknown: expected one of model, peft"):
        emr_hf.merge(lora.base, {"a": lora.base}, tmp_path / "out", save_as="adapter")


@pytest.mark.parametrize("architecture", [tiny.GPT2, tiny.MIXTRAL, tiny.QWEN2_MOE, tiny.RESNET], ids=str)
def test_full_finetunes_of_other_architectures(architecture, tmp_path):
    """Tied embeddings, fused experts, convolutions and statistics, all without a layer replaced."""
    inputs = tiny.write_inputs(architecture, tmp_path, ("a", "b"))
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "peft", save_as="peft")
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "model")
    wrapper = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "model").eval()
    base = adapters.load(architecture.architecture, inputs.base)
    models = [peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()]
    if architecture.generates:
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / "peft").eval())
    batch = architecture.inputs()
    for task in "ba":
        with torch.no_grad():
            expected = wrapper(**batch, emr_task=task).logits
            for model in models:
                model.set_task(task)
                assert torch.equal(model(**batch).logits, expected)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A causal model with a LoRA merge for it, as adapter and as wrapper, and how to load it in 4 bits."""
    folder = tmp_path_factory.mktemp("quantised")
    settings = {**tiny.LLAMA.settings, "hidden_size": 64, "intermediate_size": 128}
    architecture = tiny.Tiny(tiny.LLAMA.architecture, tiny.LLAMA.config_class, settings)
    base = adapters.write_base(architecture, folder / "base")
    finetunes = {
        task: adapters.write_adapter(
            folder / task,
            architecture.architecture,
            base,
            {"target_modules": ["q_proj", name], "r": 3, "task_type": "CAUSAL_LM"},
            seed,
        )
        for seed, (task, name) in enumerate({"a": "down_proj", "b": "v_proj"}.items())
    }
    emr_hf.merge(None, finetunes, folder / "peft", save_as="peft")
    emr_hf.merge(None, finetunes, folder / "model")
    wrapper = emr_hf.EMRMergedModel.from_pretrained(folder / "model").eval()
    options = {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        "dtype": torch.float32,
        "device_map": {"": "cpu"},  # where there is a GPU too
    }

    def load():
        return AutoModelForCausalLM.from_pretrained(base, **options).eval()

    return SimpleNamespace(base=base, folder=folder / "peft", wrapper=wrapper, load=load)


def quantised_layers(model):
    """Path and layer of what bitsandbytes has put into a model."""
    return {path: layer for path, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"}


def layer_calls(model, batch):
    """Path -> input and output of each quantised layer in one forward."""
    calls = {}
    layers = {path.removeprefix("base_model.model."): layer for path, layer in quantised_layers(model).items()}
    handles = [
        layer.register_forward_hook(lambda _, inputs, output, path=path: calls.update({path: (inputs[0], output)}))
        for path, layer in layers.items()
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return calls


def task_deltas(quantised, task):
    """Path -> weight of the base, and what the task adds to it according to the wrapper, float64."""
    base, found = load_file(quantised.base / "model.safetensors"), quantised.wrapper.set_task(task).model.state_dict()
    deltas = {name: (base[name].double(), found[name].double() - base[name].double()) for name in base}
    return {name.removesuffix(".weight"): pair for name, pair in deltas.items() if pair[1].any()}


def assert_adds(calls, plain, deltas):
    """Each layer gives what the quantised one gives of the same input, and `x delta^T`.

    The quantised product is bitsandbytes' own on both sides, as its precision is the processor's choice. What is left
    is float32 rounding: of the weights whose difference `delta` is, of the product with it, and of the sum.
    """
    assert calls.keys() == quantised_layers(plain).keys()
    for path, (x, found) in calls.items():
        stock = plain.get_submodule(path)(x)
        if path in deltas:
            weight, delta = deltas[path]
            added = functional.linear(x.double(), delta)
            size = functional.linear(x.abs().double(), weight.abs() + x.shape[-1] * delta.abs()) + found.abs()
            bound = torch.finfo(x.dtype).eps * size
            assert ((found - stock - added).abs() <= bound).all()
            assert added.abs().max() > 1000 * bound.max()  # so that the bound tells something
        else:
            assert torch.equal(found, stock)


@torch.no_grad()
def test_on_a_quantised_base(quantised):
    batch = tiny.LLAMA.inputs()
    plain = quantised.load()
    assert plain.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    model = peft.PeftModel.from_pretrained(quantised.load(), quantised.folder).eval()
    untouched = plain(**batch).logits
    for task in "aba":
        model.set_task(task)
        deltas = task_deltas(quantised, task)
        assert {path.rpartition(".")[2] for path in deltas} == {"q_proj", {"a": "down_proj", "b": "v_proj"}[task]}
        assert_adds(layer_calls(model, batch), plain, deltas)
        assert (model(**batch).logits - untouched).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, untouched)
    ids = batch["input_ids"]
    assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3).shape[1] == 10
    with pytest.raises(emr_hf.EMRError, match="quantised"):
        model.merge_and_unload()


@pytest.mark.parametrize("kind", ["LORA", "IA3"])
def test_generation_begins_with_the_task_though_the_encoder_is_called_first(kind, tmp_path):
    t5 = next(t for t in tiny.ALL if str(t) == "T5ForConditionalGeneration")
    base = adapters.write_base(t5, tmp_path / "base")
    settings = {"task_type": "SEQ_2_SEQ_LM"}
    found = adapters.write_adapter(tmp_path / "a", t5.architecture, base, settings, kind=kind)
    emr_hf.merge(base, {"a": found}, tmp_path / "peft", save_as="peft")
    ids = t5.inputs()["input_ids"]
    options = {"do_sample": False, "output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 3}

    def scores(model):
        return model.eval().generate(input_ids=ids, **options).scores[0]

    for load in (
        lambda: peft.PeftModel.from_pretrained(adapters.load(t5.architecture, base), tmp_path / "peft"),
        lambda: AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "peft"),
    ):
        model = load()
        assert torch.equal(scores(model), scores(model))
        moved = load().to(torch.float64).float()
        assert torch.equal(scores(moved), scores(moved))


def test_the_state_dict_of_a_switched_model_is_that_of_a_fresh_one(case):
    model, fresh = case.load(), case.load()
    model.set_task("b")
    saved = model.state_dict()
    fresh.load_state_dict(saved)
    for task in "ab":
        fresh.set_task(task)
        case.assert_is(fresh, task)
    model.load_state_dict(saved)
    case.assert_is(model, "b")
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**case.batch).logits, base_logits(case))


def test_other_heads_load_without_the_base(tmp_path):
    architecture = next(t for t in tiny.ALL if str(t) == "BertForTokenClassification")
    inputs = tiny.write_inputs(architecture, tmp_path, ("a", "b"))
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "peft", save_as="peft")
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "model")
    base = adapters.load(architecture.architecture, inputs.base)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    wrapper = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "model").eval()
    batch = architecture.inputs()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, wrapper(**batch).logits)


def test_deleted_it_is_gone(case):
    model = case.auto()
    case.assert_is(model, "a")
    model.delete_adapter("default")
    with torch.no_grad():
        assert model(**case.batch).logits.shape[-1] == 2
    with pytest.raises(emr_hf.EMRError, match="no merge is active"):
        model.set_task("a")


def test_peft_can_tell_its_type_and_need_not_merge_it(lora):
    model = lora.load()
    assert model.get_model_status().peft_types == {"default": "EMR"}
    with pytest.raises(emr_hf.EMRError, match="in place already"):
        model.merge_adapter()


@torch.no_grad()
def test_vectors_on_a_quantised_base(quantised, tmp_path):
    settings = {"task_type": "CAUSAL_LM"}  # k_proj, v_proj and down_proj by PEFT's own defaults
    # Vectors between 0.5 and 2 less 1 are exact, and so is what one task's merge keeps of them: all of it.
    found = adapters.write_adapter(
        tmp_path / "a", tiny.LLAMA.architecture, quantised.base, settings, kind="IA3", scale=0.05
    )
    emr_hf.merge(None, {"a": found}, tmp_path / "peft", save_as="peft")
    batch = tiny.LLAMA.inputs()
    model = peft.PeftModel.from_pretrained(quantised.load(), tmp_path / "peft").eval()
    stock = peft.PeftModel.from_pretrained(quantised.load(), found).eval()
    untouched = quantised.load()(**batch).logits
    assert torch.equal(model(**batch).logits, stock(**batch).logits)
    assert (model(**batch).logits - untouched).abs().max() > 0.001
    with pytest.raises(emr_hf.EMRError, match="quantised"):
        model.merge_and_unload()
    plain = model.unload()
    assert torch.equal(plain(**batch).logits, untouched)
