"""Figures of an evaluation with their standard errors, and the table that they are kept in.

loss        L = sum_i T_i l_i / sum_i T_i over rows i with T_i response tokens and mean loss l_i, nats per
            token; perplexity is exp(L). Standard error with rows as the independent units (a ratio
            estimator's, Cochran, Sampling Techniques (1977), section 2.11, without the finite correction):
            sqrt(n / (n - 1) sum_i (T_i (l_i - L))^2) / sum_i T_i
a metric    mean over the answers that could be scored; standard error std / sqrt(n)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.schemas import column
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.tables import TableFile, table_writer

METRICS = pa.schema(
    [
        column(
            "task", pa.string(), "what was evaluated on: target, test, or a benchmark task", nullable=False
        ),
        column("metric", pa.string(), "name of the figure", nullable=False),
        column("value", pa.float64(), "the figure; losses in nats per token", nullable=False),
        column("stderr", pa.float64(), "its standard error over rows; null where it is not known"),
        column("n", pa.int64(), "rows or answers that it is over"),
        column("unscored", pa.int64(), "rows or answers that could not be scored, and do not count"),
        column("settings", pa.string(), "how answers were made and graded, as JSON; null for a loss"),
        column("rows", pa.string(), "fingerprint of the evaluated rows; null for a benchmark"),
    ]
)


@dataclass(frozen=True)
class Figure:
    """One line of the table; fields as its columns."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    n: int | None = None
    unscored: int | None = None
    settings: str | None = None
    rows: str | None = None


def loss_figures(task: str, losses: BlockTable) -> list[Figure]:
    """Return loss and perplexity over a table of losses (columns loss, n_tokens, valid)."""
    loss, tokens, valid = _columns(losses, ("loss", "n_tokens", "valid"))
    kept = valid.astype(bool)
    l_i, t_i = loss[kept], tokens[kept]  # [n]
    n, total = len(l_i), t_i.sum()
    mean = float((t_i * l_i).sum() / total)
    stderr = None
    if n > 1:
        stderr = float(math.sqrt(n / (n - 1) * ((t_i * (l_i - mean)) ** 2).sum()) / total)
    left_out = len(kept) - n
    perplexity = math.exp(mean) if mean < 700 else math.inf  # float64 ends there
    spread = None if stderr is None or math.isinf(perplexity) else perplexity * stderr  # delta method
    return [
        Figure(task, "loss", mean, stderr, n, left_out),
        Figure(task, "perplexity", perplexity, spread, n, left_out),
    ]


def reward_figure(task: str, metric: str, rewards: BlockTable) -> Figure | None:
    """Return the mean reward over a rewards table's scored answers, or None where none was scored."""
    (reward,) = _columns(rewards, ("reward",))
    values = reward[np.isfinite(reward)]  # a null reads as NaN
    n = len(values)
    if not n:
        return None
    stderr = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    return Figure(task, metric, float(values.mean()), stderr, n, len(reward) - n)


def _columns(table: BlockTable, names: Sequence[str]) -> list[np.ndarray]:
    blocks = list(table.blocks(list(names)))
    return [
        np.concatenate(
            [np.asarray(b.column(name).to_numpy(zero_copy_only=False), np.float64) for b in blocks]
        )
        for name in names
    ]


def write_figures(path: Path, figures: Iterable[Figure], made_from: Mapping[str, Any]) -> list[Figure]:
    """Write figures beside those of other tasks and metrics that the table has already.

    Args:
        path: of the table. figures: new ones; they take the place of old ones of the same task and metric,
            and of all old ones of the same task over other rows.
        made_from: what all figures of the table are of; figures of another checkpoint are dropped.

    Returns:
        All figures that the table has now.
    """
    figures = list(figures)
    rows = {figure.task: figure.rows for figure in figures}
    kept: dict[tuple[str, str], Figure] = {}
    if path.is_file() and TableFile(path).fingerprint == digest(made_from):
        old = (f for f in read_figures(path) if rows.get(f.task, f.rows) == f.rows)
        kept = {(f.task, f.metric): f for f in old}
    kept |= {(f.task, f.metric): f for f in figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [asdict(figure) for figure in kept.values()]
    with table_writer(path, METRICS, made_from, {}) as write:
        write(pa.Table.from_pylist(lines, schema=METRICS))
    return list(kept.values())


def read_figures(path: Path) -> list[Figure]:
    """Return the figures of a table."""
    return [Figure(**line) for block in TableFile(path).blocks() for line in block.to_pylist()]
