"""Twenty million rows are selected without being held: in a process of its own, whose peak memory is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROWS = 20_000_000
SELECTED = 50_000

CHILD = """
import json, resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from dataflex_pipeline.sampling import DrawSettings, draw, row_uniforms
from dataflex_pipeline.schemas import PROBABILITIES, SCORES
from dataflex_pipeline.store.tables import TableFile, table_writer

folder, rows, selected = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
HEX = np.frombuffer(b"0123456789abcdef", np.uint8)

def identities(start, n):
    nibbles = np.arange(start, start + n)[:, None] >> np.arange(60, -4, -4) & 15
    ends = np.arange(n + 1, dtype=np.int32) * 16
    return pa.StringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(HEX[nibbles]))

with table_writer(folder / "s.parquet", SCORES, {}) as scores, \\
        table_writer(folder / "p.parquet", PROBABILITIES, {}) as probabilities:
    for start in range(0, rows, 65536):
        n = min(65536, rows - start)
        row, ids = np.arange(start, start + n), identities(start, n)
        score = row_uniforms(1, start, start + n)
        valid = row % 16 != 0
        p = np.where(valid, 2 * row / rows, 0.0) / (rows * 15 / 16)
        null = pa.nulls(n, pa.string())
        scores(pa.record_batch([row, ids, pa.array(score, mask=~valid), valid, null], SCORES.names))
        probabilities(pa.record_batch([row, ids, p], PROBABILITIES.names))

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
tables = TableFile(folder / "s.parquet"), TableFile(folder / "p.parquet")
before = peak()
drawn = draw(*tables, tables[0], DrawSettings("sample", selected, seed=1))
again = draw(*tables, tables[0], DrawSettings("sample", selected, seed=1, replacement=True))
best = draw(tables[0], None, tables[0], DrawSettings("top_k", selected, seed=1))
after = peak()
found = drawn.index.column("row").to_numpy()
top = best.index.column("score").to_numpy()
print(json.dumps({
    "mib": after - before,
    "distinct": len(np.unique(found)),
    "invalid": int(np.count_nonzero(found % 16 == 0)),
    "mean": float(found.mean() / rows),
    "mean_again": float(again.index.column("row").to_numpy().mean() / rows),
    "beyond": int(np.count_nonzero(found > 2**24)),
    "ids": drawn.index.column("row_id").to_pylist() == [f"{row:016x}" for row in found],
    "lowest": float(top.min()),
    "tau": drawn.tau,
}))
"""


@pytest.mark.slow
def test_twenty_million_rows_are_selected_without_holding_them(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(ROWS), str(SELECTED)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    # Held as arrays the two tables take 76 bytes per row, 1450 MiB.
    assert found["mib"] < 150
    assert found["distinct"] == SELECTED
    assert found["invalid"] == 0
    assert found["ids"]
    # p rises linearly with the row, so a drawn row lies at 2/3 of the pool on average (standard error
    # 0.236 / sqrt(50,000) = 0.0011; without replacement slightly lower), and 1 - (2^24 / rows)^2 of the
    # rows lie beyond 2^24.
    assert found["mean"] == pytest.approx(2 / 3, abs=0.006)
    assert found["mean_again"] == pytest.approx(2 / 3, abs=0.006)
    assert found["beyond"] / SELECTED == pytest.approx(1 - (2**24 / ROWS) ** 2, abs=0.012)
    # The expected number of keys below tau is sum over rows of 1 - exp(-p tau), about tau here.
    assert found["tau"] == pytest.approx(SELECTED, rel=0.03)
    # Scores are uniform on (0, 1) over 15/16 of the rows.
    assert 1 - found["lowest"] == pytest.approx(SELECTED / (ROWS * 15 / 16), rel=0.03)
