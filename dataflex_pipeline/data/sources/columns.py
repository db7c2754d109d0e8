"""The original columns of a data set, typed: text, whole numbers, numbers, booleans, else JSON text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa

from dataflex_pipeline.data.conversation import json_text_of
from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.data.sources.json_bounds import parsed
from dataflex_pipeline.schemas import ORIGINAL, column

_TYPES: dict[str, pa.DataType] = {
    "text": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "json": pa.string(),
}
_EXACT = 2**53
_BEYOND = b"beyond_json"
BEYOND_JSON: Mapping[type, str] = {
    datetime: "dates and times",
    date: "dates",
    time: "times of day",
    timedelta: "durations",
    Decimal: "decimal numbers",
    bytes: "bytes (as hexadecimal digits)",
}
"""What Parquet and Arrow hold and JSON does not: it becomes text."""
JSON_FIELD = {b"encoding": b"json"}
"""Metadata of a field that holds JSON text."""
NULLS_ABSENT = {b"dataflex_nulls": b"absent"}
"""Metadata of a Parquet file in which null stands for what is not there, and JSON fields for their values."""


@dataclass(frozen=True)
class OriginalColumn:
    """A column of the sources.

    Attributes:
        name: as it is called there. kind: what all its values share.
        beyond: what it holds that JSON has not, and that is text here: see `BEYOND_JSON`.
    """

    name: str
    kind: str
    beyond: tuple[str, ...] = ()

    @property
    def field(self) -> pa.Field:
        """The column's field in the prepared table; the metadata says when it is JSON text."""
        how = " as JSON text" if self.kind == "json" else ""
        plain = column(ORIGINAL + self.name, _TYPES[self.kind], f"column '{self.name}' of the data set{how}")
        beyond = {_BEYOND: ", ".join(self.beyond).encode()} if self.beyond else {}
        return plain.with_metadata({**plain.metadata, b"encoding": self.kind.encode(), **beyond})

    def array(self, values: Iterable[Any]) -> pa.Array:
        """Return the values as an Arrow array; None and missing are null."""
        made = [value if value is None else self._value(value) for value in values]
        return pa.array(made, type=_TYPES[self.kind])

    def _value(self, value: Any) -> Any:
        if self.kind == "json":
            return _json_text(value)
        return float(value) if self.kind == "number" else value


def is_json(field: pa.Field) -> bool:
    """Whether a field says that it holds JSON text."""
    return (field.metadata or {}).get(b"encoding") == b"json"


def beyond_json(field: pa.Field) -> str:
    """Return what a column of the sources holds that JSON has not; empty for most columns."""
    return str((field.metadata or {}).get(_BEYOND, b"").decode())


def absent_nulls(schema: pa.Schema) -> bool:
    """Whether null stands for what is not there in a file, at any depth: as `dataflex export` writes it."""
    return (schema.metadata or {}).get(b"dataflex_nulls") == b"absent"


def exact_row(row: Mapping[str, Any], json_fields: frozenset[str]) -> Row:
    """Return the row that such a file's row stands for: no nulls, and JSON text as its value.

    Raises:
        ValueError: a field that says that it holds JSON text does not.
    """
    return {
        name: parsed(value) if name in json_fields else _without_nulls(value)
        for name, value in row.items()
        if value is not None
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json_text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=json_text_of)
    return text if is_unicode(text) else json.dumps(value, default=json_text_of)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind_of(value: Any) -> str:
    if isinstance(value, str):
        return "text" if value.isascii() or is_unicode(value) else "json"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        if abs(value) <= _EXACT:
            return "integer"
        return "long" if -(2**63) <= value < 2**63 else "json"
    return "number" if isinstance(value, float) else _beyond(value) or "json"


def _beyond(value: Any) -> str | None:
    """Return what a value is that JSON has not; pandas' times are datetimes, too."""
    if isinstance(value, list | dict):
        return None
    return next((what for kind, what in BEYOND_JSON.items() if isinstance(value, kind)), None)


def _kinds_within(value: Any) -> set[str]:
    """Return what is in a list or an object, at any depth, that JSON has not."""
    if isinstance(value, list | dict):
        items = value.values() if isinstance(value, dict) else value
        return {kind for item in items for kind in _kinds_within(item)}
    what = _beyond(value)
    return {what} if what is not None else set()


def is_filled(value: Any) -> bool:
    """Whether a value says something: not null, and no empty text, list or object."""
    return value is not None and (bool(value) or not isinstance(value, str | list | dict))


def turns_of(value: Any) -> list[Mapping[str, Any]] | None:
    """Return the objects of a list, or of one in JSON text (how CSV holds lists); None for anything else."""
    if isinstance(value, str):
        value = json_or_self(value) if value.lstrip().startswith("[") else None
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else None


def json_or_self(value: Any) -> Any:
    """Parse JSON text (how CSV holds lists); anything else is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parsed(value) if value.strip() else None
    except ValueError:
        return value


def _is_telling(value: Any) -> bool:
    """Whether a value shows what its column holds: of a list only a turn shows which keys turns have."""
    turns = turns_of(value)
    return is_filled(value) if turns is None else any(map(speaks, turns))


def speaks(turn: Mapping[str, Any]) -> bool:
    """Whether an object says who speaks, in one of the two usual ways."""
    return turn.get("role") is not None or turn.get("from") is not None


@dataclass
class ColumnTypes:
    """Sees every row of the first pass, and then knows each column's kind and a sample of it.

    Attributes:
        kinds: column -> kinds of its values. samples: column -> its first value that shows what it holds;
            without one the first that is not null, or None.
        filled: column -> rows that fill it. odd: columns that hold NaN or an infinite number.
    """

    kinds: dict[str, set[str]] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    filled: Counter[str] = field(default_factory=Counter)
    odd: dict[str, None] = field(default_factory=dict)
    _telling: set[str] = field(default_factory=set)

    def see(self, row: Row) -> None:
        """Take note of one row."""
        for name, value in row.items():
            kinds = self.kinds.setdefault(name, set())
            if value is None:
                self.samples.setdefault(name, None)
                continue
            if name not in self._telling:
                self._sample(name, value)
                kinds |= _kinds_within(value)
            kinds.add(_kind_of(value))
            if value or is_filled(value):
                self.filled[name] += 1
            if value.__class__ is float and not math.isfinite(value):
                self.odd[name] = None

    def _sample(self, name: str, value: Any) -> None:
        telling = _is_telling(value)
        if telling:
            self._telling.add(name)
        if telling or self.samples.get(name) is None:
            self.samples[name] = value

    def merge(self, other: ColumnTypes) -> None:
        """Take note of all that another one has seen."""
        for name, kinds in other.kinds.items():
            self.kinds.setdefault(name, set()).update(kinds)

    def columns(self) -> tuple[OriginalColumn, ...]:
        """Return the columns in the order of their first appearance."""
        known = BEYOND_JSON.values()
        return tuple(
            OriginalColumn(name, _common(kinds), tuple(each for each in known if each in kinds))
            for name, kinds in self.kinds.items()
        )


def _common(kinds: set[str]) -> str:
    """Return the kind that holds all values exactly."""
    if not kinds or kinds == {"text"}:
        return "text"
    if kinds == {"boolean"}:
        return "boolean"
    if kinds <= {"integer", "long"}:
        return "integer"
    return "number" if kinds <= {"integer", "number"} else "json"


def original_arrays(columns: Sequence[OriginalColumn], rows: Sequence[Mapping[str, Any]]) -> list[pa.Array]:
    """Return one array per column over the rows."""
    return [each.array([row.get(each.name) for row in rows]) for each in columns]
