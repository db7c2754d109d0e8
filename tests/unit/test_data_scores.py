"""Scores made elsewhere: every format, every key, what is no number, and files that do not fit."""

from __future__ import annotations

import json
import math
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampling_tables import identities

from dataflex_pipeline.data import scores
from dataflex_pipeline.data.scores import ScoreFile, numbers_of, reasons
from dataflex_pipeline.errors import DataError

N = 7
TABLES = ("parquet", "csv", "tsv", "jsonl")


def write(folder, kind, columns):
    """Write columns as a file of a kind; None is a missing value."""
    path = folder / f"scores.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(columns), path, row_group_size=3)
    elif kind == "jsonl":
        lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps({"more": [{"x": 1}], **line}) + "\n" for line in lines))
    elif kind == "npy":
        np.save(path, np.array(columns["score"], float))
    else:
        options = pcsv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
        pcsv.write_csv(pa.table(columns), path, options)
    return path


def found(file, n=N):
    """Return the scores of all rows, None where there is none."""
    file.check_rows(n)
    values, kind = file.joined.of(pa.array(range(n)), pa.array(identities(n)))
    assert ((kind == scores.FOUND) == ~np.isnan(values)).all()
    return [None if math.isnan(value) else value for value in values.tolist()]


def refused(make):
    with pytest.raises(DataError) as raised:
        make()
    error = raised.value
    assert error.what.startswith("The file of scores ")
    assert error.why
    assert error.fix
    return f"{error.why} {error.fix}"


SCORES = [0.5, -1.25, 3.0, 1e-300, 2.0, 1e17, 0.1]


@pytest.mark.parametrize("kind", [*TABLES, "npy"])
def test_line_by_line(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(scores, "READ_ROWS", 2)
    file = ScoreFile(write(tmp_path, kind, {"score": SCORES}))
    assert (file.by, found(file)) == ("line", SCORES)


@pytest.mark.parametrize("by", ["row", "row_id", None])
@pytest.mark.parametrize("kind", TABLES)
def test_joined_by_a_key_in_any_order(tmp_path, kind, by, monkeypatch):
    monkeypatch.setattr(scores, "READ_ROWS", 2)
    order = [4, 0, 6, 2]
    ids = identities(N)
    columns = {"row": order, "row_id": [ids[row] for row in order], "good": [float(row) for row in order]}
    file = ScoreFile(write(tmp_path, kind, columns), "good", by)
    assert file.by == (by or "row_id")
    assert found(file) == [0, None, 2, None, 4, None, 6]
    _, there = file.joined.of(pa.array(range(N)), pa.array(ids))
    assert (there == scores.ABSENT).tolist() == [row not in order for row in range(N)]


def test_a_row_comes_before_the_line_where_nothing_is_said(tmp_path):
    path = write(tmp_path, "csv", {"row": [2, 0], "score": [5.0, 7.0]})
    assert found(ScoreFile(path), 3) == [7, None, 5]
    assert found(ScoreFile(path, by="line"), 2) == [5, 7]


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_no_finite_number_says_why(tmp_path, kind):
    written = ["1.5", None, "n/a", "nan", "-inf", "+2", " 3e2 "]
    file = ScoreFile(write(tmp_path, kind, {"score": written}))
    assert found(file) == [1.5, None, None, None, None, 2, 300]
    _, there = file.joined.of(pa.array(range(N)), pa.array(identities(N)))
    place = f"'score' of scores.{kind}"
    words = [None, "is empty", "is no number", "is not finite", "is not finite", None, None]
    assert reasons(there, place).tolist() == [each and f"{place} {each}" for each in words]


def test_json_values_of_every_kind(tmp_path):
    path = tmp_path / "a.jsonl"
    values = ["1.5", '"2.5"', "NaN", "Infinity", "null", "true", '{"a": 1}', "[1]", "1e400", "7"]
    lines = [f'{{"row": {row}, "score": {value}}}' for row, value in enumerate(values)]
    path.write_text("\n".join([*lines[:4], "", *lines[4:], '{"row": 10}']) + "\n")
    assert found(ScoreFile(path), 11) == [1.5, 2.5, *[None] * 7, 7.0, None]


@given(st.lists(st.floats() | st.integers(-(2**60), 2**60) | st.none(), min_size=1))
def test_numbers_written_as_text_are_those_of_python(values):
    text = pa.array([None if value is None else repr(value) for value in values], pa.string())
    numbers, kind = numbers_of(text)
    for value, number, there in zip(values, numbers.tolist(), kind.tolist(), strict=True):
        fine = value is not None and math.isfinite(value)
        assert number == float(value) if fine else math.isnan(number)
        assert (there == scores.FOUND) is fine
        assert (there == scores.MISSING) is (value is None)


@pytest.mark.parametrize(
    ("column", "numbers"),
    [
        (pa.array([1, None, 2**62], pa.int64()), [1.0, None, 2.0**62]),
        (pa.array([1.5, math.nan], pa.float32()), [1.5, None]),
        (pa.array([Decimal("1.25")]), [1.25]),
        (pa.array(["1", "x"]).dictionary_encode(), [1.0, None]),
        (pa.array(["1"], pa.large_string()), [1.0]),
        (pa.array(['"0.5"', "[1]", "3", "0x10", "1_0", "--1", ""]), [0.5, None, 3.0, *[None] * 4]),
        (pa.array([True, None]), [None, None]),
        (pa.array([[1.0]]), [None]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_columns_of_every_type(column, numbers):
    values, _ = numbers_of(column)
    assert [None if math.isnan(value) else value for value in values] == numbers


@pytest.mark.parametrize("kind", [*TABLES, "npy"])
def test_another_number_of_lines(tmp_path, kind):
    file = ScoreFile(write(tmp_path, kind, {"score": SCORES}))
    assert "It has 7 lines and the pool has 6 rows" in refused(lambda: file.check_rows(6))


def test_keys_that_cannot_be_used(tmp_path):
    def read(kind, **columns):
        columns = {"score": [1.0] * len(next(iter(columns.values()))), **columns}
        return lambda: ScoreFile(write(tmp_path, kind, columns)).check_rows(N)

    ids = identities(N)
    assert "The row 3 is on line 0 and on line 2" in refused(read("csv", row=[3, 1, 3]))
    said = refused(read("jsonl", row_id=[ids[1], ids[5], ids[5]], score=[1, 2, 3]))
    assert f"The row_id {ids[5]} is on line 1 and on line 2, counted from 0, with another score" in said
    assert "join those by row" in said
    assert "It has the row 7, and the pool has the rows 0 to 6" in refused(read("parquet", row=[1, 7]))
    for wrong, shown in ((-1, "-1"), (1.5, "1.5"), (None, "None")):
        assert f"Line 1, counted from 0, has the row {shown}" in refused(read("parquet", row=[0.0, wrong]))
    assert "has the row_id 'sample-1'" in refused(read("csv", row_id=[ids[0], "sample-1"]))
    assert "has the row_id '12'" in refused(read("parquet", row_id=[12, 13]))
    assert "has the row_id None" in refused(read("parquet", row_id=[ids[0], None]))


def test_rows_of_the_same_content_may_have_a_line_each(tmp_path):
    ids = identities(N)
    columns = {"row_id": [ids[3], ids[0], ids[3], ids[6], ids[0]], "score": ["1", None, "1.0", "4", None]}
    assert found(ScoreFile(write(tmp_path, "csv", columns))) == [None, None, None, 1, None, None, 4]


def test_columns_that_are_not_there(tmp_path):
    path = write(tmp_path, "csv", {"qualty": [1.0], "row": [0]})
    said = refused(lambda: ScoreFile(path, "quality"))
    assert "It has no column 'quality'. Did you mean 'qualty'?" in said
    assert "Its columns are qualty, row." in said
    assert "no column 'score'" in refused(lambda: ScoreFile(path))
    assert "joined by row_id" in refused(lambda: ScoreFile(path, "qualty", "row_id"))
    array = write(tmp_path, "npy", {"score": SCORES})
    assert "an array has no columns" in refused(lambda: ScoreFile(array, "quality"))
    assert "joined by row," in refused(lambda: ScoreFile(array, by="row"))


def test_a_key_of_jsonl_that_comes_late_is_found(tmp_path):
    path = tmp_path / "late.jsonl"
    path.write_text('{"row": 0}\n' * 0 + '{"other": 1}\n' * 30_000 + '{"score": 2}\n')
    assert found(ScoreFile(path), 30_001)[-1] == 2


@pytest.mark.parametrize("kind", [*TABLES, "npy"])
def test_a_file_without_any_number(tmp_path, kind):
    path = write(tmp_path, kind, {"score": [math.nan] * 3 if kind == "npy" else ["a", "b", "c"]})
    assert "None of its 3 lines has a finite number" in refused(lambda: ScoreFile(path).check_rows(3))


@pytest.mark.parametrize("kind", [*TABLES, "npy"])
def test_files_that_are_none(tmp_path, kind):
    path = tmp_path / f"bad.{kind}"
    assert "There is no such file" in refused(lambda: ScoreFile(path))
    path.write_bytes(b'"\x00{"a": 1\n2,3')
    assert "It cannot be read" in refused(lambda: ScoreFile(path, by="line").check_rows(1)) or kind in (
        "csv",
        "tsv",
    )


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "objects.npy"
    np.save(path, np.array([1.0, None], dtype=object), allow_pickle=True)
    assert "cannot be read" in refused(lambda: ScoreFile(path).check_rows(2))
    np.save(path, np.ones((2, 2)))
    assert "It holds float64[2, 2]" in refused(lambda: ScoreFile(path).check_rows(2))
    other = tmp_path / "scores.pkl"
    other.write_bytes(b"")
    assert "Its name ends in '.pkl'" in refused(lambda: ScoreFile(other))
