"""Embeddings through sentence-transformers, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from dataflex_pipeline.embed.settings import KEY, EmbedderSettings, EmbedModel
from dataflex_pipeline.hub import hub_reachable
from dataflex_pipeline.models.base import free_memory, no_bars
from dataflex_pipeline.models.room import memory_failure
from dataflex_pipeline.models.source import explained, quiet

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class SentenceTransformersEmbedder:
    """An Embedder whose model lives on this process's device while the context lasts.

    Args:
        settings: the model and how it is loaded. say: told where fewer texts fit the memory than are set.
    """

    dimension: int

    def __init__(self, settings: EmbedderSettings, say: Callable[[str], None] = quiet) -> None:
        self.settings = settings
        self._say, self._batch = say, settings.batch_size
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
        found: list[np.ndarray] = []
        while not found:
            failure = memory_failure(lambda: found.append(self._encoded(list(texts))))
            if failure is not None:
                self._shrink(failure)
        return found[0]

    def _encoded(self, texts: list[str]) -> np.ndarray:
        assert self._model is not None  # noqa: S101 (embed has looked)
        vectors = self._model.encode(
            texts, prompt="", batch_size=self._batch, show_progress_bar=False, convert_to_tensor=True
        )
        made: np.ndarray = vectors.float().cpu().numpy()
        return made

    def _shrink(self, failure: str) -> None:
        """Take half as many texts at a time from here on; the longest ones are tried first.

        Raises:
            OutOfMemoryError: a single text does not fit.
        """
        import torch

        free_memory()
        if self._batch == 1:
            raise torch.OutOfMemoryError(failure)
        before, self._batch = self._batch, self._batch // 2
        self._say(
            f"the memory was too small for {before} texts: {self._batch} at a time from here on "
            "(embed_batch_size)"
        )
