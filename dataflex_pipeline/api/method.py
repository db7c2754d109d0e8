"""Method, which scores and weighs rows, and what it is told about the selection and the rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api.feature import BlockTable, Need, Params

Strategy = Literal["sample", "top_k", "round_robin"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of the round before a selection.

    Attributes:
        step: optimizer steps of the whole run that are in it; None for the round's end.
        learning_rate: mean of the rates applied in the steps since the checkpoint before.
    """

    step: int | None
    learning_rate: float


@dataclass(frozen=True)
class Selection:
    """What a method knows about the selection that it scores for.

    Attributes:
        round: 1..update_times; the model at hand is the checkpoint of ``round - 1``, or the model as it was
            given in round 1 without a warm-up.
        update_times: rounds in the horizon.
        seed: the method's own stream for this round.
        say: prints one line and keeps it in the table's metadata.
        learning_rate: mean of the rates applied in the steps since the selection before; the configured
            peak where there were none.
        accumulates: whether the method's own score table of the round before is at hand.
        checkpoints: all checkpoints of the round before, its end last, for a method with
            ``every_checkpoint``; empty otherwise.
        shared_seed: of random choices that methods have to make alike to share a feature, such as a
            projection: the same for all methods in a round, but for those that have a ``seed`` of their own.
        device: the ``device`` setting, for arithmetic that an accelerator does faster; it changes no table.
    """

    round: int
    update_times: int
    seed: int
    say: Callable[[str], None] = field(compare=False)
    learning_rate: float = 0.0
    accumulates: bool = False
    checkpoints: tuple[Checkpoint, ...] = ()
    shared_seed: int = 0
    device: str = field(default="cpu", compare=False)


@dataclass(frozen=True)
class Block:
    """The same rows of the pool and of every needed feature over it, side by side.

    Attributes:
        pool: columns named by the method's ``pool_columns``, with row, row_id, valid, reason.
        features: one record batch per pool need, by the name that ``needs`` gave it.
        before: the method's own scores of the round before, if ``accumulates`` and there are any.
    """

    pool: pa.RecordBatch
    features: Mapping[str, pa.RecordBatch]
    before: pa.RecordBatch | None = None

    def column(self, need: str, name: str) -> np.ndarray:
        """Return a feature column as an array, nulls as NaN. [rows]"""
        values: np.ndarray = self.features[need].column(name).to_numpy(zero_copy_only=False)
        return values


@dataclass(frozen=True)
class TargetRanking:
    """How each target row ranks the pool, for ``round_robin`` over target rows.

    Attributes:
        rows: the target rows that take turns, in this order. [M] int64
        values: from a block of the pool to how much each target row wants each of its rows: higher is
            better, NaN where a target row does not look at a pool row. [rows, M] float
    """

    rows: np.ndarray
    values: Callable[[Block], np.ndarray]


class Method(ABC):
    """Scores the pool and turns scores into sampling weights. One subclass per file.

    A first method has a ``summary`` and a ``source``, and two functions, ``score`` and ``weigh``; one that
    looks at features has ``needs`` too. Everything below them is optional, in groups of what goes together.

    Class attributes:
        summary: one line for ``dataflex methods``.
        source: where the method comes from.
        Params: its parameters.
        version: raised when the numbers change for the same input.
        columns: its own score columns, after the common ones.
        pool_columns: columns of the prepared pool that ``score`` reads; of the instance where parameters
            decide it.
        default_strategy: how ``select`` draws when nothing else is set.
        compares_rounds: whether it tells rows apart only once rounds were trained.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    Params: ClassVar[type[Params]] = Params
    version: ClassVar[int] = 1
    columns: ClassVar[tuple[pa.Field, ...]] = ()
    pool_columns: tuple[str, ...] = ()
    default_strategy: ClassVar[Strategy] = "sample"
    compares_rounds: ClassVar[bool] = False

    def __init__(self, params: Any) -> None:
        self.params = params

    def needs(self, selection: Selection) -> Mapping[str, Need]:
        """Return the features to have at hand, each under a name of the method's choice."""
        return {}

    @abstractmethod
    def score(self, block: Block, state: Any) -> Mapping[str, np.ndarray]:
        """Return ``score`` (higher is better, float64) and the own columns for one block. [rows] each.

        Rows that are not valid in the pool or in a feature get null whatever is returned for them, and so
        do rows whose score is not finite. An entry ``reason`` may say why of each of those, None elsewhere.
        """

    @abstractmethod
    def weigh(self, block: pa.RecordBatch, fitted: Any) -> np.ndarray:
        """Return unnormalised sampling weights, at least 0, for one block of the score table. [rows]

        The block has all columns but ``row_id``; every block is weighed twice.
        """

    # Optional: a look at whole tables, before the first block.

    def begin(self, tables: Mapping[str, BlockTable], selection: Selection) -> Any:
        """Look at whole feature tables; what it returns is the ``state`` of ``score``."""
        return None

    def own_columns(self, state: Any) -> tuple[pa.Field, ...]:
        """Return the own score columns, for methods where they depend on the target or the parameters."""
        return self.columns

    def fit(self, scores: BlockTable, selection: Selection) -> Any:
        """Look at the finished score table; what it returns is the ``fitted`` of ``weigh``."""
        return None

    def check_pool(self, n_rows: int) -> None:  # noqa: B027 (nothing to check is no mistake)
        """Find what would stop the method, before a run begins and before the pool is scored.

        Args:
            n_rows: rows of the pool.

        Raises:
            UserError: something that the method reads by itself does not fit the pool.
        """

    def check_target(self, tables: Mapping[str, BlockTable]) -> None:  # noqa: B027 (as above)
        """Look at the target's feature tables before those of the pool are computed, which takes longest.

        Args:
            tables: by the names that ``needs`` gave them.

        Raises:
            UserError: they tell no row of the pool from another.
        """

    # Optional: another look at all scores, where a row's score depends on those of others.

    @property
    def rescores(self) -> bool:
        """Whether ``rescore`` is to be asked."""
        return False

    def rescore(
        self, scores: BlockTable, selection: Selection
    ) -> Callable[[pa.RecordBatch], Mapping[str, np.ndarray]]:
        """Look at the whole score table; return what replaces columns of a block of it.

        The function is called once for each block, which has all columns, and returns ``score`` and own
        columns; of rows that have no score whatever it likes.
        """
        raise NotImplementedError(f"{type(self).__name__} scores each block once")

    # Optional: rounds and checkpoints before this one.

    @property
    def accumulates(self) -> bool:
        """Whether ``score`` adds to the method's own scores of the round before."""
        return False

    @property
    def every_checkpoint(self) -> bool:
        """Whether it needs the checkpoints inside the round before too (``keep_checkpoints``)."""
        return False

    # Optional: how rows are drawn where the configuration leaves it open.

    @property
    def replaces(self) -> bool:
        """Whether ``sample`` draws with replacement: the parameter ``replacement``, where there is one."""
        return bool(getattr(self.params, "replacement", False))

    def group_columns(self, schema: pa.Schema) -> tuple[str, ...]:
        """Return which columns of its score table belong to one target group each, for ``round_robin``."""
        return ()

    @property
    def ranks_by_target_row(self) -> bool:
        """Whether ``by_target_row`` is there."""
        return type(self).by_target_row is not Method.by_target_row

    def ranking_needs(self, selection: Selection) -> Mapping[str, Need]:
        """Return the features that ``by_target_row`` looks at: by default those of the scores."""
        return self.needs(selection)

    def by_target_row(self, tables: Mapping[str, BlockTable], selection: Selection) -> TargetRanking:
        """Return how each target row ranks the pool.

        ``round_robin`` over target rows calls it when the rows are drawn; nothing of pool x target is
        ever stored. Rows that the score table calls invalid are passed over whatever is returned.

        Args:
            tables: those of ``ranking_needs``.
            selection: as for ``begin``; what is said goes into the index.
        """
        raise NotImplementedError(f"{type(self).__name__} has one ranking of the pool only")

    # Optional: probabilities as a file.

    @property
    def probabilities_from(self) -> Path | None:
        """An ``.npy`` file whose probabilities stand in for the method's own, which is not asked then."""
        return None

    @property
    def probabilities_to(self) -> Path | None:
        """An ``.npy`` file that the finished probabilities are also written to."""
        return None
