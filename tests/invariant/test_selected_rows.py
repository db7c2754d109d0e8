"""Random small worlds: the selection, the export and what `inspect` says of a row are the same rows."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dataflex_pipeline import Run
from dataflex_pipeline.errors import UserError

ROWS, TARGETS, WORLDS = 40, 6, 8
UNTRAINED = {"warmup_step": 0, "update_times": 0}
AMOUNTS = st.one_of(
    st.fixed_dictionaries({"num_samples": st.integers(1, 60)}),
    st.fixed_dictionaries({"fraction": st.sampled_from([0.05, 0.1, 0.33, 0.5, 1.0])}),
    st.fixed_dictionaries({"token_budget": st.integers(60, 900)}),
)
SHARES = st.one_of(
    st.just({}),
    st.just({"balanced": "source"}),
    st.dictionaries(st.sampled_from(["s0", "s1"]), st.sampled_from([0.0, 0.1, 0.25, 0.5]), max_size=2).map(
        lambda shares: {"source_quotas": shares} if shares else {}
    ),
)
DRAWS = st.one_of(
    st.just({"strategy": "top_k"}),
    st.just({"strategy": "round_robin"}),
    st.just({"strategy": "round_robin", "round_robin_over": "groups"}),
    st.fixed_dictionaries(
        {
            "strategy": st.just("sample"),
            "replacement": st.booleans(),
            "weights": st.sampled_from(["uniform", "importance", "probability"]),
        }
    ),
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def world(number, tiny_demo, folder):
    """A scored run over three sources: by a column with gaps and ties, or near a target of two groups."""
    random = np.random.default_rng(number)
    folder.mkdir()
    start = 0
    for name, count in (("s0", 20), ("s1", 14), ("s2", ROWS - 34)):
        scores = random.integers(0, 9, count) / 4
        rows = [
            {"instruction": f"say {start + i} {'again ' * (i % 5)}", "output": f"{start + i}", "s": float(s)}
            for i, s in enumerate(scores)
        ]
        for row in rows[:: 3 + number % 3]:
            row["s"] = None
        write(folder / f"{name}.jsonl", rows)
        start += count
    pool = ",".join(str(folder / f"s{i}.jsonl") for i in range(3))
    given = {"dataset": pool, "model_name_or_path": str(tiny_demo.model), **UNTRAINED}
    if number % 2:
        run = Run(folder / "run", **given, column={"column": "s"})
        run.score(1, "column")
        return run, "column"
    write(folder / "t0.jsonl", [{"instruction": "a", "output": str(i)} for i in range(TARGETS // 2)])
    write(
        folder / "t1.jsonl", [{"instruction": "b", "output": str(i)} for i in range(TARGETS - TARGETS // 2)]
    )
    for name, count in (("pool", ROWS), ("target", TARGETS)):
        vectors = random.standard_normal((count, 4)).astype(np.float32)
        np.save(folder / f"{name}.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    near = {"embeddings": str(folder / "pool.npy"), "query_embeddings": str(folder / "target.npy")}
    target = f"{folder / 't0.jsonl'},{folder / 't1.jsonl'}"
    run = Run(folder / "run", **given, eval_dataset=target, near=near)
    run.score(1, "near")
    return run, "near"


@pytest.fixture(scope="module")
def worlds(tiny_demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    made = [world(number, tiny_demo, folder / str(number)) for number in range(WORLDS)]
    return [(run.folder, method, run.store.settings.read_text(encoding="utf-8")) for run, method in made]


def fits(chosen, asked, scores):
    """Whether as many rows were chosen as were asked for, or all there are."""
    valid = int(scores["valid"].sum())
    if "token_budget" in asked:
        return True
    wanted = asked.get("num_samples") or math.ceil(Fraction(str(asked["fraction"])) * valid)
    return len(chosen) == wanted or len(chosen) <= valid


def check(worlds, number, asked, shares, draw):
    folder, method, begun = worlds[number]
    (folder / "run.yaml").write_text(begun, encoding="utf-8")  # without the settings of the world before
    run = Run(folder)
    if method == "column" and draw["strategy"] == "round_robin":
        draw = {"strategy": "top_k"}
    try:
        chosen = run.select(1, method, **asked, **shares, **draw).to_pandas()
    except UserError as refused:
        assume("Traceback" not in str(refused))
        return "refused"
    scores = run.score(1, method).to_pandas()
    assert chosen["rank"].tolist() == list(range(1, len(chosen) + 1))
    assert scores["valid"][chosen["row"]].all()
    assert chosen["score"].tolist() == scores["score"][chosen["row"]].tolist()
    assert abs(chosen["weight"].mean() - 1) < 1e-5
    if not draw.get("replacement") and draw["strategy"] != "sample":
        assert chosen["row"].is_unique
    assert fits(chosen, asked, scores)
    if draw["strategy"] == "top_k":
        for _, part in chosen.groupby("source" if shares else (lambda _: 0)):
            left = scores[scores["valid"] & ~scores["row"].isin(chosen["row"])]
            order = list(zip(-part["score"], part["row"], strict=True))
            assert order == sorted(order)
            if not shares and "token_budget" not in asked:
                assert left["score"].max() <= part["score"].min() or left.empty
    if "balanced" in shares and "token_budget" not in asked:
        counts = Counter(chosen["source"])
        there = Counter(
            "s0" if row < 20 else "s1" if row < 34 else "s2" for row in scores[scores["valid"]]["row"]
        )
        full = [counts[name] for name in there if counts[name] < there[name]]
        assert not full or draw.get("replacement") or max(full) - min(full) <= 1
    place = run.folder.parent / "out.jsonl"
    place.unlink(missing_ok=True)
    run.export(place, round=1)
    lines = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
    assert [line["_row"] for line in lines] == chosen["row"].tolist()
    assert [line["_rank"] for line in lines] == chosen["rank"].tolist()
    assert [line["_source"] for line in lines] == chosen["source"].tolist()
    assert np.allclose([line["_weight"] for line in lines], chosen["weight"])
    for line in lines[:3]:
        source = (run.folder.parent / line["_file"]).read_text(encoding="utf-8").splitlines()
        original = json.loads(source[line["_line"] - 1])
        assert {key: line.get(key) for key in original} == original
    for row in {int(chosen["row"].iloc[0]), int(chosen["row"].iloc[-1]), (len(chosen) * 7) % ROWS}:
        (told,) = run.row(row).selections
        mine = chosen[chosen["row"] == row]
        assert (told.selected, told.of) == (not mine.empty, len(chosen))
        assert told.rank == (None if mine.empty else mine["rank"].iloc[0])
    return "selected"


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, WORLDS - 1), asked=AMOUNTS, shares=SHARES, draw=DRAWS)
def test_selected_exported_and_inspected_rows_are_the_same(worlds, number, asked, shares, draw):
    check(worlds, number, asked, shares, draw)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three minutes on an idle machine
def test_the_same_in_a_thousand_worlds(worlds):
    told = Counter()

    @settings(max_examples=1000, suppress_health_check=list(HealthCheck))
    @given(number=st.integers(0, WORLDS - 1), asked=AMOUNTS, shares=SHARES, draw=DRAWS)
    def each(number, asked, shares, draw):
        told[check(worlds, number, asked, shares, draw)] += 1

    each()
    assert told["selected"] > 5 * told["refused"]
    assert told.total() >= 1000
