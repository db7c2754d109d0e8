"""A cascade: a method on the best rows of a cheaper one equals that method restricted to those rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from cli_runs import dataflex, done, refused, snapshot

from dataflex_pipeline import Run
from dataflex_pipeline.errors import DataError, StaleError
from dataflex_pipeline.features.candidates import NOT_A_CANDIDATE

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "crash"))

N, K = 200, 30
SCORED_ONLY = {"warmup_step": 0, "update_times": 0, "rows_per_part": 64}


@pytest.fixture(scope="module")
def world(tiny_demo, tmp_path_factory):
    """The tiny demo with a column ``cheap`` and vectors of its rows; the settings of a run over it."""
    folder = tmp_path_factory.mktemp("cascade")
    rng = np.random.default_rng(5)
    rows = [json.loads(line) for line in tiny_demo.pool.read_text().splitlines()]
    for row in rows:
        row["cheap"] = int(rng.integers(0, 40))  # with ties
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"pool": N, "target": len(tiny_demo.target.read_text().splitlines())}
    for name, size in sizes.items():
        np.save(folder / f"{name}.npy", rng.normal(size=(size, 6)).astype(np.float32))
    vectors = {"embeddings": f"{folder}/pool.npy", "query_embeddings": f"{folder}/target.npy"}
    return {
        "dataset": f"{folder}/pool.jsonl",
        "eval_dataset": str(tiny_demo.target),
        "model_name_or_path": str(tiny_demo.model),
        "column": {"column": "cheap"},
        "near": vectors,
        "tsds": {**vectors, "max_K": 12, "kde_K": 10},
        "perplexity": {"focus": "middle"},
        "less": {"gradient_type": "sgd", "proj_dim": 32},
        **SCORED_ONLY,
    }


def scored(folder, method):
    return pq.read_table(folder / "round-01/scores" / f"{method}.parquet").to_pandas()


def best(table, count):
    """The rows of the highest score, ties by row, by sorting."""
    order = np.lexsort((table["row"], -table["score"].to_numpy()))
    return np.sort(table["row"].to_numpy()[order][:count])


def amount(count=K):
    return {"method": "column", "num_samples": count}


@pytest.mark.parametrize("method", ["near", "loss", "less"])
def test_a_score_of_its_own_is_that_of_the_method_on_all_rows(world, tmp_path, method):
    settings = {**world, "score_batch_tokens": 1}  # a row is a batch: the same bits, whatever is beside it
    Run(tmp_path / "all", **settings).score(1, method)
    Run(tmp_path / "few", **settings, candidates=amount()).score(1, method)
    whole, few = scored(tmp_path / "all", method), scored(tmp_path / "few", method)
    chosen = best(scored(tmp_path / "few", "column"), K)
    assert list(whole.columns) == list(few.columns)
    assert len(few) == N
    for name in set(whole.columns) - {"valid", "reason"}:
        one, other = whole[name].to_numpy()[chosen], few[name].to_numpy()[chosen]
        assert np.array_equal(one, other), name
    others = few.drop(index=chosen)
    assert others["score"].isna().all()
    assert few["valid"].all()
    assert set(others["reason"]) == {NOT_A_CANDIDATE}
    assert few.loc[chosen, "reason"].isna().all()


def test_what_a_method_takes_of_the_pool_it_takes_of_the_candidates(world, tmp_path):
    """tsds spreads its mass over them, and perplexity's middle is theirs: the pool without the others."""
    Run(tmp_path / "few", **world, candidates=amount(40)).score(1, "tsds")
    Run(tmp_path / "few", **world, candidates=amount(40)).score(1, "perplexity")
    chosen = best(scored(tmp_path / "few", "column"), 40)
    lines = Path(world["dataset"]).read_text().splitlines()
    (tmp_path / "small.jsonl").write_text("".join(lines[row] + "\n" for row in chosen))
    np.save(tmp_path / "small.npy", np.load(world["near"]["embeddings"])[chosen])
    small = {**world, "dataset": str(tmp_path / "small.jsonl")}
    small["tsds"] = {**world["tsds"], "embeddings": str(tmp_path / "small.npy")}
    for method in ("tsds", "perplexity"):
        Run(tmp_path / "small", **small).score(1, method)
        one, other = scored(tmp_path / "small", method), scored(tmp_path / "few", method)
        np.testing.assert_allclose(
            other["score"].to_numpy()[chosen], one["score"].to_numpy(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("strategy", ["top_k", "sample", "round_robin"])
def test_only_candidates_are_selected(world, tmp_path, strategy):
    run = Run(tmp_path / "r", **world, candidates=amount())
    run.score(1, "near")
    chosen = set(best(scored(run.folder, "column"), K))
    picked = run.select(1, "near", strategy=strategy, fraction=0.1).to_pandas()  # a share of all valid rows
    assert len(picked) == N // 10
    assert set(picked["row"]) <= chosen
    drawn = pq.read_table(run.folder / "round-01/probabilities/near.parquet").to_pandas()
    assert set(drawn.loc[drawn["probability"] > 0, "row"]) <= chosen
    assert np.isclose(drawn["probability"].sum(), 1)
    if strategy == "top_k":
        scores = scored(run.folder, "near").dropna(subset="score")
        assert sorted(picked["row"]) == best(scores, N // 10).tolist()


def test_a_planted_world_where_the_cheap_method_is_right_and_one_where_it_is_wrong(world, tmp_path):
    """The rows nearest to the target are found among good candidates, and lost with bad ones."""
    lines = [json.loads(line) for line in Path(world["dataset"]).read_text().splitlines()]
    target = np.load(world["near"]["query_embeddings"])
    planted, rng = np.arange(7, N, 20), np.random.default_rng(1)
    vectors = rng.normal(size=(N, 6)).astype(np.float32)
    vectors[planted] = target[: len(planted)] * 3  # the same direction: cosine 1
    np.save(tmp_path / "pool.npy", vectors)
    for name, sign in (("right", 1), ("wrong", -1)):
        for row, line in enumerate(lines):
            line["cheap"] = sign * int(row in planted)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        near = {**world["near"], "embeddings": str(tmp_path / "pool.npy")}
        settings = {**world, "dataset": str(tmp_path / f"{name}.jsonl"), "near": near}
        run = Run(tmp_path / name, **settings, candidates={"method": "column", "fraction": 0.2})
        picked = run.pick("near", num_samples=len(planted)).to_pandas()
        assert set(picked["row"]) & set(planted) == (set(planted) if name == "right" else set())


def test_rows_that_the_cheap_method_cannot_score_say_so(world, tmp_path):
    lines = [json.loads(line) for line in Path(world["dataset"]).read_text().splitlines()]
    lines[3]["cheap"] = None
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run(tmp_path / "r", **{**world, "dataset": str(tmp_path / "pool.jsonl")}, candidates=amount())
    run.score(1, "near")
    line = scored(run.folder, "near").loc[3]
    assert not line["valid"]
    assert line["reason"].startswith("column: ")


def test_a_table_that_both_need_is_computed_once(world, tmp_path):
    """tsds after near reads the embeddings that near has; a feature of its own has candidates only."""
    run = Run(tmp_path / "r", **world, candidates={"method": "near", "fraction": 0.25})
    run.score(1, "tsds")
    assert len(list((run.folder / "features").glob("embeddings-pool-*"))) == 1
    run.score(1, "loss")
    (losses,) = (run.folder / "features").glob("losses-pool-*")
    table = pq.read_table(sorted(losses.glob("part-*"))).to_pandas()
    assert table["loss"].notna().sum() == N // 4
    assert scored(run.folder, "tsds")["score"].notna().sum() == N // 4


def test_a_part_that_is_lost_is_all_that_is_computed_again(world, tmp_path):
    run = Run(tmp_path / "r", **world, candidates=amount())
    run.score(1, "loss")
    (folder,) = (run.folder / "features").glob("losses-pool-*")
    table = run.folder / "round-01/scores/loss.parquet"
    before, kept = table.read_bytes(), snapshot(folder)
    for path in (folder / "_manifest.json", folder / "part-00001.parquet", table):
        path.unlink()
    Run.open(run.folder).score(1, "loss")
    assert table.read_bytes() == before
    now = snapshot(folder)
    assert {name for name in kept if kept[name][1] == now[name][1]} >= {"part-00000.parquet"}


def test_other_candidates_make_the_scores_stale(world, tmp_path):
    run = Run(tmp_path / "r", **world, candidates=amount())
    run.score(1, "near")
    with pytest.raises(StaleError, match=r"candidates\.num_samples: 30 -> 31"):
        run.score(1, "near", candidates=amount(31))
    states = {output.label: output.state().name for output in run.outputs()}
    assert states["round 1 scores/near"] == states["round 1 scores/column"] == "done"


def test_an_amount_takes_the_place_of_the_other(world, tmp_path):
    run = Run(tmp_path / "r", **world, candidates=amount())
    assert (
        Run(tmp_path / "r", **world, candidates={"method": "column", "fraction": 0.5})
        .given.candidates_of("near")
        .count(N)
        == 100
    )
    assert run.given.candidates_of("column") is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "column"}, "Exactly one"),
        ({"method": "column", "fraction": 0.1, "num_samples": 3}, "Exactly one"),
        ({"method": "column", "fraction": 1.5}, "share of the scored rows"),
        ({"method": "column", "num_samples": 0}, "whole number"),
        ({"method": "column", "share": 0.1}, "not 'share'"),
        ({"fraction": 0.1}, "does not name the method"),
        ({"method": "near", "fraction": 0.1}, "cannot choose its own"),
        ({"method": "random", "fraction": 0.1}, "same score"),
        ({"method": "colum", "fraction": 0.1}, "Did you mean 'column'"),
        ({"method": "column", "fraction": 0.01}, "fewer of them"),
        ({"method": "less", "fraction": 0.1}, "gradient_type is adam"),
        ({"method": "delta_loss", "fraction": 0.1}, "no round is trained"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(world, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    told = [f"{key}={world[key]}" for key in ("dataset", "eval_dataset", "model_name_or_path")]
    told += [f"near.{key}={value}" for key, value in world["near"].items()]
    text = refused(
        tmp_path,
        "pick",
        "near",
        *told,
        "column.column=cheap",
        "fraction=0.05",
        f"candidates={json.dumps(given)}",
    )
    assert said in text


def test_scores_that_do_not_differ_choose_nothing(world, tmp_path):
    lines = [json.loads(line) | {"cheap": 1} for line in Path(world["dataset"]).read_text().splitlines()]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run(tmp_path / "r", **{**world, "dataset": str(tmp_path / "pool.jsonl")}, candidates=amount())
    with pytest.raises(DataError, match="same score"):
        run.score(1, "near")


def test_what_looks_at_runs_looks_at_a_cascade(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path / "runs/r", **world, candidates=amount())
    run.pick("near", fraction=0.1)
    lost = scored(run.folder, "near")["score"].isna().idxmax()
    done("inspect", "r")
    assert "30 scored: the candidates" in done("inspect", "runs/r/round-01/scores/near.parquet")
    assert NOT_A_CANDIDATE in done("inspect", "r", "--row", lost)
    for command in (("report", "r"), ("compare", "r"), ("doctor", "r")):
        done(*command)
    assert "30 of 200 rows scored, the 30 candidates of column" in dataflex("status", "r").out


def test_an_estimate_counts_the_candidates(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = [f"{key}={world[key]}" for key in ("dataset", "eval_dataset", "model_name_or_path")]
    told += ["warmup_step=0", "update_times=0", "fraction=0.1", "column.column=cheap", "rows_per_part=64"]
    told += ["component_name=loss", 'candidates={"method": "column", "num_samples": 30}', "--run", "r"]
    stages = json.loads(done("estimate", *told, "--json"))["stages"]
    (losses,) = (each for each in stages if each["stage"] == "losses, pool")
    assert (losses["rows"], losses["note"]) == (30, "30 candidates")
    assert [each["rows"] for each in stages if each["stage"] == "score"] == [N, N]
    done("score", *told)
    stages = json.loads(done("estimate", "r", "--json"))["stages"]
    assert [each["note"] for each in stages if each["stage"] == "losses, pool"] == ["there already"]


@pytest.mark.slow
def test_two_processes_make_the_same_table(world, tmp_path):
    from launches import run

    Run(tmp_path / "one", **world, candidates=amount()).score(1, "loss")
    settings = yaml.safe_load((tmp_path / "one/run.yaml").read_text())
    settings.pop("run")
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(settings))
    run(
        tmp_path,
        2,
        ("score", "--config", "given.yaml", "--method", "loss", "--run", "two", f"runs_dir={tmp_path}"),
    )
    paths = [tmp_path / name / "round-01/scores/loss.parquet" for name in ("one", "two")]
    assert pq.read_table(paths[0]).equals(pq.read_table(paths[1]))
