"""The viewer's application: what it answers, and what it refuses."""

import importlib.metadata
import io
import json

import pandas as pd
import pyarrow as pa
import pytest
from made_run import add_scores, add_selection, make_run

from dataflex_pipeline.api import Silent
from dataflex_pipeline.errors import UserError
from dataflex_pipeline.reports.joined import joined_table
from dataflex_pipeline.reports.viewer import serve as viewer
from dataflex_pipeline.reports.viewer.page import SEARCHED, properties

HOSTILE = "</script><script>alert(1)</script>\x1b[31m\u202e<!--"
HERE = {"host": "127.0.0.1:5055"}


@pytest.fixture
def run(tmp_path):
    conversations = [
        [("user", f"ask {n}"), ("assistant", HOSTILE if n == 3 else f"say {n}")] for n in range(9)
    ]
    run = make_run(tmp_path / "run", conversations)
    add_scores(run, 1, "loss", [float(n) for n in range(9)])
    add_selection(run, 1, [8, 3])
    return run


@pytest.fixture
def page(run, tmp_path):
    """A client of the application; relative addresses are below its secret word."""
    testing = pytest.importorskip("starlette.testclient", reason="the extra `view` is not installed")
    static = tmp_path / "static"
    static.mkdir()
    (static / "index.html").write_text("<p>page</p>")
    with joined_table(run, Silent()) as joined, viewer.database(joined.path) as connection:
        app = viewer.make_app(connection, static, "word", properties(joined, "run"))
        with testing.TestClient(app, base_url="http://127.0.0.1:5055/word/") as client:
            yield client


def ask(page, sql, kind="json"):
    return page.post("data/query", json={"sql": sql, "type": kind})


def test_it_answers_queries_in_both_forms(page):
    assert page.get("").text == "<p>page</p>"
    assert page.get("data/metadata.json").json()["database"] == {"type": "rest"}
    assert ask(page, "select count(*) as n from dataset").json() == [{"n": 9}]
    answer = ask(page, "select row, response from dataset order by row", "arrow")
    table = pa.ipc.open_stream(io.BytesIO(answer.content)).read_all()
    assert table.column("row").to_pylist() == list(range(9))
    assert table.column("response").to_pylist()[3] == HOSTILE
    assert ask(page, "describe dataset", "arrow").status_code == 200
    assert ask(page, "select 1 where false", "arrow").status_code == 200
    asked = json.dumps({"sql": "select 1 as one", "type": "json"})
    assert page.get("data/query", params={"query": asked}).json() == [{"one": 1}]


@pytest.mark.parametrize(
    "sql",
    [
        "drop view dataset",
        "create table mine as select 1",
        "copy dataset to '{path}'",
        "select 1; select 2",
        "set enable_external_access = true",
        "attach '{path}.db'",
        "install httpfs",
        "select * from read_csv('/etc/passwd')",
        "select * from read_text('{path}.txt')",
        "select * from 'https://example.com/a.parquet'",
        "select * from glob('/etc/*')",
        "select nothing from dataset",
    ],
)
def test_a_query_reads_the_table_and_nothing_else(page, run, sql):
    path = run.folder / "view" / "rows.parquet"
    (run.folder / "view" / "rows.parquet.txt").write_text("secret")
    before = path.read_bytes()
    answer = ask(page, sql.format(path=path), "exec")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert path.read_bytes() == before
    assert ask(page, "select count(*) as n from dataset").json() == [{"n": 9}]


def added(name, value):
    column = f'"__ev_{name}_id"'
    return (
        f"\n ALTER TABLE dataset ADD COLUMN IF NOT EXISTS {column} INTEGER DEFAULT 0;"
        f"\n UPDATE dataset\n SET {column} =\n {value}\n"
    )


def test_a_colour_of_the_map_is_a_column_that_is_computed(page, run):
    """What the page asks for, against the same statements on a real table of DuckDB."""
    import duckdb

    statements = [
        added(
            "selected",
            "CASE \"selected\"::TEXT WHEN 'no' THEN 0 ELSE (CASE WHEN false THEN 2 ELSE 3 END) END",
        ),
        'UPDATE dataset SET "__ev_selected_id" = "__ev_selected_id" - 1 WHERE "__ev_selected_id" = 3',
        added("row", 'nullif(floor("row" / 2), 1)'),
        'UPDATE dataset SET "__ev_row_id" = 9 WHERE "__ev_row_id" IS NULL',
        added("selected", "CASE WHEN \"selected\" = 'no' THEN 5 ELSE 6 END"),
    ]
    path = run.folder / "view" / "rows.parquet"
    before = path.read_bytes()
    with duckdb.connect() as table:
        table.execute(f"create table dataset as from '{path}'")
        for statement in statements:
            table.execute(statement)
            assert ask(page, statement, "exec").status_code == 200
            lines = table.sql("from dataset order by row").to_arrow_table().to_pylist()
            assert ask(page, "from dataset order by row").json() == lines
    assert path.read_bytes() == before
    names = page.post("data/selection", json={"predicate": None, "format": "json"}).json()[0]
    assert not [name for name in names if name.startswith("__")]
    assert (
        ask(page, added("row", "1 from rows_of_the_file; drop view dataset; select 1"), "exec").status_code
        == 500
    )
    assert ask(page, 'UPDATE dataset SET "row" = 1 WHERE true', "exec").status_code == 500
    assert ask(page, "select count(*) as n from dataset").json() == [{"n": 9}]


def test_the_rows_of_a_filter_are_downloaded(page):
    def get(kind, predicate="row in (3, 8)"):
        return page.post("data/selection", json={"predicate": predicate, "format": kind})

    lines = [json.loads(line) for line in get("jsonl").text.splitlines()]
    assert [line["row"] for line in lines] == [3, 8]
    assert lines[0]["response"] == HOSTILE
    assert get("json").json() == lines
    assert pd.read_csv(io.BytesIO(get("csv").content))["rank_1_loss"].tolist() == [6, 1]
    assert pd.read_parquet(io.BytesIO(get("parquet", None).content)).shape[0] == 9
    assert get("csv", "row = 1; drop view dataset").status_code == 500
    assert get("exe").status_code == 500


def test_others_are_kept_out(page):
    data = "data/metadata.json"
    assert page.get(data, headers={"host": "rebound.example"}).status_code == 400
    assert page.get(data, headers={"host": "localhost:6000"}).status_code == 200  # a forwarded port
    assert page.get(data, headers={**HERE, "origin": "http://evil.example"}).status_code == 403
    assert page.get(data, headers={**HERE, "origin": "http://127.0.0.1:9999"}).status_code == 403
    assert page.get(data, headers={**HERE, "origin": "null"}).status_code == 403
    answer = page.get(data, headers={**HERE, "origin": "http://127.0.0.1:5055"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy.replace("wasm-unsafe-eval", "")
    assert "http" not in policy
    for other in ("/", "/data/metadata.json", "/guess/data/metadata.json"):
        assert page.get(f"http://127.0.0.1:5055{other}").status_code == 404


def test_what_the_page_keeps_lives_as_long_as_the_server(page):
    assert page.get("data/cache/state").status_code == 204
    page.post("data/cache/state", json={"charts": {}})
    assert page.get("data/cache/state").json() == {"charts": {}}


def test_the_page_begins_with_the_charts_of_the_table(run):
    with joined_table(run, Silent()) as joined:
        told = properties(joined, "mine")
        charts = list(told["initialState"]["charts"].values())
        fields = [chart["data"]["field"] for chart in charts if chart.get("type") == "count-plot"]
        assert fields == ["selected", "source", "valid"]
        (rows,) = [chart for chart in charts if chart.get("type") == "instances"]
        assert rows["sort"] == [{"column": "rank_1_loss", "direction": "ascending"}]
        assert told["data"] == {"id": "row", "text": "prompt"}
        large = properties(type(joined)(joined.path, SEARCHED + 1, (), (), (), False), "mine")
        assert large["data"]["text"] == "source"  # the search would read every prompt into the browser
        assert "prompt ilike" in large["initialState"]["charts"]["1"]["content"]


@pytest.mark.parametrize(("found", "said"), [(None, "not installed"), ("0.99.0", "is 0.99.0 here")])
def test_a_missing_or_foreign_tool_is_refused(monkeypatch, found, said):
    def version(name):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(viewer, "version", version)
    monkeypatch.setattr(
        viewer, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None, origin="x")
    )
    with pytest.raises(UserError, match=said) as caught:
        viewer.front_end()
    assert "pip install 'dataflex-pipeline[view]'" in caught.value.fix


def test_a_taken_port_gives_way_to_a_free_one():
    with viewer.listening(0) as first:
        host, port = first.getsockname()
        assert host == "127.0.0.1"
        with viewer.listening(port) as second:
            assert second.getsockname()[0] == "127.0.0.1"
            assert second.getsockname()[1] != port


def test_the_path_of_a_table_is_no_pattern(tmp_path):
    """A run beside it, which the name would match as a pattern, is not read."""
    for name, rows in (("a[1]", 2), ("a1", 5)):
        (tmp_path / name).mkdir()
        pd.DataFrame({"row": range(rows)}).to_parquet(tmp_path / name / "rows.parquet")
    with viewer.database(tmp_path / "a[1]" / "rows.parquet") as connection:
        assert connection.execute(f"select count(*) from {viewer.ROWS}").fetchone() == (2,)
