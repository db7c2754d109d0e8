"""The trial of a chat template: it writes a few conversations in a process of its own, within limits.

A template is a program that comes with a model. The sandbox that it runs in keeps it from files and commands,
and not from loops of ten billion turns or texts of gigabytes; nothing inside of a process can end those. So
before a template is used it is run once where the system ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dataflex_pipeline.data.conversation import Message, RowError
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.limited import tried

SECONDS = 5
"""Time on a processor that all conversations of the trial may take; a usual template takes milliseconds."""
ROOM = 1 << 30
"""Bytes of memory beside those that the process has already."""
LONGEST_TEXT = 1 << 24
"""Characters that a template may write beside eight times those of the turns."""
_CALL = {"name": "look", "arguments": {"place": "here"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look somewhere.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}

Render = Callable[[Sequence[Message], bool, bool], str]
"""Writes turns: the turns, whether a tool is defined, whether a response begins at the end."""


_TRIED: dict[str, str] = {}
"""Outcome of each template that this process has tried, by its text."""


def error_shown(error: Exception) -> str:
    """Return an error of a template in a few words that a table can hold."""
    said = str(error).strip() or type(error).__name__
    return said[:300].encode("utf-8", "backslashreplace").decode()


class TooLongError(RowError):
    """A template wrote more than any row can need."""


def check_length(text: str, turns: Sequence[Message]) -> None:
    """Refuse a text that a template wrote of some turns.

    Raises:
        TooLongError: it is too long.
    """
    if len(text) > LONGEST_TEXT + 8 * sum(len(turn.content) for turn in turns):
        raise TooLongError(f"the chat template writes {len(text):,} characters")


def _outcome(render: Render) -> str:
    """Return what a template did: "" where it kept within the limits, else a sentence about it."""
    said = tried(lambda: _run(render), SECONDS, ROOM)
    return f"It did not end within {SECONDS} seconds of computing." if said is None else said


def _run(render: Render) -> str:
    for turns, with_tool in _conversations():
        for begins in (True, False):
            try:
                render(turns, with_tool, begins)
            except TooLongError as error:
                return f"For {len(turns)} short turns {error}."
            except RowError as error:  # what it refuses is told row by row
                if not isinstance(error.__cause__, MemoryError):
                    continue
                return f"It takes more than {ROOM >> 30} GiB of memory."
            except MemoryError:
                return f"It takes more than {ROOM >> 30} GiB of memory."
    return ""


def _conversations() -> list[tuple[list[Message], bool]]:
    system, user = Message("system", "Be brief."), Message("user", "Where?")
    answer = Message("assistant", "Here.", reasoning="Think.")
    call, result = Message("assistant", "", (_CALL,)), Message("tool", "found")
    return [
        ([user], False),
        ([user, answer], False),
        ([system, user, answer], False),
        ([user, answer] * 4, False),
        ([system, user, call, result, answer], True),
    ]


def check_template(text: str, render: Render) -> None:
    """Try a chat template.

    Args:
        text: of the template. render: writes turns with it.

    Raises:
        ConfigError: it did not keep within the limits.
    """
    if text not in _TRIED:
        _TRIED[text] = _outcome(render)
    said = _TRIED[text]
    if said:
        raise ConfigError(
            "The chat template of the model's tokenizer cannot be used.",
            said,
            "Correct chat_template in the model's folder, or set template to a named one (dataflex methods "
            "--templates lists them).",
        )
