"""The selected rows of rounds: one line per line of a selection, best first.

A round of an older run may have no selection of its own: its index stands for it, each row once, in the order
of its first position. So does the index of the warm-up, which has no scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataflex_pipeline.errors import RunError
from dataflex_pipeline.schemas import ROW, ROW_ID, column
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.tables import TableFile

LINES = pa.schema(
    [
        ROW,
        ROW_ID,
        column("rank", pa.int64(), "place in the selection, from 1, best first", nullable=False),
        column("round", pa.int32(), "round that it was selected for; 0 is the warm-up", nullable=False),
        column("score", pa.float64(), "score that it was selected by; null for the warm-up"),
        column("weight", pa.float32(), "loss weight", nullable=False),
    ]
)


@dataclass(frozen=True)
class Choice:
    """Which selections are exported.

    Attributes:
        run: that they are in. rounds: in the order of the lines; 0 is the warm-up.
        name: of a selection beside the round's own; None for its own.
    """

    run: RunFolder
    rounds: tuple[int, ...]
    name: str | None = None

    def tables(self) -> Iterator[tuple[int, Path]]:
        """Yield each round and the table that says what was selected for it.

        Raises:
            RunError: there is none.
        """
        for number in self.rounds:
            path = selection_of(self.run, number, self.name if number else None)
            if path is None:
                raise self._missing(number)
            yield number, path

    def lines(self) -> pa.Table:
        """Return the lines, in the schema `LINES`, round by round, best first."""
        return pa.concat_tables([_lines(path, number) for number, path in self.tables()])

    def inputs(self) -> dict[str, Any]:
        """Return what decides the lines, for a fingerprint."""
        tables = {f"round {number}": TableFile(path).fingerprint for number, path in self.tables()}
        return {"selected": tables} | ({"selection": self.name} if self.name is not None else {})

    @property
    def words(self) -> str:
        """Which rows they are, in words."""
        later = [number for number in self.rounds if number]
        parts = [f"selected for round {_spans(later)}"] if later else []
        parts += ["of the warm-up"] if 0 in self.rounds else []
        named = f" (selection {self.name})" if self.name is not None else ""
        return "the rows " + " and ".join(parts) + named

    def _missing(self, number: int) -> RunError:
        where = self.run.round(number)
        if self.name is not None:
            known = sorted(path.parent.name for path in where.folder.glob("selections/*/selection.parquet"))
            listed = (
                f"Round {number} has {', '.join(known)}." if known else f"Round {number} has no named one."
            )
            return RunError(
                f"There is no selection {self.name} ({where.selection_named(self.name)}).",
                listed,
                "Correct the name, or leave it out for the round's own selection.",
            )
        return RunError(
            f"Round {number} has no selection ({where.selection}).",
            "Rows are exported from the table of what was selected; they need not be trained on.",
            f"Run `dataflex select --round {number}` first." if number else "Leave the warm-up out.",
        )


def selection_of(run: RunFolder, number: int, name: str | None = None) -> Path | None:
    """Return the table that says what was selected for a round; None where nothing was."""
    where = run.round(number)
    candidates = [where.selection, where.index] if name is None else [where.selection_named(name)]
    return next((path for path in candidates if path.is_file()), None)


def last_selected(run: RunFolder, name: str | None = None) -> int:
    """Return the last round with a selection, trained or not.

    Raises:
        RunError: no round has one.
    """
    numbers = sorted(int(path.name.removeprefix("round-")) for path in run.folder.glob("round-*[0-9]"))
    for number in reversed([each for each in numbers if each > 0]):
        if selection_of(run, number, name) is not None:
            return number
    raise RunError(
        f"No round of {run.folder} has a selection{f' {name}' if name is not None else ''}.",
        "Rows are selected from the scores of a round; the warm-up draws them uniformly.",
        "Select first: run.select(1), or `dataflex select --round 1`."
        if name is None
        else f"There are: {', '.join(_names(run)) or 'none'}.",
    )


def _names(run: RunFolder) -> list[str]:
    found = {path.parent.name for number in run.rounds() for path in run.round(number).named_selections()}
    return sorted(found)


def _lines(path: Path, number: int) -> pa.Table:
    table = TableFile(path)
    lines = _of_selection(table) if "rank" in table.schema.names else _of_index(table)
    scores = pa.nulls(lines.num_rows, pa.float64()) if number == 0 else lines.column("score")
    columns = {
        **{name: lines.column(name) for name in ("row", "row_id", "rank", "weight")},
        "round": pa.array([number] * lines.num_rows, pa.int32()),
        "score": scores,
    }
    return pa.table({name: columns[name] for name in LINES.names}).cast(LINES)


def _of_selection(table: TableFile) -> pa.Table:
    columns = ["rank", "row", "row_id", "score", "weight"]
    return _read(table, columns).sort_by("rank")


def _read(table: TableFile, columns: list[str]) -> pa.Table:
    schema = pa.schema([table.schema.field(name) for name in columns])
    return pa.Table.from_batches(list(table.blocks(columns)), schema)


def _of_index(table: TableFile) -> pa.Table:
    """Return each row of an index once, in the order of its first position."""
    index = _read(table, ["position", "row", "row_id", "weight", "score"])
    measures = [("position", "min"), ("row_id", "min"), ("score", "min"), ("weight", "mean")]
    grouped = index.group_by("row").aggregate(measures).sort_by("position_min")
    return pa.table(
        {
            "rank": pa.array(range(1, grouped.num_rows + 1), pa.int64()),
            "row": grouped.column("row"),
            "row_id": grouped.column("row_id_min"),
            "score": grouped.column("score_min").cast(pa.float64()),
            "weight": grouped.column("weight_mean"),
        }
    )


def _spans(numbers: list[int]) -> str:
    """Return rounds as text: 1, or 1 to 3, or 1, 3."""
    whole = list(range(numbers[0], numbers[-1] + 1))
    if len(numbers) > 2 and numbers == whole:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
