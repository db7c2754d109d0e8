"""The selected rows as a data set of their own: in the format that they came in, or in that of a trainer.

One line per line of the selection, best first: the columns of the source as they were, and beside them

- ``_row``, ``_row_id``: which row of the pool; ``_source``, ``_file``, ``_line``: where it came from;
- ``_score``: null for the warm-up, which draws uniformly; ``_rank``: from 1, best first;
- ``_weight``: its loss weight; ``_round``: that it was selected for, 0 for the warm-up.

A file holds rows that are read alike (see `formats`); ``dataset_info.json`` beside the files says how each is
read. Every line of a JSONL file has the same columns. The Parquet file holds the rows of the JSONL file: null
stands for what is not there, and a column that Arrow cannot hold exactly is JSON text, marked so that it is
read as what it stands for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.data.sources.columns import JSON_FIELD, NULLS_ABSENT, beyond_json, is_json
from dataflex_pipeline.data.sources.folders import INFO_FILE
from dataflex_pipeline.export.conversations import Trainer
from dataflex_pipeline.export.formats import (
    STEM,
    Format,
    Group,
    Layouts,
    filled_columns,
    formats_of,
    groups_of,
    layouts_of,
    stems,
    without_padding,
)
from dataflex_pipeline.export.trainers import Rows, for_trainer
from dataflex_pipeline.schemas import ORIGINAL
from dataflex_pipeline.store.parts import PartedTable

ADDED = ("row", "row_id", "source", "file", "line", "score", "rank", "weight", "round")
"""What is added to each line; in the files each name begins with an underscore."""
CHUNK = 4096
"""Rows that are turned into text at once."""
FIRST_BLOCK = 10 << 20
"""Bytes of a JSONL file from which `datasets` tells its columns."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        rows: lines. different_rows: of the pool. files: name of each JSONL file -> its lines.
        entries: stem of each file -> its entry of dataset_info.json, where its columns do not say it all.
        untold: files that are only read right by their entry.
        as_text: columns that became text -> what they held.
    """

    rows: int
    different_rows: int
    files: Mapping[str, int]
    entries: Mapping[str, Any]
    untold: tuple[str, ...] = ()
    as_text: Mapping[str, str] | None = None

    def notes(self) -> dict[str, Any]:
        """Return it for a manifest."""
        made = {"rows": self.rows, "different_rows": self.different_rows, "files": dict(self.files)}
        made["entries"] = dict(self.entries)
        return made | ({"as_text": dict(self.as_text)} if self.as_text else {})


def write_subset(
    pool: PartedTable,
    selected: pa.Table,
    folder: Path,
    say: Say,
    trainer: Trainer = "original",
    stem: str = STEM,
    *,
    parquet: bool = True,
) -> Written:
    """Write ``selected.jsonl`` and ``selected.parquet``, or such a pair for each format.

    Args:
        pool: the prepared pool. selected: lines, in the schema `selected.LINES`.
        folder: where to; it exists.
        say: is told about several formats, and what had to be named, typed or written otherwise.
        trainer: the form that the rows are written in.
        stem: of the files' names. parquet: whether to write Parquet files, too.

    Raises:
        DataError: rows hold what the trainer has no form for.
    """
    layouts = layouts_of(pool)
    originals = [name for name in pool.schema.names if name.startswith(ORIGINAL)]
    places = [name for name in ("file", "line") if name in pool.schema.names]
    rows = pool.take(selected.column("row").to_numpy(), ["source", "row_id", *places, *originals])
    rows = without_padding(rows, layouts)
    groups = groups_of(layouts, rows)
    added = _added(rows, selected)
    parts = [_part(rows, added, layouts, each, groups) for each in formats_of(layouts, rows, groups)]
    kept = {name.removeprefix(ORIGINAL) for name in originals}
    if len(parts) == 1:
        parts = [parts[0].with_columns(rows, kept)]
    whole = Rows(rows, added, None, layouts, trainer)
    parts = for_trainer(trainer, whole, parts, say)
    files: dict[str, int] = {}
    entries: dict[str, Any] = {}
    untold: list[str] = []
    as_text: dict[str, str] = {}
    ours = _names(parts, say)
    for part, name in zip(parts, stems([each.label for each in parts], stem), strict=True):
        as_text |= _files(part, ours, folder / name, say, parquet)
        files[f"{name}.jsonl"] = part.rows.num_rows
        entry = part.entry(f"{name}.jsonl")
        entries |= {} if entry is None else {name: entry}
        untold += [] if part.told else [name]
    if len(parts) > 1:
        listed = ", ".join(f"{name} ({count} rows)" for name, count in files.items())
        say(f"the selected rows are in {len(parts)} formats, so each has its file: {listed}")
    for name, what in sorted(as_text.items()):
        say(f"column {name} holds {what} in its source: exported as text")
    distinct = len(selected.column("row").unique())
    return Written(selected.num_rows, distinct, files, entries, tuple(untold), dict(sorted(as_text.items())))


def write_info(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write ``dataset_info.json`` beside exported files."""
    (folder / INFO_FILE).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _added(rows: pa.Table, selected: pa.Table) -> pa.Table:
    """Return what is added to each row."""
    none = {"file": pa.nulls(rows.num_rows, pa.string()), "line": pa.nulls(rows.num_rows, pa.int64())}
    of_pool = {
        name: rows.column(name) if name in rows.column_names else none[name]
        for name in ("source", "file", "line")
    }
    return pa.table({name: of_pool[name] if name in of_pool else selected.column(name) for name in ADDED})


def _part(rows: pa.Table, added: pa.Table, layouts: Layouts, form: Format, groups: Sequence[Group]) -> Rows:
    """Return the rows of one format, with the columns that have values there."""
    inside = pa.array([group in form.groups for group in groups])
    here = rows.filter(inside)
    part = Rows(here, added.filter(inside), form, layouts, form.label)
    return part.with_columns(here, filled_columns(here))


def _names(parts: Sequence[Rows], say: Say) -> dict[str, str]:
    """Return how the added columns are called, so that none has the name of one of the data."""
    own = {name.removeprefix(ORIGINAL) for part in parts for name in part.rows.column_names}
    names = {}
    for name in ADDED:
        new = f"_{name}"
        while new in own:
            new = f"selected{new}"
        names[name] = new
    renamed = [f"_{name} -> {new}" for name, new in names.items() if new != f"_{name}"]
    if renamed:
        say(f"the data has columns of the same names, so ours are called otherwise: {', '.join(renamed)}")
    return names


def _files(part: Rows, added: Mapping[str, str], stem: Path, say: Say, parquet: bool) -> dict[str, str]:
    """Write one pair of files; return the columns that became text, and what they held."""
    names = {
        name: name.removeprefix(ORIGINAL) for name in part.rows.column_names if name.startswith(ORIGINAL)
    }
    rows = part.rows.select(list(names))
    _write_lines(part, rows, names, added, stem, say)
    if parquet:
        _write_parquet(part, rows, names, added, stem, say)
    found = {plain: beyond_json(rows.schema.field(name)) for name, plain in names.items()}
    return {plain: what for plain, what in found.items() if what}


def _write_lines(
    part: Rows, rows: pa.Table, names: Mapping[str, str], added: Mapping[str, str], stem: Path, say: Say
) -> None:
    json_columns = {name for name in names if is_json(rows.schema.field(name))}
    first: dict[str, int] = {}
    odd: set[str] = set()
    size = 0
    with stem.with_name(f"{stem.name}.jsonl").open("wb") as stream:
        for line in _lines(rows, names, json_columns, part.added, added):
            odd |= _without_odd_numbers(line)
            for column, value in line.items():
                if value is not None:
                    first.setdefault(column, size)
            text = _encoded(line) + b"\n"
            stream.write(text)
            size += len(text)
    if odd:
        say(f"{', '.join(sorted(odd))}: NaN and Infinity are null in the lines, as JSON has no such numbers")
    late = [column for column, place in first.items() if place > FIRST_BLOCK]
    if late:
        say(
            f"{', '.join(late)} of {stem.name}.jsonl is empty in its first {FIRST_BLOCK >> 20} MB, by which "
            "datasets.load_dataset('json') tells types: load the Parquet file, or give it features"
        )


def _without_odd_numbers(line: dict[str, Any]) -> set[str]:
    """Make numbers null that JSON does not have; return their columns."""
    odd = {name for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
    for name in odd:
        line[name] = None
    return odd


def _write_parquet(
    part: Rows, rows: pa.Table, names: Mapping[str, str], added: Mapping[str, str], stem: Path, say: Say
) -> None:
    columns: dict[str, tuple[pa.ChunkedArray, bool]] = {}
    for name, plain in names.items():
        values = rows.column(name)
        nested = is_json(rows.schema.field(name))
        typed = _typed(values, part.role_tag) if nested else values
        marked = typed is None
        if typed is None:
            say(f"column {plain} holds values of several kinds: in {stem.name}.parquet it is JSON text")
            typed = _plain_texts(values) if plain in part.read else values
            marked = typed.equals(values)
        columns[plain] = (typed, marked)
    columns |= {new: (part.added.column(name), False) for name, new in added.items()}
    fields = [
        pa.field(name, values.type, metadata=JSON_FIELD if marked else None)
        for name, (values, marked) in columns.items()
    ]
    table = pa.table([values for values, _ in columns.values()], pa.schema(fields, NULLS_ABSENT))
    pq.write_table(table, stem.with_name(f"{stem.name}.parquet"), compression="zstd")


def _encoded(line: Mapping[str, Any]) -> bytes:
    """Return JSON text; with escapes where a text is no Unicode (half of a surrogate pair)."""
    try:
        return json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(line).encode()


def _lines(
    rows: pa.Table,
    names: Mapping[str, str],
    json_columns: set[str],
    selected: pa.Table,
    added: Mapping[str, str],
) -> Iterator[dict[str, Any]]:
    """Yield the lines of the JSONL file, each with all of its columns."""
    for start in range(0, rows.num_rows, CHUNK):
        own = selected.slice(start, CHUNK).to_pylist()
        for line, ours in zip(rows.slice(start, CHUNK).to_pylist(), own, strict=True):
            originals = {
                names[name]: json.loads(value) if name in json_columns and value is not None else value
                for name, value in line.items()
            }
            yield originals | {new: ours[name] for name, new in added.items()}


def _typed(values: pa.ChunkedArray, role_tag: str | None) -> pa.ChunkedArray | None:
    """Return JSON text as the lists and structs that it stands for, or None where those would not be it.

    Columnar structs have the keys of all rows, the missing ones null, and readers drop these: a null that
    means something (but in a turn, where it means that nothing is there) is lost with them, and whole
    numbers among others become fractions.
    """
    parsed = [None if text is None else json.loads(text) for text in values.to_pylist()]
    try:
        array = pa.array(parsed)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return None
    if pa.types.is_null(array.type):
        return values
    if _is_unwritable(array.type):
        return None
    for before, after in zip(parsed, array.to_pylist(), strict=True):
        if _text(_without_turn_nulls(before, role_tag)) != _text(_without_nulls(after)):
            return None
    return pa.chunked_array([array])


def _plain_texts(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return JSON text in which what is a text is that text, as readers of such columns expect it.

    Turns, tools and history are read from JSON text as well as from lists.
    """
    parsed = [None if text is None else json.loads(text) for text in values.to_pylist()]
    texts = [
        new if isinstance(new, str) else old for old, new in zip(values.to_pylist(), parsed, strict=True)
    ]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _is_unwritable(kind: pa.DataType) -> bool:
    """Whether Parquet has no such type: a struct without members, wherever it is."""
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_is_unwritable(field.type) for field in kind.fields)
    return pa.types.is_list(kind) and _is_unwritable(kind.value_type)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _without_turn_nulls(value: Any, role_tag: str | None) -> Any:
    if not isinstance(value, list):
        return value
    return [
        {key: item for key, item in turn.items() if item is not None}
        if isinstance(turn, dict) and role_tag in turn
        else turn
        for turn in value
    ]
