"""Records of a calibration and of a stage's predicted cost: rows, tokens, FLOPs, seconds, bytes, requests.

    seconds = measured start + units of work x measured seconds per unit

Units are the tokens of rows (losses, gradients, embeddings), drawn tokens (generations) or compared pairs of
vectors (neighbours, density). Every figure names its basis: *counted* (no measurement in it), *measured*
(this very work, on sampled rows), *extrapolated* (from the rate of something else, or an upper bound) or
*unknown* (never a guess: the figure is left out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.estimate.costs import ModelShape, RowCounts, loss_flops
from dataflex_pipeline.estimate.features import FeatureCost
from dataflex_pipeline.estimate.training import TrainingCost

if TYPE_CHECKING:
    from dataflex_pipeline.training.first_step import Settled

Basis = Literal["counted", "measured", "extrapolated", "unknown"]


@dataclass(frozen=True)
class StageCost:
    """What one stage of a run is predicted to take.

    Attributes:
        stage: its name. round: of which round; None before the warm-up.
        rows, tokens: that go through the model. steps: optimizer steps. flops: floating-point operations.
        seconds: None where nothing is known. disk_bytes: of what it leaves.
        memory_bytes: at most, as measured.
        requests: to a paid or remote endpoint, at most. basis: of the seconds. note: what is uncertain.
    """

    stage: str
    round: int | None
    rows: int = 0
    tokens: float = 0.0
    steps: int = 0
    flops: float = 0.0
    seconds: float | None = None
    disk_bytes: float = 0.0
    memory_bytes: int = 0
    requests: int = 0
    basis: Basis = "measured"
    note: str = ""


@dataclass(frozen=True)
class WritingCost:
    """What writing tables and selecting from them was seen to take.

    Attributes:
        row_seconds: per row of a score table. table_seconds, table_bytes: of a table without rows.
        weigh_seconds, draw_seconds: for the probabilities of ``selected_from`` rows, and for a draw from
            them with its index.
    """

    row_seconds: float = 0.0
    table_seconds: float = 0.0
    table_bytes: float = 0.0
    weigh_seconds: float = 0.0
    draw_seconds: float = 0.0
    selected_from: int = 0


@dataclass(frozen=True)
class Measured:
    """Everything that the predictions are made from.

    Attributes:
        config: of the run. model: its shape.
        import_seconds: for the libraries. load_seconds: for the weights.
        pool, target: counts of the splits; target None without one.
        training: None where it was not measured. features: by `kind_of`.
        writing: of tables. step: what the memory makes of training steps; None without any, or by DeepSpeed.
    """

    config: Config
    model: ModelShape
    import_seconds: float
    load_seconds: float
    pool: RowCounts
    target: RowCounts | None
    training: TrainingCost | None
    features: Mapping[str, FeatureCost] = field(default_factory=dict)
    writing: WritingCost = field(default_factory=WritingCost)
    step: Settled | None = None

    def counts(self, split: str) -> RowCounts:
        """Return the counts of a split."""
        return self.target if split == "target" and self.target is not None else self.pool

    @property
    def forward_rate(self) -> float:
        """FLOP/s of a forward pass over rows."""
        cost = self.features["losses"]
        mix = self.pool.drawn(1)
        return loss_flops(self.model, mix) / mix.tokens / cost.unit_seconds


def total(stages: Sequence[StageCost]) -> StageCost:
    """Return the sum over stages; seconds are those that are known, memory is the largest."""
    return StageCost(
        "all",
        None,
        sum(each.rows for each in stages),
        sum(each.tokens for each in stages),
        sum(each.steps for each in stages),
        sum(each.flops for each in stages),
        sum(each.seconds or 0.0 for each in stages),
        sum(each.disk_bytes for each in stages),
        max((each.memory_bytes for each in stages), default=0),
        sum(each.requests for each in stages),
        "extrapolated" if any(each.basis != "measured" for each in stages) else "measured",
        "; ".join(f"{each.stage} is not in the time" for each in stages if each.seconds is None),
    )
