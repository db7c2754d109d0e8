"""The drawing of `dataflex inspect --row`: one row's story, or the rows that hold a text."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dataflex_pipeline.pipeline.row import Place, RowStory, Stretch
from dataflex_pipeline.pipeline.row_likeness import Likeness
from dataflex_pipeline.pipeline.row_search import Found
from dataflex_pipeline.terminal import console
from dataflex_pipeline.terminal.answers import clipped, plain
from dataflex_pipeline.terminal.drawing import number

WIDTH = 120
"""Columns of text at most, and without a terminal."""
LINES = 16
"""Lines of a stretch of the conversation that are shown; --json has all of them."""
TEXT = 100
"""Characters of another row's text."""
LEARNT, OTHER = "  | ", "    "
ONE_LINE = 60
"""Characters up to which a column of the user's own is shown."""


def print_json(found: RowStory | Found) -> None:
    """Print a story, or rows that were found, as JSON."""
    content = plain(dataclasses.asdict(found))
    sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def draw_found(found: Found) -> None:
    """Print the rows that hold a text."""
    console.line(f"{found.count:,} rows hold '{clipped(found.text, TEXT)}'", style="bold")
    rows = [[str(hit.row), clipped(hit.source, TEXT), clipped(hit.text, TEXT)] for hit in found.first]
    console.print_table("", ["row", "source", "text"], rows, wraps="text")
    if found.count > len(found.first):
        console.line(f"The first {len(found.first)} are shown; a longer text finds fewer.")
    console.line("Look at one with --row N.")


def draw_row(story: RowStory) -> None:
    """Print one row's story."""
    console.line(f"Row {story.row}", style="bold")
    for line in _facts(story):
        console.line(f"  {line}")
    _draw_conversation(story)
    _draw_scores(story)
    for each in story.embeddings:
        _draw_likeness("Nearest target rows by embedding", each)
    for each in story.gradients:
        _draw_likeness("Target rows whose gradients agree most", each)
    _draw_selections(story)
    for notice in story.notices:
        console.line(f"note: {clipped(notice, 500)}", style="yellow")


def _facts(story: RowStory) -> list[str]:
    place = "" if story.file is None else f", {clipped(story.file, TEXT)}"
    line = "" if story.line is None else f", {'line' if story.file is not None else 'row'} {story.line}"
    lines = [f"from {clipped(story.source, TEXT)}{place}{line}"]
    if story.path is not None:
        lines.append(f"{clipped(story.path, 1000)}:{story.line}")
    lines.append(f"row_id {story.row_id}")
    if story.same:
        lines.append(f"the same conversation: row {', '.join(map(str, story.same))}")
    lines.append(f"{story.n_tokens:,} tokens, {story.n_response_tokens:,} of them labelled")
    if not story.valid:
        lines.append(f"not valid: {clipped(story.reason or '', 500)}")
    if story.note:
        lines.append(f"note: {clipped(story.note, 500)}")
    own = ", ".join(_own(story.original, story.conversation))
    return [*lines, *([own] if own else [])]


def _own(original: Mapping[str, Any], conversation: Sequence[Stretch]) -> list[str]:
    """Return the row's own short columns that the conversation does not show."""
    said = "".join(stretch.text for stretch in conversation)
    shown = []
    for name, value in original.items():
        if value is None or isinstance(value, list | dict) or (isinstance(value, str) and value in said):
            continue
        text = number(value) if isinstance(value, float) else str(value)
        if 0 < len(text) <= ONE_LINE:
            shown.append(f"{clipped(name, ONE_LINE)}: {clipped(text, ONE_LINE)}")
    return shown


def _width() -> int:
    return max(20, min(console.out.width, WIDTH)) if console.out.is_terminal else WIDTH


def _draw_conversation(story: RowStory) -> None:
    if not story.conversation:
        return
    what = "what carries loss" if story.exact else "turns that carry loss, by their role"
    console.line(f"Conversation (|: {what})", style="bold")
    for stretch in story.conversation:
        mark = LEARNT if stretch.learnt else OTHER
        lines = _wrapped(stretch.text, _width() - len(mark))
        for line in lines[:LINES]:
            console.line((mark + line).rstrip(), style="green" if stretch.learnt else None)
        if len(lines) > LINES:
            console.line(f"{mark}... {len(lines) - LINES:,} more lines; --json has all", style="dim")


def _wrapped(text: str, width: int) -> list[str]:
    """Return a text in lines of at most ``width``, without control characters, its own breaks kept."""
    lines = []
    for own in text.strip("\n").splitlines():
        clean = "".join(c if c.isprintable() else " " for c in own)
        lines += textwrap.wrap(clean, width, break_on_hyphens=False) or [""]
    return lines


def _rank(place: Place) -> str:
    return "" if place.rank is None else f"{place.rank:,} of {place.of:,}"


def _draw_scores(story: RowStory) -> None:
    if not story.scores:
        return
    rows = [
        [
            str(each.round),
            each.method,
            number(each.score.value),
            _rank(each.score) or clipped(f"not scored: {each.reason}", 200),
            number(each.probability),
        ]
        for each in story.scores
    ]
    console.print_table("Scores", ["round", "method", "score", "rank", "probability"], rows, wraps="rank")
    groups = [
        [str(each.round), each.method, clipped(group, TEXT), number(place.value), _rank(place)]
        for each in story.scores
        if len(each.groups) > 1
        for group, place in each.groups.items()
    ]
    if groups:
        names = ["round", "method", "group", "similarity", "rank"]
        console.print_table("By target group", names, groups, wraps="group")
    for each in story.scores:
        shown = ", ".join(
            f"{name} {_value(value)}" for name, value in each.columns.items() if value is not None
        )
        if shown:
            console.line(f"{each.method}, round {each.round}: {shown}")


def _value(value: Any) -> str:
    return number(value) if isinstance(value, float) else clipped(str(value), TEXT)


def _draw_likeness(title: str, found: Likeness) -> None:
    used = f" ({'; '.join(found.used_by)})" if found.used_by else ""
    if found.reason is not None:
        console.line(f"{title}{used}: none, {clipped(found.reason, 200)}")
        return
    rows = [
        [str(each.row), f"{each.similarity:.3f}", clipped(each.group, TEXT), clipped(each.text, TEXT)]
        for each in found.rows
    ]
    console.print_table(title + used, ["row", "cosine", "group", "text"], rows, wraps="text")


def _draw_selections(story: RowStory) -> None:
    if not story.selections:
        console.line("Nothing is selected yet.")
        return
    rows = [
        [
            str(each.round),
            each.method + ("" if each.name is None else f" ({each.name})"),
            "yes" if each.selected else "no",
            "" if each.rank is None else f"{each.rank:,} of {each.of:,}",
            ", ".join(map(str, each.positions)),
            number(each.weight),
            number(each.probability),
            "yes" if each.trained else "no",
        ]
        for each in story.selections
    ]
    names = ["round", "method", "selected", "rank", "positions", "weight", "probability", "trained"]
    shown = [place for place, name in enumerate(names) if name != "rank" or any(row[3] for row in rows)]
    console.print_table(
        "Selected",
        [names[place] for place in shown],
        [[row[place] for place in shown] for row in rows],
        wraps="positions",
    )
