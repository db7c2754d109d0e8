"""The rows of a report's page as plain values, their texts cut so that the page stays small.

One number holds for the whole page: a text has at most so many characters, as many as there is room for.
Where even short texts would not fit, there are fewer rows. What was cut off is counted, and the page says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dataflex_pipeline.reports.page.browsed import LISTS, Browsed, own_columns, plain_number
from dataflex_pipeline.reports.page.findings import Rows
from dataflex_pipeline.reports.page.pictures import table_name
from dataflex_pipeline.reports.shares import round_name
from dataflex_pipeline.schemas import ORIGINAL

LEAST = 200
"""Characters that a text has at least; with less room for them there are fewer rows."""


def listed_rows(found: Rows, room: int, written: Callable[[Any], str]) -> tuple[str, int]:
    """Return the rows as text for the page, and their number.

    Args:
        found: the rows. room: bytes that there are. written: from plain values to text.
    """
    rows = list(found.rows)
    while True:
        fixed = len(written(_data(found, rows, 0)).encode())
        most = _longest(rows, room - fixed, written)
        enough = min(LEAST, max((len(turn.text) for each in rows for turn in each.turns), default=0))
        if most >= enough or len(rows) <= 1:
            return written(_data(found, rows, max(most, enough))), len(rows)
        rows = _fewer(rows)


def _fewer(rows: Sequence[Browsed]) -> list[Browsed]:
    """Return three quarters of the rows: those at random give way first, and of each list every fourth."""
    quarter = max(len(rows) // 4, 1)
    spare = [each for each in rows if each.lists == {"random"}]
    gone = {id(each) for each in (spare[:quarter] if len(spare) >= quarter else rows[::4])}
    return [each for each in rows if id(each) not in gone]


def _longest(rows: Sequence[Browsed], room: int, written: Callable[[Any], str]) -> int:
    """Return how many characters each text may have, so that all of them fit into so many bytes."""
    sizes = [(len(turn.text), len(written(turn.text).encode())) for each in rows for turn in each.turns]
    low, high = 0, max((length for length, _ in sizes), default=LEAST)
    while low < high:
        middle = (low + high + 1) // 2
        taken = sum(size * min(length, middle) / length for length, size in sizes if length)
        low, high = (middle, high) if taken <= room else (low, middle - 1)
    return low


def _data(found: Rows, rows: Sequence[Browsed], most: int) -> dict[str, Any]:
    """Return the plain values of the page's rows, with texts of so many characters."""
    rounds = sorted({number for each in rows for number in each.selected})
    near = found.nearest
    used = {t for each in rows for one in near.by_row.get(each.facts["row"], ()) for t, _ in one}
    return {
        "lists": LISTS,
        "tables": [
            {"name": table_name(t), "round": t.round, "method": t.name, "columns": own_columns(t)}
            for t in found.tables
        ],
        "rounds": {str(number): round_name(number) for number in rounds},
        "near": near.titles,
        "targets": {str(t): line for t, line in near.targets.items() if t in used},
        "categories": list(found.categories),
        "rows": [_row(each, found, most) for each in rows],
    }


def _row(each: Browsed, found: Rows, most: int) -> dict[str, Any]:
    facts = each.facts
    own = {name: value for name, value in facts.items() if name.startswith(ORIGINAL) and value is not None}
    said = "\n".join(turn.text for turn in each.turns)
    line = {
        "row": facts["row"],
        "id": facts["row_id"],
        "source": facts["source"],
        "tokens": facts["n_tokens"],
        "response": facts["n_response_tokens"],
        "in": [place for place, name in enumerate(LISTS) if name in each.lists],
        "scores": [None if one is None else [plain_number(value) for value in one] for one in each.scores],
        "selected": {str(n): [plain_number(v) for v in one] for n, one in each.selected.items()},
        "own": {n: v for n, v in own.items() if n in found.categories or not v or facts[n] not in said},
        "turns": [_turn(turn.cut(most)) for turn in each.turns],
        "near": found.nearest.by_row.get(facts["row"], []),
    }
    places = ("file", "line", "note")
    line |= {name: facts[name] for name in places if facts.get(name) is not None}
    return line if facts["valid"] else {**line, "reason": facts["reason"] or ""}


def _turn(turn: Any) -> list[Any]:
    """Return role, text in three pieces (before, in and behind the labelled part), and characters cut off."""
    pieces = (turn.text[: turn.begin], turn.text[turn.begin : turn.end], turn.text[turn.end :])
    return [turn.role, *pieces, turn.length - len(turn.text)]
