"""The report of a run, written as one HTML page."""

from __future__ import annotations

from pathlib import Path

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.reports.findings import findings
from dataflex_pipeline.reports.page import page
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.store.atomic import write_text

NAME = "report.html"


def write_report(record: RunRecord, output: Path | None = None) -> Path:
    """Write the page of a run and return where it is.

    Args:
        record: of the run.
        output: the file to write; by default report.html in the run.

    Raises:
        UserError: the file cannot be there.
    """
    where = output if output is not None else record.run.folder / NAME
    if where.is_dir() or not where.parent.is_dir():
        raise UserError(
            f"--output is {where}.",
            "It is a folder, or lies in a folder that does not exist.",
            "Name a file in a folder that is there, such as --output report.html.",
        )
    write_text(where, page(findings(record)))
    return where
