"""Draws from files: the same whatever they are stored as; changed pages are noticed."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from sampling_tables import MemoryTable, pool_of, probabilities_of, scores_of

from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.sampling import DrawSettings, draw, row_uniforms
from dataflex_pipeline.sampling.uniforms import row_words, uniforms_of, word_from
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.tables import TableFile, table_writer

N = 90_000  # more than a row group
RNG = np.random.default_rng(7)
VALID = RNG.random(N) > 0.1
KINDS = {
    "smooth": RNG.gamma(0.3, 1.0, N),
    "ties": RNG.integers(0, 50, N) / 7,
    "one large in a hundred": np.where(RNG.random(N) < 0.01, 1.0, 1e-6 * RNG.random(N)),
}


def memory(kind: str) -> tuple[MemoryTable, MemoryTable]:
    score = [float(v) if ok else None for v, ok in zip(KINDS[kind], VALID, strict=True)]
    weights = np.where(VALID, KINDS[kind], 0.0)
    return scores_of(score), probabilities_of(weights / weights.sum())


def written(folder, tables, how) -> list[TableFile]:
    files = []
    for name, table in zip("sp", tables, strict=True):
        path = folder / f"{how}-{name}.parquet"
        if how == "as now":
            with table_writer(path, table.schema, {}) as write:
                write(table.table)
        else:  # with a dictionary for every column but row_id
            names = [each for each in table.schema.names if each != "row_id"]
            special = {"row_id": "DELTA_LENGTH_BYTE_ARRAY"}
            options = {"use_dictionary": names, "column_encoding": special, "write_page_checksum": True}
            pq.write_table(table.table, path, row_group_size=65536, compression="zstd", **options)
        files.append(TableFile(path))
    return files


POOL = pool_of(N, sources=list("abb" * (N // 3)))

SETTINGS = [
    DrawSettings("sample", 500, weights="importance", seed=1),
    DrawSettings("sample", 500, num_samples=40_000, seed=1, shuffle=False),
    DrawSettings("top_k", 500, seed=1),
    DrawSettings("top_k", 500, num_samples=3_000, shuffle=False, source_quotas={"a": 0.3}),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_what_a_table_is_stored_as_changes_nothing(tmp_path, kind, settings):
    tables = memory(kind)
    expected = draw(*tables, POOL, settings)
    for how in ("as now", "with dictionaries"):
        for block_rows in (65536, 4_096):
            found = draw(*written(tmp_path, tables, how), POOL, settings, block_rows=block_rows)
            assert found.index.equals(expected.index)
            assert found.tau == expected.tau
    taken = expected.index.column("row").to_numpy()
    assert expected.index.column("score").to_pylist() == list(KINDS[kind][taken])


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_passed_over(kind):
    """The keys of all rows, computed and sorted, against the draw that skips most of them."""
    scores, probabilities = memory(kind)
    settings = DrawSettings("sample", 2_000, shuffle=False, seed=3)
    drawn = draw(scores, probabilities, POOL, settings, block_rows=1_000)
    p = probabilities.table.column("probability").to_numpy()
    with np.errstate(divide="ignore"):
        keys = -np.log(row_uniforms(derive_seed(3, "keys"), 0, N)) / p
    assert drawn.index.column("row").to_pylist() == np.argsort(keys, kind="stable")[:2_000].tolist()


@pytest.mark.parametrize("number", [1.0, 1 - 1e-15, 0.999, 0.5, 1e-3, 1e-15, 5e-17])
def test_words_below_the_limit_are_numbers_below(number):
    limit = word_from(number)
    if limit:
        assert uniforms_of(np.array([limit - np.uint64(1)]))[0] < number
    above = uniforms_of(np.array([limit], np.uint64))[0]
    assert above == pytest.approx(number, abs=4 * 2.0**-52)  # and not much lower than it has to be
    words = row_words(11, 0, 50_000)
    numbers = row_uniforms(11, 0, 50_000)
    assert np.array_equal(uniforms_of(words), numbers)
    assert set(np.flatnonzero(numbers >= number)) <= set(np.flatnonzero(words >= limit))


@pytest.mark.parametrize(("which", "column"), [(0, "score"), (0, "valid"), (1, "probability")])
def test_a_changed_page_is_noticed(tmp_path, which, column):
    tables = written(tmp_path, memory("smooth"), "as now")
    path = tables[which].path
    place = tables[which].schema.names.index(column)
    chunk = pq.read_metadata(path).row_group(1).column(place)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=path.name):
        draw(*tables, POOL, DrawSettings("sample", 500))


def test_a_row_that_was_drawn_without_a_score_has_none_in_the_index():
    """A probability table may give one to rows that its scores say nothing of."""
    scores = scores_of([0.5, None, 0.25], valid=[True] * 3)
    for settings in (DrawSettings("sample", 3), DrawSettings("sample", 6, replacement=True)):
        index = draw(scores, probabilities_of([0.2, 0.6, 0.2]), pool_of(3), settings).index
        expected = [[0.5, None, 0.25][row] for row in index.column("row").to_pylist()]
        assert index.column("score").to_pylist() == expected
        assert None in expected
