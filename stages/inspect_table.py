"""`dataflex inspect`: what a table, or a whole run, says. Reads only, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataflex_pipeline.errors import RunError, UserError
from dataflex_pipeline.pipeline.locate import Options
from dataflex_pipeline.pipeline.open_run import require_run
from dataflex_pipeline.reports.catalogue import RunTable, run_above, table_at, tables_of
from dataflex_pipeline.reports.look import Wanted, look, overview
from dataflex_pipeline.reports.query import open_queries
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.run import RunFolder

from . import answers, console, drawing
from .opening import open_run
from .subject import split_subject

SEED = derive_seed(0, "inspect") % 2**31
"""Of the rows that are shown by chance: the same ones every time."""


@dataclass(frozen=True)
class Subject:
    """What is looked at: a run, one table of it, or a table on its own."""

    run: RunFolder | None
    path: Path | None

    @property
    def again(self) -> str:
        """How the command names it."""
        shown = self.path if self.path is not None else self.run.folder if self.run is not None else ""
        return str(shown)


def inspect_(
    config: Path | None,
    arguments: list[str],
    run: str | None,
    method: str | None,
    sql: str | None,
    how: answers.Form,
    n_rows: int,
) -> None:
    """Show a run or a table, or answer a query over its tables.

    Raises:
        UserError: there is no such run or table, or the query cannot be answered.
    """
    subject = _subject(config, arguments, run, method, how)
    tables = tables_of(subject.run) if subject.run is not None else []
    this = table_at(subject.path, tables) if subject.path is not None else None
    _check_any(subject, tables, this)
    with open_queries(tables, this) as queries:
        if sql is not None:
            answers.show(queries.ask(sql), how)
        elif this is not None:
            found = look(queries, this, tables, Wanted(n_rows, SEED))
            if not answers.print_machine(found, found["numbers"], how):
                drawing.draw_table(found)
        elif subject.run is not None:
            found = overview(queries, subject.run, tables)
            if not answers.print_machine(found, found["tables"], how):
                drawing.draw_run(found, subject.again)


def _subject(
    config: Path | None, arguments: list[str], run: str | None, method: str | None, how: answers.Form
) -> Subject:
    named, settings = split_subject(arguments)
    path = Path(named) if named is not None else None
    if path is not None and run is None and path.exists():
        if (path / "run.yaml").is_file():
            return Subject(RunFolder(path), None)
        return Subject(run_above(path), path)
    if path is not None and run is None and (len(path.parts) > 1 or path.suffix):
        raise UserError(
            f"{path} does not exist.",
            "What to inspect is a run (its name or folder) or a table (a Parquet file or a folder of parts).",
            "See `ls runs` for the runs that there are.",
        )
    name = run if run is not None or path is None else str(path)
    with console.messages_to_stderr(how != "text"):
        context = open_run(Options(config, tuple(settings), name, method), reads_only=True)
    require_run(context)
    if run is not None and path is not None:
        return Subject(context.store, path if path.exists() else context.folder / path)
    return Subject(context.store, None)


def _check_any(subject: Subject, tables: list[RunTable], this: RunTable | None) -> None:
    if this is None and not tables and subject.run is not None:
        raise RunError(
            f"The run {subject.run.folder} has no finished table yet.",
            "It was begun and cut off before its data was prepared.",
            "Run the command that began it again; it goes on from there.",
        )
