"""Viewing a large pool: seconds and peak memory of `dataflex view`, with a browser looking at it.

    python benchmarks/viewing.py --rows 1000000 --json viewing.json

Makes a run folder with a pool (texts of about 900 characters), two score tables, a selection and embeddings
of 128 dimensions in a temporary folder (about 1.5 kB of disk per row), starts the command as a user does, and
opens its page in Chromium without a window. Seconds are: until the address is said, the first time (tables
joined, map made) and the second; until rows, counts and charts are on the page; until a click on a bar has
filtered them; and until the answer to queries. MiB are the server's largest resident memory up to then.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from looking import prepared_part
from surroundings import publish, surroundings
from tables import identities

from dataflex_pipeline.schemas import MESSAGE, PREPARED, REASON, ROW, ROW_ID, SCORES, SELECTION, VALID, column
from dataflex_pipeline.store.parts import PartsWriter
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.tables import table_writer

PART = 50_000
SIZE = 128
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+/\S+/")


def write_pool(run: RunFolder, rows: int) -> None:
    """Write a pool of conversations of two turns, without tokens."""
    writer = PartsWriter(run.pool, PREPARED, {"table": "pool", "rows": rows})
    words = np.array([f"word{number}" for number in range(5000)])
    for number, start in enumerate(range(0, rows, PART)):
        n = min(PART, rows - start)
        draw = np.random.default_rng(number)
        drawn = words[draw.integers(0, len(words), (n, 100))]
        texts = [(" ".join(line[:30]), " ".join(line[30:])) for line in drawn]
        flat = [
            {"role": role, "content": text}
            for turns in texts
            for role, text in zip(("user", "assistant"), turns, strict=True)
        ]
        messages = pa.ListArray.from_arrays(np.arange(0, 2 * n + 1, 2, np.int32), pa.array(flat, MESSAGE))
        writer.write(number, prepared_part(start, n, draw, messages))
    writer.finish(number + 1, {"valid": rows})


def write_rest(run: RunFolder, rows: int) -> None:
    """Write two score tables, a selection of one row in twenty, and embeddings."""
    kind = pa.list_(pa.float32(), SIZE)
    schema = pa.schema([ROW, ROW_ID, column("embedding", kind, "vector"), VALID, REASON])
    writer = PartsWriter(run.features / f"embeddings-pool-{rows:016x}", schema, {"feature": "embeddings"})
    centres = np.random.default_rng(1).standard_normal((8, SIZE))
    for number, start in enumerate(range(0, rows, PART)):
        n = min(PART, rows - start)
        draw = np.random.default_rng((2, number))
        vectors = centres[draw.integers(0, 8, n)] + draw.standard_normal((n, SIZE))
        flat = pa.array(vectors.astype(np.float32).reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(flat, SIZE)
        row, ids = pa.array(np.arange(start, start + n)), identities(start, n)
        true = pa.array(np.ones(n, bool))
        writer.write(number, pa.table([row, ids, lists, true, pa.nulls(n, pa.string())], schema=schema))
    writer.finish(number + 1, {})
    for method in ("less", "loss"):
        with table_writer(run.round(1).scores(method), SCORES, {"method": method, "rows": rows}) as write:
            for number, start in enumerate(range(0, rows, PART)):
                n = min(PART, rows - start)
                scores = np.random.default_rng((3, number, len(method))).standard_normal(n)
                row, ids = pa.array(np.arange(start, start + n)), identities(start, n)
                true = pa.array(np.ones(n, bool))
                write(pa.table([row, ids, scores, true, pa.nulls(n, pa.string())], schema=SCORES))
    chosen = np.arange(0, rows, 20)
    n = len(chosen)
    with table_writer(run.round(1).selection, SELECTION, {"rows": rows}) as write:
        ids = pa.array([f"{row:032x}" for row in chosen])
        one, source = np.ones(n), pa.array(["alpaca"] * n)
        write(
            pa.table(
                [np.arange(1, n + 1), chosen, ids, source, one, one / n, one.astype(np.float32)],
                schema=SELECTION,
            )
        )


@contextmanager
def viewing(run: RunFolder) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """Start the command; yield the process, its address and the seconds until it said it."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "dataflex_pipeline", "view", str(run.folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C" not in said:
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the command ended")
            said += line
        found = ADDRESS.search(said)
        assert found is not None
        yield process, found[0], time.perf_counter() - began
        process.send_signal(signal.SIGINT)


def peak(process: subprocess.Popen[str]) -> float:
    """Return the largest resident memory of a process so far, in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024


def look(address: str, rows: int, process: subprocess.Popen[str]) -> dict[str, dict[str, float]]:
    """Open the page, filter by a bar, and search, as a reader does."""
    from playwright.sync_api import sync_playwright

    found = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(600_000)

        def measure(name: str, began: float) -> None:
            found[name] = {"seconds": time.perf_counter() - began, "peak_mib": peak(process)}

        began = time.perf_counter()
        page.goto(address)
        page.get_by_text(f"{rows:,} / {rows:,} points").wait_for()
        page.locator("table td, [role=cell]").first.wait_for()
        measure("page: rows and count", began)
        page.locator("text=round 1").last.wait_for()
        page.wait_for_load_state("networkidle")
        measure("page: every chart", began)
        began = time.perf_counter()
        page.get_by_text("round 1", exact=True).last.click()
        page.get_by_text(f"{-(-rows // 20):,} / {rows:,} points").wait_for()
        page.wait_for_load_state("networkidle")
        measure("a click on a bar", began)
        for name, sql in {
            "query: a word in the texts": "select count(*) from dataset where prompt ilike '%word1234 %'",
            "query: the best 50 rows": "select * from dataset order by rank_1_loss limit 50",
        }.items():
            began = time.perf_counter()
            answer = page.request.post(f"{address}data/query", data={"sql": sql, "type": "json"})
            assert answer.ok, answer.text()
            measure(name, began)
        browser.close()
    return found


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--folder", type=Path, help="where the tables are made; default a temporary folder")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = RunFolder(Path(folder) / "run")
        run.folder.mkdir()
        run.write({"component_name": "made"}, {"created": "now"})
        write_pool(run, args.rows)
        write_rest(run, args.rows)
        with viewing(run) as (process, _, seconds):
            results["address, the first time"] = {"seconds": seconds, "peak_mib": peak(process)}
        results["the table on disk"] = {"mib": (run.folder / "view" / "rows.parquet").stat().st_size / 2**20}
        with viewing(run) as (process, address, seconds):
            results["address, the second time"] = {"seconds": seconds, "peak_mib": peak(process)}
            results |= look(address, args.rows, process)
    publish({"rows": args.rows, "results": results, **surroundings()}, args.json)


if __name__ == "__main__":
    main()
