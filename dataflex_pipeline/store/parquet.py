"""One Parquet file of a run: writing, reading, and the footer with its ingredients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataflex_pipeline import __version__
from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.schemas import SCHEMA_VERSION
from dataflex_pipeline.store.fingerprint import FINGERPRINT_KEY, INGREDIENTS_KEY, canonical, digest
from dataflex_pipeline.store.versions import installed_versions

ROW_GROUP = 65536
"""Rows per row group, and per block where nothing else is said."""
COUNTING = ("row", "position", "line")
"""Columns of whole numbers that rise by one (rows do not in an index, which then takes their bits)."""
REPEATING = 1 / 8
"""Different values per row up to which a dictionary is smaller than the values' bytes."""


def footer(ingredients: Mapping[str, Any], extra: Mapping[str, str] | None = None) -> dict[bytes, bytes]:
    """Return the file metadata that every table of a run carries."""
    notes = {
        FINGERPRINT_KEY: digest(ingredients).encode(),
        INGREDIENTS_KEY: canonical(ingredients).encode(),
        b"dataflex.schema_version": SCHEMA_VERSION.encode(),
        b"dataflex.version": __version__.encode(),
        b"dataflex.versions": canonical(installed_versions()).encode(),
    }
    return notes | {f"dataflex.{key}".encode(): value.encode() for key, value in (extra or {}).items()}


def read_footer(path: Path) -> dict[bytes, bytes]:
    """Return the file metadata of a Parquet file.

    Raises:
        CorruptError: the file is truncated or not Parquet.
    """
    try:
        return dict(pq.read_metadata(path).metadata or {})
    except (pa.ArrowInvalid, OSError) as error:
        raise corrupt(path, str(error).splitlines()[0]) from error


def corrupt(path: Path, found: str) -> CorruptError:
    """Return the error for a table file that is not what this program wrote."""
    return CorruptError(
        f"{path} cannot be read: {found}",
        "It was written whole by this program, so something else changed, replaced or truncated it.",
        "Delete that file (a missing part is made again), or start over with --overwrite.",
    )


def encoding(first: pa.Table) -> dict[str, Any]:
    """Return how the columns of a file are stored, as keywords of pyarrow's writer.

    Row numbers count up, so they are stored as differences. Numbers with a fraction that seldom repeat are
    split into their bytes, the first bytes of all values together: next to a dictionary, which they would
    fill, that takes a quarter less space and a third of the time to read. A row_id never repeats. All else
    does, and is kept as a dictionary; nested columns are stored as they are. Then zstd.

    Args:
        first: the first rows of the file.
    """
    special = {}
    for field in first.schema:
        if field.name == "row_id":
            special[field.name] = "DELTA_LENGTH_BYTE_ARRAY"
        elif field.name in COUNTING:
            special[field.name] = "DELTA_BINARY_PACKED"
        elif pa.types.is_float64(field.type) or pa.types.is_float32(field.type):
            column = first.column(field.name).slice(0, ROW_GROUP)
            if pc.count_distinct(column).as_py() > REPEATING * len(column):
                special[field.name] = "BYTE_STREAM_SPLIT"
    return {
        "compression": "zstd",
        "use_dictionary": [name for name in first.schema.names if name not in special],
        "column_encoding": special,
        "write_page_checksum": True,
    }


def read_blocks(
    path: Path, columns: Sequence[str] | None = None, max_rows: int = ROW_GROUP
) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of one file; without read-ahead, which would hold the file in memory.

    Raises:
        CorruptError: the file is truncated or not Parquet.
    """
    try:
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as parquet:
            yield from parquet.iter_batches(max_rows, columns=list(columns) if columns is not None else None)
    except (pa.ArrowInvalid, OSError) as error:
        raise corrupt(path, str(error).splitlines()[0]) from error


def read_line(path: Path, place: int, columns: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Return a line of a file as a dictionary, reading only its row group; None beyond the end.

    Raises:
        CorruptError: the file is truncated or not Parquet.
    """
    names = list(columns) if columns is not None else None
    try:
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as parquet:
            for number in range(parquet.num_row_groups):
                n_rows = parquet.metadata.row_group(number).num_rows
                if place < n_rows:
                    line: dict[str, Any] = (
                        parquet.read_row_group(number, names).slice(place, 1).to_pylist()[0]
                    )
                    return line
                place -= n_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise corrupt(path, str(error).splitlines()[0]) from error
    return None


def read_whole(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read one file, whole; folders named ``key=value`` above it are no columns of it.

    Raises:
        CorruptError: the file is truncated, not Parquet, or a page of it was changed.
    """
    names = list(columns) if columns is not None else None
    try:
        return pq.read_table(path, columns=names, page_checksum_verification=True, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise corrupt(path, str(error).splitlines()[0]) from error


def check_fingerprint(path: Path, fingerprint: str) -> None:
    """Raise CorruptError unless the Parquet file carries exactly this fingerprint."""
    found = read_footer(path).get(FINGERPRINT_KEY, b"").decode(errors="replace")
    if found != fingerprint:
        raise corrupt(
            path, f"it belongs to another table (fingerprint {found or 'none'}, expected {fingerprint})"
        )
