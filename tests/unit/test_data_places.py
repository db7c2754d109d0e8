"""File and line of prepared rows: what an editor shows, for every form that rows are read in."""

from __future__ import annotations

import gzip
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import CHATML, alpaca_rows, byte_tokenizer, write_jsonl

from dataflex_pipeline.api import Silent
from dataflex_pipeline.data import DataSettings, ingredients, prepare, scan_sources
from dataflex_pipeline.store.parts import PartedTable, PartsWriter

preparing = importlib.import_module("dataflex_pipeline.data.prepare")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder, extra=CHATML)
    return str(folder)


def prepared(tmp_path, tokenizer_folder, *names: str, out="out", **more) -> PartedTable:
    settings = replace(DataSettings(names, str(tmp_path), "chatml", 256, None), **more)
    scan = scan_sources(settings)
    return prepare(settings, scan, tokenizer_folder, "digest", tmp_path / out, "pool", Silent())


def places(table: PartedTable) -> list[tuple[str | None, int | None, str]]:
    """File and line of every row, and its answer."""
    columns = ["file", "line", "original_output"]
    return [tuple(row.values()) for block in table.blocks(columns) for row in block.to_pylist()]


def line_of(path: Path, answer: str) -> int:
    """The line that an editor shows an answer on, by looking for it."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as stream:
        [found] = [
            number for number, line in enumerate(stream.read().split(b"\n"), 1) if answer.encode() in line
        ]
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.ndjson"])
def test_a_line_of_json_lines_is_what_an_editor_shows(tmp_path, tokenizer_folder, name):
    first, second, third = [json.dumps(row) for row in alpaca_rows(3)]
    text = f"\n{first}\n\n   \n{second}\r\n{third}".encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    answers = [f"answer {n}" for n in range(3)]
    found = places(prepared(tmp_path, tokenizer_folder, name))
    assert found == [(name, line_of(path, answer), answer) for answer in answers]
    assert [line for _, line, _ in found] == [2, 5, 6]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_row_of_an_array_has_the_number_of_its_element(tmp_path, tokenizer_folder, name):
    rows = alpaca_rows(4)
    rows[2]["size"] = 10**25  # from here on the file is read in the slower way
    (tmp_path / name).write_text(json.dumps(rows, indent=2))
    found = places(prepared(tmp_path, tokenizer_folder, name))
    assert found == [(name, n + 1, f"answer {n}") for n in range(4)]


def test_a_csv_row_of_several_lines_stands_where_it_begins(tmp_path, tokenizer_folder):
    text = 'instruction,output\nQ,one\n"a\nb\nc",two\n\n"d\n\ne","three\nlines"\r\nQ,four\n'
    (tmp_path / "a.csv").write_text(text, newline="")
    found = places(prepared(tmp_path, tokenizer_folder, "a.csv"))
    lines = text.split("\n")
    begins = [lines.index("Q,one"), lines.index('"a'), lines.index('"d'), lines.index("Q,four")]
    assert found == [
        ("a.csv", begin + 1, answer)
        for begin, answer in zip(begins, ["one", "two", "three\nlines", "four"], strict=True)
    ]
    assert [line for _, line, _ in found] == [2, 3, 7, 11]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_rows_of_columnar_files_are_counted_from_one(tmp_path, tokenizer_folder, name, monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.data.sources.readers.BATCH_ROWS", 2)
    table = pa.Table.from_pylist(alpaca_rows(5))
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name, row_group_size=3)
    else:
        with pa.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    found = places(prepared(tmp_path, tokenizer_folder, name))
    assert found == [(name, n + 1, f"answer {n}") for n in range(5)]


def test_files_of_folders_are_named_within_them(tmp_path, tokenizer_folder):
    import datasets

    (tmp_path / "many").mkdir()
    write_jsonl(tmp_path / "many" / "b.jsonl", alpaca_rows(2))
    (tmp_path / "many" / "a.json").write_text(json.dumps(alpaca_rows(1)))
    datasets.Dataset.from_list(alpaca_rows(5)).save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(alpaca_rows(1))}).save_to_disk(
        tmp_path / "splits"
    )
    found = places(prepared(tmp_path, tokenizer_folder, "many", "saved", "splits"))
    shards = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    assert found == [
        ("a.json", 1, "answer 0"),
        ("b.jsonl", 1, "answer 0"),
        ("b.jsonl", 2, "answer 1"),
        *[(shards[0], n + 1, f"answer {n}") for n in range(3)],
        *[(shards[1], n + 1, f"answer {n + 3}") for n in range(2)],
        ("data-00000-of-00001.arrow", 1, "answer 0"),
    ]


def test_a_folder_with_configs_names_files_by_their_path_in_it(tmp_path, tokenizer_folder):
    folder = tmp_path / "hub-like"
    for name in ("en/train", "fr/train"):
        (folder / name).parent.mkdir(parents=True)
        write_jsonl(folder / f"{name}.jsonl", alpaca_rows(2))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: all\n  data_files:\n  - split: train\n"
        "    path: ['en/train.jsonl', 'fr/train.jsonl']\n---\n"
    )
    found = places(prepared(tmp_path, tokenizer_folder, "hub-like"))
    assert [place[:2] for place in found] == [
        (f"{name}/train.jsonl", line) for name in ("en", "fr") for line in (1, 2)
    ]


def test_a_hub_data_set_has_the_row_and_no_file(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(
        "dataflex_pipeline.data.sources.named.read_hub", lambda hub, given: iter(alpaca_rows(3))
    )
    found = places(prepared(tmp_path, tokenizer_folder, "owner/set"))
    assert found == [(None, n + 1, f"answer {n}") for n in range(3)]


def test_several_data_sets_limits_slices_and_draws_keep_the_places(tmp_path, tokenizer_folder):
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", alpaca_rows(10))
    info = {
        "late": {"file_name": "b.jsonl", "split": "train[-3:]+train[:1]"},
        "drawn": {"file_name": "c.jsonl", "num_samples": 4},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    found = places(prepared(tmp_path, tokenizer_folder, "a", "late", "drawn", max_samples=4))
    assert found[:8] == [
        *[("a.jsonl", n + 1, f"answer {n}") for n in range(4)],
        *[("b.jsonl", n + 1, f"answer {n}") for n in (7, 8, 9, 0)],
    ]
    assert len(found) == 12
    assert all(place == ("c.jsonl", int(place[2][7:]) + 1, place[2]) for place in found[8:])


def test_invalid_rows_have_their_place(tmp_path, tokenizer_folder):
    write_jsonl(tmp_path / "a.jsonl", [{"instruction": "only"}, *alpaca_rows(1)])
    assert places(prepared(tmp_path, tokenizer_folder, "a"))[0][:2] == ("a.jsonl", 1)


def test_ids_and_fingerprints_do_not_depend_on_places(tmp_path, tokenizer_folder):
    write_jsonl(tmp_path / "a.jsonl", alpaca_rows(3))
    (tmp_path / "b.json").write_text(json.dumps(alpaca_rows(3), indent=1))
    (tmp_path / "moved").mkdir()
    write_jsonl(tmp_path / "moved" / "a.jsonl", alpaca_rows(3))
    one, other = (prepared(tmp_path, tokenizer_folder, name, out=f"of-{name}") for name in ("a", "b"))
    ids = [
        [row["row_id"] for block in t.blocks(["row_id"]) for row in block.to_pylist()] for t in (one, other)
    ]
    assert ids[0] == ids[1]
    moved = prepared(tmp_path / "moved", tokenizer_folder, "a")
    assert moved.fingerprint == one.fingerprint
    assert moved.files[0].read_bytes() == one.files[0].read_bytes()
    assert not {"file", "line"} & set(one.ingredients)


def test_a_pool_that_an_earlier_version_left_unfinished_is_finished_with_places(
    tmp_path, tokenizer_folder, monkeypatch
):
    monkeypatch.setattr(preparing, "PART_ROWS", 4)
    monkeypatch.setattr(preparing, "CHUNK_ROWS", 2)
    write_jsonl(tmp_path / "a.jsonl", alpaca_rows(10))
    whole = prepared(tmp_path, tokenizer_folder, "a", out="whole")
    old = whole.part(0).drop_columns(["file", "line"])
    settings = DataSettings(("a",), str(tmp_path), "chatml", 256, None)
    wanted = ingredients(settings, scan_sources(settings), "digest", "pool")
    PartsWriter(tmp_path / "out", old.schema, wanted).write(0, old)
    assert places(prepared(tmp_path, tokenizer_folder, "a")) == places(whole)
