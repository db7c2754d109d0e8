"""The largest cosine with a target row: the base of near and rds, and no method by itself.

    score(z) = max over target rows z' of cos(e_z, e_z') = 1 - |e_z - e_z'|^2 / 2

with e unit embeddings; every pool row is compared with every target row, in blocks of matrix products, which
an accelerator makes where there is one. Products only choose the target row: its distance is taken anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.data.leaks import say_leaks
from dataflex_pipeline.features.embedding_params import EmbeddingParams
from dataflex_pipeline.features.neighbours import check_dimensions
from dataflex_pipeline.neighbours.cells import search_device
from dataflex_pipeline.neighbours.vectors import block_vectors, vector_blocks
from dataflex_pipeline.sampling.softmax import Softmax
from dataflex_pipeline.schemas import column

if TYPE_CHECKING:
    from dataflex_pipeline.neighbours.accelerated import DeviceCosines

TILE = 1 << 23
"""Cosines in memory at a time: 32 MB."""


@dataclass(frozen=True)
class TargetVectors:
    """The target's embeddings.

    Attributes:
        rows: target rows that have one, rising. [M] int64
        vectors: of length 1. [M, D] float32
        held: the same on an accelerator; None where the CPU makes the products.
    """

    rows: np.ndarray
    vectors: np.ndarray
    held: DeviceCosines | None = None

    @classmethod
    def read(cls, table: api.BlockTable, setting: str) -> TargetVectors:
        """Read the target's embeddings.

        Args:
            table: of the target. setting: ``device`` of the configuration.
        """
        blocks = list(vector_blocks(table))
        rows, vectors = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        device = search_device(setting)
        if device == "cpu":
            return cls(rows, vectors)
        from dataflex_pipeline.neighbours.accelerated import DeviceCosines

        return cls(rows, vectors, DeviceCosines(vectors, device))

    def nearest(self, vectors: np.ndarray) -> np.ndarray:
        """Return which target each vector has the largest cosine with, the first of equals. [n] int64"""
        return nearest_place(vectors, self.vectors) if self.held is None else self.held.nearest(vectors)

    def cosines(self, vectors: np.ndarray) -> np.ndarray:
        """Return the cosine of each vector with each target. [n, M] float32"""
        return vectors @ self.vectors.T if self.held is None else self.held.all(vectors)


class SimilarityParams(EmbeddingParams):
    """Parameters of every method on the cosine of embeddings."""

    temperature: float = Field(
        0.1,
        gt=0,
        description="for strategy: sample, which draws by exp(score / (largest |score| x temperature))",
    )


class EmbeddingSimilarity(api.Method):
    """The rows whose embedding is nearest to some target row's."""

    columns = (
        column("nearest_target", pa.int64(), "target row that it is nearest to, ties by row"),
        column("nearest_distance", pa.float64(), "Euclidean distance to that row on the unit sphere, 0 to 2"),
    )
    params: SimilarityParams

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the embeddings of pool and target."""
        return {"pool": self.params.pool_need(), "target": self.params.target_need()}

    def begin(self, tables: Mapping[str, api.BlockTable], selection: api.Selection) -> TargetVectors:
        """Read the target's embeddings."""
        check_dimensions(tables["pool"], tables["target"])
        say_leaks(tables["target"], tables["pool"], selection.say)
        return TargetVectors.read(tables["target"], selection.device)

    def score(self, block: api.Block, state: TargetVectors) -> Mapping[str, np.ndarray]:
        """Return the largest cosine with a target row, and which row that is."""
        vectors = _block(block)
        place = state.nearest(vectors)
        # taken anew as |a - b|: equal rows get equal scores, whatever tile they were in
        gaps = vectors.astype(np.float64) - state.vectors[place]
        squares = np.einsum("nd,nd->n", gaps, gaps)
        return {
            "score": 1 - squares / 2,
            "nearest_target": state.rows[place],
            "nearest_distance": np.sqrt(squares),
        }

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> Softmax:
        """Find the largest score and the scale of the softmax."""
        return Softmax.fit(scores, self.params.temperature)

    def weigh(self, block: pa.RecordBatch, fitted: Softmax) -> np.ndarray:
        """Return exp((score - largest) / scale)."""
        return fitted.weigh(block)

    def by_target_row(
        self, tables: Mapping[str, api.BlockTable], selection: api.Selection
    ) -> api.TargetRanking:
        """Let each target row rank the pool by cosine."""
        target = TargetVectors.read(tables["target"], selection.device)
        return api.TargetRanking(target.rows, lambda block: target.cosines(_block(block)))


def _block(block: api.Block) -> np.ndarray:
    """Return the pool's vectors of a block, zeros where there is none. [rows, D] float32"""
    batch = block.features["pool"]
    valid = batch.column("valid").to_numpy(zero_copy_only=False)
    return np.where(valid[:, None], block_vectors(batch), np.float32(0))


def nearest_place(vectors: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return which target each vector has the largest cosine with, the first of equals. [n] int64

    Args:
        vectors: of length 1. [n, D] float32
        targets: of length 1. [M, D] float32
    """
    best, place = np.full(len(vectors), -np.inf, dtype=np.float32), np.zeros(len(vectors), dtype=np.int64)
    step = max(1, TILE // max(1, len(vectors)))
    for start in range(0, len(targets), step):
        cosines = vectors @ targets[start : start + step].T  # [n, step]
        first = cosines.argmax(axis=1)
        largest = np.take_along_axis(cosines, first[:, None], 1)[:, 0]
        better = largest > best
        best[better], place[better] = largest[better], start + first[better]
    return place
