"""The embeddings of rows: one vector of length 1 per row, for methods that compare rows by their text.

A model's vector e is kept as e / |e|, whatever its length was: Euclidean distances between such vectors are
those on the unit sphere, |a - b|^2 = 2 - 2 cos(a, b). A vector that is not finite, or is zero and so has no
direction, makes its row invalid, by name.

Which text of a row is embedded, ``text`` says (data/texts.py). Vectors that were made elsewhere are read
from a file instead (``vectors``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.data.texts import row_text
from dataflex_pipeline.data.vectors import VectorFile, unit_vectors
from dataflex_pipeline.embed import Embedder
from dataflex_pipeline.embed.embedders import MODEL, check_installed, make_embedder, resolve_embedder
from dataflex_pipeline.embed.settings import KEY, Dtype, EmbedderSettings, EmbedModel
from dataflex_pipeline.errors import DataflexError
from dataflex_pipeline.features.embedding_params import VectorParams
from dataflex_pipeline.models.beside import ModelBeside
from dataflex_pipeline.models.hidden import hidden_size
from dataflex_pipeline.models.weights import stored_weights
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column

if TYPE_CHECKING:
    from dataflex_pipeline.embed.causal import CausalEmbedder

UNIT_TOLERANCE = 1e-3
"""How far a vector's length may be from 1 before scaling it is worth a word."""
SHOWN = 5
ORDER = "of those installed: vllm first on a GPU, sentence-transformers first without one"


class Embeddings(api.Feature):
    """One vector of length 1 per row."""

    Params = VectorParams
    uses_model = False
    params: VectorParams

    @property
    def input_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """Columns of the prepared rows that the text, or the check of vectors made elsewhere, needs."""
        common = ("row", "row_id", "valid", "reason")
        if self.params.vectors is not None:
            return common
        return (*common, "input_ids" if self.params.text == "chat_template" else "messages")

    @cached_property
    def model(self) -> EmbedModel:
        """The embedding model's files."""
        return EmbedModel(self.params.model or "", self.params.revision)

    @cached_property
    def method(self) -> str:
        """What runs the model, ``auto`` decided."""
        return resolve_embedder(self.params.method, self.config.device)

    @property
    def max_length(self) -> int:
        """Tokens kept of a text."""
        return min(self.params.max_length, self.model.max_length)

    @cached_property
    def made(self) -> VectorFile | None:
        """The file of vectors made elsewhere, where one is given."""
        return None if self.params.vectors is None else VectorFile(Path(self.params.vectors))

    @cached_property
    def causal(self) -> ModelBeside | None:
        """The model, where it is a causal language model whose hidden states are the embeddings."""
        if self.method != MODEL:
            return None
        return ModelBeside(self.params.model or "", self.params.revision, KEY, self.config)

    @property
    def dimension(self) -> int:
        """Length of a vector, as the model's files or the file of vectors say."""
        if self.made is not None:
            return self.made.dimension
        return self.model.dimension if self.causal is None else hidden_size(self.causal.architecture)

    @property
    def schema(self) -> pa.Schema:
        """Columns of the table; the vectors' length is the model's."""
        vector = pa.list_(pa.float32(), self.dimension)
        return pa.schema(
            [
                ROW,
                ROW_ID,
                column("embedding", vector, "the row's vector, scaled to length 1; null where not valid"),
                column(
                    "n_tokens", pa.int32(), "tokens of the text before truncation; null for vectors of a file"
                ),
                VALID,
                REASON,
            ]
        )

    def ingredients(self) -> dict[str, Any]:
        """Return what decides the vectors, in place of the parameters: files count by their content."""
        if self.made is not None:
            return {"params": {"vectors": self.made.digest}}
        kept = self.params.model_dump(mode="json", include={"text", "prompt"}) | {"dtype": self._dtype}
        model = {"model": self.model.identity, "method": self.method, "max_length": self.max_length}
        return {"params": kept | model}

    @property
    def _dtype(self) -> Dtype:
        """The number format that counts, ``auto`` decided: as bf16 says, whatever the device makes of it."""
        if self.params.dtype != "auto":
            return self.params.dtype
        return "bfloat16" if self.config.bf16 is True else "float32"

    def check(self, need: api.Need, n_rows: int | None) -> None:
        """Check the file of vectors, or that the embedder and its model are there."""
        if self.made is None:
            check_installed(self.method)
            if self.causal is None:
                self.model.check(self.config.trust_remote_code)
            else:
                self.causal.check()
        elif n_rows is not None:
            self.made.check_rows(n_rows)

    def row_flops(self, tokens: float) -> float:
        """Return those of a forward pass of the embedding model; none where vectors are read from a file."""
        if self.made is not None:
            return 0.0
        found = stored_weights(self.params.model or "", self.params.revision)
        return 0.0 if found is None else 2.0 * found.parameters * min(tokens, self.max_length)

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load the embedder once; yield the function from rows to vectors."""
        report = _Report(progress, self)
        if self.made is not None:
            self.made.check_rows(given.table.n_rows)
            yield partial(self._read, self.made, report)
        else:
            with make_embedder(self.method, self._settings(given.folder), progress.say) as embedder:
                self._check_dimension(embedder)
                if self.params.method == "auto":
                    progress.say(f"embed_method: auto is {self.method} ({ORDER})")
                yield partial(self._embed, embedder, self._texts(), report)
        report.finish()

    def _settings(self, folder: Path | None) -> EmbedderSettings:
        from dataflex_pipeline.models.base import resolve_device

        return EmbedderSettings(
            self.params.model or "",
            self.params.revision,
            self._dtype,
            self.max_length,
            self.params.batch_size,
            resolve_device(self.config.device),
            self.config.trust_remote_code,
            self.params.embed_gpu_memory_utilization,
            self.config.score_batch_tokens,
            folder,
        )

    def _check_dimension(self, embedder: Embedder) -> None:
        if embedder.dimension != self.dimension:
            raise DataflexError(
                f"The embedding model {self.params.model} gives vectors of length {embedder.dimension}.",
                f"Its files say {self.dimension}, and the table was laid out for that.",
                "Embed the rows with a program of your own and give the vectors: embeddings: path.npy.",
            )

    def _texts(self) -> Callable[[pa.Table], list[str]]:
        """Return the function from rows to their texts, without the prompt."""
        kind = self.params.text
        if kind != "chat_template":
            return lambda rows: [row_text(turns, kind) for turns in rows.column("messages").to_pylist()]
        from dataflex_pipeline.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.config)
        exact = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return lambda rows: tokenizer.batch_decode(rows.column("input_ids").to_pylist(), **exact)

    def _read(self, made: VectorFile, report: _Report, rows: pa.Table) -> pa.Table:
        vectors = made.rows(rows.column("row")[0].as_py(), rows.column("row_id"))
        valid = rows.column("valid").to_numpy(zero_copy_only=False)
        return self._table(rows, vectors[valid], None, [None] * int(valid.sum()), report)

    def _embed(
        self,
        embedder: Embedder,
        texts_of: Callable[[pa.Table], list[str]],
        report: _Report,
        rows: pa.Table,
    ) -> pa.Table:
        texts = texts_of(rows.filter(rows.column("valid")))
        empty = [not text.strip() for text in texts]
        whole = [self.params.prompt + text for text in texts]
        if self.causal is not None:
            vectors, counts = cast("CausalEmbedder", embedder).embed_counted(whole)
        else:
            vectors, counts = self._counted_beside(embedder, whole)
        report.cut += int((counts > self.max_length).sum())
        reasons = ["there is no text to embed" if blank else None for blank in empty]
        return self._table(rows, vectors, counts, reasons, report)

    def _counted_beside(self, embedder: Embedder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return vectors and token counts of texts from an embedder that does not tell the latter.

        Tokens are counted while the model runs: it makes tokens of its own, of the texts cut off.
        """
        with ThreadPoolExecutor(1) as beside:
            counting = beside.submit(self.model.token_counts, texts, self.config.trust_remote_code)
            return embedder.embed(texts), np.array(counting.result(), dtype=np.int32)

    def _table(
        self,
        rows: pa.Table,
        vectors: np.ndarray,
        counts: np.ndarray | None,
        reasons: list[str | None],
        report: _Report,
    ) -> pa.Table:
        """Put the table together from the vectors, token counts and reasons of the valid rows."""
        unit, lengths, found = unit_vectors(vectors)
        report.scaled += int((np.abs(lengths - 1) > UNIT_TOLERANCE).sum())
        reasons = [given or seen for given, seen in zip(reasons, found, strict=True)]
        valid = rows.column("valid").to_numpy(zero_copy_only=False)
        own = np.array([reason is None for reason in reasons], dtype=bool)
        kept = valid.copy()
        kept[valid] = own
        full = np.zeros((rows.num_rows, self.dimension), dtype=np.float32)
        full[kept] = unit[own]
        flat = pa.array(full.reshape(-1), pa.float32())
        reason = rows.column("reason").to_pylist()
        for position, text in zip(np.flatnonzero(valid), reasons, strict=True):
            reason[position] = text
            if text is not None:
                report.bad.append((rows.column("row")[int(position)].as_py(), text))
        tokens = np.zeros(rows.num_rows, dtype=np.int32)
        tokens[valid] = 0 if counts is None else counts
        columns = {
            "row": rows.column("row"),
            "row_id": rows.column("row_id"),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, self.dimension, mask=pa.array(~kept)),
            "n_tokens": pa.array(tokens, mask=~valid if counts is not None else np.ones_like(valid)),
            "valid": pa.array(kept),
            "reason": pa.array(reason, pa.string()),
        }
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)


class _Report:
    """What has to be said about the rows of the parts that were computed just now.

    Attributes:
        cut: texts longer than the limit. bad: (row, reason) without a vector. scaled: vectors of a file
            whose length was not 1.
    """

    def __init__(self, progress: api.Progress, feature: Embeddings) -> None:
        self.progress, self.feature = progress, feature
        self.cut, self.scaled = 0, 0
        self.bad: list[tuple[int, str]] = []

    def finish(self) -> None:
        """Say it."""
        if self.cut:
            limit = self.feature.max_length
            self.progress.say(f"{self.cut} texts are longer than {limit} tokens: embedded up to there")
        if self.scaled and self.feature.made is not None:
            name = self.feature.made.path.name
            self.progress.say(f"{self.scaled} vectors of {name} were not of length 1: scaled to it")
        if self.bad:
            shown = "; ".join(f"row {row}: {reason}" for row, reason in self.bad[:SHOWN])
            more = "; ..." if len(self.bad) > SHOWN else ""
            self.progress.say(f"{len(self.bad)} rows have no embedding ({shown}{more})")
