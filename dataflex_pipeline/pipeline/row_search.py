"""Rows of the pool by number, by the beginning of their row_id, or by a text that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.pipeline.open_run import OpenRun, require_run
from dataflex_pipeline.pipeline.prepare import open_split
from dataflex_pipeline.schemas import ORIGINAL
from dataflex_pipeline.store.parts import PartedTable

LISTED = 10
"""Rows that are listed of many."""
BEGINNING = 200
"""Characters of a row's text that are shown of it beside others."""
ID_DIGITS = 32
"""Digits of a row_id."""
SEARCHED_ROWS = 4096
"""Rows that are searched at a time."""


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        row: its number.
        source: name of its data set.
        text: the beginning of its conversation.
    """

    row: int
    source: str
    text: str


@dataclass(frozen=True)
class Found:
    """The rows that hold a text.

    Attributes:
        text: what was looked for.
        count: rows that hold it.
        first: the first of them, `LISTED` at most.
    """

    text: str
    count: int
    first: tuple[Hit, ...]


def open_pool(run: OpenRun) -> PartedTable:
    """Open the pool of a run that was begun.

    Raises:
        RunError: there is no such run, or its pool is not prepared.
    """
    require_run(run)
    return open_split(run, "pool")


def row_number(pool: PartedTable, row: int | str) -> int:
    """Return the number of the row that is meant.

    Args:
        pool: the prepared pool.
        row: a row's number, or the beginning of its row_id.

    Raises:
        UserError: there is no such row, or several.
    """
    if isinstance(row, str):
        return _of_id(pool, row.strip().lower())
    if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < pool.n_rows:
        raise UserError(
            f"Row {row!r} was asked for.",
            f"The pool has {pool.n_rows:,} rows, numbered 0 to {pool.n_rows - 1}, in the order of its data "
            "sets.",
            "Give one of these numbers, or find a row by its text (--find) or row_id (--row-id).",
        )
    return row


def _of_id(pool: PartedTable, prefix: str) -> int:
    rows = np.concatenate([*_ids_that_begin(pool, prefix), np.empty(0, np.int64)])
    if len(rows) == 1:
        return int(rows[0])
    if len(rows) == 0 or not prefix:
        raise UserError(
            f"No row has a row_id that begins with '{prefix}'." if prefix else "The row_id is empty.",
            "A row_id is a hash of the row's conversation, of 32 hexadecimal digits.",
            "Copy it from a table, or find the row by its text (--find).",
        )
    listed = "; ".join(
        f"row {hit.row} ({row_id}, {hit.source})"
        for hit, row_id in zip(hits(pool, rows[:LISTED]), _ids(pool, rows[:LISTED]), strict=True)
    )
    more = f"; and {len(rows) - LISTED:,} more" if len(rows) > LISTED else ""
    raise UserError(
        f"{len(rows):,} rows have a row_id that begins with '{prefix}': {listed}{more}.",
        "Rows of the same conversation share their row_id; others differ in a later digit.",
        "Give the row's number (--row)" + (", or more digits." if len(prefix) < ID_DIGITS else "."),
    )


def _ids_that_begin(pool: PartedTable, prefix: str) -> Iterator[np.ndarray]:
    for block in pool.blocks(["row", "row_id"]):
        yield _where(block, pc.starts_with(block.column("row_id"), prefix))


def same_conversation(pool: PartedTable, row: int, row_id: str) -> tuple[int, ...]:
    """Return the other rows that have a row's id, the first `LISTED` at most."""
    rows = np.concatenate(list(_ids_that_begin(pool, row_id)))
    return tuple(rows[rows != row][:LISTED].tolist())


def _ids(pool: PartedTable, rows: np.ndarray) -> list[str]:
    ids: list[str] = pool.take(rows, ["row_id"]).column("row_id").to_pylist()
    return ids


def _where(block: pa.RecordBatch, chosen: pa.BooleanArray) -> np.ndarray:
    numbers: np.ndarray = block.column("row").filter(chosen).to_numpy(zero_copy_only=False)
    return numbers.astype(np.int64)


def find_text(run: OpenRun, text: str) -> Found:
    """Return the rows that hold a text, capitals or not, in a turn or in a column of text.

    Args:
        run: whose pool.
        text: what to look for.

    Raises:
        RunError: the pool is not prepared.
        UserError: no row holds it.
    """
    pool = open_pool(run)
    if not text.strip():
        raise UserError(
            "The text to find is empty.", "Every row would hold it.", "Give a part of a row's text."
        )
    count, first = 0, np.empty(0, np.int64)
    for rows in _rows_with(pool, text):
        count += len(rows)
        first = np.concatenate([first, rows])[:LISTED]
    if count == 0:
        raise UserError(
            f"No row of the pool holds '{text}'.",
            "Turns and columns of text are searched as they are written, capitals or not.",
            "Give a shorter part of the text, on one line.",
        )
    return Found(text, count, tuple(hits(pool, first)))


def _rows_with(pool: PartedTable, text: str) -> Iterator[np.ndarray]:
    columns = [
        each.name for each in pool.schema if pa.types.is_string(each.type) and each.name.startswith(ORIGINAL)
    ]
    for block in pool.blocks(["row", "messages", *columns], SEARCHED_ROWS):
        found = np.zeros(block.num_rows, bool)
        turns = block.column("messages")
        spoken = pc.struct_field(turns.flatten(), "content")
        hit = pc.match_substring(spoken, text, ignore_case=True).fill_null(False)
        found[pc.list_parent_indices(turns).filter(hit).to_numpy(zero_copy_only=False)] = True
        for name in columns:
            own = pc.match_substring(block.column(name), text, ignore_case=True).fill_null(False)
            found |= own.to_numpy(zero_copy_only=False)
        yield _where(block, pa.array(found))


def hits(table: PartedTable, rows: np.ndarray) -> list[Hit]:
    """Return rows of a prepared table with the beginning of their text, in the order given."""
    found = table.take(rows, ["row", "source", "messages"]).to_pylist()
    return [Hit(each["row"], each["source"], beginning(each["messages"])) for each in found]


def beginning(messages: list[dict[str, str]] | None) -> str:
    """Return the beginning of a conversation, each turn after its role."""
    return " ".join(f"{turn['role']}: {turn['content']}" for turn in messages or ())[:BEGINNING]
