"""Selecting from large tables: seconds and peak memory, beside merely reading two columns.

    python benchmarks/tables.py --rows 20000000 --json tables.json

Makes a pool (of row ids only), a score table and a probability table of that many rows in a temporary folder
(about 100 bytes of disk per row, with what the measurements write), then runs every measurement in a process
of its own: reading ``row`` and ``probability`` with pyarrow (``iter_batches``, as it comes and without
read-ahead), reading ``row_id`` too, making the file of the pool's row ids (once per run, 16 bytes per row), a
draw by probability without replacement, a top-k, and writing the probabilities from the scores. Seconds are
the fastest of the repetitions; importing is not in them. MiB are what the process needed at its peak beyond
its state after importing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from surroundings import publish, surroundings

from dataflex_pipeline.sampling import DrawSettings, draw, row_uniforms
from dataflex_pipeline.sampling.probabilities import write_probabilities
from dataflex_pipeline.schemas import PROBABILITIES, SCORES
from dataflex_pipeline.store.parts import PartedTable, PartsWriter
from dataflex_pipeline.store.row_ids import ROW_IDS, read_row_ids
from dataflex_pipeline.store.tables import TableFile, table_writer

BLOCK = 65536
NARROW, WIDE = ["row", "probability"], ["row", "row_id", "probability"]
HEX = np.frombuffer(b"0123456789abcdef", np.uint8)


def identities(start: int, n: int) -> pa.StringArray:
    """Return ``n`` random row ids of 32 hex characters, as incompressible as real content hashes. [n]"""
    raw = np.random.Philox(key=9, counter=start).random_raw(2 * n).view(np.uint8)
    characters = np.stack([HEX[raw >> 4], HEX[raw & 15]], axis=1)
    ends = np.arange(n + 1, dtype=np.int32) * 32
    return pa.StringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(characters))


def write_tables(folder: Path, rows: int) -> None:
    """Write ``pool``, and ``scores.parquet`` and ``probabilities.parquet``: uniform scores, p like them."""
    pool = PartsWriter(folder / "pool", pa.schema({"row": pa.int64(), "row_id": pa.string()}), {})
    for number, start in enumerate(range(0, rows, BLOCK)):
        n = min(BLOCK, rows - start)
        pool.write(number, pa.table({"row": np.arange(start, start + n), "row_id": identities(start, n)}))
    pool.finish(-(-rows // BLOCK), {})
    with (
        table_writer(folder / "scores.parquet", SCORES, {}) as scores,
        table_writer(folder / "probabilities.parquet", PROBABILITIES, {}) as probabilities,
    ):
        for start in range(0, rows, BLOCK):
            n = min(BLOCK, rows - start)
            row, ids = np.arange(start, start + n), identities(start, n)
            score = row_uniforms(1, start, start + n)
            valid, reason = np.ones(n, bool), pa.nulls(n, pa.string())
            scores(pa.record_batch([row, ids, score, valid, reason], SCORES.names))
            probabilities(pa.record_batch([row, ids, score * (2 / rows)], PROBABILITIES.names))


def read(folder: Path, columns: list[str], pre_buffer: bool) -> None:
    """Read columns of the probabilities block by block."""
    with pq.ParquetFile(folder / "probabilities.parquet", pre_buffer=pre_buffer) as parquet:
        for _ in parquet.iter_batches(BLOCK, columns=columns):
            pass


def make_row_ids(folder: Path) -> None:
    """Make the file that the pool's row ids are read from."""
    pool = PartedTable.reopen(folder / "pool")
    (pool.folder / ROW_IDS).unlink(missing_ok=True)
    read_row_ids(pool, np.arange(1))


def sample(folder: Path, selected: int) -> None:
    """Draw by probability without replacement."""
    scores, probabilities = TableFile(folder / "scores.parquet"), TableFile(folder / "probabilities.parquet")
    pool = PartedTable.reopen(folder / "pool")
    drawn = draw(scores, probabilities, pool, DrawSettings("sample", selected, weights="importance"))
    assert drawn.n_distinct == selected


def top_k(folder: Path, selected: int) -> None:
    """Take the best by score."""
    scores, pool = TableFile(folder / "scores.parquet"), PartedTable.reopen(folder / "pool")
    assert draw(scores, None, pool, DrawSettings("top_k", selected)).n_distinct == selected


def probabilities_of_scores(folder: Path) -> None:
    """Write a probability table from the scores."""
    scores = TableFile(folder / "scores.parquet")
    summary = write_probabilities(
        scores, lambda block: block.column("score").to_numpy(), folder / "made.parquet", {}
    )
    assert summary.n_positive == scores.n_rows


MEASUREMENTS: dict[str, Callable[[Path, int], None]] = {
    "read row and probability, pyarrow's defaults": lambda folder, _: read(folder, NARROW, True),
    "read row and probability, no read-ahead": lambda folder, _: read(folder, NARROW, False),
    "read row, row_id and probability, pyarrow's defaults": lambda folder, _: read(folder, WIDE, True),
    "make the file of row ids": lambda folder, _: make_row_ids(folder),
    "sample without replacement": sample,
    "top_k": top_k,
    "write the probabilities of the scores": lambda folder, _: probabilities_of_scores(folder),
}


def measure(name: str, folder: Path, selected: int, repeat: int) -> dict[str, float]:
    """Run one measurement in this process."""
    pa.array(np.zeros(1))  # pyarrow imports pandas at its first conversion, where that is installed
    before = peak_mib()
    seconds, cpu = [], []
    for _ in range(repeat):
        wall, process = time.perf_counter(), time.process_time()
        MEASUREMENTS[name](folder, selected)
        seconds.append(time.perf_counter() - wall)
        cpu.append(time.process_time() - process)
    return {"seconds": min(seconds), "cpu_seconds": min(cpu), "peak_mib": peak_mib() - before}


def peak_mib() -> float:
    """Return the peak resident memory of this process so far, MiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_own_process(name: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run one measurement in a new process."""
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
    command += ["--select", str(args.select), "--repeat", str(args.repeat)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    result: dict[str, float] = json.loads(answer.stdout)
    return result


def run_all(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Make the tables, measure everything and compare with reading."""
    began = time.perf_counter()
    write_tables(folder, args.rows)
    written = time.perf_counter() - began
    size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
    results = {name: in_own_process(name, folder, args) for name in MEASUREMENTS}
    for reading in [name for name in MEASUREMENTS if name.startswith("read")]:
        for name in ("sample without replacement", "top_k"):
            ratio = results[name]["seconds"] / results[reading]["seconds"]
            results[name][f"times '{reading}'"] = ratio
    return {
        "rows": args.rows,
        "selected": args.select,
        "seconds_to_write": written,
        "bytes_on_disk": size,
        "results": results,
        **surroundings(),
    }


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--select", type=int, default=100_000, help="rows to select")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--folder", type=Path, help="where the tables are made; default a temporary folder")
    parser.add_argument("--measure", choices=list(MEASUREMENTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder, args.select, args.repeat)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = run_all(Path(folder), args)
    publish(results, args.json)


if __name__ == "__main__":
    main()
