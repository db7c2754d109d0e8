"""Columns of a source that are passed over, or read in one of several ways, in words and in counts.

Columns that other tools give a meaning to (`MEANINGS`) and that are not read here are never passed over
without a word: each is one sentence, and a number of rows in the table's summary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dataflex_pipeline.data.formats.layout import FOUND_BY_NAME, MEDIA_ROLES, Layout, lists_columns
from dataflex_pipeline.data.settings import Row
from dataflex_pipeline.data.sources.columns import ColumnTypes, is_filled, turns_of
from dataflex_pipeline.data.sources.named import Source
from dataflex_pipeline.errors import did_you_mean

_WEIGHT = "the row's weight in the loss; here weights come from the selection"
_MASK = "which tokens carry loss; here these are the assistant's"
_TOKENS = "a row that is tokenised already; here rows are tokenised from their text"
_SYSTEM = "the system prompt"
_REASONING = "the reasoning before the answer"
_TOOLS = "definitions of tools that the answer may call"
_PROMPT, _ANSWER, _TURNS = "the prompt, or a part of it", "the answer", "the turns of a conversation"

MEANINGS: Mapping[str, str] = {
    **dict.fromkeys(("weights", "sample_weight", "loss_weight", "loss_scale"), _WEIGHT),
    **dict.fromkeys(("loss_mask", "completion_mask", "assistant_masks", "assistant_mask"), _MASK),
    **dict.fromkeys(("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids"), _TOKENS),
    **dict.fromkeys(("prompt_ids", "completion_ids"), _TOKENS),
    "chosen": "the better answer of a preference pair",
    **dict.fromkeys(("system", "system_prompt", "system_message"), _SYSTEM),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking", "thought"), _REASONING),
    **dict.fromkeys(("tools", "functions", "available_tools"), _TOOLS),
    **dict.fromkeys(("instruction", "input", "prompt", "query", "question"), _PROMPT),
    **dict.fromkeys(("context", "document", "passage", "article", "knowledge"), _PROMPT),
    **dict.fromkeys(("output", "completion", "response", "answer"), _ANSWER),
    **dict.fromkeys(("messages", "conversations", "conversation", "dialog"), _TURNS),
    "history": "earlier turns, as [prompt, response] pairs",
    "text": "the whole text of the row",
    "split": "the split that the row belongs to",
    "loss": "whether the row carries loss",
    "train": "whether the row is trained on",
    "trainable": "whether the row is trained on",
    "objects": "places in images",
}
"""Columns by name: what they are to other tools. Others are noted on each row that fills them."""

_NOTED_AS_LISTS = {"input_ids", "labels", "completion_mask", "assistant_masks", "loss_mask"}
_NOTED_IN_ALPACA = {"reasoning", "reasoning_content", "thinking"}
_FORMS = (("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion"))
_Plan = tuple[tuple[tuple[str, ...], ...], str, tuple[str, ...]]
_MOST_PLANS = 10_000


@dataclass
class Together:
    """Sees every row of the first pass, and then knows which columns rows fill at the same time.

    Attributes:
        forms: the formats whose columns are filled, by their last column -> rows.
        systems: column of turns that begin with a system turn, beside a filled system column -> rows.
    """

    source: Source
    forms: Counter[tuple[str, ...]] = field(default_factory=Counter)
    systems: Counter[str] = field(default_factory=Counter)
    _of_keys: dict[tuple[str, ...], _Plan] = field(default_factory=dict)

    def see(self, row: Row) -> None:
        """Take note of one row."""
        keys = tuple(row)
        forms, system, turns = self._of_keys.get(keys) or self._plan(keys)
        if len(forms) > 1:
            filled = tuple(form[-1] for form in forms if all(is_filled(row[name]) for name in form))
            if len(filled) > 1:
                self.forms[filled] += 1
        if turns and is_filled(row[system]):
            for name in turns:
                if _begins_with_system(row[name]):
                    self.systems[name] += 1

    def _plan(self, keys: tuple[str, ...]) -> _Plan:
        """Return what rows with some keys may fill: formats, a system column, columns of turns."""
        columns = self.source.columns
        system = columns.get("system", "system")
        turns = {columns.get("messages", "messages"), "messages", "conversations", "prompt"}
        forms = tuple(form for form in _FORMS if set(form) <= set(keys))
        plan = (forms, system, tuple(sorted(turns & set(keys))) if system in keys else ())
        if len(self._of_keys) < _MOST_PLANS:
            self._of_keys[keys] = plan
        return plan


def _begins_with_system(value: Any) -> bool:
    turns = turns_of(value)
    return bool(turns) and "system" in (turns[0].get("role"), turns[0].get("from"))  # type: ignore[index]


@dataclass(frozen=True)
class PassedOver:
    """What is said of a source's columns, one sentence each, and the rows that fill what is not read."""

    notices: tuple[str, ...]
    rows: Mapping[str, int]


def passed_over(source: Source, layout: Layout, seen: ColumnTypes, together: Together) -> PassedOver:
    """Return what of the columns of a source is not read, or not as one might think.

    Args:
        source: with what is declared for it. layout: how it is read. seen, together: all of its rows.
    """
    rows: dict[str, int] = {}
    lines = [
        *_declared(source, layout, seen),
        *_unread(source, layout, seen, rows),
        *_double(layout, together, rows),
    ]
    if not source.columnar and seen.odd:
        lines.append(
            f"{_columns(seen.odd)} NaN or Infinity, which JSON does not have; they are kept as such numbers"
        )
    return PassedOver(tuple(f"data set '{source.given}': {line}" for line in lines), rows)


def _columns(names: Mapping[str, Any]) -> str:
    quoted = ", ".join(f"'{name}'" for name in names)
    return f"the column {quoted} holds" if len(names) == 1 else f"the columns {quoted} hold"


def _declared(source: Source, layout: Layout, seen: ColumnTypes) -> Iterator[str]:
    if source.formatting is not None and not lists_columns(source):
        for role in FOUND_BY_NAME:
            if role not in source.columns and role in layout.columns and seen.filled[role]:
                yield f"its entry lists no columns; the column '{role}' is read as what it is named"
    for role, name in source.columns.items():
        if name not in seen.kinds:
            near = did_you_mean(name, seen.kinds)
            yield f"columns says {role}: {name}, and no row has a column '{name}', so there is none.{near}"
        elif role in MEDIA_ROLES and not seen.filled[name]:
            yield f"columns says {role}: {name}, and '{name}' is empty in every row, so rows are read as text"


def _unread(source: Source, layout: Layout, seen: ColumnTypes, rows: dict[str, int]) -> Iterator[str]:
    read = {name for each in layout.all for name in (*each.columns.values(), *each.beside.values())}
    read |= _NOTED_IN_ALPACA if layout.kind != "conversation" else {"functions"}
    read |= {name for name in _NOTED_AS_LISTS if isinstance(seen.samples.get(name), list)}
    for name in seen.kinds:
        meaning = MEANINGS.get(name.lower())
        if name in read or meaning is None or not seen.filled[name]:
            continue
        rows[name] = seen.filled[name]
        listed = " (columns does not list it)" if lists_columns(source) else ""
        yield f"the column '{name}' is not used{listed}; elsewhere it is {meaning}"


def _double(layout: Layout, together: Together, rows: dict[str, int]) -> Iterator[str]:
    """Say which columns win where rows fill several."""
    read = {name for each in layout.all for name in each.columns.values()}
    lost: dict[tuple[str, str], int] = Counter()
    for forms, count in together.forms.items():
        won, *others = [form for form in forms if form in read] or [""]
        for other in others:
            lost[other, won] += count
    for (other, won), count in lost.items():
        rows[other] = rows.get(other, 0) + count
        yield f"some rows fill both '{won}' and '{other}'; '{won}' is read there"
    for each in layout.all:
        name = each.columns.get("messages", each.columns.get("prompt", ""))
        if together.systems[name] and "system" in each.columns:
            system = each.columns["system"]
            rows[system] = rows.get(system, 0) + together.systems[name]
            yield f"some rows begin with a system turn and fill '{system}' too; the turn is read there"
