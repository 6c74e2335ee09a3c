"""Regular expressions that came from outside: those that may be matched for ever are refused, usual ones are not."""

from __future__ import annotations

import re

import pytest

import emr_hf
from emr_hf.errors import short
from emr_hf.patterns import check_pattern

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
NAMES = ["model", "lm_head", *(f"model.layers.{layer}.{part}" for layer in range(40) for part in PARTS)]

USUAL = [
    r".*\.(q|v)_proj",
    r"^(?!.*lm_head).*proj$",
    r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj)",
    r"(?:.*\.)?layers\.(?:1[0-9]|2[0-9])\..*(?:up|down)_proj",
    r"(?i).*Q_PROJ",
    r"(?:(?!layernorm).)*",
    r"(?<=model\.)layers|lm_head",
    r"",
    "|".join(re.escape(name) for name in NAMES),
]
LONGER = [  # quick for these names, though not for every text
    r"(\w+\.)*q_proj",
    r".*?(?:language|text).*?(?:self_attn|attn|mlp).*?(?:q_proj|k_proj|up_proj).*?",
]
ENDLESS = [
    r"(([a-z._0-9])+)+!",
    r"([a-z_]+[0-9._]*)+!",
    r"(.|.)*!",
    r"(?=(.+)+!)x",
    r"x|(?:[^!]+)+!",
    r"(?:(?:\w|[a-z])+\.?)*!",
    r"(?i)([A-Z0-9._]+)+!",
    r"(?>(?:.+)+)!",
    r".*.*.*.*.*!",
    r"(?:.{0,30}){5}!",
]
BROKEN = [
    (r"(", "not a regular expression"),
    (r"*", "not a regular expression"),
    (r"(\w)\1", "group"),
    (r"(a)?(?(1)b|c)", "group"),
    (r"(a*)*", "empty"),
    (r"a{100000000}", "too large"),
    (r"((a{100}){100}){100}", "too large"),
    ("a?" * 40_000, "too large"),
    ("(?:a|b)" * 30 + "(?<=" + "(?:a|a)" * 40 + ")", "steps"),
    ("(?i)" + "[\0-\U0010ffff]" * 1000, "range"),
    ("(" * 5000 + ")" * 5000, "nested"),
    ("x" * 1_000_000, "1,000,000 characters"),
]


@pytest.mark.parametrize("pattern", [*USUAL, *LONGER], ids=short)
def test_usual_expressions_pass(pattern):
    check_pattern(pattern, "target_modules", NAMES)
    check_pattern(pattern, "target_modules", [])


@pytest.mark.parametrize("pattern", USUAL, ids=short)
def test_what_is_quick_on_any_text_passes_without_names(pattern):
    check_pattern(pattern, "target_modules")


@pytest.mark.parametrize("pattern", LONGER, ids=short)
def test_what_is_quick_on_some_names_only_is_refused_without_them(pattern):
    with pytest.raises(emr_hf.OptionError, match="steps"):
        check_pattern(pattern, "target_modules")


@pytest.mark.parametrize("names", [NAMES, None], ids=["names", "any"])
@pytest.mark.parametrize("pattern", ENDLESS, ids=short)
def test_expressions_that_backtrack_are_refused(pattern, names):
    with pytest.raises(emr_hf.OptionError, match="target_modules: .* steps") as caught:
        check_pattern(pattern, "target_modules", names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("pattern", "why"), BROKEN, ids=[short(pattern)[:40] for pattern, _ in BROKEN])
def test_expressions_that_cannot_be_used_are_refused(pattern, why):
    with pytest.raises(emr_hf.OptionError, match=f"(?s)^private: .*{why}") as caught:
        check_pattern(pattern, "private", NAMES)
    assert len(str(caught.value)) < 1000


def test_a_search_may_begin_anywhere():
    pattern = ".*a.*b.*c.*d"  # one step for each place from its start, a hundred times as many from anywhere
    check_pattern(pattern, "private", ["x" * 900])
    with pytest.raises(emr_hf.OptionError, match="steps"):
        check_pattern(pattern, "private", ["x" * 2000], search=True)


def test_many_names_count_together():
    names = [f"{number:04}{'x' * 80}" for number in range(1500)]
    check_pattern(".*.*.*!", "private", names[:100])
    with pytest.raises(emr_hf.OptionError, match="1,500 names"):
        check_pattern(".*.*.*!", "private", names)
