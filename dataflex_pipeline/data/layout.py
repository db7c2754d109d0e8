"""Which format a data set is in, told from its columns.

Formats: ``alpaca`` (instruction, input, output; system, history, tools), conversations (sharegpt's
``from``/``value`` in ``conversations``, or OpenAI's ``role``/``content`` in ``messages``; system,
tools) and ``prompt_completion`` (prompt, completion: texts or lists of messages).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dataflex_pipeline.data.sources import Source
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
COLUMN_ROLES = ("prompt", "query", "response", "history", "system", "tools", "messages")
_DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_OPTIONAL = ("query", "history", "system", "tools")
Kind = Literal["alpaca", "conversation", "prompt_completion"]


@dataclass(frozen=True)
class Layout:
    """How to read the rows of one source.

    Attributes:
        kind: the format. columns: role -> column name, only of columns that are there.
        tags: keys and role names of conversations, all seven.
    """

    kind: Kind
    columns: Mapping[str, str]
    tags: Mapping[str, str] = field(default_factory=lambda: dict(OPENAI_TAGS))


def detect_layout(source: Source, samples: Mapping[str, Any]) -> Layout:
    """Tell the format of a source.

    Args:
        source: with the roles and tags that were declared for it.
        samples: first non-null value of every column (None where there is none).

    Raises:
        DataError: no format fits the columns, or a declared column is not there.
    """
    _check_declared(source, samples)
    declared = dict(source.columns)
    if source.formatting == "sharegpt" or "messages" in declared:
        name = declared.get("messages", "conversations")
        if name in samples:
            return _conversation(source, samples, name)
    elif source.formatting == "alpaca" or {"prompt", "response"} & declared.keys():
        columns = {**_DEFAULT_COLUMNS, **declared}
        if {columns["prompt"], columns["response"]} <= samples.keys():
            return Layout("alpaca", _present(columns, samples))
    if source.formatting is None and not declared.keys() & {"prompt", "response", "messages"}:
        found = _detect_undeclared(source, samples)
        if found is not None:
            return found
    raise _unknown(source, samples)


def _detect_undeclared(source: Source, samples: Mapping[str, Any]) -> Layout | None:
    for name in ("messages", "conversations"):
        if name in samples:
            return _conversation(source, samples, name)
    if {"instruction", "output"} <= samples.keys():
        return Layout("alpaca", _present({**_DEFAULT_COLUMNS, **source.columns}, samples))
    if {"prompt", "completion"} <= samples.keys():
        columns = {"prompt": "prompt", "response": "completion"}
        return Layout("prompt_completion", _present(columns, samples), {**OPENAI_TAGS, **source.tags})
    return None


def _present(columns: Mapping[str, str], samples: Mapping[str, Any]) -> dict[str, str]:
    """Keep the roles whose column is there; optional roles are found under their own name, too."""
    named = {role: role for role in ("history", "system", "tools")}
    return {role: name for role, name in {**named, **columns}.items() if name in samples}


def _conversation(source: Source, samples: Mapping[str, Any], name: str) -> Layout:
    tags = {**_guess_tags(samples[name]), **source.tags}
    columns = _present({**source.columns, "messages": name}, samples)
    kept = {role: column for role, column in columns.items() if role in ("messages", "system", "tools")}
    return Layout("conversation", kept, tags)


def _guess_tags(sample: Any) -> dict[str, str]:
    turns = json_or_self(sample)
    first = turns[0] if isinstance(turns, list) and turns else None
    openai = isinstance(first, dict) and "role" in first and "from" not in first
    return dict(OPENAI_TAGS if openai else SHAREGPT_TAGS)


def _check_declared(source: Source, samples: Mapping[str, Any]) -> None:
    _check_keys(source, "columns", source.columns, COLUMN_ROLES)
    _check_keys(source, "tags", source.tags, SHAREGPT_TAGS)
    for role, name in source.columns.items():
        if name not in samples and role not in _OPTIONAL:
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


def json_or_self(value: Any) -> Any:
    """Parse JSON text (how CSV holds lists); anything else is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        return value
