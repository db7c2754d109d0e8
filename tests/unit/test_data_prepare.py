"""The second pass: labels, cut-off, invalid rows, parts, processes, resuming, and real data."""

from __future__ import annotations

import importlib
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import Lines, alpaca_rows, byte_tokenizer, write_jsonl

from dataflex_pipeline.api import Silent
from dataflex_pipeline.data import DataSettings, ingredients, prepare, scan_sources
from dataflex_pipeline.errors import ConfigError, CorruptError, DataError, DataflexError
from dataflex_pipeline.schemas import GROUP, PLACE, PREPARED
from dataflex_pipeline.store.fingerprint import changes, digest

preparing = importlib.import_module("dataflex_pipeline.data.prepare")  # the name is also the function's
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder, extra=("<|im_start|>", "<|im_end|>"))
    return str(folder)


def wanted(folder: Path, *names: str, **more) -> DataSettings:
    made = DataSettings(names or ("a",), str(folder), "chatml", 256, None)
    return replace(made, **more)


def run(tmp_path, tokenizer_folder, settings, split="pool", out="out", progress=None):
    scan = scan_sources(settings)
    return prepare(settings, scan, tokenizer_folder, "digest", tmp_path / out, split, progress or Silent())


def rows_of(table, **more):
    return pa.Table.from_batches(table.blocks(**more), table.schema).to_pylist()


def test_schema_order_and_values(tmp_path, tokenizer_folder):
    data = [
        {"instruction": "Q0", "input": "", "output": "A0", "skill": "x", "level": 1},
        {"instruction": "Q1", "input": "", "output": "A1", "skill": "y", "level": None},
    ]
    write_jsonl(tmp_path / "a.jsonl", data)
    table = run(tmp_path, tokenizer_folder, wanted(tmp_path))
    originals = [f"original_{name}" for name in ("instruction", "input", "output", "skill", "level")]
    assert table.schema.names == [*PREPARED.names, *PLACE.names, *originals]
    assert table.schema.field("row").metadata == PREPARED.field("row").metadata
    assert table.schema.field("original_level").type == pa.int64()
    first, second = rows_of(table)
    assert (first["row"], second["row"]) == (0, 1)
    assert first["source"] == "a"
    assert (second["file"], second["line"]) == ("a.jsonl", 2)
    assert first["messages"] == [{"role": "user", "content": "Q0"}, {"role": "assistant", "content": "A0"}]
    assert (first["original_skill"], first["original_level"]) == ("x", 1)
    assert second["original_level"] is None
    # <|im_start|> u s e r \n Q 0 <|im_end|> \n <|im_start|> a s s i s t a n t \n A 0 <|im_end|> \n
    assert first["n_tokens"] == len(first["input_ids"]) == len(first["labels"]) == 10 + 11 + 4
    assert [label != -100 for label in first["labels"]] == [False] * 21 + [True] * 3 + [False]
    assert first["labels"][21:24] == first["input_ids"][21:24]
    assert first["n_response_tokens"] == 3
    assert first["valid"] is True
    assert first["reason"] is None


def test_target_has_groups(tmp_path, tokenizer_folder):
    write_jsonl(tmp_path / "a.jsonl", [{**row, "skill": n} for n, row in enumerate(alpaca_rows(2))])
    write_jsonl(tmp_path / "b.jsonl", [{**alpaca_rows(1)[0], "skill": None}])
    both = wanted(tmp_path, "a", "b")
    by_name = run(tmp_path, tokenizer_folder, both, "target", "by_name")
    assert by_name.schema.field("group") == GROUP
    assert [row["group"] for row in rows_of(by_name)] == ["a", "a", "b"]
    by_column = run(tmp_path, tokenizer_folder, replace(both, group_column="skill"), "target", "by_column")
    assert [(row["group"], row["reason"]) for row in rows_of(by_column)] == [
        ("0", None),
        ("1", None),
        ("", "group column skill is empty"),
    ]


def test_cutoff_keeps_the_first_tokens_and_tells_rows_without_labels(tmp_path, tokenizer_folder):
    data = [{"instruction": "Q", "output": "A" * 20}, {"instruction": "Q" * 50, "output": "A"}]
    write_jsonl(tmp_path / "a.jsonl", data)
    whole = rows_of(run(tmp_path, tokenizer_folder, wanted(tmp_path), out="whole"))
    progress = Lines()
    table = run(tmp_path, tokenizer_folder, wanted(tmp_path, cutoff_len=25), out="cut", progress=progress)
    first, second = rows_of(table)
    assert first["input_ids"] == whole[0]["input_ids"][:25]
    assert first["labels"] == whole[0]["labels"][:25]
    assert (first["valid"], first["n_response_tokens"]) == (True, 5)
    assert (second["valid"], second["n_response_tokens"]) == (False, 0)
    assert second["reason"] == "no response tokens left after cutoff_len 25"
    assert table.summary["at_cutoff"] == 1
    assert progress.said[-1] == (
        "pool: 1 of 2 rows valid, 25 tokens; not valid: 1 x no response tokens left after cutoff_len 25 "
        "(row 1); "
        "1 rows reach cutoff_len 25"
    )


def test_a_label_at_position_0_does_not_count_because_it_is_never_predicted(tmp_path):
    folder = tmp_path / "tokenizer"
    byte_tokenizer(
        folder, "{{ messages | selectattr('role', 'eq', 'assistant') | map(attribute='content') | join }}"
    )
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "A", "completion": text} for text in ("A", "AB")])
    one, two = rows_of(run(tmp_path, str(folder), wanted(tmp_path, template=None)))
    assert (one["valid"], one["reason"]) == (False, "the response has no token that can be predicted")
    assert (two["valid"], two["n_response_tokens"]) == (True, 1)


def test_mask_history_and_default_system(tmp_path, tokenizer_folder):
    row = {"instruction": "Q", "output": "A", "history": [["q", "a"]]}
    write_jsonl(tmp_path / "a.jsonl", [row])
    every = rows_of(run(tmp_path, tokenizer_folder, wanted(tmp_path), out="every"))[0]
    last = rows_of(run(tmp_path, tokenizer_folder, wanted(tmp_path, mask_history=True), out="last"))[0]
    assert (every["n_response_tokens"], last["n_response_tokens"]) == (4, 2)
    assert every["input_ids"] == last["input_ids"]
    spoken = rows_of(run(tmp_path, tokenizer_folder, wanted(tmp_path, default_system="S"), out="system"))[0]
    assert spoken["messages"][0] == {"role": "system", "content": "S"}
    assert spoken["row_id"] == every["row_id"]
    assert spoken["n_tokens"] > every["n_tokens"]


def test_invalid_rows_keep_their_number_and_duplicates_share_an_id(tmp_path, tokenizer_folder):
    good = {"instruction": "Q", "input": "", "output": "A"}
    bad = [{**good, "output": None}, {"instruction": "only"}]
    write_jsonl(tmp_path / "a.jsonl", [good, *bad, {**good, "extra": 1}])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Q", "completion": "A"}])
    table = run(tmp_path, tokenizer_folder, wanted(tmp_path, "a", "b"))
    rows = rows_of(table)
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["source"] for row in rows] == ["a"] * 4 + ["b"]
    assert [row["reason"] for row in rows] == [None, "output is null", "output is missing", None, None]
    assert rows[1]["input_ids"] == []
    assert rows[1]["messages"] == []
    assert len({rows[n]["row_id"] for n in (0, 3, 4)}) == 1
    assert len({row["row_id"] for row in rows}) == 3
    assert table.summary["valid"] == 3
    assert table.summary["reasons"] == {"output is null": 1, "output is missing": 1}
    assert table.summary["sources"] == {"a": {"rows": 4, "valid": 2}, "b": {"rows": 1, "valid": 1}}
    assert table.summary["tokens"] == sum(row["n_tokens"] for row in rows if row["valid"])
    assert table.summary["response_tokens"] == sum(row["n_response_tokens"] for row in rows)


def test_no_valid_rows_is_an_error_and_leaves_nothing(tmp_path, tokenizer_folder):
    silent, unasked = {"instruction": "Q", "output": ""}, {"instruction": "", "output": "A"}
    write_jsonl(tmp_path / "a.jsonl", [silent, silent, unasked])
    with pytest.raises(DataError, match="None of the 3 rows of a can be used") as caught:
        run(tmp_path, tokenizer_folder, wanted(tmp_path))
    assert "2 x empty response (rows 0, 1); 1 x empty prompt (row 2)" in caught.value.why
    assert not (tmp_path / "out").exists()


def test_template_errors_come_before_anything_is_written(tmp_path, tokenizer_folder):
    write_jsonl(tmp_path / "a.jsonl", alpaca_rows(1))
    for template in ("lama3", None):
        with pytest.raises(ConfigError):
            run(tmp_path, tokenizer_folder, wanted(tmp_path, template=template))
    assert not (tmp_path / "out").exists()


def small_parts(monkeypatch):
    monkeypatch.setattr(preparing, "PART_ROWS", 64)
    monkeypatch.setattr(preparing, "CHUNK_ROWS", 16)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_number_of_processes_changes_no_byte(tmp_path, tokenizer_folder, monkeypatch):
    small_parts(monkeypatch)
    monkeypatch.setattr(preparing, "MIN_ROWS_PER_WORKER", 1)
    monkeypatch.setattr(preparing, "available_cores", lambda: 3)
    data = alpaca_rows(300)
    data[7]["output"] = ""
    write_jsonl(tmp_path / "a.jsonl", data)
    one = run(tmp_path, tokenizer_folder, wanted(tmp_path), out="one")
    three = run(tmp_path, tokenizer_folder, wanted(tmp_path, workers=3), out="three")
    assert one.n_parts == 5
    assert [len(one.part(n)) for n in range(5)] == [64, 64, 64, 64, 44]
    assert contents(one.folder) == contents(three.folder)
    assert [row["original_output"] for row in rows_of(one)] == [row["output"] for row in data]


@pytest.mark.parametrize("killed_at", range(5))
def test_interrupted_prepare_goes_on_and_ends_identical(tmp_path, tokenizer_folder, monkeypatch, killed_at):
    small_parts(monkeypatch)
    write_jsonl(tmp_path / "a.jsonl", alpaca_rows(300))
    settings = wanted(tmp_path)
    whole = run(tmp_path, tokenizer_folder, settings, out="whole")
    written = []
    write = preparing.PartsWriter.write

    def dying(self, number, table):
        if len(written) == killed_at:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, table)

    with monkeypatch.context() as patch:
        patch.setattr(preparing.PartsWriter, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, tokenizer_folder, settings)
    again = []

    def counting(self, number, table):
        again.append(number)
        write(self, number, table)

    monkeypatch.setattr(preparing.PartsWriter, "write", counting)
    progress = Lines()
    resumed = run(tmp_path, tokenizer_folder, settings, progress=progress)
    assert again == list(range(killed_at, 5))
    assert progress.started[-1] == ("preparing pool", 300, "rows", 64 * killed_at)
    assert progress.advanced == 300 - 64 * killed_at
    assert contents(resumed.folder) == contents(whole.folder)


def test_part_in_the_middle_is_made_again_alone(tmp_path, tokenizer_folder, monkeypatch):
    small_parts(monkeypatch)
    write_jsonl(tmp_path / "a.jsonl", alpaca_rows(300))
    whole = run(tmp_path, tokenizer_folder, wanted(tmp_path))
    before = contents(whole.folder)
    (whole.folder / "part-00002.parquet").unlink()
    (whole.folder / "_manifest.json").unlink()
    run(tmp_path, tokenizer_folder, wanted(tmp_path))
    assert contents(whole.folder) == before


def test_parts_of_other_settings_are_refused(tmp_path, tokenizer_folder):
    write_jsonl(tmp_path / "a.jsonl", alpaca_rows(3))
    run(tmp_path, tokenizer_folder, wanted(tmp_path))
    with pytest.raises(CorruptError, match="belongs to another table"):
        run(tmp_path, tokenizer_folder, wanted(tmp_path, cutoff_len=100))


def test_fingerprint_is_of_what_decides_the_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", alpaca_rows(3))
    (tmp_path / "moved").mkdir()
    write_jsonl(tmp_path / "moved" / "a.jsonl", alpaca_rows(3))
    base = wanted(tmp_path)
    made = ingredients(base, scan_sources(base), "t", "pool")

    def difference(settings, tokenizer="t", split="pool"):
        return changes(made, ingredients(settings, scan_sources(settings), tokenizer, split))

    assert difference(replace(base, workers=7)) == []
    assert difference(replace(base, dataset_dir=str(tmp_path / "moved"))) == []
    assert difference(replace(base, group_column=None)) == []
    assert difference(replace(base, cutoff_len=9)) == ["cutoff_len: 256 -> 9"]
    assert difference(replace(base, mask_history=True)) == ["mask_history: false -> true"]
    assert difference(replace(base, default_system="S")) == ['default_system: null -> "S"']
    assert difference(base, tokenizer="u") == ['tokenizer: "t" -> "u"']
    renamed = difference(replace(base, template="qwen"))
    assert [line.split(":")[0] for line in renamed] == ["template", "template_text"]
    assert difference(replace(base, max_samples=2))
    assert "group_column: (not set) -> null" in difference(base, split="target")
    assert digest(made) == digest(json.loads(json.dumps(made)))


def test_workers_that_would_not_help_are_not_started_and_that_is_said(tmp_path, tokenizer_folder):
    write_jsonl(tmp_path / "a.jsonl", alpaca_rows(3))
    progress = Lines()
    run(tmp_path, tokenizer_folder, wanted(tmp_path, workers=16), progress=progress)
    assert any(line.startswith("tokenising in 1 of the 16 processes asked for") for line in progress.said)


def test_process_that_dies_is_told():
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    class Dying:
        def submit(self, *_):
            future = Future()
            future.set_exception(BrokenProcessPool("gone"))
            return future

    with pytest.raises(DataflexError, match="A tokenising process died") as caught:
        list(preparing._in_order(Dying(), iter([(0, [])]), 2))
    assert "preprocessing_num_workers=1" in caught.value.fix


@pytest.mark.slow
def test_preparing_holds_a_small_part_of_the_data(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(preparing, "PART_ROWS", 256)
    monkeypatch.setattr(preparing, "CHUNK_ROWS", 64)
    settings = wanted(tmp_path, cutoff_len=64)

    def peak(count: int) -> int:
        data = ({**row, "output": "y" * 2000} for row in alpaca_rows(count))
        path = write_jsonl(tmp_path / "a.jsonl", data)
        assert path.stat().st_size > 2000 * count
        scan = scan_sources(settings)
        tracemalloc.start()
        try:
            prepare(settings, scan, tokenizer_folder, "d", tmp_path / f"out{count}", "pool", Silent())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(256)  # the first call loads the tokenizer's code
    small, large = peak(512), peak(3072)
    assert large < 1.5 * small, f"{small} bytes at the peak for 512 rows, {large} for 3072"


@pytest.mark.parametrize(
    ("name", "n_rows"), [("alpaca_en_demo", 999), ("alpaca_zh_demo", 1000), ("glaive_toolcall_en_demo", 300)]
)
@pytest.mark.parametrize("template", ["llama3", "qwen", "vicuna"])
def test_real_data_is_valid_or_says_why(tmp_path, tokenizer_folder, name, n_rows, template):
    if not (SHARED / f"{name}.json").is_file():
        pytest.skip(f"{name}.json is not beside this checkout")
    settings = wanted(SHARED, name, template=template, cutoff_len=2048)
    table = run(tmp_path, tokenizer_folder, settings)
    raw = json.loads((SHARED / f"{name}.json").read_text(encoding="utf-8"))
    assert table.n_rows == len(raw) == n_rows
    columns = ["valid", "reason", "n_response_tokens", "n_tokens", "labels", "input_ids", "messages"]
    for source, row in zip(raw, rows_of_columns(table, columns), strict=True):
        assert row["valid"] is (row["reason"] is None)
        assert row["valid"] is (row["n_response_tokens"] > 0)
        assert len(row["labels"]) == len(row["input_ids"]) == row["n_tokens"] <= 2048
        assert all(
            label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True)
        )
        if "output" in source:
            assert row["messages"][-1] == {"role": "assistant", "content": source["output"]}
        else:
            said = [turn["value"] for turn in source["conversations"]]
            assert [turn["content"] for turn in row["messages"]] == said


def rows_of_columns(table, columns):
    return [row for batch in table.blocks(columns) for row in batch.to_pylist()]


def test_prepared_tables_open_elsewhere(tmp_path, tokenizer_folder):
    import duckdb
    import polars

    write_jsonl(tmp_path / "a.jsonl", alpaca_rows(5))
    folder = run(tmp_path, tokenizer_folder, wanted(tmp_path)).folder
    pattern = str(folder / "part-*.parquet")
    with duckdb.connect() as database:
        assert database.execute(f"select count(*) from '{pattern}'").fetchall() == [(5,)]
    assert polars.read_parquet(pattern)["original_output"].to_list() == [f"answer {n}" for n in range(5)]
    assert pq.read_table(folder / "part-00000.parquet").to_pandas()["row"].tolist() == [0, 1, 2, 3, 4]
