"""`dataflex inspect --row` against the same facts worked out from the tables by plain loops."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import SMALL, STEPS, dataflex, done, refused, snapshot

from dataflex_pipeline import Run
from dataflex_pipeline.pipeline.row_likeness import compared, nearest_target_rows
from dataflex_pipeline.store.parts import PartedTable, PartsWriter
from dataflex_pipeline.store.run import RunFolder

N_FIRST, N_SECOND, N_BAD, N_TARGET = 30, 16, 2, 9


@pytest.fixture(scope="module")
def folder(tiny_demo, tmp_path_factory):
    """Two data sets, one with blank lines and rows that cannot be used, and two rounds of less and near."""
    here = tmp_path_factory.mktemp("rows")
    pool = [json.loads(line) for line in tiny_demo.pool.read_text().splitlines()]
    pool[5]["output"] += " \x1b[31mred\x1b[0m"
    pool[9] = pool[3]
    lines = [json.dumps(row) for row in pool[:N_FIRST]] + [
        '{"instruction": "Nothing.", "output": ""}'
    ] * N_BAD
    (here / "first.jsonl").write_text("\n" + "\n\n".join(lines))
    (here / "second.json").write_text(json.dumps(pool[100 : 100 + N_SECOND], indent=1))
    target = [json.loads(line) for line in tiny_demo.target.read_text().splitlines()][:N_TARGET]
    for number, row in enumerate(target):
        row["kind"] = ("odd", "even", "third")[number % 3]
    (here / "target.json").write_text(json.dumps(target))
    shutil.copytree(tiny_demo.model, here / "model")
    made = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float32)
    np.save(here / "pool.npy", made[np.arange(N_FIRST + N_BAD + N_SECOND) % 11])  # many are equal
    np.save(here / "target.npy", made[11:])
    named = (
        f"dataset={here / 'first.jsonl'},{here / 'second.json'}",
        f"eval_dataset={here / 'target.json'}",
        "eval_group_column=kind",
        f"model_name_or_path={here / 'model'}",
        f"runs_dir={here}",
    )
    done("round", 2, *named, *STEPS, *SMALL, "--method", "less", "less.proj_dim=64", "--run", "run")
    vectors = (f"near.embeddings={here / 'pool.npy'}", f"near.query_embeddings={here / 'target.npy'}")
    done("score", "--round", 1, "--method", "near", *vectors, "--run", "run", f"runs_dir={here}")
    return here


@pytest.fixture(scope="module")
def run(folder):
    """The run; never write to it."""
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def frame(path: Path) -> pd.DataFrame:
    parts = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    return pd.concat(
        [pq.read_table(part, partitioning=None).to_pandas() for part in parts], ignore_index=True
    )


def feature(run: Path, name: str, number: int = 0) -> list[pd.DataFrame]:
    """The pool's and target's tables of a feature, in the order that they were written."""
    found = []
    for split in ("pool", "target"):
        paths = sorted(run.glob(f"features/{name}-{split}-*"), key=lambda path: path.stat().st_mtime_ns)
        found.append(frame(paths[number]))
    return found


def story(run: Path, *words: object) -> dict:
    return json.loads(done("inspect", run, *words, "--json"))


def every_row() -> range:
    return range(N_FIRST + N_BAD + N_SECOND)


@pytest.mark.slow
def test_every_row_comes_from_where_it_stands_in_its_file(folder, run):
    lines = (folder / "first.jsonl").read_text().split("\n")
    elements = json.loads((folder / "second.json").read_text())
    for row in every_row():
        found = Run.open(run).row(row)
        first = row < N_FIRST + N_BAD
        assert found.source == ("first" if first else "second")
        assert found.path == str(folder / ("first.jsonl" if first else "second.json"))
        there = json.loads(lines[found.line - 1]) if first else elements[found.line - 1]
        assert {name: found.original[name] for name in there} == there
        assert found.file == Path(found.path).name
        assert found.notices == ()


def test_ranks_are_the_places_in_the_sorted_table(run):
    tables = {
        (r, m): frame(run / f"round-{r:02d}/scores/{m}.parquet")
        for r, m in [(1, "less"), (1, "near"), (2, "less")]
    }
    for row in every_row():
        found = Run.open(run).row(row)
        assert [(each.round, each.method) for each in found.scores] == list(tables)
        for each in found.scores:
            table = tables[each.round, each.method]
            columns = {"score": each.score, **{f"similarity_{name}": g for name, g in each.groups.items()}}
            assert len(each.groups) == (3 if each.method == "less" else 0)
            for name, place in columns.items():
                ranked = (
                    table[table["valid"]].sort_values([name, "row"], ascending=[False, True])["row"].tolist()
                )
                assert place.of == len(ranked)
                if table["valid"][row]:
                    assert (place.rank, place.value) == (ranked.index(row) + 1, table[name][row])
                else:
                    assert (place.rank, place.value) == (None, None)
                    assert each.reason == table["reason"][row]
    near = tables[1, "near"]
    assert near["score"].nunique() < len(near) / 2  # ties were ranked
    assert Run.open(run).row(4).scores[1].columns["nearest_target"] == near["nearest_target"][4]


def test_the_best_ranks_are_what_top_k_takes(run):
    for number in (1, 2):
        index = frame(run / f"round-{number:02d}" / "index.parquet")
        scores = {row: Run.open(run).row(row) for row in every_row()}
        ranks = {
            row: next(
                each.score.rank for each in found.scores if (each.round, each.method) == (number, "less")
            )
            for row, found in scores.items()
        }
        chosen = {row for row, rank in ranks.items() if rank is not None and rank <= index["row"].nunique()}
        assert chosen == set(index["row"])


def test_selected_rows_with_positions_weights_and_probabilities(run):
    indexes = {number: frame(run / f"round-{number:02d}" / "index.parquet") for number in range(3)}
    for row in every_row():
        found = Run.open(run).row(row).selections
        assert [(each.round, each.method) for each in found] == [(0, "uniform"), (1, "less"), (2, "less")]
        for each in found:
            lines = indexes[each.round][indexes[each.round]["row"] == row]
            assert each.selected is (len(lines) > 0)
            assert each.positions == tuple(lines["position"])
            assert each.trained
            assert each.of == len(indexes[each.round])
            if len(lines):
                assert (each.weight, each.probability) == (
                    lines["weight"].iloc[0],
                    lines["probability"].iloc[0],
                )
            else:
                assert (each.weight, each.probability, each.rank) == (None, None, None)


def nearest(vector: np.ndarray, target: pd.DataFrame, column: str) -> list[tuple[int, float]]:
    pairs = [
        (int(line["row"]), float(np.dot(np.float64(vector), np.float64(line[column]))))
        for _, line in target.iterrows()
        if line["valid"]
    ]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:5]


def test_nearest_target_rows_by_embedding(run):
    pool, target = feature(run, "embeddings")
    prepared = frame(run / "target").set_index("row")
    for row in (0, 7, 31, 40):
        [found] = Run.open(run).row(row).embeddings
        assert found.used_by == ("near, round 1",)
        if not pool["valid"][row]:
            assert (found.rows, found.reason) == ((), pool["reason"][row])
            continue
        expected = nearest(pool["embedding"][row], target, "embedding")
        assert [each.row for each in found.rows] == [number for number, _ in expected]
        assert [each.similarity for each in found.rows] == pytest.approx(
            [cos for _, cos in expected], abs=1e-6
        )
        for each in found.rows:
            assert each.group == prepared["group"][each.row]
            assert each.text.startswith(f"user: {prepared['messages'][each.row][0]['content']}"[:40])


def test_the_nearest_of_many_rows_are_those_of_each(run):
    """What a report shows of many rows at once."""
    pairs = compared(RunFolder(run), [])
    assert sorted(pair.kind for pair in pairs) == ["embeddings", "gradients", "gradients"]
    rows = [40, 7, 31, 0]  # 31 cannot be used
    for pair, used_by in pairs.items():
        found, cosines = nearest_target_rows(pair, np.array(rows), 5)
        for place, row in enumerate(rows):
            story = Run.open(run).row(row)
            [one] = [each for each in getattr(story, pair.kind) if each.used_by == used_by]
            kept = found[place] >= 0
            assert kept.sum() == len(one.rows)
            expected = [each.similarity for each in one.rows]
            np.testing.assert_allclose(cosines[place][kept], expected, atol=1e-5)
            if len(np.unique(np.round(expected, 5))) == len(expected):  # no ties that float32 could turn
                assert found[place][kept].tolist() == [each.row for each in one.rows]


def test_target_rows_whose_gradients_agree_add_up_to_the_score(run):
    scores = frame(run / "round-01/scores/less.parquet")
    groups = frame(run / "target").set_index("row")["group"]
    for number, label in enumerate(("less, round 1", "less, round 2")):
        pool, target = feature(run, "gradients", number)
        for row in (0, 29, 45):
            found = next(each for each in Run.open(run).row(row).gradients if each.used_by == (label,))
            expected = nearest(pool["gradient"][row], target, "gradient")
            assert [each.row for each in found.rows] == [at for at, _ in expected]
            assert [each.similarity for each in found.rows] == pytest.approx([cos for _, cos in expected])
    marker = json.loads((run / "round-00/checkpoint/COMPLETE.json").read_text())
    pool, target = feature(run, "gradients")
    cosines = {
        at: float(np.dot(np.float64(pool["gradient"][3]), np.float64(v)))
        for at, v in target["gradient"].items()
    }
    for group in ("odd", "even", "third"):
        mean = np.mean([cos for at, cos in cosines.items() if groups[at] == group])
        assert scores[f"similarity_{group}"][3] == pytest.approx(
            marker["result"]["mean_learning_rate"] * mean, rel=1e-4
        )


def test_the_labelled_part_is_what_the_labels_say(folder, run):
    from transformers import AutoTokenizer

    tokenizer, pool = AutoTokenizer.from_pretrained(folder / "model"), frame(run / "pool")
    for row in (0, 5, 33):
        found = Run.open(run).row(row)
        labels = [label for label in pool["labels"][row] if label != -100]
        assert found.exact
        assert "".join(each.text for each in found.conversation if each.learnt) == tokenizer.decode(labels)
        assert "".join(each.text for each in found.conversation) == tokenizer.decode(pool["input_ids"][row])


def test_without_its_tokenizer_turns_are_marked_by_role(folder, copy):
    settings = copy / "run.yaml"
    settings.write_text(settings.read_text().replace(str(folder / "model"), str(folder / "gone")))
    found = Run.open(copy).row(2)
    assert [(each.text.partition(":")[0], each.learnt) for each in found.conversation] == [
        ("user", False),
        ("assistant", True),
    ]
    assert not found.exact
    assert "the tokenizer is not at hand" in found.notices[0]
    assert "turns that carry loss, by their role" in done("inspect", copy, "--row", 2)


def test_data_that_moved_is_said(folder, copy):
    settings = copy / "run.yaml"
    settings.write_text(settings.read_text().replace(str(folder / "first.jsonl"), str(folder / "gone.jsonl")))
    found = Run.open(copy).row(2)
    assert (found.file, found.path) == ("first.jsonl", None)
    assert "the data set is not where it was" in found.notices[0]


def test_a_pool_without_places_keeps_working_and_stays_current(copy):
    pool = PartedTable.open(copy / "pool")
    before = pool.fingerprint
    parts = [pool.part(number).drop_columns(["file", "line"]) for number in range(pool.n_parts)]
    shutil.rmtree(copy / "pool")
    writer = PartsWriter(copy / "pool", parts[0].schema, pool.ingredients)
    for number, part in enumerate(parts):
        writer.write(number, part)
    assert writer.finish(len(parts), pool.summary).fingerprint == before
    found = Run.open(copy).row(3)
    assert (found.file, found.line, found.path) == (None, None, None)
    assert found.notices == (
        "the pool was prepared by an earlier version, which did not record file and line",
    )
    assert "earlier version" in done("inspect", copy, "--row", 3)
    again = done("round", 2, copy)
    assert again.count("up to date") >= 8
    assert "file" not in PartedTable.open(copy / "pool").schema.names


def test_a_table_of_selected_rows_says_the_rank(copy):
    pool = frame(copy / "pool")
    chosen = [4, 2, 33]
    pq.write_table(
        pa.table(
            {
                "rank": [1, 2, 3],
                "row": chosen,
                "row_id": pool["row_id"][chosen].tolist(),
                "source": pool["source"][chosen].tolist(),
                "score": [3.0, 2.0, 1.0],
                "probability": [0.5, 0.25, 0.125],
                "weight": pa.array([1.0, 1.5, 0.5], pa.float32()),
            }
        ).replace_schema_metadata({"dataflex.method": "near"}),
        copy / "round-02" / "selection.parquet",
    )
    (copy / "round-02" / "index.parquet").unlink()
    shutil.rmtree(copy / "round-02" / "checkpoint")
    for rank, row in enumerate(chosen, 1):
        last = Run.open(copy).row(row).selections[-1]
        assert (last.round, last.method, last.selected, last.rank, last.of) == (2, "near", True, rank, 3)
        assert (last.positions, last.trained) == ((), False)
        assert (last.weight, last.probability) == (
            {1: 1.0, 2: 1.5, 3: 0.5}[rank],
            {1: 0.5, 2: 0.25, 3: 0.125}[rank],
        )
    assert not Run.open(copy).row(3).selections[-1].selected


def test_a_row_that_cannot_be_used_says_why(run):
    found = Run.open(run).row(N_FIRST)
    assert (found.valid, found.reason) == (False, "empty response")
    assert all(each.score.rank is None and each.reason == "empty response" for each in found.scores)
    text = done("inspect", run, "--row", N_FIRST)
    assert "not valid: empty response" in text
    assert "not scored: empty response" in text


def test_rows_of_one_conversation_name_each_other(run):
    assert Run.open(run).row(3).same == (9,)
    assert Run.open(run).row(9).same == (3,)
    assert Run.open(run).row(2).same == ()


def test_a_row_by_the_beginning_of_its_id(run):
    pool = frame(run / "pool")
    assert story(run, "--row-id", pool["row_id"][8][:12])["row"] == 8
    assert Run.open(run).row(pool["row_id"][8].upper()).row == 8
    text = refused(run, "inspect", run, "--row-id", pool["row_id"][3])
    assert "2 rows have a row_id that begins with" in text
    assert "row 3 (" in text
    assert "row 9 (" in text
    assert "No row has a row_id that begins with 'zz'" in refused(run, "inspect", run, "--row-id", "zz")
    assert "The row_id is empty" in refused(run, "inspect", run, "--row-id", "")


def test_rows_by_their_text(run, monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.pipeline.row_search.SEARCHED_ROWS", 7)
    pool = frame(run / "pool")

    def expected(text: str) -> list[int]:
        return [
            int(line["row"])
            for _, line in pool.iterrows()
            if any(text.lower() in turn["content"].lower() for turn in line["messages"])
            or any(
                isinstance(value, str) and text.lower() in value.lower()
                for name, value in line.items()
                if name.startswith("original_")
            )
        ]

    for text in ("a", "SAY", "Nothing."):
        found = Run.open(run).find(text)
        assert (found.count, [hit.row for hit in found.first]) == (len(expected(text)), expected(text)[:10])
    [only] = expected("\x1b[31mred")
    assert only == 5
    assert story(run, "--find", "\x1b[31mRED")["row"] == only
    listed = story(run, "--find", "a")
    assert len(listed["first"]) == 10
    assert set(listed["first"][0]) == {"row", "source", "text"}
    text = done("inspect", run, "--find", "a")
    assert text.startswith(f"{len(expected('a'))} rows hold 'a'\n")
    assert "No row of the pool holds 'xyzzy'" in refused(run, "inspect", run, "--find", "xyzzy")
    assert "The text to find is empty" in refused(run, "inspect", run, "--find", " ")


def test_mistakes_in_what_is_asked_for(run):
    assert "numbered 0 to 47" in refused(run, "inspect", run, "--row", 48)
    assert "Row -1 was asked for" in refused(run, "inspect", run, "--row", "-1")
    assert "More than one of --row" in refused(run, "inspect", run, "--row", 1, "--find", "x")
    assert "--sql was given with" in refused(run, "inspect", run, "--row", 1, "--sql", "select 1")
    assert "--csv was given with" in refused(run, "inspect", run, "--row", 1, "--csv")
    assert "is a table" in refused(run, "inspect", run / "pool", "--row", 1)


def test_the_text_has_no_control_characters_and_json_is_the_same_story(run):
    before = snapshot(run)
    text = done("inspect", run, "--row", 5)
    assert "\x1b" not in text
    assert "[31mred" in text
    assert re.search(r"from first, first.jsonl, line 12\n", text)
    for title in (
        "Conversation",
        "Scores",
        "By target group",
        "Nearest target rows",
        "gradients agree",
        "Selected",
    ):
        assert title in text
    plain = story(run, "--row", 5)
    assert plain["scores"][0]["score"]["value"] == Run.open(run).row(5).scores[0].score.value
    assert [each["round"] for each in plain["selections"]] == [0, 1, 2]
    assert snapshot(run) == before


def test_scores_of_another_pool_and_gradients_that_are_gone_are_said(copy):
    for path in copy.glob("features/gradients-target-*"):
        shutil.rmtree(path)
    table = pq.read_table(copy / "round-01/scores/near.parquet", partitioning=None)
    pq.write_table(table.slice(1), copy / "round-01/scores/near.parquet")
    found = Run.open(copy).row(6)
    assert found.gradients == ()
    assert "the gradients that less, round 1 compared are not among the run's features" in found.notices
    assert "the near scores of round 1 are of another pool" in found.notices
    assert [each.method for each in found.scores] == ["less", "less"]


def test_a_run_that_is_scored_and_not_trained_further(copy):
    for name in ("selection.parquet", "index.parquet", "probabilities", "checkpoint"):
        path = copy / "round-02" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    found = Run.open(copy).row(6)
    assert [each.round for each in found.selections] == [0, 1]
    assert found.scores[-1].probability is None
    ran = dataflex("inspect", copy, "--row", 6)
    assert ran.code == 0
