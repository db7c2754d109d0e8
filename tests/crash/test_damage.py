"""Two processes on one run, damaged files, a full disk: a clear error, then the identical result."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from crash.disks import failing_disk, grow, small_disk
from crash.kill_points import Kill
from crash.same_run import differences, done_twice
from crash.small_run import NAME, Bench, Recipe
from dataflex_pipeline.store.row_ids import ROW_IDS


@pytest.fixture(scope="module")
def recipe(tiny_demo):
    return Recipe.of(tiny_demo)


@pytest.fixture(scope="module")
def finished(lanes, recipe, tmp_path_factory):
    """An undisturbed run to its end."""
    return Bench(lanes, tmp_path_factory.mktemp("finished") / "bench").finish(*recipe.round())


@pytest.fixture
def bench(finished, lanes, tmp_path):
    """A copy of the finished run to spoil."""
    shutil.copytree(finished.folder, tmp_path / "bench", copy_function=shutil.copy2)
    return Bench(lanes, tmp_path / "bench")


def explained(end, code: int = 2) -> str:
    """Check that a command ended with an error of three parts and no traceback; return its text."""
    assert end.code == code, end.output
    assert "Traceback" not in end.output
    text = end.output[end.output.index("error: ") :]
    assert "\n-> " in text
    assert len(text.splitlines()) >= 3
    return text


def reopened(run, number):
    """Take away round `number` and all after it, so that the next command has to go on."""
    for later in range(number, 3):
        shutil.rmtree(run / f"round-{later:02d}")


class TestTwoProcesses:
    @pytest.mark.slow
    def test_the_second_is_refused_and_the_first_finishes(self, lanes, recipe, finished, tmp_path):
        first = Bench(lanes, tmp_path / "first")
        go_on = tmp_path / "go on"
        ends = []
        thread = threading.Thread(target=lambda: ends.append(first.call(recipe.round()[0], hold=str(go_on))))
        thread.start()
        while not first.writes() and thread.is_alive():
            time.sleep(0.01)
        try:
            text = explained(first.call(recipe.round()[0]))
        finally:
            go_on.touch()
            thread.join()
        assert "is in use by another process (process " in text
        assert ends[0].code == 0, ends[0].output
        assert differences(finished.run, first.run) == []

    def test_the_lock_dies_with_its_owner(self, lanes, recipe, finished, tmp_path):
        bench = Bench(lanes, tmp_path / "bench")
        assert bench.call(recipe.round()[0], kill=Kill("after", 9)).killed
        assert (bench.run / ".lock").exists()
        assert (bench.run / ".lock-owner").exists()
        bench.finish(*recipe.round())
        assert differences(finished.run, bench.run) == []


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_manifest(path):
    content = json.loads(path.read_text())
    content["rows"] += 1
    path.write_text(json.dumps(content))


def empty_manifest(path):
    path.write_text("{}")


def foreign_part(path):
    pq.write_table(pa.table({"row": [0, 1], "loss": [1.0, 2.0]}), path)


def other_weights(path):
    tensors = {name: np.asarray(tensor) + 1 for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def no_marker(path):
    path.unlink()


DAMAGES = {
    "pool-part-truncated": ("pool/part-00000.parquet", truncate, 2),
    "pool-part-foreign": ("pool/part-00000.parquet", foreign_part, 2),
    "pool-manifest-edited": ("pool/_manifest.json", edit_manifest, 2),
    "target-manifest-truncated": ("target/_manifest.json", truncate, 2),
    "feature-part-truncated": ("features/*/part-00001.parquet", truncate, 1),
    "feature-part-foreign": ("features/*/part-00002.parquet", foreign_part, 1),
    "feature-manifest-emptied": ("features/*/_manifest.json", empty_manifest, 1),
    "scores-truncated": ("round-01/scores/loss.parquet", truncate, 2),
    "scores-foreign": ("round-01/scores/loss.parquet", foreign_part, 2),
    "probabilities-truncated": ("round-01/probabilities/loss.parquet", truncate, 2),
    "index-truncated": ("round-01/index.parquet", truncate, 2),
    "adapter-replaced": ("round-00/checkpoint/adapter_model.safetensors", other_weights, 1),
    "adapter-truncated": ("round-00/checkpoint/adapter_model.safetensors", truncate, 1),
    "optimizer-replaced": ("round-01/checkpoint/optimizer.pt", truncate, 2),
    "marker-emptied": ("round-01/checkpoint/COMPLETE.json", empty_manifest, 2),
    "marker-deleted": ("round-01/checkpoint/COMPLETE.json", no_marker, 2),
}
"""Which file, what happens to it, and from which round on the run has to be made again to read it."""


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_overwrite_recovers(bench, finished, recipe, name):
    pattern, damage, from_round = DAMAGES[name]
    reopened(bench.run, from_round)
    if pattern.startswith("features/") and from_round == 1:
        for folder in (bench.run / "features").iterdir():
            damage(folder / pattern.rpartition("/")[2])
        shown = bench.run / "features"
    else:
        shown = bench.run / pattern
        damage(shown)
    text = explained(bench.call(recipe.round()[0]))
    assert str(shown.relative_to(bench.folder)).removesuffix("/COMPLETE.json") in text
    end = bench.call(recipe.round("--overwrite")[0])
    assert end.code == 0, end.output
    left = [line for line in differences(finished.run, bench.run) if ".old-" not in line]
    assert left == []
    assert any(".old-" in path.name for path in bench.run.rglob("*"))


def test_the_damaged_file_deleted_is_made_again_alone(bench, finished, recipe):
    """The other way out that the error names: a missing part of an unfinished table is computed alone."""
    reopened(bench.run, 1)
    for folder in (bench.run / "features").iterdir():
        truncate(folder / "part-00002.parquet")
        (folder / "_manifest.json").unlink()
    assert "part-00002.parquet cannot be read" in explained(bench.call(recipe.round()[0]))
    for path in bench.run.glob("features/*/part-00002.parquet"):
        path.unlink()
    n_before = len(bench.book())
    bench.finish(*recipe.round())
    assert differences(finished.run, bench.run) == []
    made = [name for event, name in bench.book()[n_before:] if event == "table" and "features/" in name]
    assert {name.rpartition("/")[2] for name in made} == {"part-00002.parquet"}


def test_row_ids_that_are_cut_off_are_told_and_made_again(bench, finished, recipe):
    reopened(bench.run, 1)
    ids = bench.run / "pool" / ROW_IDS
    truncate(ids)
    text = explained(bench.call(recipe.round()[0]))
    assert f"{ids.relative_to(bench.folder)} cannot be used" in text
    assert "Delete it" in text
    ids.unlink()
    bench.finish(*recipe.round())
    assert differences(finished.run, bench.run) == []


def test_row_ids_that_changed_are_found_by_training(bench, finished, recipe):
    """Selecting compares the first and the last id that it reads; training compares them all."""
    selected = pq.read_table(bench.run / "round-01" / "index.parquet").column("row").to_numpy()
    reopened(bench.run, 1)
    path = bench.run / "pool" / ROW_IDS
    ids = np.fromfile(path, np.uint8).reshape(-1, 16)
    ids[selected.min() + 1 : selected.max()] ^= 1
    ids.tofile(path)
    text = explained(bench.call(recipe.round()[0]))
    assert "row_id is another one in the pool" in text
    assert f"Delete the round's selection.parquet, its index.parquet, and {ROW_IDS}" in text
    path.unlink()
    for name in ("selection.parquet", "index.parquet"):
        (bench.run / "round-01" / name).unlink()
    bench.finish(*recipe.round())
    assert differences(finished.run, bench.run) == []


FILE_LIMITS = {
    "scores": 7_000,
    "pool": 20_000,
    "adapter": 33_000,
    "tokenizer": 50_000,
    "plot": 57_000,
    "optimizer": 80_000,
}
"""Bytes that a file may have: the first file that is larger is the one of that name or one before it."""


@pytest.mark.parametrize("limit", FILE_LIMITS)
@pytest.mark.slow
def test_a_file_size_limit_is_told_and_the_run_goes_on_after_it(lanes, recipe, finished, tmp_path, limit):
    bench = Bench(lanes, tmp_path / "bench")
    end = bench.call(recipe.round()[0], file_bytes=FILE_LIMITS[limit])
    text = explained(end, end.code)
    assert end.code in (1, 2)
    assert "could not be written" in text
    assert [path for path in bench.run.rglob("*.partial") if path.is_file()] == []
    bench.finish(*recipe.round())
    assert differences(finished.run, bench.run) == []


@pytest.mark.parametrize(
    "kilobytes", [36, *(pytest.param(each, marks=pytest.mark.slow) for each in (300, 700))]
)
def test_a_full_disk_is_told_and_the_run_goes_on_after_it(lanes, recipe, finished, tmp_path, kilobytes):
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        bench = Bench(lanes, tmp_path / "bench")
        bench.folder.mkdir()
        (disk / "runs").mkdir()
        (bench.folder / "runs").symlink_to(disk / "runs")
        end = bench.call(recipe.round()[0])
        text = explained(end, end.code)
        assert end.code in (1, 2)
        assert "could not be written" in text
        assert [path for path in bench.run.rglob("*.partial") if path.is_file()] == []
        grow(disk, 20_000)
        bench.finish(*recipe.round())
        assert differences(finished.run, bench.folder / "runs" / NAME) == []


@pytest.mark.slow
@pytest.mark.parametrize("write", [7, 17])
def test_a_disk_that_becomes_read_only_is_told_and_the_run_goes_on(lanes, recipe, finished, tmp_path, write):
    """The kernel's own way when a disk fails, open files or not: `remount,abort` stands for the failure."""
    with failing_disk(tmp_path) as disk:
        bench = Bench(lanes, tmp_path / "bench")
        bench.folder.mkdir()
        (disk.folder / "runs").mkdir()
        (bench.folder / "runs").symlink_to(disk.folder / "runs")
        go_on = tmp_path / "go on"
        ends = []
        first = bench.call(recipe.round()[0], kill=Kill("after", write))
        assert first.killed
        order = {"hold": str(go_on)}
        n_before = len(bench.writes())
        thread = threading.Thread(target=lambda: ends.append(bench.call(recipe.round()[0], **order)))
        thread.start()
        while len(bench.writes()) == n_before and thread.is_alive():
            time.sleep(0.01)
        disk.fail()
        go_on.touch()
        thread.join()
        text = explained(ends[0], ends[0].code)
        assert ends[0].code in (1, 2)
        assert "read-only" in text or "does not answer as it should" in text
        assert ".lock-owner" not in text  # tidying up does not hide what went wrong
        disk.repair()
        bench.finish(*recipe.round())
        assert differences(finished.run, bench.folder / "runs" / NAME) == []


@pytest.mark.slow
def test_nothing_goes_by_the_order_of_times(lanes, recipe, finished, tmp_path):
    """A clock set back and forth leaves files whose times say nothing; steps and digests decide."""
    bench = Bench(lanes, tmp_path / "bench")
    kept = (*recipe.round()[0], "keep_checkpoints=true")
    plain = Bench(lanes, tmp_path / "plain").finish(kept)
    inside = "round-01/training/checkpoint-3/COMPLETE.json"
    whole = next(i for i, name in enumerate(plain.writes(), 1) if name.endswith(inside))
    assert bench.call(kept, kill=Kill("after", whole)).killed
    now = time.time()
    for number, path in enumerate(sorted(bench.run.rglob("*"), reverse=True)):
        os.utime(path, (now, now + (-1) ** number * 3600 * (number + 1)))
    bench.finish(kept)
    assert differences(plain.run, bench.run) == []
    assert done_twice(bench.book()) == []
    n_writes = len(bench.writes())
    for number, path in enumerate(sorted(bench.run.rglob("*"))):
        os.utime(path, (now, now - 3600 * number))
    bench.finish(kept)
    assert [name for name in bench.writes()[n_writes:] if not name.endswith("sources.json")] == []
