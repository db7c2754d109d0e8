"""Selections that are not random, budgets, and how an index is laid out."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_tables import MemoryTable, pool_of, probabilities_of, rows_of, scores_of, select, selected

from dataflex_pipeline.errors import ConfigError, CorruptError, DataError
from dataflex_pipeline.sampling import DrawSettings, draw, draw_uniform, top_k_probabilities
from dataflex_pipeline.schemas import INDEX
from dataflex_pipeline.store.parts import PartsWriter
from dataflex_pipeline.store.tables import TableFile, table_writer


@settings(max_examples=60, deadline=None)
@given(
    score=st.lists(st.sampled_from([None, float("nan"), -2.0, 0.0, 1.0, 7.5]), min_size=1, max_size=50),
    k=st.integers(1, 60),
    block=st.integers(1, 20),
)
def test_top_k_is_a_stable_sort(score, k, block):
    known = [i for i, s in enumerate(score) if s is not None and s == s]
    if not known:
        return
    scores = scores_of(score)
    wanted = DrawSettings("top_k", k, shuffle=False)
    drawn = draw(scores, None, pool_of(len(score)), wanted, block_rows=block)
    expected = sorted(known, key=lambda i: (-score[i], i))[:k]
    assert selected(drawn) == expected
    assert drawn.index.column("probability").to_pylist() == [1 / len(expected)] * k
    assert (f"{k} rows were asked for and {len(known)} have a score: all are taken." in drawn.notices) == (
        k > len(known)
    )


def test_top_k_probabilities_are_one_over_k_on_the_chosen(tmp_path):
    scores = scores_of([3.0, None, 5.0, 5.0, 1.0])
    drawn = select(scores, strategy="top_k", num_samples=2)
    summary = top_k_probabilities(scores, drawn, tmp_path / "p.parquet", {"of": "test"})
    table = TableFile(tmp_path / "p.parquet")
    assert [b.column("probability").to_pylist() for b in table.blocks()] == [[0.0, 0.0, 0.5, 0.5, 0.0]]
    assert (summary.n_positive, summary.n_valid, summary.effective_sample_size) == (2, 4, 2.0)


def test_round_robin_by_hand():
    # a: 0 > 1 > 2 > 4 (3 has none); b: 0 = 2 > 3 > 1 > 4, the tie goes to row 0, which a has taken.
    scores = scores_of(
        [1.0] * 5, a=[9.0, 8.0, 7.0, None, 1.0], b=[6.0, 2.0, 6.0, 5.0, 1.0], c=[None, None, None, None, 3.0]
    )
    turn = {"strategy": "round_robin"}
    assert selected(select(scores, group_columns=("a", "b"), **turn)) == [0, 2, 1, 3, 4]
    assert selected(select(scores, group_columns=("a", "b"), num_samples=3, **turn)) == [0, 2, 1]
    assert selected(select(scores, group_columns=("c", "b", "a"), **turn)) == [4, 0, 1, 2, 3]
    assert selected(select(scores, group_columns=("c",), **turn)) == [4]


def take_turns(groups, costs, amount):
    """Round robin by the definition: look at all rows at every turn."""
    taken, spent, idle, turn = [], 0, 0, 0
    while idle < len(groups):
        values = groups[turn % len(groups)]
        turn += 1
        left = [i for i, v in enumerate(values) if v is not None and i not in taken]
        if not left:
            idle += 1
            continue
        best = min(left, key=lambda i: (-values[i], i))
        spent += costs[best]
        if spent > amount:
            break
        taken.append(best)
        idle = 0
    return taken


@settings(max_examples=120, deadline=None)
@given(
    lines=st.lists(
        st.tuples(*[st.sampled_from([None, 0.0, 1.0, 2.0, 3.0])] * 3, st.integers(1, 6)),
        min_size=1,
        max_size=25,
    ),
    amount=st.integers(1, 40),
    budgeted=st.booleans(),
    block=st.integers(1, 12),
)
def test_round_robin_is_its_definition(lines, amount, budgeted, block):
    a, b, c, tokens = (list(column) for column in zip(*lines, strict=True))
    expected = take_turns([a, b, c], tokens if budgeted else [1] * len(a), amount)
    if not expected:
        return
    how = {"token_budget": amount} if budgeted else {"num_samples": amount}
    wanted = DrawSettings("round_robin", 10, group_columns=("a", "b", "c"), shuffle=False, **how)
    scores = scores_of([0.0] * len(a), a=a, b=b, c=c)
    assert selected(draw(scores, None, pool_of(len(a), tokens), wanted, block_rows=block)) == expected


def test_a_token_budget_takes_whole_rows_in_order_of_selection():
    scores = scores_of([5.0, 4.0, 3.0, 2.0])
    pool = pool_of(4, tokens=[10, 20, 30, 1])
    assert selected(select(scores, pool, strategy="top_k", token_budget=59)) == [0, 1]
    assert selected(select(scores, pool, strategy="top_k", token_budget=60)) == [0, 1, 2]
    drawn = select(scores, pool, strategy="top_k", token_budget=100)
    assert selected(drawn) == [0, 1, 2, 3]
    assert drawn.notices[0] == "all 4 usable rows fit the budget of 100 tokens."
    with pytest.raises(DataError, match="the first row selected has more than the budget of 9 tokens"):
        select(scores, pool, strategy="top_k", token_budget=9)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("budget", [7, 40, 333])
def test_a_token_budget_is_the_beginning_of_the_same_draw(replacement, budget):
    rng = np.random.default_rng(1)
    p, tokens = rng.random(60), rng.integers(1, 7, 60)
    draw_with = {"strategy": "sample", "p": p / p.sum(), "seed": 8, "replacement": replacement}
    n = 60 if not replacement else 2000
    scores, pool = scores_of([0.0] * 60), pool_of(60, tokens)
    everything = select(scores, pool, num_samples=n, **draw_with).selected
    expected = everything[np.cumsum(tokens[everything]) <= budget]
    drawn = select(scores, pool, token_budget=budget, **draw_with)
    assert selected(drawn) == expected.tolist()
    if not replacement and len(expected) < 60:
        assert drawn.tau == select(scores, pool, num_samples=len(expected), **draw_with).tau


@pytest.mark.parametrize(("fraction", "rows"), [(0.07, 7), (0.1, 10), (0.071, 8), (1.0, 100), (0.001, 1)])
def test_a_fraction_counts_valid_rows_and_rounds_up(fraction, rows):
    scores = scores_of([None] * 20 + [1.0] * 100)
    assert len(select(scores, strategy="top_k", fraction=fraction).selected) == rows


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"strategy": "top_k", "weights": "importance"}, "strategy=top_k; weights=importance"),
        ({"strategy": "round_robin", "group_columns": ("a",), "weights": "probability"}, "not random"),
        ({"strategy": "round_robin"}, "without group columns"),
        ({"strategy": "top_k", "replacement": True}, "takes each row once"),
        ({"strategy": "sample", "num_samples": 3, "fraction": 0.5}, "num_samples=3; fraction=0.5"),
        ({"strategy": "sample", "fraction": 1.5}, "fraction=1.5"),
        ({"strategy": "sample", "token_budget": 0}, "token_budget=0"),
    ],
)
def test_settings_that_cannot_work(given_, message):
    with pytest.raises(ConfigError, match=message):
        DrawSettings(positions=4, **given_)


def test_unknown_group_column_is_told():
    with pytest.raises(ConfigError, match=r"no column 'similarity_matth'.*Did you mean 'similarity_math'"):
        select(
            scores_of([1.0], similarity_math=[1.0]),
            strategy="round_robin",
            group_columns=("similarity_matth",),
        )


def test_passes_hold_every_row_once_in_a_fresh_order():
    scores = scores_of([float(i) for i in range(10)])
    drawn = select(scores, strategy="top_k", num_samples=4, positions=10, shuffle=True, seed=3)
    rows = rows_of(drawn)
    assert sorted(rows[:4]) == sorted(rows[4:8]) == [6, 7, 8, 9]
    assert len(set(rows[8:])) == 2
    assert drawn.n_distinct == 4
    assert len(drawn.selected) == 4
    assert drawn.notices == ("4 rows were selected for 10 positions: repeated, each pass reshuffled.",)
    orders = {tuple(rows[:4]), tuple(rows[4:8])}
    many = rows_of(select(scores, strategy="top_k", num_samples=4, positions=400, shuffle=True))
    assert len(orders | {tuple(many[i : i + 4]) for i in range(0, 400, 4)}) > 20


def test_without_shuffling_the_order_is_that_of_the_selection():
    scores = scores_of([float(i) for i in range(10)])
    drawn = select(scores, strategy="top_k", num_samples=4, positions=6)
    assert rows_of(drawn) == [9, 8, 7, 6, 9, 8]
    drawn = select(scores, strategy="top_k", num_samples=8, positions=3)
    assert rows_of(drawn) == [9, 8, 7]
    assert drawn.notices == ("8 rows were selected for 3 positions: the first of them are trained on.",)


def test_of_a_random_draw_a_random_part_is_trained_on():
    scores = scores_of([float(i) for i in range(1000)])
    alike = [0.0] * 990 + [0.1] * 10
    firsts = [
        rows_of(
            select(scores, p=alike, strategy="sample", num_samples=10, positions=3, shuffle=True, seed=seed)
        )
        for seed in range(200)
    ]
    assert all(len(set(rows)) == 3 and min(rows) >= 990 for rows in firsts)
    counts = np.bincount(np.concatenate(firsts) - 990, minlength=10)
    assert counts.min() > 30  # 60 expected of each


@pytest.mark.parametrize("shuffle", [False, True])
def test_of_a_ranking_the_lowest_ranks_are_cut(shuffle):
    scores = scores_of([float(i) for i in range(1000)], low=[float(-i) for i in range(1000)])
    drawn = select(scores, strategy="top_k", num_samples=10, positions=3, shuffle=shuffle)
    assert sorted(rows_of(drawn)) == [997, 998, 999]
    assert selected(drawn) == list(range(999, 989, -1))
    turns = {"strategy": "round_robin", "group_columns": ("score", "low")}
    drawn = select(scores, num_samples=10, positions=3, shuffle=shuffle, **turns)
    assert sorted(rows_of(drawn)) == [0, 998, 999]


def test_the_selection_is_exactly_what_was_asked_for_in_order_of_rank():
    sources = ["a", "b"] * 50
    pool = pool_of(100, sources=sources)
    scores = scores_of([float(i % 37) if i % 9 else None for i in range(100)])
    drawn = select(scores, pool, strategy="top_k", num_samples=12, positions=40)
    table = drawn.selection
    usable = [(-(i % 37), i) for i in range(100) if i % 9]
    expected = [row for _, row in sorted(usable)][:12]
    assert table.column("row").to_pylist() == expected
    assert table.column("rank").to_pylist() == list(range(1, 13))
    assert table.column("source").to_pylist() == [sources[row] for row in expected]
    assert table.column("score").to_pylist() == [float(row % 37) for row in expected]
    assert table.column("probability").to_pylist() == [1 / 12] * 12
    assert table.column("weight").to_pylist() == [1.0] * 12
    assert len(rows_of(drawn)) == 40
    assert set(rows_of(drawn)) == set(expected)


def test_without_positions_there_is_a_selection_and_no_index():
    scores = scores_of([float(i) for i in range(10)])
    drawn = select(scores, strategy="top_k", fraction=0.25, positions=0)
    assert drawn.selection.column("row").to_pylist() == [9, 8, 7]
    assert drawn.index.num_rows == 0
    assert drawn.index.schema.names == INDEX.names
    with pytest.raises(ConfigError, match="Nothing says how many rows to select"):
        select(scores, strategy="top_k", positions=0)


@pytest.mark.parametrize(
    ("there", "asked", "given"),
    [
        ({"a": 50, "b": 30, "c": 20}, 30, {"a": 10, "b": 10, "c": 10}),
        ({"a": 50, "b": 30, "c": 2}, 30, {"a": 14, "b": 14, "c": 2}),
        ({"a": 50, "b": 3, "c": 2}, 31, {"a": 26, "b": 3, "c": 2}),
        ({"a": 5, "b": 3, "c": 2}, 10, {"a": 5, "b": 3, "c": 2}),
        ({"a": 9, "b": 9}, 7, {"a": 3, "b": 4}),
    ],
)
@pytest.mark.parametrize("strategy", ["top_k", "sample"])
def test_balanced_gives_every_source_the_same_number(there, asked, given, strategy):
    sources = [name for name, count in there.items() for _ in range(count)]
    n = len(sources)
    scores = scores_of([float(i) for i in range(n)])
    p = [1 / n] * n if strategy == "sample" else None
    drawn = select(
        scores, pool_of(n, sources=sources), p=p, strategy=strategy, num_samples=asked, balanced=True
    )
    counts = Counter(drawn.selection.column("source").to_pylist())
    assert sum(counts.values()) == asked
    assert sorted(counts.values()) == sorted(given.values())
    assert all(counts[name] == count or there[name] > count for name, count in given.items())


def test_balanced_gives_all_there_is_where_more_is_asked_for():
    scores = scores_of([1.0, 2.0, 3.0])
    drawn = select(
        scores, pool_of(3, sources=["a", "b", "b"]), strategy="top_k", num_samples=5, balanced=True
    )
    assert sorted(selected(drawn)) == [0, 1, 2]
    assert any("all are taken" in line for line in drawn.notices)


def test_a_draw_cut_without_shuffling_weighs_as_the_shorter_draw():
    p = np.arange(1, 51) / 1275
    scores = scores_of([0.0] * 50)
    how = {"strategy": "sample", "p": p, "weights": "importance", "positions": 6, "seed": 4}
    cut, short = select(scores, num_samples=20, **how), select(scores, num_samples=6, **how)
    assert cut.index.equals(short.index)
    assert cut.tau == short.tau


def test_the_index_has_its_schema_and_the_rows_own_values():
    scores = scores_of([float(i) / 7 for i in range(20)])
    p = np.arange(1, 21) / 210
    drawn = select(scores, p=p, strategy="sample", positions=8, shuffle=True)
    assert drawn.index.schema.equals(INDEX)
    rows = np.array(rows_of(drawn))
    assert drawn.index.column("position").to_pylist() == list(range(8))
    assert drawn.index.column("score").to_numpy().tolist() == (rows / 7).tolist()
    assert drawn.index.column("probability").to_numpy().tolist() == p[rows].tolist()
    assert drawn.index.column("row_id").to_pylist() == [f"{row:032x}" for row in rows]


def test_a_reordered_score_table_is_refused():
    scores = scores_of([1.0, 2.0, 3.0])
    reordered = MemoryTable(scores.table.take([2, 1, 0]))
    with pytest.raises(CorruptError, match="does not hold row 0 at line 0"):
        select(reordered, strategy="top_k")


def test_a_uniform_draw_has_no_other_strategy():
    with pytest.raises(ValueError, match="uniform draw is a sample"):
        draw_uniform(pool_of(3), DrawSettings("top_k", 1))


def test_files_and_parts_give_the_same_index_as_memory(tmp_path):
    n = 150_000  # three row groups
    rng = np.random.default_rng(2)
    p = rng.random(n)
    p /= p.sum()
    scores, pool = scores_of(rng.random(n).tolist()), pool_of(n, tokens=rng.integers(1, 99, n))
    with table_writer(tmp_path / "s.parquet", scores.schema, {}) as write:
        write(scores.table)
    writer = PartsWriter(tmp_path / "pool", pool.schema, {})
    edges = [0, 70_000, 70_001, n]
    for part, (start, stop) in enumerate(itertools.pairwise(edges)):
        writer.write(part, pool.table.slice(start, stop - start))
    parts, file = writer.finish(3, {}), TableFile(tmp_path / "s.parquet")
    budget = DrawSettings("sample", 900, token_budget=40_000, seed=6, weights="importance")
    assert draw(file, probabilities_of(p), parts, budget).index.equals(
        draw(scores, probabilities_of(p), pool, budget).index
    )
    uniform = DrawSettings("sample", 900, fraction=0.01)
    assert draw_uniform(parts, uniform).index.equals(draw_uniform(pool, uniform).index)


def test_a_reordered_file_is_refused(tmp_path):
    scores = scores_of([float(i) for i in range(70_000)])
    order = np.r_[np.arange(65_536, 70_000), np.arange(65_536)]
    with table_writer(tmp_path / "s.parquet", scores.schema, {}) as write:
        write(scores.table.take(order))
    with pytest.raises(CorruptError, match=r"s\.parquet does not hold row 0 at line 0"):
        select(TableFile(tmp_path / "s.parquet"), pool_of(70_000), strategy="top_k")


def test_a_file_without_rows_has_nothing_to_select(tmp_path):
    scores = scores_of([])
    with table_writer(tmp_path / "s.parquet", scores.schema, {}) as write:
        write(scores.table)
    with pytest.raises(DataError, match="no row can be selected"):
        select(TableFile(tmp_path / "s.parquet"), pool_of(0), strategy="top_k")


def test_flags_that_are_missing_are_told():
    scores = scores_of([1.0, 2.0])
    table = scores.table.set_column(3, "valid", pa.array([True, None]))
    with pytest.raises(CorruptError, match="1 rows are neither valid nor not valid"):
        select(MemoryTable(table), strategy="top_k")
