"""Which texts hold any of some strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.any_of import _pattern, contains_any


def test_many_use_one_search():
    search = contains_any([f"<extra_{i}>" for i in range(100)])
    assert search("a <extra_42> b")
    assert not search("a <extra_ 42> b")
    assert _pattern(["[a]", "[b]", "[b]c", "x"]) == r"(?:\[(?:a\]|b\])|x)"


@pytest.mark.parametrize("needles", [["<s>", "</s>", "<unk>"], ["<s>", "[PAD]"], ["x"], []])
def test_few_are_found_each(needles):
    search = contains_any(needles)
    for needle in needles:
        assert search(f"a < b {needle} c")
    assert not search("a < b > <s </ s> [PAD")


@given(st.sets(st.text("ab<[.|", min_size=1, max_size=6)), st.text("ab<[.|", max_size=12))
def test_what_one_search_finds_is_what_each_would(needles, text):
    assert contains_any([*needles])(text) == any(needle in text for needle in needles)


def test_a_string_may_be_long():
    needles = ["<" + "a" * 5000 + str(i) for i in range(9)]
    assert contains_any(needles)(f"b{needles[7]}b")
    assert not contains_any(needles)("<" + "a" * 5000)
