"""Where data comes from: file kinds, names, dataset_info.json, the hub, and what is said when it fails."""

from __future__ import annotations

import csv
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import Lines, alpaca_rows, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataflex_pipeline.data import DataSettings, scan_sources
from dataflex_pipeline.data.sources.readers import read_rows
from dataflex_pipeline.errors import DataError

ROWS = [
    {"instruction": "1+1?", "input": "", "output": "2", "level": 1, "score": 0.5, "ok": True},
    {
        "instruction": "Grüße 你好",
        "input": "x",
        "output": 'a "b", c\nd',
        "level": 2,
        "score": 1.0,
        "ok": False,
    },
    {"instruction": "last", "input": "", "output": "z", "level": 3, "score": 2.0, "ok": True},
]


def wanted(folder: Path, *names: str, **more) -> DataSettings:
    return DataSettings(names, str(folder), "chatml", 128, more.pop("max_samples", None), **more)


def write_csv(path: Path, rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path: Path, stream: bool) -> None:
    table = pa.Table.from_pylist(ROWS)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_kind(path: Path, kind: str) -> None:
    match kind:
        case "json":
            path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=2), encoding="utf-8")
        case "json lines in .json" | "jsonl" | "ndjson":
            write_jsonl(path, ROWS)
        case "csv":
            write_csv(path, ROWS)
        case "parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)
        case "arrow file" | "arrow stream":
            write_arrow(path, kind == "arrow stream")


KINDS = {
    "json": ".json",
    "json lines in .json": ".json",
    "jsonl": ".jsonl",
    "ndjson": ".ndjson",
    "csv": ".csv",
    "parquet": ".parquet",
    "arrow file": ".arrow",
    "arrow stream": ".arrow",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = tmp_path / f"data{KINDS[kind]}"
    write_kind(path, kind)
    expected = [{key: str(value) for key, value in row.items()} for row in ROWS] if kind == "csv" else ROWS
    assert list(read_rows(path)) == expected


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_scan_counts_types_and_digest_do_not_depend_on_the_kind(tmp_path, kind):
    path = tmp_path / f"data{KINDS[kind]}"
    write_kind(path, kind)
    scan = scan_sources(wanted(tmp_path, "data"))
    assert scan.n_rows == 3
    assert {each.name: each.kind for each in scan.columns} == {
        "instruction": "text",
        "input": "text",
        "output": "text",
        "level": "integer",
        "score": "number",
        "ok": "boolean",
    }
    other = write_jsonl(tmp_path / "other.jsonl", ROWS)
    assert scan.sources[0].digest == scan_sources(wanted(tmp_path, str(other))).sources[0].digest
    changed = write_jsonl(tmp_path / "changed.jsonl", [{**ROWS[0], "output": "3"}, *ROWS[1:]])
    assert scan.sources[0].digest != scan_sources(wanted(tmp_path, str(changed))).sources[0].digest


@example(rows=[{"a": "b", "n": 1}, {"a": -(2**63)}, {"a": 2**63 - 1, "f": 0.1}])
@example(rows=[{"a": 0.1}, {"a": [10**30, {"b": [0.1, None]}]}, {"a": "c", "n": 1.5}])
@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4),
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**63 - 1)
            | st.text(st.characters(exclude_categories=["Cs"])),
            max_size=4,
        ),
        min_size=1,
        max_size=5,
    )
)
def test_json_and_json_lines_read_what_json_wrote(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    write_jsonl(folder / "a.jsonl", rows)
    assert list(read_rows(folder / "a.json")) == rows
    assert list(read_rows(folder / "a.jsonl")) == rows


BROKEN = [
    ("a.jsonl", b'{"a": 1}\n{"a": }\n', "line 2, column 7: not valid JSON"),
    ("a.jsonl", b'{"a": 1}\n\n[1]\n', "line 3: the row is a list, not an object"),
    ("a.jsonl", '{"a": "é"}\n'.encode() + b'{"a": "\xe9"}\n', "line 2, is not UTF-8"),
    ("a.json", b'[{"a": 1},\n {"a": 2}\n {"a": 3}]', r"line 3, column 2: not valid JSON \(unexpected text\)"),
    ("a.json", b'[{"a": 1},\n {"a": 2}', r"line 2, column 10: not valid JSON \(the file ends too early\)"),
    ("a.json", b'[{"a": 1}, 5]', "item 2: the row is a number, not an object"),
    ("a.json", b'[{"a": 1}, null]', "item 2: the row is null, not an object"),
    ("a.json", b'[{"a": "x"},\n{"a": "\xe9"}]', "line 2, is not UTF-8"),
    ("a.json", b'{\n "data": [{"a": 1}]\n}', "holds one JSON object at its top level"),
    ("a.json", b'"text"', "line 1, column 1: not valid JSON"),
    (
        "a.jsonl",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "line 1: .*nests deeper than 200",
    ),
    ("a.json", b"  \n ", "is empty"),
    ("a.json", b"", "is empty"),
    ("a.jsonl", "utf16".encode("utf-16"), "is not UTF-8"),
    ("a.csv", b"a,b\n1,2\n1,2,3\n", "line 3: 3 fields where the first line names 2 columns"),
    ("a.csv", b'a,b\n1,"2\n', "line 2: not valid CSV"),
    ("a.csv", b"a,a\n1,2\n", "line 1: the column names are"),
    ("a.csv", b"a,b\n1,\xe9\n", "line 2, is not UTF-8"),
    ("a.parquet", b"PAR1 not really", "cannot be read as Parquet"),
    ("a.arrow", b"neither stream nor file", "cannot be read as Arrow"),
    ("a.arrow", b"ARROW1 cut off", "cannot be read as Arrow"),
    ("a.txt", b"text", "has the extension '.txt'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[case[2][:40] for case in BROKEN])
def test_broken_files_are_told_with_their_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value) or name == "a.parquet"
    assert len(str(caught.value).splitlines()) == 3


@settings(max_examples=40, deadline=None)
@given(before=st.integers(0, 300), filler=st.integers(0, 700))
def test_place_of_an_error_is_exact_wherever_blocks_end(tmp_path_factory, before, filler):
    path = tmp_path_factory.mktemp("place") / "a.json"
    lines = [json.dumps({"a": "x" * filler}) + "," for _ in range(before)]
    path.write_text("[" + "\n".join([*lines, '   {"a": !}']) + "]")
    with pytest.raises(DataError, match=f"line {before + 1}, column {10 + (before == 0)}:"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "[]"), ("a.csv", "instruction,output\n"), ("a.jsonl", "\n\n")]
)
def test_files_without_rows_are_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="has no rows"):
        scan_sources(wanted(tmp_path, name))


def test_byte_order_mark_is_no_part_of_the_data(tmp_path):
    for name in ("a.json", "b.jsonl"):
        (tmp_path / name).write_text('[{"a": 1}]' if name == "a.json" else '{"a": 1}', encoding="utf-8-sig")
        assert list(read_rows(tmp_path / name)) == [{"a": 1}]
    (tmp_path / "c.csv").write_text("a\n1\n", encoding="utf-8-sig")
    assert list(read_rows(tmp_path / "c.csv")) == [{"a": "1"}]


def test_folder_is_read_by_name_and_only_its_data_files(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", alpaca_rows(2))
    (folder / "a.json").write_text(json.dumps([{"instruction": "first", "input": "", "output": "x"}]))
    (folder / "README.md").write_text("not data")
    (folder / "dataset_info.json").write_text("{}")
    scan = scan_sources(wanted(tmp_path, "many"))
    assert [row["instruction"] for _, row in scan.rows()] == ["first", "question 0", "question 1"]
    assert scan.sources[0].source.name == "many"
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"'none' is the folder .*which holds nothing"):
        scan_sources(wanted(tmp_path, "none"))


def test_several_data_sets_keep_their_order_and_get_names_of_their_own(tmp_path):
    (tmp_path / "sub").mkdir()
    write_jsonl(tmp_path / "a.jsonl", alpaca_rows(3))
    write_jsonl(tmp_path / "sub" / "a.jsonl", alpaca_rows(2))
    scan = scan_sources(wanted(tmp_path, "a", str(tmp_path / "sub" / "a.jsonl"), max_samples=2))
    assert [(each.source.name, each.n_rows) for each in scan.sources] == [("a", 2), ("a-2", 2)]
    assert [number for number, _ in scan.rows()] == [0, 0, 1, 1]


def test_max_samples_stops_reading_there(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", alpaca_rows(3))
    with path.open("a") as stream:
        stream.write("broken\n")
    assert scan_sources(wanted(tmp_path, "a", max_samples=3)).n_rows == 3
    with pytest.raises(DataError, match="line 4"):
        scan_sources(wanted(tmp_path, "a"))


def test_name_is_looked_for_as_entry_then_path_then_below_dataset_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "data"
    base.mkdir()
    write_jsonl(tmp_path / "mine.jsonl", alpaca_rows(1))
    write_jsonl(base / "mine.jsonl", alpaca_rows(2))
    write_jsonl(base / "entry.jsonl", alpaca_rows(3))
    assert scan_sources(wanted(base, "mine.jsonl")).n_rows == 1
    assert scan_sources(wanted(base, "mine")).n_rows == 2
    (base / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "entry.jsonl"}}))
    assert scan_sources(wanted(base, "mine")).n_rows == 3


def test_folder_without_data_does_not_hide_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / ".hidden.jsonl").write_text("broken")
    base = tmp_path / "data"
    base.mkdir()
    write_jsonl(base / "demo.jsonl", alpaca_rows(4))
    assert scan_sources(wanted(base, "demo")).n_rows == 4


def test_unreadable_file_is_told(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", alpaca_rows(1))
    opened = Path.open

    def refusing(self, *args, **more):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **more)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read \(Permission denied\)"):
        scan_sources(wanted(tmp_path, "a"))


@pytest.mark.parametrize("name", ["no_such.json", "./mine", "/nowhere/x", "a/b/c", "alpaca_en_dem"])
def test_what_looks_like_a_path_or_a_typing_error_never_reaches_the_network(tmp_path, monkeypatch, name):
    write_jsonl(tmp_path / "alpaca_en_demo.jsonl", alpaca_rows(1))

    def no_network(*_args, **_more):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("dataflex_pipeline.data.sources.named.read_hub", no_network)
    with pytest.raises(DataError, match="is not there") as caught:
        scan_sources(wanted(tmp_path, name))
    assert "Looked for an entry of" in str(caught.value)
    assert ("Did you mean 'alpaca_en_demo'" in str(caught.value)) is (name == "alpaca_en_dem")


def test_hub_name_goes_through_load_dataset(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, **more):
        asked.append((*names, more))
        return datasets.Dataset.from_list(alpaca_rows(2500))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("dataflex_pipeline.data.sources.hub.hub_reachable", lambda: True)
    scan = scan_sources(wanted(tmp_path, "owner/set"))
    assert asked == [("owner/set", {"name": None, "data_dir": None, "split": "train"})]
    assert [row["output"] for _, row in scan.rows()] == [f"answer {n}" for n in range(2500)]
    info = {"x": {"hf_hub_url": "owner/x", "subset": "en", "split": "test", "folder": "f", "num_samples": 7}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert scan_sources(wanted(tmp_path, "x")).n_rows == 7
    assert asked[-1] == ("owner/x", {"name": "en", "data_dir": "f", "split": "test"})


def test_hub_name_that_cannot_be_loaded_says_so(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*_names, **_more):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/set' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("dataflex_pipeline.data.sources.hub.hub_reachable", lambda: True)
    with pytest.raises(DataError, match="neither a local file") as caught:
        scan_sources(wanted(tmp_path, "owner/set"))
    assert "DatasetNotFoundError: Dataset 'owner/set' doesn't exist" in caught.value.why
    monkeypatch.setattr("dataflex_pipeline.data.sources.hub.hub_reachable", lambda: False)
    with pytest.raises(DataError, match="no network here"):
        scan_sources(wanted(tmp_path, "owner/set"))


def test_local_folder_of_a_saved_data_set_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_list(alpaca_rows(5)).save_to_disk(tmp_path / "saved")
    scan = scan_sources(wanted(tmp_path, "saved"))
    assert [row["instruction"] for _, row in scan.rows()] == [f"question {n}" for n in range(5)]


ENTRY_ERRORS = [
    ({"file_name": "gone.json"}, "which is not there"),
    ({"columns": {}}, "has no file_name"),
    ({"file_nam": "a.json"}, "Did you mean 'file_name'"),
    ({"script_url": "x"}, "loading scripts are remote code"),
    ({"file_name": "a.jsonl", "ranking": True}, "one prompt; rows here have one"),
    ({"file_name": "a.jsonl", "formatting": "chat"}, "The known ones are alpaca, sharegpt, openai"),
    ({"file_name": "a.jsonl", "columns": {"promt": "q"}}, "Did you mean 'prompt'"),
    ({"file_name": "a.jsonl", "columns": {"image": "pictures"}}, "columns has image"),
    ({"file_name": "a.jsonl", "columns": {"chosen": "good"}}, "sets columns: chosen"),
    ({"file_name": "a.jsonl", "columns": {"prompt": "instructoin"}}, "Did you mean 'instruction'"),
    ({"file_name": "a.jsonl", "tags": {"role": "x"}}, "tags has role"),
    ({"file_name": "a.jsonl", "num_samples": 0}, "1 or more"),
]


@pytest.mark.parametrize(("entry", "message"), ENTRY_ERRORS)
def test_entries_that_cannot_be_used_say_why(tmp_path, entry, message):
    write_jsonl(tmp_path / "a.jsonl", alpaca_rows(1))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(DataError, match=message):
        scan_sources(wanted(tmp_path, "x"))


def test_broken_dataset_info_is_told(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"x": \n}')
    with pytest.raises(DataError, match=r"dataset_info\.json, line 2"):
        scan_sources(wanted(tmp_path, "x"))


def test_unknown_format_names_the_columns_and_what_each_format_needs(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match="has the columns question, answer: no known format") as caught:
        scan_sources(wanted(tmp_path, "a"))
    for word in ("instruction", "conversations", "messages", "completion", "data_columns='{prompt: <column>"):
        assert word in str(caught.value)


@pytest.mark.parametrize("same_size_and_time", [False, True])
def test_changed_file_between_the_passes_is_noticed(tmp_path, same_size_and_time):
    path = write_jsonl(tmp_path / "a.jsonl", alpaca_rows(3))
    scan = scan_sources(wanted(tmp_path, "a"))
    if same_size_and_time:  # as `cp -p` leaves it, or an edit while the clock is set back
        old, text = path.stat(), path.read_text()
        path.write_text(text.swapcase())
        assert path.stat().st_size == old.st_size
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    else:
        write_jsonl(path, alpaca_rows(4))
    with pytest.raises(DataError, match="changed while it was being read"):
        list(scan.rows())


def test_group_column_has_to_be_there(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{**row, "skill": "x"} for row in alpaca_rows(2)])
    assert scan_sources(wanted(tmp_path, "a", group_column="skill")).n_rows == 2
    with pytest.raises(DataError, match="Did you mean 'skill'"):
        scan_sources(wanted(tmp_path, "a", group_column="skil"))


def test_data_used_as_keys_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{f"key{n}": n} for n in range(1001)])
    with pytest.raises(DataError, match="more than 1000 different columns"):
        scan_sources(wanted(tmp_path, "a"))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_scanning_holds_a_small_part_of_a_file(tmp_path, suffix):
    rows = [{"instruction": f"{n} " + "x" * 500, "input": "", "output": "y" * 500} for n in range(20_000)]
    path = tmp_path / f"big{suffix}"
    match suffix:
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            write_jsonl(path, rows)
        case ".csv":
            write_csv(path, rows)
        case ".parquet":
            pq.write_table(
                pa.Table.from_pylist(rows),
                path,
                compression="none",
                use_dictionary=False,
                row_group_size=1000,
            )
    size = path.stat().st_size
    assert size > 10_000_000 or suffix == ".parquet"
    del rows
    progress = Lines()
    tracemalloc.start()
    try:
        scan = scan_sources(wanted(tmp_path, "big"), progress)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert scan.n_rows == progress.advanced == 20_000
    assert peak < 4_000_000, f"{peak} bytes at the peak of reading {size}"
