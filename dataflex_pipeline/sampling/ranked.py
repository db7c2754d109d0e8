"""Selections that are not random: the best rows by score, and groups that take turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataflex_pipeline.sampling.rows import Block, Rows
from dataflex_pipeline.sampling.selection import (
    Selection,
    check_budget,
    containers,
    label,
    nothing_to_draw,
    strata,
)
from dataflex_pipeline.sampling.settings import DrawSettings
from dataflex_pipeline.sampling.smallest import Kept, Smallest
from dataflex_pipeline.sampling.uniforms import Floats, Integers


def top_k(rows: Rows, settings: DrawSettings, amounts: Sequence[int]) -> tuple[list[Selection], list[str]]:
    """Take the rows with the highest ``score``, ties by row; a row without a score is never taken.

    Args:
        rows: with the column ``score``.
        settings: of the draw.
        amounts: rows, or tokens with a budget, per quota.

    Returns:
        One selection per quota, probabilities 1 / (rows taken over all quotas), and what there is to say:
        a quota with fewer rows than asked for gives all of them.

    Raises:
        DataError: a quota has no row with a score, or its first row is over its budget.
    """
    kept = containers(settings, amounts)
    scored = _offer_all(rows, "score", kept, amounts)
    chosen = [container.finish().rows for container in kept]
    return _finished(chosen, settings, amounts, scored)


def round_robin(
    rows: Rows, settings: DrawSettings, amounts: Sequence[int]
) -> tuple[list[Selection], list[str]]:
    """Let the group columns take turns: each takes its best row that is not taken yet, ties by row.

    A group looks only at rows that it has a value for, and is passed over when it has none left. All rows
    that it looks at are taken, by itself or by others, except the last one; so the best ``amount`` rows
    of each group are all that is held. Arguments, returns and errors are those of ``top_k``.
    """
    groups = settings.group_columns
    kept = [containers(settings, amounts) for _ in groups]
    usable = [0] * len(amounts)
    for block in rows:
        values = [block.values[name] for name in groups]
        for value, containers_of_group in zip(values, kept, strict=True):
            _offer(block, value, containers_of_group, amounts)
        any_value = block.valid & ~np.all([np.isnan(value) for value in values], axis=0)
        for i, places in enumerate(strata(block, any_value, len(amounts))):
            usable[i] += len(places)
    chosen = [
        _take_turns([by_quota[i].finish() for by_quota in kept], amount, settings.token_budget is not None)
        if amount
        else np.empty(0, np.int64)
        for i, amount in enumerate(amounts)
    ]
    return _finished(chosen, settings, amounts, usable)


def _offer_all(rows: Rows, name: str, kept: list[Smallest], amounts: Sequence[int]) -> list[int]:
    """Offer every row that has a value to its quota; return how many each quota has."""
    usable = [0] * len(amounts)
    for block in rows:
        for i, count in enumerate(_offer(block, block.values[name], kept, amounts)):
            usable[i] += count
    return usable


def _offer(block: Block, value: Floats, kept: list[Smallest], amounts: Sequence[int]) -> list[int]:
    counts = []
    for i, places in enumerate(strata(block, block.valid & ~np.isnan(value), len(amounts))):
        counts.append(len(places))
        if amounts[i]:
            keys = -value[places]
            costs = None if block.tokens is None else block.tokens[places]
            kept[i].offer(places + block.start, keys, keys, costs)
    return counts


def _take_turns(groups: list[Kept], amount: int, budgeted: bool) -> Integers:
    """Return the rows in the order taken, at most ``amount`` rows or tokens of them.

    Args:
        groups: each group's rows, best first.
        amount: rows to take, or tokens with ``budgeted``.
        budgeted: whether ``amount`` counts tokens.
    """
    lists = [group.rows.tolist() for group in groups]
    costs = [
        group.costs.tolist() if budgeted and group.costs is not None else [1] * len(rows)
        for group, rows in zip(groups, lists, strict=True)
    ]
    places = [0] * len(groups)
    taken: dict[int, None] = {}
    spent, idle, turn = 0, 0, 0
    while idle < len(groups):
        group = turn % len(groups)
        turn += 1
        while places[group] < len(lists[group]) and lists[group][places[group]] in taken:
            places[group] += 1
        if places[group] == len(lists[group]):
            if not groups[group].complete:
                break  # its next row was left out because everything before it uses the amount up
            idle += 1
            continue
        spent += costs[group][places[group]]
        if spent > amount:
            break
        taken[lists[group][places[group]]] = None
        idle = 0
    return np.fromiter(taken, np.int64, len(taken))


def _finished(
    chosen: list[Integers], settings: DrawSettings, amounts: Sequence[int], usable: list[int]
) -> tuple[list[Selection], list[str]]:
    total = sum(map(len, chosen))
    selections = [Selection(rows, np.full(len(rows), 1 / max(1, total))) for rows in chosen]
    if settings.token_budget is not None:
        return selections, check_budget(selections, settings, amounts, usable)
    notices = []
    for i, (amount, there) in enumerate(zip(amounts, usable, strict=True)):
        if amount and not there:
            raise nothing_to_draw(settings, i, "has a score")
        if amount > there:
            notices.append(
                f"{label(settings, i)}{amount} rows were asked for and {there} have a score: all are taken."
            )
    return selections, notices
