"""A report on a large run: seconds, memory and page of `dataflex report`, as a user starts it.

    python benchmarks/reporting.py --rows 1000000 --json reporting.json

Makes a run folder in a temporary folder: a pool of that many rows with texts of about 500 characters in four
sources, two rounds of scores and probabilities, and a selection of 2 % in each (about 700 bytes of disk per
row). The command runs in a new process, importing included; seconds are the fewest of the repetitions, MiB
the largest resident memory of the process. Where there is a Chromium, the seconds until its page is drawn are
measured too.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from looking import PART, prepared_part, timed
from surroundings import publish, surroundings
from tables import identities, write_tables

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import dump_config
from dataflex_pipeline.schemas import PREPARED, SELECTION
from dataflex_pipeline.store.parts import PartsWriter
from dataflex_pipeline.store.run import RunFolder
from dataflex_pipeline.store.tables import table_writer

ROUNDS = (1, 2)
SHARE = 0.02
WORDS = np.array([f"word{number}" for number in range(4000)], dtype=object)


def texts(stream: np.random.Generator, n: int, words: int) -> list[str]:
    """Return ``n`` texts of so many words."""
    return [" ".join(line) for line in WORDS[stream.integers(0, len(WORDS), (n, words))]]


def write_pool(folder: Path, rows: int) -> None:
    """Write a prepared pool with a question and an answer in every row, without tokens."""
    writer = PartsWriter(folder, PREPARED, {"table": "pool"})
    size = PART // 20
    for number, start in enumerate(range(0, rows, size)):
        n = min(size, rows - start)
        stream = np.random.default_rng(number)
        said = zip(texts(stream, n, 15), texts(stream, n, 55), strict=True)
        messages = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in said
        ]
        writer.write(number, prepared_part(start, n, stream, messages))
    writer.finish(-(-rows // size), {"valid": rows})


def make_run(folder: Path, rows: int) -> RunFolder:
    """Make a run folder that holds nothing but its tables."""
    run = RunFolder(folder / "run")
    run.folder.mkdir()
    config = Config(model_name_or_path="none", dataset="none", update_step=0, update_times=2, warmup_step=0)
    run.write(dump_config(config), {"created": "now", "global_batch": 16, "versions": {}})
    write_pool(run.pool, rows)
    write_tables(folder, rows)
    n = int(rows * SHARE)
    for number in ROUNDS:
        where = run.round(number)
        for kind, final in (("scores", where.scores("made")), ("probabilities", where.probabilities("made"))):
            final.parent.mkdir(parents=True)
            shutil.copy(folder / f"{kind}.parquet", final)
        taken = np.random.default_rng(number).choice(rows, n, replace=False)
        drawn = {
            "rank": np.arange(1, n + 1),
            "row": taken,
            "row_id": identities(0, n),
            "source": pa.array(["code"] * n),
            "score": np.linspace(1, 0, n),
            "probability": np.full(n, 1 / rows),
            "weight": np.ones(n, np.float32),
        }
        with table_writer(where.selection, SELECTION, {"table": "selection"}, {"method": "made"}) as write:
            write(pa.table(drawn))
    return run


def drawn_after(page_file: Path) -> float | None:
    """Return the seconds until a browser has drawn a page; None without one."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        began = time.perf_counter()
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-drawn]", timeout=90_000)
        seconds = time.perf_counter() - began
        browser.close()
    return seconds


def main() -> None:
    """Read the command line and print, or write, the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--folder", type=Path, help="where the tables are made; default a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = make_run(Path(folder), args.rows)
        results: dict[str, Any] = timed(["report", str(run.folder)], args.repeat)
        page_file = run.folder / "report.html"
        results |= {"page_bytes": page_file.stat().st_size, "drawn_seconds": drawn_after(page_file)}
    publish({"rows": args.rows, "results": results, **surroundings()}, args.json)


if __name__ == "__main__":
    main()
