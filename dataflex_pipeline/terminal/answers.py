"""Answers to queries, and results for programs: as a table to look at, JSON or CSV."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

from dataflex_pipeline.reports.query import Answer
from dataflex_pipeline.terminal import console

Form = Literal["text", "json", "csv"]
SHOWN_LINES = 40
BATCH = 10_000
CELL = 60
"""Characters of a cell that are shown; JSON and CSV have all of them."""


def show(answer: Answer, how: Form) -> None:
    """Print the lines of an answer; for JSON and CSV all of them, however many."""
    if how == "text":
        _show_some(answer.names, answer.lines(SHOWN_LINES + 1))
    elif how == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.names)
        while lines := answer.lines(BATCH):
            writer.writerows([[plain(cell) for cell in line] for line in lines])
    else:
        _stream_json(answer)


def _show_some(names: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    rows = [[clipped(text_of(cell), CELL) for cell in line] for line in lines[:SHOWN_LINES]]
    console.print_table("", list(names), rows, wraps=names[-1])
    if len(lines) > SHOWN_LINES:
        console.line(f"The first {SHOWN_LINES} lines are shown; --csv or --json gives all.")


def _stream_json(answer: Answer) -> None:
    first = True
    sys.stdout.write("[")
    while lines := answer.lines(BATCH):
        for line in lines:
            text = json.dumps(plain(dict(zip(answer.names, line, strict=True))), ensure_ascii=False)
            sys.stdout.write(("\n" if first else ",\n") + console.visible(text))
            first = False
    sys.stdout.write("\n]\n")


def print_machine(found: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], how: Form) -> bool:
    """Print a result for a program, if one asked.

    Args:
        found: the whole result, for JSON. lines: the part of it that is a table, for CSV.
        how: the form that was asked for.

    Returns:
        Whether anything was printed: not for people.
    """
    if how == "json":
        print_json(plain(found))
    if how == "csv":
        flat = [_flat(line) for line in lines]
        names = list(dict.fromkeys(name for line in flat for name in line))
        writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return how != "text"


def print_json(content: Mapping[str, Any]) -> None:
    """Print a result as JSON on standard output, whatever is said elsewhere."""
    sys.stdout.write(console.visible(json.dumps(content, indent=2, ensure_ascii=False)) + "\n")


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}_{inner}": cell for inner, cell in value.items()}
        else:
            flat[name] = value
    return flat


def plain(value: Any) -> Any:
    """Return a value that JSON has: numbers that are not finite become null, other objects their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def text_of(value: Any) -> str:
    """Return a cell as it is shown: whole numbers as they are, others with six digits."""
    if value is None:
        return ""
    if isinstance(value, float | Decimal):
        return f"{value:.6g}"
    return value if isinstance(value, str) else str(value)


def clipped(text: str, width: int) -> str:
    """Return a text on one line, without control characters, cut where it is longer than ``width``."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: width - 3] + "..."
