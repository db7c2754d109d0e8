"""Tables as DuckDB views: queries over any number of rows in bounded memory, reading only.

A query may read the tables it was given and nothing else: no other file, no network, no extension, no
change of settings; what does not fit into the memory limit goes to a temporary folder that is deleted.
"""

from __future__ import annotations

import contextlib
import glob
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dataflex_pipeline.errors import CorruptError, DataflexError, UserError
from dataflex_pipeline.reports.catalogue import RunTable

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

MEMORY = "1GB"
"""What DuckDB may hold before it writes to the temporary folder."""
THIS = "this"
"""The view of the table that was asked for."""


@dataclass(frozen=True)
class View:
    """A name that can be queried. meaning: what its lines are."""

    name: str
    meaning: str


class Queries:
    """Relations over the tables of one command; from `open_queries`.

    Attributes:
        views: what can be queried by name.
    """

    def __init__(self, connection: DuckDBPyConnection, views: Sequence[View]) -> None:
        self._connection = connection
        self.views = tuple(views)

    def table(self, name: str) -> DuckDBPyRelation:
        """Return a view as a relation; nothing is read yet."""
        return self._connection.view(name)

    def join_by_position(self, left: str, right: str, columns: Sequence[str]) -> DuckDBPyRelation:
        """Return two views over the same rows in the same order side by side, streaming.

        Args:
            left: all of its columns are kept. right: the other view.
            columns: of the right one, beside its ``row``, which becomes ``other_row``.
        """
        chosen = ", ".join(["row as other_row", *map(quoted, columns)])
        text = f"from {quoted(left)} positional join (select {chosen} from {quoted(right)})"  # noqa: S608
        return self._connection.sql(text)

    def batches(self, text: str, rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the answer to a query of the program's own in record batches of about ``rows`` rows."""
        yield from self._connection.sql(text).to_arrow_reader(rows)

    def ask(self, text: str) -> Answer:
        """Return the answer to a user's query, to be fetched before the next one is asked.

        Raises:
            UserError: not exactly one reading statement, or DuckDB refuses it.
        """
        import duckdb

        with explained(text):
            statements = self._connection.extract_statements(text)
            readable = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
            if len(statements) != 1 or statements[0].type not in readable:
                raise UserError(
                    f"--sql takes one query, and this is not one: {text.strip()}",
                    "The tables of a run are only read: select, with, from, describe and show tables work.",
                    "Write for example --sql 'select * from scores order by score desc limit 5'.",
                )
            cursor = self._connection.execute(statements[0].query)
            return Answer(text, [column[0] for column in cursor.description or []], cursor)


@dataclass(frozen=True)
class Answer:
    """The answer to a query, fetched in pieces.

    Attributes:
        text: the query. names: of its columns. cursor: what it is fetched from.
    """

    text: str
    names: list[str]
    cursor: DuckDBPyConnection

    def lines(self, most: int) -> list[tuple[Any, ...]]:
        """Return the next lines, ``most`` at most; empty at the end.

        Raises:
            UserError: DuckDB fails on the query while it computes them.
        """
        with explained(self.text):
            return self.cursor.fetchmany(most)


@contextlib.contextmanager
def explained(text: str) -> Iterator[None]:
    """Turn what DuckDB says about a user's query into an error in three parts."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"The query cannot be answered: {lines[0]}",
            "\n".join(lines[1:]) or f"It was: {text.strip()}",
            "Correct it; --sql 'show tables' lists what there is, --sql 'describe scores' the columns.",
        ) from error


def quoted(name: str) -> str:
    """Return a name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: object) -> str:
    """Return a text as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


@contextlib.contextmanager
def open_queries(tables: Sequence[RunTable], this: RunTable | None = None) -> Iterator[Queries]:
    """Open an in-memory database over tables.

    Args:
        tables: each becomes a view; scores, probabilities and indexes of all rounds one more together.
        this: the table that goes by the name ``this`` too.

    Raises:
        CorruptError: a table turns out damaged while it is read.
        DataflexError: a query needs more memory, or temporary disk space, than there is.
    """
    import duckdb

    known = [*tables, *([this] if this is not None and this not in tables else [])]
    with (
        _readable(),
        tempfile.TemporaryDirectory(prefix="dataflex-") as spill,
        duckdb.connect(":memory:") as connection,
    ):
        paths = [file.resolve() for table in known for file in table.files]
        allowed = dict.fromkeys([*map(str, paths), *map(_as_pattern, paths)])  # DuckDB looks both up
        files = ", ".join(map(literal, allowed))
        for setting in (
            f"memory_limit = '{MEMORY}'",
            f"temp_directory = {literal(spill)}",
            "autoinstall_known_extensions = false",
            "autoload_known_extensions = false",
            "preserve_insertion_order = true",
            "enable_progress_bar = false",
            f"allowed_paths = [{files}]",
            f"allowed_directories = [{literal(spill)}]",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            connection.execute(f"set {setting}")
        yield Queries(connection, list(_make_views(connection, known, this)))


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise DataflexError(
            f"A query does not fit into {MEMORY} of memory and the temporary folder: {_first_line(error)}",
            "It is larger than what this machine has room for.",
            "Ask for less with --sql, or free space in the folder that TMPDIR names.",
        ) from error
    except duckdb.Error as error:
        raise CorruptError(
            f"A table cannot be read: {_first_line(error)}",
            "It was written whole by this program, so something else changed, replaced or truncated it.",
            "See `dataflex status` for which one, and make it again with --overwrite.",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


OF_ALL_ROUNDS = {
    "scores": "scores",
    "probabilities": "probabilities",
    "selection": "selections",
    "index": "idx",
}
"""Kinds of tables, and the view that has those of all rounds."""


def _make_views(
    connection: DuckDBPyConnection, tables: Sequence[RunTable], this: RunTable | None
) -> Iterator[View]:
    if this is not None:
        connection.execute(f"create view {THIS} as {_reading(this.files)}")
        yield View(THIS, str(this.path))
    for kind, name in OF_ALL_ROUNDS.items():
        chosen = [table for table in tables if table.kind == kind]
        if chosen:
            text = " union all by name ".join(f"({_labelled(table)})" for table in chosen)
            connection.execute(f"create view {name} as {text}")
            yield View(name, _meaning(name))
    for table in tables:
        if table is not this or table.view != THIS:
            connection.execute(f"create view {quoted(table.view)} as {_reading(table.files)}")
            yield View(table.view, table.kind if not table.name else f"{table.kind} {table.name}")
    features = [table for table in tables if table.kind == "feature"]
    if features:
        listed = ", ".join(_feature_line(table) for table in features)
        columns = "view, feature, split, checkpoint, lines"
        text = f"select * from (values {listed}) as t({columns})"  # noqa: S608 (texts are quoted as literals)
        connection.execute(f"create view features as {text}")
        yield View("features", "the feature tables: each is a view of its own")


def _meaning(name: str) -> str:
    lines = {"selections": "selected rows", "idx": "training positions"}.get(name, name)
    more = {"selections": " and name (null for the round's own)", "idx": ""}.get(name, " and method")
    return f"{lines} of all rounds, with the columns round{more}"


def _reading(files: Sequence[Path]) -> str:
    return f"select * from {_scan(files)}"  # noqa: S608 (paths are quoted as literals)


def _as_pattern(file: Path) -> str:
    """Return the pattern of this file alone: DuckDB reads ``*``, ``?`` and ``[`` in a path as one."""
    return glob.escape(str(file))


def _scan(files: Sequence[Path]) -> str:
    """Return the files as a table; folders named ``key=value`` above them are no columns of it."""
    listed = ", ".join(literal(_as_pattern(file.resolve())) for file in files)
    return f"read_parquet([{listed}], hive_partitioning = false)"


def _labelled(table: RunTable) -> str:
    name = f"{literal(table.name)} as method, "
    if table.kind == "selection":
        name = f"nullif({literal(table.name)}, '') as name, "
    name = "" if table.kind == "index" else name
    number = "null::integer" if table.round is None else str(table.round)
    return f"select {number} as round, {name}* from {_scan(table.files)}"  # noqa: S608


def _feature_line(table: RunTable) -> str:
    number = "null::integer" if table.round is None else str(table.round)
    texts = ", ".join(literal(text) for text in (table.view, table.name, table.split))
    return f"({texts}, {number}, {table.n_rows})"


def dictionaries(relation: DuckDBPyRelation) -> list[dict[str, Any]]:
    """Return a relation's lines as dictionaries."""
    names = relation.columns
    return [dict(zip(names, line, strict=True)) for line in relation.fetchall()]
