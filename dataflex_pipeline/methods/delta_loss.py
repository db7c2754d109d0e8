"""Delta loss: a window that slides over the rows sorted by how much their loss fell.

The first selection keeps the loss l_init of every row and draws uniformly. Later selections sort the
rows by d_i = l_init - l_now, largest first (ties by row), and favour a window of the size s = window_size:

    start = floor(u (N - sN)),  end = floor(u (N - sN) + sN)

with N valid rows, t = round - 1, T = update_times - 1, and

    sigmoid  (default): u = sigma(t / T), the guide's formula: the window moves from 0.5 to 0.73
    centered:           u = sigma(10 (t/T - 1/2)): it sweeps over the whole range, as DataFlex' code does

The right end is cut at the first d < 0: rows that got worse are not favoured. Rows inside weigh 1, all
others ``base_weight``. An empty window means uniform, and is said.

Source: DataFlex (OpenDCAI), guide of the Delta Loss Selector, section 1, and its released selector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.schemas import column
from dataflex_pipeline.store.ranks import Values, column_values, count, places

Place = tuple[float, int]
"""(negated delta loss, row): the sort key, so that earlier in the order is smaller."""


@dataclass(frozen=True)
class Window:
    """First and last place inside the window, both included; None when there is no window."""

    first: Place
    last: Place


def schedule(kind: str, t: int, T: int) -> float:
    """Return u in (0, 1), the window's position at selection t of 1..T."""
    progress = t / T
    return 1.0 / (1.0 + math.exp(-progress if kind == "sigmoid" else -10.0 * (progress - 0.5)))


def window_ranks(u: float, n: int, size: float, n_not_worse: int) -> tuple[int, int]:
    """Return (start, end) of the window in the sorted order, ``end`` not included.

    Args:
        u: position in (0, 1). n: valid rows. size: share of the rows inside.
        n_not_worse: rows with d >= 0, which come first in the order.
    """
    left = u * (n - size * n)
    return math.floor(left), min(math.floor(left + size * n), n_not_worse)


class DeltaLoss(api.Method):
    """A sliding window over the drop in loss."""

    summary = "favour a sliding window of the rows sorted by how much their loss fell"
    source = "DataFlex (OpenDCAI), Delta Loss Selector"
    compares_rounds = True
    columns = (
        column("initial_loss", pa.float64(), "loss at the first selection, nats per token"),
        column("loss", pa.float64(), "loss at this selection, nats per token"),
        column("delta_loss", pa.float64(), "initial_loss - loss, nats per token"),
        column("n_tokens", pa.int32(), "response tokens that the means are over"),
    )

    class Params(api.Params):
        """Parameters of delta_loss."""

        window_size: float = Field(
            0.2, gt=0, le=1, description="width of the window as a share of the valid rows"
        )
        schedule: Literal["sigmoid", "centered"] = Field(
            "sigmoid",
            description="how the window moves; sigmoid: the guide's formula, centered: over the whole range",
        )
        base_weight: float = Field(
            0.025, ge=0, allow_inf_nan=False, description="weight of a row outside; inside it is 1"
        )
        replacement: bool = Field(False, description="draw with replacement")

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the losses at the first selection's checkpoint and at the present one."""
        initial = api.Need("losses", checkpoint=0)
        if selection.round == 1:
            return {"initial": initial, "now": initial}
        return {"initial": initial, "now": api.Need("losses", checkpoint=selection.round - 1)}

    def score(self, block: api.Block, state: Any) -> Mapping[str, np.ndarray]:
        """Return the drop in loss as the score."""
        initial, now = block.column("initial", "loss"), block.column("now", "loss")
        delta = initial - now
        tokens = block.column("now", "n_tokens")
        return {
            "score": delta,
            "initial_loss": initial,
            "loss": now,
            "delta_loss": delta,
            "n_tokens": tokens,
        }

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> Window | None:
        """Return the window as sort keys, or None where every row weighs alike."""
        if selection.round == 1:
            selection.say("first selection: the initial losses are kept, the draw is uniform")
            return None
        values = column_values(scores, "score", descending=True)
        n = count(values)
        t, T = selection.round - 1, selection.update_times - 1
        u = schedule(self.params.schedule, t, T)
        start, end = window_ranks(u, n, self.params.window_size, _not_worse(values))
        if start >= end:
            selection.say(f"the window [{start}, {end}) is empty: too few rows improved; the draw is uniform")
            return None
        first, last = places(values, [start, end - 1])
        selection.say(
            f"window: ranks {start} to {end - 1} of {n}, delta loss {-first[0]:.4f} to {-last[0]:.4f} nats"
        )
        return Window(first, last)

    def weigh(self, block: pa.RecordBatch, fitted: Window | None) -> np.ndarray:
        """Return 1 inside the window, ``base_weight`` outside, 1 everywhere without one."""
        if fitted is None:
            return np.ones(block.num_rows)
        key = -block.column("score").to_numpy(zero_copy_only=False)
        row = block.column("row").to_numpy()
        (first, first_row), (last, last_row) = fitted.first, fitted.last
        after_first = (key > first) | ((key == first) & (row >= first_row))
        before_last = (key < last) | ((key == last) & (row <= last_row))
        return np.where(after_first & before_last, 1.0, self.params.base_weight)


def _not_worse(values: Values) -> int:
    return sum(int(np.count_nonzero(negated <= 0)) for _, negated in values())
