"""Selected rows as conversations in the form of one trainer, whatever format they came in.

- ``messages``: OpenAI's form, as TRL and axolotl read it: role and content, ``tool_calls``,
  ``reasoning_content``, definitions of tools as JSON text in ``tools``, ``chat_template_kwargs``. A turn that
  is not to be trained on has ``train: false``. Read by our own reader it gives the same labels.
- ``ms-swift``: its own roles for calls and their results; a row's weight is each answer's ``loss_scale``.
- ``llama-factory``: the sharegpt form, for rows that LLaMA-Factory cannot read as they came.

What a trainer has no form for is refused by its name, or said where nothing of the text is lost.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dataflex_pipeline.data.conversation import Conversation, Message, RowError
from dataflex_pipeline.data.formats.formats import to_conversation
from dataflex_pipeline.data.formats.layout import Layout
from dataflex_pipeline.data.formats.row_fields import VARIABLES
from dataflex_pipeline.errors import DataError

Trainer = Literal["original", "messages", "trl", "axolotl", "ms-swift", "llama-factory"]
MESSAGES_LAYOUT = Layout("conversation", {"messages": "messages", "tools": "tools"})
"""How our own reader reads rows in the form of messages."""
_NO_TOOLS = "[]"
"""Text for rows without tools, so that every row has a text: other readers tell types from the first rows."""


@dataclass
class Told:
    """What is found while rows are written.

    Attributes:
        refused: what the trainer has no form for -> ids of rows. said: what is left out or changed -> rows.
    """

    refused: dict[str, list[str]] = field(default_factory=dict)
    said: Counter[str] = field(default_factory=Counter)

    def refuse(self, reason: str, row_id: str) -> None:
        """Take note of a row that cannot be written."""
        self.refused.setdefault(reason, []).append(row_id)


def in_messages(conversation: Conversation, row_id: str, weight: float, told: Told) -> dict[str, Any]:
    """Return a row in OpenAI's form."""
    line: dict[str, Any] = {"messages": list(_turns(conversation.messages)), "tools": _tools(conversation)}
    line[VARIABLES] = dict(conversation.variables)
    if any(not message.trained for message in conversation.messages):
        told.said["have turns marked train: false; axolotl follows it (message_field_training: train)"] += 1
    try:
        again = to_conversation(line, MESSAGES_LAYOUT)
    except RowError as problem:
        told.refuse(str(problem), row_id)
        return line
    if again.row_id != conversation.row_id:
        told.said["have another row_id when they are read back: their calls were written otherwise"] += 1
    return line


def _turns(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    waiting: dict[int, str] = {}
    count = 0
    for message in messages:
        turn: dict[str, Any] = {**message.others, "role": message.role, "content": message.content}
        if message.calls:
            waiting = {count + place: str(call["name"]) for place, call in enumerate(message.calls)}
            calls = zip(waiting, message.calls, strict=True)
            turn["content"] = message.words
            turn["tool_calls"] = [
                {"id": _call_id(number), "type": "function", "function": dict(call)} for number, call in calls
            ]
            count += len(message.calls)
        elif message.role == "tool" and waiting:
            number = message.answers if message.answers in waiting else next(iter(waiting))
            turn |= {"tool_call_id": _call_id(number), "name": waiting.pop(number)}
        elif message.role != "tool":
            waiting = {}
        turn |= {"reasoning_content": message.reasoning} if message.reasoning else {}
        turn |= {"name": message.speaker} if message.speaker else {}
        yield turn | ({} if message.trained else {"train": False})


def _call_id(number: int) -> str:
    return f"call{number:05d}"


def _tools(conversation: Conversation) -> str:
    if not conversation.tools:
        return _NO_TOOLS
    return json.dumps(list(conversation.tools), ensure_ascii=False)


def in_swift(conversation: Conversation, row_id: str, weight: float, told: Told) -> dict[str, Any]:
    """Return a row in the form of ms-swift; a weight of 1 needs no mark."""
    turns: list[dict[str, Any]] = []
    for message in _in_order_of_calls(conversation.messages):
        if message.role == "assistant":
            turns += _swift_answer(message, weight, row_id, told)
        else:
            role = "tool_response" if message.role == "tool" else message.role
            turns.append({"role": role, "content": message.content})
    _say_left_out(conversation, "ms-swift", told)
    return {"messages": turns, "tools": _tools(conversation)}


def _in_order_of_calls(messages: Sequence[Message]) -> list[Message]:
    """Return turns with the results of tools in the order of the calls: nothing else tells which is whose."""
    ordered: list[Message] = []
    for is_result, run in itertools.groupby(messages, lambda message: message.role == "tool"):
        turns = list(run)
        if is_result and all(turn.answers is not None for turn in turns):
            turns.sort(key=lambda turn: turn.answers or 0)
        ordered += turns
    return ordered


def _swift_answer(message: Message, weight: float, row_id: str, told: Told) -> list[dict[str, Any]]:
    mark: dict[str, Any] = {} if message.trained else {"loss": False}
    if weight != 1:
        mark = {"loss_scale": weight if message.trained else 0.0}
    words = _with_thoughts(message, message.words if message.calls else message.content)
    if not message.calls:
        return [{"role": "assistant", "content": words, **mark}]
    if mark:
        what = "a weight other than 1" if weight != 1 else "a turn that is not trained on"
        told.refuse(f"{what}, on a turn that calls tools (marks stand on turns of text)", row_id)
    calls = [{"role": "tool_call", "content": json.dumps(call, ensure_ascii=False)} for call in message.calls]
    return [*([{"role": "assistant", "content": words}] if words else []), *calls]


def _with_thoughts(message: Message, text: str) -> str:
    """Return an answer after its reasoning, as models write it."""
    return f"<think>\n{message.reasoning}\n</think>\n\n{text}" if message.reasoning else text


def in_sharegpt(conversation: Conversation, row_id: str, weight: float, told: Told) -> dict[str, Any]:
    """Return a row in the sharegpt form, as LLaMA-Factory reads it."""
    turns = list(conversation.messages)
    system = turns.pop(0).content if turns[0].role == "system" else ""
    for reason in _beyond_sharegpt(turns):
        told.refuse(reason, row_id)
    _say_left_out(conversation, "LLaMA-Factory", told)
    roles = {"user": "human", "tool": "observation"}
    made = [
        {"from": roles[turn.role], "value": turn.content}
        if turn.role != "assistant"
        else {"from": "function_call" if turn.calls else "gpt", "value": _with_thoughts(turn, turn.content)}
        for turn in turns
    ]
    return {"conversations": made, "system": system, "tools": _tools(conversation)}


def _beyond_sharegpt(turns: Sequence[Message]) -> Iterator[str]:
    """Yield what LLaMA-Factory passes over or refuses."""
    if any(turn.role == "assistant" and not turn.trained for turn in turns):
        yield "a turn that is not trained on (it knows no mark of a turn)"
    if any((turn.role == "assistant") != (place % 2 == 1) for place, turn in enumerate(turns)):
        yield "two results of tools in a row (turns have to alternate)"
    if any(turn.calls and turn.words for turn in turns):
        yield "words beside the calls of tools (a function_call turn is JSON alone)"


def fits_llama_factory(conversation: Conversation, row: Mapping[str, Any], layout: Layout) -> bool:
    """Whether LLaMA-Factory reads a row as it is, by an entry of dataset_info.json."""
    if any(_beyond_sharegpt([turn for turn in conversation.messages if turn.role != "system"])):
        return False
    if layout.kind == "prompt_completion":
        return all(isinstance(row[layout.columns[role]], str) for role in ("prompt", "response"))
    if layout.kind == "alpaca":
        return not isinstance(row.get(layout.columns.get("history", "")), str)
    turns = row[layout.columns["messages"]]
    keys = {layout.tags["role_tag"], layout.tags["content_tag"]}
    known = {layout.tags[tag] for tag in layout.tags if tag not in ("role_tag", "content_tag")}
    return isinstance(turns, list) and all(
        isinstance(turn.get(layout.tags["content_tag"]), str)
        and turn.get(layout.tags["role_tag"]) in known
        and {key for key, value in turn.items() if value is not None} <= keys
        for turn in turns
    )


def _say_left_out(conversation: Conversation, trainer: str, told: Told) -> None:
    if any(message.reasoning for message in conversation.messages):
        told.said["have reasoning: it stands in the answer, as <think>...</think>"] += 1
    if any(message.speaker for message in conversation.messages):
        told.said[f"have names of speakers, which {trainer} does not read: left out"] += 1
    if conversation.variables:
        told.said[f"have {VARIABLES}, which {trainer} does not read: left out"] += 1
    if any(message.others for message in conversation.messages):
        told.said[f"have further keys of turns, which {trainer} does not read: left out"] += 1


def finish(told: Told, trainer: str, say: Callable[[str], None]) -> None:
    """Say what was left out of rows.

    Raises:
        DataError: rows hold what the trainer has no form for.
    """
    for reason, ids in told.refused.items():
        shown = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
        raise DataError(
            f"{len(ids)} selected rows cannot be written for {trainer}: {reason}.",
            f"They have the row_id {shown}; trained on without it they would teach something else.",
            "Use another form (--for messages, or none), or leave such rows out of the pool.",
        )
    for what, count in told.said.items():
        say(f"{count} rows {what}")
