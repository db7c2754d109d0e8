"""What compared runs differ in beside method and seed, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dataflex_pipeline.evaluation.figures import Figure
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.store.stale import found_ingredients

BUDGET = ("num_samples", "fraction", "token_budget", "weights", "source_quotas")
"""Settings of the draw that must be the same for every method; the others belong to the method."""
OF_RUN = ("seed", "positions")
"""Settings of the draw that follow from the seed, the steps and the batch."""

Settings = dict[str, Any]


def differences(groups: Mapping[str, Mapping[int, RunRecord]], number: int) -> list[str]:
    """Return what differs between runs in rounds up to ``number``.

    All runs are held against the first one; runs of one method also in how it was set and how its rows were
    drawn.

    Args:
        groups: the runs by method and seed. number: the round that they are compared at.
    """
    everybody = [record for group in groups.values() for record in group.values()]
    found = list(_between(everybody, [_shared(record, number) for record in everybody]))
    found += _evaluations(everybody, number)
    for method, group in groups.items():
        runs = list(group.values())
        found += _between(runs, [_own(record, method, number) for record in runs])
    return list(dict.fromkeys(found))


def _between(records: Sequence[RunRecord], settings: Sequence[Settings]) -> Iterator[str]:
    for record, given in zip(records[1:], settings[1:], strict=True):
        for what in [*settings[0], *(key for key in given if key not in settings[0])]:
            one, other = settings[0].get(what), given.get(what)
            if one == other:
                continue
            shown = what not in ("pool", "target", "model")  # fingerprints say nothing to a reader
            names = (records[0].name, record.name)
            yield (
                f"{what} ({names[0]}: {one}, {names[1]}: {other})"
                if shown
                else (f"{what} (of {names[0]} and {names[1]})")
            )


def _shared(record: RunRecord, number: int) -> Settings:
    """Return what runs of different methods must have in common."""
    made_from = record.markers[number].ingredients
    found = {
        "pool": made_from["pool"],
        "target": made_from["target"],
        "model": made_from["model"],
        f"optimizer steps up to round {number}": record.step(number),
        "rows per step": made_from["global_batch"],
        **{key: value for key, value in made_from["training"].items() if "seed" not in key},
    }
    drawn = [_draw(record, each) for each in range(1, number + 1)]
    return found | {key: _of_rounds([draw.get(key) for draw in drawn]) for key in BUDGET}


def _evaluations(records: Sequence[RunRecord], number: int) -> Iterator[str]:
    """Tell of figures that two runs have, over other rows or made with other settings."""
    first: dict[tuple[str, str], tuple[str, Figure]] = {}
    for record in records:
        for figure in record.evaluated(number):
            name, one = first.setdefault((figure.task, figure.metric), (record.name, figure))
            for what in ("settings", "rows"):
                if getattr(one, what) != getattr(figure, what):
                    yield f"{what} of evaluated {figure.task} {figure.metric} (of {name} and {record.name})"


def _own(record: RunRecord, method: str, number: int) -> Settings:
    """Return what runs of one method must have in common beside that."""
    rounds = []
    for each in range(1, number + 1):
        draw = {key: value for key, value in _draw(record, each).items() if key not in (*BUDGET, *OF_RUN)}
        scores = record.round(each).scores(method)
        made_from = (found_ingredients(scores) or {}) if scores.is_file() else {}
        params = {f"{method}.{key}": value for key, value in _leaves(made_from.get("params", {}))}
        rounds.append(draw | params)
    keys = dict.fromkeys(key for found in rounds for key in found)
    return {key: _of_rounds([found.get(key) for found in rounds]) for key in keys}


def _of_rounds(values: Sequence[Any]) -> Any:
    """Return the value of all rounds, or the list of them where they differ."""
    return values[0] if values and all(value == values[0] for value in values) else list(values)


def _draw(record: RunRecord, number: int) -> Settings:
    made_from = found_ingredients(record.round(number).index) or {}
    draw: Settings = made_from.get("draw", {})
    return draw


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, each in value.items():
        if isinstance(each, Mapping) and each:
            yield from _leaves(each, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", each
