"""Preparation of single rows: from a raw row to the row of a prepared table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline.api import Split
from dataflex_pipeline.data.chat.labelled import ChatFormat, Piece
from dataflex_pipeline.data.conversation import Conversation, RowError, content_hash
from dataflex_pipeline.data.formats.formats import to_conversation
from dataflex_pipeline.data.scan import Scan
from dataflex_pipeline.data.settings import DataSettings, PlacedRow, Row
from dataflex_pipeline.data.sources.columns import original_arrays
from dataflex_pipeline.schemas import GROUP, IGNORED, PLACE, PREPARED

NOTE_SEPARATOR = "; "
"""Between the notes of a row; no note has it in its text."""
ROWS_NAMED = 3
"""Rows that are named for a reason."""


def prepared_schema(scan: Scan, split: Split) -> pa.Schema:
    """Return the columns of a prepared table: the fixed ones, the place, ``group`` of a target, originals."""
    group = [GROUP] if split == "target" else []
    return pa.schema([*PREPARED, *PLACE, *group, *(each.field for each in scan.columns)])


@dataclass
class Draft:
    """A row on its way: what is known of it, and the reason once there is one."""

    row_id: str
    group: str = ""
    conversation: Conversation | None = None
    pieces: Sequence[Piece] = ()
    input_ids: Sequence[int] = ()
    labels: Sequence[int] = ()
    reason: str | None = None
    notes: Sequence[str] = ()

    @property
    def note(self) -> str | None:
        """What a usable row's notes say together; a row that cannot be used has its reason instead."""
        return NOTE_SEPARATOR.join(self.notes) if self.notes and self.reason is None else None

    @property
    def n_response_tokens(self) -> int:
        """Labelled tokens that are predicted: position 0 never is."""
        predicted = self.labels[1:]
        return len(predicted) - predicted.count(IGNORED)


class RowMaker:
    """Makes prepared rows out of raw ones; a row that cannot be used gets its reason.

    Args:
        settings: how rows are cut and labelled. scan: layouts and columns of the sources.
        chat: how they are written and tokenised. split: a target also has a group.
    """

    def __init__(self, settings: DataSettings, scan: Scan, chat: ChatFormat, split: Split) -> None:
        self.settings, self.scan, self.chat, self.split = settings, scan, chat, split
        self.schema = prepared_schema(scan, split)

    def table(self, start: int, rows: Sequence[PlacedRow]) -> pa.Table:
        """Return the prepared rows of a run of raw ones.

        Args:
            start: row number of the first.
            rows: with the numbers of their sources. [n]

        Returns:
            A table of n rows in the prepared schema.
        """
        drafts = [self._draft(each.source, each.row) for each in rows]
        usable = [draft for draft in drafts if draft.reason is None]
        for draft, (ids, labels) in zip(
            usable, self.chat.encode([draft.pieces for draft in usable]), strict=True
        ):
            self._fit(draft, ids, labels)
        return self._assemble(start, drafts, rows)

    def _draft(self, number: int, row: Row) -> Draft:
        scanned = self.scan.sources[number]
        draft = Draft(content_hash(row), scanned.source.name)
        try:
            read = to_conversation(row, scanned.layout.of(row), scanned.source.columnar)
            own = self.chat.fitted(read)
            draft.row_id = own.row_id
            draft.conversation = own.with_system(self.settings.default_system)
            self._set_group(draft, row)
            cut = self.chat.cut(draft.conversation, self.settings.mask_history)
            draft.pieces = cut.pieces
            draft.notes = tuple(dict.fromkeys((*own.notes, *cut.notes)))
        except RowError as problem:
            draft.reason = str(problem)
        return draft

    def _set_group(self, draft: Draft, row: Row) -> None:
        name = self.settings.group_column
        if self.split == "pool" or name is None:
            return
        value = row.get(name)
        draft.group = "" if value is None else str(value)
        if not draft.group:
            raise RowError(f"group column {name} is empty")

    def _fit(self, draft: Draft, ids: Sequence[int], labels: Sequence[int]) -> None:
        limit = self.settings.cutoff_len
        draft.input_ids, draft.labels = ids[:limit], labels[:limit]
        if draft.n_response_tokens == 0:
            cut = len(ids) > limit
            draft.reason = (
                f"no response tokens left after cutoff_len {limit}"
                if cut
                else "the response has no token that can be predicted"
            )

    def _assemble(self, start: int, drafts: Sequence[Draft], rows: Sequence[PlacedRow]) -> pa.Table:
        columns: dict[str, Any] = {
            "row": range(start, start + len(drafts)),
            "row_id": [draft.row_id for draft in drafts],
            "source": [self.scan.sources[each.source].source.name for each in rows],
            "messages": [_plain_messages(draft.conversation) for draft in drafts],
            "input_ids": [draft.input_ids for draft in drafts],
            "labels": [draft.labels for draft in drafts],
            "n_tokens": [len(draft.input_ids) for draft in drafts],
            "n_response_tokens": [draft.n_response_tokens for draft in drafts],
            "valid": [draft.reason is None for draft in drafts],
            "reason": [draft.reason for draft in drafts],
            "note": [draft.note for draft in drafts],
            "file": [each.file for each in rows],
            "line": [each.line for each in rows],
        }
        if self.split == "target":
            columns["group"] = [draft.group for draft in drafts]
        arrays = [pa.array(values, type=self.schema.field(name).type) for name, values in columns.items()]
        originals = original_arrays(self.scan.columns, [each.row for each in rows])
        return pa.Table.from_arrays([*arrays, *originals], schema=self.schema)


def _plain_messages(conversation: Conversation | None) -> list[dict[str, str]]:
    if conversation is None:
        return []
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


@dataclass
class Tally:
    """Counts over prepared rows, for the summary.

    Attributes:
        rows, valid: per source. reasons: of rows that are not valid. notes: of rows that are.
        first: the first rows of each reason.
        tokens, response_tokens, at_cutoff: over valid rows.
        longest: tokens of the longest valid row. largest_token: largest token id in valid rows, -1 for none.
    """

    rows: Counter[str] = field(default_factory=Counter)
    valid: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[int]] = field(default_factory=dict)
    tokens: int = 0
    response_tokens: int = 0
    at_cutoff: int = 0
    longest: int = 0
    largest_token: int = -1

    COUNTED = ("row", "source", "valid", "reason", "note", "n_tokens", "n_response_tokens")
    COLUMNS = (*COUNTED, "input_ids")

    def add(self, table: pa.Table, cutoff_len: int) -> None:
        """Count the rows of one part."""
        usable = table.filter(table.column("valid"))
        largest = pc.max(pc.list_flatten(usable.column("input_ids"))).as_py()
        self.largest_token = max(self.largest_token, -1 if largest is None else largest)
        for row in table.select(list(self.COUNTED)).to_pylist():
            self.rows[row["source"]] += 1
            self.valid[row["source"]] += row["valid"]
            if not row["valid"]:
                self._count_reason(row["reason"], row["row"])
                continue
            self.tokens += row["n_tokens"]
            self.response_tokens += row["n_response_tokens"]
            self.at_cutoff += row["n_tokens"] >= cutoff_len
            self.longest = max(self.longest, row["n_tokens"])
            self.notes.update(row["note"].split(NOTE_SEPARATOR) if row["note"] else ())

    def _count_reason(self, reason: str, row: int) -> None:
        self.reasons[reason] += 1
        first = self.first.get(reason, [])
        self.first[reason] = sorted([*first, row])[:ROWS_NAMED]  # parts that were there are counted first

    @property
    def n_valid(self) -> int:
        """Valid rows over all sources."""
        return sum(self.valid.values())

    def summary(self) -> dict[str, Any]:
        """Return the counts as plain values; tokens and ``at_cutoff`` are over valid rows."""
        total = sum(self.rows.values())
        return {
            "rows": total,
            "valid": self.n_valid,
            "invalid": total - self.n_valid,
            "reasons": dict(self.reasons.most_common()),
            "notes": dict(self.notes.most_common()),
            "sources": {name: {"rows": n, "valid": self.valid[name]} for name, n in self.rows.items()},
            "tokens": self.tokens,
            "response_tokens": self.response_tokens,
            "at_cutoff": self.at_cutoff,
            "longest": self.longest,
            "largest_token": self.largest_token,
        }


def reasons_text(reasons: Mapping[str, int], first: Mapping[str, Sequence[int]], most: int = 5) -> str:
    """Return the most frequent reasons with their counts and first rows, in one line.

    Args:
        reasons: reason -> rows.
        first: reason -> the first of them.
        most: reasons that are named.
    """
    ranked = sorted(reasons.items(), key=lambda item: -item[1])
    shown = "; ".join(f"{count} x {why} ({rows_said(first[why], count)})" for why, count in ranked[:most])
    return shown + (f"; and {len(ranked) - most} other reasons" if len(ranked) > most else "")


def rows_said(first: Sequence[int], count: int) -> str:
    """Return rows by number: "row 3", "rows 3, 8" or, of more than are named, "rows 3, 8, 11, ..."."""
    numbers = ", ".join(map(str, first))
    return f"row{'s' * (count != 1)} {numbers}{', ...' * (count > len(first))}"
