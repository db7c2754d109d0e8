"""Embeddings through vLLM's pooling runner, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from dataflex_pipeline.embed.settings import EmbedderSettings
from dataflex_pipeline.vllm.engine import VllmEngine


class VllmEmbedder:
    """An Embedder whose model lives in a vLLM engine while the context lasts.

    Args:
        settings: the model and how it is loaded. say: gets one line per choice that the engine makes.
    """

    dimension: int

    def __init__(self, settings: EmbedderSettings, say: Callable[[str], None]) -> None:
        options: dict[str, Any] = {
            "dtype": settings.dtype,
            "max_model_len": settings.max_length,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "trust_remote_code": settings.trust_remote_code,
        }
        if settings.revision is not None:
            options["revision"] = settings.revision
        self.settings = settings
        self._engine = VllmEngine("embed", settings.model, options, say=say, device=settings.device)

    def __enter__(self) -> Self:
        """Start the engine."""
        self._engine.__enter__()
        self.dimension = self._engine.dimension
        return self

    def __exit__(self, *error: object) -> None:
        """End its process."""
        self._engine.__exit__(*error)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector per text, as the model gives it. [texts, dimension] float32"""
        return self._engine.embed(texts, self.settings.max_length)
