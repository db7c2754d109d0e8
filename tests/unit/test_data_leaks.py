"""Rows of the target in the pool: counts against comparing every pair."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex_pipeline.data.conversation import Conversation, Message
from dataflex_pipeline.data.leaks import overlap, words_of


def said(prompt: str, answer: str) -> Conversation:
    return Conversation((Message("user", prompt), Message("assistant", answer)))


def plain(text: str) -> str:
    """Words of a text of letters and spaces, by hand."""
    return " ".join("".join(c if c.isalpha() else " " for c in text.lower()).split())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is it?", "what  is it", True),
        ("Well-known, isn't it", "well known isn t it", True),
        ("STRASSE", "straße", True),
        ("ｆｕｌｌ width", "full width", True),
        ("你好，世界", "你好 世界。", True),
        ("2 + 2", "2+2", True),
        ("2 + 2", "2 - 2", False),
        ("2 * 2", "2 / 2", False),
        ("one two", "two one", False),
        ("onetwo", "one two", False),
        ("", "...", True),
    ],
)
def test_words(one, other, same):
    assert (words_of(one) == words_of(other)) == same


letters = st.text(st.sampled_from("aAbB ,."), max_size=4)


@settings(deadline=None)
@given(st.lists(st.tuples(letters, letters), max_size=6), st.lists(st.tuples(letters, letters), max_size=12))
def test_counts_are_those_of_all_pairs(target, pool):
    found = overlap((said(*row) for row in target), enumerate(said(*row) for row in pool))
    exact = {i for i, row in enumerate(target) if row in pool}
    close = {
        i
        for (i, row), other in itertools.product(enumerate(target), pool)
        if list(map(plain, row)) == list(map(plain, other))
    }
    assert set(found.exact) == exact
    assert set(found.near) == close - exact
    assert all(pool[found.exact[i]] == target[i] for i in exact)
    assert all(found.exact[i] == pool.index(target[i]) for i in exact)
    assert (found.n_target, found.n_pool) == (len(target), len(pool))


def test_rows_that_cannot_be_read_are_like_none():
    found = overlap([None, said("a", "b")], [(0, None), (1, said("a", "b"))])
    assert (found.exact, found.near, found.n_target) == ({1: 1}, {}, 2)


def test_roles_count_and_numbers_of_the_pool_are_kept():
    swapped = Conversation((Message("assistant", "a"), Message("user", "b")))
    found = overlap([said("a", "b")], [(7, swapped), (9, said("A!", "b"))])
    assert (found.exact, found.near) == ({}, {0: 9})
