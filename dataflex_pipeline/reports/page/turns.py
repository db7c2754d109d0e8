"""The conversation of a row for the report's page: its turns, and which part of them carries loss.

The labelled tokens, decoded, are looked for in the answers, in order; where it is certain which answer each
of them is, the turns are shown with that part marked. Else, as where a chat template writes a turn otherwise,
what the model reads is shown, cut where labels begin and end. Without the run's tokenizer the answers are
marked by their role.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dataflex_pipeline.pipeline.decoding import Decode
from dataflex_pipeline.schemas import IGNORED

ANSWER = "assistant"


@dataclass
class Turn:
    """A piece of a conversation.

    Attributes:
        role: who speaks; empty for a piece of what the model reads.
        text: as far as it was read.
        length: characters of the whole.
        begin, end: of the part that carries loss; the same where there is none.
    """

    role: str
    text: str
    length: int
    begin: int = 0
    end: int = 0

    def cut(self, most: int) -> Turn:
        """Return the turn with so many characters of its text at most."""
        if len(self.text) <= most:
            return self
        return Turn(self.role, self.text[:most], self.length, min(self.begin, most), min(self.end, most))


def turns_of(row: Mapping[str, Any], decode: Decode | None, last_only: bool) -> list[Turn]:
    """Return the turns of a prepared row.

    Args:
        row: with messages (role, content, length), valid, input_ids and labels.
        decode: the tokenizer's; None where it is not at hand.
        last_only: whether only the last answer carries loss, where roles have to do.
    """
    turns = [
        Turn(each["role"] or "", each["content"] or "", each["length"] or 0) for each in row["messages"] or ()
    ]
    if decode is None or not row["input_ids"]:
        answers = [turn for turn in turns if turn.role == ANSWER and row["valid"]]
        for turn in answers[-1:] if last_only else answers:
            turn.end = len(turn.text)
        return turns
    pieces = _pieces(row["input_ids"], row["labels"])
    labelled = [decode(ids, special=False) for ids, learnt in pieces if learnt]
    if _mark(turns, labelled):
        return turns
    found = [(decode(ids), learnt) for ids, learnt in pieces]
    return [Turn("", text, len(text), 0, len(text) if learnt else 0) for text, learnt in found]


def _pieces(ids: Sequence[int], labels: Sequence[int]) -> list[tuple[list[int], bool]]:
    pairs = zip(ids, labels, strict=True)
    return [
        ([token for token, _ in piece], learnt)
        for learnt, piece in groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    ]


def _mark(turns: Sequence[Turn], labelled: Sequence[str]) -> bool:
    """Mark the labelled texts in the answers; whether it is certain which answer each of them is.

    The last one may be the beginning of an answer, where the row was cut at cutoff_len; and an answer may be
    the beginning of a labelled text, where it is so long that no more of it was read.
    """
    answers = [(turn, turn.text.strip()) for turn in turns if turn.role == ANSWER]
    said = [text.strip() for text in labelled]
    counts = Counter(text for _, text in answers)
    whole = {text: n for text, n in Counter(said).items() if counts[text]}
    if any(counts[text] != n for text, n in whole.items()):
        return False
    marked = [(turn, text, len(text)) for turn, text in answers if text in whole]
    others = [text for text in said if text not in whole]
    if others:
        begun = [
            (turn, text, min(len(text), len(others[0])))
            for turn, text in answers[len(marked) and answers.index((marked[-1][0], marked[-1][1])) + 1 :]
            if text.startswith(others[0]) or (len(turn.text) < turn.length and others[0].startswith(text))
        ]
        if len(others) > 1 or others[0] != said[-1] or not others[0] or len(begun) != 1:
            return False
        marked += begun
    for turn, text, length in marked:
        turn.begin = turn.text.index(text)
        turn.end = turn.begin + length
    return True
