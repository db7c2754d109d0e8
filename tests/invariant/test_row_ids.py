"""The row ids of a prepared table in their own file: what it holds, when it is made, how damage is told."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from sampling_tables import pool_of, probabilities_of, scores_of

from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.sampling import DrawSettings, draw
from dataflex_pipeline.store import row_ids
from dataflex_pipeline.store.atomic import TEMPORARY
from dataflex_pipeline.store.parts import PartedTable, PartsWriter
from dataflex_pipeline.store.row_ids import ROW_IDS, read_row_ids

N = 1_000


def hashes(n: int, seed: int = 0) -> list[str]:
    return [bytes(row).hex() for row in np.random.default_rng(seed).integers(0, 256, (n, 16), np.uint8)]


@pytest.fixture
def pool(tmp_path) -> PartedTable:
    ids = hashes(N)
    schema = pa.schema({"row": pa.int64(), "row_id": pa.string(), "source": pa.string()})
    writer = PartsWriter(tmp_path / "pool", schema, {})
    for number, start in enumerate(range(0, N, 300)):
        rows = np.arange(start, min(start + 300, N))
        columns = {"row": rows, "row_id": ids[start : start + 300], "source": ["all"] * len(rows)}
        writer.write(number, pa.table(columns))
    return writer.finish(4, {})


@pytest.mark.parametrize("rows", [[], [0], [999, 0, 299, 300, 299], range(N), [5] * 40])
def test_the_ids_are_those_of_the_table(pool, rows):
    rows = np.array(rows, np.int64)
    for _ in range(2):  # made, then read
        found = read_row_ids(pool, rows)
        assert found.type == pa.string()
        assert found.to_pylist() == pool.take(rows, ["row_id"]).column("row_id").to_pylist()


def test_the_file_takes_16_bytes_a_row(pool):
    read_row_ids(pool, np.array([3]))
    assert (pool.folder / ROW_IDS).read_bytes() == bytes.fromhex("".join(hashes(N)))
    assert PartedTable.open(pool.folder).n_rows == N  # the table beside it is what it was


def test_it_is_read_in_windows(pool, monkeypatch):
    rows = np.array([0, 255, 256, 999, 600, 256, 511, 512])
    for window, chunk in ((256, 3), (7, 1), (1000, 8)):
        monkeypatch.setattr(row_ids, "WINDOW", window)
        monkeypatch.setattr(row_ids, "CHUNK", chunk)
        assert read_row_ids(pool, rows).to_pylist() == [hashes(N)[row] for row in rows]


def test_it_is_made_once(pool):
    read_row_ids(pool, np.array([3]))
    before = (pool.folder / ROW_IDS).stat()
    read_row_ids(PartedTable.open(pool.folder), np.array([4]))
    after = (pool.folder / ROW_IDS).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_file_that_was_not_finished_is_made_again(pool):
    (pool.folder / (ROW_IDS + TEMPORARY)).write_bytes(b"half of it")
    assert read_row_ids(pool, np.array([7])).to_pylist() == [hashes(N)[7]]
    assert not (pool.folder / (ROW_IDS + TEMPORARY)).exists()


def test_two_that_make_it_at_once_make_the_same(pool):
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda row: read_row_ids(pool, np.array([row])).to_pylist(), range(64)))
    assert found == [[each] for each in hashes(N)[:64]]
    assert (pool.folder / ROW_IDS).read_bytes() == bytes.fromhex("".join(hashes(N)))


def test_a_full_disk_leaves_nothing_behind(pool, monkeypatch):
    def full(ids):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(row_ids, "_packed", full)
        with pytest.raises(OSError, match="No space left"):
            read_row_ids(pool, np.array([3]))
    assert not list(pool.folder.glob(f"{ROW_IDS}*"))
    assert read_row_ids(pool, np.array([3])).to_pylist() == [hashes(N)[3]]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def of_another_table(path):
    path.write_bytes(bytes.fromhex("".join(hashes(N, seed=1))))


@pytest.mark.parametrize("damage", [cut, emptied, of_another_table])
def test_a_file_that_is_not_this_tables_is_told(pool, damage):
    read_row_ids(pool, np.array([3]))
    damage(pool.folder / ROW_IDS)
    with pytest.raises(CorruptError, match="Delete it") as told:
        read_row_ids(pool, np.array([3, 8]))
    assert ROW_IDS in str(told.value)
    (pool.folder / ROW_IDS).unlink()
    assert read_row_ids(pool, np.array([3])).to_pylist() == [hashes(N)[3]]


def test_ids_that_are_no_content_hashes_are_told(tmp_path):
    writer = PartsWriter(tmp_path / "pool", pa.schema({"row": pa.int64(), "row_id": pa.string()}), {})
    for ids in (["a", "b"], ["g" * 32, "0" * 32], [None, "0" * 32]):
        writer.write(0, pa.table({"row": [0, 1], "row_id": ids}))
        with pytest.raises(CorruptError, match="32 hexadecimal"):
            read_row_ids(writer.finish(1, {}), np.array([0]))
        assert not list((tmp_path / "pool").glob(f"{ROW_IDS}*"))


def test_an_index_has_the_ids_of_the_pool(pool):
    scores = scores_of(np.linspace(0, 1, N).tolist())
    p = np.full(N, 1 / N)
    for settings in (DrawSettings("sample", 50, seed=2), DrawSettings("top_k", 50)):
        index = draw(scores, probabilities_of(p), pool, settings).index
        rows = index.column("row").to_numpy()
        assert index.column("row_id").to_pylist() == [hashes(N)[row] for row in rows]
        in_memory = draw(scores, probabilities_of(p), pool_of(N), settings).index
        assert index.drop_columns("row_id").equals(in_memory.drop_columns("row_id"))
