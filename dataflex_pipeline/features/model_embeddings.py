"""The embeddings of rows by the run's own model: a feature of each round, for methods that compare rows.

The vector of a row is the weighted mean of its last hidden states (models/hidden.py), scaled to length 1: of
the row's own tokens, prompt and response (``text: chat_template``), or of one of its texts in the tokens of
the model's tokenizer. The adapter of the round takes part. Everything else is as in features/embeddings.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.data.texts import row_text
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.features.embeddings import Embeddings, _Report
from dataflex_pipeline.models.hidden import body_of, hidden_size, text_ids, weighted_states
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.models.source import number_ingredients
from dataflex_pipeline.models.weights import row_flops


class ModelEmbeddings(Embeddings):
    """One vector of length 1 per row, by the model as of a checkpoint."""

    uses_model = True

    @cached_property
    def dimension(self) -> int:
        """Length of the model's hidden states."""
        from transformers import AutoConfig

        from dataflex_pipeline.models.source import explained, load_arguments, local_folder

        name = self.config.model_name_or_path
        with explained(name, "configuration"):
            found = AutoConfig.from_pretrained(str(local_folder(name) or name), **load_arguments(self.config))
        return hidden_size(found)

    @property
    def max_length(self) -> int:
        """Tokens kept of a text."""
        return self.params.max_length

    def ingredients(self) -> dict[str, Any]:
        """Return what decides the vectors; the checkpoint stands for the model."""
        kept = self.params.model_dump(mode="json", include={"text", "prompt", "max_length"})
        return {"params": kept, **number_ingredients(self.config)}

    def row_flops(self, tokens: float) -> float:
        """Return those of a forward pass."""
        return row_flops(self.config, min(tokens, self.max_length), passes=1)

    def check(self, need: api.Need, n_rows: int | None) -> None:
        """Check that a prompt has a text that it could be put before."""
        if self.params.text == "chat_template" and self.params.prompt:
            raise ConfigError(
                f"embed_prompt or query_prompt is {self.params.prompt!r}, and the run's own model embeds the "
                "tokens that rows are trained on (embed_text: chat_template).",
                "A text before them is no part of any turn.",
                "Leave the prompt out, or set embed_text to conversation, prompt or response.",
            )

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load the checkpoint once; yield the function from rows to vectors."""
        import torch

        from dataflex_pipeline.models.base import load_for_scoring, resolve_device

        report = _Report(progress, self)
        model = load_for_scoring(self.config, given.checkpoint, resolve_device(self.config.device))
        body_of(model)
        room = Room(
            self.config.score_batch_tokens, progress.say, folder=given.folder, advance=progress.advance
        )
        with torch.inference_mode():
            yield partial(self._states, partial(weighted_states, model, room=room), self._ids(), report)
        report.finish()

    def _ids(self) -> Callable[[pa.Table], list[Sequence[int]]]:
        """Return the function from rows to the token ids that are embedded, before they are cut."""
        kind, prompt = self.params.text, self.params.prompt
        if kind == "chat_template":
            return lambda rows: rows.column("input_ids").to_pylist()
        from dataflex_pipeline.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.config)

        def ids_of(rows: pa.Table) -> list[Sequence[int]]:
            texts = [row_text(turns, kind) for turns in rows.column("messages").to_pylist()]
            return text_ids(tokenizer, [prompt + text if text.strip() else "" for text in texts])

        return ids_of

    def _states(
        self,
        embed: Callable[[Sequence[Sequence[int]]], np.ndarray],
        ids_of: Callable[[pa.Table], list[Sequence[int]]],
        report: _Report,
        rows: pa.Table,
    ) -> pa.Table:
        ids = ids_of(rows.filter(rows.column("valid")))
        counts = np.array([len(each) for each in ids], dtype=np.int32)
        report.cut += int((counts > self.max_length).sum())
        vectors = np.zeros((len(ids), self.dimension), dtype=np.float32)
        filled = np.flatnonzero(counts)
        vectors[filled] = embed([ids[place][: self.max_length] for place in filled])
        reasons = [None if count else "there is no text to embed" for count in counts]
        return self._table(rows, vectors, counts, reasons, report)
