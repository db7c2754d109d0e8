"""The subject of `dataflex inspect`: a run, a table, or one row of a run's pool."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.errors import UserError

from .words import split_subject

if TYPE_CHECKING:
    from dataflex_pipeline.reports.subject import Subject


def subject_of(
    config: Path | None, arguments: list[str], run: str | None, method: str | None, machine: bool
) -> Subject:
    """Return the run or table that a command's words name.

    Args:
        config, arguments, run, method: as they were given; the words without a dash.
        machine: whether standard output is for a program alone.
    """
    from dataflex_pipeline.pipeline.locate import Options
    from dataflex_pipeline.pipeline.open_run import require_run
    from dataflex_pipeline.reports.subject import Subject
    from dataflex_pipeline.terminal import console

    from .opening import open_run

    named, settings = split_subject(arguments)
    if named is not None and run is None and (found := Subject.at(Path(named))) is not None:
        return found
    with console.messages_to_stderr(machine):
        options = Options(config, tuple(settings), run if run is not None else named, method)
        opened = open_run(options, reads_only=True)
    require_run(opened)
    if named is None or run is None:
        return Subject(opened.store, None)
    return Subject(opened.store, Path(named) if Path(named).exists() else opened.folder / named)


def show_row(
    subject: Subject, row: int | None, row_id: str | None, find: str | None, *, json: bool, gradients: bool
) -> None:
    """Print one row's story; of several rows that hold a text, the first.

    Args:
        subject: the run. json: for a program. gradients: take them where the scores kept none.
        row, row_id, find: its number, the beginning of its row_id, or a text that it holds: one of them.

    Raises:
        UserError: no run is named, or there is no such row.
    """
    from dataflex_pipeline.pipeline.run import Run
    from dataflex_pipeline.process.libraries import quieten
    from dataflex_pipeline.terminal import row as drawing

    if sum(each is not None for each in (row, row_id, find)) > 1:
        raise UserError(
            "More than one of --row, --row-id and --find was given.",
            "Each of them says which row is meant.",
            "Leave all but one of them out.",
        )
    if subject.run is None or subject.path is not None:
        raise UserError(
            f"{subject.again} is a table, and a row of the pool was asked for.",
            "What is known of a row is in all the tables of a run.",
            f"Name the run{'' if subject.run is None else f': {subject.run.folder}'}.",
        )
    quieten()
    run = Run.open(subject.run.folder)
    if find is not None:
        if (found := run.find(find)).count > 1:
            return drawing.print_json(found) if json else drawing.draw_found(found)
        row = found.first[0].row
    story = run.row(row if row is not None else row_id or "", gradients)
    return drawing.print_json(story) if json else drawing.draw_row(story)
