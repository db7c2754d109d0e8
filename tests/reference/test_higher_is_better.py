"""A higher score is a better row, for every shipped method by its own words.

Each case is a pool of a few rows that are made so that anybody can say which is better, with the order that
the method's page promises; equal places mean equal scores.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from neighbour_tables import tsds_tables, unit
from sampling_tables import MemoryTable, identities

from dataflex_pipeline import api
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.features.plan import make_feature
from dataflex_pipeline.methods import build_method, method_class, shipped_methods
from dataflex_pipeline.pipeline.scored_block import score_block
from dataflex_pipeline.schemas import LOSSES, SCORES

ROUND = 2
JUDGE = {"reward_model_backend": "metric", "dtype": "float32", "proj_dim": 16}


def base(n, first=0):
    return {
        "row": np.arange(n),
        "row_id": identities(first + n)[first:],
        "valid": [True] * n,
        "reason": pa.nulls(n, pa.string()),
    }


def losses(values):
    columns = {**base(len(values)), "loss": values, "n_tokens": [4] * len(values)}
    return MemoryTable(pa.table(columns).select(LOSSES.names).cast(LOSSES))


def vectors(method, key, rows):
    """Return a table of gradients as a method needs it, with the first two coordinates given."""
    schema = make_feature(method.needs(selection())[key], Config()).schema
    full = np.zeros((len(rows), schema.field("gradient").type.list_size), dtype=np.float32)
    full[:, : len(rows[0])] = unit(rows)
    flat = pa.array(full.reshape(-1))
    columns = {
        **base(len(rows), first=100 if key == "target" else 0),
        "gradient": pa.FixedSizeListArray.from_arrays(flat, full.shape[1]),
        "group": ["all"] * len(rows),
        "mean_reward": [0.5] * len(rows),
        "min_reward": [0.0] * len(rows),
        "max_reward": [1.0] * len(rows),
        "n_scored": [4] * len(rows),
        "n_kept": [4] * len(rows),
        "from_reference": [False] * len(rows),
        "signal": [True] * len(rows),
    }
    there = pa.table(columns)
    return MemoryTable(there.select([name for name in schema.names if name in columns]))


def selection():
    return api.Selection(ROUND, 4, 0, lambda line: None, learning_rate=0.1)


def scored(method, tables, pool=None, n=None):
    """Return the scores of a pool whose rows are all valid. [rows]"""
    pool = pa.table(base(n) if pool is None else {**base(len(next(iter(pool.values())))), **pool})
    state = method.begin(tables, selection())
    over = {key: tables[key] for key, need in method.needs(selection()).items() if need.split == "pool"}
    features = {key: next(iter(table.blocks())) for key, table in over.items()}
    block = api.Block(pool.combine_chunks().to_batches()[0], features)
    schema = pa.schema([*SCORES, *method.own_columns(state)])
    return score_block(method, block, state, schema)["score"].to_numpy()


def made(name, **params):
    return build_method(name, method_class(name), params, "a test")


def by_ifd(tmp_path):
    """ifd 0.5, 1.5, 0.25, 1, 9: above 1 comes last."""
    tables = {"given": losses([1.0, 3.0, 0.5, 2.0, 9.0]), "alone": losses([2.0, 2.0, 2.0, 2.0, 1.0])}
    return scored(made("ifd"), tables, n=5), [3, 1, 2, 4, 0]


def random_rows(tmp_path):
    return scored(made("random"), {}, n=4), [0, 0, 0, 0]


def by_loss(name, focus, places):
    """Return a case: losses 1, 3, 2, 9, of which the middle two are 3 and 2."""
    return lambda tmp_path: (
        scored(made(name, focus=focus), {"now": losses([1.0, 3.0, 2.0, 9.0])}, n=4),
        places,
    )


def by_total(tmp_path):
    method = made("perplexity", loss="total", focus="low")
    table = losses([1.0, 3.0, 2.0]).table.set_column(3, "n_tokens", pa.array([90, 1, 2], pa.int32()))
    return scored(method, {"now": MemoryTable(table)}, n=3), [0, 2, 1]  # sums 90, 3, 4


def by_delta(tmp_path):
    """The loss fell by 2, rose, did not change, fell by 1."""
    tables = {"initial": losses([3.0, 1.0, 2.0, 5.0]), "now": losses([1.0, 2.0, 2.0, 4.0])}
    return scored(made("delta_loss"), tables, n=4), [3, 0, 1, 2]


def by_gradient(name, **params):
    """Return a case: the target's direction, across it, against it, and halfway."""

    def case(tmp_path):
        method = made(name, **params)
        tables = {
            "pool": vectors(method, "pool", [(1, 0), (0, 1), (-1, 0), (1, 1)]),
            "target": vectors(method, "target", [(2, 0), (1, 0)]),
        }
        return scored(method, tables, n=4), [3, 1, 0, 2]

    return case


def embedded(tmp_path):
    """Return four pool rows: at the only target row, near it, farther, opposite to it."""
    pool, target = unit([(1, 0), (1, 0.2), (1, 1), (-1, 0)]), unit([(1, 0)])
    near, crowd = {"max_K": 4}, {"kde_K": 4, "sigma": 0.1, "gaussian": True}
    return tsds_tables(tmp_path, pool, target, near=near, crowd=crowd)


def by_cosine(name):
    def case(tmp_path):
        tables = {key: embedded(tmp_path)[key] for key in ("pool", "target")}
        return scored(made(name), tables, n=4), [3, 2, 1, 0]

    return case


def by_words(tmp_path):
    """Both words of the target, its rare word, its common word, none of them."""
    pool = [
        ["common", "rare"],
        ["other", "rare"],
        ["common", "other"],
        ["other", "third"],
        ["common", "third"],
    ]

    def table(lists):
        columns = {
            **base(len(lists)),
            "terms": lists,
            "counts": [[1, 1]] * len(lists),
            "n_terms": [2] * len(lists),
        }
        schema = make_feature(api.Need("words"), Config()).schema
        return MemoryTable(pa.table(columns).select(schema.names).cast(schema))

    return scored(made("bm25"), {"pool": table(pool), "target": table(pool[:1])}, n=5), [3, 2, 1, 0, 1]


def by_grade(tmp_path):
    method = made("judge", reward_model_backend="metric")
    columns = {**base(3), "grade": [3.0, 4.5, 1.0], "raw": [None] * 3, "attempts": [1] * 3}
    columns |= {"seconds": [None] * 3, "backend": ["metric f"] * 3}
    schema = make_feature(method.needs(selection())["grades"], Config()).schema
    grades = pa.table(columns).select(schema.names).cast(schema)
    return scored(method, {"grades": MemoryTable(grades)}, n=3), [1, 2, 0]


def by_transport(tmp_path):
    """The mass goes to the nearest rows first, and spreads to the farther of them as C allows."""
    method = made("tsds", max_K=4, kde_K=4, sigma=0.1, alpha=0.6, C=0.5)
    return scored(method, embedded(tmp_path), n=4), [1, 1, 0, 0]


def by_column(descending, places):
    pool = {"original_quality": pa.array([0.1, 5.0, -3.0])}
    return lambda tmp_path: (
        scored(made("column", column="quality", descending=descending), {}, pool),
        places,
    )


def by_file(tmp_path):
    (tmp_path / "scores.csv").write_text("row,score\n2,0.5\n0,2\n1,1e3\n")
    return scored(made("column", file=tmp_path / "scores.csv"), {}, n=3), [1, 2, 0]


CASES = {
    "random": random_rows,
    "loss low": by_loss("loss", "low", [3, 1, 2, 0]),
    "loss medium": by_loss("loss", "medium", [0, 1, 1, 0]),
    "loss high": by_loss("loss", "high", [0, 2, 1, 3]),
    "ifd": by_ifd,
    "perplexity low": by_loss("perplexity", "low", [3, 1, 2, 0]),
    "perplexity middle": by_loss("perplexity", "middle", [0, 1, 1, 0]),
    "perplexity high": by_loss("perplexity", "high", [0, 2, 1, 3]),
    "perplexity total": by_total,
    "delta_loss": by_delta,
    "less": by_gradient("less", proj_dim=16, dtype="float32"),
    "nice": by_gradient("nice", **JUDGE),
    "near": by_cosine("near"),
    "rds": by_cosine("rds"),
    "bm25": by_words,
    "judge": by_grade,
    "tsds": by_transport,
    "column": by_column(True, [1, 2, 0]),
    "column ascending": by_column(False, [1, 0, 2]),
    "column of a file": by_file,
}


@pytest.mark.parametrize("case", CASES)
def test_a_higher_score_is_a_better_row(case, tmp_path):
    scores, places = CASES[case](tmp_path)
    assert np.unique(scores, return_inverse=True)[1].tolist() == places


def test_no_method_is_forgotten():
    assert {case.partition(" ")[0] for case in CASES} == set(shipped_methods())
