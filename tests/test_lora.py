"""LoRA adapters as finetunes: the same merge as that of the models that PEFT's own merge makes of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import emr_hf
from emr_hf import checking, sources
from tests import adapters, tiny
from tests.adapters import BERT_LORA
from tests.test_bad_input import BROKEN, UNFIT
from tests.test_merging import load_folder
from tests.test_sources import COMMIT, FakeHub, copy_of, edit_json

SEQ_CLS = {"task_type": "SEQ_CLS"}
CAUSAL = {"task_type": "CAUSAL_LM"}
RESNET = tiny.RESNET
VARIANTS = {
    "plain": (tiny.BERT, {**BERT_LORA, **SEQ_CLS}),
    "rslora": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "use_rslora": True}),
    "patterns": (
        tiny.BERT,
        {**BERT_LORA, **SEQ_CLS, "rank_pattern": {"layer.0.*query": 6}, "alpha_pattern": {"value": 9}},
    ),
    "dora": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "use_dora": True}),
    "dora-rslora": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "use_dora": True, "use_rslora": True}),
    "lora_bias": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "lora_bias": True}),
    "bias-all": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "bias": "all"}),
    "bias-lora_only": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "bias": "lora_only"}),
    "one-layer": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "layers_to_transform": [1], "layers_pattern": "layer"}),
    "all-linear": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "target_modules": "all-linear"}),
    "gaussian": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "init_lora_weights": "gaussian"}),
    "embedding": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "target_modules": ["word_embeddings", "query"]}),
    "tokens": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "trainable_token_indices": {"word_embeddings": [3, 5]}}),
    "modules_to_save": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "modules_to_save": ["pooler"]}),
    "bias-all-modules": (tiny.BERT, {**BERT_LORA, **SEQ_CLS, "bias": "all", "modules_to_save": ["pooler"]}),
    "no-task-type": (tiny.BERT, {**BERT_LORA, "modules_to_save": ["classifier"]}),
    "conv": (RESNET, {"target_modules": ["convolution"], "r": 2, "modules_to_save": ["classifier"]}),
    "conv-dora": (
        RESNET,
        {"target_modules": ["convolution"], "r": 2, "modules_to_save": ["classifier"], "use_dora": True},
    ),
    "fan_in_fan_out": (tiny.GPT2, {"target_modules": ["c_attn", "c_proj"], "r": 2, "fan_in_fan_out": True, **CAUSAL}),
    "fan_in_fan_out-dora": (tiny.GPT2, {"target_modules": ["c_attn"], "r": 2, "use_dora": True, **CAUSAL}),
    "llama": (tiny.LLAMA, {"r": 2, "lora_alpha": 8, **CAUSAL}),
    "target_parameters": (
        tiny.QWEN2_MOE,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "r": 2,
            **CAUSAL,
        },
    ),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def case(request, tmp_path_factory):
    """Architecture, base, and three adapters of one kind, of different ranks where it allows."""
    architecture, settings = request.param
    folder = tmp_path_factory.mktemp("lora")
    base = adapters.write_base(architecture, folder / "base")
    found = {}
    for seed, task in enumerate("abc"):
        ranks = {"r": settings.get("r", 8) + seed} if "target_parameters" not in settings else {}
        options = {"num_labels": 3 if task == "b" else 2} if architecture.labels else {}
        found[task] = adapters.write_adapter(
            folder / task, architecture.architecture, base, {**settings, **ranks}, seed, **options
        )
    return architecture, base, found


def merged_by_peft(case, task):
    architecture, base, found = case
    options = {"num_labels": 3 if task == "b" else 2} if architecture.labels else {}
    return adapters.merged_model(found[task], architecture.architecture, base, **options)


def test_every_tensor_is_that_of_pefts_own_merge(case):
    plan = emr_hf.check(emr_hf.Recipe(None, case[2]))
    for task, checkpoint in plan.finetunes.items():
        expected = merged_by_peft(case, task).state_dict()
        for name in checkpoint.infos.keys() & expected.keys():
            tensor = checkpoint.read(name)
            assert torch.equal(tensor, expected[name]), (task, name)
            assert tensor.shape == checkpoint.infos[name].shape and tensor.dtype == checkpoint.infos[name].dtype


def test_adapters_merge_as_the_full_models_they_make(case, tmp_path):
    architecture, base, found = case
    full = {}
    for task in found:
        full[task] = tmp_path / f"full-{task}"
        merged_by_peft(case, task).save_pretrained(full[task])
    # Kept for each task where an adapter holds whole modules: the full merge has to be told.
    private = [name for name, why in emr_hf.check(emr_hf.Recipe(None, found)).private.items() if why != "head"]
    ours = emr_hf.merge(None, found, tmp_path / "adapters")
    theirs = emr_hf.merge(base, full, tmp_path / "full", private=[f"^{name}$" for name in private])
    assert {t: n.rescaler for t, n in ours.tasks.items()} == {t: n.rescaler for t, n in theirs.tasks.items()}
    one, other = load_folder(tmp_path / "adapters"), load_folder(tmp_path / "full")
    for name in one.keys() - other.keys():  # statistics that no adapter has, and every full model repeats
        flat = name.removeprefix("model.").replace(".", "__")
        assert all(torch.equal(one[name], other[f"emr.private.t{i}.{flat}"]) for i in range(3)), name
    for name in one.keys() & other.keys():
        assert torch.equal(one[name], other[name]), name
    for name in other.keys() - one.keys():  # stored by the full merge only: no adapter touches it
        assert name.startswith("emr.private.") or not other[name].any(), name


def test_one_adapter_comes_back_to_one_rounding(case, tmp_path):
    """A float32 difference cannot hold every step: the bound is its rounding, 2^-24 of the step, and an ulp."""
    _, base, found = case
    emr_hf.merge(base, {"a": found["a"]}, tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    base_weights = {name: value.clone() for name, value in model.emr.base.named_buffers()}
    live, expected = model.model.state_dict(), merged_by_peft(case, "a").state_dict()
    assert live.keys() == expected.keys()
    for name, value in expected.items():
        stored = base_weights.get(name.replace(".", "__"))
        if stored is None:
            assert torch.equal(live[name], value), name
        else:
            bound = (value - stored).abs() * 2**-24 + value.abs() * 2**-23
            assert ((live[name] - value).abs() <= bound).all(), name


def test_only_touched_tensors_are_stored(case, tmp_path):
    _, base, found = case
    plan = emr_hf.check(emr_hf.Recipe(None, found))
    emr_hf.merge(None, found, tmp_path / "out")
    stored = load_folder(tmp_path / "out")
    assert {n for n in stored if n.startswith("emr.tau.")} == {f"emr.tau.{n.replace('.', '__')}" for n in plan.merged}
    assert {n.removeprefix("model.") for n in stored if n.startswith("model.")} == {*plan.merged, *plan.kept}
    assert all(stored[f"emr.tau.{name.replace('.', '__')}"].any() for name in plan.merged)


def test_gives_the_logits_of_the_task_that_peft_loads(case, tmp_path):
    architecture, base, found = case
    emr_hf.merge(None, {"b": found["b"]}, tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out").eval()
    batch = architecture.inputs()
    with torch.no_grad():
        expected = merged_by_peft(case, "b")(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A base and two adapters of different ranks and label counts."""
    folder = tmp_path_factory.mktemp("bert")
    base = adapters.write_base(tiny.BERT, folder / "base")
    architecture = tiny.BERT.architecture
    found = {
        "a": adapters.write_adapter(folder / "a", architecture, base, {**BERT_LORA, **SEQ_CLS}, 0, num_labels=3),
        "b": adapters.write_adapter(folder / "b", architecture, base, {**BERT_LORA, **SEQ_CLS, "r": 6}, 1),
    }
    return tiny.Inputs(base, found)


def rotated(folder, out, seed):
    """The same adapter in another basis of its factors."""
    copy_of(folder, out)
    tensors = load_file(out / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in tensors if ".lora_A." in name]:
        other = name.replace("lora_A", "lora_B")
        rank = len(tensors[name])
        turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0]
        tensors[name] = (turn.T @ tensors[name].double()).float()
        tensors[other] = (tensors[other].double() @ turn).float()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def test_the_basis_of_the_factors_does_not_matter(bert, tmp_path):
    turned = {
        task: rotated(folder, tmp_path / task, seed) for seed, (task, folder) in enumerate(bert.finetunes.items())
    }
    one = emr_hf.merge(None, bert.finetunes, tmp_path / "one")
    two = emr_hf.merge(None, turned, tmp_path / "two")
    for task in bert.finetunes:
        assert one.tasks[task].rescaler == pytest.approx(two.tasks[task].rescaler, abs=1e-6)
    models = [emr_hf.EMRMergedModel.from_pretrained(tmp_path / name) for name in ("one", "two")]
    for task in bert.finetunes:
        first, second = (model.set_task(task).model.state_dict() for model in models)
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6)


def test_adapters_and_full_finetunes_merge_in_one_recipe(bert, tmp_path):
    model = adapters.load(tiny.BERT.architecture, bert.base, **tiny.label_names("full", 2))
    tiny.move(model, 5).save_pretrained(tmp_path / "full")
    finetunes = {"full": tmp_path / "full", **bert.finetunes}
    emr_hf.merge(bert.base, finetunes, tmp_path / "out")
    merged = {task: adapters.merged_model(folder, tiny.BERT.architecture, bert.base, num_labels=count)
              for (task, folder), count in zip(bert.finetunes.items(), (3, 2))}  # fmt: skip
    for task, model in merged.items():
        model.save_pretrained(tmp_path / task)
    emr_hf.merge(bert.base, {"full": tmp_path / "full", **{t: tmp_path / t for t in merged}}, tmp_path / "reference")
    one, other = load_folder(tmp_path / "out"), load_folder(tmp_path / "reference")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_bfloat16_base_is_merged_in_float32(tmp_path):
    base = adapters.write_base(tiny.LLAMA, tmp_path / "base", torch.bfloat16)
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 2, **CAUSAL}
    found = adapters.write_adapter(tmp_path / "a", tiny.LLAMA.architecture, base, settings)
    plan = emr_hf.check(emr_hf.Recipe(None, {"a": found}))
    expected = adapters.merged_model(found, tiny.LLAMA.architecture, base).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(plan.finetunes["a"].read(name), expected[name])
    emr_hf.merge(None, {"a": found}, tmp_path / "out")
    wide = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(wide.model.state_dict()[name], expected[name], rtol=0, atol=1e-7)
    narrow = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    assert narrow.dtype == torch.bfloat16


def test_memory_does_not_grow_with_the_adapters(bert, tmp_path, monkeypatch):
    """What PEFT has made of a module waits in files, one module of an adapter at a time."""
    plan = emr_hf.check(emr_hf.Recipe(None, {f"t{i}": bert.finetunes["a"] for i in range(5)}))
    waiting = []
    for name in plan.merged:
        for checkpoint in plan.finetunes.values():
            checkpoint.scratch = tmp_path
            checkpoint.read(name)
            waiting.append(len(checkpoint._spilled))
    assert max(waiting) == 0
    assert not any(tmp_path.iterdir())


# The base


def test_the_base_is_read_from_the_adapters(bert, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tasks:\n" + "".join(f"  {task}: {folder}\n" for task, folder in bert.finetunes.items()))
    plan = emr_hf.check(emr_hf.Recipe.load(recipe))
    assert plan.base.source.folder == bert.base


def test_a_copy_of_the_base_is_the_base(bert, tmp_path):
    same = copy_of(bert.base, tmp_path / "another name")
    assert emr_hf.check(emr_hf.Recipe(same, bert.finetunes)).merged


def test_another_base_is_refused(bert, tmp_path):
    other = adapters.load("BertModel", bert.base)
    tiny.move(other, 3).save_pretrained(tmp_path / "base")
    with pytest.raises(emr_hf.MismatchError, match=r"a: was trained on .*base, the base is base"):
        emr_hf.check(emr_hf.Recipe(tmp_path / "base", bert.finetunes))


def test_adapters_of_different_bases_are_refused(bert, tmp_path):
    other = copy_of(bert.finetunes["b"], tmp_path / "b")
    edit_json(other / "adapter_config.json", base_model_name_or_path="somebody/else")
    with pytest.raises(emr_hf.MismatchError, match="b: was trained on somebody/else, a on .*base"):
        emr_hf.check(emr_hf.Recipe(None, {**bert.finetunes, "b": other}))


def test_a_name_from_another_machine_is_compared_by_its_last_part(bert, tmp_path):
    moved = copy_of(bert.finetunes["a"], tmp_path / "a")
    edit_json(moved / "adapter_config.json", base_model_name_or_path="/home/somebody/models/base")
    assert emr_hf.check(emr_hf.Recipe(bert.base, {"a": moved})).merged
    edit_json(moved / "adapter_config.json", base_model_name_or_path="/home/somebody/models/large")
    with pytest.raises(emr_hf.MismatchError, match="models/large"):
        emr_hf.check(emr_hf.Recipe(bert.base, {"a": moved}))


# The Hub


@pytest.fixture
def hub(bert, tmp_path, monkeypatch):
    """Base and adapters on a Hub, the adapters trained on the base there."""
    repos = {"google/tiny-bert": bert.base}
    for task, folder in bert.finetunes.items():
        repos[f"me/{task}"] = copy_of(folder, tmp_path / "hub" / task)
        edit_json(repos[f"me/{task}"] / "adapter_config.json", base_model_name_or_path="google/tiny-bert")
    hub = FakeHub(repos)
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "HfApi", hub)
    monkeypatch.setattr(sources, "snapshot_download", hub.snapshot_download)
    return hub


def test_adapters_on_the_hub_give_the_same_bits_as_folders(hub, bert, tmp_path):
    emr_hf.merge(None, {"a": "me/a", "b": "me/b@v2"}, tmp_path / "out")
    emr_hf.merge(None, bert.finetunes, tmp_path / "folders")
    one, other = load_folder(tmp_path / "out"), load_folder(tmp_path / "folders")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    config = emr_hf.EMRConfig.from_pretrained(tmp_path / "out")
    assert (config.base_model_name_or_path, config.base_revision) == ("google/tiny-bert", COMMIT)
    assert {entry["revision"] for entry in config.tasks.values()} == {COMMIT}
    emr_hf.merge(None, {"a": "me/a"}, tmp_path / "peft", save_as="peft")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("google/tiny-bert", COMMIT)


def test_a_whole_model_with_an_adapter_beside_it_is_a_whole_model(hub, bert, tmp_path):
    hub.repos["me/both"] = copy_of(bert.base, tmp_path / "both")
    (hub.repos["me/both"] / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert isinstance(sources.open_input("me/both", "x"), sources.Source)
    assert isinstance(sources.open_input(hub.repos["me/both"], "x"), sources.Source)


def test_another_revision_of_the_base_is_refused(hub, monkeypatch):
    edit_json(hub.repos["me/a"] / "adapter_config.json", revision="v1")
    found = {"v1": "1" * 40, None: "2" * 40}
    monkeypatch.setattr(hub, "model_info", lambda _, revision=None: SimpleNamespace(sha=found.get(revision, "3" * 40)))
    with pytest.raises(emr_hf.MismatchError, match="a: was trained on revision v1 .*google/tiny-bert@v1"):
        emr_hf.check(emr_hf.Recipe("google/tiny-bert", {"a": "me/a"}))
    assert emr_hf.check(emr_hf.Recipe("google/tiny-bert@v1", {"a": "me/a"})).base.source.revision == "1" * 40
    assert emr_hf.check(emr_hf.Recipe(None, {"a": "me/a"})).base.source.revision == "1" * 40


def test_another_base_on_the_hub_is_refused(hub, bert):
    hub.repos["somebody/tiny-bert"] = bert.base
    with pytest.raises(
        emr_hf.MismatchError, match="a: was trained on google/tiny-bert, the base is somebody/tiny-bert"
    ):
        emr_hf.check(emr_hf.Recipe("somebody/tiny-bert", {"a": "me/a"}))


# Labels


def test_the_head_tells_the_number_of_labels_and_the_recipe_their_names(bert, tmp_path):
    recipe = emr_hf.Recipe(None, bert.finetunes, labels={"a": ["no", "maybe", "yes"]})
    emr_hf.merge_recipe(recipe, tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert model.set_task("b").config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    with pytest.raises(emr_hf.MismatchError, match="b: has 2 labels, the recipe names 1"):
        emr_hf.check(emr_hf.Recipe(None, bert.finetunes, labels={"b": ["one"]}))


def test_a_config_beside_the_adapter_names_the_labels(bert, tmp_path):
    named = copy_of(bert.finetunes["a"], tmp_path / "a")
    adapters.load(tiny.BERT.architecture, bert.base, **tiny.label_names("x", 3)).config.save_pretrained(named)
    plan = emr_hf.check(emr_hf.Recipe(None, {"a": named}))
    assert plan.config.id2label == {0: "x-0", 1: "x-1", 2: "x-2"}
    adapters.load(tiny.BERT.architecture, bert.base, **tiny.label_names("x", 4)).config.save_pretrained(named)
    with pytest.raises(emr_hf.MismatchError, match="its head has 3 labels, its config.json names 4"):
        emr_hf.check(emr_hf.Recipe(None, {"a": named}))


# Bad adapters


def refused(bert, folder, error, *named):
    with pytest.raises(error) as caught:
        emr_hf.check(emr_hf.Recipe(bert.base, {"good": bert.finetunes["a"], "bad": folder}))
    message = str(caught.value)
    assert message.startswith("bad: ") and "\n" not in message
    for part in named:
        assert str(part) in message


def test_an_unknown_type_is_named_with_those_supported(bert, tmp_path):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    edit_json(bad / "adapter_config.json", peft_type="PREFIX_TUNING")
    refused(bert, bad, emr_hf.CheckpointError, "PREFIX_TUNING", "LORA", "IA3")


@pytest.mark.parametrize(
    ("start", "name"),
    [("pissa", "PiSSA"), ("pissa_niter_16", "PiSSA"), ("olora", "OLoRA"), ("corda", "CorDA"), ("loftq", "LoftQ")],
)
def test_adapters_that_change_the_base_are_refused_by_name(bert, tmp_path, start, name):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    edit_json(bad / "adapter_config.json", init_lora_weights=start)
    refused(bert, bad, emr_hf.CheckpointError, name, "changes the base")


def test_missing_weights_are_named(bert, tmp_path):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    (bad / "adapter_model.safetensors").unlink()
    refused(bert, bad, emr_hf.CheckpointError, "adapter_model.safetensors")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"peft_type": 5}'])
def test_broken_settings_are_named(bert, tmp_path, content):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    (bad / "adapter_config.json").write_text(content)
    refused(bert, bad, emr_hf.CheckpointError, "adapter_config.json")


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_wrong_shapes_are_named(bert, tmp_path):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    edit_json(bad / "adapter_config.json", r=5)
    refused(bert, bad, emr_hf.MismatchError, "lora_A", "[6, 32]", "[5, 32]")


ENDLESS = r"(([a-z._0-9])+)+!"
HOSTILE = [  # of a wrong type or size, or with a pattern that backtracks
    *({name: "((("} for name in ("target_modules", "exclude_modules")),
    *({name: ENDLESS} for name in ("target_modules", "exclude_modules")),
    {"target_modules": ["query", 5]},
    {"target_modules": ["query"] * 5000},
    {"target_modules": {"query": 1}},
    {"modules_to_save": [ENDLESS]},
    {"modules_to_save": "classifier"},
    {"layers_to_transform": [0], "layers_pattern": ENDLESS},
    {"layers_to_transform": "first"},
    {"rank_pattern": {ENDLESS: 4}},
    {"alpha_pattern": {ENDLESS: 4}},
    {"rank_pattern": {"query": "4"}},
    {"rank_pattern": {"query": 0}},
    {"rank_pattern": [4]},
    {"alpha_pattern": {"query": [1]}},
    *({"r": value} for value in (0, -1, 1.5, "6", True, [6])),
    *({"lora_alpha": value} for value in ("5", float("inf"), 10**400)),
    {"bias": "some"},
    {"use_dora": "yes"},
    {"target_parameters": "experts"},
    {"trainable_token_indices": [10**9]},
    {"trainable_token_indices": {"word_embeddings": ["1"]}},
    {"use_bdlora": {"nblocks": "2"}},
    {"use_bdlora": 5},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda changes: str(changes)[:60])
def test_a_setting_that_peft_cannot_be_given_is_named(bert, tmp_path, changes):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    edit_json(bad / "adapter_config.json", **changes)
    refused(bert, bad, emr_hf.CheckpointError, "bad: adapter_config.json: ", [*changes][-1])


@pytest.mark.parametrize("rank", [10**6, 10**9, 10**18, 10**30])
@pytest.mark.parametrize("pattern", [False, True], ids=["r", "rank_pattern"])
def test_a_rank_of_any_size_allocates_nothing(bert, tmp_path, monkeypatch, rank, pattern):
    def told(*sizes, device=None, **options):
        devices.add(torch.device(device or torch.get_default_device()).type)
        return empty(*sizes, device=device, **options)

    empty, devices = torch.empty, set()
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    edit_json(bad / "adapter_config.json", **({"rank_pattern": {"query": rank}} if pattern else {"r": rank}))
    monkeypatch.setattr(torch, "empty", told)
    refused(bert, bad, emr_hf.EMRError, rank if rank <= 10**18 else "bad")
    assert devices == {"meta"}


UNUSED = [
    {"auto_mapping": "x"},
    {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
    {"megatron_config": {}, "megatron_core": "os"},
    {"runtime_config": {"ephemeral_gpu_offload": True}},
    {"eva_config": {"rho": -1}, "init_lora_weights": "eva"},
    {"corda_config": {"cache_file": "x", "covariance_file": "y"}},
    {"loftq_config": {"loftq_bits": 4}},
    {"lora_ga_config": {"direction": "ArB2r"}},
    {"lora_dropout": "much"},
    {"peft_version": ["x"]},
    {"of_a_later_version": True},
]


@pytest.mark.parametrize("changes", UNUSED, ids=lambda changes: next(iter(changes)))
def test_settings_that_a_merge_does_not_need_are_not_given_to_peft(bert, tmp_path, monkeypatch, changes):
    given = []
    init = peft.LoraConfig.__init__
    monkeypatch.setattr(
        peft.LoraConfig, "__init__", lambda self, **fields: given.append(fields) or init(self, **fields)
    )
    odd = copy_of(bert.finetunes["b"], tmp_path / "odd")
    edit_json(odd / "adapter_config.json", **changes)
    assert emr_hf.check(emr_hf.Recipe(bert.base, {"odd": odd})).merged
    assert given
    for fields in given:
        assert fields.get("init_lora_weights") is False
        assert not (changes.keys() - {"init_lora_weights"}) & fields.keys()


USUAL = (
    r".*\.(query|value)",
    r"^(?!.*classifier).*(?:query|value)$",
    r"(?i).*QUERY|.*VALUE",
    r"bert\.encoder\.layer\.\d+\.attention\.self\.(query|value)",
)


@pytest.mark.parametrize("targets", USUAL)
def test_usual_patterns_find_the_same_modules(bert, tmp_path, targets):
    same = copy_of(bert.finetunes["b"], tmp_path / "same")
    edit_json(same / "adapter_config.json", target_modules=targets)
    found = emr_hf.check(emr_hf.Recipe(bert.base, {"same": same})).finetunes["same"]
    assert found.touched == emr_hf.check(emr_hf.Recipe(bert.base, {"b": bert.finetunes["b"]})).finetunes["b"].touched


@pytest.mark.parametrize(
    "changes",
    [{"base_model_name_or_path": 5}, {"base_model_name_or_path": ["x"]}, {"revision": 5},
     {"base_model_name_or_path": "~no-such-user/x"}, {"base_model_name_or_path": "x" * 5000},
     {"base_model_name_or_path": "a\0b"}, {"task_type": "X"}, {"task_type": [1]},
     {"task_type": None, "auto_mapping": {"base_model_class": "system"}},
     {"megatron_config": {"a": 1}}, {"layer_replication": [[0, 10**9]]}],
    ids=lambda changes: str(changes)[:50],
)  # fmt: skip
def test_what_an_adapter_says_of_its_base_is_one_error(bert, tmp_path, changes):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    path = bad / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(bert, bad, emr_hf.EMRError)


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_settings_that_are_no_json_are_named(bert, tmp_path, content):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    (bad / "adapter_config.json").write_bytes(content)
    refused(bert, bad, emr_hf.CheckpointError, "adapter_config.json")


@pytest.mark.parametrize("make", UNFIT.values(), ids=list(UNFIT))
def test_settings_that_are_no_file_are_named(bert, tmp_path, make):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    (bad / "adapter_config.json").unlink()
    make(bad / "adapter_config.json")
    refused(bert, bad, emr_hf.CheckpointError, "adapter_config.json")


def test_a_missing_tensor_is_named(bert, tmp_path):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    change_tensors(bad, lambda tensors: tensors.pop(next(n for n in tensors if "lora_B" in n)))
    refused(bert, bad, emr_hf.CheckpointError, "lora_B.weight is missing")


def test_a_tensor_without_place_is_named(bert, tmp_path):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    change_tensors(bad, lambda tensors: tensors.update({"base_model.model.bert.nowhere.lora_A.weight": torch.ones(2)}))
    refused(bert, bad, emr_hf.CheckpointError, "bert.nowhere.lora_A.weight", "no place")


def test_targets_that_the_model_lacks_are_named(bert, tmp_path):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    edit_json(bad / "adapter_config.json", target_modules=["nonsense"])
    refused(bert, bad, emr_hf.CheckpointError, "nonsense")


def test_an_adapter_without_its_head_is_named(bert, tmp_path):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    edit_json(bad / "adapter_config.json", modules_to_save=None)
    change_tensors(bad, lambda tensors: [tensors.pop(n) for n in list(tensors) if "classifier" in n])
    refused(bert, bad, emr_hf.MismatchError, "classifier", "modules_to_save")


def test_mixed_heads_are_named(bert, tmp_path):
    settings = {**BERT_LORA, "task_type": "TOKEN_CLS"}
    bad = adapters.write_adapter(tmp_path / "bad", "BertForTokenClassification", bert.base, settings)
    refused(bert, bad, emr_hf.MismatchError, "BertForTokenClassification", "BertForSequenceClassification")


def test_a_nan_in_an_adapter_is_named_and_nothing_is_written(bert, tmp_path):
    bad = copy_of(bert.finetunes["b"], tmp_path / "bad")
    change_tensors(bad, lambda tensors: [v.fill_(float("nan")) for n, v in tensors.items() if "lora_B" in n])
    with pytest.raises(emr_hf.NonFiniteError, match=r"bad: bert.encoder.layer.0.*weight\[0, 0\] is nan"):
        emr_hf.merge(bert.base, {"good": bert.finetunes["a"], "bad": bad}, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_a_loaded_peft_model_says_what_to_give(bert):
    base = adapters.load(tiny.BERT.architecture, bert.base, num_labels=3)
    model = peft.PeftModel.from_pretrained(base, bert.finetunes["a"])
    with pytest.raises(emr_hf.CheckpointError, match="bad: expected a folder"):
        emr_hf.check(emr_hf.Recipe(bert.base, {"bad": model}))


def test_the_check_reads_no_tensor(bert, monkeypatch):
    monkeypatch.setattr(emr_hf.storage.SafetensorsStorage, "read", lambda self, name: pytest.fail(f"has read {name}"))
    assert emr_hf.check(emr_hf.Recipe(None, bert.finetunes)).merged


def test_the_report_says_that_small_adapters_are_smaller(bert, tmp_path):
    report = emr_hf.merge(None, bert.finetunes, tmp_path / "out")
    size = sum((folder / "adapter_model.safetensors").stat().st_size for folder in bert.finetunes.values())
    assert report.bytes_modulators > report.bytes_finetunes and report.bytes_finetunes == pytest.approx(size, rel=0.3)
    assert "The 2 adapters by themselves are SMALLER" in str(report)
    assert "SMALLER" in str(checking.check(emr_hf.Recipe(None, bert.finetunes)))


# A task as a LoRA


@pytest.fixture(scope="module")
def repo(bert, tmp_path_factory):
    out = tmp_path_factory.mktemp("repo") / "merged"
    emr_hf.merge(None, bert.finetunes, out)
    return out


@pytest.mark.parametrize("layout", ["model", "peft"])
def test_a_lora_of_full_rank_is_the_task(bert, tmp_path, layout, recwarn):
    emr_hf.merge(None, bert.finetunes, tmp_path / "out", save_as=layout)
    report = emr_hf.export(tmp_path / "out", "a", tmp_path / "lora", save_as="lora", rank=32)
    assert report.error < 1e-6 and not report.left_out
    lora = peft.PeftModel.from_pretrained(
        adapters.load(tiny.BERT.architecture, bert.base, num_labels=3), tmp_path / "lora"
    ).eval()
    assert not [str(w.message) for w in recwarn if "missing" in str(w.message)]
    emr_hf.merge(None, bert.finetunes, tmp_path / "model")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "model", emr_task="a").eval()
    batch = tiny.BERT.inputs()
    torch.testing.assert_close(lora(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)


def test_the_error_of_a_lora_is_what_the_truncation_loses(repo, tmp_path, bert):
    report = emr_hf.export(repo, "b", tmp_path / "lora", save_as="lora", rank=2)
    model = emr_hf.EMRMergedModel.from_pretrained(repo, emr_task="b")
    lora = adapters.merged_model(tmp_path / "lora", tiny.BERT.architecture, bert.base).state_dict()
    square = square_error = 0.0
    for name in model.config.merged_parameters:
        base = model.emr.base.get(name).double()
        change, kept = model.model.state_dict()[name].double() - base, lora[name].double() - base
        square += float(change.square().sum())
        square_error += float((change - kept).square().sum())
        expected = torch.linalg.svdvals(change)[2:].square().sum().sqrt() / change.norm()
        assert report.errors[name] == pytest.approx(float(expected), rel=1e-3)
    assert report.error == pytest.approx((square_error / square) ** 0.5, rel=1e-3)
    assert 0 < report.error < 1


@pytest.mark.parametrize("name", ["embedding", "conv", "fan_in_fan_out", "bias-all"])
def test_loras_of_other_layers(name, tmp_path):
    architecture, settings = VARIANTS[name]
    base = adapters.write_base(architecture, tmp_path / "base")
    found = adapters.write_adapter(tmp_path / "a", architecture.architecture, base, settings)
    emr_hf.merge(base, {"a": found}, tmp_path / "out")
    report = emr_hf.export(tmp_path / "out", "a", tmp_path / "lora", save_as="lora", rank=64)
    lora = adapters.merged_model(tmp_path / "lora", architecture.architecture, base).state_dict()
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    for tensor, value in model.model.state_dict().items():
        if tensor not in report.left_out:
            torch.testing.assert_close(lora[tensor], value, rtol=0, atol=1e-5)
    assert bool(report.left_out) == (name == "bias-all")
    assert (report.error > 0.01) == bool(report.left_out)


def test_a_full_finetune_as_a_lora_names_what_is_left_out(bert_repo, tmp_path):
    report = emr_hf.export(bert_repo, "mnli.v1", tmp_path / "lora", save_as="lora", rank=4)
    assert "bert.embeddings.LayerNorm.weight" in report.left_out
    assert "left out" in str(report)
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4", 97, 10**9, 10**30])
def test_a_rank_is_a_number_from_one_to_the_largest_side_of_a_weight(repo, tmp_path, rank):
    with pytest.raises(emr_hf.OptionError, match="rank"):
        emr_hf.export(repo, "a", tmp_path / "out", save_as="lora", rank=rank)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "BertForTokenClassification"])
def test_loras_with_other_heads_load(name, tmp_path):
    architecture = next(t for t in tiny.ALL if str(t) == name)
    inputs = tiny.write_inputs(architecture, tmp_path, ("a",))
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out")
    emr_hf.export(tmp_path / "out", "a", tmp_path / "lora", save_as="lora", rank=64)
    base = adapters.load(name, inputs.base)
    lora = peft.PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload().state_dict()
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out").model.state_dict()
    heads = [tensor for tensor in model if tensor.startswith("classifier.")]
    assert heads and all(torch.equal(lora[tensor], model[tensor]) for tensor in heads)


def test_a_private_tied_tensor_has_no_place_in_a_lora(tmp_path):
    inputs = tiny.write_inputs(tiny.GPT2, tmp_path, ("a",))
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "out", private="wte")
    with pytest.raises(emr_hf.OptionError, match="transformer.wte.weight is the task's own"):
        emr_hf.export(tmp_path / "out", "a", tmp_path / "lora", save_as="lora", rank=4)
    assert not (tmp_path / "lora").exists()


def test_a_base_that_is_gone_is_named_before_anything_is_written(bert, tmp_path):
    base = copy_of(bert.base, tmp_path / "base")
    emr_hf.merge(base, {"a": bert.finetunes["a"]}, tmp_path / "out", save_as="peft")
    edit_json(tmp_path / "out" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    for options in ({}, {"save_as": "lora", "rank": 2}):
        with pytest.raises(emr_hf.CheckpointError, match="base: .*gone is not a folder"):
            emr_hf.export(tmp_path / "out", "a", tmp_path / "x", **options)


def test_forms_that_do_not_fit_are_refused(repo, tmp_path):
    for options, named in (
        ({"save_as": "lora"}, "rank"),
        ({"rank": 3}, "rank"),
        ({"save_as": "onnx"}, "model, lora, ia3"),
        ({"save_as": "ia3"}, "vectors"),
    ):
        with pytest.raises(emr_hf.OptionError, match=named):
            emr_hf.export(repo, "a", tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


# Tied tensors


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_a_tied_tensor_is_changed_as_pefts_merge_does_and_warned_of(target, tmp_path):
    base = adapters.write_base(tiny.GPT2, tmp_path / "base")
    settings = {"target_modules": [target, "c_attn"], "r": 2, **CAUSAL}
    found = adapters.write_adapter(tmp_path / "a", tiny.GPT2.architecture, base, settings)
    plan = emr_hf.check(emr_hf.Recipe(None, {"a": found}))
    assert any("tied" in warning and warning.startswith("a: ") for warning in plan.warnings)
    expected = adapters.merged_model(found, tiny.GPT2.architecture, base).state_dict()
    name = "transformer.wte.weight"
    assert name in plan.merged
    assert torch.equal(plan.finetunes["a"].read(name), expected[name])
    emr_hf.merge(None, {"a": found}, tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out").model
    assert model.lm_head.weight is model.transformer.wte.weight


def test_two_changes_of_one_tied_tensor_are_refused(tmp_path):
    base = adapters.write_base(tiny.GPT2, tmp_path / "base")
    settings = {"target_modules": ["wte", "lm_head"], "r": 2, **CAUSAL}
    found = adapters.write_adapter(tmp_path / "a", tiny.GPT2.architecture, base, settings)
    with pytest.raises(emr_hf.CheckpointError, match="a: .*transformer.wte and lm_head, which are tied"):
        emr_hf.check(emr_hf.Recipe(None, {"a": found}))


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_whole_tied_modules_are_refused_unless_peft_ties_them(modules, tmp_path):
    llama = next(t for t in tiny.ALL if t.settings.get("tie_word_embeddings"))
    base = adapters.write_base(llama, tmp_path / "base")
    settings = {"target_modules": ["q_proj"], "r": 2, "modules_to_save": modules, **CAUSAL}
    found = adapters.write_adapter(tmp_path / "a", llama.architecture, base, settings)
    with pytest.raises(emr_hf.MismatchError, match="a: .*is tied: train it with ensure_weight_tying"):
        emr_hf.check(emr_hf.Recipe(None, {"a": found}))


def test_trained_tokens_of_a_tied_model(tmp_path):
    llama = next(t for t in tiny.ALL if t.settings.get("tie_word_embeddings"))
    base = adapters.write_base(llama, tmp_path / "base")
    settings = {"target_modules": ["q_proj"], "r": 2, "trainable_token_indices": [3, 5], **CAUSAL}
    found = adapters.write_adapter(tmp_path / "a", llama.architecture, base, settings)
    plan = emr_hf.check(emr_hf.Recipe(None, {"a": found}))
    expected = adapters.merged_model(found, llama.architecture, base).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(plan.finetunes["a"].read("model.embed_tokens.weight"), expected)


def test_a_snapshot_in_the_hubs_cache_is_its_repo(bert, tmp_path):
    snapshot = tmp_path / "models--google--tiny-bert" / "snapshots" / COMMIT
    copy_of(bert.base, snapshot)
    found = copy_of(bert.finetunes["a"], tmp_path / "a")
    for name in (str(snapshot), "google/tiny-bert"):
        edit_json(found / "adapter_config.json", base_model_name_or_path=name)
        plan = emr_hf.check(emr_hf.Recipe(snapshot, {"a": found}))
        assert (plan.base.source.name, plan.base.source.revision) == ("google/tiny-bert", COMMIT)
    other = copy_of(bert.finetunes["b"], tmp_path / "b")
    edit_json(other / "adapter_config.json", base_model_name_or_path=str(snapshot))
    emr_hf.merge(snapshot, {"a": found}, tmp_path / "out")
    emr_hf.add_task(tmp_path / "out", "b", other, tmp_path / "both")
    edit_json(other / "adapter_config.json", base_model_name_or_path="google/other")
    with pytest.raises(emr_hf.MismatchError, match="b: was trained on google/other"):
        emr_hf.add_task(tmp_path / "out", "b", other, tmp_path / "x")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
def test_factors_that_are_no_floating_point_numbers_are_refused(tmp_path, dtype):
    base = adapters.write_base(tiny.BERT, tmp_path / "base")
    settings = {**adapters.BERT_LORA, "task_type": "SEQ_CLS"}
    found = adapters.write_adapter(tmp_path / "a", tiny.BERT.architecture, base, settings, 1, "LORA")
    tensors = load_file(found / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: tensors[name].to(dtype)}, found / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(emr_hf.CheckpointError, match=f"{name} is {dtype}: expected floating-point numbers"):
        emr_hf.check(emr_hf.Recipe(base, {"a": found}))
