"""Rows of every format as conversations.

An alpaca prompt is instruction and input joined by a line break. Texts in prompt/completion become one
user and one assistant turn; where they are lists of turns, or JSON text of such a list, only the answers of
the completion are trained on. A function_call turn (sharegpt) or an assistant's tool_calls (OpenAI) becomes
an assistant turn whose content is the call's JSON text; observation becomes a turn of role tool. OpenAI's
older forms (``function_call`` on a turn, role function) and its role developer are read as what took their
place. What else stands on a turn or beside the conversation: see `marks` and `row_fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dataflex_pipeline.data.conversation import Conversation, Message, RowError, check_conversation
from dataflex_pipeline.data.formats.layout import OPENAI_TAGS, Layout, json_or_self
from dataflex_pipeline.data.formats.marks import (
    NOTHING_TRAINED,
    UNTRAINED,
    check_media,
    other_keys,
    reasoning_of,
    speaker_of,
    trained_mark,
)
from dataflex_pipeline.data.formats.row_fields import (
    Turn,
    calls_turn,
    notes_on_columns,
    paired,
    parse_tools,
    refuse_by_columns,
    template_variables,
    without_nulls,
)
from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.data.sources.compressed import kind_name

DEVELOPER = "a turn of role developer is read as the system prompt"
IN_PROMPT = f"an answer inside the prompt {UNTRAINED}"


def to_conversation(row: Row, layout: Layout, columnar: bool = False) -> Conversation:
    """Return a row as a conversation that has been checked.

    Args:
        row: as it was read. layout: its format.
        columnar: whether it comes from a columnar file, whose null members are padding.

    Raises:
        RowError: why the row cannot be used.
    """
    read = {"alpaca": _alpaca, "conversation": _turns, "prompt_completion": _prompt_completion}
    turns = read[layout.kind](row, layout, columnar)
    messages = paired(turns)
    check_conversation(messages)
    refuse_by_columns(row, layout, messages)
    if not any(message.trained for message in messages if message.role == "assistant"):
        raise RowError(NOTHING_TRAINED)
    tools = parse_tools(row.get(layout.columns["tools"]), columnar) if "tools" in layout.columns else ()
    notes = [note for turn in turns for note in turn.notes]
    notes += notes_on_columns(row, layout)
    tools = tools or parse_tools(_functions(row, layout), columnar)
    variables = template_variables(row, layout, columnar)
    in_words = layout.kind == "prompt_completion" and not any(
        _turns_in(row.get(layout.columns[role]), layout) for role in ("prompt", "response")
    )
    return Conversation(tuple(messages), tools, variables, tuple(dict.fromkeys(notes)), in_words)


def _functions(row: Row, layout: Layout) -> list[Any]:
    """Return OpenAI's older definitions of tools; a column of that name may hold anything else, too."""
    value = json_or_self(row.get("functions")) if layout.kind == "conversation" else None
    listed = value if isinstance(value, list) else []
    return listed if all(isinstance(each, dict) and "name" in each for each in listed) else []


def _alpaca(row: Row, layout: Layout, columnar: bool) -> list[Turn]:
    prompt = "\n".join(part for part in (_field(row, layout, "prompt"), _field(row, layout, "query")) if part)
    response = _field(row, layout, "response", required=True)
    turns = _system(row, layout)
    for user, assistant in _history(row, layout):
        turns += [Turn(Message("user", user)), Turn(Message("assistant", assistant))]
    return [*turns, Turn(Message("user", prompt)), Turn(Message("assistant", response))]


def _field(row: Row, layout: Layout, role: str, required: bool = False) -> str:
    name = layout.columns.get(role)
    if name is None:
        return ""
    value = row.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        state = "missing" if name not in row else kind_name(value)
        raise RowError(f"{name} is {state}, not text" if value is not None else f"{name} is {state}")
    return value


def _system(row: Row, layout: Layout) -> list[Turn]:
    text = _field(row, layout, "system")
    return [Turn(Message("system", text))] if text else []


def _history(row: Row, layout: Layout) -> list[tuple[str, str]]:
    pairs = json_or_self(row.get(layout.columns.get("history", "")))
    if not pairs:
        return []
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    )
    if not good:
        raise RowError("history is not a list of [prompt, response] pairs of texts")
    return [(user, assistant) for user, assistant in pairs]


def _turns(row: Row, layout: Layout, columnar: bool) -> list[Turn]:
    name = layout.columns["messages"]
    turns = _listed(row.get(name), name, layout.tags, columnar)
    if turns[0].message.role == "system":
        return turns
    return [*_system(row, layout), *turns]


def _listed(value: Any, name: str, tags: Mapping[str, str], columnar: bool) -> list[Turn]:
    turns = json_or_self(value)
    if not isinstance(turns, list):
        raise RowError(f"{name} is {kind_name(turns)}, not a list of turns")
    if not turns:
        raise RowError(f"{name} has no turns")
    return [_turn(turn, tags, columnar and not isinstance(value, str)) for turn in turns]


def _turn(given: Any, tags: Mapping[str, str], columnar: bool) -> Turn:
    """Read one turn, and what other tools write on it."""
    if not isinstance(given, dict):
        raise RowError(f"a turn is {kind_name(given)}, not an object")
    if given.get(tags["role_tag"]) is None:
        raise RowError(f"a turn has no '{tags['role_tag']}'")
    said = str(given[tags["role_tag"]])
    role = _role(said, tags)
    own = (tags["role_tag"], tags["content_tag"])
    check_media(given, own)
    turn = _spoken(given, role, tags, columnar)
    speaks = turn.message.role
    trained, notes = trained_mark(given, speaks, own)
    reasoning, more = reasoning_of(given, speaks, own)
    others = other_keys(given, own)
    message = replace(
        turn.message,
        trained=trained,
        reasoning=reasoning,
        speaker=speaker_of(given, speaks, own),
        others=without_nulls(others) if columnar else others,
    )
    renamed = (DEVELOPER,) if said == "developer" and said not in tags.values() else ()
    return Turn(message, turn.ids, (*renamed, *turn.notes, *notes, *more))


def _spoken(given: Mapping[str, Any], role: str, tags: Mapping[str, str], columnar: bool) -> Turn:
    """Read what a turn says: its text, calls of tools, or the result of one."""
    content = _content(given.get(tags["content_tag"]), tags["content_tag"])
    if role == "function":
        if content is None:
            raise RowError("a function_call turn is empty")
        turn = calls_turn(content, "a function_call turn", "", columnar)
        return replace(turn, message=Message("assistant", content, turn.message.calls))
    for key in ("tool_calls", "function_call"):
        if not given.get(key) or key in (tags["role_tag"], tags["content_tag"]):
            continue
        if role != "assistant":
            raise RowError(f"a {role} turn holds {key}, and only an assistant calls tools")
        return calls_turn(given[key], key, content or "", columnar)
    if content is None:
        refused = role == "assistant" and given.get("refusal")
        raise RowError(
            "an answer stands in 'refusal'; write it as the turn's content to train on it"
            if refused
            else f"a turn of role {role} has no '{tags['content_tag']}'"
        )
    result = given.get("tool_call_id") if role == "tool" else None
    return Turn(Message(role, content), (None if result in (None, "") else str(result),))


_OLDER_ROLES = {"developer": "system", "function": "tool"}
"""OpenAI's other names of roles."""


def _role(given: str, tags: Mapping[str, str]) -> str:
    roles = {
        tags["system_tag"]: "system",
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "tool",
        tags["function_tag"]: "function",
    }
    if tags["role_tag"] == OPENAI_TAGS["role_tag"] and tags["observation_tag"] == "tool":
        roles |= {old: new for old, new in _OLDER_ROLES.items() if old not in roles}
    if given not in roles:
        raise RowError(f"unknown role '{given}' (known: {', '.join(roles)})")
    return roles[given]


def _content(value: Any, tag: str) -> str | None:
    """Return a turn's text; OpenAI's lists of text parts are joined."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        kinds = sorted({str(part.get("type", "text")) for part in value} - {"text"})
        if kinds:
            raise RowError(f"a turn holds {kinds[0]}, and only text is trained on")
        texts = [part.get("text") for part in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise RowError(f"{tag} of a turn is {kind_name(value)}, not text")


def _prompt_completion(row: Row, layout: Layout, columnar: bool) -> list[Turn]:
    """Read a prompt and its completion; only the completion's answers are trained on, as in TRL."""
    asked, answer = layout.columns["prompt"], layout.columns["response"]
    if (listed := _turns_in(row.get(asked), layout)) is not None:
        turns = [_untrained(turn) for turn in _listed(listed, asked, layout.tags, columnar)]
        if turns[0].message.role != "system":
            turns = [*_system(row, layout), *turns]
    else:
        turns = [*_system(row, layout), Turn(Message("user", _field(row, layout, "prompt", required=True)))]
    if (listed := _turns_in(row.get(answer), layout)) is not None:
        return [*turns, *_listed(listed, answer, layout.tags, columnar)]
    return [*turns, Turn(Message("assistant", _field(row, layout, "response", required=True)))]


def _turns_in(value: Any, layout: Layout) -> list[Any] | str | None:
    """Return a prompt or completion that is a list of turns, or JSON text of one; None for plain text."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else None
    found = json_or_self(value) if value.lstrip().startswith("[") else None
    key = layout.tags["role_tag"]
    told = isinstance(found, list) and all(isinstance(turn, dict) and key in turn for turn in found)
    return value if found and told else None


def _untrained(turn: Turn) -> Turn:
    """Take the labels of an answer that stands in a prompt."""
    if turn.message.role != "assistant":
        return turn
    notes = tuple(note for note in turn.notes if not note.endswith(UNTRAINED))
    return replace(turn, message=replace(turn.message, trained=False), notes=(*notes, IN_PROMPT))
