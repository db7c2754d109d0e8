"""Comparison of methods at equal budget: target, cost, likeness, and what else the runs differ in.

Runs are grouped by method; runs of one method differ in their seed. A difference to the baseline is paired
by seed, and tested by a paired t-test where at least two seeds are common to both (with few seeds its power
is small: a large p says little). Alike means two things: the share of selected rows in common, |A and B| /
|A or B|, and Spearman's rank correlation of the scores of the same round and seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex_pipeline.errors import RunError
from dataflex_pipeline.evaluation.figures import Figure
from dataflex_pipeline.reports.likeness import between_methods, correlation, overlap
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.store.stale import found_ingredients
from dataflex_pipeline.store.tables import TableFile

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
    found = shared_differences([record for group in groups.values() for record in group.values()], number)
    for method, group in groups.items():
        runs = list(group.values())
        found += _between(runs, [_own(record, method, number) for record in runs])
    return list(dict.fromkeys(found))


def shared_differences(records: Sequence[RunRecord], number: int) -> list[str]:
    """Return what differs, of what has to be the same for all methods, in rounds up to ``number``."""
    found = list(_between(records, [_shared(record, number) for record in records]))
    return list(dict.fromkeys([*found, *_evaluations(records, number)]))


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


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds of a method. Attributes: values by seed."""

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(list(self.values.values())))

    @property
    def low(self) -> float:
        """Smallest over the seeds."""
        return min(self.values.values())

    @property
    def high(self) -> float:
        """Largest over the seeds."""
        return max(self.values.values())

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        by_seed = {str(seed): value for seed, value in self.values.items()}
        return {"mean": self.mean, "min": self.low, "max": self.high, "by_seed": by_seed}


@dataclass(frozen=True)
class Paired:
    """A method's difference to the baseline, seed by seed.

    Attributes:
        difference: mean of (method - baseline). p: of the paired t-test; None where it cannot be made.
        n: seeds in common.
    """

    difference: float
    p: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        round, step, positions: where the runs are compared, and what each had trained on by then.
        methods: in the order given. baseline: one of them, or None.
        figures: figure -> method -> spread over the seeds.
        paired: figure -> method -> difference to the baseline.
        target_loss: step -> method -> mean target loss over the seeds, nats per token.
        overlap: (method, method) -> mean share of selected rows in common, rounds 1..round.
        correlation: (method, method) -> mean rank correlation of the scores of ``round``, where both vary.
        base_model: label -> figure -> value, of the model before any training; empty where not evaluated.
        notes: what has to be said.
    """

    round: int
    step: int
    positions: int
    methods: tuple[str, ...]
    baseline: str | None
    figures: Mapping[str, Mapping[str, Spread]]
    paired: Mapping[str, Mapping[str, Paired]]
    target_loss: Mapping[int, Mapping[str, float]]
    overlap: Mapping[tuple[str, str], float]
    correlation: Mapping[tuple[str, str], float]
    base_model: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]

    def _repr_html_(self) -> str:
        """Return the figures by method, for a notebook."""
        from dataflex_pipeline.reports.displays import comparison_html

        return comparison_html(self)

    def plain(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "round": self.round,
            "step": self.step,
            "positions": self.positions,
            "methods": list(self.methods),
            "baseline": self.baseline,
            "not_the_same": list(self.notes),
            "base_model": {label: dict(figures) for label, figures in self.base_model.items()},
            "figures": {n: {m: s.plain() for m, s in by.items()} for n, by in self.figures.items()},
            "paired": {
                n: {m: {"difference": p.difference, "p": p.p, "seeds": p.n} for m, p in by.items()}
                for n, by in self.paired.items()
            },
            "target_loss": {str(step): by for step, by in self.target_loss.items()},
            "overlap": [{"methods": list(pair), "value": value} for pair, value in self.overlap.items()],
            "rank_correlation": [{"methods": list(pair), "value": v} for pair, v in self.correlation.items()],
        }


def compare(
    records: Sequence[RunRecord], baseline: str | None = None, *, allow_different: bool = False
) -> Comparison:
    """Compare runs at the last round that all of them finished.

    Args:
        records: the runs. baseline: a method; by default ``random``, where it is among them.
        allow_different: go on where pools, targets, models or budgets differ, and say so.

    Raises:
        RunError: the runs cannot be compared: they differ in more than method and seed, two are of the same
            method and seed, one changed its method, or fewer than two were given.
    """
    if len(records) < 2:
        raise RunError(
            f"{len(records)} run was given.", "A comparison takes at least two.", "Name another run."
        )
    number = min(record.last for record in records)
    groups = _grouped(records, number)
    notes = differences(groups, number)
    if notes and not allow_different:
        raise RunError(
            "The runs differ in more than the method and the seed: " + "; ".join(notes) + ".",
            "A difference between their results could come from that.",
            "Compare runs made with the same settings, or add --allow-different to see the figures anyway.",
        )
    methods = tuple(groups)
    chosen = baseline if baseline is not None else ("random" if "random" in groups else None)
    if chosen is not None and chosen not in groups:
        raise RunError(
            f"--baseline is {chosen}.",
            f"None of the runs is of that method; they are of {', '.join(methods)}.",
            "Name one of those.",
        )
    figures = _figures(groups, number)
    base, said = _base_models(records, number)
    others = [method for method in methods if method != chosen]
    paired = {
        name: {m: _paired(by[m], by[chosen]) for m in others if m in by}
        for name, by in figures.items()
        if chosen is not None and chosen in by
    }
    first = records[0]
    steps = first.step(number)
    return Comparison(
        round=number,
        step=steps,
        positions=steps * first.global_batch,
        methods=methods,
        baseline=chosen,
        figures=figures,
        paired=paired,
        target_loss=_target_loss(groups, number),
        overlap=between_methods(groups, lambda a, b: overlap(a, b, number)),
        correlation=between_methods(groups, lambda a, b: correlation(a, b, number)),
        base_model=base,
        notes=(*notes, *said),
    )


def _grouped(records: Sequence[RunRecord], number: int) -> dict[str, dict[int, RunRecord]]:
    """Return the runs by seed and by the method that selected their rounds up to ``number``."""
    groups: dict[str, dict[int, RunRecord]] = {}
    for record in records:
        method = record.selected_by(number)
        group = groups.setdefault(method, {})
        if record.seed in group:
            raise RunError(
                f"{record.name} and {group[record.seed].name} are both of {method}, seed {record.seed}.",
                "Runs of one method are told apart by their seed.",
                "Leave one of them out, or run it with another seed.",
            )
        group[record.seed] = record
    return groups


def _figures(groups: Mapping[str, Mapping[int, RunRecord]], number: int) -> dict[str, dict[str, Spread]]:
    """Return figure -> method -> spread, for every figure that each run of the method has."""
    figures: dict[str, dict[str, Spread]] = {}
    for method, runs in groups.items():
        found = {seed: _figures_of(record, number) for seed, record in runs.items()}
        shared = set.intersection(*(set(each) for each in found.values()))
        for name in (name for name in next(iter(found.values())) if name in shared):
            spread = Spread({seed: each[name] for seed, each in found.items()})
            figures.setdefault(name, {})[method] = spread
    return figures


def _figures_of(record: RunRecord, number: int) -> dict[str, float]:
    """Return a run's figures at the end of a round: the target's, then those of `evaluate`, then the cost."""
    result = record.markers[number].result or {}
    figures = {
        f"target {name.removeprefix('eval_')}": float(v) for name, v in result.get("metrics", {}).items()
    }
    figures |= {f"evaluated {each.task} {each.metric}": each.value for each in record.evaluated(number)}
    trained = sum((record.markers[r].result or {}).get("seconds", 0.0) for r in range(number + 1))
    gpu_hours = record.gpu_hours(number)
    return figures | {
        "tokens trained on": float(sum(record.tokens(r) for r in range(number + 1))),
        "seconds scoring": record.seconds("score", number),
        "seconds selecting": record.seconds("select", number),
        "seconds training": float(trained),
        **({} if gpu_hours is None else {"GPU hours": gpu_hours}),
    }


BASE_MODEL = "base model"
"""What the row of the model before any training is called."""


def _base_models(records: Sequence[RunRecord], number: int) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return label -> figure -> value of the runs' base models, and what of them does not fit, in words.

    Runs of one base model share a row. A figure over other rows, or made with other settings, than the runs'
    own of that name is left out.
    """
    evaluated = [record for record in records if record.run.base_metrics.is_file()]
    models = [TableFile(record.run.base_metrics).fingerprint for record in evaluated]
    own = [figure for record in records for figure in record.evaluated(number)]
    kinds: dict[tuple[str, str], set[tuple[str | None, str | None]]] = {}
    for figure in own:
        kinds.setdefault((figure.task, figure.metric), set()).add((figure.settings, figure.rows))
    found: dict[str, dict[str, float]] = {}
    said: list[str] = []
    for record, model in zip(evaluated, models, strict=True):
        several = len(set(models)) > 1
        label = f"{BASE_MODEL} of {evaluated[models.index(model)].name}" if several else BASE_MODEL
        for figure in record.base_evaluated():
            fits = kinds.get((figure.task, figure.metric))
            if fits is not None and (figure.settings, figure.rows) not in fits:
                said.append(
                    f"settings or rows of {record.name}'s {BASE_MODEL}: {figure.task} {figure.metric}"
                )
                continue
            name = f"evaluated {figure.task} {figure.metric}"
            found.setdefault(label, {}).setdefault(name, figure.value)
    return found, said


def _paired(of: Spread, baseline: Spread) -> Paired:
    """Return the mean difference over common seeds, and the p of a paired t-test."""
    from scipy.stats import ttest_rel

    seeds = [seed for seed in of.values if seed in baseline.values]
    ours, theirs = ([spread.values[seed] for seed in seeds] for spread in (of, baseline))
    if not seeds:
        return Paired(of.mean - baseline.mean, None, 0)
    differences = np.subtract(ours, theirs)
    varies = len(seeds) > 1 and float(np.ptp(differences)) > 0
    return Paired(
        float(differences.mean()), float(ttest_rel(ours, theirs).pvalue) if varies else None, len(seeds)
    )


def _target_loss(groups: Mapping[str, Mapping[int, RunRecord]], number: int) -> dict[int, dict[str, float]]:
    """Return step -> method -> mean target loss, at the steps where every run of the method was evaluated."""
    curves: dict[int, dict[str, float]] = {}
    for method, runs in groups.items():
        found = [record.evaluations() for record in runs.values()]
        last = max(record.step(number) for record in runs.values())
        for step in sorted(set.intersection(*(set(each) for each in found))):
            if step <= last:
                curves.setdefault(step, {})[method] = float(np.mean([each[step] for each in found]))
    return dict(sorted(curves.items()))
