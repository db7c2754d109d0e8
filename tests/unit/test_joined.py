"""The joined table of a run against a plain pandas join, and its map against a decomposition by numpy."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_run import add_embeddings, add_scores, add_selection, make_run

from dataflex_pipeline.api import Silent
from dataflex_pipeline.errors import RunError
from dataflex_pipeline.reports import embedding_map as maps
from dataflex_pipeline.reports.joined import LONGEST, joined_table
from dataflex_pipeline.store.run import RunFolder

N = 40


def conversations():
    made = [[("user", f"ask {n}"), ("assistant", f"say {n}")] for n in range(N)]
    made[1] = [("system", "be kind"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    made[2] = [("user", "nobody answers")]
    made[3] = [("user", "é" * (LONGEST + 7)), ("assistant", "<script>alert(1)</script>\x1b[31m\u202e")]
    made[4] = [("tool", "42"), ("assistant", "the answer"), ("user", "left over")]
    made[5] = []
    return made


@pytest.fixture
def run(tmp_path):
    draw = np.random.default_rng(3)
    own = {
        "skill": [("add", "sort")[n % 2] for n in range(N)],
        "rating": [n / 4 for n in range(N)],
        "same": ["x"] * N,
        "instruction": [f"long {n}" for n in range(N)],
        "nested": [[n] for n in range(N)],
    }
    run = make_run(tmp_path / "run", conversations(), own)
    scores = draw.integers(0, 9, N).astype(float).tolist()  # ties
    add_scores(run, 1, "loss", scores)
    add_scores(run, 2, "less", [None if n % 7 == 0 else -value for n, value in enumerate(scores)])
    add_selection(run, 1, [4, 9, 9, 2])
    add_selection(run, 2, [2, 30])
    add_selection(run, 2, [5, 2], name="half")
    add_embeddings(run, draw.standard_normal((N, 6)), invalid=[11])
    return run


def read(run):
    with joined_table(run, Silent()) as joined:
        return joined, pq.read_table(joined.path).to_pandas()


def expected_text(turns):
    places = [n for n, (role, _) in enumerate(turns) if role == "assistant"]
    last = places[-1] if places else len(turns)
    plain = len(turns) <= 2
    lines = [text if plain and role == "user" else f"{role}: {text}" for role, text in turns[:last]]
    return "\n".join(lines), turns[last][1] if places else None


def cut(text):
    more = len(text or "") - LONGEST
    return f"{text[:LONGEST]} ... and {more} more characters" if more > 0 else text


def expected(run):
    """The same table, joined by pandas from the files."""
    table = pd.concat([pd.read_parquet(part) for part in sorted(run.pool.glob("part-*"))])
    texts = [expected_text(turns) for turns in conversations()]
    table["prompt"], table["response"] = ([cut(text[n]) for text in texts] for n in (0, 1))
    for number, method in ((1, "loss"), (2, "less")):
        scores = pd.read_parquet(run.round(number).scores(method))[["row", "score"]]
        scores[f"rank_{number}_{method}"] = scores["score"].rank(method="first", ascending=False)
        table = table.merge(
            scores.rename(columns={"score": f"score_{number}_{method}"}), on="row", how="left"
        )
    files = {
        "selected_1": run.round(1).selection,
        "selected_2": run.round(2).selection,
        "selected_2_half": run.round(2).selection_named("half"),
    }
    said = {"selected_1": "round 1", "selected_2": "round 2", "selected_2_half": "round 2: half"}
    for name, file in files.items():
        table[name] = table["row"].isin(pd.read_parquet(file)["row"])
    table["selected"] = [
        ", ".join(said[name] for name in said if line[name]) or "no" for _, line in table.iterrows()
    ]
    return table


def test_it_is_the_join_of_the_tables(run):
    joined, found = read(run)
    assert joined.own == ("original_skill", "original_rating")  # the others say nothing, or are long
    whole = expected(run)
    names = [name for name in found.columns if not name.startswith("map_")]
    pd.testing.assert_frame_equal(found[names], whole[names], check_dtype=False)
    assert list(found.columns[:5]) == ["row", "rank_2_less", "selected", "prompt", "response"]
    assert found["selected"].tolist()[2] == "round 1, round 2, round 2: half"


def test_the_map_is_that_of_the_principal_components(run):
    _, found = read(run)
    vectors = pd.read_parquet(next(run.features.glob("*/part-*")))
    kept = vectors[vectors["valid"]]
    centred = np.stack(kept["embedding"]).astype(float)
    centred -= centred.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    for place, name in enumerate(("map_x", "map_y")):
        axis = axes[place] * np.sign(axes[place][np.argmax(np.abs(axes[place]))])
        np.testing.assert_allclose(found[name][kept.index], centred @ axis, atol=1e-5)
    assert found["map_x"][found["row"] == 11].isna().all()


def test_the_axes_of_a_large_pool_are_those_of_every_so_many_rows(run, monkeypatch):
    from dataflex_pipeline.store.parts import PartedTable

    table = PartedTable.open(next(run.features.glob("embeddings*")))
    monkeypatch.setattr(maps, "SAMPLE", 13)  # 39 valid rows: every third
    blocks = maps.vector_blocks
    monkeypatch.setattr(maps, "vector_blocks", lambda table: blocks(table, 5))
    every = np.stack(pd.read_parquet(table.files[0])["embedding"].dropna())[::3].astype(float)
    mean, axes = maps.principal_axes(table)
    np.testing.assert_allclose(mean, every.mean(axis=0), atol=1e-7)
    _, _, right = np.linalg.svd(every - every.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(right[:2] @ axes), np.eye(2), atol=1e-6)


def test_it_is_made_once_and_again_when_a_table_changed(run):
    joined, before = read(run)
    first = joined.path.stat().st_mtime_ns, (joined.path.parent / "map.parquet").stat().st_mtime_ns
    content = joined.path.read_bytes()
    read(run)
    assert joined.path.stat().st_mtime_ns == first[0]
    add_scores(run, 1, "loss", [float(n) for n in range(N)])
    _, after = read(run)
    assert after["rank_1_loss"].tolist() == list(range(N, 0, -1))
    assert not before["rank_1_loss"].equals(after["rank_1_loss"])
    assert (joined.path.parent / "map.parquet").stat().st_mtime_ns == first[1]  # its embeddings are the same
    joined.path.unlink()
    (joined.path.parent / "map.parquet").unlink()
    draw = np.random.default_rng(3).integers(0, 9, N).astype(float).tolist()
    add_scores(run, 1, "loss", draw)
    read(run)
    assert joined.path.read_bytes() == content  # the same bytes from the same tables


def test_tables_over_other_rows_are_left_out_and_named(run, monkeypatch):
    """As of a pool that was made anew, of other data: their numbers would stand beside the wrong texts."""
    from dataflex_pipeline.schemas import SCORES
    from dataflex_pipeline.store.tables import table_writer

    for number, method, rows in ((1, "loss", range(N)), (2, "less", range(N + 1))):
        ids = ["f" * 32 if row in (3, N) else f"{row:032x}" for row in rows]
        n = len(ids)
        columns = [list(rows), ids, [0.5] * n, [True] * n, [None] * n]
        with table_writer(run.round(number).scores(method), SCORES, {"other": method}) as write:
            write(pa.table(columns, schema=SCORES))
    for _ in range(2):  # made, and found
        said = []
        progress = Silent()
        monkeypatch.setattr(progress, "say", said.append, raising=False)
        with joined_table(run, progress) as joined:
            names = pq.read_schema(joined.path).names
        assert joined.ranked == ()
        assert not [name for name in names if name.startswith(("score_", "rank_"))]
        assert "selected_2_half" in names
        assert said == [
            f"{view} is left out: it is over other rows than those of the pool now"
            for view in ("scores_1_loss", "scores_2_less")
        ]


def test_a_run_of_a_pool_alone(tmp_path):
    run = make_run(tmp_path / "run", [[("user", "a"), ("assistant", "b")]] * 3)
    joined, found = read(run)
    assert (joined.ranked, joined.chosen, joined.mapped) == ((), (), False)
    assert found["response"].tolist() == ["b"] * 3
    assert "selected" not in found.columns


def test_what_is_no_run_or_has_no_pool_is_refused(tmp_path):
    with pytest.raises(RunError, match="There is no run at"):
        read(RunFolder(tmp_path / "nothing"))
    run = RunFolder(tmp_path / "begun")
    run.folder.mkdir()
    run.write({"component_name": "made"}, {})
    with pytest.raises(RunError, match="has no prepared pool yet"):
        read(run)
    assert not (run.folder / "view").exists()


def test_where_nothing_can_be_written_a_temporary_folder_is_used(run, monkeypatch):
    said = []
    progress = Silent()
    monkeypatch.setattr(progress, "say", said.append, raising=False)
    (run.folder / "view").write_text("a file is in the way")
    with joined_table(run, progress) as joined:
        assert run.folder not in joined.path.parents
        assert pq.read_metadata(joined.path).num_rows == N
    assert not joined.path.exists()
    assert "cannot be written to" in json.dumps(said)
