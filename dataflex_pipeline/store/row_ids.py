"""The row ids of a prepared table in a file of their own, where some are read without the others.

An index names its rows by ``row_id``. These are random and most of what a score table takes on disk; from
Parquet, one of them costs decoding the 65,536 of its row group. Here each has its place: 16 bytes per row,
one after the other. The file is made from the table when ids are first asked for, and anew when deleted.
"""

from __future__ import annotations

import binascii
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import FileLock

from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.store.atomic import atomic_file
from dataflex_pipeline.store.parts import PartedTable

ROW_IDS = "_row_ids.bin"
"""Readers of folders pass over names that begin with an underscore."""
SIZE = 16
"""Bytes of a row_id, which is written as twice as many hexadecimal digits."""
WINDOW = 1 << 16
"""Rows that are read at a time (1 MiB)."""
CHUNK = 1 << 24
"""Ids per chunk of the answer; an Arrow array holds at most 2 GiB of text."""


def read_row_ids(table: PartedTable, rows: npt.NDArray[np.int64]) -> pa.ChunkedArray:
    """Return the row ids of some rows.

    Reads the windows of the file that the rows are in, and the parts that the first and the last of them are
    in, whose ids have to agree. Where the file is missing, it is made first.

    Args:
        table: with the column ``row_id``, of content hashes.
        rows: row numbers, in any order, repeats allowed. [n]

    Returns:
        Their ids. [n]

    Raises:
        CorruptError: the file is not that of this table, or the table holds something else than hashes.
    """
    path = table.folder / ROW_IDS
    if not path.is_file():
        with FileLock(table.folder / ".row_ids-lock"):
            if not path.is_file():
                _write(table, path)
    size = path.stat().st_size
    if size != table.n_rows * SIZE:
        raise _damaged(path, f"it has {size} bytes, and {table.n_rows} rows take {table.n_rows * SIZE}")
    wanted, back = np.unique(rows, return_inverse=True)
    found = _read(path, wanted)
    for place in {0, len(wanted) - 1} if len(wanted) else ():
        row = int(wanted[place])
        if table.rows(row, row + 1, ["row_id"]).column("row_id")[0].as_py() != found[place].tobytes().hex():
            raise _damaged(path, f"its id of row {row} is not that of the table")
    chunks = [_unpacked(found[back[start : start + CHUNK]]) for start in range(0, len(rows), CHUNK)]
    return pa.chunked_array(chunks, pa.string())


def _read(path: Path, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Return the ids of rows in rising order. [n, SIZE]"""
    found = np.empty((len(wanted), SIZE), np.uint8)
    starts = np.flatnonzero(np.diff(wanted // WINDOW, prepend=-1))
    # Read, not mapped: a disk that fails while a map is looked at ends the process without a word.
    with path.open("rb") as file:
        for first, stop in pairwise([*starts.tolist(), len(wanted)]):
            begin = int(wanted[first]) // WINDOW * WINDOW
            file.seek(begin * SIZE)
            window = np.frombuffer(file.read(WINDOW * SIZE), np.uint8).reshape(-1, SIZE)
            found[first:stop] = window[wanted[first:stop] - begin]
    return found


def _write(table: PartedTable, path: Path) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for block in table.blocks(["row_id"]):
            try:
                file.write(_packed(block.column("row_id")))
            except (pa.ArrowInvalid, binascii.Error) as error:
                raise CorruptError(
                    f"{table.folder} has a row_id that is not {2 * SIZE} hexadecimal digits.",
                    "Rows are named by a hash of their content, so something else made this table.",
                    "Prepare the pool again with --overwrite.",
                ) from error


def _packed(ids: pa.StringArray) -> bytes:
    """Return the ids as ``SIZE`` bytes each, one after the other."""
    if ids.null_count:
        raise pa.ArrowInvalid("null")
    digits = ids.cast(pa.binary()).cast(pa.binary(2 * SIZE))
    first, stop = digits.offset * 2 * SIZE, (digits.offset + len(digits)) * 2 * SIZE
    return binascii.unhexlify(memoryview(digits.buffers()[1])[first:stop])


def _unpacked(ids: npt.NDArray[np.uint8]) -> pa.StringArray:
    """Return ids of ``SIZE`` bytes each as text. [n]"""
    ends = np.arange(len(ids) + 1, dtype=np.int32) * 2 * SIZE
    return pa.StringArray.from_buffers(
        len(ids), pa.py_buffer(ends), pa.py_buffer(binascii.hexlify(ids.tobytes()))
    )


def _damaged(path: Path, found: str) -> CorruptError:
    return CorruptError(
        f"{path} cannot be used: {found}.",
        "It was made from the table that it lies beside, so something else changed or replaced it.",
        "Delete it (it is made again) and run the same command.",
    )
