"""Looking at large tables: seconds and peak memory of `dataflex inspect`, as a user starts it.

    python benchmarks/looking.py --rows 20000000 --json looking.json

Makes a run folder with a pool, a score table and a probability table of that many rows in a temporary folder
(about 100 bytes of disk per row). Every measurement is the command itself in a new process, importing
included; seconds are the fewest of the repetitions, MiB the largest resident memory of the process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from surroundings import publish, surroundings
from tables import identities, write_tables

from dataflex_pipeline.schemas import PREPARED
from dataflex_pipeline.store.parts import PartsWriter
from dataflex_pipeline.store.run import RunFolder

PART = 1_000_000
COMMAND = """
import pathlib, sys
from dataflex_pipeline.stages import cli
sys.argv[0] = "dataflex"
try:
    cli.main()
finally:  # the operating system's own count begins with the memory of the process that started this one
    status = pathlib.Path("/proc/self/status").read_text()
    print(next(line for line in status.splitlines() if line.startswith("VmHWM")), file=sys.stderr)
"""
SOURCES = ("alpaca", "code", "chat", "maths")


def prepared_part(start: int, n: int, stream: np.random.Generator, messages: Any = None) -> pa.Table:
    """Return rows of a prepared pool without tokens: four sources, lengths from 1 to 1000.

    Args:
        start: number of the first row. n: rows. stream: what is drawn from.
        messages: their conversations; empty ones by default. [n]
    """
    length = pa.array(stream.integers(1, 1000, n).astype(np.int32))
    kinds = {name: PREPARED.field(name).type for name in ("messages", "input_ids", "labels")}
    columns: dict[str, Any] = {
        "row": pa.array(np.arange(start, start + n)),
        "row_id": identities(start, n),
        "source": pa.array(np.array(SOURCES)[stream.integers(0, len(SOURCES), n)]),
        "messages": pa.array([[]] * n if messages is None else messages, kinds["messages"]),
        "input_ids": pa.nulls(n, kinds["input_ids"]),
        "labels": pa.nulls(n, kinds["labels"]),
        "n_tokens": length,
        "n_response_tokens": length,
        "valid": pa.array(np.ones(n, bool)),
        "reason": pa.nulls(n, pa.string()),
        "note": pa.nulls(n, pa.string()),
    }
    return pa.table(columns)


def write_pool(folder: Path, rows: int) -> None:
    """Write a prepared pool without texts and tokens: four sources, lengths from 1 to 1000."""
    writer = PartsWriter(folder, PREPARED, {"table": "pool"})
    n_parts = -(-rows // PART)
    for number in range(n_parts):
        start = number * PART
        n = min(PART, rows - start)
        stream = np.random.default_rng(number)
        writer.write(number, prepared_part(start, n, stream))
    writer.finish(n_parts, {"valid": rows})


def make_run(folder: Path, rows: int) -> RunFolder:
    """Make a run folder that holds nothing but its tables."""
    run = RunFolder(folder / "run")
    where = run.round(1)
    run.folder.mkdir()
    run.write({"component_name": "made"}, {"created": "now"})
    write_tables(folder, rows)
    for kind, final in (("scores", where.scores("made")), ("probabilities", where.probabilities("made"))):
        final.parent.mkdir(parents=True)
        (folder / f"{kind}.parquet").rename(final)
    write_pool(run.pool, rows)
    return run


def timed(arguments: list[str], repeat: int) -> dict[str, float]:
    """Run a command several times; return its fewest seconds and its largest memory."""
    seconds, cpu, peaks = [], [], []
    for _ in range(repeat):
        began = time.perf_counter()
        with tempfile.TemporaryFile("w+") as stream:
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=stream
            )
            _, status, usage = os.wait4(process.pid, 0)
            stream.seek(0)
            last = stream.read().splitlines()[-1:]
        if status:
            raise SystemExit(f"{' '.join(arguments)} failed: {last}")
        seconds.append(time.perf_counter() - began)
        cpu.append(usage.ru_utime + usage.ru_stime)
        peaks.append(int(last[0].split()[1]) / 1024)
    return {"seconds": min(seconds), "cpu_seconds": min(cpu), "peak_mib": max(peaks)}


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--folder", type=Path, help="where the tables are made; default a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = make_run(Path(folder), args.rows)
        where, inspect = run.round(1), ["inspect"]
        grouped = "select source, avg(score) from scores join pool using (row) group by source"
        measured = {
            "help": [*inspect, "--help"],
            "scores": [*inspect, str(where.scores("made"))],
            "probabilities": [*inspect, str(where.probabilities("made"))],
            "pool": [*inspect, str(run.pool)],
            "run": [*inspect, str(run.folder)],
            "sql: mean score": [*inspect, str(run.folder), "--sql", "select avg(score) from scores"],
            "sql: scores joined with the pool": [*inspect, str(run.folder), "--sql", grouped],
        }
        results = {name: timed(command, args.repeat) for name, command in measured.items()}
    publish({"rows": args.rows, "results": results, **surroundings()}, args.json)


if __name__ == "__main__":
    main()
