"""`dataflex inspect` against the same numbers computed by hand with numpy, pandas and pyarrow."""

import csv
import io
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import SMALL, STEPS, copied, dataflex, done, finished, refused, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex_pipeline.reports.catalogue import RunTable, tables_of
from dataflex_pipeline.reports.numbers import BINS, SHARES, effective_size, histogram, spread
from dataflex_pipeline.reports.query import open_queries
from dataflex_pipeline.reports.side_by_side import merged_lengths
from dataflex_pipeline.store.run import RunFolder

LOOSE = {"rel": 1e-9, "abs": 1e-12}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def mixed(tiny_demo, tmp_path_factory):
    """A run over two sources, one of them with rows that cannot be used."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = tiny_demo.pool.read_text().splitlines()
    (folder / "first.jsonl").write_text("\n".join(lines[:120]) + "\n")
    odd = ['{"instruction": "nothing", "output": ""}'] * 3 + [
        '{"instruction": "\\u001b[31mred", "output": "x"}'
    ]
    (folder / "second.jsonl").write_text("\n".join(lines[120:160] + odd) + "\n")
    sources = f"dataset={folder / 'first.jsonl'},{folder / 'second.jsonl'}"
    model = (f"eval_dataset={tiny_demo.target}", f"model_name_or_path={tiny_demo.model}")
    done("round", 2, sources, *model, *STEPS, *SMALL, "--run", "mixed", f"runs_dir={folder}")
    return folder / "mixed"


def as_json(*arguments):
    return json.loads(done("inspect", *arguments, "--json"))


def pool_frame(run):
    parts = [pd.read_parquet(path) for path in sorted((run / "pool").glob("part-*.parquet"))]
    return pd.concat(parts, ignore_index=True)


def written(folder, values, name="x"):
    path = folder / "column.parquet"
    pq.write_table(pa.table({name: values}), path)
    return RunTable("table", path, (path,), "this")


# The numbers of a column


@settings(max_examples=40)
@given(
    st.lists(
        st.one_of(st.none(), st.floats(-1e6, 1e6), st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1.0])),
        max_size=60,
    )
)
def test_spread_and_histogram_are_numpys(tmp_path_factory, values):
    table = written(tmp_path_factory.mktemp("column"), pa.array(values, pa.float64()))
    finite = np.array([v for v in values if v is not None and np.isfinite(v)])
    with open_queries([], table) as queries:
        relation = queries.table("this")
        found = spread(relation, "x")
        bins = histogram(relation, found)
    assert (found.n, found.missing) == (len(finite), len(values) - len(finite))
    if not len(finite):
        assert np.isnan(found.mean)
        assert bins == []
        return
    close = {"rel": 1e-9, "abs": 1e-6}
    assert found.mean == pytest.approx(finite.mean(), **close)
    assert found.std == pytest.approx(finite.std(), **close)
    for share, value in found.quantiles.items():
        assert value == pytest.approx(np.quantile(finite, share), **close)
    edges = [bins[0].low, *(each.high for each in bins)]
    assert edges[0] == finite.min()
    assert edges[-1] == finite.max()
    if edges[0] < edges[-1]:
        assert [each.count for each in bins] == np.histogram(finite, edges)[0].tolist()
    assert sum(each.count for each in bins) == len(finite)


def test_outliers_do_not_hide_the_shape(tmp_path):
    values = np.random.default_rng(3).normal(size=5000)
    values[7] = 1e9
    with open_queries([], written(tmp_path, values)) as queries:
        relation = queries.table("this")
        bins = histogram(relation, spread(relation, "x"))
    assert len(bins) == BINS
    assert bins[-1].high == 1e9
    assert max(each.count for each in bins) < 1000  # without care all but one were in one bar
    assert np.histogram(values, [bins[0].low, *(each.high for each in bins)])[0].tolist() == [
        each.count for each in bins
    ]


def test_quantiles_of_very_many_rows_are_exact_without_holding_them(tmp_path):
    values = np.random.default_rng(0).random(20_000)
    values[3:9] = np.nan
    with open_queries([], written(tmp_path, values)) as queries:
        held = spread(queries.table("this"), "x")
        streamed = spread(queries.table("this"), "x", held_rows=10_000)
    assert held == streamed
    for share in SHARES:
        assert streamed.quantiles[share] == np.quantile(values[np.isfinite(values)], share)


def test_the_effective_size_of_known_weights(tmp_path):
    with open_queries([], written(tmp_path, np.array([1.0, 1.0, 1.0, 0.0]))) as queries:
        assert effective_size(queries.table("this"), "x") == pytest.approx(3.0)
    with open_queries([], written(tmp_path, np.array([0.0, 0.0]))) as queries:
        assert effective_size(queries.table("this"), "x") == 0.0


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(-5, 5)), min_size=1, max_size=40), st.integers(1, 9))
def test_lengths_are_merged_without_losing_a_line(lengths, bins):
    rising = [
        {"length": place, "lines": lines, "total": lines * mean}
        for place, (lines, mean) in enumerate(lengths)
    ]
    groups = merged_lengths(rising, bins)
    assert len(groups) <= bins
    assert sum(each["lines"] for each in groups) == sum(each["lines"] for each in rising)
    assert sum(each["lines"] * each["mean"] for each in groups) == pytest.approx(
        sum(each["total"] for each in rising), abs=1e-9
    )
    assert [groups[0]["shortest"], groups[-1]["longest"]] == [0, len(lengths) - 1]
    assert all(a["longest"] + 1 == b["shortest"] for a, b in pairwise(groups))


# Tables of a run


def test_scores(mixed):
    path = mixed / "round-02" / "scores" / "loss.parquet"
    found, scores, pool = as_json(path), pd.read_parquet(path), pool_frame(mixed)
    assert (found["kind"], found["rows"], found["valid"]) == ("scores", 164, 161)
    assert found["facts"]["method"] == "loss"
    assert found["facts"]["params"]["focus_weight"] == 5.0
    first = pool.loc[~pool["valid"], "row"].tolist()
    assert found["reasons"] == [{"reason": pool["reason"].dropna().iloc[0], "rows": 3, "first": first}]
    numbers = {each["column"]: each for each in found["numbers"]}
    assert set(numbers) == {"score", "loss", "n_tokens"}
    for share in SHARES:
        expected = np.quantile(scores["score"].dropna(), share)
        assert numbers["score"]["quantiles"][f"{share:g}"] == pytest.approx(expected, **LOOSE)
    assert numbers["score"]["missing"] == 3

    joined = scores.merge(pool, on="row", suffixes=("", "_pool"))
    by_source = joined.groupby("source")["score"].mean()
    assert {each["source"]: each["mean"] for each in found["sources"]} == pytest.approx(by_source.to_dict())
    assert {each["source"]: each["lines"] for each in found["sources"]} == {"first": 120, "second": 44}
    usable = joined[joined["score"].notna()]
    correlation = np.corrcoef(usable["score"], usable["n_response_tokens"])[0, 1]
    assert found["length"]["correlation"] == pytest.approx(correlation, **LOOSE)
    for each in found["length"]["bins"]:
        inside = usable[usable["n_response_tokens"].between(each["shortest"], each["longest"])]
        assert (each["lines"], each["mean"]) == (len(inside), pytest.approx(inside["score"].mean(), **LOOSE))


def test_example_rows_are_the_best_the_worst_and_some_by_chance_with_their_text(mixed):
    path = mixed / "round-01" / "scores" / "loss.parquet"
    scores, pool = pd.read_parquet(path), pool_frame(mixed).set_index("row")
    found = as_json(path, "--rows", 4)["examples"]
    ranked = scores.dropna(subset="score").sort_values(["score", "row"])
    assert [each["row"] for each in found["bottom"]] == ranked["row"].head(4).tolist()
    best = scores.dropna(subset="score").sort_values(["score", "row"], ascending=[False, True])
    assert [each["row"] for each in found["top"]] == best["row"].head(4).tolist()
    assert found["random"] == as_json(path, "--rows", 4)["examples"]["random"]
    for each in [*found["top"], *found["random"]]:
        assert each["messages"] == list(pool.loc[each["row"], "messages"])
        assert each["score"] == scores["score"][each["row"]]
    assert "examples" not in as_json(path, "--rows", 0)


def test_probabilities(mixed):
    path = mixed / "round-01" / "probabilities" / "loss.parquet"
    p = pd.read_parquet(path)["probability"]
    found = as_json(path)["probability"]
    assert found["effective_sample_size"] == pytest.approx(p.sum() ** 2 / (p**2).sum(), **LOOSE)
    assert found["sum"] == pytest.approx(1.0)
    assert found["positive"] == (p > 0).sum() == 161


def test_an_index_and_what_was_already_in_the_rounds_before(mixed):
    rows = [set(pd.read_parquet(mixed / f"round-{r:02d}" / "index.parquet")["row"]) for r in range(3)]
    found = as_json(mixed / "round-02" / "index.parquet")
    expected = {
        1: len(rows[2] & rows[1]),
        0: len(rows[2] & rows[0]),
        "any before": len(rows[2] & (rows[0] | rows[1])),
    }
    assert {each["round"]: each["rows"] for each in found["overlap"]} == expected
    assert found["overlap"][0]["share"] == expected[1] / len(rows[2])
    assert found["drawn"]["distinct"] == len(rows[2])
    shares = {each["source"]: each["share_of_pool"] for each in found["sources"]}
    assert all(
        shares[name] == pytest.approx({"first": 120 / 161, "second": 41 / 161}[name]) for name in shares
    )
    assert "overlap" not in as_json(mixed / "round-00" / "index.parquet")


@pytest.mark.parametrize("kind", ["pool", "target", "feature"])
def test_other_tables(mixed, kind):
    path = next((mixed / "features").glob("losses-*")) if kind == "feature" else mixed / kind
    found = as_json(path)
    assert found["kind"] == kind
    frame = pd.concat([pd.read_parquet(each) for each in sorted(path.glob("part-*"))])
    column = "loss" if kind == "feature" else "n_tokens"
    assert found["histogram"]["column"] == column
    numbers = {each["column"]: each for each in found["numbers"]}
    assert numbers[column]["mean"] == pytest.approx(frame[column].mean(), **LOOSE)
    assert (kind == "target") == ("groups" in found)
    assert as_json(next(path.glob("part-*")))["rows"] == len(frame)  # a part names its table
    text = done("inspect", path)
    assert all(each["meaning"] in text for each in found["columns"])


def test_the_run_at_one_look(mixed):
    found = as_json(mixed)
    assert [each["round"] for each in found["rounds"]] == [0, 1, 2]
    rows = [pd.read_parquet(mixed / f"round-{r:02d}" / "index.parquet")["row"] for r in range(3)]
    assert [each["rows"] for each in found["rounds"]] == [each.nunique() for each in rows]
    share = len(set(rows[2]) & set(rows[1])) / rows[2].nunique()
    assert found["rounds"][2]["already_in_round_before"] == share
    marker = json.loads((mixed / "round-01" / "checkpoint" / "COMPLETE.json").read_text())
    assert found["rounds"][1]["train_loss"] == marker["result"]["train_loss"]
    on_disk = {str(path.relative_to(mixed)) for path in mixed.glob("round-*/**/*.parquet")}
    assert on_disk < {each["path"] for each in found["tables"]}
    text = done("inspect", mixed)
    named = re.search(r"dataflex inspect (\S+loss\.parquet)", text)
    assert Path(named[1]).is_file()


def test_a_feature_is_named_after_the_checkpoint_that_it_was_computed_with(mixed):
    views = {table.view: table for table in tables_of(RunFolder(mixed)) if table.kind == "feature"}
    assert set(views) == {"losses_pool_after_0", "losses_pool_after_1"}
    score = pd.read_parquet(mixed / "round-02" / "scores" / "loss.parquet")["loss"]
    loss = pd.read_parquet(views["losses_pool_after_1"].files[0])["loss"]
    assert loss.equals(score)


def test_a_table_outside_of_its_run_still_says_what_it_is(mixed, here):
    shutil.copy2(mixed / "round-01" / "scores" / "loss.parquet", here / "copy.parquet")
    found = as_json("copy.parquet")
    assert (found["kind"], found["name"], found["facts"]["round"]) == ("scores", "loss", "1")
    assert "sources" not in found
    assert "messages" not in found["examples"]["top"][0]
    pd.DataFrame({"a": [1.5, 2.5]}).to_parquet(here / "foreign.parquet")
    assert as_json("foreign.parquet")["histogram"]["column"] == "a"


def test_tables_set_aside_or_cut_off_are_none(here, tiny_demo):
    run = copied(tiny_demo, here / "runs")
    before = {table.view for table in tables_of(RunFolder(run))}
    feature = next((run / "features").glob("losses-*"))
    shutil.copytree(feature, feature.with_name(feature.name + ".old-20260101-000000"))
    (feature / "_manifest.json").unlink()
    assert len(tables_of(RunFolder(run))) == len(before) - 1


# Queries


def test_a_query_over_all_views(mixed):
    text = done(
        "inspect",
        mixed,
        "--csv",
        "--sql",
        "select round, method, avg(score) m from scores group by all order by 1",
    )
    lines = list(csv.DictReader(io.StringIO(text)))
    means = [pd.read_parquet(mixed / f"round-{r:02d}/scores/loss.parquet")["score"].mean() for r in (1, 2)]
    assert [(each["round"], each["method"]) for each in lines] == [("1", "loss"), ("2", "loss")]
    assert [float(each["m"]) for each in lines] == pytest.approx(means)
    views = {each["name"] for each in json.loads(done("inspect", mixed, "--json", "--sql", "show tables"))}
    assert {"scores", "probabilities", "idx", "pool", "target", "features", "losses_pool_after_0"} <= views
    joined = "select count(*) n from idx join pool using (row) where source = 'first'"
    index = pd.concat([pd.read_parquet(path) for path in mixed.glob("round-*/index.parquet")])
    expected = (index.merge(pool_frame(mixed), on="row")["source"] == "first").sum()
    assert json.loads(done("inspect", mixed, "--json", "--sql", joined)) == [{"n": expected}]
    table = mixed / "round-01" / "scores" / "loss.parquet"
    assert "164" in done("inspect", table, "--sql", "select count(*) from this")


def test_long_answers_are_cut_for_people_only(mixed):
    query = ("--sql", "select row from pool order by row")
    text = done("inspect", mixed, *query)
    assert "The first 40 lines are shown" in text
    assert len(json.loads(done("inspect", mixed, "--json", *query))) == 164
    assert len(done("inspect", mixed, "--csv", *query).splitlines()) == 165


def test_values_that_json_does_not_have(mixed):
    query = "select 'nan'::double a, 'inf'::double b, 1.5::decimal(4,2) c, date '2026-01-02' d, [1, null] e"
    assert json.loads(done("inspect", mixed, "--json", "--sql", query)) == [
        {"a": None, "b": None, "c": 1.5, "d": "2026-01-02", "e": [1, None]}
    ]


@pytest.mark.parametrize(
    "query",
    [
        "copy (select 1) to '{here}/out.csv'",
        "copy scores to '{run}/pool/part-00000.parquet'",
        "select 1; select 2",
        "drop view scores",
        "set threads = 1",
        "attach '{here}/x.db'",
        "install httpfs",
        "select * from read_text('{here}/secret.txt')",
        "select * from '{here}/secret.csv'",
        "select * from read_parquet('http://127.0.0.1:9/x.parquet')",
        "select content from read_text('{run}/run.yaml')",
        "create table t as select 1",
        "",
        "selec 1",
        "select nothing from scores",
        "select score::date from scores",
    ],
)
def test_queries_only_read_the_tables(here, tiny_demo, query):
    run = copied(tiny_demo, here / "runs")
    for name in ("secret.txt", "secret.csv"):
        (here / name).write_text("a\nsecret\n")
    error = refused(here, "inspect", run, "--sql", query.format(here=here, run=run))
    assert "secret\n" not in error.replace("/secret", "")


# What it looks like, and mistakes


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_the_terminal(mixed, monkeypatch, width):
    from rich.console import Console

    from dataflex_pipeline.terminal import console

    drawn = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "out", drawn)
    monkeypatch.chdir(mixed)
    for path in ("round-01/scores/loss.parquet", "round-02/index.parquet", "pool", "."):
        done("inspect", path)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.file.getvalue())
    assert "█" in text
    facts = re.compile(r"  [\w /.-]+: |  /|  ask:")  # left to the terminal, so that they can be copied whole
    lines = [line.rstrip() for line in text.splitlines() if not facts.match(line)]
    assert [line for line in lines if len(line) > width] == []
    assert len(lines) > 150


def drawn_on(monkeypatch, width, *arguments):
    """Run a command on a terminal of some columns; return its lines without colours."""
    from rich.console import Console

    from dataflex_pipeline.terminal import console

    drawn = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "out", drawn)
    done(*arguments)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.file.getvalue())
    return [line.rstrip() for line in text.splitlines()]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 117, 120])
def test_on_no_terminal_is_a_number_or_a_name_cut_off(mixed, monkeypatch, width):
    """A number without its last digits is a wrong number; what does not fit is not drawn as a table."""
    monkeypatch.chdir(mixed)
    as_tsv = done("inspect", "round-01/scores/loss.parquet", "--rows", 0).splitlines()
    numbers = as_tsv[as_tsv.index("Numbers") + 1 :][:4]
    names, *rows = [line.split("\t") for line in numbers]
    shown = [names.index(name) for name in ("column", "min", "median", "max", "mean")]
    lines = drawn_on(monkeypatch, width, "inspect", "round-01/scores/loss.parquet", "--rows", 0)
    text = " ".join(" ".join(lines[lines.index("Numbers") :]).split())
    for row in rows:
        assert all(row[place] in text for place in shown)


def test_on_a_narrow_terminal_cells_stand_below_each_other(mixed, monkeypatch):
    monkeypatch.chdir(mixed)
    lines = drawn_on(monkeypatch, 40, "inspect", ".")
    rounds = lines[lines.index("Rounds") + 1 : lines.index("Tables")]
    assert max(map(len, rounds)) <= 40
    assert rounds[0].startswith("  round 0, method uniform,")


def test_two_forms_at_once_are_refused(mixed):
    ran = dataflex("inspect", mixed, "--json", "--csv")
    assert (ran.code, ran.out) == (2, "")
    assert "--json and --csv" in ran.err


def test_the_table_to_look_at_next_is_of_the_method_that_selected(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    done("score", "--run", "base", "--round", 2, "--method", "random", "runs_dir=runs")
    assert "dataflex inspect runs/base/round-02/scores/loss.parquet" in done("inspect", "base")


def test_text_of_the_data_cannot_command_the_terminal(mixed):
    text = done("inspect", mixed / "pool", "--rows", 200)
    assert "[31mred" in text
    assert "\x1b" not in text


def test_it_writes_nothing(here, tiny_demo):
    run = copied(tiny_demo, here / "runs")
    before = snapshot(here)
    done("inspect", run)
    done("inspect", "--run", "base", "round-01/index.parquet")
    done("inspect", "base", "--sql", "from scores")
    done("inspect", run / "pool", "--csv")
    assert snapshot(here) == before


def test_programs_get_nothing_but_json(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    ran = dataflex("inspect", "base", "runs_dir=runs", "--json")
    assert json.loads(ran.out)["run"] == "base"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "There is no run at runs/nowhere"),
        (("no/where.parquet",), "no/where.parquet does not exist"),
        (("text.md",), "is no table"),
        (("empty",), "is no table"),
        (("cut.parquet",), "cannot be read"),
        (("base", "other"), "Two things are named"),
        (("--run", "base", "round-07/index.parquet"), "is no table"),
    ],
)
def test_mistakes(here, tiny_demo, arguments, said):
    copied(tiny_demo, here / "runs")
    (here / "text.md").write_text("PAR or not")
    (here / "empty").mkdir()
    whole = (finished(tiny_demo) / "round-01" / "index.parquet").read_bytes()
    (here / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    assert said in refused(here, "inspect", *arguments)


def test_a_damaged_page_is_an_error_and_no_number(here, tiny_demo):
    path = copied(tiny_demo, here / "runs") / "round-01" / "scores" / "loss.parquet"
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(2)
    start = column.data_page_offset
    content[start + 30 : start + column.total_compressed_size - 4] = os.urandom(
        column.total_compressed_size - 34
    )
    path.write_bytes(content)
    assert "A table cannot be read" in refused(here, "inspect", path)
