"""Embeddings by any causal language model: its last hidden states, averaged with weights along the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.embed.settings import KEY, EmbedderSettings
from dataflex_pipeline.models.base import free_memory
from dataflex_pipeline.models.beside import ModelBeside
from dataflex_pipeline.models.hidden import hidden_size, text_ids, weighted_states
from dataflex_pipeline.models.room import Room

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalEmbedder:
    """An Embedder whose model lives on this process's device while the context lasts.

    Args:
        settings: the model and how it is loaded. say: prints a line.
    """

    dimension: int

    def __init__(self, settings: EmbedderSettings, say: Callable[[str], None]) -> None:
        self.settings, self.say = settings, say
        config = Config(device=settings.device, trust_remote_code=settings.trust_remote_code)
        self.files = ModelBeside(settings.model, settings.revision, KEY, config)
        self._model: PreTrainedModel | None = None

    def __enter__(self) -> Self:
        """Load the model."""
        self._model = self.files.load(self.settings.device, self.say, self.settings.dtype)
        self.dimension = hidden_size(self._model.config)
        self._room = Room(self.settings.batch_tokens, self.say, folder=self.settings.folder)
        return self

    def __exit__(self, *error: object) -> None:
        """Free the device's memory."""
        self._model = None
        free_memory()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector per text. [texts, dimension] float32"""
        return self.embed_counted(texts)[0]

    def embed_counted(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return one vector per text, and its tokens before it is cut; special tokens are counted.

        Returns:
            [texts, dimension] float32, [texts] int32
        """
        import torch

        if self._model is None:
            raise RuntimeError("an embedder works inside its with block")
        if not len(texts):
            return np.zeros((0, self.dimension), dtype=np.float32), np.zeros(0, dtype=np.int32)
        ids = text_ids(self.files.tokenizer, texts)
        counts = np.array([len(each) for each in ids], dtype=np.int32)
        if not all(texts):  # what is written around a text stands around none, too
            counts[[not text for text in texts]] = len(self.files.tokenizer("")["input_ids"])
        with torch.inference_mode():
            kept = [each[: self.settings.max_length] for each in ids]
            return weighted_states(self._model, kept, self._room), counts
