"""Tables of probabilities: from weights, and imported from .npy files."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from sampling_tables import scores_of

from dataflex_pipeline.errors import DataError, DataflexError
from dataflex_pipeline.sampling import import_probabilities, write_probabilities
from dataflex_pipeline.schemas import PROBABILITIES

SCORE = [0.5, None, 2.0, -1.0, 0.0, None, 3.0]


def weigh(block):
    return np.exp(block.column("score").to_numpy(zero_copy_only=False))


def test_weights_become_probabilities_of_every_row(tmp_path):
    final = tmp_path / "p.parquet"
    summary = write_probabilities(scores_of(SCORE), weigh, final, {"of": "test"}, {"method": "exponential"})
    total = sum(math.exp(s) for s in SCORE if s is not None)
    expected = [0.0 if s is None else math.exp(s) / total for s in SCORE]
    table = pq.read_table(final)
    assert table.schema.remove_metadata().equals(PROBABILITIES)
    assert table.column("row").to_pylist() == list(range(7))
    assert table.column("probability").to_pylist() == pytest.approx(expected, rel=1e-15)
    assert (summary.n_rows, summary.n_valid, summary.n_positive) == (7, 5, 5)
    assert summary.effective_sample_size == pytest.approx(1 / sum(p * p for p in expected))
    assert summary.max_probability == max(table.column("probability").to_pylist())
    footer = pq.read_metadata(final).metadata
    assert footer[b"dataflex.method"] == b"exponential"
    assert footer[b"dataflex.n_positive"] == b"5"


def test_batches_of_the_score_table_do_not_change_the_bytes(tmp_path):
    score = np.random.default_rng(0).normal(size=70_000).tolist()
    for batch in (70_000, 999):
        write_probabilities(scores_of(score, batch=batch), weigh, tmp_path / f"{batch}.parquet", {})
    assert (tmp_path / "70000.parquet").read_bytes() == (tmp_path / "999.parquet").read_bytes()
    p = pq.read_table(tmp_path / "999.parquet").column("probability").to_numpy()
    assert math.fsum(p) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("unit", [1e308, 1e-300, 5e-324])
@pytest.mark.parametrize("batch", [1, 4])
def test_weights_whose_sum_leaves_the_range_of_a_float(tmp_path, unit, batch):
    scores = scores_of([1.0, 0.0, 1.0, 0.0], valid=[True, True, True, False], batch=batch)

    def heavy(block):
        invalid = ~block.column("valid").to_numpy(zero_copy_only=False)
        return unit * (block.column("score").to_numpy() + invalid)

    summary = write_probabilities(scores, heavy, tmp_path / "p", {})
    assert pq.read_table(tmp_path / "p").column("probability").to_pylist() == [0.5, 0.0, 0.5, 0.0]
    assert (summary.n_positive, summary.effective_sample_size) == (2, 2.0)


def test_weights_of_invalid_rows_do_not_count(tmp_path):
    scores = scores_of([1.0, 1.0, 1.0], valid=[True, False, True])
    summary = write_probabilities(scores, lambda block: np.array([1.0, np.inf, 3.0]), tmp_path / "p", {})
    assert pq.read_table(tmp_path / "p").column("probability").to_pylist() == [0.25, 0.0, 0.75]
    assert summary.n_valid == 2


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0, -1.0, 1.0], DataflexError, "gave row 1 the weight -1.0"),
        ([1.0, 1.0, np.nan], DataflexError, "gave row 2 the weight nan"),
        ([1.0, np.inf, 1.0], DataflexError, "gave row 1 the weight inf"),
        ([1.0, 1.0], DataflexError, r"shape \[2\] for a block of 3 rows"),
        ([0.0, 0.0, 0.0], DataError, "weights of 3 valid rows sum to 0"),
    ],
)
def test_weights_that_cannot_be_used_write_nothing(tmp_path, weights, error, message):
    final = tmp_path / "p.parquet"
    with pytest.raises(error, match=message):
        write_probabilities(scores_of([1.0] * 3), lambda block: np.array(weights), final, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["f8", "f4"])
def test_imported_probabilities(tmp_path, kind):
    p = np.random.default_rng(1).random(70_000)
    np.save(tmp_path / "p.npy", (p / p.sum()).astype(kind))
    summary = import_probabilities(tmp_path / "p.npy", scores_of([1.0] * 70_000), tmp_path / "p.parquet", {})
    found = pq.read_table(tmp_path / "p.parquet").column("probability").to_numpy()
    assert found == pytest.approx(p / p.sum(), rel=2e-7 if kind == "f4" else 1e-12)
    assert math.fsum(found) == pytest.approx(1, abs=1e-14)
    assert summary.notices == ()


def test_imported_probabilities_of_invalid_rows_are_given_to_the_others_and_it_is_said(tmp_path):
    np.save(tmp_path / "p.npy", np.array([0.5, 0.2, 0.1, 0.2]))
    scores = scores_of([1.0, None, 1.0, None])
    summary = import_probabilities(tmp_path / "p.npy", scores, tmp_path / "p.parquet", {})
    found = pq.read_table(tmp_path / "p.parquet").column("probability").to_pylist()
    assert found == pytest.approx([5 / 6, 0, 1 / 6, 0])
    assert summary.notices == (
        "2 rows that cannot be used had 0.4 of the probability in p.npy: set to 0, and the rest scaled up "
        "to sum to 1.",
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([0.5, 0.5]), "has 2 numbers and the pool has 3 rows"),
        (np.array([0.5, 0.6, 0.1]), "sum to 1.2"),
        (np.array([0.5, -0.5, 1.0]), "number of row 1 is -0.5"),
        (np.array([0.5, 0.5, np.nan]), "number of row 2 is nan"),
        (np.ones((3, 1)) / 3, r"float64\[3, 1\]"),
        (np.array(["a", "b", "c"]), r"holds <U1\[3\]"),
        (np.array([0.5, None, 0.5], dtype=object), "cannot be read"),
    ],
)
def test_arrays_that_are_no_probabilities(tmp_path, array, message):
    np.save(tmp_path / "p.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        import_probabilities(tmp_path / "p.npy", scores_of([1.0] * 3), tmp_path / "out" / "p.parquet", {})
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_arrays(tmp_path):
    scores = scores_of([1.0] * 3)
    whole = tmp_path / "whole.npy"
    np.save(whole, np.ones(3) / 3)
    (tmp_path / "cut.npy").write_bytes(whole.read_bytes()[:-8])
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "many.npz", a=np.ones(3) / 3)
    for name in ("missing.npy", "cut.npy", "empty.npy", "many.npz"):
        with pytest.raises(DataError, match=r"probs_path=.*(cannot be read|holds an archive)"):
            import_probabilities(tmp_path / name, scores, tmp_path / "out.parquet", {})
