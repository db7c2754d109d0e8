"""Leaks: rows of the target that are in the pool too, word for word or nearly.

Two rows are near-duplicates where their turns have the same roles and the same words in the same order: text
in lower case (Unicode's case folding, compatibility forms composed), cut at white space and punctuation. A
sign before a number is a word of its own, so that 2 - 2 and 2 + 2 are told apart. Every row is looked at once
and hashed, so a count takes time linear in the rows and 32 bytes of memory for each row of the target.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.data.conversation import Conversation, content_hash

LEAKS_SHOWN = 3
_WORDS = re.compile(r"\w+|[-+*/=<>^%](?=\s*\d)")


@dataclass
class Overlap:
    """How many rows of the target are in the pool.

    Attributes:
        n_target: rows of the target that were looked at. n_pool: rows of the pool that were.
        exact: target row -> the first pool row that is the same word for word.
        near: target row -> the first pool row that is a near-duplicate; of rows that are not in `exact`.
    """

    n_target: int = 0
    n_pool: int = 0
    exact: dict[int, int] = field(default_factory=dict)
    near: dict[int, int] = field(default_factory=dict)


def words_of(text: str) -> str:
    """Return a text as its words, one space between them: what near-duplicates have in common."""
    return " ".join(_WORDS.findall(unicodedata.normalize("NFKC", text).casefold()))


def overlap(
    target: Iterable[Conversation | None], pool: Iterable[tuple[int, Conversation | None]]
) -> Overlap:
    """Count the rows of the target that are in the pool.

    Args:
        target: its rows in order; None for one that cannot be read.
        pool: number and conversation of its rows.
    """
    found = Overlap()
    places: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for row, conversation in enumerate(target):
        found.n_target += 1
        for table, key in zip(places, _keys(conversation), strict=True):
            table.setdefault(key, []).append(row)
    for row, conversation in pool:
        found.n_pool += 1
        exact, near = _keys(conversation) if conversation is not None else ("", "")
        for each in places[0].get(exact, ()) if exact else ():
            found.exact.setdefault(each, row)
        for each in places[1].get(near, ()) if near else ():
            found.near.setdefault(each, row)
    for row in found.exact:
        found.near.pop(row, None)
    return found


def _keys(conversation: Conversation | None) -> tuple[str, str]:
    """Return the hashes of what is written and of its words; empty for a row that cannot be read."""
    if conversation is None:
        return "", ""
    turns = [[message.role, message.content] for message in conversation.messages]
    return content_hash(turns), content_hash([[role, words_of(text)] for role, text in turns])


def say_leaks(target: BlockTable, pool: BlockTable, say: Callable[[str], None]) -> None:
    """Name target rows that are also in the pool: selecting them would be training on the target."""
    by_id = {
        row_id.as_py(): row.as_py()
        for block in target.blocks(["row", "row_id"])
        for row, row_id in zip(block.column("row"), block.column("row_id"), strict=True)
    }
    ids = pa.array(list(by_id), pa.string())
    leaks: list[tuple[int, int]] = []
    for block in pool.blocks(["row", "row_id"]):
        found = block.filter(pc.is_in(block.column("row_id"), ids))
        leaks += [
            (by_id[i.as_py()], r.as_py())
            for r, i in zip(found.column("row"), found.column("row_id"), strict=True)
        ]
    if leaks:
        shown = ", ".join(f"target row {t} = pool row {p}" for t, p in leaks[:LEAKS_SHOWN])
        more = ", ..." if len(leaks) > LEAKS_SHOWN else ""
        say(f"{len(leaks)} rows of the pool are in the target too: {shown}{more}")
