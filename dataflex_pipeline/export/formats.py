"""The formats of selected rows: which of them can be read from one file, and how that file is read.

Rows of several formats (or of one with other column names) cannot be read from one file, whether they came
from one file or from several.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dataflex_pipeline.data.conversation import RowError
from dataflex_pipeline.data.formats.formats import to_conversation
from dataflex_pipeline.data.formats.layout import COLUMN_ROLES, Layout, detect_layout
from dataflex_pipeline.data.formats.row_fields import without_nulls
from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.data.sources.columns import ColumnTypes, is_json
from dataflex_pipeline.data.sources.named import Source
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.schemas import ORIGINAL
from dataflex_pipeline.store.parts import PartedTable

STEM = "selected"
"""Beginning of the files' names, and the whole of it where there is one format."""
Layouts = Mapping[str, tuple[Layout, ...]]
"""Source -> how its rows are read; the first layout whose columns a row fills is that row's."""


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
        tags: keys and role names of conversations. groups: of the rows, see `groups_of`.
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

    def is_told(self, rows: Sequence[Row]) -> bool:
        """Whether a reader that knows nothing of the rows reads them so, by their columns alone."""
        seen = ColumnTypes()
        for row in rows:
            seen.see(row)
        try:
            found = detect_layout(Source("", ""), seen.samples)
        except DataError:
            return False
        own = {role: name for role, name in self.columns.items() if name in seen.kinds}
        return all(
            (each.kind, dict(each.columns), _tags(each)) == (self.kind, own, dict(self.tags))
            for each in {id(each): each for each in map(found.of, rows)}.values()
        )


def several_formats(pool: PartedTable) -> list[str]:
    """Return what the rows of a pool are read as, if that is not one and the same; for a fingerprint."""
    found = {
        json.dumps([each.kind, dict(each.columns), _tags(each)], sort_keys=True)
        for layouts in layouts_of(pool).values()
        for each in layouts
    }
    return sorted(found) if len(found) > 1 else []


def layouts_of(pool: PartedTable) -> Layouts:
    """Return how the rows of each source are read."""
    return {each["name"]: Layout.from_plain(each).all for each in pool.ingredients["sources"]}


def _tags(layout: Layout) -> dict[str, str]:
    return {} if layout.kind == "alpaca" else dict(layout.tags)


def values_of(rows: pa.Table, name: str) -> list[Any]:
    """Return an original column as the values that the source had."""
    values: list[Any] = rows.column(name).to_pylist()
    if not is_json(rows.schema.field(name)):
        return values
    return [None if text is None else json.loads(text) for text in values]


def raw_rows(rows: pa.Table) -> list[Row]:
    """Return the rows as they were in their sources; what a row does not have is null."""
    names = [name for name in rows.column_names if name.startswith(ORIGINAL)]
    columns = {name.removeprefix(ORIGINAL): values_of(rows, name) for name in names}
    return [{name: values[number] for name, values in columns.items()} for number in range(rows.num_rows)]


def layout_of(row: Row, layouts: Sequence[Layout]) -> Layout:
    """Return the layout that reads a row."""
    return next((each for each in layouts if each.is_filled(row)), layouts[0])


def without_padding(rows: pa.Table, layouts: Layouts) -> pa.Table:
    """Return rows without the null members that columnar sources had in nested values.

    Parquet and Arrow fill every object with the keys of all the others. Read there such a null is no value;
    written as JSON it would be one.

    Args:
        rows: of the pool: ``source``, ``row_id`` and the original columns. layouts: of the sources.
    """
    nested = [name for name in rows.column_names if is_json(rows.schema.field(name))]
    texts = {name: rows.column(name).to_pylist() for name in nested}
    sources = rows.column("source").to_pylist()
    holding = [
        number
        for number in range(rows.num_rows)
        if any(texts[name][number] and "null" in texts[name][number] for name in nested)
    ]
    padded = _padded(rows, layouts, sources, holding)
    for name in nested if padded else ():
        made = [
            json.dumps(without_nulls(json.loads(text)), ensure_ascii="\\ud" in text)
            if text is not None and source in padded and "null" in text
            else text
            for text, source in zip(texts[name], sources, strict=True)
        ]
        field = rows.schema.field(name)
        rows = rows.set_column(rows.column_names.index(name), field, pa.array(made, field.type))
    return rows


def _padded(rows: pa.Table, layouts: Layouts, sources: Sequence[str], holding: Sequence[int]) -> set[str]:
    """Return the sources whose null members are padding: there the row_id is that of the row without them."""
    told: dict[str, bool] = {}
    for number in holding:
        source = sources[number]
        if source in told:
            continue
        one = rows.slice(number, 1)
        [row] = raw_rows(one)
        row_id = one.column("row_id")[0].as_py()
        layout = layout_of(row, layouts[source])
        kept, dropped = (_ids(row, layout, columnar) for columnar in (False, True))
        if kept != dropped and row_id in kept | dropped:
            told[source] = row_id in dropped
    return {source for source, padded in told.items() if padded}


def _ids(row: Row, layout: Layout, columnar: bool) -> set[str]:
    """Return the content hashes that a row may have, with and without keys that few templates read."""
    from dataclasses import replace

    try:
        whole = to_conversation(row, layout, columnar)
    except RowError:
        return set()
    bare = replace(whole, messages=tuple(replace(message, others={}) for message in whole.messages))
    return {whole.row_id, bare.row_id}


def groups_of(layouts: Layouts, rows: pa.Table) -> list[Group]:
    """Return each row's group; of prompt and completion turns are told from texts."""
    sources = rows.column("source").to_pylist()
    asked = {
        name
        for source in dict.fromkeys(sources)
        for each in layouts[source]
        if len(layouts[source]) > 1 or each.kind == "prompt_completion"
        for name in each.columns.values()
    }
    values = {name: values_of(rows, ORIGINAL + name) for name in sorted(asked)}
    return [
        _group(source, layouts[source], {name: column[number] for name, column in values.items()})
        for number, source in enumerate(sources)
    ]


def _group(source: str, layouts: Sequence[Layout], row: Row) -> Group:
    number = layouts.index(layout_of(row, layouts)) if len(layouts) > 1 else 0
    if layouts[number].kind != "prompt_completion":
        return Group(source, number)
    names = layouts[number].columns.values()
    return Group(source, number, tuple(name for name in names if isinstance(row[name], list)))


def formats_of(layouts: Layouts, rows: pa.Table, groups: Sequence[Group]) -> list[Format]:
    """Return the formats of the rows, in the order of their sources."""

    def order(group: Group) -> tuple[int, tuple[str, ...]]:
        return group.layout, group.lists

    found: list[tuple[Format, set[str]]] = []
    for source, several in layouts.items():
        for group in sorted({each for each in groups if each.source == source}, key=order):
            layout = several[group.layout]
            filled = filled_columns(rows.filter(pa.array([each == group for each in groups])))
            for known, own in found:
                if known.takes(group, layout, filled, own):
                    known.columns |= layout.columns
                    known.groups.append(group)
                    own |= filled
                    break
            else:
                found.append((Format(layout.kind, dict(layout.columns), _tags(layout), [group]), filled))
    return [known for known, _ in found]


def filled_columns(rows: pa.Table) -> set[str]:
    """Return the original columns that have values."""
    return {
        name.removeprefix(ORIGINAL)
        for name in rows.column_names
        if name.startswith(ORIGINAL) and rows.column(name).null_count < rows.num_rows
    }


def stems(labels: Sequence[str], stem: str = STEM) -> list[str]:
    """Return the files' names: the format is part of them where there are several, then numbered."""
    if len(labels) == 1:
        return [stem]
    seen: Counter[str] = Counter()
    made = []
    for label in labels:
        seen[label] += 1
        made.append(f"{stem}-{label}" + (f"-{seen[label]}" if seen[label] > 1 else ""))
    return made
