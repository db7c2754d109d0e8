"""Rows of one file, and their change into the form that a trainer reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from dataflex_pipeline.data.conversation import Conversation
from dataflex_pipeline.data.formats.formats import to_conversation
from dataflex_pipeline.data.formats.layout import COLUMN_ROLES, SHAREGPT_TAGS, Layout
from dataflex_pipeline.data.formats.row_fields import VARIABLES
from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.data.sources.columns import OriginalColumn
from dataflex_pipeline.export.conversations import (
    Told,
    Trainer,
    finish,
    fits_llama_factory,
    in_messages,
    in_sharegpt,
    in_swift,
)
from dataflex_pipeline.export.formats import Format, Layouts, layout_of, raw_rows, values_of
from dataflex_pipeline.schemas import ORIGINAL

_SAME = 1e-6
"""Weights nearer to 1 than this are 1: they are stored as float32."""
Say = Callable[[str], None]
_TEXTS = ("tools", "system")
_Writer = Callable[[Conversation, str, float, Told], dict[str, Any]]


@dataclass(frozen=True)
class Rows:
    """The rows of one file.

    Attributes:
        rows: of the pool, with their original columns. added: what is added to each.
        form: how they are read; None in a form that our own reader has no entry for.
        layouts: of their sources. label: of the format, part of the file's name where there are several.
        own_entry: entry of dataset_info.json in place of the form's.
    """

    rows: pa.Table
    added: pa.Table
    form: Format | None
    layouts: Layouts
    label: str
    own_entry: Mapping[str, Any] | None = None

    def with_columns(self, rows: pa.Table, names: set[str]) -> Rows:
        """Return it with some of the original columns of ``rows``, by their names in the source."""
        kept = [
            name
            for name in rows.column_names
            if not name.startswith(ORIGINAL) or name.removeprefix(ORIGINAL) in names
        ]
        return replace(self, rows=rows.select(kept))

    @property
    def read(self) -> set[str]:
        """Columns that are read as the conversation."""
        return set() if self.form is None else set(self.form.columns.values())

    def read_as(self, role: str) -> str | None:
        """Return the column that is read as something; None where none is."""
        return None if self.form is None else self.form.columns.get(role)

    @property
    def role_tag(self) -> str | None:
        """Key of a turn that says who speaks."""
        return None if self.form is None else self.form.tags.get("role_tag")

    @property
    def told(self) -> bool:
        """Whether the columns alone say how the rows are read."""
        return self.form is None or self.form.is_told(raw_rows(self.rows))

    def entry(self, file: str) -> dict[str, Any] | None:
        """Return the entry of dataset_info.json; None where there is none."""
        made = None if self.form is None else self.form.entry(file)
        if self.own_entry is not None:
            made = {"file_name": file, **self.own_entry}
        if made is not None:  # others' readers ask for every column that is named
            columns = {
                r: name for r, name in made["columns"].items() if ORIGINAL + name in self.rows.column_names
            }
            made["columns"] = columns
        return made

    def conversations(self) -> Iterator[tuple[Row, Layout, Conversation]]:
        """Yield each row as it was, how it is read, and the conversation that it is."""
        sources = self.rows.column("source").to_pylist()
        for row, source in zip(raw_rows(self.rows), sources, strict=True):
            layout = layout_of(row, self.layouts[source])
            yield row, layout, to_conversation(row, layout)


def for_trainer(trainer: Trainer, whole: Rows, parts: Sequence[Rows], say: Say) -> list[Rows]:
    """Return the files of rows in the form of a trainer.

    Args:
        trainer: the form. whole: all rows, best first. parts: the same rows by their formats.
        say: is told what the trainer does not know, or reads otherwise.

    Raises:
        DataError: rows hold what it has no form for.
    """
    if trainer == "original":
        return list(parts)
    weighted = any(not _is_one(weight) for weight in whole.added.column("weight").to_pylist())
    if trainer == "llama-factory":
        made = [_for_llama_factory(part, say) for part in parts]
        if weighted:
            say("LLaMA-Factory knows no weights of rows: all count alike there (see _weight)")
        return made
    if trainer == "ms-swift":
        if weighted:
            say(
                "weights are the loss_scale of each answer: train with --loss_scale default "
                "--is_binary_loss_scale false, in a version of ms-swift that has the latter"
            )
        return [_converted(whole, in_swift, trainer, None, say)]
    if weighted:
        say("TRL and axolotl know no weights of rows: all count alike there (see _weight)")
    return [_converted(whole, in_messages, trainer, _messages_form(), say)]


def _is_one(weight: float) -> bool:
    return abs(weight - 1) < _SAME


def _messages_form() -> Format:
    columns = {"messages": "messages", "tools": "tools"}
    return Format("conversation", columns, Layout("conversation", columns).tags, [])


def _for_llama_factory(part: Rows, say: Say) -> Rows:
    """Return rows of one format as they came, where LLaMA-Factory reads them so; else as sharegpt."""
    if not all(
        fits_llama_factory(conversation, row, layout) for row, layout, conversation in part.conversations()
    ):
        say(
            f"rows of the format {part.label} are written as sharegpt: "
            "LLaMA-Factory does not read them as they are"
        )
        columns = {"messages": "conversations", "system": "system", "tools": "tools"}
        sharegpt = Format("conversation", columns, dict(SHAREGPT_TAGS), [])
        return replace(_converted(part, in_sharegpt, "LLaMA-Factory", sharegpt, say), label="sharegpt")
    form = part.form
    if form is not None and form.kind == "prompt_completion":
        columns = {role: name for role, name in form.columns.items() if role in COLUMN_ROLES}
        part = replace(part, own_entry={"formatting": "alpaca", "columns": columns})
    return _with_texts(part, part.read_as("tools"))


def _with_texts(part: Rows, name: str | None) -> Rows:
    """Return rows in which the definitions of tools are JSON text, and an empty one where there are none."""
    if name is None or ORIGINAL + name not in part.rows.column_names:
        return part
    values = values_of(part.rows, ORIGINAL + name)
    texts = [
        value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
        for value in values
    ]
    place = part.rows.column_names.index(ORIGINAL + name)
    field = OriginalColumn(name, "text").field
    return replace(part, rows=part.rows.set_column(place, field, pa.array(texts, pa.string())))


def _converted(part: Rows, write: _Writer, trainer: str, form: Format | None, say: Say) -> Rows:
    """Return rows that are written anew, each as a conversation.

    Raises:
        DataError: rows hold what the trainer has no form for.
    """
    told = Told()
    weights = part.added.column("weight").to_pylist()
    ids = part.added.column("row_id").to_pylist()
    lines = [
        write(conversation, row_id, 1.0 if _is_one(weight) else weight, told)
        for (_, _, conversation), row_id, weight in zip(part.conversations(), ids, weights, strict=True)
    ]
    finish(told, trainer, say)
    if not any(line.get(VARIABLES) for line in lines):
        for line in lines:
            line.pop(VARIABLES, None)
    kinds = {name: "text" if name in _TEXTS else "json" for name in (lines[0] if lines else ())}
    columns = [OriginalColumn(name, kind) for name, kind in kinds.items()]
    arrays = [each.array(line[each.name] for line in lines) for each in columns]
    table = pa.Table.from_arrays(arrays, schema=pa.schema([each.field for each in columns]))
    return replace(part, rows=table.append_column("source", part.rows.column("source")), form=form)
