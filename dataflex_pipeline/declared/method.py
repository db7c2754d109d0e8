"""A method of the user's own: what its class declares, and what its functions return beside the scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import Block, BlockTable, Method, Params, Selection, Strategy, TargetRanking
from dataflex_pipeline.declared import (
    broken,
    check_call,
    check_flags,
    check_functions,
    check_names,
    check_params,
    check_plain,
    check_text,
    check_version,
    shown,
    verb,
)
from dataflex_pipeline.schemas import SCORES

FLAGS = ("accumulates", "every_checkpoint", "rescores", "replaces", "ranks_by_target_row")


def check_method_class(kind: type[Method]) -> None:
    """Check what a class declares, before an object of it is made.

    Raises:
        ConfigError: something of it cannot be used.
    """
    check_functions(kind, Method)
    check_params(kind, Params, defaults=True)
    check_text(kind, "summary", "source")
    check_version(kind)
    check_flags(kind, "compares_rounds")
    strategy, known = inspect.getattr_static(kind, "default_strategy"), get_args(Strategy)
    if strategy not in known:
        raise broken(kind, "default_strategy", f"is {shown(strategy)}", f"It is one of: {', '.join(known)}.")
    _check_columns(kind, "columns", inspect.getattr_static(kind, "columns"))


def check_method(method: Method) -> None:
    """Check what an object of a class answers before anything is computed.

    Raises:
        ConfigError: something of it cannot be used.
    """
    check_plain(method, getattr(method, "params", None), Params)
    check_flags(method, *FLAGS)
    check_names(method, "pool_columns", method.pool_columns)
    for name in ("probabilities_from", "probabilities_to"):
        value = getattr(method, name)
        if not (value is None or isinstance(value, Path)):
            raise broken(method, name, f"is {shown(value)}", "It is a pathlib.Path, or None.")
    for flag, function in (("rescores", "rescore"), ("ranks_by_target_row", "by_target_row")):
        if getattr(method, flag) and getattr(type(method), function) is getattr(Method, function):
            raise broken(method, f"{function}()", "is missing", f"It is called where {flag} is true.")


def _check_columns(owner: object, what: str, columns: Any) -> None:
    if not isinstance(columns, list | tuple) or not all(isinstance(each, pa.Field) for each in columns):
        example = "It is a tuple of fields: (column('length', pa.int64(), 'tokens'),) or (pa.field(...),)."
        raise broken(owner, what, f"{verb(what)} {shown(columns)}", example)
    check_names(owner, what, [each.name for each in columns])
    for each in columns:
        if not each.name or each.name in SCORES.names:
            taken = f"Every score table has {', '.join(SCORES.names)} before the method's own columns."
            raise broken(owner, what, f"has a column named {each.name!r}", taken)
        if not each.nullable:
            null = "Where a row has no score the method's own columns are null."
            raise broken(owner, what, f"has {each.name}, which may not be null", null)


def own_columns(method: Method, state: Any) -> tuple[pa.Field, ...]:
    """Return a method's own score columns.

    Raises:
        ConfigError: they are no columns of a table.
    """
    columns = method.own_columns(state)
    _check_columns(method, "own_columns()", columns)
    return tuple(columns)


def weights(method: Method, block: pa.RecordBatch, fitted: Any) -> np.ndarray:
    """Return the weights of a block of the score table. [rows]

    Raises:
        ConfigError: they are no weights.
    """
    returned = method.weigh(block, fitted)
    wrong = _wrong_weights(returned, block)
    if wrong is None:
        return np.asarray(returned)
    every = "A weight is a number, finite and at least 0, for every row of the block; rows of no score aside."
    raise broken(method, "weigh()", f"returns {wrong}", every)


def _wrong_weights(returned: Any, block: pa.RecordBatch) -> str | None:
    """Return what is wrong with the weights of a block; None where nothing is."""
    array = as_array(returned)
    if array is None or array.dtype.kind not in "fiub":
        return shown(returned)
    if array.shape != (block.num_rows,):
        return f"weights of the shape {list(array.shape)} for {block.num_rows} rows"
    valid = block.column("valid").to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(valid & ~(np.isfinite(array) & (array >= 0)))
    return f"{array[bad[0]]} for row {block.column('row')[bad[0]].as_py()}" if len(bad) else None


def as_array(values: Any) -> np.ndarray | None:
    """Return values as an array; None where they are none."""
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError):
        return None


def rescored(
    method: Method, scores: BlockTable, selection: Selection
) -> Callable[[pa.RecordBatch], Mapping[str, np.ndarray]]:
    """Return the function from a block of the score table to what replaces its columns.

    Raises:
        ConfigError: there is none, or what it returns are no columns of the block.
    """
    replaced = method.rescore(scores, selection)
    expected = (
        "It returns a function from a block of the score table to `score` and own columns, an array of one "
        "value a row each."
    )
    if not callable(replaced):
        raise broken(method, "rescore()", f"returns {shown(replaced)}", expected)
    check_call(method, "what rescore() returns", replaced, ["block"], "it with a block of the score table")

    def checked(block: pa.RecordBatch) -> Mapping[str, np.ndarray]:
        columns = replaced(block)
        wrong = _wrong_columns(columns, block)
        if wrong is not None:
            raise broken(method, "rescore()", f"returns a function that returns {wrong}", expected)
        return columns

    return checked


def _wrong_columns(columns: Any, block: pa.RecordBatch) -> str | None:
    """Return what is wrong with columns that are to replace those of a block; None where nothing is."""
    if not isinstance(columns, Mapping):
        return shown(columns)
    for name, values in columns.items():
        if name not in block.schema.names or name in set(SCORES.names) - {"score"}:
            return f"the column {shown(name)}"
        array = as_array(values)
        if array is None or array.shape[:1] != (block.num_rows,):
            return f"{name} of another length than {block.num_rows} rows"
        if name == "score" and (array.ndim != 1 or array.dtype.kind not in "fiub"):
            return "scores that are no real numbers"
        scored = block.column("score").is_valid().to_numpy(zero_copy_only=False)
        if name == "score" and not np.isfinite(array[scored]).all():
            return "scores that are not finite, of rows that had one"
    return None


def group_columns(method: Method, schema: pa.Schema) -> tuple[str, ...]:
    """Return which columns of a score table belong to one target group each.

    Raises:
        ConfigError: they are no columns of numbers that it has.
    """
    names = method.group_columns(schema)
    check_names(method, "group_columns()", names)
    own = [field.name for field in schema if pa.types.is_floating(field.type)]
    for name in names:
        if name not in own:
            has = f"They are columns of numbers of its score table, which has {', '.join(own)}."
            raise broken(method, "group_columns()", f"names {name!r}", has)
    return tuple(names)


def target_ranking(method: Method, tables: Mapping[str, BlockTable], selection: Selection) -> TargetRanking:
    """Return how each target row ranks the pool.

    Raises:
        ConfigError: it is no ranking.
    """
    found = method.by_target_row(tables, selection)
    rows = as_array(found.rows) if isinstance(found, TargetRanking) else None
    if not isinstance(found, TargetRanking) or rows is None or not callable(found.values):
        returned = "It returns api.TargetRanking(rows, values), values a function of a block of the pool."
        raise broken(method, "by_target_row()", f"returns {shown(found)}", returned)
    check_call(method, "values of by_target_row()", found.values, ["block"], "values(block)")
    if (
        rows.ndim != 1
        or not len(rows)
        or rows.dtype.kind not in "iu"
        or len(np.unique(rows)) != len(rows)
        or rows.min() < 0
    ):
        each = "They are row numbers of the target, at least one, each once."
        raise broken(method, "by_target_row()", f"has the target rows {shown(found.rows)}", each)

    def values(block: Block) -> np.ndarray:
        returned = as_array(found.values(block))
        shape = (block.pool.num_rows, len(rows))
        if returned is None or returned.dtype.kind not in "fiub" or returned.shape != shape:
            wrong = (
                "no numbers" if returned is None else f"{returned.dtype} of the shape {list(returned.shape)}"
            )
            each = f"Each row of the block has one number for each target row: the shape {list(shape)}."
            raise broken(method, "by_target_row()", f"has values that return {wrong}", each)
        return returned

    return TargetRanking(rows, values)
