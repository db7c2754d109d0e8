"""`dataflex compare` of one run: its methods side by side, against loops over numpy arrays."""

from __future__ import annotations

import json

import numpy as np
import pandas
import pytest
from cli_runs import copied, dataflex, done


@pytest.fixture(scope="module")
def run(tiny_demo, tmp_path_factory):
    """The finished run, its round 1 scored by near and random too; near has no score for some rows."""
    folder = tmp_path_factory.mktemp("methods")
    run = copied(tiny_demo, folder)
    vectors = np.random.default_rng(0).normal(size=(216, 4)).astype(np.float32)
    vectors[5:30:7] = 0.0  # no direction: these rows cannot be compared
    vectors[::2] = np.round(vectors[::2])  # many scores are equal
    np.save(folder / "pool.npy", vectors[:200])
    np.save(folder / "target.npy", vectors[200:])
    files = (f"near.embeddings={folder / 'pool.npy'}", f"near.query_embeddings={folder / 'target.npy'}")
    where = ("--run", run.name, f"runs_dir={folder}", "--round", 1)
    done("score", *where, "--method", "near", *files)
    done("score", *where, "--method", "random")
    return run


def compared(run, *options):
    content = json.loads(done("compare", run, "--json", *options))
    return {each["round"]: each for each in content["rounds"]}


def scores(run, method, number=1):
    path = run / f"round-{number:02d}" / "scores" / f"{method}.parquet"
    return pandas.read_parquet(path)["score"].to_numpy(dtype=float)


def ranks(values):
    """Return the ranks of values, equal ones sharing their mean; by counting."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def best_first(values):
    """Return row numbers from the best score on, ties by row, rows without a score left out."""
    rows = [row for row in range(len(values)) if np.isfinite(values[row])]
    return sorted(rows, key=lambda row: (-values[row], row))


def test_rank_correlation_is_over_the_rows_that_both_scored(run):
    (pair,) = compared(run)[1]["pairs"]
    loss, near = scores(run, "loss"), scores(run, "near")
    both = np.isfinite(loss) & np.isfinite(near)
    assert pair["scored_by_both"] == both.sum() < 200
    a, b = ranks(loss[both]), ranks(near[both])
    by_hand = ((a - a.mean()) * (b - b.mean())).sum() / np.sqrt(
        ((a - a.mean()) ** 2).sum() * ((b - b.mean()) ** 2).sum()
    )
    assert pair["rank_correlation"] == pytest.approx(by_hand)


@pytest.mark.parametrize("top", [None, 1, 20, 150, 1000])
def test_best_rows_in_common(run, top):
    found = compared(run, *([] if top is None else ["--top", top]))[1]
    index = pandas.read_parquet(run / "round-01" / "index.parquet")
    size = index["row"].nunique() if top is None else top
    assert found["top"] == size
    loss, near = (best_first(scores(run, name))[:size] for name in ("loss", "near"))
    (pair,) = found["pairs"]
    assert pair["methods"] == ["loss", "near"]
    assert pair["in_common"] == len(set(loss) & set(near))
    assert pair["share"] == pytest.approx(len(set(loss) & set(near)) / min(len(loss), len(near)))


def test_rows_that_only_one_likes(run):
    (pair,) = compared(run, "--top", 30)[1]["pairs"]
    order = {name: best_first(scores(run, name)) for name in ("loss", "near")}
    for one, other in (("loss", "near"), ("near", "loss")):
        wanted = [r for r in order[one][:30] if r in order[other][30:]]
        wanted.sort(key=order[other].index, reverse=True)
        lines = pair["only"][one]
        assert [line["row"] for line in lines] == wanted[:3]
        for line in lines:
            assert line["rank"] == order[one].index(line["row"]) + 1
            assert line["other_rank"] == order[other].index(line["row"]) + 1
            assert line["text"]
            assert line["score"] == scores(run, one)[line["row"]]


def test_sources_of_the_best_rows(run):
    pool = pandas.read_parquet(run / "pool")["source"]
    for method in compared(run, "--top", 40)[1]["methods"]:
        if not method["has_order"]:
            assert (method["method"], method["sources"]) == ("random", [])
            continue
        best = pool[best_first(scores(run, method["method"]))[:40]].value_counts()
        assert {each["source"]: each["rows"] for each in method["sources"]} == {
            source: best.get(source, 0) for source in pool.unique()
        }


def test_what_is_printed(run):
    text = done("compare", run)
    assert f"Round 1 of {run.name}, selected by loss" in text
    assert "loss and near" in text
    assert "Liked by near, least by loss" in text
    assert "random: every row has the same score, so it has no order" in text
    assert f"`dataflex score --run {run.name} --round 2 --method NAME` adds another" in text


def test_a_run_without_scores(run, tiny_demo, tmp_path):
    folder = copied(tiny_demo, tmp_path)
    for path in folder.glob("round-*/scores/*"):
        path.unlink()
    ran = dataflex("compare", folder)
    assert ran.code == 2
    assert "No round of the run" in ran.err
