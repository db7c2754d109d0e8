"""The text of a row, for models that look at text and not at a conversation's tokens.

Which text that is (``text``):

    conversation   what user and assistant say, one turn after the other (of alpaca data: instruction, input,
                   output), joined by newlines
    prompt         the same up to the last answer (instruction and input)
    response       the last answer (output)
    chat_template  the text of the tokens that the row is trained on, template and all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

Text = Literal["conversation", "prompt", "response", "chat_template"]


def row_text(turns: Sequence[Mapping[str, str]], kind: Text) -> str:
    """Return the text of a conversation, without system and tool turns.

    Args:
        turns: role and content of each. kind: conversation, prompt or response.
    """
    last = max((n for n, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    chosen = {"conversation": turns, "prompt": turns[:last], "response": turns[last : last + 1]}[kind]
    return "\n".join(turn["content"] for turn in chosen if turn["role"] in ("user", "assistant"))
