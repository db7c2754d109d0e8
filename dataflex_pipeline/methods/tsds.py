"""TSDS: a sampling probability over the pool that follows the target, without piling up near-duplicates.

Every target row (M of them, valid) has its L = min(max_K, N) nearest pool rows by embedding, at distances d
in rising order; all rows so found are the support. With rho the kernel density of a row in the support,
optimal transport of the target's mass with a penalty on crowding gives (neighbours/transport.py)

    c_{j,k} = sum over k' <= k of 1/rho
    s = the level c at which alpha/C x (transport cost) reaches (1 - alpha) M
    probability of a row = sum over targets j that it is the k-th neighbour of, of
                           (min(s, c_{j,k}) - min(s, c_{j,k-1})) / (M s)

so that each target gives away 1/M, to as many neighbours as alpha and C allow, and n near-duplicates, whose
rho is n times as large, get together what one would. The probabilities are the score.

With ``guide_columns``, or ``assignment: score``, the guide's columns are filled over the support:
``density`` (Gaussian), ``diversity`` (distance to the nearest row already chosen) and ``mix`` = alpha
density + (1 - alpha) diversity. ``assignment: score`` draws by that mix instead of the transport:
``sample_size`` rows are chosen greedily by it (neighbours/greedy.py), and their probability is proportional
to the mix at which they were chosen.

Source: Liu, Karbasi and Rekatsinas, TSDS: Data Selection for Task-Specific Model Finetuning (NeurIPS 2024);
DataFlex (OpenDCAI), guide of the TSDS selector, for the parameters and the mix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from dataflex_pipeline import api
from dataflex_pipeline.data.leaks import say_leaks
from dataflex_pipeline.features.density import Density
from dataflex_pipeline.features.embedding_params import (
    EmbeddingParams,
    KernelParams,
    NearestParams,
    NeighbourParams,
    SearchParams,
)
from dataflex_pipeline.features.neighbours import Neighbours
from dataflex_pipeline.neighbours.greedy import choose
from dataflex_pipeline.neighbours.spread import Crowd, Spread, say_search, spread_target
from dataflex_pipeline.neighbours.vectors import gather_vectors
from dataflex_pipeline.schemas import column

NARROWEST = 1e-5
"""Kernel sums of a narrower kernel are rounding: d^2 is known within about 1e-16, d^2/sigma^2 within 1e-6."""
GUIDE_COLUMNS = (
    column(
        "density", pa.float64(), "mean of exp(-d^2/(2 sigma^2)) over the kde_K nearest rows; null off support"
    ),
    column("diversity", pa.float64(), "distance to the nearest row chosen greedily before; null off support"),
    column("mix", pa.float64(), "alpha density + (1 - alpha) diversity; null off support"),
)


@dataclass(frozen=True)
class Shares:
    """What every pool row got.

    Attributes:
        probability: [N] float64, sums to 1.
        spread: what the transport gave. rho: kernel density, NaN off the support. [N] float64
        guide: the guide's columns, where they are wanted, NaN off the support. [N] float64 each
    """

    probability: np.ndarray
    spread: Spread
    rho: np.ndarray
    guide: Mapping[str, np.ndarray] = field(default_factory=dict)


class Tsds(api.Method):
    """Optimal transport from the target to its neighbours, spread by density."""

    summary = "rows near the target, spread over its neighbourhoods by density"
    source = "Liu et al. 2024, TSDS (NeurIPS)"
    columns = (
        column("transport", pa.float64(), "probability that the transport gives the row; sums to 1"),
        column(
            "rho", pa.float64(), "kernel density of the row in the support, itself included; null off support"
        ),
        column("targets", pa.int32(), "target rows that give it mass"),
        column("nearest_target", pa.int64(), "target row that it is nearest to; null off support"),
        column("nearest_distance", pa.float64(), "Euclidean distance to that row on the unit sphere, 0 to 2"),
    )

    class Params(KernelParams, NearestParams, EmbeddingParams):
        """Parameters of tsds."""

        alpha: float = Field(0.6, ge=0, le=1, description="towards 1 near the target, towards 0 spread out")
        C: float = Field(
            5.0,
            gt=0,
            allow_inf_nan=False,
            description="scale of the distance to the target against the spread; larger spreads further",
        )
        assignment: Literal["transport", "score"] = Field(
            "transport",
            description="transport: the paper's; score: the guide's mix of density and diversity",
        )
        sample_size: int = Field(1000, ge=1, description="rows that assignment: score chooses")
        guide_columns: bool = Field(
            False, description="fill density, diversity and mix with the transport too"
        )
        probs_path: str | None = Field(
            None,
            exclude=True,
            description="take the probabilities of this .npy file, one per pool row; nothing is computed",
        )
        save_probs_path: str | None = Field(
            None,
            exclude=True,
            description="also write the probabilities to this .npy file when rows are selected",
        )

        @field_validator("sigma")
        @classmethod
        def _can_be_told(cls, value: float) -> float:
            if 0 < value < NARROWEST:
                raise ValueError(
                    f"a width below {NARROWEST:g} is below what distances of embeddings in float32 can tell; "
                    "0 makes every density 1"
                )
            return value

        @model_validator(mode="after")
        def _has_a_width(self) -> Tsds.Params:
            if self.sigma == 0 and (self.guide_columns or self.assignment == "score"):
                raise ValueError(
                    "a density with sigma 0 has no width: set sigma above 0, or leave out the mix"
                )
            return self

    params: Params

    @property
    def probabilities_from(self) -> Path | None:
        """The file of ``probs_path``."""
        return None if self.params.probs_path is None else Path(self.params.probs_path)

    @property
    def probabilities_to(self) -> Path | None:
        """The file of ``save_probs_path``."""
        return None if self.params.save_probs_path is None else Path(self.params.save_probs_path)

    @property
    def mixes(self) -> bool:
        """Whether the guide's columns are wanted."""
        return self.params.guide_columns or self.params.assignment == "score"

    def own_columns(self, state: Shares) -> tuple[pa.Field, ...]:
        """Return the columns, with the guide's where they are wanted."""
        return self.columns + (GUIDE_COLUMNS if self.mixes else ())

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the target's neighbours and the density of what they find; embeddings for the mix."""
        params, pool = self.params, self.params.pool_vectors()
        near = NeighbourParams(**params.part(NearestParams), pool=pool, target=params.target_vectors())
        number = selection.round - 1 if near.by_run_model else None
        crowd = Density.Params(
            **params.part(SearchParams), **params.part(KernelParams), gaussian=self.mixes, neighbours=near
        )
        needs = {
            "neighbours": api.Need(Neighbours, "target", number, near),
            "density": api.Need(Density, "pool", number, crowd),
        }
        return needs | ({"pool": params.pool_need()} if self.mixes else {})

    def begin(self, tables: Mapping[str, api.BlockTable], selection: api.Selection) -> Shares:
        """Work out every row's share of the target's mass."""
        say_leaks(tables["neighbours"], tables["density"], selection.say)
        crowd = Crowd.read(tables["density"])
        spread = spread_target(tables["neighbours"], crowd.rho, self.params.alpha, self.params.C)
        self._say_caps(crowd, selection)
        say_search(tables["neighbours"], crowd, selection.say)
        if not spread.stop.reached:
            selection.say("the transport ends at its last neighbours: a larger max_K would spread it further")
        shares = Shares(spread.mass, spread, crowd.rho)
        if self.mixes:
            shares = self._mixed(tables["pool"], crowd, shares)
        got = shares.probability[shares.probability > 0]
        selection.say(
            f"{len(got)} rows have a probability, worth {1 / (got @ got):.1f} equal ones; "
            f"{len(crowd.support)} of {crowd.n_valid} rows are near the target"
        )
        return shares

    def _mixed(self, pool: api.BlockTable, crowd: Crowd, shares: Shares) -> Shares:
        """Fill the guide's columns over the support; with ``assignment: score``, let them decide."""
        alpha, rows = self.params.alpha, crowd.support
        chosen = choose(gather_vectors(pool, rows), crowd.density[rows], alpha, self.params.sample_size)
        diversity = chosen.distance
        diversity[chosen.places] = chosen.diversity
        mix = alpha * crowd.density[rows] + (1 - alpha) * diversity
        guide = {name: np.full(len(crowd.rho), np.nan) for name in ("density", "diversity", "mix")}
        for name, values in (("density", crowd.density[rows]), ("diversity", diversity), ("mix", mix)):
            guide[name][rows] = values
        if self.params.assignment == "transport":
            return replace(shares, guide=guide)
        probability = np.zeros(len(crowd.rho))
        probability[rows[chosen.places]] = chosen.mix / chosen.mix.sum()
        return replace(shares, guide=guide, probability=probability)

    def _say_caps(self, crowd: Crowd, selection: api.Selection) -> None:
        n_near = len(crowd.support)
        if self.params.max_K > crowd.n_valid:
            selection.say(f"max_K {self.params.max_K}: the pool has {crowd.n_valid} usable rows, all count")
        if self.params.kde_K > n_near and self.params.sigma > 0:
            selection.say(f"kde_K {self.params.kde_K}: {n_near} rows are near the target, all count")

    def score(self, block: api.Block, state: Shares) -> Mapping[str, np.ndarray]:
        """Return the probability as the score, and what it came from."""
        rows = block.pool.column("row").to_numpy()
        spread = state.spread
        near = spread.nearest[rows] >= 0
        columns = {
            "score": state.probability[rows],
            "transport": spread.mass[rows],
            "rho": _nullable(state.rho[rows], near),
            "targets": spread.targets[rows],
            "nearest_target": _nullable(spread.nearest[rows], near),
            "nearest_distance": _nullable(spread.distance[rows], near),
        }
        return columns | {name: _nullable(values[rows], near) for name, values in state.guide.items()}

    def weigh(self, block: pa.RecordBatch, fitted: Any) -> np.ndarray:
        """Return the probability itself."""
        weights: np.ndarray = block.column("score").to_numpy(zero_copy_only=False)
        return weights


def _nullable(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return values with None where there is none. [rows] object"""
    found = values.astype(object)
    found[~there] = None
    return found
