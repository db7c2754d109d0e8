"""Parts while they are computed: a thread writes them, its errors surface, and progress moves inside them."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest

from dataflex_pipeline.api import Feature, FeatureInput, Need, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.features.build import build_feature
from dataflex_pipeline.features.plan import plan_feature
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column
from dataflex_pipeline.store import parts
from dataflex_pipeline.store.agreed import BATCH_TOKENS, agree
from dataflex_pipeline.testing.tables import prepared_rows, written

ROWS, PART = 20, 5


class Lengths(Feature):
    """The tokens of each row."""

    uses_model = False
    schema = pa.schema([ROW, ROW_ID, column("length", pa.float64(), "tokens"), VALID, REASON])
    input_columns = ("row", "row_id", "input_ids", "valid", "reason")
    fails_at = -1
    halfway = False

    @contextmanager
    def open(self, given, progress):
        """Count."""

        def compute(rows):
            if rows.column("row")[0].as_py() == self.fails_at:
                raise RuntimeError("shapes")
            if self.halfway:
                progress.advance(2)
                progress.advance(100)  # never more than the part has
            agree(given.folder, BATCH_TOKENS, lambda: 96)
            lengths = np.array([len(ids) for ids in rows.column("input_ids").to_pylist()], dtype=float)
            return self.table(rows, {"length": lengths}, "no length")

        yield compute


class Heard(Silent):
    def __init__(self, then=lambda: None):
        self.counts, self.then = [], then

    def advance(self, n):
        self.counts.append(n)
        if n == 2:  # in the middle of a part
            self.then()


@pytest.fixture
def table(tmp_path):
    return written(tmp_path / "pool", prepared_rows(ROWS, "pool"), 7)


def build(tmp_path, table, progress=None, **attributes):
    kind = type("Lengths", (Lengths,), {"__module__": "dataflex_pipeline.made_up", **attributes})
    given = FeatureInput(table, table.fingerprint, None, None)
    plan = plan_feature(Need(kind), Config(device="cpu"), lambda need: given, PART)
    return build_feature(tmp_path / "features", plan, progress or Silent())


def test_writing_and_computing_go_on_side_by_side(tmp_path, table, monkeypatch):
    """While a part is written, the next one is computed: the writing waits for that."""
    write, threads, computed = parts.PartsWriter.write, set(), threading.Semaphore(0)

    def waiting(self, number, part):
        threads.add(threading.current_thread().name)
        assert number == 3 or computed.acquire(timeout=30)
        write(self, number, part)

    monkeypatch.setattr(parts.PartsWriter, "write", waiting)
    heard = Heard(lambda: computed.release() if len(heard.counts) > 3 else None)
    built = build(tmp_path, table, heard, halfway=True)
    assert built.computed == 4
    assert threads == {"parts_0"}


def test_an_error_of_the_writing_thread_surfaces_and_the_rest_is_done_later(tmp_path, table, monkeypatch):
    write = parts.PartsWriter.write

    def failing(self, number, part):
        if number == 1:
            raise OSError(28, "No space left on device")
        write(self, number, part)

    monkeypatch.setattr(parts.PartsWriter, "write", failing)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path, table)
    folder = next((tmp_path / "features").iterdir())
    assert not (folder / "_manifest.json").exists()
    assert (folder / "part-00000.parquet").exists()
    monkeypatch.undo()
    assert build(tmp_path, table).computed in (2, 3)


def test_the_part_before_a_failure_is_written(tmp_path, table):
    with pytest.raises(RuntimeError, match="shapes"):
        build(tmp_path, table, fails_at=10)
    names = sorted(path.name for path in (tmp_path / "features").rglob("part-*"))
    assert names == ["part-00000.parquet", "part-00001.parquet"]
    assert build(tmp_path, table).computed == 2


def test_progress_inside_a_part_adds_up_to_its_rows(tmp_path, table):
    heard = Heard()
    build(tmp_path, table, heard, halfway=True)
    assert heard.counts == [2, 3, 0] * 4
    assert sum(heard.counts) == ROWS


def test_what_was_agreed_on_is_kept_in_the_manifest_alone(tmp_path, table):
    built = build(tmp_path, table)
    assert built.table.summary[BATCH_TOKENS] == 96
    assert not (built.table.folder / f"_{BATCH_TOKENS}").exists()
