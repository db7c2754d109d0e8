"""aggregate: max, mean and vote over target groups, against sorting."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sampling_tables import scores_of

from dataflex_pipeline import Run
from dataflex_pipeline.gradients.similarity import PREFIX, votes


def counted(similarity, share):
    """Votes by sorting: the k best rows of each group, ties by row. similarity: [rows, G]"""
    k = math.ceil(share * len(similarity) - 1e-9)
    found = np.zeros(len(similarity), int)
    for column in similarity.T:
        found[np.lexsort((np.arange(len(column)), -column))[:k]] += 1
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_votes_against_sorting(seed, share):
    rng = np.random.default_rng(seed)
    similarity = rng.integers(-3, 4, (50, 3)) / 4  # with ties
    columns = {f"{PREFIX}{name}": similarity[:, i] for i, name in enumerate("abc")}
    table = scores_of(similarity.mean(axis=1), **columns)
    replaced = votes(table, share)
    found = [replaced(block) for block in table.blocks(max_rows=7)]
    given = np.concatenate([each["votes"] for each in found])
    assert given.tolist() == counted(similarity, share).tolist()
    order = np.argsort(-np.concatenate([each["score"] for each in found]), kind="stable")
    assert order.tolist() == np.lexsort((np.arange(50), -similarity.mean(axis=1), -given)).tolist()


def test_rows_without_a_score_have_no_vote():
    table = scores_of([0.5, None, 0.25], **{f"{PREFIX}a": [0.5, None, 0.25]})
    (block,) = (pa.RecordBatch.from_pylist(b.to_pylist(), schema=b.schema) for b in table.blocks())
    assert votes(table, 0.5)(block)["votes"].tolist() == [1, 0, 0]


def test_less_in_a_run(tiny_demo, tmp_path):
    target = [json.loads(line) for line in tiny_demo.target.read_text().splitlines()]
    for number, row in enumerate(target):
        row["kind"] = "abc"[number % 3]
    (tmp_path / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in target))
    files = {
        "dataset": str(tiny_demo.pool),
        "eval_dataset": str(tmp_path / "target.jsonl"),
        "model_name_or_path": str(tiny_demo.model),
    }
    files |= {"warmup_step": 0, "update_times": 0, "eval_group_column": "kind"}
    tables = {}
    for aggregate in ("max", "mean", "vote"):
        given = {"gradient_type": "sgd", "aggregate": aggregate, "vote_share": 0.1}
        each = Run(tmp_path / aggregate, **files, less=given, features_dir=str(tmp_path / "features"))
        each.score(1, "less")
        assert not list((each.folder / "round-01/scores").glob("*.first"))
        tables[aggregate] = pq.read_table(each.folder / "round-01/scores/less.parquet").to_pandas()
    whole = tables["max"]
    similarity = whole[[f"{PREFIX}{name}" for name in "abc"]].to_numpy()
    assert np.array_equal(whole["score"], similarity.max(axis=1))
    assert np.allclose(tables["mean"]["score"], similarity.mean(axis=1), rtol=1e-12)
    assert tables["vote"]["votes"].tolist() == counted(similarity, 0.1).tolist()
    assert np.array_equal(np.floor(tables["vote"]["score"]), tables["vote"]["votes"])
    for each in tables.values():
        assert np.array_equal(each[[f"{PREFIX}{name}" for name in "abc"]].to_numpy(), similarity)
