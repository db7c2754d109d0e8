"""The terms of rows: each row's different terms with their counts, for methods that compare rows by words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.data.texts import row_text
from dataflex_pipeline.data.words import terms
from dataflex_pipeline.features.score_params import WordParams
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column

NO_WORDS = "there is no term in the text"


class Words(api.Feature):
    """The different terms of every row, in the order of the alphabet, and how often each occurs."""

    Params = WordParams
    params: WordParams
    uses_model = False
    schema = pa.schema(
        [
            ROW,
            ROW_ID,
            column("terms", pa.list_(pa.string()), "the row's different terms, sorted"),
            column("counts", pa.list_(pa.int32()), "how often each of them occurs; length of terms"),
            column("n_terms", pa.int32(), "terms in all, repeated ones too"),
            VALID,
            REASON,
        ]
    )

    @property
    def input_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """Columns of the prepared rows that the text needs."""
        text = "input_ids" if self.params.text == "chat_template" else "messages"
        return ("row", "row_id", text, "valid", "reason")

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Yield the function from rows to their terms."""
        texts_of = self._texts()

        def compute(rows: pa.Table) -> pa.Table:
            valid = rows.column("valid").to_pylist()
            texts = iter(texts_of(rows.filter(rows.column("valid"))))
            counted = [Counter(terms(next(texts))) if usable else Counter() for usable in valid]
            return self._table(rows, valid, counted)

        yield compute

    def _texts(self) -> Callable[[pa.Table], list[str]]:
        kind = self.params.text
        if kind == "chat_template":
            from dataflex_pipeline.models.tokenizer import load_tokenizer

            tokenizer = load_tokenizer(self.config)
            return lambda rows: tokenizer.batch_decode(
                rows.column("input_ids").to_pylist(), skip_special_tokens=True
            )
        return lambda rows: [row_text(turns, kind) for turns in rows.column("messages").to_pylist()]

    def _table(self, rows: pa.Table, valid: list[bool], counted: list[Counter[str]]) -> pa.Table:
        ordered = [sorted(each.items()) for each in counted]
        given = rows.column("reason").to_pylist()
        columns: dict[str, Any] = {
            "row": rows.column("row"),
            "row_id": rows.column("row_id"),
            "terms": [[term for term, _ in each] or None for each in ordered],
            "counts": [[count for _, count in each] or None for each in ordered],
            "n_terms": [each.total() or None for each in counted],
            "valid": [usable and bool(each) for usable, each in zip(valid, counted, strict=True)],
            "reason": [
                NO_WORDS if usable and not each else why
                for usable, each, why in zip(valid, counted, given, strict=True)
            ],
        }
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)
