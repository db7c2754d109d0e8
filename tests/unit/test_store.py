"""The store: fingerprints, atomic writes, parted and single-file tables, staleness, exact ranks, the lock."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex_pipeline.errors import CorruptError, RunError, StaleError
from dataflex_pipeline.store import ranks
from dataflex_pipeline.store.atomic import atomic_file, atomic_folder, set_aside, write_json
from dataflex_pipeline.store.fingerprint import canonical, changes, digest
from dataflex_pipeline.store.parts import PartedTable, PartsWriter, part_name
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.stale import is_current
from dataflex_pipeline.store.tables import TableFile, table_writer, zip_blocks

SCHEMA = pa.schema([pa.field("row", pa.int64()), pa.field("value", pa.float64())])


def rows(start, stop):
    numbers = np.arange(start, stop)
    return pa.table({"row": numbers, "value": numbers * 0.5})


def parted(folder, sizes=(3, 4, 2), ingredients=None):
    writer = PartsWriter(folder, SCHEMA, ingredients or {"a": 1})
    start = 0
    for number, size in enumerate(sizes):
        writer.write(number, rows(start, start + size))
        start += size
    return writer.finish(len(sizes), {"seconds": 1})


class TestFingerprint:
    def test_known_value_stays_the_same_over_versions(self):
        # the digest was computed with `b2sum -l 128` on that text
        text = canonical({"b": "é", "a": [1, 2.5, None]})
        assert text == '{"a":[1,2.5,null],"b":"é"}'
        assert digest({"b": "é", "a": (1, 2.5, None)}) == "90adee927e01caf39ef9781e1c85a688"

    @pytest.mark.parametrize("value", [{1, 2}, object(), float("nan"), {1: 2}, b"x", [object()]])
    def test_unstable_values_raise(self, value):
        with pytest.raises(TypeError):
            digest({"key": value})

    def test_every_changed_leaf_is_named(self):
        old = {"method": {"focus": "low", "weight": 5}, "seed": 1}
        new = {"method": {"focus": "high", "weight": 5}, "rows": 3, "seed": 1}
        assert changes(old, new) == ['method.focus: "low" -> "high"', "rows: (not set) -> 3"]

    @given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3) | st.booleans()))
    def test_equal_digest_means_no_changes(self, value):
        again = dict(reversed(value.items()))
        assert digest(value) == digest(again)
        assert changes(value, again) == []


class TestAtomic:
    def test_failure_leaves_the_old_file_and_no_temporary(self, tmp_path):
        target = tmp_path / "a.json"
        write_json(target, {"x": 1})
        with pytest.raises(ValueError), atomic_file(target) as temporary:
            temporary.write_text("half")
            raise ValueError
        assert target.read_text() == '{\n  "x": 1\n}\n'
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

    def test_folder_appears_whole(self, tmp_path):
        with atomic_folder(tmp_path / "made") as temporary:
            (temporary / "one").write_text("1")
            assert not (tmp_path / "made").exists()
        assert (tmp_path / "made" / "one").read_text() == "1"

    def test_set_aside_never_overwrites(self, tmp_path):
        names = set()
        for content in "abc":
            (tmp_path / "file").write_text(content)
            names.add(set_aside(tmp_path / "file").name)
        assert len(names) == 3
        assert set_aside(tmp_path / "file") is None


class TestParts:
    def test_reads_across_parts_in_any_order(self, tmp_path):
        table = parted(tmp_path / "t")
        assert table.n_rows == 9
        assert table.starts == [0, 3, 7, 9]
        wanted = np.array([8, 0, 3, 3, 6])
        assert table.take(wanted, ["value"]).column("value").to_pylist() == list(wanted * 0.5)
        assert table.take(np.array([], dtype=np.int64), ["value"]).num_rows == 0
        assert table.rows(2, 8, ["row"]).column("row").to_pylist() == [2, 3, 4, 5, 6, 7]
        assert sum(batch.num_rows for batch in table.blocks(["row"], 2)) == 9

    def test_writer_goes_on_with_the_missing_parts(self, tmp_path):
        first = PartsWriter(tmp_path, SCHEMA, {"a": 1})
        first.write(1, rows(3, 7))
        (tmp_path / "part-00002.parquet.partial").write_text("cut off")
        second = PartsWriter(tmp_path, SCHEMA, {"a": 1})
        assert second.done == {1}
        assert not list(tmp_path.glob("*.partial"))
        second.write(0, rows(0, 3))
        with pytest.raises(CorruptError, match="missing"):
            second.finish(3, {})
        assert second.finish(2, {}).n_rows == 7

    def test_foreign_part_is_refused(self, tmp_path):
        PartsWriter(tmp_path, SCHEMA, {"a": 1}).write(0, rows(0, 3))
        with pytest.raises(CorruptError, match="belongs to another table"):
            PartsWriter(tmp_path, SCHEMA, {"a": 2})

    @pytest.mark.parametrize("damage", ["truncate", "remove", "foreign"])
    def test_damaged_part_is_named(self, tmp_path, damage):
        parted(tmp_path)
        victim = tmp_path / part_name(1)
        if damage == "truncate":
            victim.write_bytes(victim.read_bytes()[:-20])
        elif damage == "remove":
            victim.unlink()
        else:
            size = victim.stat().st_size
            pq.write_table(rows(3, 7), victim)
            victim.write_bytes(victim.read_bytes().ljust(size, b"\0"))
        with pytest.raises(CorruptError, match="part-00001"):
            PartedTable.open(tmp_path)

    def test_a_changed_byte_inside_a_page_is_noticed(self, tmp_path):
        table = parted(tmp_path)
        content = bytearray(table.files[1].read_bytes())
        column = pq.read_metadata(table.files[1]).row_group(0).column(1)
        content[column.data_page_offset + column.total_compressed_size - 1] ^= 1  # the last of the values
        table.files[1].write_bytes(content)
        again = PartedTable.open(tmp_path)
        with pytest.raises(CorruptError, match="part-00001"):
            again.part(1)
        with pytest.raises(CorruptError, match="part-00001"):
            list(again.blocks())

    def test_the_folder_opens_as_it_is(self, tmp_path):
        parted(tmp_path / "t")
        assert pq.read_table(tmp_path / "t").num_rows == 9


class TestTableFile:
    def test_notes_found_while_writing_are_in_the_footer(self, tmp_path):
        notes: dict[str, str] = {}
        with table_writer(tmp_path / "t.parquet", SCHEMA, {"b": 2}, notes) as write:
            write(rows(0, 5))
            write(rows(5, 9).to_batches()[0])
            notes["found"] = "nine"
        table = TableFile(tmp_path / "t.parquet")
        assert (table.n_rows, table.metadata["found"], table.fingerprint) == (9, "nine", digest({"b": 2}))

    def test_truncated_file_is_named(self, tmp_path):
        path = tmp_path / "t.parquet"
        with table_writer(path, SCHEMA, {}) as write:
            write(rows(0, 5))
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(CorruptError, match="cannot be read"):
            TableFile(path)

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 7))
    def test_tables_of_other_part_sizes_are_read_side_by_side(self, tmp_path_factory, sizes, block):
        folder = tmp_path_factory.mktemp("zip")
        left = parted(folder / "left", tuple(sizes))
        right = parted(folder / "right", (sum(sizes),))
        pairs = list(zip_blocks((left, ["row"]), (right, ["row", "value"]), max_rows=block))
        assert all(a.column("row").equals(b.column("row")) for a, b in pairs)
        assert [a.num_rows for a, _ in pairs[:-1]] == [block] * (len(pairs) - 1)
        assert sum(a.num_rows for a, _ in pairs) == sum(sizes)

    def test_tables_of_other_lengths_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="different lengths"):
            list(zip_blocks((parted(tmp_path / "a"), ["row"]), (parted(tmp_path / "b", (2,)), ["row"])))


def stored(path):
    """Return the encodings of every column's values in the first row group, without those of levels."""
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    return {column.path_in_schema: set(column.encodings) - {"RLE", "PLAIN"} for column in columns}


STORED = {
    "row": {"DELTA_BINARY_PACKED"},
    "row_id": {"DELTA_LENGTH_BYTE_ARRAY"},
    "smooth": {"BYTE_STREAM_SPLIT"},
    "few": {"RLE_DICTIONARY"},
    "nothing": {"RLE_DICTIONARY"},
    "text": {"RLE_DICTIONARY"},
}


class TestEncoding:
    def numbers(self):
        n = 80_000
        return pa.table(
            {
                "row": np.arange(n),
                "row_id": [f"{i * 2654435761:032x}" for i in range(n)],
                "smooth": np.random.default_rng(0).random(n),
                "few": np.arange(n) % 5 / 7,
                "nothing": pa.nulls(n, pa.float64()),
                "text": ["same"] * n,
            }
        )

    @pytest.mark.parametrize("block", [1_000, 80_000])
    def test_columns_of_a_file_are_stored_as_fits_their_values(self, tmp_path, block):
        table = self.numbers()
        with table_writer(tmp_path / "t.parquet", table.schema, {}) as write:
            for start in range(0, table.num_rows, block):
                write(table.slice(start, block))
        assert stored(tmp_path / "t.parquet") == STORED
        blocks = TableFile(tmp_path / "t.parquet").blocks()
        assert pa.Table.from_batches(list(blocks)).replace_schema_metadata(None).equals(table)

    def test_parts_are_stored_likewise(self, tmp_path):
        table = self.numbers()
        writer = PartsWriter(tmp_path, table.schema, {})
        writer.write(0, table)
        assert stored(tmp_path / part_name(0)) == STORED
        assert writer.finish(1, {}).part(0).replace_schema_metadata(None).equals(table)

    def test_numbers_that_seldom_repeat_take_less_than_their_width(self, tmp_path):
        with table_writer(tmp_path / "t.parquet", self.numbers().schema, {}) as write:
            write(self.numbers())
        group = pq.read_metadata(tmp_path / "t.parquet").row_group(0)
        sizes = {
            group.column(i).path_in_schema: group.column(i).total_compressed_size / group.num_rows
            for i in range(group.num_columns)
        }
        assert sizes["row"] < 0.1
        assert sizes["smooth"] < 7.5
        assert sizes["few"] < 0.5

    def test_a_table_without_rows(self, tmp_path):
        notes = {"rows": "none"}
        with table_writer(tmp_path / "t.parquet", SCHEMA, {"a": 1}, notes):
            pass
        table = TableFile(tmp_path / "t.parquet")
        assert (table.n_rows, table.metadata["rows"]) == (0, "none")
        assert table.schema.equals(SCHEMA)


class TestStale:
    def test_missing_complete_and_changed(self, tmp_path):
        output = tmp_path / "t"
        assert is_current(output, {"a": 1}, "The table") is False
        parted(output, ingredients={"a": 1, "b": {"c": 2}})
        assert is_current(output, {"a": 1, "b": {"c": 2}}, "The table") is True
        with pytest.raises(StaleError) as error:
            is_current(output, {"a": 1, "b": {"c": 3}}, "The table")
        assert "b.c: 2 -> 3" in error.value.what
        assert "another run name" in error.value.fix
        assert "--overwrite" in error.value.fix

    def test_unfinished_table_of_other_settings_is_stale_too(self, tmp_path):
        PartsWriter(tmp_path / "t", SCHEMA, {"a": 1}).write(0, rows(0, 3))
        assert is_current(tmp_path / "t", {"a": 1}, "The table") is False
        with pytest.raises(StaleError, match="a: 1 -> 2"):
            is_current(tmp_path / "t", {"a": 2}, "The table")

    def test_overwrite_keeps_the_old_one(self, tmp_path):
        parted(tmp_path / "t", ingredients={"a": 1})
        assert is_current(tmp_path / "t", {"a": 2}, "The table", overwrite=True) is False
        assert [path.name.split(".old-")[0] for path in tmp_path.iterdir()] == ["t"]
        assert not (tmp_path / "t").exists()

    def test_file_without_footer_is_refused(self, tmp_path):
        pq.write_table(rows(0, 2), tmp_path / "t.parquet")
        with pytest.raises(CorruptError, match="does not say what it was made from"):
            is_current(tmp_path / "t.parquet", {"a": 1}, "The table")


def stream(values, block=7):
    def blocks():
        for start in range(0, len(values), block):
            piece = values[start : start + block]
            yield np.arange(start, start + len(piece)), piece

    return blocks


finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


class TestRanks:
    @given(st.lists(finite, min_size=1, max_size=60), st.data())
    def test_order_statistics_are_those_of_sorting(self, values, data):
        array = np.array(values)
        wanted = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=4))
        assert ranks.order_statistics(stream(array), wanted) == [np.sort(array)[rank] for rank in wanted]

    @given(
        st.lists(st.floats(-100, 100), min_size=1, max_size=60),
        st.lists(st.floats(0, 1), min_size=1, max_size=3),
    )
    def test_quantiles_are_numpys(self, values, shares):
        found = ranks.quantiles(stream(np.array(values)), shares)
        assert np.allclose(found, np.quantile(np.array(values), shares), rtol=0, atol=1e-12)

    @given(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=50), st.data())
    def test_places_break_ties_by_row(self, values, data):
        array = np.array(values)
        rank = data.draw(st.integers(0, len(values) - 1))
        order = sorted(range(len(values)), key=lambda row: (values[row], row))
        ((value, row),) = ranks.places(stream(array), [rank])
        assert (value, row) == (values[order[rank]], order[rank])

    def test_descending_column_with_nulls(self, tmp_path):
        table = pa.table({"row": [0, 1, 2, 3], "score": pa.array([1.0, None, 3.0, 2.0])})
        path = tmp_path / "t.parquet"
        schema = pa.schema([("row", pa.int64()), ("score", pa.float64())])
        with table_writer(path, schema, {}) as write:
            write(table)
        values = ranks.column_values(TableFile(path), "score", descending=True)
        assert ranks.count(values) == 3
        assert ranks.places(values, [0, 2]) == [(-3.0, 2), (-1.0, 0)]


def hold_lock(folder, ready):
    with RunFolder(folder).lock():
        ready.set()
        time.sleep(60)


class TestLock:
    def test_second_process_is_told_who_owns_the_run_and_the_lock_dies_with_the_first(self, tmp_path):
        context = multiprocessing.get_context("fork")
        ready = context.Event()
        holder = context.Process(target=hold_lock, args=(tmp_path / "run", ready))
        holder.start()
        assert ready.wait(20)
        with pytest.raises(RunError, match=f"process {holder.pid} on"), RunFolder(tmp_path / "run").lock():
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        with RunFolder(tmp_path / "run").lock():
            assert True

    def test_settings_round_trip_and_damage_is_named(self, tmp_path):
        run = RunFolder(tmp_path)
        run.write({"learning_rate": 1e-4, "text": "1e-4"}, {"global_batch": 8})
        assert run.read() == ({"learning_rate": 1e-4, "text": "1e-4"}, {"global_batch": 8})
        run.settings.write_text("a: [")
        with pytest.raises(CorruptError, match=r"run\.yaml cannot be read"):
            run.read()


def test_a_changed_byte_in_the_words_of_a_footer_is_no_failure(tmp_path):
    file = tmp_path / "x.parquet"
    notes = {"dataflex.method": b"lo\xcess", "dataflex.fingerprint": b"\xce"}
    column = pa.field("row", pa.int64(), metadata={"description": b"the \xcerow"})
    pq.write_table(pa.table({"row": [1]}, pa.schema([column], metadata=notes)), file)
    assert TableFile(file).metadata["method"] == "lo\ufffdss"
