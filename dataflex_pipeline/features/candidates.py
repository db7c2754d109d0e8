"""Candidates: the rows of the pool that a costly method is asked about, and tables seen through them.

Of the rows that a cheaper method scored, the best are the candidates: highest score first, ties by row. A
table seen through them keeps every row at its place; the others are not valid, with the reason
`NOT_A_CANDIDATE`. Features pass rows that are not valid over, with their reason: nothing is
computed for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline.errors import DataError
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.ranks import column_values, count, order_statistics, places
from dataflex_pipeline.store.tables import TableFile

NOT_A_CANDIDATE = "not a candidate"
"""Reason of a row that could be used and that the cheaper method did not rank among its best."""


@dataclass(frozen=True)
class Candidates:
    """The best rows of a score table.

    Attributes:
        scores: the table. count: how many of its best rows they are.
        member: which rows of the pool are. [N] bool
        digest: of the rows.
    """

    scores: Path
    count: int
    member: np.ndarray
    digest: str

    @classmethod
    def best(cls, scores: Path, wanted: int) -> Self:
        """Choose the rows of the highest score, ties by row; all that have one where there are fewer.

        Raises:
            DataError: every row has the same score.
        """
        table = TableFile(scores)
        values = column_values(table, "score", descending=True)
        scored = count(values)
        wanted = min(wanted, scored)
        if wanted < scored:
            _check_order(table, order_statistics(values, [0, scored - 1]))
        last, row = places(values, [wanted - 1])[0]
        member = np.zeros(table.n_rows, dtype=bool)
        for rows, numbers in values():
            member[rows[(numbers < last) | ((numbers == last) & (rows <= row))]] = True
        return cls(
            scores, wanted, member, hashlib.blake2b(np.packbits(member).tobytes(), digest_size=16).hexdigest()
        )


def _check_order(table: TableFile, extremes: Sequence[float]) -> None:
    if extremes[0] == extremes[1]:
        raise DataError(
            f"Every row has the same score in {table.path}.",
            "Candidates are the rows of the highest score, and no score is higher than another.",
            "Name a method in candidates that tells rows apart.",
        )


class CandidateTable(PartedTable):
    """A parted table of the pool seen through candidates; see the module.

    Args:
        whole: the table, with ``valid`` and ``reason``.
        candidates: of the same pool.

    Attributes:
        whole: the table as it is on disk.
    """

    def __init__(self, whole: PartedTable, candidates: Candidates) -> None:
        vars(self).update(vars(whole))
        self.whole, self.candidates = whole, candidates
        self.fingerprint = digest({"table": whole.fingerprint, "candidates": candidates.digest})

    def part(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read one part, whole."""
        start = self.starts[number]
        return self._seen(self.whole.part(number, self._read(columns)), start, columns)

    def blocks(self, columns: Sequence[str] | None = None, max_rows: int = 65536) -> Iterator[pa.RecordBatch]:
        """Yield record batches of at most ``max_rows`` rows in row order, one part at a time."""
        start = 0
        for block in self.whole.blocks(self._read(columns), max_rows):
            seen = self._seen(pa.Table.from_batches([block]), start, columns)
            yield seen.combine_chunks().to_batches()[0] if block.num_rows else block
            start += block.num_rows

    def _read(self, columns: Sequence[str] | None) -> list[str]:
        """Return the columns to read: the reason cannot be told without knowing who was valid before."""
        names = list(self.schema.names if columns is None else columns)
        return [*names, "valid"] if "reason" in names and "valid" not in names else names

    def _seen(self, table: pa.Table, start: int, columns: Sequence[str] | None) -> pa.Table:
        """Return rows from ``start`` on, those that are no candidates not valid."""
        names = table.column_names
        if "valid" in names:
            member = pa.array(self.candidates.member[start : start + table.num_rows])
            valid = table.column("valid")
            lost = pc.and_(valid, pc.invert(member))
            changed = {"valid": pc.and_(valid, member)}
            if "reason" in names:
                changed["reason"] = pc.if_else(lost, NOT_A_CANDIDATE, table.column("reason"))
            for name, column in changed.items():
                place = names.index(name)
                table = table.set_column(place, table.schema.field(place), column)
        return table if columns is None else table.select(list(columns))


@dataclass(frozen=True)
class Cascade:
    """How the feature tables of a costly method are restricted.

    Attributes:
        candidates: the rows that it is asked about.
        whole: fingerprints of tables that the cheaper method has of every row: computed once, and read
            through the candidates.
    """

    candidates: Candidates
    whole: frozenset[str]
