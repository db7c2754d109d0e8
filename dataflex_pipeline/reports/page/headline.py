"""The headline of a report: what was selected, what changed by it, and whether the target loss fell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dataflex_pipeline.errors import RunError
from dataflex_pipeline.reports.charts import POOL
from dataflex_pipeline.reports.comparison import shared_differences
from dataflex_pipeline.reports.records import RunRecord
from dataflex_pipeline.reports.shares import Shares, round_name


@dataclass(frozen=True)
class Figure:
    """One number of the headline. value: as it is written, large. says: what it is of, in words."""

    value: str
    says: str


@dataclass(frozen=True)
class Changed:
    """The category that a selection changed most, or that the target is made of.

    Attributes:
        shares: of its column.
        names: the values that are meant.
        of_target: whether the target is made of them.
        of: the round that it is told of.
    """

    shares: Shares
    names: tuple[str, ...]
    of_target: bool
    of: str

    @property
    def before(self) -> float:
        """Their share in the pool."""
        return self.shares.share(POOL, self.names)

    @property
    def after(self) -> float:
        """Their share in what the round selected."""
        return self.shares.share(self.of, self.names)


def what_changed(
    found: Sequence[Shares], of_target: Sequence[tuple[str, ...]], last: int | None
) -> Changed | None:
    """Return what a round's selection changed.

    That is the share of what the target is made of, in the first column that says that; else of the value
    whose share changed most.

    Args:
        found: the categories. of_target: of each, the values that the target is made of; empty for none.
        last: the round; None where none selected.
    """
    of = round_name(last)
    if last is None or not found or of not in found[0].counts:
        return None
    for each, names in zip(found, of_target, strict=True):
        if names:
            return Changed(each, names, True, of)
    moved = [Changed(each, (name,), False, of) for each in found for name in each.names]
    return max(moved, key=lambda one: abs(one.after - one.before))


def headline(
    record: RunRecord,
    selected: dict[str, Any] | None,
    changed: Changed | None,
    other: RunRecord | None,
) -> list[Figure]:
    """Return the headline, figure by figure.

    Args:
        record: of the run.
        selected: of the last round that selected: number, rows, pool (usable rows), by; None where none did.
        changed: what it changed.
        other: a run to hold the target loss against; None for none.
    """
    found = []
    if selected is not None:
        share = selected["rows"] / (selected["pool"] or 1)
        said = f"{selected['rows']:,} of {selected['pool']:,} usable rows selected by {selected['by']}"
        found.append(Figure(percent(share), f"{said} in round {selected['number']}"))
    else:
        found.append(Figure("0", "rows selected yet"))
    if changed is not None:
        found.append(_shift(changed))
    return [*found, *_losses(record, other)]


def _shift(changed: Changed) -> Figure:
    listed = ", ".join(changed.names[:3]) + (f" and {len(changed.names) - 3} more" * (len(changed.names) > 3))
    what = f"{changed.shares.title} {listed}"
    if changed.of_target:
        what += ", which the target is made of"
    return Figure(
        f"{percent(changed.before)} \N{RIGHTWARDS ARROW} {percent(changed.after)}",
        f"{what}: share of the pool, and of what {changed.of} selected",
    )


def _losses(record: RunRecord, other: RunRecord | None) -> list[Figure]:
    losses = record.evaluations()
    if not losses:
        none = f"no target loss was measured here to hold against {other.name}" if other is not None else ""
        return [Figure("-", none)] if other is not None else []
    first, last = min(losses), max(losses)
    found = []
    if first != last:
        change = losses[last] / losses[first] - 1
        verb = "fell" if change < 0 else "rose" if change > 0 else "did not change"
        found.append(
            Figure(
                f"{losses[first]:.3f} \N{RIGHTWARDS ARROW} {losses[last]:.3f}",
                f"target loss {verb} by {percent(abs(change))} from step {first:,} to {last:,} "
                "(nats per token)",
            )
        )
    if other is not None:
        found.append(_against(record, other))
    return found


def _against(record: RunRecord, other: RunRecord) -> Figure:
    """Hold the target loss against another run's, at the last step at which both were evaluated."""
    mine, theirs = record.evaluations(), other.evaluations()
    common = sorted(set(mine) & set(theirs))
    if not common:
        return Figure("-", f"target loss beside {other.name}: the two were evaluated at no step in common")
    step = common[-1]
    change = mine[step] - theirs[step]
    word = "below" if change < 0 else "above" if change > 0 else "the same as"
    return Figure(
        f"{mine[step]:.3f} vs {theirs[step]:.3f}",
        f"target loss {word} that of {other.name} (selected by {other.method}) at step {step:,}",
    )


def check_comparable(record: RunRecord, other: RunRecord) -> None:
    """Refuse to hold a run against one that differs in more than its method and seed.

    Raises:
        RunError: it does, or one of the two is not trained.
    """
    number = min(record.last, other.last)
    if number not in record.markers or number not in other.markers:
        raise RunError(
            f"{other.name} was given with --against, and one of the two runs is not trained.",
            "What is held against each other is the target loss.",
            "Train both, or leave --against out.",
        )
    found = shared_differences([record, other], number)
    if found:
        raise RunError(
            f"{record.name} and {other.name} differ in more than method and seed: {'; '.join(found)}.",
            "A difference between their target losses could come from that.",
            "Name a run made with the same settings, such as the same command with --method random.",
        )


def percent(share: float) -> str:
    """Return a share in percent, with a digit behind the point where it is small."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
