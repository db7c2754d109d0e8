"""TSDS from embeddings on, beside the usual recipe: neighbours, density, transport.

    python benchmarks/tsds.py --rows 100000 --targets 1000 --json tsds.json
    python benchmarks/tsds.py --sides ours --rows 1000000 --targets 1000
    python benchmarks/tsds.py --sides ours search --rows 100000 --rows 1000000    (seconds, memory against N)

Vectors are unit vectors of --dimensions around --centres random directions; pool and target share the
centres. Each side runs in a process of its own, so that its peak memory is its own:

- ``ours``: the tables of embeddings, as a run writes them, through the features ``neighbours`` and
  ``density`` and the method's shares; every intermediate table is written;
- ``recipe``: all vectors in memory, a faiss IVF index over them, another over the rows found, kde_K
  neighbours of each of those, a dictionary of densities, and a heap that is walked one (target, rank) at
  a time;
- ``search``: the recipe's two searches and nothing else, what they find thrown away; the second one for
  SEARCHED of the rows found, its seconds scaled up to all of them; with how many pairs of vectors faiss
  compared. A method that needs every row's nearest ones cannot compare fewer.

All look into the same cells (the same centroids, trained by each on the same sample), --nprobe of them per
query; ``--search exact`` makes the recipe probe all cells. Seconds are wall time, of the phases and in all,
and processor time, which other programs change less; making the vectors does not count. The peak is the
process's largest resident set.
"""

from __future__ import annotations

import argparse
import heapq
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from surroundings import publish, surroundings

BLOCK = 20_000
"""Vectors made at a time."""
SEARCHED = 50_000
"""Rows whose nearest ones ``search`` looks for; a million at a time would hold 12 GB of answers."""


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", help="size of the pool; may be given again")
    parser.add_argument("--targets", type=int, default=1000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--centres", type=int, default=200)
    parser.add_argument(
        "--noise", type=float, default=0.6, help="length of the noise around a centre of length 1"
    )
    parser.add_argument("--max-K", type=int, default=1000)
    parser.add_argument("--kde-K", type=int, default=1000)
    parser.add_argument("--sigma", type=float, default=0.75)
    parser.add_argument("--alpha", type=float, default=0.6)
    parser.add_argument("--C", type=float, default=5.0)
    parser.add_argument("--search", default="ivf", choices=["auto", "ivf", "exact"])
    parser.add_argument("--nprobe", type=int, default=10)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=["ours", "recipe"])
    parser.add_argument("--folder", type=Path, help="where the tables go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    folder = args.folder or Path(tempfile.mkdtemp())
    try:
        runs = [measure(args, folder / str(rows), rows) for rows in args.rows or [100_000]]
    finally:
        if not args.folder:
            shutil.rmtree(folder)
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "folder", "side")}
    publish(
        {"settings": settings, "runs": runs, **surroundings()},
        args.json,
    )


def measure(args: argparse.Namespace, folder: Path, rows: int) -> dict[str, Any]:
    """Run one size, each side in its own process, and compare what they found."""
    make_tables(args, folder, rows)
    sides = {side: run_side(args, folder, side) for side in args.sides}
    results: dict[str, Any] = {"rows": rows, **sides}
    if {"ours", "search"} <= sides.keys():
        processor = {side: found["processor_seconds"] for side, found in sides.items()}
        results["processor_time_over_search"] = processor["ours"] / processor["search"]
        results["nanoseconds_per_pair"] = {
            side: 1e9 * seconds / sides["search"]["pairs"] for side, seconds in processor.items()
        }
    if {"ours", "recipe"} <= sides.keys():
        mine, theirs = (np.load(folder / f"{side}.npy") for side in ("ours", "recipe"))
        total = {side: found["seconds"]["total"] for side, found in sides.items()}
        processor = {side: found["processor_seconds"] for side, found in sides.items()}
        peak = {side: found["peak_mib"] for side, found in sides.items()}
        results |= {
            "times_faster": total["recipe"] / total["ours"],
            "times_less_processor_time": processor["recipe"] / processor["ours"],
            "share_of_the_memory": peak["ours"] / peak["recipe"],
            "largest_difference": float(np.abs(mine - theirs).max()),
            "largest_probability": float(mine.max()),
            "total_variation": float(np.abs(mine - theirs).sum() / 2),
        }
    return results


def run_side(args: argparse.Namespace, folder: Path, side: str) -> dict[str, Any]:
    """Run one side in a process of its own and return what it printed."""
    flags = []
    for key, value in vars(args).items():
        if key in ("targets", "dimensions", "max_K", "kde_K", "sigma", "alpha", "C", "search", "nprobe"):
            flags += [f"--{key.replace('_', '-')}", str(value)]
    command = [sys.executable, __file__, *flags, "--side", side, "--folder", str(folder)]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def make_tables(args: argparse.Namespace, folder: Path, rows: int) -> None:
    """Write pool and target as tables of embeddings."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((args.centres, args.dimensions))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    for name, n in (("pool", rows), ("target", args.targets)):
        write_table(folder / name, n, centres, args.noise, rng)


def write_table(folder: Path, n: int, centres: np.ndarray, noise: float, rng: np.random.Generator) -> None:
    """Write one table of embeddings around centres."""
    from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column
    from dataflex_pipeline.store.parts import PartsWriter

    dimensions = centres.shape[1]
    vector = pa.list_(pa.float32(), dimensions)
    schema = pa.schema([ROW, ROW_ID, column("embedding", vector, "made up"), VALID, REASON])
    writer = PartsWriter(folder, schema, {"made up": folder.name, "rows": n})
    starts = range(0, n, BLOCK)
    for number, start in enumerate(starts):
        count = min(BLOCK, n - start)
        vectors = centres[rng.integers(0, len(centres), count)]
        vectors = vectors + rng.standard_normal(vectors.shape) * noise / np.sqrt(dimensions)
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        numbers = np.arange(start, start + count)
        columns = {
            "row": numbers,
            "row_id": [f"{folder.name}{row}" for row in numbers],
            "embedding": pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), dimensions),
            "valid": np.ones(count, dtype=bool),
            "reason": pa.nulls(count, pa.string()),
        }
        writer.write(number, pa.table(columns))
    writer.finish(len(starts), {})


def layout(args: argparse.Namespace, n: int) -> tuple[int, int]:
    """Return cells and cells looked into: half the square root of the vectors, as the recipe has it."""
    nlist = max(1, int(np.sqrt(n)) // 2)
    return nlist, nlist if args.search == "exact" else min(args.nprobe, nlist)


class Clock:
    """Seconds of the phases."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.processor = time.process_time()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.seconds[phase] = now - self.last
        self.last = now

    def result(self, **more: Any) -> dict[str, Any]:
        """Return the seconds, the peak memory and more."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "seconds": {**self.seconds, "total": self.last - self.began},
            "processor_seconds": time.process_time() - self.processor,
            "peak_mib": peak,
            **more,
        }


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Run the features and the shares over the tables in the folder."""
    from dataflex_pipeline import api
    from dataflex_pipeline.features.density import Density, support
    from dataflex_pipeline.features.neighbours import Neighbours
    from dataflex_pipeline.neighbours.spread import Crowd, spread_target
    from dataflex_pipeline.store.parts import PartedTable, PartsWriter

    class Loud(api.Silent):
        def say(self, line: str) -> None:
            print(line, file=sys.stderr)

    def computed(feature: api.Feature, over: PartedTable) -> PartedTable:
        writer = PartsWriter(args.folder / type(feature).__name__, feature.schema, {"of": over.fingerprint})
        given = api.FeatureInput(over, over.fingerprint, None, None, tables, writer.folder)
        with feature.open(given, Loud()) as compute:
            for number in range(over.n_parts):
                rows = over.part(
                    number, [name for name in feature.input_columns if name in over.schema.names]
                )
                writer.write(number, compute(rows))
        return writer.finish(over.n_parts, {})

    tables = {name: PartedTable.open(args.folder / name) for name in ("pool", "target")}
    n = tables["pool"].n_rows
    clock = Clock()
    nlist, nprobe = layout(args, n)
    cells = {"search": args.search, "nlist": nlist, "nprobe": nprobe}
    tables["neighbours"] = computed(
        Neighbours(Neighbours.Params(max_K=args.max_K, **cells), None), tables["target"]
    )
    clock.lap("neighbours")
    n_near = len(support(tables["neighbours"], n))
    nlist, nprobe = layout(args, n_near)
    cells = {"search": args.search, "nlist": nlist, "nprobe": nprobe}
    density = Density(Density.Params(sigma=args.sigma, kde_K=args.kde_K, **cells), None)
    tables["density"] = computed(density, tables["pool"])
    clock.lap("density")
    crowd = Crowd.read(tables["density"])
    spread = spread_target(tables["neighbours"], crowd.rho, args.alpha, args.C)
    clock.lap("transport")
    np.save(args.folder / "ours.npy", spread.mass)
    return clock.result(support=n_near, search=crowd.search, stop=spread.stop.level)


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """Run the usual recipe over the same vectors, held in memory, and the same cells."""
    clock = Clock()
    pool, target = (load(args, name) for name in ("pool", "target"))
    clock.lap("reading")
    squares, near = inverted_file(args, pool).search(target, min(args.max_K, len(pool)))
    distances = np.sqrt(squares)
    clock.lap("neighbours")
    rows = sorted({row for line in near.tolist() for row in line})
    features = pool[rows]
    found, _ = inverted_file(args, features).search(features, min(args.kde_K, len(rows)))
    kernel = 1 - found / args.sigma**2
    kernel = kernel * (kernel > 0)
    density = dict(zip(rows, kernel.sum(axis=-1), strict=True))
    clock.lap("density")
    probability = heap_walk(distances.astype(np.float64), near, density, args.alpha, args.C, len(pool))
    clock.lap("transport")
    np.save(args.folder / "recipe.npy", probability)
    return clock.result(support=len(rows))


def search(args: argparse.Namespace) -> dict[str, Any]:
    """Run the two searches of the recipe alone, over vectors that are in memory already."""
    import faiss

    pool, target = (load(args, name) for name in ("pool", "target"))
    counted = faiss.cvar.indexIVF_stats  # of the pairs that faiss compares
    counted.reset()
    clock = Clock()
    rows = np.unique(inverted_file(args, pool).search(target, min(args.max_K, len(pool)))[1])
    clock.lap("neighbours")
    features = pool[rows]
    index = inverted_file(args, features)
    clock.lap("cells of the rows found")
    some = features[np.arange(min(SEARCHED, len(rows))) * len(rows) // min(SEARCHED, len(rows))]
    before, pairs = time.process_time(), counted.ndis
    for start in range(0, len(some), BLOCK // 4):
        index.search(some[start : start + BLOCK // 4], min(args.kde_K, len(rows)))
    spent = time.process_time() - before
    clock.lap("density")
    more = len(rows) / len(some) - 1
    clock.seconds["density"] *= 1 + more
    pairs = counted.ndis + more * (counted.ndis - pairs)
    found = clock.result(support=len(rows), searched=len(some), pairs=pairs)
    found["processor_seconds"] += more * spent
    found["seconds"]["total"] = sum(clock.seconds.values())
    return found


def load(args: argparse.Namespace, name: str) -> np.ndarray:
    """Return the vectors of a table. [n, D] float32"""
    from dataflex_pipeline.neighbours.vectors import vector_blocks
    from dataflex_pipeline.store.parts import PartedTable

    table = PartedTable.open(args.folder / name)
    loaded = np.empty((table.n_rows, args.dimensions), dtype=np.float32)
    for numbers, vectors in vector_blocks(table, BLOCK):
        loaded[numbers] = vectors
    return loaded


def inverted_file(args: argparse.Namespace, vectors: np.ndarray) -> Any:
    """Return a faiss IVF index over vectors, its centroids those that our side trains for them."""
    import faiss

    from dataflex_pipeline.neighbours.cells import Layout, sample_places, train_cells

    nlist, nprobe = layout(args, len(vectors))
    shape = Layout(nlist, nprobe)
    cells = train_cells(vectors[sample_places(len(vectors), shape)], shape)
    index = faiss.IndexIVFFlat(cells.quantizer(), vectors.shape[1], nlist)
    index.train(cells.centroids)
    index.add(vectors)
    index.nprobe = nprobe
    return index


def heap_walk(
    distances: np.ndarray, near: np.ndarray, density: dict[int, float], alpha: float, C: float, n: int
) -> np.ndarray:
    """Walk the pairs by rising cumulative inverse density, one at a time, as published."""
    M, L = distances.shape
    lines = near.tolist()
    last, cost, total, s = [0] * M, [0.0] * M, 0.0, 1.0
    heap = [(1 / float(density[lines[j][0]]), 0, j) for j in range(M)]
    heapq.heapify(heap)
    weighted = [distances[j][0] / float(density[lines[j][0]]) for j in range(M)]
    while heap:
        s, k, j = heapq.heappop(heap)
        total -= cost[j]
        cost[j] = distances[j][k + 1] * s - weighted[j]
        total += cost[j]
        if alpha / C * total >= (1 - alpha) * M:
            break
        last[j] = k
        if k < L - 2:
            step = 1 / float(density[lines[j][k + 1]])
            weighted[j] += distances[j][k + 1] * step
            heapq.heappush(heap, (s + step, k + 1, j))
    probability = np.zeros(n)
    for j in range(M):
        given = 0.0
        for k in range(last[j] + 1):
            share = min(1 / M - given, 1 / (M * s * float(density[lines[j][k]])))
            probability[lines[j][k]] += share
            given += share
        probability[lines[j][last[j] + 1]] += max(1 / M - given, 0.0)
    return probability


SIDES = {"ours": ours, "recipe": recipe, "search": search}

if __name__ == "__main__":
    main()
