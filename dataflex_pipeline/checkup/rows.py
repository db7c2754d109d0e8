"""Checks of rows as they are trained on: their first tokens, and those that carry loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dataflex_pipeline.api import Split
from dataflex_pipeline.checkup.findings import Finding
from dataflex_pipeline.data.chat.labelled import rows_lack
from dataflex_pipeline.data.chat.piece_tokens import puts_bos
from dataflex_pipeline.data.formats.marks import UNTRAINED
from dataflex_pipeline.data.limits import TokenLimits
from dataflex_pipeline.data.rows import NOTE_SEPARATOR, Tally
from dataflex_pipeline.schemas import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dataflex_pipeline.data.chat.labelled import ChatFormat

MANY_CUT = 0.2
EXAMPLE_TOKENS = 400


def check_rows(rows: pa.Table, chat: ChatFormat, cutoff_len: int, *, mask_history: bool) -> Iterator[Finding]:
    """Yield what there is to say about prepared rows.

    Args:
        rows: some prepared rows. chat: tokenizer and template that they were made with.
        cutoff_len: tokens kept of a row. mask_history: whether only the last turn carries loss.
    """
    lines = rows.select(["row", "input_ids", "labels", "messages", "valid", "reason", "note"]).to_pylist()
    valid = [line for line in lines if line["valid"]]
    yield _usable(lines, valid)
    if not valid:
        return
    yield from _notes(lines)
    yield check_begin([line["input_ids"] for line in valid], chat.tokenizer)
    whole = [line for line in valid if len(line["input_ids"]) < cutoff_len]
    yield _cut(len(valid), len(whole), cutoff_len)
    if whole:
        yield check_labels(whole, chat.tokenizer, mask_history=mask_history)
        yield _check_end(whole, chat)


def _finding(check: str, bad: bool, found: str, advice: str, state: Any = "problem") -> Finding:
    return Finding(check, state if bad else "ok", found, advice if bad else "", "configuration")


def _usable(lines: Sequence[Mapping[str, Any]], valid: Sequence[Mapping[str, Any]]) -> Finding:
    found = f"{len(valid)} of the first {len(lines)} rows can be used"
    reasons = sorted({line["reason"] for line in lines if not line["valid"]})
    if reasons:
        found += f"; not usable: {'; '.join(reasons[:3])}"
    advice = "Correct the data or the settings that the reasons name."
    return _finding("rows", bool(reasons), found, advice, "warning" if valid else "problem")


def _notes(lines: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Yield one finding for each thing that rows have and that is passed over, or read otherwise."""
    counts = Counter(note for line in lines if line["note"] for note in line["note"].split(NOTE_SEPARATOR))
    for note, count in counts.most_common():
        found = f"{count} of the first {len(lines)} rows: {note}"
        yield _finding("notes", True, found, "Check that this is what you want.", "warning")


def check_limits(
    rows: pa.Table, chat: ChatFormat, limits: TokenLimits, cutoff_len: int, split: Split
) -> Iterator[Finding]:
    """Yield whether the model has positions and tokens enough for prepared rows.

    Args:
        rows: some prepared rows. chat: tokenizer that they were made with. limits: what the model takes.
        cutoff_len: tokens kept of a row. split: pool or target.

    Raises:
        DataError: it has not.
    """
    tally = Tally()
    tally.add(rows, cutoff_len)
    limits.check(tally.summary(), split, chat.token_text)
    for line in limits.notices(tally.summary(), split):
        yield _finding("positions", True, line, "Set cutoff_len, or leave it.", "warning")


def check_begin(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Check that rows begin with the beginning-of-sequence token once, where the tokenizer has one.

    Args:
        rows: token ids. tokenizer: theirs.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return _finding("beginning", False, "the tokenizer has no beginning-of-sequence token", "")
    counts = [next((i for i, token in enumerate(ids) if token != bos), len(ids)) for ids in rows]
    name, twice, never = tokenizer.bos_token, sum(n > 1 for n in counts), counts.count(0)
    if twice:
        advice = "Choose a named template, or take the token out of the model's own chat template."
        return _finding(
            "beginning", True, f"{twice} of {len(rows)} rows begin with {name} more than once", advice
        )
    if never == len(rows) and puts_bos(tokenizer):
        advice = "Choose the template of the model's family, unless the model was made without it."
        return _finding("beginning", True, rows_lack(name), advice, "warning")
    if 0 < never < len(rows):
        found = f"{never} of {len(rows)} rows lack {name}, and the others begin with it"
        return _finding("beginning", True, found, "Some rows do and some do not: check the template.")
    nothing = f"no row begins with {name}, nor does any other text"
    return _finding("beginning", False, nothing if never else f"every row begins with {name}, once", "")


def _cut(n_valid: int, n_whole: int, cutoff_len: int) -> Finding:
    cut = n_valid - n_whole
    found = f"{cut} of {n_valid} rows reach cutoff_len {cutoff_len}"
    advice = "What is over is cut off, ends of responses included: raise cutoff_len."
    return _finding("length", cut > MANY_CUT * n_valid, found, advice, "warning")


def spans(input_ids: Sequence[int], labels: Sequence[int]) -> list[tuple[list[int], bool]]:
    """Return a row's token ids in stretches, each with whether it carries loss."""
    return [
        ([token for token, _ in stretch], labelled)
        for labelled, stretch in groupby(
            zip(input_ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED
        )
    ]


def check_labels(
    lines: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, mask_history: bool
) -> Finding:
    """Check that exactly the assistant's words carry loss: labels decode to them, turn by turn.

    Args:
        lines: whole rows: row, input_ids, labels, messages. tokenizer: theirs.
        mask_history: whether only the last turn carries loss; of rows whose note tells of turns that are not
            trained on, only some of the answers carry it. Rows with tools are passed over, since each
            family writes calls in its own way.
    """
    plain = [line for line in lines if all(turn["role"] != "tool" for turn in line["messages"])]
    wrong = []
    for line in plain:
        answers = [turn["content"] for turn in line["messages"] if turn["role"] == "assistant"]
        expected = [_squeezed(text) for text in (answers[-1:] if mask_history else answers)]
        labelled = [ids for ids, carries in spans(line["input_ids"], line["labels"]) if carries]
        decoded = [_squeezed(tokenizer.decode(ids)) for ids in labelled]
        if not _match(decoded, expected, some=UNTRAINED in (line.get("note") or "")):
            wrong.append(line["row"])
    if wrong:
        found = f"in {len(wrong)} of {len(plain)} rows other words carry loss than the assistant's"
        found += f" (row {wrong[0]})"
        advice = "See the example below; choose the template of the model's family."
        # A tokenizer that does not give every text back as it was is no mistake of the template.
        return _finding(
            "labels", True, found, advice, "problem" if 2 * len(wrong) > len(plain) else "warning"
        )
    return _finding("labels", False, f"in {len(plain)} rows the labels decode to the assistant's words", "")


def _match(decoded: Sequence[str], expected: Sequence[str], *, some: bool) -> bool:
    """Whether the labelled stretches are the expected answers: each one, or ``some`` of them in order."""
    if not some:
        return len(decoded) == len(expected) and all(map(str.__contains__, decoded, expected))
    answers = iter(expected)
    return bool(decoded) and all(any(answer in text for answer in answers) for text in decoded)


def _squeezed(text: str) -> str:
    """Return a text without white space, which tokenizers do not all give back alike."""
    return "".join(text.split())


def _check_end(lines: Sequence[Mapping[str, Any]], chat: ChatFormat) -> Finding:
    """Check that the last answers end with a token that is learnt as their end (`ChatFormat.is_ended`)."""
    labelled = [[token for token in line["labels"] if token != IGNORED] for line in lines]
    ends = Counter(ids[-1] for ids in labelled if chat.is_ended(ids))
    stops = [token for token, _ in ends.most_common()] or chat.stop_ids[-1:]
    if not stops:
        found = "neither template nor tokenizer has a token that ends a response"
        return _finding(
            "end", True, found, "The model does not learn to stop: choose a named template.", "warning"
        )
    names = " or ".join(chat.tokenizer.decode([token]) for token in stops)
    ended = ends.total()
    found = f"{ended} of {len(lines)} responses end with {names}, and learn it"
    return _finding("end", ended < len(lines), found, "The model may not learn to stop.", "warning")


def example(rows: pa.Table, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return one usable row as its stretches of text, each with whether it carries loss.

    The first row that is not too long to look at; else the beginning of the first one.
    """
    lines = rows.select(["input_ids", "labels", "valid"]).to_pylist()
    valid = [line for line in lines if line["valid"]]
    if not valid:
        return []
    short = (line for line in valid if len(line["input_ids"]) <= EXAMPLE_TOKENS)
    line = next(short, valid[0])
    found = spans(line["input_ids"][:EXAMPLE_TOKENS], line["labels"][:EXAMPLE_TOKENS])
    return [{"text": tokenizer.decode(ids), "carries_loss": carries} for ids, carries in found]
