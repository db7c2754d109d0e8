"""The answer to be judged, with all that a judge needs beyond its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dataflex_pipeline.reward import Answer


@dataclass(frozen=True)
class JudgedAnswer(Answer):
    """An answer of a target row's conversation.

    Attributes:
        turns: (role, content) of the conversation before the answer, for models with a chat template.
        again: whether the judge's first reply held no score, and this is the second and last time.
    """

    turns: tuple[tuple[str, str], ...] = ()
    again: bool = False


def split_turns(
    messages: Sequence[Mapping[str, str]],
) -> tuple[tuple[tuple[str, str], ...], str | None]:
    """Return the turns before a row's last answer as (role, content), and that answer; None: it is blank."""
    turns = [(message["role"], message["content"]) for message in messages]
    answered = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
    before = tuple(turns[: answered[-1]] if answered else turns)
    own = turns[answered[-1]][1] if answered else ""
    return before, own if own.strip() else None


def conversation_text(turns: tuple[tuple[str, str], ...]) -> str:
    """Return turns as text: the bare words of a single user turn, else each with its role before it."""
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in turns)
