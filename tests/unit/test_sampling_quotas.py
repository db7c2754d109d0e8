"""Quotas: how a selection is split between sources, and what it says when a source falls short."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_tables import pool_of, rows_of, scores_of, select, selected

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.sampling import DrawSettings
from dataflex_pipeline.sampling.quotas import allot, interleave


def test_shares_are_split_by_largest_remainder():
    assert allot(10, {"a": 0.5, "b": 0.25}) == [5, 3, 2]  # 2.5 and 2.5: the one named first
    assert allot(9, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) == [3, 3, 3, 0]
    assert allot(7, {"a": 0.1, "b": 0.1, "c": 0.8}) == [1, 1, 5, 0]
    assert allot(100, {"a": 0.07, "b": 0.0}) == [7, 0, 93]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6), st.integers(0, 1000))
def test_split_shares_add_up_and_are_within_one(parts, total):
    whole = max(100, sum(parts))
    shares = {str(i): part / whole for i, part in enumerate(parts)}
    given_ = allot(total, shares)
    assert sum(given_) == total
    assert all(abs(n - s * total) < 1 + 1e-9 for n, s in zip(given_, shares.values(), strict=False))


def test_quotas_take_the_best_of_each_source_and_the_rest_from_the_others():
    sources = ["a", "b", "c", "d"] * 5
    scores = scores_of([float(i) for i in range(20)])
    drawn = select(
        scores,
        pool_of(20, sources=sources),
        strategy="top_k",
        num_samples=8,
        source_quotas={"b": 0.5, "a": 0.25},
    )
    by_source = {name: [r for r in selected(drawn) if sources[r] == name] for name in "abcd"}
    assert by_source == {"b": [17, 13, 9, 5], "a": [16, 12], "c": [18], "d": [19]}
    assert {sources[r] for r in selected(drawn)[:4]} == {"a", "b", "d"}  # mixed, not source after source


def test_quotas_of_a_random_draw_and_their_weights():
    n = 4000
    rng = np.random.default_rng(0)
    p = rng.random(n)
    sources = np.array(["a", "b", "c", "c"] * (n // 4))
    drawn = select(
        scores_of([0.0] * n),
        pool_of(n, sources=sources),
        p / p.sum(),
        strategy="sample",
        num_samples=100,
        positions=100,
        source_quotas={"a": 0.2, "b": 0.3},
        weights="importance",
    )
    rows, weights = np.array(rows_of(drawn)), drawn.index.column("weight").to_numpy()
    shares = {name: weights[sources[rows] == name] for name in "abc"}
    assert {name: len(w) for name, w in shares.items()} == {"a": 20, "b": 30, "c": 50}
    assert all(w.mean(dtype=float) == pytest.approx(1, abs=1e-6) for w in shares.values())
    assert weights.std() > 0.1
    assert len(set(rows)) == 100


def test_a_source_with_too_few_rows():
    scores, pool = scores_of([1.0, 2.0, 3.0, 4.0]), pool_of(4, sources=["a", "b", "b", "b"])
    quota = {"source_quotas": {"a": 0.5}, "num_samples": 4}
    drawn = select(scores, pool, strategy="top_k", **quota)
    assert sorted(selected(drawn)) == [0, 2, 3]
    assert drawn.notices[0] == "Source 'a': 2 rows were asked for and 1 have a score: all are taken."
    drawn = select(scores, pool, [0.25] * 4, strategy="sample", **quota)
    assert sorted(selected(drawn))[:2] == [0, 0]
    assert len(set(selected(drawn))) == 3
    assert drawn.notices[0].startswith("Source 'a': 2 rows were asked for and 1 have a probability above 0")


def test_quota_mistakes_are_told():
    scores, pool = scores_of([1.0, 2.0]), pool_of(2, sources=["alpaca", "glaive"])
    with pytest.raises(ConfigError, match=r"names 'alpacca', which is no source.*Did you mean 'alpaca'"):
        select(scores, pool, strategy="top_k", source_quotas={"alpacca": 0.5})
    with pytest.raises(ConfigError, match=r"sum to 0.75 and name every source"):
        select(scores, pool, strategy="top_k", source_quotas={"alpaca": 0.5, "glaive": 0.25})
    with pytest.raises(ConfigError, match=r"sum to 1\.2"):
        DrawSettings("top_k", 1, source_quotas={"alpaca": 0.9, "glaive": 0.3})
    with pytest.raises(ConfigError, match=r"alpaca: -0\.1"):
        DrawSettings("top_k", 1, source_quotas={"alpaca": -0.1})


def test_interleaving_keeps_the_order_of_each_source_and_mixes_evenly():
    order = interleave([4, 2, 0, 1]).tolist()
    assert order == [0, 4, 1, 6, 2, 5, 3]
