"""The errors themselves: their classes, that they can be sent to another process, and how long they get."""

from __future__ import annotations

import pickle

import pytest

import emr_hf
from emr_hf.errors import nearest, one_line, short

KINDS = {
    emr_hf.CheckpointError: OSError,
    emr_hf.RepoError: OSError,
    emr_hf.MismatchError: ValueError,
    emr_hf.NonFiniteError: ValueError,
    emr_hf.OptionError: ValueError,
    emr_hf.RecipeError: ValueError,
    emr_hf.UnknownTaskError: KeyError,
}


def made(kind):
    if kind is emr_hf.UnknownTaskError:
        return kind("itms", ["items", "mnli"])
    return kind(1, 5, float("inf")) if kind is emr_hf.NonFiniteError else kind("base: no such file")


@pytest.mark.parametrize(("kind", "builtin"), KINDS.items(), ids=lambda kind: kind.__name__)
def test_an_error_is_of_the_class_that_stock_code_catches(kind, builtin):
    assert issubclass(kind, emr_hf.EMRError)
    with pytest.raises(builtin):
        raise made(kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_comes_back_from_another_process_as_it_was(kind):
    error = made(kind)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def nested(depth, width):
    value = ["x"]
    for _ in range(depth):
        value = [value] * width
    return value


@pytest.mark.parametrize(
    "value",
    [nested(40, 10), nested(5000, 1), {"a": nested(40, 10)}, "x" * 10**6, b"x" * 10**6, 10**5000, -(10**5000),
     set(range(10**5)), {str(i): i for i in range(10**5)}, tuple(nested(40, 10))],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_value_costs_no_more_than_a_line_however_large_it_is(value):
    text = short(value)
    assert len(text) < 320
    assert "\n" not in text


@pytest.mark.parametrize("value", [5, None, True, 1.5, "globl", " a", "a\nb", ["global"], {"a": "b"}, 10**100, ("a",)])
def test_a_value_of_usual_size_is_shown_whole(value):
    assert short(value) == repr(value)


def test_a_value_that_cannot_be_shown_is_named_by_its_class():
    class Broken:
        def __repr__(self):
            raise RuntimeError("no")

    assert short(Broken()) == "<Broken>"
    assert short([Broken()]) == "[<Broken>]"


def test_a_message_of_others_is_one_line_that_a_terminal_shows_as_it_is():
    assert one_line("two\nlines\x1b[31m\0") == "two lines\ufffd[31m\ufffd"
    assert len(one_line("x" * 10**6)) < 320


def test_no_name_is_near_a_value_that_is_none():
    assert nearest("glbal", ["global"]) == " Did you mean 'global'?"
    assert nearest(nested(40, 10), ["global"]) == nearest("global" * 10**5, ["global"]) == ""
