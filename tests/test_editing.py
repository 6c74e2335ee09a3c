"""Tasks added to and removed from a finished repo."""

from __future__ import annotations

import shutil

import pytest
import torch

import emr_hf
from tests import adapters, tiny
from tests.adapters import BERT_IA3, BERT_LORA
from tests.test_merging import load_folder
from tests.test_sources import copy_of

SEQ_CLS = {"task_type": "SEQ_CLS"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.write_inputs(tiny.BERT, tmp_path_factory.mktemp("bert"), ("a", "b", "c", "d"))


@pytest.fixture(scope="module")
def merged(bert, tmp_path_factory):
    """A merge of the first three."""
    out = tmp_path_factory.mktemp("merged") / "abc"
    emr_hf.merge(bert.base, {task: bert.finetunes[task] for task in "abc"}, out)
    return out


@pytest.fixture(scope="module")
def found(bert, tmp_path_factory):
    """Two adapters of each kind, which touch different modules."""
    folder = tmp_path_factory.mktemp("adapters")
    architecture = tiny.BERT.architecture
    lora = {"target_modules": ["query", "key"], "r": 5, **SEQ_CLS}
    ia3 = {"target_modules": ["query", "value"], "feedforward_modules": [], **SEQ_CLS}
    return {
        "LORA": (
            adapters.write_adapter(folder / "a", architecture, bert.base, {**BERT_LORA, **SEQ_CLS}, 0, num_labels=3),
            adapters.write_adapter(folder / "b", architecture, bert.base, lora, 1),
        ),
        "IA3": (
            adapters.write_adapter(folder / "c", architecture, bert.base, {**BERT_IA3, **SEQ_CLS}, 2, "IA3"),
            adapters.write_adapter(folder / "d", architecture, bert.base, ia3, 3, "IA3", num_labels=3),
        ),
    }


def reconstructions(repo):
    """Task -> what the repo has kept of its task vector, float32."""
    model = emr_hf.EMRMergedModel.from_pretrained(repo)
    result = {}
    for task, entry in model.config.tasks.items():
        scale = model.emr.rescaler.get(entry["key"])
        result[task] = {
            name: scale
            * model.emr.tau.get(name)
            * emr_hf.bits.unpack(model.emr.mask_of(entry["key"], name), model.emr.tau.get(name).shape)
            for name in model.config.merged_parameters
        }
    return result


def test_adding_elects_between_what_is_kept_and_the_new_task_vector(bert, merged, tmp_path):
    report = emr_hf.add_task(merged, "d", bert.finetunes["d"], tmp_path / "out")
    vectors = reconstructions(merged)
    base = adapters.load(tiny.BERT.architecture, bert.base).state_dict()
    new = adapters.load(tiny.BERT.architecture, bert.finetunes["d"]).state_dict()
    vectors["d"] = {name: new[name] - base[name] for name in vectors["a"]}
    zeros = {name: torch.zeros_like(value) for name, value in vectors["a"].items()}
    reference = emr_hf.merge_state_dicts(zeros, vectors)
    assert {task: numbers.rescaler for task, numbers in report.tasks.items()} == reference.rescalers
    stored = load_folder(tmp_path / "out")
    for name, tau in reference.tau.items():
        flat = name.replace(".", "__")
        assert torch.equal(stored[f"emr.tau.{flat}"], tau)
        for index, masks in enumerate(reference.masks.values()):
            assert torch.equal(stored[f"emr.mask.t{index}.{flat}"], emr_hf.bits.pack(masks[name]))


def test_the_report_says_what_each_old_task_loses(bert, merged, tmp_path):
    first = emr_hf.inspect(merged).report["tasks"]
    report = emr_hf.add_task(merged, "d", bert.finetunes["d"], tmp_path / "out")
    before, after = reconstructions(merged), reconstructions(tmp_path / "out")
    for task in "abc":
        moved = sum(float((after[task][n] - v).double().square().sum()) for n, v in before[task].items()) ** 0.5
        numbers = report.tasks[task]
        assert numbers.length == first[task]["length"]
        assert numbers.lost == pytest.approx(moved / numbers.length, rel=1e-3)
        assert 0 < numbers.lost < 1
        assert numbers.relative_error == first[task]["relative_error"]
    assert report.tasks["d"].lost is None
    assert "lost since" in str(report)


def test_losses_add_up_to_a_bound(bert, tmp_path):
    emr_hf.merge(bert.base, {task: bert.finetunes[task] for task in "ab"}, tmp_path / "ab")
    once = emr_hf.add_task(tmp_path / "ab", "c", bert.finetunes["c"], tmp_path / "abc")
    twice = emr_hf.add_task(tmp_path / "abc", "d", bert.finetunes["d"], tmp_path / "abcd")
    before, after = reconstructions(tmp_path / "ab"), reconstructions(tmp_path / "abcd")
    for task in "ab":
        moved = sum(float((after[task][n] - v).double().square().sum()) for n, v in before[task].items()) ** 0.5
        assert twice.tasks[task].lost >= once.tasks[task].lost
        assert moved / twice.tasks[task].length <= twice.tasks[task].lost * (1 + 1e-6)


@pytest.mark.parametrize("layout", ["model", "peft"])
@pytest.mark.parametrize("kind", ["LORA", "IA3"])
def test_a_second_adapter_added_is_a_merge_of_the_two(bert, found, tmp_path, kind, layout):
    """One task's reconstruction is its task vector, so nothing is lost yet; the second touches other modules too."""
    one, two = found[kind]
    emr_hf.merge(bert.base, {"one": one}, tmp_path / "first", save_as=layout)
    emr_hf.add_task(tmp_path / "first", "two", two, tmp_path / "added")
    emr_hf.merge(bert.base, {"one": one, "two": two}, tmp_path / "direct", save_as=layout)
    added, direct = load_folder(tmp_path / "added"), load_folder(tmp_path / "direct")
    assert added.keys() == direct.keys()
    assert all(torch.equal(added[name], direct[name]) for name in direct)
    if kind == "IA3" and layout == "peft":
        for task in ("one", "two"):
            written = [load_folder(tmp_path / name / "adapters" / task) for name in ("added", "direct")]
            assert all(torch.equal(written[0][name], written[1][name]) for name in written[1])


def test_a_full_finetune_joins_an_adapter(bert, found, tmp_path):
    emr_hf.merge(bert.base, {"lora": found["LORA"][0]}, tmp_path / "first")
    emr_hf.add_task(tmp_path / "first", "full", bert.finetunes["a"], tmp_path / "out")
    model = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    assert model.tasks == ["lora", "full"]
    emr_hf.merge(bert.base, {"lora": found["LORA"][0], "full": bert.finetunes["a"]}, tmp_path / "direct")
    added, direct = load_folder(tmp_path / "out"), load_folder(tmp_path / "direct")
    assert all(torch.equal(added[name], direct[name]) for name in direct)


@pytest.mark.parametrize("kind", ["LORA", "full"])
def test_only_vectors_join_vectors(bert, found, tmp_path, kind):
    emr_hf.merge(bert.base, {"ia3": found["IA3"][0]}, tmp_path / "first")
    other = found["LORA"][0] if kind == "LORA" else bert.finetunes["a"]
    with pytest.raises(emr_hf.MismatchError, match=r"other: .* only \(IA\)³ adapters"):
        emr_hf.add_task(tmp_path / "first", "other", other, tmp_path / "out")


@pytest.mark.parametrize("task", ["a", "b", "c"])
def test_removing_leaves_the_others_to_the_bit(merged, tmp_path, task):
    emr_hf.remove_task(merged, task, tmp_path / "out")
    before = emr_hf.EMRMergedModel.from_pretrained(merged)
    after = emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out")
    assert after.tasks == [name for name in "abc" if name != task]
    for other in after.tasks:
        one, two = before.set_task(other).model.state_dict(), after.set_task(other).model.state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert after.config.id2label == before.config.id2label
    assert task not in emr_hf.inspect(tmp_path / "out").report["tasks"]


@pytest.mark.parametrize("layout", ["model", "peft"])
def test_removing_an_adapter(bert, found, tmp_path, layout):
    tasks = dict(zip(("one", "two"), found["IA3"]))
    emr_hf.merge(bert.base, tasks, tmp_path / "out", save_as=layout)
    emr_hf.remove_task(tmp_path / "out", "one", tmp_path / "left")
    if layout == "peft":
        assert [path.name for path in (tmp_path / "left" / "adapters").iterdir()] == ["two"]
        written = [load_folder(tmp_path / name / "adapters" / "two") for name in ("out", "left")]
    else:
        written = [
            dict(emr_hf.EMRMergedModel.from_pretrained(tmp_path / name).set_task("two").model.state_dict())
            for name in ("out", "left")
        ]
    assert all(torch.equal(written[0][name], written[1][name]) for name in written[1])


def test_the_default_task_moves_on(bert, merged, tmp_path):
    emr_hf.remove_task(merged, "a", tmp_path / "one")
    assert emr_hf.EMRMergedModel.from_pretrained(tmp_path / "one").active_task == "b"
    emr_hf.remove_task(merged, "a", tmp_path / "two", default_task="c")
    assert emr_hf.EMRMergedModel.from_pretrained(tmp_path / "two").active_task == "c"
    emr_hf.add_task(merged, "d", bert.finetunes["d"], tmp_path / "three")
    assert emr_hf.EMRMergedModel.from_pretrained(tmp_path / "three").active_task == "a"


def test_a_repo_is_changed_in_place_and_keeps_what_its_owner_put_there(bert, merged, tmp_path):
    repo = copy_of(merged, tmp_path / "repo")
    (repo / "eval").mkdir()
    (repo / "eval" / "scores.json").write_text("{}")
    (repo / "README.md").write_text("My own words.")
    with pytest.raises(emr_hf.RepoError, match="overwrite"):
        emr_hf.add_task(repo, "d", bert.finetunes["d"], repo)
    emr_hf.add_task(repo, "d", bert.finetunes["d"], repo, overwrite=True)
    assert (repo / "eval" / "scores.json").read_text() == "{}"
    assert (repo / "README.md").read_text() == "My own words."
    assert emr_hf.EMRMergedModel.from_pretrained(repo).tasks == ["a", "b", "c", "d"]
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]


def test_a_card_of_ours_is_written_again(bert, merged, tmp_path):
    emr_hf.add_task(merged, "d", bert.finetunes["d"], tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---") and "4 finetunes" in card and "lost since" in card


def test_the_finetunes_are_not_needed(bert, tmp_path):
    inputs = tiny.write_inputs(tiny.BERT, tmp_path / "inputs", ("a", "b"))
    emr_hf.merge(inputs.base, inputs.finetunes, tmp_path / "repo")
    shutil.rmtree(tmp_path / "inputs")
    emr_hf.add_task(tmp_path / "repo", "c", bert.finetunes["c"], tmp_path / "out")
    assert emr_hf.EMRMergedModel.from_pretrained(tmp_path / "out").tasks == ["a", "b", "c"]


def test_what_cannot_be_done_is_said(bert, merged, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(emr_hf.OptionError, match="'a' is a task"):
        emr_hf.add_task(merged, "a", bert.finetunes["d"], out)
    with pytest.raises(emr_hf.OptionError, match="illegal task name"):
        emr_hf.add_task(merged, " a", bert.finetunes["d"], out)
    with pytest.raises(emr_hf.UnknownTaskError, match="unknown task 'x'"):
        emr_hf.remove_task(merged, "x", out)
    with pytest.raises(emr_hf.UnknownTaskError, match="unknown task 'x'"):
        emr_hf.remove_task(merged, "a", out, default_task="x")
    with pytest.raises(emr_hf.RepoError, match="no merged repo"):
        emr_hf.remove_task(bert.base, "a", out)
    emr_hf.remove_task(merged, "a", tmp_path / "two")
    emr_hf.remove_task(tmp_path / "two", "b", tmp_path / "one")
    with pytest.raises(emr_hf.OptionError, match="only task"):
        emr_hf.remove_task(tmp_path / "one", "c", out)
    other = tiny.write_inputs(tiny.GPT2, tmp_path / "gpt2", ("x",))
    with pytest.raises(emr_hf.MismatchError, match="x: model type gpt2"):
        emr_hf.add_task(merged, "x", other.finetunes["x"], out)
    assert not out.exists()


def test_every_file_of_the_owner_stays_and_no_tokenizer_of_a_removed_task(bert, tmp_path):
    inputs = tiny.write_inputs(tiny.BERT, tmp_path / "inputs", ("a", "b"))
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja"):
        (inputs.finetunes["a"] / name).write_text("{}")
    (inputs.finetunes["b"] / "tokenizer.json").write_text('{"b": 1}')
    repo = tmp_path / "repo"
    emr_hf.merge(inputs.base, inputs.finetunes, repo)
    owners = ["extra/steering.safetensors", "extra/config.json", "tasks/notes.md", "adapters/mine.txt", "LICENSE"]
    for place in owners:
        (repo / place).parent.mkdir(exist_ok=True)
        (repo / place).write_text("mine")
    emr_hf.remove_task(repo, "a", repo, overwrite=True)
    assert all((repo / place).read_text() == "mine" for place in owners)
    assert (repo / "tokenizer.json").read_text() == '{"b": 1}'
    assert not (repo / "vocab.txt").exists() and not (repo / "chat_template.jinja").exists()


def test_a_repo_is_not_written_into_itself(bert, merged, tmp_path):
    repo = copy_of(merged, tmp_path / "repo")
    for change in (
        lambda out: emr_hf.add_task(repo, "d", bert.finetunes["d"], out),
        lambda out: emr_hf.remove_task(repo, "a", out),
    ):
        with pytest.raises(emr_hf.RepoError, match="is inside"):
            change(repo / "deep" / "out")
    assert not (repo / "deep").exists()


def test_a_base_that_was_not_kept_is_said_to_be(bert, found, tmp_path):
    settings = {**BERT_LORA, **SEQ_CLS, "modules_to_save": ["word_embeddings"]}
    whole = adapters.write_adapter(tmp_path / "whole", tiny.BERT.architecture, bert.base, settings)
    emr_hf.merge(bert.base, {"a": whole}, tmp_path / "out")
    with pytest.raises(emr_hf.MismatchError, match="b: .*word_embeddings.*has kept no base of it"):
        emr_hf.add_task(tmp_path / "out", "b", found["LORA"][1], tmp_path / "x")
    emr_hf.merge(bert.base, {"b": found["LORA"][1]}, tmp_path / "other")
    emr_hf.add_task(tmp_path / "other", "a", whole, tmp_path / "both")
    assert emr_hf.EMRMergedModel.from_pretrained(tmp_path / "both").tasks == ["b", "a"]


def test_a_task_equal_to_the_base_loses_nothing(bert, tmp_path):
    same = tmp_path / "same"
    adapters.load(tiny.BERT.architecture, bert.base).save_pretrained(same)
    emr_hf.merge(bert.base, {"same": same, "a": bert.finetunes["a"]}, tmp_path / "out")
    report = emr_hf.add_task(tmp_path / "out", "b", bert.finetunes["b"], tmp_path / "more")
    assert (report.tasks["same"].length, report.tasks["same"].lost) == (0, 0)
