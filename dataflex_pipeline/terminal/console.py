"""Lines, tables and errors on the terminal."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from dataflex_pipeline.config.redaction import redacted, redacted_source
from dataflex_pipeline.errors import DataflexError
from dataflex_pipeline.store.unseen import visible as visible


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if console.width < 1:  # COLUMNS=0: rich would print nothing at all
        console.width = 80
    return console


# Made at import: rich decides then about NO_COLOR, and colours only reach a terminal. Long lines are left
# to the terminal, so that a path can be copied whole.
out = _console(stderr=False)
err = _console(stderr=True)


LONGEST_WORD, LONGEST_PART = 300, 4000
"""Characters of a word, and of each part, that an error shows of what was given."""
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")
GAP = 3
"""Columns of the terminal that rich puts around each column of a table."""
LEAST = 8
"""What is left at least of the column that gives way; with less room a table is not drawn as one."""
MOST_LINES = 3
"""A cell of the column that gives way takes so many lines at most; with less room it stands below its row."""


@contextlib.contextmanager
def messages_to_stderr(wanted: bool = True) -> Iterator[None]:
    """Keep standard output for a result that a script reads: everything said goes to standard error."""
    global out
    before = out
    if wanted:
        out = err
    try:
        yield
    finally:
        out = before


def clean(text: str) -> str:
    """Return a text as it may be printed: what cannot be seen made visible, secrets in addresses left out."""
    return visible(redacted(text))


def line(text: str, style: str | None = None) -> None:
    """Print one line as it is: square brackets in it are not markup."""
    out.print(clean(text), style=style, markup=False, emoji=False)


def pieces(*parts: tuple[str, str | None]) -> None:
    """Print one line of parts, each a text as it is and its style."""
    from rich.text import Text

    out.print(Text.assemble(*((clean(text), style or "") for text, style in parts)))


def fail(error: DataflexError) -> None:
    """Print an error in its three parts."""
    err.print("error: ", style="bold red", end="")
    err.print(_of_error(error.what), markup=False, emoji=False)
    err.print(_of_error(error.why), markup=False, emoji=False)
    err.print("-> ", style="bold", end="")
    err.print(_of_error(error.fix), markup=False, emoji=False)


def _of_error(text: str) -> str:
    """Return a part of an error as it may be printed: without secrets, cut where it is long."""
    cut = _LONG_WORD.sub(lambda found: f"{found[0][:LONGEST_WORD]}...", visible(redacted_source(text)))
    return cut if len(cut) <= LONGEST_PART else f"{cut[:LONGEST_PART]}..."


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], wraps: str) -> None:
    """Print a table; without a terminal as tab-separated lines, for scripts.

    Args:
        title: above it; may be empty. columns: their names. rows: of plain text.
        wraps: the column that gives way on a narrow terminal: it is wrapped, or stands on a line of its own
            below each row; the others (paths, names) stay whole, and where they do not fit, cells stand
            below each other.
    """
    title, columns = clean(title), [_cell(name) for name in columns]
    rows = [[_cell(cell) for cell in row] for row in rows]
    wraps = _cell(wraps)
    if not out.is_terminal:
        lines = [*([title] if title else []), *("\t".join(row) for row in [columns, *rows])]
        out.file.write("\n".join(lines) + "\n")  # rich itself would turn the tabs into spaces
        return
    whole = fits(columns, rows, wraps)
    if wraps in columns and (
        _fits_below(columns, rows, wraps) if not whole else _is_long(columns, rows, wraps)
    ):
        _print_below(title, columns, rows, wraps)
        return
    if not whole:
        _print_stacked(title, columns, rows)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE,
    )
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name != wraps)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table, soft_wrap=False)


def _cell(text: str) -> str:
    """Return the text of a cell, which has no tabs or lines of its own."""
    return clean(text).replace("\t", "\\t").replace("\n", "\\n")


def fits(columns: Sequence[str], rows: Sequence[Sequence[str]], wraps: str = "") -> bool:
    """Whether a table can be printed here without cutting off a cell; without a terminal always.

    Args:
        columns, rows: as for `print_table`. wraps: the column that may be as narrow as LEAST; "" for none.
    """
    if not out.is_terminal:
        return True
    needed = sum(
        min(width, LEAST) if name == wraps else width
        for name, width in zip(columns, _widths(columns, rows), strict=True)
    )
    return needed + GAP * len(columns) <= out.width


def _fits_below(columns: Sequence[str], rows: Sequence[Sequence[str]], wraps: str) -> bool:
    """Whether a table fits whose column that gives way stands below each row."""
    place = list(columns).index(wraps)
    others = [width for number, width in enumerate(_widths(columns, rows)) if number != place]
    return sum(others) + 2 * len(others) <= out.width


def _is_long(columns: Sequence[str], rows: Sequence[Sequence[str]], wraps: str) -> bool:
    return _most_lines(columns, rows, wraps) > MOST_LINES


def _most_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], wraps: str) -> int:
    """Return how many lines the longest cell of the column that gives way would take."""
    place = list(columns).index(wraps)
    others = sum(width for number, width in enumerate(_widths(columns, rows)) if number != place)
    room = max(out.width - others - GAP * len(columns), 1)
    return max((len(textwrap.wrap(row[place], room)) for row in rows), default=0)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    from rich.cells import cell_len

    return [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]


def _print_below(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], wraps: str) -> None:
    """Print a table whose column ``wraps`` stands below each row, over the whole width."""
    from rich.cells import set_cell_size

    place = list(columns).index(wraps)
    widths = _widths(columns, rows)

    def beside(cells: Sequence[str]) -> str:
        kept = [number for number in range(len(columns)) if number != place]
        return "  " + "  ".join(set_cell_size(cells[number], widths[number]) for number in kept).rstrip()

    if title:
        line(title, style="bold")
    line(beside(columns), style="bold")
    for row in rows:
        line(beside(row))
        for text in textwrap.wrap(row[place], max(out.width - 6, 1), break_on_hyphens=False):
            line(f"      {text}")


def _print_stacked(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table that is too wide line by line, every cell after its column's name."""
    if title:
        line(title, style="bold")
    for row in rows:
        cells = [f"{name} {cell}".strip() for name, cell in zip(columns, row, strict=True) if cell]
        whole = textwrap.wrap(
            ", ".join(cells), max(out.width - 4, 1), break_long_words=False, break_on_hyphens=False
        )  # paths stay whole, so that they can be copied
        for number, text in enumerate(whole):
            line(f"{'    ' if number else '  '}{text}")


def shown(path: Path, below: Path) -> str:
    """Return a path as it is shown: relative to the run folder, which is named once, where it lies in it."""
    return str(path.relative_to(below)) if path.is_relative_to(below) else str(path)
