"""The selected rows as a data set of their own, in the format that they came in.

One line per row and round, in the order of training: the columns of the source as they were, and beside them

- ``row_id``, ``round``; ``score``: null for the warm-up, which draws uniformly;
- ``weight``: mean loss weight over the row's positions in the round; ``times``: how many it has there.

Rows of several formats (or of one with other column names) cannot be read from one file, so each format has
a file of its own, whether the rows came from one file or from several; ``dataset_info.json`` beside them says
how each is read. The Parquet file holds the rows of the JSONL file: null stands for what is not there, and a
column that Arrow cannot hold exactly is JSON text, marked so that it is read as what it stands for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.data.columns import JSON_FIELD, NULLS_ABSENT, PREFIX, beyond_json, is_json
from dataflex_pipeline.data.folders import INFO_FILE
from dataflex_pipeline.data.layout import COLUMN_ROLES, Layout
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.tables import TableFile

ADDED = ("row_id", "round", "score", "weight", "times")
CHUNK = 4096
"""Rows that are turned into text at once."""
STEM = "selected"
"""Beginning of the files' names, and the whole of it where there is one format."""


def selected_rows(run: RunFolder, rounds: Sequence[int]) -> pa.Table:
    """Return which rows rounds trained on: row, row_id, round, score, weight, times.

    Args:
        run: the run. rounds: with an index each.
    """
    return pa.concat_tables([_of_round(run, number) for number in rounds])


def _of_round(run: RunFolder, number: int) -> pa.Table:
    index = TableFile(run.round(number).index)
    table = pa.Table.from_batches(list(index.blocks(["position", "row", "row_id", "weight", "score"])))
    measures = [
        ("position", "min"),
        ("row_id", "min"),
        ("score", "min"),
        ("weight", "mean"),
        ("row", "count"),
    ]
    grouped = table.group_by("row").aggregate(measures).sort_by("position_min")
    return pa.table(
        {
            "row": grouped.column("row"),
            "row_id": grouped.column("row_id_min"),
            "round": pa.array([number] * grouped.num_rows, pa.int32()),
            "score": grouped.column("score_min").cast(pa.float64()),
            "weight": grouped.column("weight_mean"),
            "times": grouped.column("row_count"),
        }
    )


@dataclass(frozen=True)
class Group:
    """Rows of one source that are read alike.

    Attributes:
        source: its name. layout: number of the layout that reads the rows, among all of the source.
        lists: columns that hold a list where others hold a text.
    """

    source: str
    layout: int = 0
    lists: tuple[str, ...] = ()


@dataclass
class Format:
    """How rows of one or more sources are read.

    Attributes:
        kind: alpaca, conversation or prompt_completion. columns: role -> column.
        tags: keys and role names of conversations. groups: of the rows, see `_groups`.
    """

    kind: str
    columns: dict[str, str]
    tags: Mapping[str, str]
    groups: list[Group]

    @property
    def label(self) -> str:
        """Its name as users know it."""
        if self.kind != "conversation":
            return self.kind
        return "messages" if self.tags.get("role_tag") == "role" else "sharegpt"

    def takes(self, group: Group, layout: Layout, filled: set[str], own: set[str]) -> bool:
        """Whether a group can be read so too: same roles, and what only one of them names is empty there.

        Args:
            group: the group. layout: that reads it.
            filled: columns that have values in its rows. own: those of this format.
        """
        if (self.kind, dict(self.tags)) != (layout.kind, _tags(layout)):
            return False
        if self.groups[0].lists != group.lists:
            return False
        other = layout.columns
        return all(
            self.columns[role] == other[role]
            if role in self.columns and role in other
            else (self.columns.get(role) not in filled and other.get(role) not in own)
            for role in self.columns.keys() | other.keys()
        )

    def entry(self, file: str) -> dict[str, Any] | None:
        """Return its entry of dataset_info.json; None where the columns say it all (prompt, completion)."""
        if self.kind == "prompt_completion":
            return None
        entry: dict[str, Any] = {"file_name": file}
        entry["formatting"] = "alpaca" if self.kind == "alpaca" else "sharegpt"
        entry["columns"] = {role: name for role, name in self.columns.items() if role in COLUMN_ROLES}
        return entry | ({"tags": dict(self.tags)} if self.tags else {})


def several_formats(pool: PartedTable) -> list[str]:
    """Return what the rows of a pool are read as, if that is not one and the same; for a fingerprint."""
    found = {
        json.dumps([each.kind, dict(each.columns), _tags(each)], sort_keys=True)
        for layouts in _layouts(pool).values()
        for each in layouts
    }
    return sorted(found) if len(found) > 1 else []


def _layouts(pool: PartedTable) -> dict[str, tuple[Layout, ...]]:
    """Return source -> how its rows are read; the first layout whose columns a row fills is that row's."""
    return {each["name"]: Layout.from_plain(each).all for each in pool.ingredients["sources"]}


def _tags(layout: Layout) -> dict[str, str]:
    return {} if layout.kind == "alpaca" else dict(layout.tags)


def write_subset(
    pool: PartedTable, selected: pa.Table, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write ``selected.jsonl`` and ``selected.parquet``, or such a pair for each format.

    Args:
        pool: the prepared pool. selected: from `selected_rows`. folder: where to; it exists.
        say: is told about several formats, and columns that had to be named or typed otherwise.

    Returns:
        Rows (lines) and different rows written, the rows of each file, and columns that became text.
    """
    originals = [name for name in pool.schema.names if name.startswith(PREFIX)]
    rows = pool.take(selected.column("row").to_numpy(), ["source", *originals])
    added = {name: f"selected_{name}" if PREFIX + name in originals else name for name in ADDED}
    renamed = [f"{name} -> {new}" for name, new in added.items() if new != name]
    if renamed:
        say(f"the data has columns of the same names, so ours are called otherwise: {', '.join(renamed)}")
    layouts = _layouts(pool)
    groups = _groups(layouts, rows)
    formats = _formats(layouts, rows, groups)
    written: dict[str, int] = {}
    entries: dict[str, Any] = {}
    for each, stem in zip(formats, _stems(formats), strict=True):
        inside = pa.array([group in each.groups for group in groups])
        here, ours = rows.filter(inside), selected.filter(inside)
        kept = _filled(here) if len(formats) > 1 else {name.removeprefix(PREFIX) for name in originals}
        here = here.select([name for name in originals if name.removeprefix(PREFIX) in kept])
        _write_files(here, ours, folder / stem, added, each, say)
        written[f"{stem}.jsonl"] = here.num_rows
        entry = each.entry(f"{stem}.jsonl")
        entries |= {} if entry is None else {stem: entry}
    (folder / INFO_FILE).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    if len(formats) > 1:
        listed = ", ".join(f"{name} ({count} rows)" for name, count in written.items())
        say(f"the selected rows are in {len(formats)} formats, so each has its file: {listed}")
    distinct = len(selected.column("row").unique())
    notes = {"rows": selected.num_rows, "different_rows": distinct, "files": written}
    as_text = {name: beyond_json(rows.schema.field(PREFIX + name)) for name in sorted(_filled(rows))}
    as_text = {name: what for name, what in as_text.items() if what}
    for name, what in as_text.items():
        say(f"column {name} holds {what} in its source: exported as text, in both kinds of file")
    return notes | ({"as_text": as_text} if as_text else {})


def _groups(layouts: Mapping[str, tuple[Layout, ...]], rows: pa.Table) -> list[Group]:
    """Return each row's group; of prompt and completion turns are told from texts."""
    sources = rows.column("source").to_pylist()
    asked = {
        name
        for source in dict.fromkeys(sources)
        for each in layouts[source]
        if len(layouts[source]) > 1 or each.kind == "prompt_completion"
        for name in each.columns.values()
    }
    values = {name: _values(rows, PREFIX + name) for name in sorted(asked)}
    return [
        _group(source, layouts[source], {name: column[number] for name, column in values.items()})
        for number, source in enumerate(sources)
    ]


def _values(rows: pa.Table, name: str) -> list[Any]:
    """Return an original column as the values that the source had."""
    values: list[Any] = rows.column(name).to_pylist()
    if not is_json(rows.schema.field(name)):
        return values
    return [None if text is None else json.loads(text) for text in values]


def _group(source: str, layouts: Sequence[Layout], row: Mapping[str, Any]) -> Group:
    filled = (number for number, each in enumerate(layouts) if each.is_filled(row))
    number = next(filled, 0) if len(layouts) > 1 else 0
    if layouts[number].kind != "prompt_completion":
        return Group(source, number)
    names = layouts[number].columns.values()
    return Group(source, number, tuple(name for name in names if isinstance(row[name], list)))


def _formats(
    layouts: Mapping[str, tuple[Layout, ...]], rows: pa.Table, groups: Sequence[Group]
) -> list[Format]:
    """Return the formats of the rows, in the order of their sources."""

    def order(group: Group) -> tuple[int, tuple[str, ...]]:
        return group.layout, group.lists

    found: list[tuple[Format, set[str]]] = []
    for source, several in layouts.items():
        for group in sorted({each for each in groups if each.source == source}, key=order):
            layout = several[group.layout]
            filled = _filled(rows.filter(pa.array([each == group for each in groups])))
            for known, own in found:
                if known.takes(group, layout, filled, own):
                    known.columns |= layout.columns
                    known.groups.append(group)
                    own |= filled
                    break
            else:
                found.append((Format(layout.kind, dict(layout.columns), _tags(layout), [group]), filled))
    return [known for known, _ in found]


def _filled(rows: pa.Table) -> set[str]:
    """Return the original columns that have values."""
    return {
        name.removeprefix(PREFIX)
        for name in rows.column_names
        if name.startswith(PREFIX) and rows.column(name).null_count < rows.num_rows
    }


def _stems(formats: Sequence[Format]) -> list[str]:
    """Return the files' names: the format is part of them where there are several, then numbered."""
    if len(formats) == 1:
        return [STEM]
    seen: Counter[str] = Counter()
    stems = []
    for each in formats:
        seen[each.label] += 1
        stems.append(f"{STEM}-{each.label}" + (f"-{seen[each.label]}" if seen[each.label] > 1 else ""))
    return stems


def _write_files(
    rows: pa.Table,
    selected: pa.Table,
    stem: Path,
    added: Mapping[str, str],
    form: Format,
    say: Callable[[str], None],
) -> None:
    """Write one pair of files.

    Args:
        rows: the original columns. selected: what is added to each row.
        stem: the files without their endings. added: how the added columns are called.
        form: of the rows. say: is told about columns that stay JSON text.
    """
    names = {name: name.removeprefix(PREFIX) for name in rows.column_names}
    json_columns = {name for name in names if is_json(rows.schema.field(name))}
    with stem.with_suffix(".jsonl").open("wb") as stream:
        for line in _lines(rows, names, json_columns, selected, added):
            stream.write(_encoded(line) + b"\n")
    columns: dict[str, tuple[pa.ChunkedArray, bool]] = {}
    for name, plain in names.items():
        values = rows.column(name)
        typed = _typed(values, form.tags.get("role_tag")) if name in json_columns else values
        marked = typed is None
        if typed is None:
            say(f"column {plain} holds values of several kinds: in {stem.name}.parquet it is JSON text")
            typed = _plain_texts(values) if plain in form.columns.values() else values
            marked = typed.equals(values)
        columns[plain] = (typed, marked)
    columns |= {new: (selected.column(name), False) for name, new in added.items()}
    fields = [
        pa.field(name, values.type, metadata=JSON_FIELD if marked else None)
        for name, (values, marked) in columns.items()
    ]
    table = pa.table([values for values, _ in columns.values()], pa.schema(fields, NULLS_ABSENT))
    pq.write_table(table, stem.with_suffix(".parquet"), compression="zstd")


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
    """Yield the lines of the JSONL file; a source's missing columns are left out, as they were there."""
    for start in range(0, rows.num_rows, CHUNK):
        own = selected.slice(start, CHUNK).to_pylist()
        for line, ours in zip(rows.slice(start, CHUNK).to_pylist(), own, strict=True):
            originals = {
                names[name]: json.loads(value) if name in json_columns else value
                for name, value in line.items()
                if value is not None
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
