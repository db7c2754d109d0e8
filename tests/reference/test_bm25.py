"""bm25: terms by hand, and scores against a plain loop over the formula and against the package bm25s."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex_pipeline.api import Block, FeatureInput, Need, Selection, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.data.words import terms
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.features.plan import make_feature
from dataflex_pipeline.methods import build_method, method_class
from dataflex_pipeline.pipeline.score import score_block
from dataflex_pipeline.schemas import SCORES
from dataflex_pipeline.testing.tables import MemoryTable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, THE hat!", ["the", "cat", "the", "hat"]),
        ("北京话 ok", ["北", "京", "话", "北京", "京话", "ok"]),
        ("ｆｕｌｌ width", ["full", "width"]),
        (
            "parseUrl2(my_var) += HTTPServer",
            ["parseurl2", "parse", "url", "2", "my_var", "my", "var", "+=", "httpserver", "http", "server"],
        ),
        ("x == 3.14 -> y", ["x", "==", "3", "14", "->", "y"]),
        ("Straße Ωmega été", ["straße", "ωmega", "été"]),
        ("ภาษา a", ["ภ", "า", "ษ", "า", "ภา", "าษ", "ษา", "a"]),
        (" ( ; ) ", []),
    ],
)
def test_terms_by_hand(text, expected):
    assert terms(text) == expected


@given(st.text(max_size=60))
def test_terms_are_lower_case_without_spaces(text):
    found = terms(text)
    assert found == terms(text)
    assert all(term and not any(char.isspace() for char in term) for term in found)


def rows_of(texts):
    n = len(texts)
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": "."}] for text in texts]
    return pa.table(
        {
            "row": range(n),
            "row_id": [f"{hash(text) & 0xFFFFFFFF:032x}" for text in texts],
            "messages": turns,
            "valid": [text is not None for text in texts],
            "reason": pa.nulls(n, pa.string()),
        }
    )


def words(texts):
    feature = make_feature(Need("words", params={}), Config())
    rows = rows_of(texts)
    table = MemoryTable(rows)
    with feature.open(FeatureInput(table, "", None, None), Silent()) as compute:
        return compute(rows)


def scored(pool, target, cut=None, **params):
    """Return the score table, and the scores of each pair by the ranking of target rows."""
    method = build_method("bm25", method_class("bm25"), params, "a test")
    tables = {"pool": MemoryTable(words(pool), cut or 1 << 20), "target": MemoryTable(words(target))}
    selection = Selection(1, 1, 0, lambda line: None)
    state = method.begin(tables, selection)
    schema = pa.schema([*SCORES, *method.own_columns(state)])
    ranking, found, pairs = method.by_target_row(tables, selection), [], []
    for part in tables["pool"].blocks():
        block = Block(part.select(["row", "row_id", "valid", "reason"]), {"pool": part})
        found.append(score_block(method, block, state, schema))
        pairs.append(ranking.values(block))
    return pa.concat_tables(found), np.concatenate(pairs)


def plain(pool, target, k1=1.5, b=0.75):
    """Return BM25 of every pool row for every target row by the formula. [pool, target]"""
    documents, queries = [terms(text) for text in pool], [set(terms(text)) for text in target]
    kept = [each for each in documents if each]
    mean = sum(map(len, kept)) / len(kept)
    found = np.full((len(pool), len(target)), np.nan)
    for place, document in enumerate(documents):
        for number, query in enumerate(queries):
            total = 0.0
            for word in query:
                n = sum(word in each for each in kept)
                idf = math.log(1 + (len(kept) - n + 0.5) / (n + 0.5))
                f = document.count(word)
                if f == 0:
                    continue
                total += idf * f / (f + k1 * (1 - b + b * len(document) / mean))
            found[place, number] = total
    return found


WORDS = [
    *("the", "a", "of", "river", "matrix", "猫", "北京", "invoice", "snake_case", "camelCase"),
    *("x", "+=", "y", "==", "3", "return", "def"),
]


def made_texts(count, seed):
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(WORDS) + 1)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30), p=weights / weights.sum())) for _ in range(count)]


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
@pytest.mark.parametrize("params", [{}, {"k1": 0.9, "b": 0.4, "aggregate": "mean"}, {"b": 0.0}, {"k1": 0.0}])
def test_equal_to_the_formula(params, cut):
    pool, target = made_texts(50, 1), made_texts(6, 2)
    found, pairs = scored(pool, target, cut, **params)
    values = {key: value for key, value in params.items() if key != "aggregate"}
    expected = plain(pool, target, **values)
    best = expected.mean(1) if params.get("aggregate") == "mean" else expected.max(1)
    assert np.abs(found["score"].to_numpy() - best).max() < 1e-9
    nearest = expected[np.arange(50), found["nearest_target"].to_numpy()]
    assert np.abs(nearest - expected.max(1)).max() < 1e-9
    assert np.abs(np.nan_to_num(pairs) - expected).max() < 1e-9
    assert np.isnan(pairs).sum() == (expected == 0).sum()


def test_equal_to_the_package_bm25s():
    import bm25s

    pool, target = made_texts(80, 3), made_texts(5, 4)
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([terms(text) for text in pool], show_progress=False)
    expected = np.stack([index.get_scores(sorted(set(terms(text)))) for text in target], axis=1)
    found, _ = scored(pool, target)
    assert np.abs(found["score"].to_numpy() - expected.max(1)).max() < 1e-5


def test_a_planted_world_is_found():
    """Rows that share one rare word with a target row come first, in Chinese and in code too."""
    pool = made_texts(40, 5)
    pool += ["the river of a zebra", "我喜欢吃火锅", "def load_parquet(path): return path", "?!", "the"]
    target = ["a zebra", "火锅好吃吗", "loadParquet"]
    found, pairs = scored(pool, target)
    assert set(np.argsort(-np.nan_to_num(found["score"].to_numpy(zero_copy_only=False)))[:3]) == {40, 41, 42}
    assert [int(np.nanargmax(pairs[:, number])) for number in range(3)] == [40, 41, 42]
    assert found["valid"].to_pylist()[43] is False
    assert found["reason"].to_pylist()[43] == "there is no term in the text"


def test_a_target_without_words_is_an_error():
    with pytest.raises(DataError, match="No row of the target has any term"):
        scored(["a b"], ["?!"])
