"""`dataflex report`: a run as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.reports.findings import findings
from dataflex_pipeline.reports.page import page
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.store.atomic import write_text

from . import console
from .subject import run_folders

NAME = "report.html"


def report(arguments: Sequence[str], output: Path | None) -> None:
    """Write the page of a run, given by name below ``runs_dir`` or by folder."""
    folders = run_folders(arguments)
    if len(folders) != 1:
        raise UserError(
            f"{len(folders)} runs were named.",
            "A report is of one run.",
            "Name one: `dataflex report quickstart-loss`. `dataflex compare` puts several side by side.",
        )
    record = RunRecord.read(folders[0])
    where = output if output is not None else record.run.folder / NAME
    if where.is_dir() or not where.parent.is_dir():
        raise UserError(
            f"--output is {where}.",
            "It is a folder, or lies in a folder that does not exist.",
            "Name a file in a folder that is there, such as --output report.html.",
        )
    write_text(where, page(findings(record)))
    console.line(
        f"Report of {record.name}: {where} ({where.stat().st_size / 1024:.0f} KB). Open it in a browser."
    )
