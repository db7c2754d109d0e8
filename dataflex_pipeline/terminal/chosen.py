"""A selection drawn beside the pool that it was made from."""

from __future__ import annotations

from dataflex_pipeline.reports.chosen import Chosen, Lengths
from dataflex_pipeline.terminal import console

MOST_SOURCES = 20
SOURCES = ("source", "in the pool", "share", "selected", "share of these")
QUANTILES = ("rows", "least", "quarter", "half", "three quarters", "most")


def draw_chosen(found: Chosen) -> None:
    """Print what was chosen by source, and the lengths of rows."""
    total = sum(there for _, there, _ in found.sources)
    rows = [
        [name, f"{there:,}", f"{there / total:.1%}", f"{taken:,}", f"{taken / found.n_rows:.1%}"]
        for name, there, taken in found.sources[:MOST_SOURCES]
    ]
    console.print_table("Selected by source", SOURCES, rows, "source")
    more = len(found.sources) - MOST_SOURCES
    if more > 0:
        console.line(f"and {more} more sources")
    lengths = [["pool", *_cells(found.pool)], ["selected", *_cells(found.selected)]]
    console.print_table(
        "Tokens of a row", ["rows", "least", "quarter", "half", "three quarters", "most"], lengths, ""
    )


def _cells(lengths: Lengths) -> list[str]:
    return [
        f"{value:,.0f}"
        for value in (lengths.least, lengths.lower, lengths.median, lengths.upper, lengths.most)
    ]
