"""The first pass over the sources: they are read once and checked, and nothing is written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dataflex_pipeline.api import Progress, Silent
from dataflex_pipeline.data.conversation import canonical_json
from dataflex_pipeline.data.formats.layout import Layout, detect_layout
from dataflex_pipeline.data.formats.passed_over import Together, passed_over
from dataflex_pipeline.data.settings import DataSettings, PlacedRow, Row
from dataflex_pipeline.data.sources.columns import ColumnTypes, OriginalColumn, is_unicode
from dataflex_pipeline.data.sources.named import Source, resolve_sources
from dataflex_pipeline.errors import DataError, did_you_mean
from dataflex_pipeline.store.fingerprint import file_state

Stamp = tuple[str | int, ...]
MAX_COLUMNS = 1000
_REPORT_EVERY = 1000


@dataclass(frozen=True)
class ScannedSource:
    """What the first pass found out about one source.

    Attributes:
        source: where the rows are. layout: how to read them.
        n_rows: rows. digest: blake2b-128 (hex) of all rows in order.
        stamps: path and `file_state` of each of its files.
        notices: what of its entry, folder or columns is passed over or read otherwise, one sentence each.
        passed_over: column that other tools give a meaning to and that is not used -> rows that fill it.
    """

    source: Source
    layout: Layout
    n_rows: int
    digest: str
    stamps: tuple[Stamp, ...]
    notices: tuple[str, ...] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def rows(self, number: int) -> Iterator[PlacedRow]:
        """Yield the rows again, for the second pass.

        Args:
            number: of the source.

        Raises:
            DataError: a file is not the one that was scanned.
        """
        if _stamps(self.source) != self.stamps:
            raise self._changed()
        count = 0
        for file, line, row in self.source.placed_rows():
            count += 1
            yield PlacedRow(number, row, file, line)
        if count != self.n_rows:
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(
            f"data set '{self.source.given}' changed while it was being read.",
            "Row numbers and the fingerprint belong to what was there at first.",
            "Run the same command again when nothing writes to it.",
        )


@dataclass(frozen=True)
class Scan:
    """All sources of a pool or target after the first pass, and the union of their columns."""

    sources: tuple[ScannedSource, ...]
    columns: tuple[OriginalColumn, ...]

    @property
    def n_rows(self) -> int:
        """Rows over all sources."""
        return sum(scanned.n_rows for scanned in self.sources)

    @property
    def notices(self) -> list[str]:
        """What a user should know about the sources, one line each."""
        return [line for scanned in self.sources for line in scanned.notices]

    @property
    def passed_over(self) -> dict[str, dict[str, int]]:
        """Source -> column that is not used -> rows that fill it; only sources that have such columns."""
        return {each.source.name: dict(each.passed_over) for each in self.sources if each.passed_over}

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield (number of the source, row) over all sources in order."""
        return ((each.source, each.row) for each in self.placed_rows())

    def placed_rows(self) -> Iterator[PlacedRow]:
        """Yield the rows as `rows` does, each with its file and line."""
        for number, scanned in enumerate(self.sources):
            yield from scanned.rows(number)


def scan_sources(
    settings: DataSettings, progress: Progress | None = None, sources: Sequence[Source] | None = None
) -> Scan:
    """Find every source, read it once as a stream, and tell its format.

    Args:
        settings: what to read.
        progress: where to report.
        sources: those of the settings, where they are resolved already.

    Returns:
        What the second pass and the fingerprint need.

    Raises:
        DataError: a source is missing, empty, malformed, in no known format, or lacks the group column.
    """
    report = progress or Silent()
    types = ColumnTypes()
    scanned = []
    for source in resolve_sources(settings) if sources is None else sources:
        seen = ColumnTypes()
        report.start(f"reading {source.name}", None, "rows")
        scanned.append(_scan_one(source, seen, report))
        report.finish()
        _check_group(settings, source, seen)
        types.merge(seen)
    return Scan(tuple(scanned), types.columns())


def _scan_one(source: Source, seen: ColumnTypes, report: Progress) -> ScannedSource:
    stamps = _stamps(source)
    hasher = hashlib.blake2b(digest_size=16)
    together = Together(source)
    count = 0
    for row in source.rows():
        seen.see(row)
        together.see(row)
        hasher.update(canonical_json(row).encode("ascii") + b"\n")
        count += 1
        if count % _REPORT_EVERY == 0:
            _check_columns(source, seen)
            report.advance(_REPORT_EVERY)
    report.advance(count % _REPORT_EVERY)
    if count == 0:
        raise DataError(
            f"data set '{source.given}' has no rows.",
            "A pool or target needs at least one.",
            "Give another data set. Nothing was written.",
        )
    _check_columns(source, seen)
    layout = detect_layout(source, seen.samples)
    over = passed_over(source, layout, seen, together)
    notices = (*source.notices, *source.late_notices(), *over.notices)
    return ScannedSource(source, layout, count, hasher.hexdigest(), stamps, notices, over.rows)


def _stamps(source: Source) -> tuple[Stamp, ...]:
    return tuple((str(path), *file_state(path)) for path in source.files)


def _check_columns(source: Source, seen: ColumnTypes) -> None:
    if len(seen.kinds) > MAX_COLUMNS:
        raise DataError(
            f"data set '{source.given}' has more than {MAX_COLUMNS} different columns.",
            "Its rows seem to use data as keys, and each key would become a column of the table.",
            "Store such data under one key, as a list or as text.",
        )
    odd = [name for name in seen.kinds if not is_unicode(name)]
    if odd:
        raise DataError(
            f"data set '{source.given}' has a column {odd[0]!a}.",
            "It holds half of a surrogate pair, so it is no text that a table could name a column by.",
            "Rename the column. Nothing was written.",
        )


def _check_group(settings: DataSettings, source: Source, seen: ColumnTypes) -> None:
    name = settings.group_column
    if name is not None and name not in seen.kinds:
        raise DataError(
            f"group column '{name}' is not in data set '{source.given}'.{did_you_mean(name, seen.kinds)}",
            f"Its columns are {', '.join(seen.kinds)}.",
            "Name a column of every target data set, or none to group by data set.",
        )


def describe(scan: Scan) -> list[dict[str, Any]]:
    """Return what of the sources decides the prepared rows, as plain values."""
    return [
        {
            "name": each.source.name,
            "rows": each.n_rows,
            "digest": each.digest,
            **each.layout.as_plain(),
        }
        for each in scan.sources
    ]
