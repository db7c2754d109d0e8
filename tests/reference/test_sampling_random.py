"""Random draws: numbers by counter, and the distributions of both kinds of draw against exact ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_tables import pool_of, probabilities_of, rows_of, scores_of

from dataflex_pipeline.errors import CorruptError, DataError
from dataflex_pipeline.sampling import DrawSettings, draw, draw_uniform, row_uniforms
from dataflex_pipeline.sampling.selection import Smallest

P5 = np.array([0.4, 0.25, 0.2, 0.1, 0.05])


def drawn_rows(p, n, seed, **given):
    p = np.asarray(p, float)
    scores = scores_of([1.0] * len(p))
    wanted = {"positions": n, "seed": seed, "shuffle": False} | given
    return draw(scores, probabilities_of(p / p.sum()), pool_of(len(p)), DrawSettings("sample", **wanted))


def successive(p, n):
    """Probability of every ordered outcome of successive sampling, by enumeration."""
    outcomes = {}
    for order in itertools.permutations(range(len(p)), n):
        left, chance = 1.0, 1.0
        for row in order:
            chance *= p[row] / left
            left -= p[row]
        outcomes[order] = chance
    return outcomes


@given(cuts=st.lists(st.integers(0, 400), max_size=8), seed=st.integers(0, 2**64 - 1))
def test_row_uniforms_are_one_philox_stream_however_it_is_split(cuts, seed):
    words = np.random.Philox(key=seed).random_raw(400)
    expected = [(int(word >> np.uint64(12)) + 0.5) / 2**52 for word in words]
    edges = sorted({0, 400, *cuts})
    pieces = [row_uniforms(seed, a, b) for a, b in itertools.pairwise(edges)]
    assert np.concatenate(pieces).tolist() == expected


def test_row_uniforms_reach_neither_end_even_for_extreme_words(monkeypatch):
    class Extreme:
        def __init__(self, key, counter): ...

        def random_raw(self, n):
            return np.array([0, 2**64 - 1], np.uint64)[:n]

    monkeypatch.setattr(np.random, "Philox", Extreme)
    low, high = row_uniforms(1, 0, 2)
    assert 0 < low == 2.0**-53
    assert high == 1 - 2.0**-53 < 1


def test_row_uniforms_far_into_the_stream():
    start = 3 * 2**40 + 1
    words = np.random.Philox(key=7, counter=start // 4).random_raw(8)[1:6]
    assert row_uniforms(7, start, start + 5).tolist() == [
        (int(w >> np.uint64(12)) + 0.5) / 2**52 for w in words
    ]


@pytest.mark.slow
def test_without_replacement_has_the_order_distribution_of_successive_sampling():
    seeds = 4000
    counts = dict.fromkeys(itertools.permutations(range(5), 2), 0)
    for seed in range(seeds):
        counts[tuple(rows_of(drawn_rows(P5, 2, seed)))] += 1
    expected = successive(P5, 2)
    assert sum(expected.values()) == pytest.approx(1)
    chi = sum((counts[o] - seeds * e) ** 2 / (seeds * e) for o, e in expected.items())
    assert chi < 43.8  # the 0.999 quantile of chi-square with 19 degrees of freedom


def test_with_replacement_draws_are_independent_and_follow_p():
    drawn = drawn_rows(P5, 40_000, 3, replacement=True)
    rows = np.array(rows_of(drawn))
    pairs = np.zeros((5, 5))
    np.add.at(pairs, (rows[0::2], rows[1::2]), 1)
    expected = 20_000 * np.outer(P5, P5)
    assert ((pairs - expected) ** 2 / expected).sum() < 51.2  # 0.999 quantile, 24 degrees of freedom
    assert drawn.tau is None


@pytest.mark.slow
def test_importance_weights_without_replacement_are_unbiased():
    # The Horvitz-Thompson sum of x over the selected rows estimates the sum over all rows.
    p = np.array([0.3, 0.2, 0.12, 0.1, 0.1, 0.08, 0.06, 0.04])
    x = np.array([1.0, 4.0, -2.0, 3.0, 7.0, 0.5, 2.0, 6.0])
    estimates = []
    for seed in range(3000):
        drawn = drawn_rows(p, 4, seed)
        rows = rows_of(drawn)
        estimates.append(np.sum(x[rows] / (1 - np.exp(-p[rows] * drawn.tau))))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - x.sum()) < 4 * error
    assert error < 0.3


@pytest.mark.slow
def test_importance_weights_with_replacement_are_unbiased():
    x = np.array([1.0, 4.0, -2.0, 3.0, 7.0])
    estimates = [
        np.mean(x[r] / (5 * P5[r]))
        for r in (rows_of(drawn_rows(P5, 50, s, replacement=True)) for s in range(2000))
    ]
    assert abs(np.mean(estimates) - x.mean()) < 4 * np.std(estimates) / np.sqrt(len(estimates))


@pytest.mark.slow
def test_importance_weights_of_mean_one_are_right_only_as_the_selection_grows():
    """One row weighs 1 whatever it is, so its loss estimates that of the draw; many estimate the pool's."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.1, 2.0, 400)
    x = rng.random(400) + p  # rows that are drawn more often have more loss
    p /= p.sum()

    def estimates(n, seeds):
        for seed in range(seeds):
            index = drawn_rows(p, n, seed, replacement=True, weights="importance").index
            weight = index.column("weight").to_numpy().astype(np.float64)
            yield np.mean(weight * x[index.column("row").to_numpy()])

    single = np.array(list(estimates(1, 3000)))
    assert abs(single.mean() - p @ x) < 4 * single.std() / 3000**0.5
    assert p @ x - x.mean() > 0.2
    assert abs(np.mean(list(estimates(20_000, 3))) - x.mean()) < 0.02
    flat = drawn_rows(p, 7, 1, replacement=True, weights="importance").index.column("weight").to_numpy()
    assert np.mean(3.5 * flat.astype(np.float64)) == pytest.approx(3.5, rel=1e-7)  # equal losses: exact


@pytest.mark.parametrize("replacement", [False, True])
def test_importance_column_is_the_formula_made_mean_one(replacement):
    p = np.arange(1, 101) / 5050
    drawn = drawn_rows(p, 30, 5, replacement=replacement, weights="importance")
    q = drawn.index.column("probability").to_numpy()
    raw = 1 / (100 * q) if replacement else 1 / (1 - np.exp(-q * drawn.tau))
    assert drawn.index.column("weight").to_numpy() == pytest.approx(raw / raw.mean(), rel=1e-6)
    assert drawn.index.column("weight").to_numpy().mean(dtype=np.float64) == pytest.approx(1, abs=1e-7)
    assert (drawn.tau is None) is replacement


def test_probability_weights_are_proportional_to_p():
    drawn = drawn_rows(P5, 4, 1, weights="probability")
    p = P5[rows_of(drawn)]
    assert drawn.index.column("weight").to_numpy() == pytest.approx(p / p.mean(), rel=1e-6)


def test_all_rows_drawn_have_weight_one():
    drawn = drawn_rows(P5, 5, 1, weights="importance")
    assert drawn.tau == np.inf
    assert sorted(rows_of(drawn)) == [0, 1, 2, 3, 4]
    assert drawn.index.column("weight").to_pylist() == [1.0] * 5


def test_more_rows_than_have_a_probability_are_drawn_with_replacement_and_it_is_said():
    p = [0.5, 0.0, 0.5, 0.0]
    drawn = drawn_rows(p, 300, 2)
    counts = np.bincount(rows_of(drawn), minlength=4)
    assert counts[1] == counts[3] == 0
    assert abs(counts[0] - 150) < 45
    assert drawn.notices == (
        "300 rows were asked for and 2 have a probability above 0: drawn with replacement.",
    )


def test_rows_without_probability_are_never_drawn_with_replacement():
    p = np.zeros(1000)
    p[[0, 500, 999]] = [0.2, 0.3, 0.5]
    rows = rows_of(drawn_rows(p, 5000, 4, replacement=True))
    assert set(rows) == {0, 500, 999}
    assert np.bincount(rows)[[0, 500, 999]] / 5000 == pytest.approx([0.2, 0.3, 0.5], abs=0.03)


def test_uniform_warm_up_draws_valid_rows_once_with_null_scores():
    valid = [i % 3 != 0 for i in range(30)]
    drawn = draw_uniform(pool_of(30, valid=valid), DrawSettings("sample", 12, seed=1))
    rows = rows_of(drawn)
    assert len(set(rows)) == 12
    assert all(valid[row] for row in rows)
    assert drawn.index.column("score").null_count == 12
    assert drawn.index.column("probability").to_pylist() == [1 / 20] * 12
    assert drawn.index.column("row_id").to_pylist() == [f"{row:032x}" for row in rows]


def test_uniform_warm_up_takes_every_row_equally_often():
    counts = np.zeros(10)
    for seed in range(2000):
        counts[rows_of(draw_uniform(pool_of(10), DrawSettings("sample", 3, seed=seed)))] += 1
    assert ((counts - 600) ** 2 / (600 * 0.7)).sum() * 0.9 < 27.9  # 0.999 quantile, 9 degrees of freedom


@settings(max_examples=40, deadline=None)
@given(
    p=st.lists(st.sampled_from([0.0, 1e-300, 1e-9, 0.5, 1.0, 3.0]), min_size=1, max_size=60),
    n=st.integers(1, 70),
    block=st.integers(1, 70),
    batch=st.integers(1, 70),
    replacement=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_blocks_do_not_change_a_draw(p, n, block, batch, replacement, seed):
    total = sum(p)
    if not total:
        return
    p = [x / total for x in p]
    given_ = DrawSettings("sample", n, replacement=replacement, seed=seed, weights="importance")
    one = draw(scores_of([0.5] * len(p)), probabilities_of(p), pool_of(len(p)), given_)
    other = draw(
        scores_of([0.5] * len(p), batch=batch),
        probabilities_of(p, batch),
        pool_of(len(p)),
        given_,
        block_rows=block,
    )
    assert one.index.equals(other.index)
    assert one.notices == other.notices
    assert one.tau == other.tau


@settings(max_examples=100, deadline=None)
@given(
    keys=st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0, 2.0, np.inf]), max_size=80),
    count=st.integers(1, 40),
    block=st.integers(1, 30),
    cut_at=st.integers(1, 50),
)
def test_smallest_by_count_is_a_sorted_prefix(keys, count, block, cut_at):
    smallest = Smallest(count, None, beside=1)
    smallest._cut_at = cut_at  # cut early and often, as a long stream would
    for start in range(0, len(keys), block):
        part = np.array(keys[start : start + block])
        rows = np.arange(start, start + len(part))
        smallest.offer(rows, part, beside=[rows / 7])
    kept = smallest.finish()
    order = sorted(range(len(keys)), key=lambda i: (keys[i], i))
    assert kept.rows.tolist() == order[:count]
    assert kept.beside[0].tolist() == [row / 7 for row in order[:count]]
    assert kept.tau == (keys[order[count]] if len(keys) > count else np.inf)
    assert kept.complete == (len(keys) <= count)


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.integers(1, 9)), max_size=80),
    budget=st.integers(1, 120),
    block=st.integers(1, 30),
    cut_at=st.integers(1, 50),
)
def test_smallest_by_budget_is_the_longest_prefix_that_fits(lines, budget, block, cut_at):
    smallest = Smallest(None, budget, beside=2)
    smallest._cut_at = cut_at
    for start in range(0, len(lines), block):
        part = lines[start : start + block]
        keys = np.array([key for key, _ in part])
        costs = np.array([cost for _, cost in part])
        rows = np.arange(start, start + len(part))
        smallest.offer(rows, keys, costs, [rows / 7, -keys])
    kept = smallest.finish()
    order = sorted(range(len(lines)), key=lambda i: (lines[i][0], i))
    expected, spent = [], 0
    for i in order:
        spent += lines[i][1]
        if spent > budget:
            break
        expected.append(i)
    assert kept.rows.tolist() == expected
    assert kept.costs.tolist() == [lines[i][1] for i in expected]
    assert kept.beside[0].tolist() == [row / 7 for row in expected]
    assert kept.beside[1].tolist() == [-lines[i][0] for i in expected]
    assert kept.complete == (len(expected) == len(lines))
    assert kept.tau == (lines[order[len(expected)]][0] if len(expected) < len(lines) else np.inf)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_draw():
    one, same, other = (drawn_rows(np.ones(1000), 50, seed) for seed in (1, 1, 2))
    assert one.index.equals(same.index)
    assert set(rows_of(one)) != set(rows_of(other))


def test_a_probability_on_an_invalid_row_is_refused():
    scores = scores_of([1.0, None, 2.0])
    with pytest.raises(CorruptError, match="Row 1 is not valid and has the probability"):
        draw(scores, probabilities_of([0.5, 0.1, 0.4]), pool_of(3), DrawSettings("sample", 1))


def test_a_probability_that_is_no_number_is_refused():
    with pytest.raises(CorruptError, match="The probability of row 2 is nan"):
        draw(
            scores_of([1.0] * 3), probabilities_of([0.5, 0.5, np.nan]), pool_of(3), DrawSettings("sample", 1)
        )


def test_tables_of_different_length_are_refused():
    with pytest.raises(CorruptError, match="3, 2 rows"):
        draw(scores_of([1.0] * 3), probabilities_of([0.5, 0.5]), pool_of(3), DrawSettings("sample", 1))


def test_no_row_to_draw_is_an_error():
    with pytest.raises(DataError, match="none has a probability above 0"):
        draw(scores_of([1.0] * 3), probabilities_of([0.0] * 3), pool_of(3), DrawSettings("sample", 1))
    with pytest.raises(DataError, match="None of the 2 rows is valid"):
        draw_uniform(pool_of(2, valid=[False, False]), DrawSettings("sample", 1))
