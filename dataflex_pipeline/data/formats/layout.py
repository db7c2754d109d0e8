"""Detection of the format of a data set from its columns.

Formats: ``alpaca`` (instruction, input, output; system, history, tools), conversations (sharegpt's
``from``/``value`` in ``conversations``, or OpenAI's ``role``/``content`` in ``messages``; system,
tools) and ``prompt_completion`` (prompt, completion: texts or lists of messages).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.data.sources.columns import is_filled, speaks, turns_of
from dataflex_pipeline.data.sources.columns import json_or_self as json_or_self
from dataflex_pipeline.data.sources.named import Source
from dataflex_pipeline.errors import DataError, did_you_mean

SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
MEDIA_ROLES = ("images", "videos", "audios")
COLUMN_ROLES = (
    "prompt",
    "query",
    "response",
    "history",
    "system",
    "tools",
    "messages",
    "kto_tag",
    *MEDIA_ROLES,
)
_DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_REQUIRED = ("prompt", "response", "messages")
FOUND_BY_NAME = ("history", "system", "tools")
_BESIDE = ("kto_tag", *MEDIA_ROLES)
Kind = Literal["alpaca", "conversation", "prompt_completion"]


@dataclass(frozen=True)
class Layout:
    """How to read the rows of one source.

    Attributes:
        kind: the format. columns: role -> column name, only of columns that are there.
        tags: keys and role names of conversations, all seven.
        beside: role -> column name, of declared columns beside the conversation: kto_tag and media.
        others: how to read rows that fill the columns of another format and not those of this one.
    """

    kind: Kind
    columns: Mapping[str, str]
    tags: Mapping[str, str] = field(default_factory=lambda: dict(OPENAI_TAGS))
    beside: Mapping[str, str] = field(default_factory=dict)
    others: tuple[Layout, ...] = ()

    def of(self, row: Row) -> Layout:
        """Return how to read one row: this layout, unless only another one's columns are filled there."""
        fitting = (each for each in (self, *self.others) if each.is_filled(row)) if self.others else ()
        return next(iter(fitting), self)

    def is_filled(self, row: Mapping[str, Any]) -> bool:
        """Whether a row fills the columns that make this format."""
        if self.kind == "conversation":
            return is_filled(row.get(self.columns["messages"]))
        response = row.get(self.columns["response"])
        return is_filled(response) and row.get(self.columns["prompt"]) is not None

    @property
    def all(self) -> tuple[Layout, ...]:
        """This layout and the others, in the order in which they are tried."""
        return (self, *self.others)

    def as_plain(self) -> dict[str, Any]:
        """Return it as plain values, for a file or a fingerprint."""
        made: dict[str, Any] = {"format": self.kind, "columns": dict(self.columns)}
        made["tags"] = dict(self.tags) if self.kind != "alpaca" else {}
        made |= {"beside": dict(self.beside)} if self.beside else {}
        return made | ({"others": [each.as_plain() for each in self.others]} if self.others else {})

    @classmethod
    def from_plain(cls, made: Mapping[str, Any]) -> Layout:
        """Return the layout that `as_plain` wrote."""
        others = tuple(map(cls.from_plain, made.get("others", ())))
        tags = made["tags"] or dict(OPENAI_TAGS)
        return cls(made["format"], made["columns"], tags, made.get("beside", {}), others)


def detect_layout(source: Source, samples: Mapping[str, Any]) -> Layout:
    """Tell the format of a source.

    Where nothing says which columns to read, rows may be in several formats, each in columns of its own:
    the first one that any row fills is the source's, and `Layout.others` are those that others fill.

    Args:
        source: with the roles and tags that were declared for it.
        samples: first telling value of every column (None where there is none).

    Raises:
        DataError: no format fits the columns, or a declared column is not there.
    """
    _check_declared(source, samples)
    found = _detect(source, samples)
    named = {role: name for role, name in source.columns.items() if role in _BESIDE and name in samples}
    others = tuple(replace(each, beside=named) for each in found.others)
    return replace(found, beside=named, others=others)


def _detect(source: Source, samples: Mapping[str, Any]) -> Layout:
    declared = dict(source.columns)
    if source.formatting in ("sharegpt", "openai") or "messages" in declared:
        name = declared.get("messages") or _default_messages(source, samples)
        if name in samples:
            return _conversation(source, samples, name)
    elif source.formatting == "alpaca" or {"prompt", "response"} & declared.keys():
        columns = {**_DEFAULT_COLUMNS, **declared}
        if {columns["prompt"], columns["response"]} <= samples.keys():
            return Layout("alpaca", _present(source, samples, columns))
    if source.formatting is None and not declared.keys() & {"prompt", "response", "messages"}:
        found = _undeclared(source, samples)
        filled = [each for each in found if each.is_filled(samples)] or found[:1]
        if filled:
            return replace(filled[0], others=tuple(filled[1:]))
    raise _unknown(source, samples)


def lists_columns(source: Source) -> bool:
    """Whether the columns to read are declared, so that no other one is looked for by its name."""
    return any(role in source.columns for role in _REQUIRED)


def _default_messages(source: Source, samples: Mapping[str, Any]) -> str:
    return "messages" if source.formatting == "openai" and "messages" in samples else "conversations"


def _undeclared(source: Source, samples: Mapping[str, Any]) -> list[Layout]:
    found = [
        _conversation(source, samples, name) for name in ("messages", "conversations") if name in samples
    ]
    if {"instruction", "output"} <= samples.keys():
        columns = {**_DEFAULT_COLUMNS, **source.columns}
        found.append(Layout("alpaca", _present(source, samples, columns)))
    if {"prompt", "completion"} <= samples.keys():
        columns = {**source.columns, "prompt": "prompt", "response": "completion"}
        present = _present(source, samples, columns)
        kept = {role: name for role, name in present.items() if role not in ("query", "history")}
        found.append(Layout("prompt_completion", kept, {**OPENAI_TAGS, **source.tags}))
    return found


def _present(source: Source, samples: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Keep the roles whose column is there; optional ones are found by name unless columns are listed."""
    if lists_columns(source):
        columns = {
            role: name for role, name in columns.items() if role in source.columns or role in _REQUIRED
        }
    else:
        columns = {**{role: role for role in FOUND_BY_NAME}, **columns}
    return {role: name for role, name in columns.items() if name in samples and role not in _BESIDE}


def _conversation(source: Source, samples: Mapping[str, Any], name: str) -> Layout:
    tags = {**_guess_tags(samples[name]), **source.tags}
    columns = _present(source, samples, {**source.columns, "messages": name})
    known = ("messages", "system", "tools")
    return Layout("conversation", {role: each for role, each in columns.items() if role in known}, tags)


def _guess_tags(sample: Any) -> dict[str, str]:
    turns = turns_of(sample) or []
    told = next((turn for turn in turns if speaks(turn)), {})
    return dict(SHAREGPT_TAGS if told.get("role") is None or told.get("from") is not None else OPENAI_TAGS)


def _check_declared(source: Source, samples: Mapping[str, Any]) -> None:
    _check_keys(source, "columns", source.columns, COLUMN_ROLES)
    _check_keys(source, "tags", source.tags, SHAREGPT_TAGS)
    for role, name in source.columns.items():
        if name not in samples and role in _REQUIRED:
            raise DataError(
                f"data set '{source.given}': columns says {role}: {name}, and there is no column "
                f"'{name}'.{did_you_mean(name, samples)}",
                f"Its columns are {', '.join(samples) or 'none'}.",
                "Correct data_columns, or columns in its entry of dataset_info.json.",
            )


def _check_keys(source: Source, what: str, given: Mapping[str, str], known: Iterable[str]) -> None:
    for key, value in given.items():
        if key not in known or not isinstance(value, str):
            raise DataError(
                f"data set '{source.given}': {what} has {key}: {value!r}.{did_you_mean(key, known)}",
                f"The keys of {what} are {', '.join(known)}, each with a text.",
                f"Correct data_{what}, or {what} in its entry of dataset_info.json.",
            )


def _unknown(source: Source, samples: Mapping[str, Any]) -> DataError:
    said = f" and formatting '{source.formatting}'" if source.formatting else ""
    return DataError(
        f"data set '{source.given}' has the columns {', '.join(samples) or 'none'}{said}: no known format.",
        "alpaca needs instruction and output (input, system, history, tools if there are any); sharegpt "
        "needs conversations (a list of from/value); messages needs messages (a list of role/content); "
        "prompt/completion needs prompt and completion.",
        "Rename the columns, or say which is which: data_columns='{prompt: <column>, response: <column>}' or "
        "data_columns='{messages: <column>}' for all data sets, `columns` in dataset_info.json for one.",
    )
