"""Tables of unit vectors, and the features on them, without any embedder."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.features.density import Density
from dataflex_pipeline.features.neighbours import Neighbours
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column
from dataflex_pipeline.store.parts import PartsWriter

ON_CPU = SimpleNamespace(device="cpu")
"""All of a configuration that features on vectors read."""


def unit(vectors):
    """Scale rows to length 1, as float32."""
    vectors = np.asarray(vectors, dtype=np.float64)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(rng, n, centres, noise=0.3):
    """Vectors around centres, of length 1."""
    dimensions = centres.shape[1]
    spread = rng.standard_normal((n, dimensions)) * noise / np.sqrt(dimensions)
    return unit(centres[rng.integers(0, len(centres), n)] + spread)


def embeddings(folder, vectors, valid=None, part=64, first_id=0):
    """Write a table of embeddings; rows that are not valid have no vector."""
    n, dimensions = vectors.shape
    valid = np.ones(n, dtype=bool) if valid is None else np.asarray(valid)
    schema = pa.schema(
        [ROW, ROW_ID, column("embedding", pa.list_(pa.float32(), dimensions), "vector"), VALID, REASON]
    )
    writer = PartsWriter(folder, schema, {"made": "for a test", "folder": str(folder)})
    starts = range(0, n, part)
    for number, start in enumerate(starts):
        rows = slice(start, min(n, start + part))
        flat = pa.array(np.ascontiguousarray(vectors[rows]).reshape(-1))
        kept = valid[rows]
        writer.write(
            number,
            pa.table(
                {
                    "row": np.arange(rows.start, rows.stop),
                    "row_id": [f"{first_id + row:08x}" for row in range(rows.start, rows.stop)],
                    "embedding": pa.FixedSizeListArray.from_arrays(flat, dimensions, mask=pa.array(~kept)),
                    "valid": kept,
                    "reason": [None if ok else "there is no text to embed" for ok in kept],
                }
            ),
        )
    return writer.finish(len(starts), {})


def computed(folder, feature, over, tables, part=50):
    """Compute a feature over a table, part by part, as a run would; keeps what is there already."""
    writer = PartsWriter(folder, feature.schema, {"feature": type(feature).__name__, "folder": str(folder)})
    given = api.FeatureInput(over, over.fingerprint, None, None, tables, folder)
    n_parts = -(-over.n_rows // part)
    columns = [name for name in feature.input_columns if name in over.schema.names]
    with feature.open(given, api.Silent()) as compute:
        for number in range(n_parts):
            if number not in writer.done:
                rows = over.rows(number * part, (number + 1) * part, columns)
                writer.write(number, compute(rows))
    return writer.finish(n_parts, {})


def tsds_tables(
    folder,
    pool,
    target,
    *,
    pool_valid=None,
    target_valid=None,
    near=None,
    crowd=None,
    part=50,
    first_id=1 << 20,
):
    """Return the tables that tsds reads, from vectors: pool, target, neighbours, density."""
    tables = {
        "pool": embeddings(folder / "pool", pool, pool_valid),
        "target": embeddings(folder / "target", target, target_valid, first_id=first_id),
    }
    neighbours = Neighbours(Neighbours.Params(**(near or {})), ON_CPU)
    tables["neighbours"] = computed(folder / "neighbours", neighbours, tables["target"], tables, part)
    density = Density(Density.Params(**(crowd or {})), ON_CPU)
    tables["density"] = computed(folder / "density", density, tables["pool"], tables, part)
    return tables


def selection(said=None):
    """What a method knows about the first of two selections."""
    return api.Selection(1, 2, 0, (said if said is not None else []).append)


def score_whole(method, tables, pool, state):
    """Score the whole pool in blocks of 37 rows; return columns as lists."""
    features = {key: tables[key] for key in method.needs(selection()) if key in ("pool", "density")}
    found = {}
    for start in range(0, pool.n_rows, 37):
        rows = (
            pool.rows(start, start + 37, ["row", "row_id", "valid", "reason"])
            .combine_chunks()
            .to_batches()[0]
        )
        block = api.Block(
            rows,
            {
                key: table.rows(start, start + 37, table.schema.names).combine_chunks().to_batches()[0]
                for key, table in features.items()
            },
        )
        for name, values in method.score(block, state).items():
            found.setdefault(name, []).extend(values.tolist())
    return found
