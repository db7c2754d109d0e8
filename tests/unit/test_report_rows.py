"""Rows on a report's page: which part of a turn is marked, and how texts are cut to fit."""

import json
import random

import numpy as np
import pytest

from dataflex_pipeline.reports.page.browsed import LISTS, Browsed
from dataflex_pipeline.reports.page.findings import Rows
from dataflex_pipeline.reports.page.headline import percent
from dataflex_pipeline.reports.page.listed_rows import listed_rows
from dataflex_pipeline.reports.page.nearest import Nearest
from dataflex_pipeline.reports.page.pictures import thinned
from dataflex_pipeline.reports.page.render import embedded
from dataflex_pipeline.reports.page.turns import Turn, turns_of

END = 0
"""The token that ends an answer; the others are characters."""


def decode(tokens, *, special=True):
    return "".join(("<end>" if special else "") if token == END else chr(token) for token in tokens)


def row(*turns, cutoff=None, read=None):
    """A prepared row of turns (role, text, whether it is trained); an answer carries loss with its end."""
    ids, labels = [], []
    for role, text, trained in turns:
        said = [ord(sign) for sign in text] + [END]
        head = [ord(sign) for sign in f"[{role}]"]
        ids += head + said
        labels += [-100] * len(head) + (said if trained else [-100] * len(said))
    messages = [{"role": r, "content": t[:read], "length": len(t)} for r, t, _ in turns]
    return {"messages": messages, "input_ids": ids[:cutoff], "labels": labels[:cutoff], "valid": True}


def marked(found):
    return [turn.text[turn.begin : turn.end] for turn in found]


def test_the_trained_answers_are_marked_and_no_others():
    given = row(
        ("user", "a?", False), ("assistant", "yes", False), ("user", "b?", False), ("assistant", "no", True)
    )
    found = turns_of(given, decode, False)
    assert [turn.role for turn in found] == ["user", "assistant", "user", "assistant"]
    assert marked(found) == ["", "", "", "no"]


@pytest.mark.parametrize("first", ["yes", "yes, of course"])
def test_where_it_is_not_certain_what_the_model_reads_is_shown(first):
    given = row(("user", "?", False), ("assistant", first, False), ("assistant", "yes", True))
    given["messages"][2]["content"] = "yes" if first == "yes" else "yes!"
    found = turns_of(given, decode, False)
    assert [turn.role for turn in found] == ["", ""]
    assert marked(found) == ["", "yes<end>"]
    assert "".join(turn.text for turn in found) == decode(given["input_ids"])


def test_an_answer_cut_at_the_cutoff_is_marked_as_far_as_it_carries_loss():
    given = row(("user", "?", False), ("assistant", "a long answer", True), cutoff=-8)
    assert marked(turns_of(given, decode, False)) == ["", "a long"]


def test_of_an_answer_that_was_not_read_whole_all_that_was_is_marked():
    given = row(("user", "?", False), ("assistant", "a long answer", True), read=6)
    [_, answer] = turns_of(given, decode, False)
    assert (answer.text[answer.begin : answer.end], answer.length) == ("a long", 13)


def test_without_a_tokenizer_roles_stand_for_it():
    given = row(("assistant", "a", True), ("assistant", "b", True))
    assert marked(turns_of(given, None, False)) == ["a", "b"]
    assert marked(turns_of(given, None, True)) == ["", "b"]


@pytest.mark.parametrize("seed", range(30))
def test_any_mark_is_what_carries_loss(seed):
    """Whatever the turns are: the labelled texts, in order, are the marks (or their beginnings)."""
    made = random.Random(seed)
    turns = [
        ("assistant", "".join(made.choices("ab ", k=made.randint(1, 3))).strip() or "a", made.random() < 0.6)
        for _ in range(4)
    ]
    found = turns_of(row(*turns), decode, False)
    if found[0].role:
        assert [bool(mark) for mark in marked(found)] == [trained for _, _, trained in turns]
    else:
        assert [mark for mark in marked(found) if mark] != [] or not any(t for _, _, t in turns)


def rows_of(n, length):
    facts = {"row_id": "x", "source": "s", "valid": True, "n_tokens": 1, "n_response_tokens": 1}
    rows = [
        Browsed({**facts, "row": number}, [Turn("assistant", "<" * length, length, 0, length)], {"random"})
        for number in range(n)
    ]
    return Rows(rows, [], Nearest((), {}, {}, ()), [], [], n)


@pytest.mark.parametrize(
    ("n", "length", "room"), [(50, 10, 100_000), (50, 5000, 200_000), (500, 5000, 100_000)]
)
def test_texts_are_cut_to_the_room_there_is(n, length, room):
    text, shown = listed_rows(rows_of(n, length), room, embedded)
    rows = json.loads(text)["rows"]
    assert len(text.encode()) <= room * 1.01
    assert len(rows) == shown <= n
    assert "<" not in text
    for each in rows:
        [_, before, learnt, after, missing] = each["turns"][0]
        assert before == after == ""
        assert len(learnt) + missing == length
        assert [LISTS[place] for place in each["in"]] == ["random"]
    if length * n * 6 < room:
        assert shown == n
        assert all(not each["turns"][0][4] for each in rows)


def test_a_long_curve_keeps_its_mean():
    series = [(float(step), float(step % 7)) for step in range(1000)]
    short = thinned(series, 100)
    assert len(short) == 100
    assert np.mean([y for _, y in short]) == pytest.approx(np.mean([y for _, y in series]))
    assert thinned(series[:50], 100) == series[:50]


def test_percentages():
    assert [percent(x) for x in (0, 0.0001, 0.0444, 0.1, 0.974, 1)] == [
        *("0.0 %", "< 0.1 %", "4.4 %", "10 %", "97 %", "100 %")
    ]
