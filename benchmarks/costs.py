"""The cost model of docs/scaling.md beside measurements: FLOPs, seconds and bytes per row.

    python benchmarks/costs.py --json costs.json

FLOPs of a row of T tokens, R of them labelled, on a model of hidden size d, L layers, n parameters in their
linear layers, V words, and a LoRA adapter of p parameters (2 FLOPs per multiply-add):

    losses:     F = 2 (n + p) T + 4 L d T^2 + 2 d V R
    gradients:  2 F (forward, and backward through the activations) + 4 p T (the adapter's own gradients)

The rate of each (FLOPs per second) is taken from one shape and predicts the others; seconds are of CPU time
on one thread, so other programs hardly count. Bytes are those of Parquet files of random
numbers, which do not compress; the model is the sum of the columns' widths.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from made_up import (
    llama_settings,
    make_batches,
    random_llama,
    random_rows,
    random_updates,
    spread_lengths,
    with_adapter,
)
from measuring import seconds_of
from surroundings import publish, surroundings
from tables import identities

from dataflex_pipeline.features.losses import loss_table
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.gradients.stream import ProjectedGradients, projected_batch
from dataflex_pipeline.models.batches import Sequences
from dataflex_pipeline.models.token_losses import token_losses
from dataflex_pipeline.schemas import INDEX, LOSSES, PROBABILITIES, SCORES, column
from dataflex_pipeline.store.tables import table_writer

SHAPES = ((128, 4, 8192, 256), (256, 6, 8192, 128), (256, 6, 8192, 512), (384, 8, 16384, 256))
"""Hidden size, layers, vocabulary, longest row."""
REFERENCE = 2
"""The shape that the rates are taken from."""
TOKENS = 2048
ID_BYTES = 16.0
"""A row_id of 32 random hex characters as zstd leaves it: 4 bits each."""


def flops(model: Any, sequences: Sequences, vocabulary: int) -> tuple[float, float]:
    """Return the FLOPs of the losses and of the gradients of all rows."""
    inner = model.config
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linear = sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "lora_" not in name and "lm_head" not in name
    )
    lengths = sequences.lengths.astype(float)
    labelled = sequences.n_labels().astype(float)
    forward = (
        2 * (linear + adapter) * lengths
        + 4 * inner.num_hidden_layers * inner.hidden_size * lengths**2
        + 2 * inner.hidden_size * vocabulary * labelled
    ).sum()
    return float(forward), float(2 * forward + 4 * adapter * lengths.sum())


def compute(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure losses and gradients on every shape, and predict all from one."""
    found: list[dict[str, Any]] = []
    for hidden, layers, vocabulary, longest in SHAPES:
        model = with_adapter(random_llama(llama_settings(hidden, layers, vocabulary)), 16)
        rows = random_rows(spread_lengths(args.rows, longest), vocabulary)
        sequences = Sequences.of(rows)
        consumer = ProjectedGradients(make_projection("countsketch", 4096, 0), random_updates(model))

        def losses(model: Any = model, rows: pa.Table = rows) -> None:
            with torch.inference_mode(), token_losses(model) as opened:
                loss_table(opened, rows, TOKENS)

        def gradients(model: Any = model, sequences: Any = sequences, consumer: Any = consumer) -> None:
            with GradientCapture(model, consumer, print) as capture:
                for batch in make_batches(model, sequences, TOKENS):
                    projected_batch(capture, consumer, *batch)

        predicted = flops(model, sequences, vocabulary)
        measured = [min(seconds_of(work, "cpu") for _ in range(args.repeat)) for work in (losses, gradients)]
        for name, work, seconds in zip(("losses", "gradients"), predicted, measured, strict=True):
            found.append(
                {
                    "shape": f"hidden {hidden}, {layers} layers, vocabulary {vocabulary}, up to {longest}",
                    "feature": name,
                    "gflops_per_row": work / args.rows / 1e9,
                    "measured_seconds": seconds,
                    "gflops_per_second": work / seconds / 1e9,
                }
            )
    for number, line in enumerate(found):
        rate = found[2 * REFERENCE + number % 2]["gflops_per_second"]
        line["measured/predicted"] = rate / line["gflops_per_second"]
    return found


def tables(rows: int) -> list[dict[str, Any]]:
    """Write tables of random numbers, and hold their bytes per row against the widths of their columns."""
    gradient = column("gradient", pa.list_(pa.float16(), 4096), "projected gradient")
    others = [column(name, pa.float64(), name) for name in ("norm", "loss")]
    wide = pa.schema([*LOSSES, gradient, *others[:1]])
    widths = {
        "losses": (LOSSES, ID_BYTES + 8),
        "gradients, K = 4,096": (wide, ID_BYTES + 2 * 4096 + 2 * 8),
        "scores": (SCORES, ID_BYTES + 8),
        "probabilities": (PROBABILITIES, ID_BYTES + 8),
        "index": (INDEX, ID_BYTES + 4 + 8 + 8),
    }
    found = []
    for name, (schema, predicted) in widths.items():
        count = min(rows, 4096) if "gradients" in name else rows
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.parquet"
            with table_writer(path, schema, {}) as write:
                write(random_table(schema, count))
            size = path.stat().st_size / count
        found.append({"table": name, "predicted_bytes": predicted, "measured_bytes": size})
    return found


def random_table(schema: pa.Schema, rows: int) -> pa.Table:
    """Return a table of random numbers with consecutive rows."""
    stream = np.random.default_rng(0)
    columns: dict[str, Any] = {}
    for field in schema:
        if field.name in ("row", "position"):
            columns[field.name] = np.arange(rows)
        elif field.name == "row_id":
            columns[field.name] = identities(0, rows)
        elif field.name == "valid":
            columns[field.name] = np.ones(rows, bool)
        elif field.name == "reason":
            columns[field.name] = pa.nulls(rows, pa.string())
        elif pa.types.is_fixed_size_list(field.type):
            flat = stream.normal(size=rows * field.type.list_size).astype(np.float16)
            columns[field.name] = pa.FixedSizeListArray.from_arrays(flat, field.type.list_size)
        elif pa.types.is_integer(field.type):
            columns[field.name] = pa.array(stream.integers(1, 300, rows), field.type)
        else:
            columns[field.name] = pa.array(stream.random(rows), pa.float64()).cast(field.type, safe=False)
    return pa.table(columns, schema=schema)


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="rows per shape")
    parser.add_argument("--table-rows", type=int, default=200_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {"compute": compute(args), "tables": tables(args.table_rows), **surroundings()}
    publish(results, args.json)


if __name__ == "__main__":
    main()
