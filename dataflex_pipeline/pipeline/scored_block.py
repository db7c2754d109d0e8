"""A scored block of the pool: the method's columns, with nulls and the reason where a row has no score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline import api
from dataflex_pipeline.declared import broken
from dataflex_pipeline.declared.method import as_array, rescored
from dataflex_pipeline.features.candidates import NOT_A_CANDIDATE
from dataflex_pipeline.schemas import SCORES
from dataflex_pipeline.store.tables import TableFile

Write = Callable[[pa.RecordBatch | pa.Table], None]

ROWS_SHOWN = 3


class Unscored:
    """Names rows that are valid in the pool and get no score; the table has each one's reason."""

    def __init__(self) -> None:
        self._count = 0
        self._shown: list[str] = []

    def see(self, block: api.Block, table: pa.Table) -> None:
        """Take in a block of the pool and its scores."""
        lost = pc.and_not(block.pool.column("valid"), table.column("valid").combine_chunks())
        self._count += pc.sum(lost).as_py() or 0
        if self._count and len(self._shown) < ROWS_SHOWN:
            few = table.select(["row", "reason"]).filter(lost).slice(0, ROWS_SHOWN - len(self._shown))
            self._shown += [f"row {line['row']} ({line['reason']})" for line in few.to_pylist()]

    @property
    def examples(self) -> str:
        """The first of them with their reasons."""
        more = ", ..." if self._count > len(self._shown) else ""
        return ", ".join(self._shown) + more if self._shown else "no row of the pool can be used"

    def say(self, say: Callable[[str], None]) -> None:
        """Say how many there are."""
        if self._count:
            say(f"{self._count} rows of the pool could not be scored: {self.examples}")


def score_block(method: api.Method, block: api.Block, state: Any, schema: pa.Schema) -> pa.Table:
    """Score one block: the method's columns, with nulls and the reason where a row cannot be scored."""
    columns = _returned(method, method.score(block, state), block.pool.num_rows)
    score_values = columns.pop("score").astype(np.float64)
    valid, reason = _validity(block, score_values, columns.pop("reason", None))
    _check_columns(method, set(columns), {*schema.names} - {*SCORES.names})
    arrays: dict[str, Any] = {
        "row": block.pool.column("row"),
        "row_id": block.pool.column("row_id"),
        "score": pa.array(score_values, mask=~valid),
        "valid": pa.array(valid),
        "reason": pa.array(reason, pa.string()),
    }
    for column in schema:
        if column.name in arrays:
            continue
        arrays[column.name] = _typed(method, "score()", column, columns[column.name], ~valid)
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _returned(method: api.Method, returned: Any, rows: int) -> dict[str, np.ndarray]:
    """Return what a method gave for a block as arrays of one value or vector a row, by column.

    Raises:
        ConfigError: it is something else.
    """
    wrong: str | None
    columns: dict[str, np.ndarray] = {}
    if not isinstance(returned, Mapping) or not all(isinstance(name, str) for name in returned):
        wrong = f"{type(returned).__name__} instead of arrays by the names of columns"
    elif "score" not in returned:
        wrong = f"no score, but {', '.join(sorted(returned)) or 'nothing'}"
    else:
        arrays = {name: _array(name, values) for name, values in returned.items()}
        columns = {name: array for name, array in arrays.items() if array is not None}
        found = [f"{name} of lists of several lengths" for name in returned if name not in columns]
        found += filter(None, (_wrong(name, array, rows) for name, array in columns.items()))
        wrong = next(iter(found), None)
    if wrong is None:
        return columns
    each = "A block has one score for each of its rows: a mapping from column names to arrays of that length."
    raise broken(method, "score()", f"returns {wrong}", each)


def _array(name: str, values: Any) -> np.ndarray | None:
    if name != "reason" or not hasattr(values, "__len__"):
        return as_array(values)
    array = np.empty(len(values), dtype=object)  # numpy would make text of None beside text
    array[:] = values
    return array


def _wrong(name: str, array: np.ndarray, rows: int) -> str | None:
    """Return what is wrong with a column of a block of so many rows; None where it is right."""
    if array.shape[:1] != (rows,) or (name in ("score", "reason") and array.ndim != 1):
        return f"{name} of the shape {list(array.shape)} for {rows} rows"
    if name == "score" and array.dtype.kind not in "fiub":
        return f"scores that are no real numbers ({array.dtype})"
    if name == "reason" and not all(text is None or isinstance(text, str) for text in array):
        return "a reason that is neither text nor None"
    return None


def _check_columns(method: api.Method, returned: set[str], declared: set[str]) -> None:
    """Refuse a method whose ``score`` returns other columns than it declares: one would be lost.

    Raises:
        ConfigError: they differ.
    """
    if returned != declared:
        lost, lacking = sorted(returned - declared), sorted(declared - returned)
        said = [f"returns {', '.join(lost)}, which it does not declare"] if lost else []
        said += [f"leaves out {', '.join(lacking)}, which it declares"] if lacking else []
        declares = "A score table has the score, and what columns or own_columns() declare."
        raise broken(method, "score()", ", and ".join(said), declares)


def _typed(
    method: api.Method, what: str, field: pa.Field, values: Any, missing: np.ndarray | None = None
) -> pa.Array:
    """Return the values of a column in its type; fractions of whole numbers are cut off.

    Args:
        method: that gave them. what: by which function. field: the column.
        values: one a row. missing: the rows that get a null.

    Raises:
        ConfigError: they are of another kind.
    """
    array = np.asarray(values)
    lists = array.ndim > 1
    try:
        if pa.types.is_integer(field.type) and array.dtype.kind == "f":
            gap = ~np.isfinite(array)
            missing = gap if missing is None else gap | missing
            array = np.where(gap, 0, np.trunc(array))
        found = pa.array(list(array) if lists else array, mask=missing)
        return found.cast(field.type, safe=pa.types.is_integer(field.type))
    except (pa.ArrowException, TypeError, ValueError) as error:
        said = str(error).splitlines()[0]
        wrong = f"returns values of {field.name} that are no {field.type}: {said}"
        raise broken(method, what, wrong, "A column's values are of the type that it declares.") from error


def _validity(
    block: api.Block, scores: np.ndarray, own: np.ndarray | None
) -> tuple[np.ndarray, list[str | None]]:
    """Return which rows have a score, and the first reason of those that have none; ``own``: the method's."""
    valid = np.isfinite(scores)
    for batch in [block.pool, *block.features.values()]:
        valid &= batch.column("valid").to_numpy(zero_copy_only=False)
    reason: list[str | None] = [None] * len(scores)
    for position in np.flatnonzero(~valid):
        reasons = [
            batch.column("reason")[int(position)].as_py() for batch in [block.pool, *block.features.values()]
        ] + ([] if own is None else [own[position]])
        reason[position] = next((text for text in reasons if text), "the score is not finite")
    return valid, reason


def beside_candidates(table: pa.Table, pool: pa.RecordBatch, cheaper: pa.RecordBatch, name: str) -> pa.Table:
    """Return a scored block with what is to be said of the rows that are no candidates.

    They are valid, without a score; one that the cheaper method could not score is not valid, as it says.

    Args:
        table: from `score_block`, of the pool seen through the candidates. pool: ``reason`` of the same rows.
        cheaper: ``valid`` and ``reason`` of the same rows in the score table that the candidates are of.
        name: of the method that made it.
    """
    passed_over = pc.equal(pool.column("reason"), NOT_A_CANDIDATE).fill_null(False)
    usable = pc.and_(passed_over, cheaper.column("valid"))
    unusable = pc.and_(passed_over, pc.invert(cheaper.column("valid")))
    said = pc.binary_join_element_wise(name, cheaper.column("reason"), ": ", null_handling="replace")
    columns = {
        "valid": pc.or_(table.column("valid").combine_chunks(), usable),
        "reason": pc.if_else(unusable, said, table.column("reason").combine_chunks()),
    }
    for key, column in columns.items():
        place = table.schema.get_field_index(key)
        table = table.set_column(place, table.schema.field(place), column)
    return table


def write_rescored(method: api.Method, selection: api.Selection, first: Path, write: Write) -> None:
    """Write a score table anew, with the scores that the method gives after a look at all of them.

    Args:
        method: with ``rescore``. selection: what it scores for.
        first: the table with the scores that it gave block by block. write: takes the blocks.
    """
    table = TableFile(first)
    replaced = rescored(method, table, selection)
    for block in table.blocks():
        scored = block.column("score").is_valid()
        for name, values in replaced(block).items():
            place = block.schema.get_field_index(name)
            field = block.schema.field(place)
            typed = _typed(method, "rescore()", field, values)
            column = pc.if_else(scored, typed, pa.scalar(None, field.type))
            block = block.set_column(place, field, column)
        write(block)
