"""The tables of a run open, as they are, with what people use: pandas, polars, DuckDB and pyarrow."""

import duckdb
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from cli_runs import finished

TABLES = ("scores/loss", "probabilities/loss", "index")


def with_pandas(path):
    frame = pd.read_parquet(path).astype(object)
    return frame.where(frame.notna(), None).to_dict("list")  # pandas has NaN where the table has null


def with_polars(path):
    return pl.read_parquet(path).to_dict(as_series=False)


def with_duckdb(path):
    relation = duckdb.sql(f"select * from '{path}'")
    return dict(zip(relation.columns, map(list, zip(*relation.fetchall(), strict=True)), strict=True))


@pytest.mark.parametrize("reader", [with_pandas, with_polars, with_duckdb])
@pytest.mark.parametrize("table", TABLES)
def test_the_same_numbers_everywhere(tiny_demo, table, reader):
    path = finished(tiny_demo) / "round-02" / f"{table}.parquet"
    expected = pq.read_table(path).to_pydict()
    assert len(expected["row"]) > 0
    assert reader(path) == expected


def test_the_parts_of_a_pool_open_together_and_join_with_the_scores(tiny_demo):
    run = finished(tiny_demo)
    expected = pq.read_table(run / "pool" / "part-00000.parquet", columns=["row_id", "original_skill"])
    joined = duckdb.sql(
        f"select row_id, original_skill from '{run}/pool/part-*.parquet' "
        f"join '{run}/round-02/scores/loss.parquet' using (row_id, row) order by row"
    ).fetchall()
    assert joined == list(zip(*expected.to_pydict().values(), strict=True))
    assert len(pl.scan_parquet(f"{run}/pool/part-*.parquet").collect()) == len(joined)


def test_columns_say_their_unit_and_the_file_says_what_it_was_made_from(tiny_demo):
    path = finished(tiny_demo) / "round-01" / "scores" / "loss.parquet"
    schema = pq.read_schema(path)
    assert all(schema.field(name).metadata[b"description"] for name in schema.names)
    assert b"nats per token" in schema.field("loss").metadata[b"description"]
    metadata = pq.read_metadata(path).metadata
    for key in (b"method", b"round", b"fingerprint", b"ingredients", b"schema_version", b"version"):
        assert b"dataflex." + key in metadata
