"""A conversation in one form, whatever format it came in, and its content hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


class RowError(Exception):
    """Why one row cannot be used; the text becomes the row's ``reason``."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool.
        content: its text; for a turn that calls tools also the calls, as JSON text.
        calls: the calls as ``{"name": ..., "arguments": {...}}``; empty for other turns.
        words: what a calling turn says besides the calls.
        reasoning: an assistant's thoughts before its answer, where the data keeps them apart.
        speaker: the ``name`` of who speaks, where the data has one.
        answers: number of the call (over the conversation, from 0) that a tool's turn answers; None for
            the next one that has no answer yet.
        trained: whether an assistant turn carries labels.
        others: what else the turn has, by key; `ChatFormat.fitted` leaves what the chat template reads.
    """

    role: str
    content: str
    calls: tuple[Mapping[str, Any], ...] = ()
    words: str = ""
    reasoning: str = ""
    speaker: str = ""
    answers: int | None = None
    trained: bool = True
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> list[Any]:
        """What of the turn is part of a row's content hash: what few turns have only where it is there."""
        rare = {
            "reasoning": self.reasoning,
            "name": self.speaker,
            "answers": self.answers,
            "trained": None if self.trained else False,
            "others": dict(self.others) or None,
        }
        present = {key: value for key, value in rare.items() if value not in ("", None)}
        return [self.role, self.content, *([present] if present else [])]


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the definitions of the tools that may be called.

    Attributes:
        messages: an optional system turn, then user and assistant turns, tools' answers between.
        tools: one mapping per tool, ``{"type": "function", "function": {...}}``; empty for none.
        variables: what the row gives its chat template besides (``chat_template_kwargs``).
        notes: what of the row was read otherwise than it is written, or passed over.
        in_words: whether the row is a prompt and its completion, both plain texts.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    in_words: bool = False

    @property
    def row_id(self) -> str:
        """Content hash: blake2b-128 (hex) of what decides the text and the labels.

        That is roles, contents and tools; and, in rows that have them, reasoning, names of speakers, turns
        that are not trained on, an order of tool results of its own, other keys of turns that the chat
        template reads, and variables of the template.
        """
        turns = [message.identity for message in self.messages]
        return content_hash([turns, list(self.tools), *([dict(self.variables)] if self.variables else [])])

    def with_system(self, text: str | None) -> Conversation:
        """Return the conversation with a system turn, unless it has one or there is no text."""
        if not text or self.messages[0].role == "system":
            return self
        return replace(self, messages=(Message("system", text), *self.messages))


def content_hash(value: Any) -> str:
    """Return the blake2b-128 hash (hex) of a plain value's canonical JSON text."""
    return hashlib.blake2b(canonical_json(value).encode("ascii"), digest_size=16).hexdigest()


def canonical_json(value: Any) -> str:
    """Return JSON text with sorted keys and ASCII only, so that any string has one."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=json_text_of)


def json_text_of(value: Any) -> Any:
    """Turn what Parquet and Arrow hold beyond JSON (dates, decimals, bytes) into text."""
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def check_conversation(messages: Sequence[Message]) -> None:
    """Check the order of roles, and that every turn says something in valid Unicode.

    The order is an optional system turn, then user, assistant, user, assistant ...; after an assistant
    turn, tools may answer (several in a row), and then the assistant goes on. The last turn is the
    assistant's.

    Raises:
        RowError: what is wrong.
    """
    if not any(message.role == "assistant" for message in messages):
        raise RowError("no assistant turn, so there is nothing to learn")
    before = "start"
    for message in messages:
        if before not in _MAY_FOLLOW[message.role]:
            raise RowError(f"wrong order of roles: {message.role} after {before}")
        _check_text(message)
        before = message.role
    if before != "assistant":
        raise RowError(f"the last turn is the {before}'s, so it has no response")


_MAY_FOLLOW = {
    "system": ("start",),
    "user": ("start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_text(message: Message) -> None:
    if not message.content.strip() and message.role in ("user", "assistant"):
        raise RowError("empty response" if message.role == "assistant" else "empty prompt")
    try:
        f"{message.content}{message.reasoning}{message.speaker}".encode()
    except UnicodeEncodeError:
        raise RowError("a text is not valid Unicode (it holds half of a surrogate pair)") from None
