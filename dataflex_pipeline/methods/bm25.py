"""BM25: the rows that share the rare words of the target.

    score(z) = max (or mean) over target rows z' of bm25(z', z)
    bm25(q, d) = sum over the different terms w of q of idf(w) f(w, d) / (f(w, d) + k1 (1 - b + b |d| / L))
    idf(w) = ln(1 + (N - n(w) + 1/2) / (n(w) + 1/2))

with q the terms of a target row, d those of a pool row, f(w, d) how often w occurs in d, |d| the terms of d,
L their mean over the N valid rows of the pool, n(w) the rows that have w. That is Lucene's form (and that of
the package bm25s), which leaves the constant factor k1 + 1 out. A term counts once in a query, however often
the target row repeats it. A row that shares no term with the target has 0.

What a term is, data/words.py says. The pool is read block by block, and only the target's terms are kept.

Source: Robertson and Zaragoza, The Probabilistic Relevance Framework: BM25 and Beyond (2009); Kamphuis et
al., Which BM25 Do You Mean? (ECIR 2020), for the forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.data.leaks import say_leaks
from dataflex_pipeline.data.texts import Text
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.features.score_params import WordParams
from dataflex_pipeline.sampling.softmax import Softmax
from dataflex_pipeline.schemas import column

TILE = 1 << 22
"""Pairs of a pool row and a target row in memory at a time: 32 MB."""
NEEDED = ["terms", "counts", "n_terms", "valid"]


@dataclass(frozen=True)
class Queries:
    """The target's terms and what the pool says about them.

    Attributes:
        rows: target rows that have terms, rising. [M] int64
        terms: the different terms of all of them. [V]
        idf: of each. [V] float64
        has: which target row has which term, sparse. [V, M]
        mean_terms: of a valid row of the pool.
    """

    rows: np.ndarray
    terms: pa.Array
    idf: np.ndarray
    has: Any
    mean_terms: float


class Bm25(api.Method):
    """The rows whose words match some target row's best."""

    summary = "rows that share the rare words of some target row (BM25); no model"
    source = "Robertson and Zaragoza 2009, The Probabilistic Relevance Framework"
    default_strategy = "top_k"
    columns = (
        column("nearest_target", pa.int64(), "target row that it matches best, ties by row"),
        column("shared_terms", pa.int32(), "different terms that it shares with the whole target"),
        column("n_terms", pa.int32(), "terms of the row, repeated ones too"),
    )

    class Params(api.Params):
        """Parameters of bm25."""

        aggregate: Literal["max", "mean"] = Field(
            "max", description="over target rows: max (like some of them) or mean (like all of them)"
        )
        k1: float = Field(1.5, ge=0, allow_inf_nan=False, description="how much repetition adds; 0: nothing")
        b: float = Field(0.75, ge=0, le=1, description="how much long rows are held back; 0: not at all")
        text: Text = Field(
            "conversation",
            description="what of a pool row is compared: conversation, prompt, response, chat_template",
        )
        query_text: Text | None = Field(None, description="the same of a target row; null: as text says")
        temperature: float = Field(
            0.1,
            gt=0,
            description="for strategy: sample, which draws by exp(score / (largest |score| x temperature))",
        )

    params: Params

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the terms of pool and target."""
        query = self.params.query_text or self.params.text
        return {
            "pool": api.Need("words", "pool", params=WordParams(text=self.params.text)),
            "target": api.Need("words", "target", params=WordParams(text=query)),
        }

    def begin(self, tables: Mapping[str, api.BlockTable], selection: api.Selection) -> Queries:
        """Read the target's terms, and count the pool's rows that have them."""
        say_leaks(tables["target"], tables["pool"], selection.say)
        return self._queries(tables)

    def _queries(self, tables: Mapping[str, api.BlockTable]) -> Queries:
        rows, lists = _target_terms(tables["target"])
        flat = pa.array([term for terms in lists for term in terms], pa.string())
        vocabulary = flat.unique()
        frequency, n_valid, n_terms = np.zeros(len(vocabulary)), 0, 0
        for block in tables["pool"].blocks(NEEDED):
            kept = block.filter(block.column("valid"))
            found = _places(kept.column("terms").flatten(), vocabulary)
            frequency += np.bincount(found[found >= 0], minlength=len(vocabulary))
            n_valid += kept.num_rows
            n_terms += pc.sum(kept.column("n_terms")).as_py() or 0
        idf = np.log1p((n_valid - frequency + 0.5) / (frequency + 0.5))
        owners = np.repeat(np.arange(len(rows)), [len(terms) for terms in lists])
        has = _sparse(np.ones(len(flat)), (_places(flat, vocabulary), owners), (len(vocabulary), len(rows)))
        return Queries(rows, vocabulary, idf, has.tocsr(), n_terms / max(1, n_valid))

    def score(self, block: api.Block, state: Queries) -> Mapping[str, np.ndarray]:
        """Return the aggregate over target rows, and which of them matches best."""
        weights, shared = self._weights(block, state)
        best, place = np.zeros(block.pool.num_rows), np.zeros(block.pool.num_rows, dtype=np.int64)
        for rows, pairs in _dense(weights, state.has):
            place[rows] = pairs.argmax(axis=1)
            best[rows] = pairs.max(axis=1) if self.params.aggregate == "max" else pairs.mean(axis=1)
        return {
            "score": best,
            "nearest_target": state.rows[place],
            "shared_terms": shared,
            "n_terms": block.column("pool", "n_terms"),
        }

    def _weights(self, block: api.Block, state: Queries) -> tuple[Any, np.ndarray]:
        """Return what each term of the target is worth in each row, sparse [rows, V], and how many it has."""
        batch, n_rows = block.features["pool"], block.pool.num_rows
        lists, n_terms = batch.column("terms"), block.column("pool", "n_terms")
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        owners = np.repeat(np.arange(n_rows), lengths)
        places = _places(lists.flatten(), state.terms)
        counts = batch.column("counts").flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        known = places >= 0
        owners, places, counts = owners[known], places[known], counts[known]
        k1, b = self.params.k1, self.params.b
        length = k1 * (1 - b + b * n_terms[owners] / state.mean_terms)
        worth = state.idf[places] * counts / (counts + length)
        shared = np.bincount(owners, minlength=n_rows)
        return _sparse(worth, (owners, places), (n_rows, len(state.terms))).tocsr(), shared

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> Softmax:
        """Find the largest score and the scale of the softmax."""
        return Softmax.fit(scores, self.params.temperature)

    def weigh(self, block: pa.RecordBatch, fitted: Softmax) -> np.ndarray:
        """Return exp((score - largest) / scale)."""
        return fitted.weigh(block)

    def by_target_row(
        self, tables: Mapping[str, api.BlockTable], selection: api.Selection
    ) -> api.TargetRanking:
        """Let each target row rank the pool by BM25; one does not look at rows that share no term with it."""
        state = self._queries(tables)

        def values(block: api.Block) -> np.ndarray:
            pairs: np.ndarray = (self._weights(block, state)[0] @ state.has).toarray()
            return np.where(pairs > 0, pairs, np.nan)

        return api.TargetRanking(state.rows, values)


def _target_terms(table: api.BlockTable) -> tuple[np.ndarray, list[list[str]]]:
    """Return the target rows that have terms, and these.

    Raises:
        DataError: there is none.
    """
    rows: list[int] = []
    lists: list[list[str]] = []
    for block in table.blocks(["row", "terms", "valid"]):
        kept = block.filter(block.column("valid"))
        rows += kept.column("row").to_pylist()
        lists += kept.column("terms").to_pylist()
    if not rows:
        raise DataError(
            "No row of the target has any term.",
            "bm25 finds pool rows by the words of the target.",
            "Look at the reason column of the target's table, or set bm25.query_text to another text.",
        )
    return np.array(rows, dtype=np.int64), lists


def _places(terms: pa.Array, vocabulary: pa.Array) -> np.ndarray:
    """Return the place of each term in the vocabulary, -1 where it is not in it. [terms] int64"""
    found = pc.fill_null(pc.index_in(terms, value_set=vocabulary), -1)
    return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)


def _sparse(values: np.ndarray, places: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]) -> Any:
    from scipy.sparse import coo_array

    return coo_array((values, places), shape=shape)


def _dense(weights: Any, has: Any) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the scores of some rows with every target row, a few rows at a time. [step, M] each"""
    n_rows, step = weights.shape[0], max(1, TILE // has.shape[1])
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        yield rows, (weights[rows] @ has).toarray()
