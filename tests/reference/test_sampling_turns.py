"""Target rows that take turns: the selection is that of looking at every value at every turn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_tables import pool_of, rows_of, scores_of, selected

from dataflex_pipeline.errors import DataError
from dataflex_pipeline.sampling import DrawSettings, draw, ranked
from dataflex_pipeline.sampling.ranked import BestPerTurn


class Matrix:
    """Rankings that are all there at once; counts the passes over them."""

    def __init__(self, values):
        self.values = np.asarray(values, dtype=float)
        self.n_turns = self.values.shape[1]
        self.passes = 0

    def blocks(self, max_rows):
        self.passes += 1
        for first in range(0, len(self.values), max_rows):
            yield self.values[first : first + max_rows]


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """Keep so little at first that passes are repeated and the worst are dropped often."""
    monkeypatch.setattr(ranked, "FIRST_DEPTH", 1)
    monkeypatch.setattr(ranked, "SLACK", 3)


def by_definition(values, usable, costs, amount):
    """Look at all rows at every turn."""
    taken, spent, idle, turn = [], 0, 0, 0
    while idle < values.shape[1]:
        column = values[:, turn % values.shape[1]]
        turn += 1
        left = [i for i in np.flatnonzero(~np.isnan(column) & usable) if i not in taken]
        if not left:
            idle += 1
            continue
        best = min(left, key=lambda i: (-column[i], i))
        spent += costs[best]
        if spent > amount:
            break
        taken.append(int(best))
        idle = 0
    return taken


def drawn(values, block=1000, valid=None, tokens=None, sources=None, **settings):
    n = len(values)
    scores = scores_of([0.0] * n, valid=valid)
    wanted = {"strategy": "round_robin", "positions": 10, "over_target_rows": True, "shuffle": False}
    rankings = Matrix(values)
    found = draw(
        scores,
        None,
        pool_of(n, tokens, sources),
        DrawSettings(**wanted | settings),
        rankings=rankings,
        block_rows=block,
    )
    return found, rankings


@given(data=st.data())
def test_it_is_the_definition(data):
    n, m = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 5))
    value = st.sampled_from([np.nan, -1.0, 0.0, 1.0, 2.0])
    values = np.array(data.draw(st.lists(st.lists(value, min_size=m, max_size=m), min_size=n, max_size=n)))
    usable = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    tokens = data.draw(st.lists(st.integers(1, 6), min_size=n, max_size=n))
    amount, budgeted = data.draw(st.integers(1, 30)), data.draw(st.booleans())
    expected = by_definition(values, usable, tokens if budgeted else [1] * n, amount)
    if not expected:
        return
    how = {"token_budget" if budgeted else "num_samples": amount}
    found, _ = drawn(values, data.draw(st.integers(1, 12)), usable.tolist(), tokens, **how)
    assert selected(found) == expected


@given(seed=st.integers(0, 50), share=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_each_source_has_turns_of_its_own(seed, share):
    rng = np.random.default_rng(seed)
    values, sources = rng.integers(0, 9, (40, 6)).astype(float), np.array(["a", "b"])[rng.integers(0, 2, 40)]
    quotas = {"a": share, "b": 1 - share}
    found, _ = drawn(values, 7, sources=sources, source_quotas=quotas, num_samples=12)
    for name, amount in (("a", round(12 * share)), ("b", round(12 * (1 - share)))):
        mine = [row for row in selected(found) if sources[row] == name]
        assert mine == (by_definition(values, sources == name, [1] * 40, amount) if amount else [])


def test_few_are_kept_at_first_and_more_where_all_want_the_same():
    rng = np.random.default_rng(0)
    apart, alike = rng.random((500, 10)), np.repeat(rng.random((500, 1)), 10, axis=1)
    found, rankings = drawn(apart, 64, num_samples=20)
    assert rankings.passes == 1
    assert selected(found) == by_definition(apart, np.ones(500, bool), [1] * 500, 20)
    found, rankings = drawn(alike, 64, num_samples=200)
    assert rankings.passes == 2  # 80 of each, then 320
    assert selected(found) == np.argsort(-alike[:, 0], kind="stable")[:200].tolist()


def test_best_per_turn_is_a_sort_whatever_the_blocks():
    rng = np.random.default_rng(3)
    values = rng.integers(0, 5, (300, 7)).astype(float)
    values[rng.random((300, 7)) < 0.3] = np.nan
    values[:, 6] = np.nan
    for depth, block in ((1, 1), (5, 13), (400, 100)):
        kept = BestPerTurn(7, depth)
        for first in range(0, 300, block):
            rows = np.arange(first, min(first + block, 300))
            kept.offer(rows, values[rows], rows + 1)
        for column, found in zip(values.T, kept.finish(), strict=True):
            there = np.flatnonzero(~np.isnan(column))
            best = there[np.lexsort((there, -column[there]))]
            assert found.rows.tolist() == best[:depth].tolist()
            assert found.costs.tolist() == (best[:depth] + 1).tolist()
            assert found.complete == (len(best) <= depth)


def test_all_rows_are_taken_and_said_when_more_are_asked_for():
    values = np.array([[1.0, np.nan], [np.nan, np.nan], [2.0, 5.0]])
    found, _ = drawn(values, num_samples=9)
    assert selected(found) == [2, 0]
    assert "9 rows were asked for and 2 have a score: all are taken." in found.notices
    assert sorted(set(rows_of(found))) == [0, 2]
    with pytest.raises(DataError, match="No target row can take turns"):
        drawn(np.empty((3, 0)), num_samples=1)
    with pytest.raises(DataError, match="no row can be selected"):
        drawn(np.full((3, 2), np.nan), num_samples=1)
