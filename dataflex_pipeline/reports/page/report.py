"""The report of a run, written as one HTML page."""

from __future__ import annotations

from pathlib import Path

from dataflex_pipeline.reports.page.findings import findings
from dataflex_pipeline.reports.page.render import page
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.store.atomic import set_aside, write_text
from dataflex_pipeline.store.chosen_files import check_folder, check_free

NAME = "report.html"
HEAD = 4096
"""Bytes of a page that its title is looked for in."""


def write_report(
    record: RunRecord,
    output: Path | None = None,
    *,
    against: RunRecord | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the page of a run and return where it is.

    Args:
        record: of the run.
        output: the file to write; by default report.html in the run. An older report there is replaced.
        against: a run to hold its target loss against.
        overwrite: set something else that is there aside.

    Raises:
        UserError: something else is there, or the file cannot be there; nothing is set aside then.
    """
    where = output if output is not None else record.run.folder / NAME
    check_folder(where)
    in_the_way = where.is_file() and not _is_report(where)
    if not (overwrite and in_the_way):
        check_free(where, _is_report)
    text = page(findings(record, against))
    if in_the_way:
        set_aside(where)
    write_text(where, text)
    return where


def _is_report(file: Path) -> bool:
    """Whether a file is a report: its title says so."""
    with file.open("rb") as stream:
        return b": DataFlex Pipeline report</title>" in stream.read(HEAD)
