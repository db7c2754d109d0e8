"""Features shared by runs: two processes at once, kills, damage, deletion; always the identical tables."""

from __future__ import annotations

import json
import shutil
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crash.kill_points import Kill
from crash.same_run import differences
from crash.small_run import NAME, Bench, Recipe

SCORE = ("score", "--run", NAME, "runs_dir=runs", "--round", "1")
SCORES = "round-01/scores/loss.parquet"


@pytest.fixture(scope="module")
def alone(lanes, tiny_demo, tmp_path_factory):
    """A run that keeps its features, scored in round 1."""
    recipe = Recipe.of(tiny_demo)
    bench = Bench(lanes, tmp_path_factory.mktemp("alone") / "bench")
    return bench.finish(("warmup", *recipe.settings), SCORE)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def warm(lanes, tiny_demo, tmp_path_factory):
    """A run of a warm-up that is to share its features; benches are copies of it."""
    place = tmp_path_factory.mktemp("warm")
    recipe = Recipe.of(tiny_demo, "loss", "features_dir=../cache")
    return Bench(lanes, place / "bench").finish(("warmup", *recipe.settings))


def begun(warm, tmp_path, name):
    """Return a run whose warm-up is done, beside the cache."""
    shutil.copytree(warm.folder, tmp_path / name, copy_function=shutil.copy2)
    return Bench(warm.lanes, tmp_path / name)


def cached(bench):
    """Return the tables that were begun in the cache."""
    return [name for event, name in bench.book() if event == "table" and "cache/losses-" in name]


def parts(cache):
    (folder,) = cache.glob("losses-pool-*")
    return sorted(folder.glob("part-*.parquet"))


def content(cache):
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in cache.glob("losses-*/*")
        if path.is_file()
    }


def assert_scored_as_alone(bench, alone):
    assert (bench.run / SCORES).read_bytes() == (alone.run / SCORES).read_bytes()


@pytest.mark.slow
def test_the_tables_are_those_of_a_run_that_keeps_its_features(alone, warm, cache, tmp_path):
    one = begun(warm, tmp_path, "one").finish(SCORE)
    assert not (one.run / "features").exists()
    assert_scored_as_alone(one, alone)
    assert len(cached(one)) == 4  # 200 rows, 64 per part
    shared = tmp_path / "as its own"
    shutil.copytree(cache, shared, ignore=shutil.ignore_patterns(".locks"))
    assert differences(alone.run / "features", shared) == []


def test_a_second_run_computes_nothing(alone, warm, cache, tmp_path):
    one, two = (begun(warm, tmp_path, name) for name in ("one", "two"))
    one.finish(SCORE)
    before = content(cache)
    end = two.call(SCORE)
    assert end.code == 0, end.output
    assert "losses of the pool: found in ../cache" in end.output
    assert cached(two) == []
    assert_scored_as_alone(two, alone)
    two.finish((*SCORE, "--overwrite"))
    assert content(cache) == before


def test_of_two_at_once_one_computes_and_the_other_waits(alone, warm, cache, tmp_path):
    one, two = (begun(warm, tmp_path, name) for name in ("one", "two"))
    go_on = tmp_path / "go on"
    ends = {}

    def score(bench, **how):
        ends[bench.folder.name] = bench.call(SCORE, **how)

    first = threading.Thread(target=score, args=(one,), kwargs={"hold": str(go_on)})
    second = threading.Thread(target=score, args=(two,))
    first.start()
    try:
        until(lambda: list(cache.glob("losses-*/part-*.parquet")), first)
        second.start()
        until(lambda: "another run computes it (process " in text(two), second)
        assert second.is_alive()
    finally:
        go_on.touch()
        first.join()
        second.join()
    assert [end.code for end in ends.values()] == [0, 0], ends
    assert len(cached(one)) == 4
    assert cached(two) == []
    for bench in (one, two):
        assert_scored_as_alone(bench, alone)


def until(there, thread):
    deadline = time.monotonic() + 120
    while not there():
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def text(bench):
    return (bench.folder / "output").read_text(errors="replace")


@pytest.mark.parametrize("write", [1, 2, 4, 5])
def test_another_run_goes_on_where_one_was_killed(alone, warm, cache, tmp_path, write):
    """Writes 1 to 4 are parts, 5 is the manifest."""
    one, two = (begun(warm, tmp_path, name) for name in ("one", "two"))
    assert one.call(SCORE, kill=Kill("after", write)).killed
    two.finish(SCORE)
    assert len(cached(two)) == max(4 - write, 0)
    assert_scored_as_alone(two, alone)
    one.finish(SCORE)
    assert_scored_as_alone(one, alone)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """Change one byte of a page of data; the footer stays as it is."""
    column = pq.read_metadata(path).row_group(0).column(2)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 3] ^= 0xFF
    path.write_bytes(bytes(data))


def foreign(path):
    table = pq.read_table(path)
    notes = {**table.schema.metadata, b"dataflex.fingerprint": b"0" * 32}
    pq.write_table(table.replace_schema_metadata(notes), path)
    size(path)


def size(path):
    """Let the manifest say the size that a part has now."""
    manifest = path.parent / "_manifest.json"
    listed = json.loads(manifest.read_text())
    for part in listed["parts"]:
        if part["file"] == path.name:
            part["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(listed))


def other(path):
    pq.write_table(pa.table({"row": [0, 1], "loss": [1.0, 2.0]}), path)


@pytest.mark.parametrize("damage", [truncate, flip, foreign, other, lambda path: path.unlink()])
def test_damage_is_named_and_overwrite_computes_anew(alone, warm, cache, tmp_path, damage):
    one, two = (begun(warm, tmp_path, name) for name in ("one", "two"))
    one.finish(SCORE)
    damage(parts(cache)[1])
    end = two.call(SCORE)
    assert end.code == 2, end.output
    assert "Traceback" not in end.output
    assert "part-00001.parquet cannot be read" in end.output
    assert "--overwrite" in end.output[end.output.index("error: ") :]
    end = one.call(SCORE)  # what is done stays done
    assert end.code == 0, end.output
    two.finish((*SCORE, "--overwrite"))
    assert_scored_as_alone(two, alone)
    assert len(list(cache.glob("losses-*.old-*"))) == 1


def test_without_its_manifest_a_table_is_unfinished(alone, warm, cache, tmp_path):
    one, two = (begun(warm, tmp_path, name) for name in ("one", "two"))
    one.finish(SCORE)
    (parts(cache)[0].parent / "_manifest.json").unlink()
    two.finish(SCORE)
    assert cached(two) == []
    assert_scored_as_alone(two, alone)


def test_the_cache_may_be_deleted(alone, warm, cache, tmp_path):
    one, two = (begun(warm, tmp_path, name) for name in ("one", "two"))
    one.finish(SCORE)
    shutil.rmtree(cache)
    end = one.call(("status", "--run", NAME, "runs_dir=runs"))
    assert "round 1 scores/loss\tdone" in end.output
    assert "up to date" in one.call(SCORE).output
    assert not cache.exists()
    two.finish(SCORE)
    assert_scored_as_alone(two, alone)
    assert len(cached(two)) == 4
