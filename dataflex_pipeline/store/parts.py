"""A table as a folder of Parquet parts: written part by part, resumed, complete with its manifest.

A part holds a contiguous range of rows, is written atomically and carries the table's fingerprint in
its footer. The manifest is written last and lists every part; a table is complete when its manifest
is there. Nothing in a part depends on the number of processes or on what else was computed when.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataflex_pipeline import __version__
from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.schemas import SCHEMA_VERSION
from dataflex_pipeline.store.atomic import TEMPORARY, atomic_file, read_json, write_json
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parquet import (
    ROW_GROUP,
    check_fingerprint,
    corrupt,
    encoding,
    footer,
    read_blocks,
    read_whole,
)

MANIFEST = "_manifest.json"
"""Readers of folders (pyarrow, Spark) pass over names that begin with an underscore."""


def part_name(number: int) -> str:
    """Return the file name of a part."""
    return f"part-{number:05d}.parquet"


class PartsWriter:
    """Writes a parted table; parts already there with the same fingerprint count as done.

    Parts with other columns, of an earlier version that was cut off, are written again.

    Args:
        folder: the table's folder, made when missing.
        schema: columns of every part.
        ingredients: what the table is made from; its digest is the table's fingerprint.
        joining: another process made the folder and looks after it: write parts, and nothing else.

    Raises:
        CorruptError: a part on disk is truncated or carries another fingerprint.
    """

    def __init__(
        self, folder: Path, schema: pa.Schema, ingredients: Mapping[str, Any], *, joining: bool = False
    ) -> None:
        self.folder = folder
        self.ingredients = dict(ingredients)
        self.fingerprint = digest(ingredients)
        self.schema = schema.with_metadata(footer(ingredients))
        self.done: frozenset[int] = frozenset()
        if joining:  # the temporary files there are those of parts that others are writing now
            return
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"*{TEMPORARY}"):
            leftover.unlink()
        self.done = frozenset(self._scan())

    def _scan(self) -> Iterator[int]:
        for path in sorted(self.folder.glob("part-*.parquet")):
            check_fingerprint(path, self.fingerprint)
            if pq.read_schema(path).names == self.schema.names:
                yield int(path.stem.removeprefix("part-"))

    def write(self, number: int, table: pa.Table) -> None:
        """Write one part atomically; columns are cast to the schema."""
        whole = (
            table.select(self.schema.names).cast(self.schema).replace_schema_metadata(self.schema.metadata)
        )
        with atomic_file(self.folder / part_name(number)) as temporary:
            pq.write_table(whole, temporary, row_group_size=ROW_GROUP, **encoding(whole))
        self.done |= {number}

    def take_in(self, number: int, seconds: float) -> None:
        """Count a part that another process wrote as done, once it is visible here.

        Raises:
            CorruptError: it does not become visible in that time, or is truncated or foreign.
        """
        path = self.folder / part_name(number)
        deadline = time.monotonic() + seconds
        while not path.is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
            os.listdir(self.folder)  # noqa: PTH208 (asks the server anew; NFS remembers what was not there)
        check_fingerprint(path, self.fingerprint)
        self.done |= {number}

    def read(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Read columns of a part that is done."""
        return read_whole(self.folder / part_name(number), columns)

    def finish(self, n_parts: int, summary: Mapping[str, Any], side_files: str | None = None) -> PartedTable:
        """Check that parts 0..n_parts-1 are there and write the manifest.

        Args:
            n_parts: how many parts the table has.
            summary: plain values worth keeping beside the table (counts, seconds, notices).
            side_files: pattern of files in the folder that only served to make the parts; they are removed.
        """
        missing = sorted(set(range(n_parts)) - self.done)
        if missing or len(self.done) != n_parts:
            raise CorruptError(
                f"{self.folder} has parts {sorted(self.done)[:5]}... where {n_parts} were expected "
                f"(missing: {missing[:5]}).",
                "A table is complete only with exactly its own parts.",
                "Run the same command again; if it stays, use --overwrite.",
            )
        parts = []
        start = 0
        for number in range(n_parts):
            path = self.folder / part_name(number)
            rows = pq.read_metadata(path).num_rows
            parts.append({"file": path.name, "start": start, "rows": rows, "bytes": path.stat().st_size})
            start += rows
        for path in self.folder.glob(side_files) if side_files is not None else ():
            path.unlink()
        write_json(
            self.folder / MANIFEST,
            {
                "fingerprint": self.fingerprint,
                "ingredients": self.ingredients,
                "parts": parts,
                "rows": start,
                "schema_version": SCHEMA_VERSION,
                "summary": dict(summary),
                "version": __version__,
            },
        )
        return PartedTable.open(self.folder)


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return a manifest whose parts are named and counted from row 0 on without a gap."""
    manifest = read_json(path)
    try:
        parts = manifest["parts"]
        ends = [part["start"] + part["rows"] for part in parts]
        sound = (
            [part["start"] for part in parts] == [0, *ends[:-1]]
            and ends[-1:] == [manifest["rows"]]
            and all(part.keys() == {"file", "start", "rows", "bytes"} for part in parts)
            and manifest["fingerprint"] == digest(manifest["ingredients"])
            and isinstance(manifest["summary"], dict)
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise CorruptError(
            f"{path} is not the manifest that was written.",
            "Its entries are missing or contradict each other, so something else changed it.",
            "Delete it (the command that makes the table writes it again), or use --overwrite.",
        )
    return dict(manifest)


class PartedTable:
    """A complete parted table, read part by part in row order.

    Attributes:
        folder: where it is. schema: its columns. n_rows: rows over all parts.
        fingerprint, ingredients, summary: from the manifest.
        starts: first row of every part, then n_rows. [n_parts + 1]
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: str = manifest["fingerprint"]
        self.ingredients: dict[str, Any] = manifest["ingredients"]
        self.summary: dict[str, Any] = manifest["summary"]
        self.n_rows: int = manifest["rows"]
        self.files = [folder / part["file"] for part in manifest["parts"]]
        self.starts = [part["start"] for part in manifest["parts"]] + [self.n_rows]
        self.schema: pa.Schema = pq.read_schema(self.files[0])

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        return len(self.files)

    @classmethod
    def is_complete(cls, folder: Path) -> bool:
        """Whether the folder holds a finished table."""
        return (folder / MANIFEST).is_file()

    @classmethod
    def open(cls, folder: Path) -> PartedTable:
        """Open a finished table.

        Raises:
            CorruptError: no manifest, or a part is missing, of another size, truncated or foreign.
        """
        if not cls.is_complete(folder):
            raise CorruptError(
                f"{folder} has no {MANIFEST}.",
                "The table was never finished, so its rows cannot be trusted to be all there.",
                "Run the command that makes it again; finished parts are kept.",
            )
        manifest = _read_manifest(folder / MANIFEST)
        for part in manifest["parts"]:
            path = folder / part["file"]
            if not path.is_file():
                raise corrupt(path, "the manifest names it and it is missing")
            if path.stat().st_size != part["bytes"]:
                raise corrupt(path, f"{path.stat().st_size} bytes where the manifest says {part['bytes']}")
            check_fingerprint(path, manifest["fingerprint"])
        return cls(folder, manifest)

    @classmethod
    def reopen(cls, folder: Path) -> PartedTable:
        """Open a finished table that another process of the same launch has just opened and checked."""
        return cls(folder, _read_manifest(folder / MANIFEST))

    def part(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one part, whole."""
        return read_whole(self.files[number], columns)

    def blocks(self, columns: Sequence[str] | None = None, max_rows: int = 65536) -> Iterator[pa.RecordBatch]:
        """Yield record batches of at most ``max_rows`` rows in row order, one part at a time."""
        for path in self.files:
            yield from read_blocks(path, columns, max_rows)

    def rows(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Read rows start..stop-1; only the parts that hold them are read."""
        pieces = []
        for number, (first, end) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            if first < stop and end > start:
                inside = self.part(number, columns)
                pieces.append(inside.slice(max(start - first, 0), min(stop, end) - max(start, first)))
        return pa.concat_tables(pieces) if pieces else self.schema.empty_table().select(list(columns))

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Gather rows by number, in the order given, repeats allowed.

        Args:
            rows: row numbers. [n] int64
            columns: columns to read.

        Returns:
            A table of n rows. Only parts that hold a wanted row are read, one at a time.
        """
        wanted, inverse = np.unique(rows, return_inverse=True)
        pieces = []
        for number, (start, stop) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            inside = wanted[(wanted >= start) & (wanted < stop)] - start
            if len(inside):
                pieces.append(self.part(number, columns).take(pa.array(inside)))
        if not pieces:
            return self.schema.empty_table().select(list(columns))
        return pa.concat_tables(pieces).take(pa.array(inverse))

    def sum(self, name: str, where: str | None = None) -> int:
        """Return the sum of an integer column, over rows where the boolean column ``where`` is true."""
        total = 0
        for block in self.blocks([name] if where is None else [name, where]):
            kept = block if where is None else block.filter(block.column(where))
            total += pc.sum(kept.column(name)).as_py() or 0
        return total
