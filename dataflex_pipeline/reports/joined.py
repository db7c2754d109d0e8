"""The joined table of a run: one line per row of the pool, with all that the run's tables say of it.

Text, lengths, the user's own short columns, every score with its rank, where the row was selected, and its
place on the map of the embeddings. It is made from the finished tables in one stream, kept in the run's
folder ``view/`` with the fingerprints of what it was made from, and made again when one of them changed.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataflex_pipeline.api import Progress
from dataflex_pipeline.errors import CorruptError, RunError
from dataflex_pipeline.reports.catalogue import RunTable, tables_of
from dataflex_pipeline.reports.embedding_map import VERSION as MAP_VERSION
from dataflex_pipeline.reports.embedding_map import embedding_map, is_embedding
from dataflex_pipeline.reports.query import Queries, literal, open_queries, quoted
from dataflex_pipeline.schemas import ORIGINAL, PREPARED, column
from dataflex_pipeline.store.fingerprint import FINGERPRINT_KEY, digest
from dataflex_pipeline.store.locks import InUseError, held
from dataflex_pipeline.store.parquet import read_footer
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.tables import table_writer

FOLDER = "view"
"""Folder of a run that holds the joined table and the map; it can be deleted at any time."""
NAME = "rows.parquet"
LONGEST = 20_000
"""Characters of a prompt or a response that the table holds; `dataflex inspect --row` shows all of it."""
CATEGORIES = 100
"""Different values up to which a text column of the user's own is taken in."""
NOT_SELECTED = "no"
VERSION = 1
"""Of the table's columns and their meaning."""
BLOCK = 8192
"""Rows per block while it is written."""


@dataclass(frozen=True)
class Ranked:
    """The columns of a score table. score, rank: their names. view: of the table in queries."""

    score: str
    rank: str
    view: str
    meaning: str

    @classmethod
    def of(cls, table: RunTable) -> Ranked:
        """Return the columns of a score table."""
        which = f"{table.round}_{table.name}"
        return cls(f"score_{which}", f"rank_{which}", table.view, f"{table.name} in round {table.round}")


@dataclass(frozen=True)
class Chosen:
    """The column of a selection. column: its name. view: of the table in queries. label: in ``selected``."""

    column: str
    view: str
    label: str

    @classmethod
    def of(cls, table: RunTable) -> Chosen:
        """Return the column of a selection."""
        named = (f"_{table.name}", f": {table.name}") if table.name else ("", "")
        return cls(f"selected_{table.round}{named[0]}", table.view, f"round {table.round}{named[1]}")


@dataclass(frozen=True)
class Joined:
    """The joined table of a run.

    Attributes:
        path: the Parquet file. n_rows: rows of the pool.
        own: the user's own columns. ranked: of the score tables. chosen: of the selections.
        mapped: whether rows have a place on a map.
    """

    path: Path
    n_rows: int
    own: tuple[str, ...]
    ranked: tuple[Ranked, ...]
    chosen: tuple[Chosen, ...]
    mapped: bool


@contextlib.contextmanager
def joined_table(run: RunFolder, progress: Progress) -> Iterator[Joined]:
    """Make a run's joined table, or take the one that is there, and keep it for as long as it is used.

    Args:
        run: its folder; where nothing can be written, the table is made in a temporary one.
        progress: told what is made and how far it is.

    Raises:
        RunError: there is no run or no prepared pool, or another process is making the table.
        CorruptError: a table of the run is damaged.
    """
    if not run.exists():
        raise RunError(
            f"There is no run at {run.folder}.",
            "A run's folder holds a run.yaml.",
            "Name a run below runs_dir, or give the path of its folder.",
        )
    tables = tables_of(run)
    pool = next((table for table in tables if table.kind == "pool"), None)
    if pool is None:
        raise RunError(
            f"The run {run.folder} has no prepared pool yet.",
            "There are no rows to look at.",
            f"Run `dataflex warmup --run {run.folder.name}`, or another command that prepares it, first.",
        )
    with _folder(run, progress) as folder:
        try:
            with held(folder / ".lock"):
                joined = _joined(folder, pool, tables, progress)
        except InUseError as error:
            raise RunError(
                f"Another process ({error.who}) is making the table of {run.folder}.",
                "Two of them would write the same file.",
                "Wait until it is done, and start again.",
            ) from error
        yield joined


@contextlib.contextmanager
def _folder(run: RunFolder, progress: Progress) -> Iterator[Path]:
    """Yield the run's folder for the table, or a temporary one where that cannot be written to."""
    folder = run.folder / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        progress.say(f"{folder} cannot be written to ({error.strerror}): a temporary folder is used")
        with tempfile.TemporaryDirectory(prefix="dataflex-view-") as temporary:
            yield Path(temporary)
    else:
        yield folder


def _joined(folder: Path, pool: RunTable, tables: Sequence[RunTable], progress: Progress) -> Joined:
    scores = [table for table in tables if table.kind == "scores"]
    selections = [table for table in tables if table.kind == "selection"]
    embedded = [each for each in tables if each.split == "pool" and is_embedding(each)][:1]
    beside = [*scores, *selections, *embedded]
    ingredients = {
        "table": "view",
        "version": VERSION,
        "map": MAP_VERSION,
        "made_from": {each.view: each.notes().get("fingerprint") for each in (pool, *beside)},
    }
    path = folder / NAME
    if not path.is_file() or read_footer(path).get(FINGERPRINT_KEY, b"").decode(errors="replace") != digest(
        ingredients
    ):
        with open_queries([pool, *beside]) as queries:
            fitting = [each for each in beside if _is_over(queries, each, pool)]
            own = _own_columns(queries, pool)
        place = [embedding_map(each, folder, progress) for each in embedded if each in fitting]
        ranked = tuple(Ranked.of(each) for each in scores if each in fitting)
        chosen = tuple(Chosen.of(each) for each in selections if each in fitting)
        with open_queries([pool, *fitting, *place]) as queries:
            made = Joined(path, pool.n_rows, own, ranked, chosen, bool(place))
            _write(made, queries, pool.schema, ingredients, progress)
    return _as_made(path, pool, scores, selections, embedded, progress)


def _is_over(queries: Queries, table: RunTable, pool: RunTable) -> bool:
    """Whether a table is over the rows of the pool as it is now, and not as it was before."""
    lines = queries.table(table.view).project("row, row_id as other_id")
    found = lines.join(queries.table(pool.view).project("row, row_id"), "row", how="left")
    return not found.filter("row_id is distinct from other_id").limit(1).fetchall()


def _as_made(
    path: Path,
    pool: RunTable,
    scores: Sequence[RunTable],
    selections: Sequence[RunTable],
    embedded: Sequence[RunTable],
    progress: Progress,
) -> Joined:
    """Return the table that is there, by its columns; say which tables are not in it."""
    names = pq.read_schema(path).names
    filled = {
        **{each.view: Ranked.of(each).score for each in scores},
        **{each.view: Chosen.of(each).column for each in selections},
        **{each.view: "map_x" for each in embedded},
    }
    for view in (view for view, name in filled.items() if name not in names):
        progress.say(f"{view} is left out: it is over other rows than those of the pool now")
    return Joined(
        path,
        pool.n_rows,
        tuple(name for name in names if name.startswith(ORIGINAL)),
        tuple(each for each in map(Ranked.of, scores) if each.score in names),
        tuple(each for each in map(Chosen.of, selections) if each.column in names),
        "map_x" in names,
    )


def _own_columns(queries: Queries, pool: RunTable) -> tuple[str, ...]:
    """Return the user's own columns that tell rows apart: numbers, and texts of few different values."""
    own = [field for field in pool.schema if field.name.startswith(ORIGINAL)]
    numbers = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
    counted = [field.name for field in own if any(each(field.type) for each in texts)]
    few: set[str] = set()
    if counted:
        asked = ", ".join(f"approx_count_distinct({quoted(name)})" for name in counted)
        counts = queries.table(pool.view).aggregate(asked).fetchall()[0]
        most = min(CATEGORIES, pool.n_rows // 2)  # of a few rows, each may be its own
        few = {name for name, n in zip(counted, counts, strict=True) if 1 < n <= most}
    return tuple(f.name for f in own if f.name in few or any(each(f.type) for each in numbers))


def _schema(joined: Joined, pool: pa.Schema) -> pa.Schema:
    """Return the columns, in the order in which one reads them: rank in the last round, texts, and so on."""
    scored = [field for each in reversed(joined.ranked) for field in _scored(each)]
    kept = [PREPARED.field(name) for name in ("n_tokens", "n_response_tokens", "valid", "reason")]
    shown = f"the first {LONGEST} characters, and how many more there are"
    meaning = f"the selections that have the row; {NOT_SELECTED} for none"
    places = (("map_x", "first"), ("map_y", "second")) if joined.mapped else ()
    return pa.schema(
        [
            PREPARED.field("row"),
            *scored[:1],
            *([column("selected", pa.string(), meaning)] if joined.chosen else []),
            column("prompt", pa.string(), f"what comes before the last answer; {shown}"),
            column("response", pa.string(), f"the last answer; {shown}"),
            PREPARED.field("source"),
            *(column(name, _plain(pool.field(name).type), "column of the data's own") for name in joined.own),
            *scored[1:],
            *(column(each.column, pa.bool_(), f"selected in {each.label}") for each in joined.chosen),
            *kept,
            PREPARED.field("row_id"),
            *(
                column(name, pa.float32(), f"place on the {which} principal component")
                for name, which in places
            ),
        ]
    )


def _scored(ranked: Ranked) -> tuple[pa.Field, pa.Field]:
    meaning = f"rank by {ranked.score}, best first, from 1; ties by row"
    return (
        column(ranked.rank, pa.int64(), meaning),
        column(ranked.score, pa.float64(), f"score of {ranked.meaning}; null without one"),
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type that a page can show of a column."""
    return pa.float64() if pa.types.is_decimal(kind) else kind


def _write(
    joined: Joined, queries: Queries, pool: pa.Schema, ingredients: dict[str, Any], progress: Progress
) -> None:
    schema = _schema(joined, pool)
    progress.start("joining the tables", joined.n_rows, "rows")
    with table_writer(joined.path, schema, ingredients) as write:
        for block in queries.batches(_query(joined), BLOCK):
            if not pc.all(pc.equal(block.column("row"), block.column("other_row"))).as_py():
                raise CorruptError(
                    f"The tables beside {joined.path} are not over the same rows.",
                    "They were read side by side and disagree about which row comes next.",
                    "See `dataflex status` for the damaged one, and make it again with --overwrite.",
                )
            write(block)
            progress.advance(block.num_rows)
    progress.finish()


def _query(joined: Joined) -> str:
    """Return the query of the whole table, in row order, with ``other_row`` of the numbers beside the text.

    The texts are streamed; only the numbers are joined and sorted, which takes some bytes per row.
    """
    own = "".join(f", {quoted(name)}" for name in joined.own)
    texts = f"""
        select row, row_id, source, n_tokens, n_response_tokens, valid, reason{own},
            {_shown(_PROMPT)} as prompt, {_shown(_RESPONSE)} as response
        from (select *, {_LAST} as last_answer from pool)
    """  # noqa: S608 (names are quoted)
    return f"from ({texts}) positional join ({_numbers(joined)})"


_LAST = """
    len(messages) - list_position(list_reverse(list_transform(messages, lambda m: m.role)), 'assistant') + 1
"""
"""Place of the last answer among the turns, from 1; null where there is none."""
_PROMPT = """
    array_to_string(list_transform(
        list_filter(messages, lambda m, i: i < coalesce(last_answer, i + 1)),
        lambda m: case when len(messages) > 2 or m.role <> 'user' then m.role || ': ' else '' end
            || coalesce(m.content, '')
    ), chr(10))
"""
"""The turns before the last answer, each with its role unless there is only the user's."""
_RESPONSE = "messages[last_answer].content"


def _shown(text: str) -> str:
    cut = f"left({text}, {LONGEST}) || ' ... and ' || (length({text}) - {LONGEST}) || ' more characters'"
    return f"case when length({text}) > {LONGEST} then {cut} else {text} end"


def _numbers(joined: Joined) -> str:
    """Return the query of the numbers of every row, sorted by row; its row is ``other_row``."""
    columns, joins, labels = ["pool.row as other_row"], [], []
    rank = "case when score is not null then row_number() over (order by score desc nulls last, row) end"
    for number, each in enumerate(joined.ranked):
        lines = f"select row, score, {rank} as rank from {quoted(each.view)}"  # noqa: S608 (quoted)
        joins.append(f"left join ({lines}) s{number} using (row)")
        columns.append(f"s{number}.score as {quoted(each.score)}, s{number}.rank as {quoted(each.rank)}")
    for number, selection in enumerate(joined.chosen):
        lines = f"select distinct row, true as taken from {quoted(selection.view)}"  # noqa: S608 (quoted)
        joins.append(f"left join ({lines}) c{number} using (row)")
        columns.append(f"c{number}.taken is not null as {quoted(selection.column)}")
        labels.append(f"case when c{number}.taken then {literal(selection.label)} end")
    if labels:
        said = f"concat_ws(', ', {', '.join(labels)})"
        columns.append(f"coalesce(nullif({said}, ''), {literal(NOT_SELECTED)}) as selected")
    if joined.mapped:
        joins.append("left join map using (row)")
        columns.append("map.map_x, map.map_y")
    return f"select {', '.join(columns)} from pool {' '.join(joins)} order by pool.row"  # noqa: S608 (quoted)
