"""Publishing: what is uploaded, and what the model card says."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard

import emr_hf
from tests.test_sources import assert_same_bits, stored_tensors


class Uploads(list):
    """What was sent to the Hub: files by name, and the calls' arguments."""

    def __init__(self):
        self.created: list[tuple[str, dict]] = []

    def create_repo(self, api, repo_id, **options):
        self.created.append((repo_id, {"token": api.token, **options}))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, api, *, repo_id, folder_path, **options):
        files = {str(path.relative_to(folder_path)): path.read_bytes() for path in folder_path.rglob("*.*")}
        self.append(SimpleNamespace(repo_id=repo_id, files=files, options=options, api_token=api.token))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/0")

    def card(self):
        return ModelCard(self[-1].files["README.md"].decode())


@pytest.fixture
def hub(monkeypatch):
    uploads = Uploads()
    monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **options: uploads.create_repo(api, *args, **options))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **options: uploads.upload_folder(api, **options))
    return uploads


@pytest.fixture
def repo(bert_repo, tmp_path):
    return shutil.copytree(bert_repo, tmp_path / "merged")


@pytest.fixture(scope="module")
def hub_model(bert_inputs, tmp_path_factory):
    """A repo whose inputs are known by Hub ids."""
    out = tmp_path_factory.mktemp("named") / "out"
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, out)
    config = emr_hf.EMRConfig.from_pretrained(out)
    config.base_model_name_or_path = config.report["base"] = "google/tiny-bert"
    for index, entry in enumerate(config.tasks.values()):
        entry["source"] = f"me/finetune-{index}"
    config.save_pretrained(out)
    (out / "README.md").unlink()  # made for other names
    return out


REPO_FILES = {"README.md", "config.json", "emr_report.json", "model.safetensors", "modeling_emr_hf.py"}


def test_a_folder_is_uploaded_whole(hub, repo):
    emr_hf.push_folder(repo, "me/bert-emr", private=True, token="secret", revision="dev", create_pr=True)
    assert hub.created == [("me/bert-emr", {"token": "secret", "private": True, "exist_ok": True})]
    [upload] = hub
    assert (upload.repo_id, upload.api_token, set(upload.files)) == ("me/bert-emr", "secret", REPO_FILES)
    assert upload.options["revision"] == "dev"
    assert upload.options["create_pr"] is True
    assert "EMR" in upload.options["commit_message"]


def test_a_model_is_uploaded_whole_whatever_its_task(hub, bert_repo):
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo, emr_task="items")
    model.push_to_hub("me/bert-emr", private=True, commit_message="third try")
    [upload] = hub
    assert set(upload.files) == REPO_FILES
    assert upload.files["model.safetensors"] == (bert_repo / "model.safetensors").read_bytes()
    assert upload.options["commit_message"] == "third try"
    assert model.active_task == "items"


def test_max_shard_size_holds_for_an_upload(hub, bert_repo):
    emr_hf.EMRMergedModel.from_pretrained(bert_repo).push_to_hub("me/bert-emr", max_shard_size="20KB")
    assert "model.safetensors.index.json" in hub[0].files
    assert len([name for name in hub[0].files if name.endswith(".safetensors")]) > 2


def test_save_pretrained_may_push(hub, bert_repo, tmp_path):
    model = emr_hf.EMRMergedModel.from_pretrained(bert_repo)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/bert-emr", private=True, token="secret")
    assert hub.created == [("me/bert-emr", {"token": "secret", "private": True, "exist_ok": True})]
    assert [upload.repo_id for upload in hub] == ["me/bert-emr"]
    assert 'from_pretrained("me/bert-emr")' in hub.card().text
    assert_same_bits(stored_tensors(tmp_path / "saved"), stored_tensors(bert_repo))


def test_save_pretrained_pushes_to_the_folders_name_by_default(hub, bert_repo, tmp_path):
    emr_hf.EMRMergedModel.from_pretrained(bert_repo).save_pretrained(tmp_path / "bert-emr", push_to_hub=True)
    assert [upload.repo_id for upload in hub] == ["bert-emr"]


def test_save_pretrained_does_not_push_unasked(hub, bert_repo, tmp_path):
    emr_hf.EMRMergedModel.from_pretrained(bert_repo).save_pretrained(tmp_path / "saved")
    assert not hub
    assert not hub.created


@pytest.mark.parametrize("folder", ["nowhere", "plain"])
def test_what_is_no_merged_repo_is_not_uploaded(hub, bert_inputs, tmp_path, folder):
    shutil.copytree(bert_inputs.base, tmp_path / "plain")
    with pytest.raises(emr_hf.RepoError, match=f"{folder} is no merged repo"):
        emr_hf.push_folder(tmp_path / folder, "me/bert-emr")
    assert not hub.created
    assert not (tmp_path / folder / "README.md").exists()


def test_a_card_that_its_owner_wrote_is_not_lost(hub, repo):
    card = (repo / "README.md").read_text() + "\n## Intended use\n\nOnly on Sundays.\n"
    (repo / "README.md").write_text(card)
    emr_hf.push_folder(repo, "me/bert-emr")
    assert "Only on Sundays." in hub[0].files["README.md"].decode()


# The card


def test_the_cards_metadata_parses_and_names_the_merge(hub, hub_model):
    emr_hf.push_folder(hub_model, "me/bert-emr")
    data = hub.card().data
    assert data.base_model_relation == "merge"
    assert data.base_model == ["google/tiny-bert", "me/finetune-0", "me/finetune-1", "me/finetune-2"]
    assert {"merge", "emr-merging"} <= set(data.tags)
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification"


def test_the_card_names_no_base_model_that_is_a_local_folder(hub, repo):
    emr_hf.push_folder(repo, "me/bert-emr")
    assert hub.card().data.base_model is None


def test_the_card_holds_a_recipe_that_loads_again(hub, hub_model, tmp_path):
    emr_hf.push_folder(hub_model, "me/bert-emr")
    text = hub.card().text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = emr_hf.Recipe.load(tmp_path / "recipe.yaml")
    assert list(recipe.finetunes) == ["glue/sst2", "mnli.v1", "items"]
    assert recipe.rescale == "global"
    assert yaml.safe_load(text)["base"]


def test_the_card_has_a_line_a_task_with_rescaler_and_density(hub, repo):
    emr_hf.push_folder(repo, "me/bert-emr")
    config = emr_hf.EMRConfig.from_pretrained(repo)
    rows = {row[0]: row[1:] for row in table_of(hub.card().text)}
    assert rows["task"][:2] == ["lambda", "mask density"]
    for task, numbers in config.report["tasks"].items():
        assert rows[task][:2] == [f"{numbers['rescaler']:.4f}", f"{numbers['density']:.3f}"]


def table_of(text):
    """The cells of the lines of a Markdown table, by the rules of GitHub."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    cells = [line.replace(r"\|", "\0").strip("|").split("|") for line in lines]
    return [[cell.strip().replace("\0", "|") for cell in row] for row in cells]


def test_names_with_bars_and_line_breaks_do_not_break_the_table(hub, bert_inputs, tmp_path):
    folder = bert_inputs.finetunes["items"]
    finetunes = {"a|b": folder, "<b>`c`</b>": bert_inputs.finetunes["mnli.v1"], "# d": folder}
    emr_hf.merge(bert_inputs.base, finetunes, tmp_path / "out")
    config = emr_hf.EMRConfig.from_pretrained(tmp_path / "out")
    config.tasks["a|b"]["id2label"] = {0: "yes|no", 1: "two\nlines"}
    config.save_pretrained(tmp_path / "out")
    emr_hf.push_folder(tmp_path / "out", "me/bert-emr")
    header, marks, *rows = table_of(hub.card().text)
    assert all(len(row) == len(header) for row in (marks, *rows))
    assert [row[0] for row in rows][0] == "a|b"


def test_the_cards_code_names_the_repo_and_runs(hub, repo, monkeypatch):
    emr_hf.push_folder(repo, "me/bert-emr")
    code = hub.card().text.split("```python\n")[1].split("```")[0]
    assert 'from_pretrained("me/bert-emr")' in code
    exec(compile(code.replace('"me/bert-emr"', repr(str(repo))), "card", "exec"), {})


def test_a_merged_folder_has_a_card_already(bert_repo):
    card = ModelCard.load(bert_repo / "README.md")
    assert card.data.base_model_relation == "merge"
    assert str(bert_repo) not in card.text


def test_a_merge_without_its_base_is_pushed_with_a_card_for_peft(hub, bert_inputs, tmp_path):
    emr_hf.merge(bert_inputs.base, bert_inputs.finetunes, tmp_path / "out", save_as="peft")
    emr_hf.push_folder(tmp_path / "out", "me/bert-emr")
    assert {*hub[-1].files} >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert hub.card().data.library_name == "peft"
    assert 'PeftModel.from_pretrained(base, "me/bert-emr")' in hub.card().text
    assert yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])["tags"][0] == "merge"
