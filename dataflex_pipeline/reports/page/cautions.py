"""Warnings of a run, grouped: rows that cannot be used, notes of the tables, versions, what is missing.

A reason that differs from another only in its numbers and quoted words is of the same kind: one line stands
for both. A row that cannot be used in the pool cannot be used in any table made from it, and is counted once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataflex_pipeline.data.rows import ROWS_NAMED, rows_said
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.store.versions import changes_between_rounds

VIEWS_NAMED = 3
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")


@dataclass(frozen=True)
class Group:
    """Warnings of one kind. title: what they are about. lines: in words, one each."""

    title: str
    lines: tuple[str, ...]

    @property
    def n(self) -> int:
        """Number of lines."""
        return len(self.lines)


def cautions(record: RunRecord, looks: Mapping[str, Any], splits: Mapping[str, str]) -> list[Group]:
    """Return what the tables noted and what was left out.

    Args:
        record: of the run.
        looks: view -> what is to be said about the table.
        splits: view -> whose rows it has lines for.
    """
    rounds = {number: marker.versions for number, marker in record.markers.items()}
    unusable = not_usable({view: seen.get("reasons", []) for view, seen in looks.items()}, splits)
    groups = [
        Group("Rows that cannot be used", tuple(unusable)),
        Group(
            "Notes of the tables", tuple(_notes({v: s["facts"].get("notices", []) for v, s in looks.items()}))
        ),
        Group("Versions", tuple(changes_between_rounds(record.record.get("versions", {}), rounds))),
    ]
    if record.settings["update_step"] and record.last < int(record.settings["update_times"]):
        line = f"the run is at round {record.last} of {record.settings['update_times']}"
        groups.append(Group("Not finished", (line,)))
    return [group for group in groups if group.lines]


def _notes(found: Mapping[str, Sequence[str]]) -> Iterable[str]:
    """Yield each note once, with the tables that have it."""
    views: dict[str, list[str]] = {}
    for view, notices in found.items():
        for text in notices:
            views.setdefault(text, []).append(view)
    for text, named in views.items():
        yield f"{_listed(named)}: {text}"


@dataclass
class _Kind:
    """Reasons of one kind: the first of them, how many, and their rows by view."""

    reason: str
    reasons: set[str]
    rows: dict[str, int]
    first: set[int]


def not_usable(found: Mapping[str, Sequence[Mapping[str, Any]]], splits: Mapping[str, str]) -> list[str]:
    """Return a line for every kind of reason that rows are not usable for, with their number and the first.

    Args:
        found: view -> its reasons: reason, rows, first.
        splits: view -> whose rows it has lines for.
    """
    kinds: dict[tuple[str, str], _Kind] = {}
    for view, reasons in found.items():
        for each in reasons:
            key = (splits[view], _PARTICULAR.sub("*", each["reason"]))
            kind = kinds.setdefault(key, _Kind(each["reason"], set(), {}, set()))
            kind.reasons.add(each["reason"])
            kind.rows[view] = kind.rows.get(view, 0) + each["rows"]
            kind.first.update(each["first"])
    return [_line(split, kind) for (split, _), kind in kinds.items()]


def _line(split: str, kind: _Kind) -> str:
    rows = max(kind.rows.values())
    named = rows_said(sorted(kind.first)[: min(rows, ROWS_NAMED)], rows)
    more = len(kind.reasons) - 1
    like = f"; {more} more such reason{'s' * (more != 1)}" if more else ""
    where = split if split in kind.rows else _listed(list(kind.rows))
    return f"{where}: {rows:,} row{'s' * (rows != 1)} not usable: {kind.reason} ({named}{like})"


def _listed(named: Sequence[str]) -> str:
    more = f" and {len(named) - VIEWS_NAMED} more tables" if len(named) > VIEWS_NAMED else ""
    return ", ".join(named[:VIEWS_NAMED]) + more
