"""The order of a round's rows in training, by hand; which rows are trained on is the same in every order."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import refused
from sampling_tables import pool_of, probabilities_of, rows_of, scores_of

from dataflex_pipeline import Run
from dataflex_pipeline.sampling import DrawSettings, draw

SCORES = [5.0, 1.0, 3.0, 1.0, 4.0, 9.0, 2.0]  # rows by score: 1 3 6 2 4 0 5


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        ("ascending", [1, 3, 6, 2, 4, 0, 5]),
        ("descending", [5, 0, 4, 2, 6, 1, 3]),
        ("folded", [1, 2, 5, 3, 4, 6, 0]),  # 1 2 5, then 3 4, then 6 0
    ],
)
def test_one_pass_by_hand(order, wanted):
    settings = DrawSettings("top_k", 7, order=order)
    assert rows_of(draw(scores_of(SCORES), None, pool_of(7), settings)) == wanted


def test_every_pass_is_in_order_and_the_last_is_cut_at_random():
    shuffled = DrawSettings("top_k", 17, num_samples=5, seed=8)
    before = rows_of(draw(scores_of(SCORES), None, pool_of(7), shuffled))
    drawn = draw(
        scores_of(SCORES),
        None,
        pool_of(7),
        DrawSettings("top_k", 17, num_samples=5, seed=8, order="ascending"),
    )
    found = rows_of(drawn)
    assert found[:15] == [6, 2, 4, 0, 5] * 3
    assert sorted(found[15:]) == sorted(before[15:])  # the same rows, in order
    assert SCORES[found[15]] <= SCORES[found[16]]
    assert "each pass ascending by score" in drawn.notices[0]


@pytest.mark.parametrize("order", ["ascending", "descending", "folded"])
@pytest.mark.parametrize(
    "more", [{}, {"num_samples": 30}, {"num_samples": 90}, {"source_quotas": {"a": 0.5}}]
)
def test_the_rows_are_those_of_the_shuffled_order(order, more):
    rng = np.random.default_rng(2)
    score, sources = rng.integers(0, 9, 120).astype(float), ["a", "b"] * 60
    inputs = scores_of(score), probabilities_of(np.full(120, 1 / 120)), pool_of(120, sources=sources)
    one = draw(*inputs, DrawSettings("sample", 50, seed=4, **more)).index.to_pandas()
    other = draw(*inputs, DrawSettings("sample", 50, seed=4, order=order, **more)).index.to_pandas()
    names = ["row", "weight", "probability", "score"]
    alike = [table[names].sort_values(names).reset_index(drop=True) for table in (one, other)]
    assert alike[0].equals(alike[1])
    if order != "folded":
        n = min(50, more.get("num_samples", 50))
        steps = np.diff(other["score"].to_numpy()[:n])
        assert ((steps if order == "ascending" else -steps) >= 0).all()


def test_a_run_trains_in_that_order_and_says_so(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"warmup_step": 0, "update_times": 1, "update_step": 3, "per_device_train_batch_size": 4}
    files = {"dataset": str(tiny_demo.pool), "model_name_or_path": str(tiny_demo.model)}
    run = Run(tmp_path / "r", **files, **settings, component_name="loss", order="ascending")
    run.score(1)
    run.select(1)
    path = run.folder / "round-01/index.parquet"
    assert (np.diff(pq.read_table(path)["score"].to_numpy()) >= 0).all()
    metadata = pq.read_metadata(path).metadata
    assert metadata[b"dataflex.order"] == b"ascending"
    told = [f"{key}={value}" for key, value in (files | settings).items()]
    assert "only one of them" in refused(
        tmp_path, "round", 1, *told, "order=folded", "disable_shuffling=true", "--run", "p"
    )
