"""From a conversation to text and token ids, with labels on the responses.

A row's text is cut where a response begins and ends, by rendering prefixes of the conversation: what
is written up to a response is ``render(turns before it, add_generation_prompt=True)``, and the response
is what ``render(turns up to and with it)`` adds. Each piece is tokenised by itself.

The response includes its end-of-turn marker. White space that a template writes after the marker
belongs to what follows, and carries no label; where white space is all that ends the turn, it is the
marker, and carries one.

Tools: a template that reads ``tools`` gets their definitions; for any other they stand in plain text
at the end of the system prompt (see ``tools_text``). Likewise ``tool_calls``: a template that knows them
writes calls in its family's form, with ids made here (call00000, call00001 ...); any other gets the call's
JSON text as the content of the turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.api import Progress
from dataflex_pipeline.data.conversation import Conversation, Message, RowError
from dataflex_pipeline.data.piece_tokens import PieceTokenizer
from dataflex_pipeline.data.templates import TEMPLATES, NamedTemplate, named_template
from dataflex_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = datetime(2024, 7, 26, tzinfo=UTC)
"""The date that templates get when they ask for today's: rows must not depend on the day they are made."""

_UNSTABLE_HISTORY = (
    "the chat template writes earlier turns otherwise once later ones follow; set mask_history: true "
    "(labels on the last response only) or choose a named template"
)
_UNSTABLE_PROMPT = (
    "the chat template begins a response otherwise than its generation prompt does; choose a named template"
)


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text, and whether it carries labels."""

    text: str
    labelled: bool


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return tool definitions in plain text, for templates that have no form of their own."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    return (
        "You can call these tools, each described by a JSON object:\n"
        + "\n".join(lines)
        + '\nTo call one, answer with {"name": <name of the tool>, "arguments": {<its arguments>}} '
        "and nothing else."
    )


class ChatFormat:
    """A tokenizer with the chat template that rows are written with.

    Args:
        tokenizer: a transformers tokenizer.
        template: a named template; None for the tokenizer's own.

    Raises:
        ConfigError: no template is named and the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: NamedTemplate | None) -> None:
        self.tokenizer = tokenizer
        self.named = template
        if template is None and not tokenizer.chat_template:
            raise ConfigError(
                "template is not set, and the model's tokenizer has no chat template of its own.",
                "Without one there is no telling how prompts and responses are written.",
                f"Set template to one of {', '.join(TEMPLATES)}; the model's family, or plain for none.",
            )
        self._text = template.text if template else tokenizer.get_chat_template()
        self._tools_text = template.text if template else self._own_with_tools()
        self._pieces = PieceTokenizer(tokenizer, one_bos=template is not None)

    @classmethod
    def load(cls, folder: str, template: str | None, trust_remote_code: bool = False) -> ChatFormat:
        """Load a tokenizer from its folder (or hub name), and the template.

        Raises:
            ConfigError: unknown template, none at all, or no tokenizer there.
        """
        from transformers import AutoTokenizer

        named = named_template(template) if template is not None else None
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"No tokenizer can be loaded from {folder}.",
                str(error).strip().splitlines()[0],
                "Set model_name_or_path to a folder or hub name that has one.",
            ) from error
        return cls(tokenizer, named)

    def _own_with_tools(self) -> str:
        own = self.tokenizer.chat_template
        return own.get("tool_use", self._text) if isinstance(own, dict) else self._text

    @property
    def stop_ids(self) -> list[int]:
        """Token ids of which the last one ends a response; empty where nothing does."""
        marker = (self.named.stop if self.named else None) or self.tokenizer.eos_token
        return self._pieces.ids(marker) if marker else []

    def notices(self) -> list[str]:
        """Return what a user should know about this tokenizer with this template, one line each."""
        lines = []
        if self.named is not None:
            lacking = [token for token in self.named.tokens if len(self._pieces.ids(token)) != 1]
            if lacking:
                lines.append(
                    f"template {self.named.name}: the tokenizer has no single token for {' '.join(lacking)}; "
                    "they are spelt out in several tokens, which costs length and has to be learnt"
                )
            if self.named.stop is None and not self.tokenizer.eos_token:
                lines.append(
                    f"template {self.named.name} ends responses with the end-of-sequence token, and the "
                    "tokenizer has none: the model does not learn to stop"
                )
        if re.search(r"strftime_now|date_string", self._text):
            lines.append(
                f"the chat template writes today's date; {TODAY:%d %b %Y} stands in, so that rows made on "
                "different days are the same"
            )
        return lines

    def announce(self, progress: Progress) -> None:
        """Say every notice."""
        for line in self.notices():
            progress.say(line)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the text of some turns.

        Raises:
            RowError: the template refuses them.
        """
        from jinja2.exceptions import TemplateError

        template = self._tools_text if tools else self._text
        native = bool(tools) and re.search(r"\btools\b", template) is not None
        if tools and not native:
            messages = _with_tools_text(messages, tools, self.named.system if self.named else "")
        try:
            text = self.tokenizer.apply_chat_template(
                _as_dicts(messages, "tool_calls" in template),
                tools=list(tools) if native else None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                date_string=TODAY.strftime("%d %b %Y"),
                strftime_now=TODAY.strftime,
            )
        except (TemplateError, TypeError) as error:
            raise RowError(f"the chat template refuses the row: {error}") from error
        return str(text)

    def pieces(self, conversation: Conversation, mask_history: bool = False) -> list[Piece]:
        """Cut a conversation's text into prompts and responses, in order.

        Args:
            conversation: checked, the last turn an assistant's.
            mask_history: only the last response is labelled.

        Raises:
            RowError: the template refuses the row, leaves a turn out, or is not stable under prefixes.
        """
        turns, tools = conversation.messages, conversation.tools
        answers = [number for number, message in enumerate(turns) if message.role == "assistant"]
        pieces: list[Piece] = []
        written, whole = 0, ""
        for number in answers[-1:] if mask_history else answers:
            prompt = self.render(turns[:number], tools, add_generation_prompt=True)
            if not prompt.startswith(whole):
                raise RowError(_UNSTABLE_HISTORY)
            whole = self.render(turns[: number + 1], tools)
            if not whole.startswith(prompt):
                raise RowError(_UNSTABLE_PROMPT)
            end = len(prompt) + _length_with_marker(whole[len(prompt) :], turns[number].content)
            pieces += [Piece(prompt[written:], False), Piece(whole[len(prompt) : end], True)]
            written = end
        _check_all_there(turns, whole)
        return [piece for piece in (*pieces, Piece(whole[written:], False)) if piece.text]

    def encode(self, rows: Sequence[Sequence[Piece]]) -> list[tuple[list[int], list[int]]]:
        """Tokenise rows; see ``PieceTokenizer.encode``."""
        return self._pieces.encode([[(piece.text, piece.labelled) for piece in row] for row in rows])


def _with_tools_text(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], default_system: str
) -> list[Message]:
    turns = list(messages)
    system = turns.pop(0).content if turns[0].role == "system" else default_system
    return [Message("system", f"{system}\n\n{tools_text(tools)}".lstrip("\n")), *turns]


def _as_dicts(messages: Sequence[Message], takes_calls: bool) -> list[dict[str, Any]]:
    """Return turns as chat templates take them; a tool's answer carries the id of its call."""
    made: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []
    count = 0
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.calls:
            named = [(f"call{count + place:05d}", call) for place, call in enumerate(message.calls)]
            count += len(named)
            waiting = [(name, call["name"]) for name, call in named]
            if takes_calls:
                calls = [{"id": name, "type": "function", "function": dict(call)} for name, call in named]
                turn = {"role": message.role, "content": message.words, "tool_calls": calls}
        elif message.role == "tool":
            name, function = waiting.pop(0) if waiting else (f"call{count:05d}", "")
            turn |= {"tool_call_id": name} | ({"name": function} if function else {})
        made.append(turn)
    return made


def _length_with_marker(response: str, content: str) -> int:
    body = response.rstrip()
    return len(response) if not body or body.endswith(content.rstrip()) else len(body)


def _check_all_there(messages: Sequence[Message], text: str) -> None:
    """Refuse a row of which the template left something out: nothing may vanish unseen."""
    for message in messages:
        said = (message.words if message.calls else message.content).strip()
        if message.role == "assistant" and not message.calls:
            continue
        if said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
            raise RowError(f"the chat template leaves out a {message.role} turn")
