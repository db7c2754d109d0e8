"""Embeddings through sentence-transformers, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from dataflex_pipeline.embed.settings import KEY, EmbedderSettings, EmbedModel
from dataflex_pipeline.hub import hub_reachable
from dataflex_pipeline.models.base import free_memory, no_bars
from dataflex_pipeline.models.source import explained

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class SentenceTransformersEmbedder:
    """An Embedder whose model lives on this process's device while the context lasts.

    Args:
        settings: the model and how it is loaded.
    """

    dimension: int

    def __init__(self, settings: EmbedderSettings) -> None:
        self.settings = settings
        self._model: SentenceTransformer | None = None

    def __enter__(self) -> Self:
        """Load the model."""
        import torch
        from sentence_transformers import SentenceTransformer

        settings = self.settings
        local = EmbedModel(settings.model, settings.revision).folder
        with explained(settings.model, "embedding model", KEY), no_bars():
            model = SentenceTransformer(
                str(local or settings.model),
                device=settings.device,
                revision=None if local else settings.revision,
                trust_remote_code=settings.trust_remote_code,
                local_files_only=local is not None or not hub_reachable(),
                model_kwargs={"dtype": getattr(torch, settings.dtype), "use_safetensors": True},
            )
        model.max_seq_length = settings.max_length
        self._model = model.eval()
        self.dimension = self.embed(["length"]).shape[1]  # a model's files may say another one
        return self

    def __exit__(self, *error: object) -> None:
        """Free the device's memory."""
        self._model = None
        free_memory()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector per text, as the model gives it. [texts, dimension] float32

        The library batches texts of similar length; the empty prompt keeps a model's own default prompt,
        which would be added unseen, out of it.
        """
        if self._model is None:
            raise RuntimeError("an embedder works inside its with block")
        if not len(texts):
            return np.zeros((0, self.dimension), dtype=np.float32)
        found = self._model.encode(
            list(texts),
            prompt="",
            batch_size=self.settings.batch_size,
            show_progress_bar=False,
            convert_to_tensor=True,
        )
        vectors: np.ndarray = found.float().cpu().numpy()
        return vectors
