"""A feature of the user's own: what its class declares, and what its functions return for a part."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import Feature, FeatureInput, Params, Progress
from dataflex_pipeline.config.names import check_name
from dataflex_pipeline.declared import (
    broken,
    check_call,
    check_flags,
    check_functions,
    check_names,
    check_params,
    check_plain,
    check_version,
    missing_functions,
    shown,
)
from dataflex_pipeline.schemas import GROUP, ORIGINAL, PREPARED, REASON, ROW, ROW_ID, VALID
from dataflex_pipeline.store.fingerprint import canonical
from dataflex_pipeline.store.parts import MANIFEST, part_name

Compute = Callable[[pa.Table], pa.Table]

FIXED = (ROW, ROW_ID, VALID, REASON)
"""Columns that every feature has."""
READ = ("row", "row_id")
"""Columns of the prepared rows that every feature reads."""
TAKEN = ("feature", "version", "split", "rows", "checkpoint", "implementation", "features", "candidates")
"""What the pipeline itself puts among the ingredients of a table."""


@lru_cache(maxsize=64)
def check_feature_class(kind: type[Feature], shipped: tuple[str, ...]) -> None:
    """Check what a class declares, before an object of it is made.

    Args:
        kind: the class. shipped: names of the features that come with the package.

    Raises:
        ConfigError: something of it cannot be used.
    """
    if inspect.isabstract(kind):
        raise missing_functions(kind)
    check_functions(kind, Feature, apart=("table",))
    check_params(kind, Params)
    check_version(kind)
    check_flags(kind, "uses_model", "of_trained_weights", "takes_the_machine")
    name = inspect.getattr_static(kind, "name")
    if not isinstance(name, str):
        raise broken(kind, "name", f"is {shown(name)}", "It is a text.")
    check_name(name, f"The feature {kind.__name__}")
    if name in shipped:
        own = f"A feature of that name comes with the package; name = 'my_{name}' is free."
        raise broken(kind, "name", f"is '{name}'", own)
    _check_side_files(kind, inspect.getattr_static(kind, "side_files"))
    for needed in ("schema", "input_columns"):
        if not hasattr(kind, needed) and kind.__init__ is Feature.__init__:
            raise broken(kind, needed, "is missing", f"Every feature has {needed}.")


def _check_side_files(kind: type[Feature], pattern: Any) -> None:
    said = "It is a pattern of file names in the table's folder, such as '_notes-*.json', or None."
    if pattern is None:
        return
    if not isinstance(pattern, str) or not pattern or "/" in pattern or "\\" in pattern or pattern[0] == ".":
        raise broken(kind, "side_files", f"is {shown(pattern)}", said)
    for kept in (MANIFEST, part_name(0)):
        if PurePath(kept).match(pattern):
            raise broken(kind, "side_files", f"is '{pattern}', and {kept} matches it", said)


def check_feature(feature: Feature) -> None:
    """Check what an object of a class answers before anything is computed.

    Raises:
        ConfigError: something of it cannot be used.
    """
    check_plain(feature, getattr(feature, "params", None), Params)
    if not hasattr(feature, "config"):
        said = "A class with an __init__ of its own calls super().__init__(params, config)."
        raise broken(feature, "__init__()", "leaves self.config unset", said)
    _check_schema(feature, getattr(feature, "schema", None))
    columns = getattr(feature, "input_columns", None)
    check_names(feature, "input_columns", columns)
    known = {*PREPARED.names, GROUP.name}
    for name in columns or ():
        if name not in known and not name.startswith(ORIGINAL):
            has = f"Prepared rows have: {', '.join(sorted(known))}, and {ORIGINAL}... of the data set."
            raise broken(feature, "input_columns", f"has '{name}'", has)
    lacking = [name for name in READ if name not in (columns or ())]
    if lacking:
        every = "Every table says which rows it is of: read row and row_id, and what else is needed."
        raise broken(feature, "input_columns", f"lacks {', '.join(lacking)}", every)
    lines = feature.lines_per_row
    if not isinstance(lines, int) or isinstance(lines, bool) or lines < 1:
        raise broken(feature, "lines_per_row", f"is {shown(lines)}", "It is a whole number, at least 1.")


def _check_schema(feature: Feature, schema: Any) -> None:
    said = (
        "It is a pa.schema of row, row_id, the feature's own columns, valid, reason (see docs/extending.md)."
    )
    if not isinstance(schema, pa.Schema):
        raise broken(feature, "schema", f"is {shown(schema)}", said)
    check_names(feature, "schema", schema.names)
    for field in FIXED:
        if field.name not in schema.names or schema.field(field.name).type != field.type:
            raise broken(feature, "schema", f"has no column {field.name} of {field.type}", said)
    if schema.names[:2] != list(READ):
        raise broken(feature, "schema", f"begins with {', '.join(schema.names[:2])}", said)


def ingredients(feature: Feature) -> dict[str, Any]:
    """Return what a feature says of its own that changes the numbers.

    Raises:
        ConfigError: it has no stable text, or stands in for what the pipeline itself says.
    """
    found: Any = feature.ingredients()
    said = "It returns a mapping from names to text, numbers, true or false, lists and mappings."
    if not isinstance(found, Mapping):
        raise broken(feature, "ingredients()", f"returns {shown(found)}", said)
    taken = sorted(set(found) & set(TAKEN), key=str)
    if taken:
        known = f"The pipeline itself says {', '.join(TAKEN)}."
        raise broken(feature, "ingredients()", f"returns the name '{taken[0]}'", known)
    try:
        canonical(dict(found))
    except TypeError as error:
        raise broken(
            feature, "ingredients()", f"returns what cannot be written down: {error}", said
        ) from error
    return dict(found)


def row_flops(feature: Feature, tokens: float) -> float:
    """Return about how many floating-point operations a row of so many tokens takes; 0: not known.

    Raises:
        ConfigError: the feature says no number.
    """
    found = feature.row_flops(tokens)
    if isinstance(found, bool) or not isinstance(found, int | float | np.number) or not 0 <= found < math.inf:
        number = "It returns a number of floating-point operations, finite and at least 0."
        raise broken(feature, "row_flops()", f"returns {shown(found)}", number)
    return float(found)


def has_beside(feature: Feature, folder: Path, first_row: int, fingerprint: str) -> bool:
    """Return whether what a part keeps in a file of its own is there and whole.

    Args:
        feature: it. folder, first_row, fingerprint: as `Feature.has_beside` takes them.

    Raises:
        ConfigError: the feature says neither yes nor no.
    """
    found: Any = feature.has_beside(folder, first_row, fingerprint)
    if not isinstance(found, bool | np.bool_):
        said = "It returns True where the part's own file is there and whole, else False."
        raise broken(feature, "has_beside()", f"returns {shown(found)}", said)
    return bool(found)


def doubts(feature: Feature) -> Sequence[str]:
    """Return what is doubtful about the servers that a feature asks.

    Raises:
        UserError: one is not there, or the feature returns something else.
    """
    lines = feature.reach()
    if not isinstance(lines, list | tuple) or not all(isinstance(line, str) for line in lines):
        said = "It returns a sequence of sentences, an empty one where nothing is doubtful."
        raise broken(feature, "reach()", f"returns {shown(lines)}", said)
    return lines


@contextmanager
def opened(feature: Feature, given: FeatureInput, progress: Progress) -> Iterator[Compute]:
    """Open a feature of the user's own; yield its function, whose tables are looked at.

    An error that comes out of the function is raised whatever `open` does with it.

    Raises:
        ConfigError: it cannot be opened, or a table is not that of its rows.
    """
    manager: Any = feature.open(given, progress)
    said = (
        "It is a context manager (@contextmanager above it) that yields a function from rows to their table."
    )
    if not isinstance(manager, AbstractContextManager):
        raise broken(feature, "open()", f"returns {shown(manager)}", said)
    failed: list[BaseException] = []
    try:
        with manager as compute:
            if not callable(compute):
                raise broken(feature, "open()", f"yields {shown(compute)}", said)
            check_call(feature, "what open() yields", compute, ["rows"], "it with the rows of a part")
            try:
                yield lambda rows: part_table(feature, rows, compute(rows))
            except BaseException as error:
                failed.append(error)
                raise
    except RuntimeError as error:
        if error in failed or not str(error).startswith("generator didn't"):
            raise
        if failed:
            raise failed[0] from None
        raise broken(feature, "open()", "does not yield exactly once", said) from error
    if failed:
        raise failed[0]


def part_table(feature: Feature, rows: pa.Table, table: Any) -> pa.Table:
    """Return a part's table, in the feature's columns.

    Args:
        feature: that made it. rows: what it was made from. table: what it returned.

    Raises:
        ConfigError: it is not the table of these rows.
    """
    schema, n_lines = feature.schema, rows.num_rows * feature.lines_per_row
    said = (
        "The function that open() yields returns a pa.Table with the columns of the schema, lines_per_row "
        "lines for each of the rows, in their order; self.table(rows, values, why) makes it."
    )

    def wrong(what: str) -> Exception:
        return broken(feature, "open()", f"yields a function that returns {what}", said)

    if not isinstance(table, pa.Table):
        raise wrong(shown(table))
    if sorted(table.schema.names) != sorted(schema.names):
        raise wrong(
            f"the columns {', '.join(table.schema.names)}, and the schema has {', '.join(schema.names)}"
        )
    if table.num_rows != n_lines:
        raise wrong(f"{table.num_rows} lines for {rows.num_rows} rows")
    try:
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise wrong(f"columns of other types: {str(error).splitlines()[0]}") from error
    for name in READ:
        expected = np.repeat(rows.column(name).to_numpy(), feature.lines_per_row)
        if not np.array_equal(table.column(name).to_numpy(), expected):
            raise wrong(f"another {name} than that of the rows")
    if table.column("valid").null_count:
        raise wrong("lines whose valid is null")
    return table
