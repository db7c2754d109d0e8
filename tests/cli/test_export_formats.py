"""The rows of a pool of several formats, exported and read back: every row, with the row_id that it had."""

import csv
import json
from datetime import date, datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import done, refused
from data_fixtures import write_jsonl
from selections import row_ids, selected_lines

from dataflex_pipeline.api import Silent
from dataflex_pipeline.data.prepare import prepare
from dataflex_pipeline.data.scan import scan_sources
from dataflex_pipeline.data.settings import DataSettings
from dataflex_pipeline.data.sources.readers import read_rows
from dataflex_pipeline.export.formats import several_formats
from dataflex_pipeline.export.subset import write_info, write_subset

ADDED = {
    f"_{name}" for name in ("row", "row_id", "source", "file", "line", "score", "rank", "weight", "round")
}
CALL = {"name": "look", "arguments": {"at": None, "deep": 1}}


def alpaca(n):
    return {"instruction": f"Say {n}.", "input": "", "output": f"{n}"}


def messages(n):
    return {
        "messages": [{"role": "user", "content": f"Name {n}."}, {"role": "assistant", "content": f"N{n}"}]
    }


def sharegpt(n):
    return {"conversations": [{"from": "human", "value": f"Give {n}."}, {"from": "gpt", "value": f"G{n}"}]}


def make_sources(folder):
    """Write one source of every kind; return what dataset= says of them."""
    write_jsonl(folder / "a.jsonl", [alpaca(n) for n in range(6)])
    write_jsonl(folder / "b.jsonl", [messages(n) for n in range(6)])
    write_jsonl(folder / "c.jsonl", [sharegpt(n) for n in range(6)])
    write_jsonl(folder / "system.jsonl", [{**alpaca(n), "system": f"You are {n}."} for n in range(3)])
    write_jsonl(folder / "asked.jsonl", [{"question": f"Q{n}", "answer": f"A{n}"} for n in range(3)])
    write_jsonl(folder / "words.jsonl", [{"prompt": f"P{n}", "completion": f"C{n}"} for n in range(3)])
    write_jsonl(
        folder / "turns.jsonl",
        [
            {
                "prompt": [{"role": "user", "content": f"T{n}"}],
                "completion": [{"role": "assistant", "content": f"t{n}"}],
            }
            for n in range(2)
        ],
    )
    write_jsonl(
        folder / "spoken.jsonl",
        [
            {"talk": [{"who": "me", "says": f"M{n}"}, {"who": "you", "says": f"Y{n}"}], "tag": n}
            for n in range(2)
        ],
    )
    write_jsonl(
        folder / "calls.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"Look {n}."},
                    {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
                    {"role": "tool", "content": "seen"},
                    {"role": "assistant", "content": f"{n}"},
                ],
                "tools": json.dumps([{"name": "look", "parameters": {"type": "object"}}]),
            }
            for n in range(2)
        ],
    )
    with (folder / "d.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["instruction", "input", "output", "stars"])
        rows.writerows([[f"Line {n}, quoted", f"in {n}", f"out {n}\nand on", str(n)] for n in range(4)])
    entries = {
        "asked": {"file_name": "asked.jsonl", "columns": {"prompt": "question", "response": "answer"}},
        "spoken": {
            "file_name": "spoken.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "you"},
        },
    }
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return (
        "a.jsonl",
        "b.jsonl",
        "c.jsonl",
        "system.jsonl",
        "asked",
        "words.jsonl",
        "turns.jsonl",
        "spoken",
        "calls.jsonl",
        "d.csv",
    )


def prepared(tiny_demo, names, dataset_dir, folder):
    settings = DataSettings(tuple(names), str(dataset_dir), "chatml", 2048, None)
    scan = scan_sources(settings, Silent())
    return prepare(settings, scan, str(tiny_demo.model), "x", folder, "pool", Silent())


def written(pool, selected, folder, say):
    """Write the subset with what says how it is read."""
    made = write_subset(pool, selected, folder, say)
    write_info(folder, made.entries)
    return made


def everything(pool):
    """Select all rows, the last first."""
    return selected_lines(pool, list(range(pool.n_rows))[::-1])


def test_a_run_over_three_formats_read_back(tmp_path, monkeypatch, tiny_demo):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path)
    settings = (
        "dataset=a.jsonl,b.jsonl,c.jsonl",
        f"model_name_or_path={tiny_demo.model}",
        "warmup_step=3",
        "update_times=1",
        "per_device_train_batch_size=6",
        "--run",
        "mixed",
    )
    done("warmup", *settings)
    text = " ".join(done("export", "mixed", "--what", "data", "--round", 0, "export_dir=out").split())

    assert (
        "the selected rows are in 3 formats, so each has its file: selected-alpaca.jsonl (6 rows), "
        "selected-messages.jsonl (6 rows), selected-sharegpt.jsonl (6 rows)"
    ) in text
    assert "train on the same rows elsewhere: dataset=out/data" in text
    pool = pq.read_table(tmp_path / "runs/mixed/pool/part-00000.parquet").to_pylist()
    expected = {name: {row["row_id"] for row in pool if row["source"] == name} for name in "abc"}
    for name, label, own in (
        ("a", "alpaca", {"instruction", "input", "output"}),
        ("b", "messages", {"messages"}),
        ("c", "sharegpt", {"conversations"}),
    ):
        file = tmp_path / "out" / "data" / f"selected-{label}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        source = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(lines) == 6
        assert all(line.keys() == own | ADDED for line in lines)
        assert all({key: line[key] for key in own} in source for line in lines)
        for kind in ("jsonl", "parquet"):
            path = str(file.with_suffix(f".{kind}"))
            back = row_ids(prepared(tiny_demo, [path], "nowhere", tmp_path / f"back-{label}-{kind}"))
            assert back == [line["_row_id"] for line in lines]
            assert set(back) == expected[name]
    for given in ("out", "out/data"):
        whole = prepared(tiny_demo, [given], "nowhere", tmp_path / "whole" / given)
        assert sorted(row_ids(whole)) == sorted(row["row_id"] for row in pool)
    assert "up to date" in done("export", "mixed", "--what", "data", "--round", 0, "export_dir=out")


def test_every_kind_of_source_read_back(tmp_path, tiny_demo):
    names = make_sources(tmp_path)
    pool = prepared(
        tiny_demo, [str(tmp_path / n) if "." in n else n for n in names], tmp_path, tmp_path / "pool"
    )
    assert pool.summary["valid"] == 37
    selected = everything(pool)
    out = tmp_path / "out"
    out.mkdir()
    said = []
    notes = written(pool, selected, out, said.append)
    assert (notes.rows, notes.different_rows) == (37, 37)
    assert notes.files == {
        **{
            "selected-alpaca.jsonl": 13,  # a, system and d.csv: what only one names is empty in the others
            "selected-messages.jsonl": 8,
            "selected-sharegpt.jsonl": 6,
            "selected-alpaca-2.jsonl": 3,
            "selected-prompt_completion.jsonl": 3,
            "selected-prompt_completion-2.jsonl": 2,
            "selected-sharegpt-2.jsonl": 2,
        },
    }
    stems = [name.removesuffix(".jsonl") for name in notes.files]
    back = prepared(tiny_demo, stems, out, tmp_path / "back")
    assert sorted(row_ids(back)) == sorted(row_ids(pool))
    assert back.summary["valid"] == pool.summary["valid"]
    order = selected.column("row_id").to_pylist()
    entries = json.loads((out / "dataset_info.json").read_text())
    for stem in stems:
        jsonl = [json.loads(line) for line in (out / f"{stem}.jsonl").read_text().splitlines()]
        assert [each["_row_id"] for each in jsonl] == [
            each for each in order if each in {line["_row_id"] for line in jsonl}
        ]
        entry = entries.get(stem)
        columnar = tmp_path / f"{stem}-columnar"
        columnar.mkdir()
        if entry is not None:
            entry = {stem: {**entry, "file_name": str(out / f"{stem}.parquet")}}
            (columnar / "dataset_info.json").write_text(json.dumps(entry))
        given = stem if entry else str(out / f"{stem}.parquet")
        table = prepared(tiny_demo, [given], columnar, columnar / "back")
        assert row_ids(table) == [each["_row_id"] for each in jsonl]
    # a null inside the arguments of a call would be lost in a struct that has it for every row
    assert (
        "column messages holds values of several kinds: in selected-messages.parquet it is JSON text" in said
    )


def test_one_format_is_one_file(tmp_path, tiny_demo):
    make_sources(tmp_path)
    names = [str(tmp_path / name) for name in ("a.jsonl", "system.jsonl", "d.csv")]
    pool = prepared(tiny_demo, names, tmp_path, tmp_path / "pool")
    out = tmp_path / "out"
    out.mkdir()
    said = []
    assert written(pool, everything(pool), out, said.append).files == {"selected.jsonl": 13}
    assert said == []
    assert sorted(path.name for path in out.iterdir()) == [
        "dataset_info.json",
        "selected.jsonl",
        "selected.parquet",
    ]
    for kind in ("jsonl", "parquet"):
        back = prepared(tiny_demo, [str(out / f"selected.{kind}")], "nowhere", tmp_path / kind)
        assert row_ids(back) == row_ids(pool)[::-1]


def test_a_column_that_only_one_source_was_told_to_read_keeps_them_apart(tmp_path, tiny_demo):
    """`hint` is a column like any other in the one, and the input of the other."""
    rows = [{"instruction": f"I{n}", "hint": f"H{n}", "output": f"O{n}"} for n in range(2)]
    write_jsonl(tmp_path / "plain.jsonl", rows)
    write_jsonl(tmp_path / "hinted.jsonl", rows)
    entry = {"prompt": "instruction", "query": "hint", "response": "output"}
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"hinted": {"file_name": "hinted.jsonl", "columns": entry}})
    )
    pool = prepared(tiny_demo, [str(tmp_path / "plain.jsonl"), "hinted"], tmp_path, tmp_path / "pool")
    out = tmp_path / "out"
    out.mkdir()
    files = written(pool, everything(pool), out, print).files
    assert files == {"selected-alpaca.jsonl": 2, "selected-alpaca-2.jsonl": 2}
    back = prepared(tiny_demo, ["selected-alpaca", "selected-alpaca-2"], out, tmp_path / "back")
    assert sorted(row_ids(back)) == sorted(row_ids(pool))
    assert len(set(row_ids(pool))) == 4


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"default": None}}}}],
        [{"name": "f", "parameters": {}}],
        [{"name": "f", "parameters": {"n": 1}}, {"name": "g", "parameters": {"n": 1.5}}],
    ],
    ids=["null", "empty", "whole-and-fraction"],
)
def test_tools_that_columns_cannot_hold_stay_text(tmp_path, tiny_demo, tools):
    write_jsonl(tmp_path / "t.jsonl", [{**messages(n), "tools": tools} for n in range(2)])
    pool = prepared(tiny_demo, [str(tmp_path / "t.jsonl")], tmp_path, tmp_path / "pool")
    out = tmp_path / "out"
    out.mkdir()
    written(pool, everything(pool), out, print)
    assert [json.loads(text) for text in pq.read_table(out / "selected.parquet")["tools"].to_pylist()] == [
        tools,
        tools,
    ]
    lines = [json.loads(line) for line in (out / "selected.jsonl").read_text().splitlines()]
    assert [line["tools"] for line in lines] == [tools, tools]


def test_half_a_character_is_exported_as_it_came(tmp_path, tiny_demo):
    row = {**alpaca(0), "note": "half \ud800 pair"}
    (tmp_path / "h.jsonl").write_text(json.dumps(row) + "\n")
    pool = prepared(tiny_demo, [str(tmp_path / "h.jsonl")], tmp_path, tmp_path / "pool")
    out = tmp_path / "out"
    out.mkdir()
    written(pool, everything(pool), out, print)
    assert json.loads((out / "selected.jsonl").read_text())["note"] == row["note"]


def test_an_older_export_of_several_formats_is_not_taken_for_this_one(tmp_path, monkeypatch, tiny_demo):
    monkeypatch.chdir(tmp_path)
    make_sources(tmp_path)
    settings = ("dataset=a.jsonl,b.jsonl", f"model_name_or_path={tiny_demo.model}", "warmup_step=1")
    done("warmup", *settings, "update_times=1", "per_device_train_batch_size=2", "--run", "mixed")
    done("export", "mixed", "--what", "data", "--round", 0, "export_dir=out")
    manifest = tmp_path / "out" / "dataflex_export.json"
    content = json.loads(manifest.read_text())
    del content["ingredients"]["formats"]
    manifest.write_text(json.dumps(content))
    assert "formats: (not set) -> [" in refused(
        tmp_path, "export", "mixed", "--what", "data", "--round", 0, "export_dir=out"
    )


def call(n):
    """Turns with a null that means something, which columns of structs cannot hold."""
    asked = [
        *messages(n)["messages"][:1],
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
        {"role": "tool", "content": "seen"},
    ]
    return {"prompt": asked, "completion": [{"role": "assistant", "content": f"C{n}"}]}


MIXED = [
    *({**messages(n), "tag": n} for n in range(3)),
    *({**alpaca(n), "tag": f"t{n}"} for n in range(3)),
    *(sharegpt(n) for n in range(3)),
    *({"prompt": f"P{n}", "completion": f"C{n}"} for n in range(3)),
    *(call(n) for n in range(2)),
]


def test_one_file_of_several_formats_read_back(tmp_path, tiny_demo):
    write_jsonl(tmp_path / "m.jsonl", MIXED)
    pool = prepared(tiny_demo, [str(tmp_path / "m.jsonl")], tmp_path, tmp_path / "pool")
    assert pool.summary["valid"] == 14
    assert len(several_formats(pool)) == 4
    out = tmp_path / "out"
    out.mkdir()
    said = []
    notes = written(pool, everything(pool), out, said.append)
    files = {
        "selected-messages.jsonl": 3,
        "selected-sharegpt.jsonl": 3,
        "selected-alpaca.jsonl": 3,
        "selected-prompt_completion.jsonl": 3,
        "selected-prompt_completion-2.jsonl": 2,
    }
    assert (notes.rows, notes.different_rows, notes.files) == (14, 14, files)
    listed = ", ".join(f"{name} ({count} rows)" for name, count in files.items())
    assert said[-1] == f"the selected rows are in 5 formats, so each has its file: {listed}"
    entries = json.loads((out / "dataset_info.json").read_text())
    assert {name: entry["formatting"] for name, entry in entries.items()} == {
        "selected-messages": "sharegpt",
        "selected-sharegpt": "sharegpt",
        "selected-alpaca": "alpaca",
    }
    expected = sorted(row_ids(pool))
    stems = [name.removesuffix(".jsonl") for name in files]
    back = prepared(tiny_demo, stems, out, tmp_path / "back")
    assert (back.summary["valid"], sorted(row_ids(back))) == (14, expected)
    for kind in ("jsonl", "parquet"):
        paths = [str(out / f"{stem}.{kind}") for stem in stems]
        table = prepared(tiny_demo, paths, "nowhere", tmp_path / f"back-{kind}")
        assert (table.summary["valid"], sorted(row_ids(table))) == (14, expected)


def test_json_text_in_an_exported_parquet_file_is_read_as_what_it_stands_for(tmp_path, tiny_demo):
    rows = [
        {**alpaca(0), "input": "", "beside": "plain"},
        {**alpaca(1), "beside": ["a", None]},
        {**alpaca(2), "beside": {"n": 1, "no": None}},
    ]
    write_jsonl(tmp_path / "s.jsonl", [*rows, {**call(3), "beside": 4}])
    pool = prepared(tiny_demo, [str(tmp_path / "s.jsonl")], tmp_path, tmp_path / "pool")
    out = tmp_path / "out"
    out.mkdir()
    said = []
    written(pool, everything(pool), out, said.append)
    assert "column beside holds values of several kinds: in selected-alpaca.parquet it is JSON text" in said
    for stem in ("selected-alpaca", "selected-prompt_completion"):
        columnar, lines = (list(read_rows(out / f"{stem}.{kind}")) for kind in ("parquet", "jsonl"))
        assert columnar == [
            {key: value for key, value in line.items() if value is not None} for line in lines
        ]
    field = pq.read_schema(out / "selected-prompt_completion.parquet").field("prompt")
    assert field.metadata == {b"encoding": b"json"}
    # a file of someone else, without the mark, stays as it is
    table = pq.read_table(out / "selected-alpaca.parquet").replace_schema_metadata()
    pq.write_table(table, tmp_path / "plain.parquet")
    assert [row["beside"] for row in read_rows(tmp_path / "plain.parquet")] == [
        '{"n": 1, "no": null}',
        '["a", null]',
        '"plain"',
    ]


def test_what_json_has_not_is_exported_as_text_and_said(tmp_path, tiny_demo):
    rows = [
        {**alpaca(n), "when": datetime(2024, 5, n + 1, 6), "raw": b"\x01\xff", "price": Decimal("1.50")}
        | {"inside": {"days": [date(2024, 5, 6)]}, "stars": n}
        for n in range(2)
    ]
    table = pa.Table.from_pylist(rows)
    table = table.append_column("exact", pa.array([1, 2], pa.timestamp("ns")))
    pq.write_table(table, tmp_path / "t.parquet")
    pool = prepared(tiny_demo, [str(tmp_path / "t.parquet")], tmp_path, tmp_path / "pool")
    out = tmp_path / "out"
    out.mkdir()
    said = []
    notes = written(pool, everything(pool), out, said.append)
    as_text = {
        "exact": "dates and times",
        "inside": "dates",
        "price": "decimal numbers",
        "raw": "bytes (as hexadecimal digits)",
        "when": "dates and times",
    }
    assert notes.as_text == as_text
    assert said == [
        f"column {name} holds {what} in its source: exported as text" for name, what in as_text.items()
    ]
    for kind in ("jsonl", "parquet"):
        [_, first] = read_rows(out / f"selected.{kind}")
        shown = {key: first[key] for key in ("when", "raw", "price", "inside", "stars")}
        assert shown == {
            "when": "2024-05-01 06:00:00",
            "raw": "01ff",
            "price": "1.50",
            "inside": {"days": ["2024-05-06"]},
            "stars": 0,
        }
