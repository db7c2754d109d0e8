"""Embedders, which turn texts into vectors; one file per implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dataflex_pipeline.api import Backend


class Embedder(Backend, Protocol):
    """Turns texts into vectors.

    Attributes:
        dimension: length of a vector.
    """

    dimension: int

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector per text. [texts, dimension] float32"""
