"""Selections whose rows are not too like each other: against plain loops, and planted duplicates in a run."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import done, refused
from sampling_tables import MemoryTable, pool_of, probabilities_of, scores_of

from dataflex_pipeline import Run
from dataflex_pipeline.neighbours import apart as near_rows
from dataflex_pipeline.neighbours.apart import Apart
from dataflex_pipeline.sampling import DrawSettings, apart, draw
from dataflex_pipeline.sampling.quotas import allot, interleave
from dataflex_pipeline.store.tables import TableFile

LIMIT = 0.9
WORLDS = range(12)


def embeddings_of(vectors, there=None):
    n, d = vectors.shape
    flat = pa.array(vectors.astype(np.float32).reshape(-1))
    valid = np.ones(n, dtype=bool) if there is None else there
    lists = pa.FixedSizeListArray.from_arrays(flat, d, mask=pa.array(~valid))
    return MemoryTable(pa.table({"row": np.arange(n), "embedding": lists, "valid": valid}), batch=7)


class World:
    """A pool of rows with tied scores, three sources, and vectors of which many are equal or near."""

    def __init__(self, seed: int, n: int = 60) -> None:
        rng = np.random.default_rng(seed)
        self.n, kinds = n, rng.normal(size=(12, 3))
        vectors = kinds[rng.integers(0, 12, n)] + rng.choice([0, 0.05, 0.6], n)[:, None] * rng.normal(
            size=(n, 3)
        )
        self.vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        self.there = rng.random(n) > 0.05
        self.score = rng.integers(0, 9, n).astype(float)
        self.groups = {name: rng.integers(0, 5, n).astype(float) for name in "abc"}
        self.source = rng.choice(["s0", "s1", "s2"], n, p=[0.6, 0.3, 0.1]).tolist()
        self.tokens = rng.integers(1, 30, n)
        p = rng.random(n) * (rng.random(n) > 0.1)
        self.p = p / p.sum()

    def near(self, row, taken):
        gaps = self.vectors[taken].astype(np.float64) - self.vectors[row]
        return not self.there[row] or bool((1 - (gaps**2).sum(1) / 2 > LIMIT).any())

    def draw(self, monkeypatch=None, **asked):
        settings = DrawSettings(positions=0, max_similarity=LIMIT, seed=3, **asked)
        keeper = Apart(embeddings_of(self.vectors, self.there), LIMIT)
        found = draw(
            scores_of(self.score, **self.groups),
            probabilities_of(self.p),
            pool_of(self.n, self.tokens, self.source),
            settings,
            apart=keeper,
            rankings=asked.get("rankings"),
        )
        return found, keeper


@pytest.fixture(params=["as it is", "in small pieces"])
def sizes(request, monkeypatch):
    """Once with everything in one piece, once with rankings held in twos and rows compared in threes."""
    if request.param == "in small pieces":
        monkeypatch.setattr(apart, "FIRST_DEPTH", 2)
        monkeypatch.setattr(near_rows, "BATCH", 3)
        monkeypatch.setattr(near_rows, "TILE", 2)


def greedy(world, order, amount):
    taken = []
    for row in order:
        if len(taken) < amount and not world.near(row, taken):
            taken.append(int(row))
    return taken


def by_score(world, values):
    return sorted(range(world.n), key=lambda row: (-values[row], row))


@pytest.mark.parametrize("seed", WORLDS)
def test_the_best_rows_that_are_apart(seed, sizes):
    world = World(seed)
    found, keeper = world.draw(strategy="top_k", num_samples=9)
    assert found.selected.tolist() == greedy(world, by_score(world, world.score), 9)
    passed = keeper.passed_over()
    for row, like, similarity in zip(passed.rows, passed.like, passed.similarity, strict=True):
        if like < 0:
            assert not world.there[row]
            continue
        before = found.selected[: found.selected.tolist().index(like) + 1]
        gaps = world.vectors[found.selected].astype(np.float64) - world.vectors[row]
        cosines = 1 - (gaps**2).sum(1) / 2
        assert similarity == cosines[len(before) - 1] > LIMIT
    looked_at = set(
        by_score(world, world.score)[: by_score(world, world.score).index(found.selected[-1]) + 1]
    )
    assert set(passed.rows) == looked_at - set(found.selected)


@pytest.mark.parametrize("seed", WORLDS)
def test_the_draws_in_their_order(seed, sizes):
    world = World(seed)
    everything = DrawSettings("sample", 0, num_samples=int((world.p > 0).sum()), seed=3)
    order = draw(scores_of(world.score), probabilities_of(world.p), pool_of(world.n), everything).selected
    found, _ = world.draw(strategy="sample", num_samples=9)
    assert found.selected.tolist() == greedy(world, order, 9)
    assert found.selection["probability"].to_pylist() == world.p[found.selected].tolist()


@pytest.mark.parametrize("seed", WORLDS)
def test_groups_in_turns(seed, sizes):
    world = World(seed)
    orders = [by_score(world, world.groups[name]) for name in "abc"]
    taken, gone, turn, idle = [], set(), 0, 0
    while len(taken) < 9 and idle < 3:
        row = next((r for r in orders[turn % 3] if r not in gone and not world.near(r, taken)), None)
        turn, idle = turn + 1, idle + 1 if row is None else 0
        if row is not None:
            taken.append(row)
            gone.add(row)
    found, _ = world.draw(strategy="round_robin", group_columns=("a", "b", "c"), num_samples=9)
    assert found.selected.tolist() == taken


class Turns:
    """Every target row's values, as a method gives them."""

    def __init__(self, values):
        self.values, self.n_turns = values, values.shape[1]

    def blocks(self, max_rows):
        for start in range(0, len(self.values), max_rows):
            yield self.values[start : start + max_rows]


@pytest.mark.parametrize("seed", WORLDS)
def test_target_rows_in_turns(seed, sizes):
    world = World(seed)
    values = np.stack(list(world.groups.values()), axis=1)
    settings = DrawSettings(
        "round_robin", 0, num_samples=9, over_target_rows=True, max_similarity=LIMIT, seed=3
    )
    keeper = Apart(embeddings_of(world.vectors, world.there), LIMIT)
    found = draw(
        scores_of(world.score), None, pool_of(world.n), settings, rankings=Turns(values), apart=keeper
    )
    by_group, _ = world.draw(strategy="round_robin", group_columns=("a", "b", "c"), num_samples=9)
    assert found.selected.tolist() == by_group.selected.tolist()


@pytest.mark.parametrize("seed", WORLDS)
def test_quotas_take_turns_by_their_shares(seed, sizes):
    world = World(seed)
    shares = {"s1": 0.5, "s2": 0.2}
    amounts = allot(10, shares)
    slots = np.repeat(np.arange(3), amounts)[interleave(amounts)]
    order, taken, counts = by_score(world, world.score), [], [0, 0, 0]
    for slot in slots:
        own = [r for r in order if ["s1", "s2", "s0"][slot] == world.source[r] and r not in taken]
        row = next((r for r in own if not world.near(r, taken)), None)
        if row is not None:
            taken.append(row)
            counts[slot] += 1
    found, _ = world.draw(strategy="top_k", num_samples=10, source_quotas=shares)
    assert sorted(found.selected) == sorted(taken)
    if counts == amounts:
        assert found.selected.tolist() == taken
        assert not found.notices


@pytest.mark.parametrize("seed", WORLDS)
def test_a_budget_is_not_spent_on_what_is_passed_over(seed, sizes):
    world = World(seed)
    taken, spent = [], 0
    for row in by_score(world, world.score):
        if world.near(row, taken):
            continue
        spent += world.tokens[row]
        if spent > 90:
            break
        taken.append(row)
    found, _ = world.draw(strategy="top_k", token_budget=90)
    assert found.selected.tolist() == taken


def test_too_few_that_are_apart_is_a_shorter_selection_that_says_so(sizes):
    world = World(1)
    found, _ = world.draw(strategy="top_k", num_samples=world.n)
    assert found.selected.tolist() == greedy(world, by_score(world, world.score), world.n)
    assert len(found.selected) < world.n
    assert found.notices == (
        f"{world.n} rows were asked for and {len(found.selected)} are different enough (max_similarity 0.9): "
        "all of those are taken.",
    )


# In a run

N = 200


@pytest.fixture
def planted(tiny_demo, tmp_path, monkeypatch):
    """A pool whose rows 0 to 19 come again as 100 to 119, nearly; the settings of a run over it."""
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(4).normal(size=(N, 32))
    vectors[100:120] = vectors[:20] + 0.01 * np.random.default_rng(5).normal(size=(20, 32))
    np.save(tmp_path / "vectors.npy", vectors.astype(np.float32))
    return {
        "dataset": str(tiny_demo.pool),
        "model_name_or_path": str(tiny_demo.model),
        "similarity": {"embeddings": str(tmp_path / "vectors.npy")},
        "max_similarity": 0.95,
        "warmup_step": 0,
        "update_times": 0,
    }


def passed_over(folder):
    return pq.read_table(folder / "passed_over.parquet").to_pandas()


def test_deduplication_of_a_pool_finds_the_planted_pairs(planted, tmp_path):
    run = Run(tmp_path / "runs/r", **planted)
    run.score(1, "random")
    picked = run.select(1, "random", fraction=1.0).to_pandas()
    assert len(picked) == N - 20
    found = passed_over(run.folder / "round-01")
    pairs = [tuple(sorted(pair)) for pair in zip(found["row"], found["like_row"], strict=True)]
    assert sorted(pairs) == [(row, row + 100) for row in range(20)]
    assert (found["similarity"] > 0.99).all()
    assert set(found["like_row_id"]) <= set(picked["row_id"])
    notices = TableFile(run.folder / "round-01/selection.parquet").metadata["notices"]
    assert "20 rows were passed over" in notices
    assert {output.state().name for output in run.outputs()} == {"done"}
    again = (run.folder / "round-01/selection.parquet").read_bytes()
    run.select(1, "random", fraction=1.0, max_similarity=None)
    assert not (run.folder / "round-01/passed_over.parquet").exists()
    run.select(1, "random", fraction=1.0, max_similarity=0.95)
    assert (run.folder / "round-01/selection.parquet").read_bytes() == again


def test_a_method_with_embeddings_lends_them_and_an_index_follows(planted, tmp_path, tiny_demo):
    near = {
        "embeddings": planted["similarity"]["embeddings"],
        "query_embeddings": str(tmp_path / "target.npy"),
    }
    size = len(tiny_demo.target.read_text().splitlines())
    np.save(near["query_embeddings"], np.random.default_rng(6).normal(size=(size, 32)).astype(np.float32))
    settings = {**planted, "near": near, "similarity": {}, "eval_dataset": str(tiny_demo.target)}
    settings |= {"update_times": 1, "update_step": 2, "per_device_train_batch_size": 4}
    run = Run(tmp_path / "runs/r", **settings)
    run.score(1, "near")
    picked = run.select(1, "near", num_samples=150).to_pandas()
    assert len(list((run.folder / "features").glob("embeddings-pool-*"))) == 1
    assert not (picked["row"] + 100).isin(picked["row"]).to_numpy()[picked["row"] < 20].any()
    index = pq.read_table(run.folder / "round-01/index.parquet").to_pandas()
    assert set(index["row"]) <= set(picked["row"])


def test_rows_are_kept_apart_by_the_states_of_the_runs_own_model(planted, tmp_path, tiny_demo):
    own = {**planted, "max_similarity": 0.999, "eval_dataset": str(tiny_demo.target), "strategy": "top_k"}
    first = Run(tmp_path / "runs/rds", **own | {"similarity": {}})
    first.score(1, "rds")
    lent = first.select(1, "rds", num_samples=20).to_pandas()
    assert len(list((first.folder / "features").glob("*embeddings-pool-*"))) == 1
    [table] = (first.folder / "features").glob("model_embeddings-pool-*")
    vectors = np.array(pq.read_table(table)["embedding"].to_pylist())[lent["row"]]
    assert (vectors @ vectors.T - np.eye(20)).max() <= 0.999
    other = Run(tmp_path / "runs/bm25", **own | {"similarity": {"embed_method": "model"}})
    other.score(1, "bm25")
    other.select(1, "bm25", num_samples=20)
    assert [each.name for each in (other.folder / "features").glob("*embeddings*")] == [table.name]


def test_mistakes_are_refused_before_anything_is_written(planted, tmp_path):
    told = [f"{key}={planted[key]}" for key in ("dataset", "model_name_or_path")]
    told += ["fraction=0.1", f"similarity.embeddings={planted['similarity']['embeddings']}"]
    for given, said in (
        (["max_similarity=0.9", "replacement=true", "strategy=sample"], "like itself"),
        (["max_similarity=0.9", "weights=importance"], "passed over for another"),
        (["max_similarity=1.5"], "at most 1"),
        (["max_similarity=0.9", "similarity.embed_modle=x"], "Did you mean 'embed_model'"),
        (["max_similarity=0.9", "similarity.embeddings=nowhere.npy"], "nowhere.npy"),
    ):
        assert said in refused(tmp_path, "pick", "random", *told, *given, "--run", "p")


def test_an_estimate_counts_the_embeddings(planted, tmp_path):
    told = [f"{key}={planted[key]}" for key in ("dataset", "model_name_or_path", "max_similarity")]
    told += ["warmup_step=0", "update_times=0", "fraction=0.1", "component_name=random"]
    told.append(f"similarity.embeddings={planted['similarity']['embeddings']}")
    stages = json.loads(done("estimate", *told, "--json"))["stages"]
    assert [each["note"] for each in stages if each["stage"] == "embeddings, pool"] == ["read from a file"]
