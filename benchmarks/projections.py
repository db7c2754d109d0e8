"""Seconds of the random projections on gradients of several shapes, in one run.

    python benchmarks/projections.py --json projections.json
    python benchmarks/projections.py --device cuda --shapes 8x524288 8x1409024 32x65536

For every shape, rows x coordinates of one parameter, the projections take turns; each figure is the fastest
of --repeat calls in milliseconds, with its tables at hand. ``tables`` is what making them takes, once per
parameter, or once per batch where they do not fit (see sketches.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measuring import fastest, seconds_of
from surroundings import publish, surroundings

from dataflex_pipeline.gradients.projection import make_projection

SKETCHES = ("countsketch", "countshift")


def measure_shape(rows: int, numel: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure every projection on the gradients of one parameter."""
    device = torch.device(args.device)
    block = torch.randn(rows, numel, device=device)
    into = torch.zeros(rows, args.dim, device=device)
    kinds = [*SKETCHES, *(["rademacher"] if rows * numel <= args.dense else [])]
    made = {kind: make_projection(kind, args.dim, 0, device=args.device) for kind in kinds}
    work = {
        kind: lambda projection=projection: projection.add("w", block, into)
        for kind, projection in made.items()
    }
    first = {kind: seconds_of(work[kind], args.device) for kind in kinds}
    seconds = fastest(work, args.repeat, args.device)
    return {
        "rows": rows,
        "coordinates": numel,
        "milliseconds": {kind: round(1e3 * value, 3) for kind, value in seconds.items()},
        "tables": {kind: round(1e3 * (first[kind] - seconds[kind]), 3) for kind in SKETCHES},
    }


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["8x524288", "32x65536", "1x524288", "8x8192"])
    parser.add_argument("--dim", type=int, default=4096, help="K")
    parser.add_argument("--dense", type=int, default=1 << 17, help="elements up to which rademacher runs too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    results = [measure_shape(rows, numel, args) for rows, numel in shapes]
    publish({"shapes": results, "dim": args.dim, **surroundings()}, args.json)


if __name__ == "__main__":
    main()
