"""The check that all of a row is in the text that its chat template made: nothing may vanish unseen.

Templates may trim, move white space, and write values as JSON, so texts are compared without white space and
as JSON strings, too; calls of tools are looked for by name and by each value of their arguments, as often
as the calls of a turn have it.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dataflex_pipeline.data.conversation import Message, RowError

NO_ANSWER = (
    "the chat template leaves out a part of an answer that is to be learnt (such as what stands before "
    "</think>); choose a named template, or correct the model's own"
)
NO_REASONING = (
    "the chat template leaves out the reasoning of an answer; choose one that writes reasoning_content (such "
    "as template: qwen3), or move the reasoning into the answer's content (<think>...</think>)"
)
NO_CALL = "the chat template leaves out a tool call's name or one of its arguments; choose a named template"
NO_TOOLS = "the chat template leaves out a tool's definition; choose a named template"
ONLY_NAMES = "the chat template writes only the names of tools"
NO_PARAMETERS = "the chat template leaves out a parameter of a tool"
PART_OF_HISTORY = "the chat template leaves out a part of an answer that carries no labels"
REASONING_OF_HISTORY = "the chat template leaves out the reasoning of an answer that carries no labels"


def missing_from(answer: Message, text: str) -> str | None:
    """Return why an answer is not wholly in a text, or None where it is.

    Args:
        answer: an assistant turn. text: where it should be.
    """
    squeezed = _squeezed(text)
    if answer.reasoning and not _holds(squeezed, answer.reasoning):
        return NO_REASONING
    if not _holds(squeezed, answer.words if answer.calls else answer.content):
        return NO_ANSWER
    parts = Counter(text for call in answer.calls for text in (call["name"], *_leaves(call["arguments"])))
    return None if all(_holds(squeezed, text, times) for text, times in parts.items()) else NO_CALL


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts that arguments are told by: keys, texts and numbers."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _holds(squeezed: str, text: str, times: int = 1) -> bool:
    """Whether a text without white space has another one in it, so many times."""
    if not text.strip():
        return True
    return any(squeezed.count(_squeezed(way)) >= times for way in _ways(text))


def _ways(text: str) -> Iterator[str]:
    """Yield how templates write a text; nearly always it is the first."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield html.escape(text)
    yield html.escape(text, quote=False)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def check_unicode(text: str) -> None:
    """Check that a row's text can be tokenised.

    Raises:
        RowError: a call, a tool or a variable of the template brought half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("a text is not valid Unicode (it holds half of a surrogate pair)") from None


def check_prompts(messages: Sequence[Message], text: str) -> None:
    """Check that every turn but the assistant's is in a row's text.

    Raises:
        RowError: the template left one out.
    """
    for message in messages:
        said = message.content.strip()
        if message.role == "assistant" or said in text:
            continue
        if json.dumps(said, ensure_ascii=False)[1:-1] not in text:
            raise RowError(f"the chat template leaves out a {message.role} turn")


def check_tools(tools: Sequence[Mapping[str, Any]], text: str) -> None:
    """Check that every tool is named in the text before the first answer that is learnt.

    Raises:
        RowError: the template left one out.
    """
    squeezed = _squeezed(text)
    if not all(_holds(squeezed, str(tool["function"]["name"])) for tool in tools):
        raise RowError(NO_TOOLS)


def notes_on_tools(tools: Sequence[Mapping[str, Any]], text: str) -> Iterator[str]:
    """Yield what of the tools' definitions is not in the text before the first answer that is learnt."""
    if not tools:
        return
    squeezed = _squeezed(text)
    functions = [tool["function"] for tool in tools]
    described = [str(each["description"]) for each in functions if each.get("description")]
    parameters = [name for each in functions for name in _parameters(each)]
    written = [_holds(squeezed, part) for part in (*described, *parameters)]
    if written and not any(written):
        yield ONLY_NAMES
    elif not all(written[len(described) :]):
        yield NO_PARAMETERS


def _parameters(function: Mapping[str, Any]) -> list[str]:
    schema = function.get("parameters")
    named = schema.get("properties") if isinstance(schema, Mapping) else None
    return list(map(str, named)) if isinstance(named, Mapping) else []


def notes_on_history(answers: Sequence[Message], text: str) -> Iterator[str]:
    """Yield what of answers without labels is not in a row's text."""
    for answer in answers:
        reason = missing_from(answer, text)
        if reason is not None:
            yield REASONING_OF_HISTORY if reason == NO_REASONING else PART_OF_HISTORY
