"""near: the largest cosine with a target row, against brute force; target rows that take turns."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from neighbour_tables import embeddings, score_whole, selection, unit

from dataflex_pipeline import api
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.methods import embedding_similarity
from dataflex_pipeline.methods.embedding_similarity import nearest_place
from dataflex_pipeline.methods.near import Near
from dataflex_pipeline.neighbours import accelerated


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.fixture
def world(tmp_path, rng):
    pool, target = unit(rng.standard_normal((200, 12))), unit(rng.standard_normal((17, 12)))
    pool[80] = pool[20]
    target[5] = pool[20]
    valid = np.arange(200) % 11 > 0
    tables = {
        "pool": embeddings(tmp_path / "pool", pool, valid),
        "target": embeddings(tmp_path / "target", target, np.arange(17) != 3, first_id=1 << 20),
    }
    cosines = pool.astype(np.float64) @ target.astype(np.float64).T
    cosines[:, 3] = -np.inf
    return tables, cosines, valid


def test_the_score_is_the_largest_cosine(world, monkeypatch):
    tables, cosines, valid = world
    monkeypatch.setattr(embedding_similarity, "TILE", 37 * 5)  # five targets at a time
    method = Near(Near.Params())
    state = method.begin(tables, selection())
    found = score_whole(method, tables, tables["pool"], state)
    assert np.allclose(np.array(found["score"])[valid], cosines.max(1)[valid], atol=1e-6)
    assert np.array_equal(np.array(found["nearest_target"])[valid], cosines.argmax(1)[valid])
    expected = np.sqrt(np.maximum(0, 2 - 2 * cosines.max(1)))
    assert np.allclose(np.array(found["nearest_distance"])[valid], expected[valid], atol=2e-4)
    assert found["score"][20] == found["score"][80] == 1, "equal rows get equal scores"


def test_the_first_of_equal_targets_wins():
    vectors = np.eye(3, dtype=np.float32)
    targets = np.concatenate([vectors[[1]], vectors[[0, 1, 0]]])
    assert nearest_place(vectors[:2], targets).tolist() == [1, 0]


def test_an_accelerator_gives_the_same_scores_and_rankings(world, monkeypatch):
    """Its code on the CPU, three rows at a time: every product by torch, none by numpy."""
    tables, cosines, valid = world
    monkeypatch.setattr(accelerated, "ELEMENTS", 3 * 16)
    monkeypatch.setattr(embedding_similarity, "search_device", lambda setting: {"xpu": "cpu:0"}[setting])
    monkeypatch.setattr(embedding_similarity, "nearest_place", None)
    there = replace(selection(), device="xpu")
    method = Near(Near.Params())
    found = score_whole(method, tables, tables["pool"], method.begin(tables, there))
    assert np.allclose(np.array(found["score"])[valid], cosines.max(1)[valid], atol=1e-6)
    assert np.array_equal(np.array(found["nearest_target"])[valid], cosines.argmax(1)[valid])
    assert found["score"][20] == found["score"][80] == 1

    rows = tables["pool"].rows(0, 200, ["row", "row_id", "embedding", "valid", "reason"]).combine_chunks()
    block = api.Block(rows.select(["row", "row_id", "valid", "reason"]), {"pool": rows.to_batches()[0]})
    ranking = method.by_target_row(tables, there)
    assert np.allclose(ranking.values(block)[valid], cosines[valid][:, ranking.rows], atol=1e-6)


def test_the_first_of_equal_targets_wins_on_an_accelerator():
    vectors = np.eye(3, dtype=np.float32)
    targets = np.concatenate([vectors[[1]], vectors[[0, 1, 0]]])
    assert accelerated.DeviceCosines(targets, "cpu").nearest(vectors[:2]).tolist() == [1, 0]


def test_weights_are_a_softmax_of_the_score(world, tmp_path):
    method = Near(Near.Params(temperature=0.5))
    scores = pa.table({"row": [0, 1, 2], "score": [0.2, 0.8, None], "valid": [True, True, False]})

    class Table:
        n_rows, schema = 3, scores.schema

        def blocks(self, columns=None, max_rows=65536):
            yield scores.select(columns).to_batches()[0]

    fitted = method.fit(Table(), selection())
    weights = method.weigh(scores.to_batches()[0], fitted)
    assert weights[:2] == pytest.approx([np.exp(-0.6 / (0.8 * 0.5)), 1])


def test_target_rows_rank_the_pool_by_cosine(world):
    tables, cosines, valid = world
    ranking = Near(Near.Params()).by_target_row(tables, selection())
    assert Near(Near.Params()).ranks_by_target_row
    assert ranking.rows.tolist() == [row for row in range(17) if row != 3]
    rows = tables["pool"].rows(30, 90, ["row", "row_id", "embedding", "valid", "reason"]).combine_chunks()
    batch = rows.to_batches()[0]
    values = ranking.values(api.Block(batch.select(["row", "row_id", "valid", "reason"]), {"pool": batch}))
    inside = valid[30:90]
    assert np.allclose(values[inside], cosines[30:90][inside][:, ranking.rows], atol=1e-6)


def test_needs_and_leaks(world, tmp_path, rng):
    tables, _, _ = world
    needs = Near(Near.Params(embed_model="m", query_prompt="q: ")).needs(selection())
    assert {key: (need.feature, need.split, need.checkpoint) for key, need in needs.items()} == {
        "pool": ("embeddings", "pool", None),
        "target": ("embeddings", "target", None),
    }
    assert needs["target"].params.prompt == "q: "
    said = []
    leaky = {
        "pool": tables["pool"],
        "target": embeddings(tmp_path / "leaky", unit(rng.standard_normal((2, 12)))),
    }
    Near(Near.Params()).begin(leaky, selection(said))
    assert said == [
        "2 rows of the pool are in the target too: target row 0 = pool row 0, target row 1 = pool row 1"
    ]


def test_vectors_of_different_length_are_refused(world, tmp_path, rng):
    tables = world[0] | {"target": embeddings(tmp_path / "short", unit(rng.standard_normal((2, 5))))}
    with pytest.raises(DataError) as raised:
        Near(Near.Params()).begin(tables, selection())
    assert "12 dimensions, the target's 5" in raised.value.what
