"""Data files that would exhaust memory, end the process or hang it: each is one error that names the file."""

import gzip
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex_pipeline.data import DataSettings, scan_sources
from dataflex_pipeline.data.sources import json_files
from dataflex_pipeline.data.sources.half_pairs import HalfPairs
from dataflex_pipeline.data.sources.json_bounds import DEEPEST, LONGEST_NUMBER, BoundsError, JsonBounds
from dataflex_pipeline.data.sources.named import resolve_sources
from dataflex_pipeline.data.sources.readers import read_rows
from dataflex_pipeline.errors import DataError

ROWS = [{"instruction": f"say {n}", "output": f"it is {n} \u00e9"} for n in range(40)]
FIELDS = '"instruction": "a", "output": "b"'


def refusal(path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert str(path) in caught.value.what
    return str(caught.value)


def named(folder, name: str) -> DataSettings:
    return DataSettings((name,), str(folder), "chatml", 4096, None)


# ---------------------------------------------------------------- the bounds against a loop over characters


def by_characters(text: str) -> tuple[int, int]:
    """The deepest level outside of strings, and the longest run of digits there."""
    depth = deepest = run = longest = 0
    in_text = escaped = False
    for char in text:
        if in_text:
            in_text = escaped or char != '"'
            escaped = char == "\\" and not escaped
            continue
        depth += (char in "[{") - (char in "]}")
        run = run + 1 if char in "0123456789" else 0
        in_text = char == '"'
        deepest, longest = max(deepest, depth), max(longest, run)
    return deepest, longest


LEAVES = st.text('[]{}"\\ a1\n', max_size=12) | st.integers()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner)
)


@settings(max_examples=50)
@given(VALUES, st.integers(1, 9), st.booleans())
def test_bounds_are_those_of_a_loop_over_characters(value, size, over):
    deepest, longest = by_characters(json.dumps(value))
    nested = "[" * (DEEPEST - deepest + over) + json.dumps(value) + "]" * (DEEPEST - deepest + over)
    digits = f'["{"1" * 2000}\\"", {"1" * (LONGEST_NUMBER + over)}, {json.dumps(value)}]'
    for text, checked in ((nested, deepest > 0), (digits, longest <= LONGEST_NUMBER)):
        bounds, raw, found = JsonBounds(), text.encode(), False
        try:
            for start in range(0, len(raw), size * 37):
                bounds.see(raw[start : start + size * 37])
        except BoundsError:
            found = True
        assert found == over or not checked


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("levels", [DEEPEST + 1, 2_000, 200_000])
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_nesting(tmp_path, name, levels, pair):
    opened = "[" if pair == "[]" else '{"a":'
    text = f'{{{FIELDS}, "m": {opened * (levels - 1)}1{pair[1] * (levels - 1)}}}'
    text = f"[{{{FIELDS}}}, {text}]" if name == "a.json" else f"{{{FIELDS}}}\n{text}\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    message = refusal(path)
    assert f"nests deeper than {DEEPEST} levels" in message
    assert "behind item 1:" in message or "behind item 0:" in message or "line 2:" in message


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_what_is_within_the_bounds_is_read(tmp_path, name):
    deep = json.loads("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1))
    row = {"a": "[" * 500 + '"' + "{" * 500, "pi": "3" * 5000, "n": 10 ** (LONGEST_NUMBER - 1), "deep": deep}
    path = tmp_path / name
    path.write_text(json.dumps([row, row]) if name == "a.json" else f"{json.dumps(row)}\n" * 2)
    assert list(read_rows(path)) == [row, row]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000, "0." + "1" * 5000])
def test_numbers_of_thousands_of_digits(tmp_path, name, number):
    text = f'{{{FIELDS}, "n": {number}}}'
    path = tmp_path / name
    path.write_text(f"[{text}]" if name == "a.json" else text)
    assert "number of more than 1,000 digits" in refusal(path)


def test_a_row_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.data.sources.json_bounds.LARGEST_ROW", 1 << 20)
    long = json.dumps({"instruction": "a" * (3 << 20), "output": "b"})
    texts = {
        "a.jsonl": long,
        "a.json": f"[{long}]",
        "a.csv": f"instruction,output\n{'a' * (3 << 20)},b",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert "larger than 1 MiB" in refusal(tmp_path / name)
    (tmp_path / "many.json").write_text(json.dumps(ROWS * 1000))  # many rows are not one
    assert len(list(read_rows(tmp_path / "many.json"))) == 40_000


@pytest.mark.parametrize("field", ["tools", "history", "chat_template_kwargs", "messages"])
def test_json_text_within_a_value_is_bounded_too(tmp_path, field):
    row = {"instruction": "a", "output": "b", field: "[" * 5000 + "]" * 5000}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    scan = scan_sources(named(tmp_path, "a.jsonl"))
    assert scan.n_rows == 1  # such a value is text; what is made of the row is told when it is prepared


def test_a_column_that_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b", "\\ud800": 1}\n')
    with pytest.raises(DataError, match=r"has a column '\\ud800'"):
        scan_sources(named(tmp_path, "a.jsonl"))


# ---------------------------------------------------------------- columnar files


def arrow_bytes(stream: bool) -> bytes:
    table = pa.table({name: [row[name] for row in ROWS] for name in ROWS[0]})
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("stream", [True, False])
def test_a_changed_byte_of_an_arrow_file(tmp_path, stream):
    """Rows are read or the file is refused; nothing else, wherever the byte is."""
    whole, chance = arrow_bytes(stream), random.Random(7)
    path = tmp_path / "a.arrow"
    refused = []
    for place in chance.sample(range(len(whole)), 150):
        changed = bytearray(whole)
        changed[place] ^= chance.randrange(1, 256)
        path.write_bytes(changed)
        try:
            assert len(list(read_rows(path))) <= len(ROWS) * 8
        except DataError as error:
            refused.append(error.what)
    assert len(refused) > 25
    assert all(what.startswith(str(path)) for what in refused)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([2_000_000_000], pa.date32()),
        ([10**15], pa.timestamp("s")),
        ([1], pa.timestamp("us", tz="Mars/Olympus")),
        ([2**62], pa.duration("s")),
    ],
)
def test_dates_and_zones_that_python_has_not(tmp_path, values, kind):
    integers = pa.array(values, pa.int32() if kind == pa.date32() else pa.int64())
    table = pa.table({"instruction": ["a"], "output": ["b"], "when": integers.cast(kind)})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    pq.write_table(table, tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        message = refusal(tmp_path / name)
        assert "column 'when' (" in message or "cannot be read as Parquet" in message


# ---------------------------------------------------------------- what is no file


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_two_columns_of_one_name(tmp_path, name):
    arrays = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    table = pa.Table.from_arrays(arrays, names=["instruction", "output", "output"])
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(tmp_path / name, table.schema) as sink:
            sink.write_table(table)
    with pytest.raises(DataError, match="2 columns 'output'"):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "/dev/zero", "link.jsonl"])
def test_a_pipe_or_a_device_is_not_waited_for(tmp_path, name):
    for pipe in ("a.jsonl", "a.parquet"):
        os.mkfifo(tmp_path / pipe)
    (tmp_path / "link.jsonl").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"which is a (pipe|device)"):
        resolve_sources(named(tmp_path, name))


def test_a_name_that_is_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/rows\xff.jsonl"
    try:
        with open(name, "wb") as stream:  # noqa: PTH123 (a name of bytes)
            stream.write(json.dumps(ROWS[0]).encode())
    except OSError:
        pytest.skip("this file system takes no such name")
    for place in ("rows\udcff.jsonl", str(tmp_path)):
        with pytest.raises(DataError, match="is not UTF-8"):
            resolve_sources(named(tmp_path, place))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": {"file_name": ' + "9" * 5000 + "}}"])
@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "dataset_dict.json"])
def test_descriptions_of_a_folder(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="JSON"):
        resolve_sources(named(tmp_path, str(tmp_path)))


def test_the_header_of_a_readme_that_stands_for_more_than_any_memory_holds(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]))
    laughs = "".join(f"x{n}: &x{n} [{', '.join(f'*x{n - 1}' for _ in range(10))}]\n" for n in range(1, 12))
    (tmp_path / "README.md").write_text(
        f"---\nx0: &x0 [lol]\n{laughs}configs:\n- config_name: a\n  data_files: *x11\n---\n"
    )
    with pytest.raises(DataError, match="stands for more than"):
        resolve_sources(named(tmp_path, str(tmp_path)))


HALVES = (
    r'"\ud83d"',
    r'"\udc00 a"',
    r'"\ud83d\ud83d\ude00"',
    r'"\\ud83d"',
    r'"\\\ud83d x"',
    r'"\ude00\ud83d"',
    r'"\ud83d\ude00"',
    r'"\uD83Dx\\\\"',
)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 11, 12, 13, 64, 65536])
def test_half_a_surrogate_pair_is_the_same_in_an_array_and_in_lines(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_files, "_BLOCK_BYTES", block)
    texts = [f'{{"a": {text}, {text}: [{text}], "b": 1}}' for text in HALVES]
    (tmp_path / "a.json").write_text("[" + ", ".join(texts) + "]")
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    assert list(json_files.read_json(tmp_path / "a.json")) == list(
        json_files.read_jsonl(tmp_path / "a.jsonl")
    )


def test_the_end_of_a_block_is_never_inside_a_run_of_backslashes():
    halves = HalfPairs()
    blocks = [b"\\" * 99, b"\\" * 30_000, b"ud83d", b"\\", b"ud83d"]
    text = b"".join(map(halves.marked, [*blocks, b""]))
    assert text == b"\\" * 30_098 + b"\\ufdd0d83d" * 2
