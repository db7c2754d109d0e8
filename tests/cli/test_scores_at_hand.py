"""perplexity, and scores that exist already (column), through the commands: tables, selections, refusals."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from cli_runs import SMALL, copied, data, dataflex, done, refused

NUMBER = 3


@pytest.fixture
def run(tmp_path, tiny_demo):
    return copied(tiny_demo, tmp_path / "runs")


def on(run, method, *more):
    return ("--run", run.name, f"runs_dir={run.parent}", "--round", NUMBER, "--method", method, *more)


def scores(run, method):
    return pq.read_table(run / f"round-{NUMBER:02d}" / "scores" / f"{method}.parquet")


def chosen(run, method, *more):
    """Return the rows that are selected, sorted, by score and select; a selection before is made anew."""
    done("score", *on(run, method, *more), "--overwrite")
    done("select", *on(run, method, "num_samples=8", *more), "--overwrite")
    return sorted(set(pq.read_table(run / f"round-{NUMBER:02d}" / "index.parquet")["row"].to_pylist()))


@pytest.mark.parametrize(("focus", "own"), [("low", "low"), ("medium", "middle"), ("high", "high")])
def test_the_best_by_loss_are_those_by_perplexity_and_by_hand(run, focus, own):
    found = chosen(run, "perplexity", f"perplexity.focus={own}")
    assert found == chosen(run, "loss", f"loss.focus={focus}", "strategy=top_k")
    losses = dict(enumerate(scores(run, "loss")["loss"].to_pylist()))
    rising, median = np.sort(list(losses.values())), np.median(list(losses.values()))
    keys = {
        "low": lambda row: losses[row],
        "high": lambda row: -losses[row],
        "middle": lambda row: abs(np.mean(np.flatnonzero(rising == losses[row])) - (len(rising) - 1) / 2),
    }
    assert found == sorted(sorted(losses, key=keys[own])[:8])  # ties by row
    assert own != "middle" or all(abs(losses[row] - median) < 0.2 for row in found)


def test_a_column_of_the_data_is_taken_as_it_is(tiny_demo, tmp_path):
    rows = [json.loads(line) for line in tiny_demo.pool.read_text().splitlines()][:40]
    for number, row in enumerate(rows):
        row["rating"] = [number * 7 % 40, None, "n/a", f"{number}.5"][0 if number < 30 else number % 4]
    (tmp_path / "pool.json").write_text(json.dumps(rows))
    pool = (f"dataset={tmp_path}/pool.json", f"model_name_or_path={tiny_demo.model}", f"runs_dir={tmp_path}")
    steps = ("warmup_step=1", "update_step=2", "update_times=1")
    text = done("round", 1, "--run", "r", "--method", "column", "column.column=rating", *pool, *steps, *SMALL)
    table = pq.read_table(tmp_path / "r" / "round-01" / "scores" / "column.parquet").to_pydict()
    assert table["score"][:30] == [number * 7 % 40 for number in range(30)]
    assert (table["score"][31], table["score"][32], table["score"][34]) == (31.5, 32 * 7 % 40, None)
    assert table["reason"][33] == "the column 'rating' is empty"
    assert table["reason"][34] == "the column 'rating' is no number"
    assert "rows of the pool could not be scored: row 30 (the column 'rating' is no number)" in text
    index = pq.read_table(tmp_path / "r" / "round-01" / "index.parquet")
    best = sorted((score for score in table["score"] if score is not None), reverse=True)[:8]
    assert sorted(index["score"].to_pylist(), reverse=True) == best


def test_a_file_of_scores_is_joined_and_its_content_counts(run, tmp_path):
    rows = pq.read_table(run / "pool", columns=["row", "row_id", "n_tokens"])
    file = tmp_path / "scores.parquet"
    given = pa.table({"row_id": rows["row_id"], "mine": rows["n_tokens"]}).take(np.arange(199, 9, -1))
    by_id = dict(zip(*given.to_pydict().values(), strict=True))  # some rows have the same content
    expected = [None if each not in by_id else -float(by_id[each]) for each in rows["row_id"].to_pylist()]
    missing, first = expected.count(None), expected.index(None)
    assert 0 < missing < 10
    pq.write_table(given, file)
    asked = on(run, "column", f"column.file={file}", "column.column=mine", "column.descending=false")
    text = done("score", *asked)
    assert f"scores of {file}, lines joined by row_id" in text
    assert f"{missing} rows of the pool could not be scored: row {first} ('mine' of scores.parquet" in text
    assert scores(run, "column")["score"].to_pylist() == expected
    assert not list((run / "features").glob("*mine*"))

    moved = file.rename(tmp_path / "elsewhere.parquet")  # its place does not count
    again = [word.replace(str(file), str(moved)) if isinstance(word, str) else word for word in asked]
    done("score", *again)
    pq.write_table(given.filter(pc.not_equal(given["row_id"], given["row_id"][0])), moved)
    text = refused(run, "score", *again)
    assert "file_content: the content of the file of scores changed" in text
    done("score", *again, "--overwrite")
    assert scores(run, "column")["score"].null_count > missing


def test_ids_of_other_rows_join_nothing_and_say_so(run, tmp_path):
    (tmp_path / "a.csv").write_text(f"row_id,score\n{'ab' * 16},1\n")
    ran = dataflex("score", *on(run, "column", f"column.file={tmp_path}/a.csv"))
    assert ran.code == 2
    assert "The method column gave no row a score" in ran.err
    assert "row 0 ('score' of a.csv has no line for this row), row 1" in ran.err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((), "neither column.column nor column.file is set"),
        (("column.column=qualty",), "reads the column 'qualty' of the pool. Did you mean 'quality'?"),
        (("column.column=quality", "column.by=row"), "column.by=row was set without column.file"),
        (("column.file=gone.csv",), "There is no such file"),
        (("column.file=short.jsonl",), "It has 2 lines and the pool has 200 rows"),
        (("column.file=short.jsonl", "column.column=scor"), "Did you mean 'score'?"),
        (("column.file=twice.csv",), "The row 5 is on line 0 and on line 1"),
        (("column.file=far.csv",), "It has the row 200, and the pool has the rows 0 to 199"),
    ],
)
def test_what_cannot_work_is_found_before_a_run_begins(tiny_demo, tmp_path, monkeypatch, settings, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.jsonl").write_text('{"score": 1}\n{"score": 2}\n')
    (tmp_path / "twice.csv").write_text("row,score\n5,1\n5,2\n")
    (tmp_path / "far.csv").write_text("row,score\n5,1\n200,2\n")
    given = ("--run", "r", "--method", "column", *data(tiny_demo), *SMALL, *settings)
    assert said in refused(tmp_path, "round", 1, *given)
