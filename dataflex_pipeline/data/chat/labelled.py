"""Text and token ids of a conversation, with labels on the responses.

A row's text is cut where a response begins and ends, by rendering prefixes of the conversation: what
is written up to a response is ``render(turns before it, add_generation_prompt=True)``, and the response
is what ``render(turns up to and with it)`` adds. Each piece is tokenised by itself.

The response includes its end-of-turn marker. White space that a template writes after the marker
belongs to what follows, and carries no label; where white space is all that ends the turn, it is the
marker, and carries one.

Tools: a template that reads ``tools`` gets their definitions; for any other they stand in plain text
at the end of the system prompt (see ``tools_text``). Likewise ``tool_calls``: a template that knows them
writes calls in its family's form, with ids made here (call00000, call00001 ...); any other gets the call's
JSON text as the content of the turn. Reasoning goes to a template under each name that it reads.

All of a row has to be in its text: what a template leaves out of an answer that is to be learnt makes the
row invalid, what it leaves out of answers without labels is noted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.api import Progress
from dataflex_pipeline.data.chat import trial
from dataflex_pipeline.data.chat.day import DAY, VARIABLES, asks_for_the_day, with_day
from dataflex_pipeline.data.chat.piece_tokens import PieceTokenizer, puts_bos
from dataflex_pipeline.data.chat.templates import TEMPLATES, NamedTemplate, named_template, own_template
from dataflex_pipeline.data.chat.trial import TOOL, check_length, check_template, error_shown
from dataflex_pipeline.data.chat.turns import Reads, as_dicts, reordered, with_tools_text
from dataflex_pipeline.data.chat.written import (
    check_prompts,
    check_tools,
    check_unicode,
    missing_from,
    notes_on_history,
    notes_on_tools,
)
from dataflex_pipeline.data.conversation import Conversation, Message, RowError
from dataflex_pipeline.data.formats.marks import NOTHING_TRAINED, not_used
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.limited import within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, _ANSWER = "Zwq?", "Xkj"
"""Texts that no template writes by itself."""

_UNSTABLE_HISTORY = (
    "the chat template writes earlier turns otherwise once later ones follow; set mask_history: true "
    "(labels on the last response only) or choose a named template"
)
_LAST_UNTRAINED = "the last answer is marked as not to be trained on, and with mask_history no other one is"
_RESULT_ORDER = "results of tool calls are written in the order of their calls, since the template has no ids"
_TOOLS_IN_WORDS = (
    "the chat template has no place for tools: their definitions stand in plain words at the end of the "
    "system prompt"
)
_IN_WORDS = (
    "prompt and completion are plain texts, and are written as one user and one assistant turn of the chat "
    "template (template: plain adds no marks, only a line break between them)"
)
_UNSTABLE_PROMPT = (
    "the chat template begins a response otherwise than its generation prompt does; choose a named template"
)


def rows_lack(token: str) -> str:
    """Return the notice on rows that begin without the beginning-of-sequence token."""
    return (
        f"rows do not begin with {token}, which the tokenizer puts before every other text: the chat "
        "template does not write it, and nothing else adds it to what a template wrote"
    )


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text, and whether it carries labels."""

    text: str
    labelled: bool


@dataclass(frozen=True)
class Cut:
    """A row's text in pieces, and what to note of how it was written."""

    pieces: tuple[Piece, ...]
    notes: tuple[str, ...] = ()


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
        self._text = template.text if template else own_template(tokenizer)
        self._reads = Reads.of(self._text)
        self._reads_with_tools = Reads.of(template.text if template else self._own_with_tools())
        self._pieces = PieceTokenizer(tokenizer, one_bos=template is not None)
        if template is None:
            check_template(self._text, self._write_trial)

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
        except Exception as error:
            found = str(error).strip().splitlines()
            raise ConfigError(
                f"No tokenizer can be loaded from {folder}.",
                f"{type(error).__name__}: {found[0]}" if found else type(error).__name__,
                "Set model_name_or_path to a folder or hub name that has one.",
            ) from error
        return cls(tokenizer, named)

    def _own_with_tools(self) -> str:
        own = self.tokenizer.chat_template
        return own.get("tool_use", self._text) if isinstance(own, dict) else self._text

    def _write_trial(self, turns: Sequence[Message], with_tool: bool, begins: bool) -> str:
        return self.render(turns, [TOOL] if with_tool else [], begins)

    @property
    def stop_ids(self) -> list[int]:
        """Token ids of which the last one ends a response; empty where nothing does."""
        marker = (self.named.stop if self.named else None) or self.tokenizer.eos_token
        return self._pieces.ids(marker) if marker else []

    def token_text(self, number: int) -> str:
        """Return how the tokenizer writes a token."""
        return str(self.tokenizer.convert_ids_to_tokens(number))

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
        elif not self._stops():
            lines.append(self._endless())
        lines += self._header_notice()
        if self._lacks_bos():
            lines.append(rows_lack(self.tokenizer.bos_token))
        if asks_for_the_day(self._text):
            lines.append(
                f"the chat template writes today's date; {DAY:%d %b %Y} stands in, so that rows made on "
                "different days are the same"
            )
        return lines

    def announce(self, progress: Progress) -> None:
        """Say every notice."""
        for line in self.notices():
            progress.say(line)

    def probe(self) -> tuple[str, str]:
        """Return the text before an answer to a question, and the answer's; both empty if it is refused."""
        question, answer = Message("user", QUESTION), Message("assistant", _ANSWER)
        try:
            before = self.render([question], add_generation_prompt=True)
            whole = self.render([question, answer])
        except RowError:  # rows that the template takes may look otherwise; each is told its own reason
            return "", ""
        return (before, whole[len(before) :]) if whole.startswith(before) else ("", "")

    def _stops(self) -> bool:
        """Whether the labels of an answer end with a token that stands for an end."""
        _, response = self.probe()
        ids = self._pieces.ids(response[: self._length_with_marker(response, _ANSWER)])
        return not response or self.is_ended(ids)

    def _lacks_bos(self) -> bool:
        """Whether rows of the tokenizer's own template lack the token that other texts begin with."""
        before, _ = self.probe()
        bos = self.tokenizer.bos_token_id
        begins = self._pieces.ids(before)[:1] == [bos]
        return self.named is None and bool(before) and puts_bos(self.tokenizer) and not begins

    def is_ended(self, learnt: Sequence[int]) -> bool:
        """Whether labels end with what stands for an end: the stop's tokens, or any special token."""
        stop = self.stop_ids
        if stop and list(learnt[-len(stop) :]) == stop:
            return True
        return bool(learnt) and learnt[-1] in self._pieces.special_ids

    def _endless(self) -> str:
        """Return the notice for a template that ends answers with no token of its own."""
        ending = self._ending or ""
        written = f"only {ending!r}" if ending else "nothing"
        return (
            f"the chat template writes {written} after an answer, so that no end token is learnt and the "
            "model does not learn to stop; choose the named template of the model's family (dataflex methods "
            "--templates lists them)"
        )

    def _header_notice(self) -> Iterator[str]:
        """Yield a notice where the template ignores ``add_generation_prompt`` and has a header to write."""
        before, response = self.probe()
        header = _around_answer(response)[0]
        try:
            ignored = bool(header.strip()) and before == self.render([Message("user", QUESTION)])
        except RowError:
            ignored = False
        if ignored:
            yield (
                f"the chat template does not read add_generation_prompt: {header!r} before each answer "
                "carries labels like the answer itself; choose the named template of the model's family "
                "(dataflex methods --templates lists them)"
            )

    @cached_property
    def _ending(self) -> str | None:
        """What the template writes after an answer; None where that cannot be told once for all rows."""
        return _around_answer(self.probe()[1])[1]

    @cached_property
    def _writes_speaker(self) -> bool:
        try:
            return _ANSWER in self.render([Message("user", QUESTION, speaker=_ANSWER)])
        except RowError:
            return False

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of some turns.

        Args:
            messages, tools: of a conversation. add_generation_prompt: end where a response begins.
            variables: what a row gives the template besides.

        Raises:
            RowError: the template refuses them.
        """
        reads = self._reads_with_tools if tools else self._reads
        native = bool(tools) and reads.tools
        if tools and not native:
            messages = with_tools_text(messages, tools, self.named.system if self.named else "")
        try:
            with within(trial.SECONDS):
                text = self.tokenizer.apply_chat_template(
                    as_dicts(messages, reads),
                    tools=list(tools) if native else None,
                    chat_template=with_day(reads.text),
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **VARIABLES | dict(variables or {}),
                )
        except Exception as error:  # a template is a program: it may divide by zero, recurse, look up nothing
            raise RowError(f"the chat template refuses the row: {error_shown(error)}") from error
        check_length(str(text), messages)
        return str(text)

    def fitted(self, conversation: Conversation) -> Conversation:
        """Return a conversation whose turns keep the keys that the template reads; others are noted."""
        if not any(message.others for message in conversation.messages):
            return conversation
        reads = self._reads_with_tools if conversation.tools else self._reads
        turns, notes = [], list(conversation.notes)
        for message in conversation.messages:
            kept = {key: value for key, value in message.others.items() if key in reads.keys}
            notes += not_used({key: value for key, value in message.others.items() if key not in kept})
            turns.append(replace(message, others=kept))
        return replace(conversation, messages=tuple(turns), notes=tuple(dict.fromkeys(notes)))

    def pieces(self, conversation: Conversation, mask_history: bool = False) -> list[Piece]:
        """Cut a conversation's text into prompts and responses, in order; see `cut`."""
        return list(self.cut(conversation, mask_history).pieces)

    def cut(self, conversation: Conversation, mask_history: bool = False) -> Cut:
        """Cut a conversation's text into prompts and responses, in order, and note what is not as written.

        Args:
            conversation: checked, the last turn an assistant's.
            mask_history: only the last response is labelled.

        Raises:
            RowError: the template refuses the row, leaves something out that matters, or is not stable under
                prefixes; or no response is to be labelled.
        """
        turns = conversation.messages
        learnt = _learnt(turns, mask_history)
        pieces: list[Piece] = []
        written, whole = 0, ""
        for number in learnt:
            prompt = self._write(conversation, number, add_generation_prompt=True)
            if not prompt.startswith(whole):
                written = self._close_earlier(pieces, whole, prompt)
            whole = self._write(conversation, number + 1)
            if not whole.startswith(prompt):
                raise RowError(_UNSTABLE_PROMPT)
            response = whole[len(prompt) :]
            self._check_answer(conversation, number, response, whole)
            end = len(prompt) + self._length_with_marker(response, turns[number].content)
            pieces += [Piece(prompt[written:], False), Piece(whole[len(prompt) : end], True)]
            written = end
        if learnt[-1] + 1 < len(turns):
            whole, before = self._write(conversation, len(turns)), whole
            if not whole.startswith(before):
                written = self._close_earlier(pieces, before, whole)
        check_unicode(whole)
        check_prompts(turns, whole)
        check_tools(conversation.tools, pieces[0].text)
        pieces.append(Piece(whole[written:], False))
        notes = tuple(dict.fromkeys(self._notes(conversation, learnt, pieces[0].text, whole)))
        return Cut(tuple(piece for piece in pieces if piece.text), notes)

    def _close_earlier(self, pieces: list[Piece], whole: str, longer: str) -> int:
        """Take the end of text off the last response, where the template writes it behind the last turn only.

        Args:
            pieces: so far; the last one is changed. whole: text up to the last response.
            longer: text of more turns.

        Returns:
            Where the last piece ends now.

        Raises:
            RowError: the longer text differs otherwise, or no other token would end the response.
        """
        start = sum(len(piece.text) for piece in pieces[:-1])
        shorter = whole.removesuffix(self.tokenizer.eos_token or "")
        response = shorter[start:].rstrip()
        closed = self._pieces.special_ids.intersection(self._pieces.ids(response)[-1:])
        if shorter == whole or not longer.startswith(shorter) or not closed:
            raise RowError(_UNSTABLE_HISTORY)
        pieces[-1] = Piece(response, True)
        return start + len(response)

    def _write(self, conversation: Conversation, count: int, add_generation_prompt: bool = False) -> str:
        """Return the text of the first turns of a conversation."""
        return self.render(
            conversation.messages[:count], conversation.tools, add_generation_prompt, conversation.variables
        )

    def _check_answer(self, conversation: Conversation, number: int, response: str, whole: str) -> None:
        """Check that an answer is wholly in its turn; its beginning may stand in the generation prompt."""
        answer = conversation.messages[number]
        if missing_from(answer, response) is None:
            return
        before = self._write(conversation, number)
        shared = next(
            (place for place, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]),
            min(len(before), len(whole)),
        )
        reason = missing_from(answer, whole[shared:])
        if reason is not None:
            raise RowError(reason)

    def _notes(
        self, conversation: Conversation, learnt: Sequence[int], beginning: str, whole: str
    ) -> Iterator[str]:
        turns = conversation.messages
        reads = self._reads_with_tools if conversation.tools else self._reads
        answers = [number for number, message in enumerate(turns) if message.role == "assistant"]
        yield from notes_on_history([turns[number] for number in answers if number not in learnt], whole)
        if reordered(turns, reads):
            yield _RESULT_ORDER
        if any(message.speaker for message in turns) and not self._writes_speaker:
            yield "name of a turn is not written by the chat template"
        yield from notes_on_tools(conversation.tools, beginning)
        if conversation.tools and not reads.tools:
            yield _TOOLS_IN_WORDS
        if conversation.in_words and (self.named is None or self.named.name != "plain"):
            yield _IN_WORDS
        for name in conversation.variables:
            if not reads.variable(name):
                shown = name.encode("ascii", "backslashreplace").decode()
                yield f"{shown} of chat_template_kwargs is not read by the chat template"

    def _length_with_marker(self, response: str, content: str) -> int:
        """Return how much of a response is learnt: all but the white space behind its end-of-turn marker."""
        body = response.rstrip()
        ending = self._ending
        if ending is None:
            ending = response.partition(content.rstrip())[2]
        return len(body) if body and ending.strip() else len(response)

    def encode(self, rows: Sequence[Sequence[Piece]]) -> list[tuple[list[int], list[int]]]:
        """Tokenise rows; see ``PieceTokenizer.encode``."""
        return self._pieces.encode([[(piece.text, piece.labelled) for piece in row] for row in rows])


def _around_answer(response: str) -> tuple[str, str | None]:
    """Return what stands before and after the probe's answer, however it is cased; None: it is not there."""
    found = re.search(_ANSWER, response, re.IGNORECASE)
    return (response[: found.start()], response[found.end() :]) if found else (response, None)


def _learnt(turns: Sequence[Message], mask_history: bool) -> list[int]:
    """Return the numbers of the turns that carry labels.

    Raises:
        RowError: there is none.
    """
    answers = [number for number, message in enumerate(turns) if message.role == "assistant"]
    chosen = answers[-1:] if mask_history else answers
    learnt = [number for number in chosen if turns[number].trained]
    if not learnt:
        raise RowError(_LAST_UNTRAINED if mask_history else NOTHING_TRAINED)
    return learnt
