"""More than one process, under the real torchrun: the same tables, and no hang whatever happens to a rank."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from crash.disks import failing_disk
from crash.launches import Launch, run
from crash.machines import two_machines
from reward_models import make_reward_model
from safetensors.numpy import load_file

from dataflex_pipeline.methods import shipped_methods
from dataflex_pipeline.store.run import RunFolder

METHODS = ("loss", "delta_loss", "less")
RUN = ("--run", "r", "runs_dir=runs")


def settings(demo) -> tuple[str, ...]:
    return (
        *(f"dataset={demo.pool}", f"eval_dataset={demo.target}", f"model_name_or_path={demo.model}"),
        *("warmup_step=2", "update_step=2", "update_times=2", "lora_rank=4", "learning_rate=0.002"),
        *("rows_per_part=4", "eval_strategy=no", "plot_loss=false", "preprocessing_num_workers=1"),
        "per_device_train_batch_size=2",
    )


def score(number: int, method: str, *more: str) -> tuple[str, ...]:
    return ("score", *RUN, "--round", str(number), "--method", method, *more)


def scores(folder: Path, number: int = 1) -> dict[str, bytes]:
    """Return every column of the round's score tables, as the bytes that they are in memory."""
    found = {}
    for path in sorted((folder / f"round-{number:02d}" / "scores").glob("*.parquet")):
        table = pq.read_table(path).combine_chunks()
        for name in table.column_names:
            buffers = table.column(name).combine_chunks().buffers()
            found[f"{path.stem}.{name}"] = b"".join(bytes(b) for b in buffers if b is not None)
    return found


def weights(folder: Path, number: int) -> dict[str, np.ndarray]:
    return load_file(folder / f"round-{number:02d}" / "checkpoint" / "adapter_model.safetensors")


def farthest(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def parts(folder: Path) -> dict[str, tuple[int, str]]:
    """Return when each part of a feature was written, and what is in it."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in (folder / "features").glob("*/part-*.parquet")
    }


@pytest.fixture(scope="module")
def alone(one_thread, tiny_demo, tmp_path_factory) -> Path:
    """A run by one process: warm-up and round 1 by less, and round 1 scored by the other methods too."""
    folder = tmp_path_factory.mktemp("alone")
    begin = ("round", "1", *RUN, "--method", "less", *settings(tiny_demo), "gradient_accumulation_steps=2")
    run(folder, 1, begin, *(score(1, method) for method in METHODS[:2]))
    return folder


def warmed_up(alone: Path, folder: Path) -> Path:
    """Return a copy of the run as it was after the warm-up."""
    shutil.copytree(alone / "runs", folder / "runs")
    shutil.rmtree(folder / "runs" / "r" / "round-01")
    shutil.rmtree(folder / "runs" / "r" / "features")
    return folder


def test_a_run_on_two_processes_is_that_of_one_with_the_same_global_batch(alone, tiny_demo, tmp_path):
    begin = ("round", "1", *RUN, "--method", "less", *settings(tiny_demo), "gradient_accumulation_steps=1")
    text = run(tmp_path, 2, begin, *(score(1, method) for method in METHODS[:2]))
    for number in (0, 1):
        assert farthest(weights(tmp_path / "runs/r", number), weights(alone / "runs/r", number)) == 0
    assert {name.partition(".")[0] for name in scores(alone / "runs/r")} == set(METHODS)
    assert scores(tmp_path / "runs/r") == scores(alone / "runs/r")
    index = "runs/r/round-01/index.parquet"
    assert pq.read_table(tmp_path / index).equals(pq.read_table(alone / index))
    assert text.count("losses of the pool: 200 rows in") == 1  # one process reports, and counts all rows
    assert "torchrun --standalone --nproc_per_node 2 -m -- dataflex_pipeline select --round 1" in text


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_makes_the_same_tables(alone, tmp_path):
    """Its batches are halved; the other's are not."""
    folder = warmed_up(alone, tmp_path)
    commands = json.dumps([score(1, "less", "rows_per_part=16")])
    more = {"LIMITED": json.dumps({"1": 200})}
    launch = Launch(folder, 2, commands, module="crash.limited_memory", more=more)
    assert launch.end() == 0, launch.output
    ours, theirs = (
        pq.read_table(each / "runs/r/round-01/scores/less.parquet")["score"].to_numpy()
        for each in (folder, alone)
    )
    assert np.abs(ours - theirs).max() <= 1e-5


@pytest.mark.slow
def test_the_size_of_batches_is_agreed_on_by_ranks_with_unequal_memory(alone, tmp_path):
    """Bit for bit the table of one process with that number, which the manifest names."""
    folder = warmed_up(alone, tmp_path / "two")
    more = {"FREE": json.dumps({"0": 3_000_000, "1": 12_000_000})}
    commands = json.dumps([score(1, "loss", "rows_per_part=32")])
    launch = Launch(folder, 2, commands, module="crash.limited_memory", more=more)
    assert launch.end() == 0, launch.output
    manifest = next((folder / "runs/r/features").glob("losses-pool-*/_manifest.json"))
    tokens = json.loads(manifest.read_text())["summary"]["batch_tokens"]
    assert tokens < 16384
    single = warmed_up(alone, tmp_path / "one")
    run(single, 1, score(1, "loss", "rows_per_part=32", f"score_batch_tokens={tokens}"))
    found, wanted = (scores(each / "runs/r") for each in (folder, single))
    assert found["loss.score"] == wanted["loss.score"]


@pytest.mark.slow
def test_all_ranks_train_as_many_rows_at_a_time_as_the_one_with_the_least_memory(
    one_thread, tiny_demo, tmp_path, monkeypatch
):
    from dataflex_pipeline.training import first_step

    needs = []
    measured = first_step._step_needs
    monkeypatch.setattr(first_step, "free_bytes", lambda device: 20_000_000)
    monkeypatch.setattr(first_step, "_step_needs", lambda *of: needs.append(measured(*of)) or needs[-1])
    begin = ("warmup", *RUN, *settings(tiny_demo), "gradient_checkpointing=false", "adam_epsilon=0.001")
    run(tmp_path / "one", 1, (*begin, "gradient_accumulation_steps=2"))
    more = {"FREE": json.dumps({"0": 1 << 40, "1": int(2.5 * needs[0].of(1))})}
    launch = Launch(tmp_path / "two", 2, json.dumps([begin]), module="crash.limited_memory", more=more)
    assert launch.end() == 0, launch.output
    said = "per_device_train_batch_size 2 -> 1, gradient_accumulation_steps 1 -> 2"
    assert f"Another process has room for no more: {said}" in launch.output
    assert farthest(weights(tmp_path / "one/runs/r", 0), weights(tmp_path / "two/runs/r", 0)) < 1e-6


@pytest.mark.slow
def test_a_rank_whose_memory_is_too_small_in_training_ends_all_and_the_next_call_takes_fewer_rows(
    one_thread, tiny_demo, tmp_path
):
    """Its two rows of step 1 have 34 padded tokens, those of step 2 have 44."""
    begin = json.dumps([("warmup", *RUN, *settings(tiny_demo), "gradient_checkpointing=false")])
    limits = {"IN_TRAINING": json.dumps({"1": 40})}
    launch = Launch(tmp_path, 2, begin, module="crash.limited_memory", more=limits)
    assert launch.end() != 0
    assert "is too small in step 2: CUDA out of memory. Tried to allocate 2.00 GiB" in launch.output
    assert "it goes on from the beginning of round 0 with 1 of 2 rows at a time" in launch.output
    assert "trainer.py" not in launch.output  # no traceback but that of torchrun
    (noted,) = (tmp_path / "runs" / "r" / "round-00").glob("*/_rows-*")
    assert noted.read_text() == "1\n"


@pytest.mark.slow
def test_every_method_scores_the_same_on_one_two_and_four_processes(alone, minilm, tmp_path):
    embedder = {"embed_model": minilm, "embed_method": "sentence-transformers"}
    answers = {"generator": "transformers", "mc_samples": 2, "max_new_tokens": 4}
    judge = {"reward_model_backend": "metric", "reward_backend_params.metric.name": "chrf"}
    (tmp_path / "given.jsonl").write_text("".join(f'{{"score": {row * 7 % 200}}}\n' for row in range(200)))
    given = {"file": tmp_path / "given.jsonl"}
    reward_model = "reward_backend_params.reward_model.hf_model_name_or_path"
    grades = {"reward_model_backend": "reward_model", reward_model: make_reward_model(tmp_path / "rm")}
    own = {"nice": answers | judge, "judge": grades, "tsds": embedder, "near": embedder, "column": given}
    commands = [
        score(1, method, *(f"{method}.{key}={value}" for key, value in own.get(method, {}).items()))
        for method in shipped_methods()
    ]
    found = {}
    for processes in (1, 2, 4):
        folder = warmed_up(alone, tmp_path / str(processes))
        run(folder, processes, *commands)
        found[processes] = scores(folder / "runs" / "r")
    assert {name.partition(".")[0] for name in found[1]} == set(shipped_methods())
    assert found[2] == found[1]
    assert found[4] == found[1]


@pytest.mark.slow
def test_killed_with_four_and_continued_with_two_nothing_is_computed_again(alone, tmp_path):
    folder, draw = warmed_up(alone, tmp_path), random.Random(7)
    feature = folder / "runs" / "r" / "features"
    commands = json.dumps([score(1, method) for method in METHODS])
    launch = Launch(folder, 4, commands, module="crash.several_commands")
    wanted = draw.randint(3, 40)  # of the 50 parts of the pool, after the 4 of the target
    launch.wait_for(lambda: len(list(feature.glob("influence-*/part-*.parquet"))) >= wanted)
    began = time.monotonic()
    launch.ranks()[draw.randrange(4)].kill()
    assert launch.end() != 0
    assert time.monotonic() - began < 30, launch.output
    before = parts(folder / "runs" / "r")
    assert 50 + wanted <= len(before) < 50 + 50 + 4
    run(folder, 2, score(1, "less"))
    after = parts(folder / "runs" / "r")
    assert len(after) == 50 + 50 + 4
    assert {name: after[name] for name in before} == before
    assert scores(folder / "runs" / "r") == scores(alone / "runs" / "r")


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_ends_the_launch_after_the_timeout(alone, tmp_path, stopped):
    folder = warmed_up(alone, tmp_path)
    feature = folder / "runs" / "r" / "features"
    launch = Launch(folder, 2, *score(1, "loss", "rows_per_part=1", "ddp_timeout=4"))
    launch.wait_for(lambda: len(list(feature.glob("*/part-*.parquet"))) >= 3)
    began = time.monotonic()
    launch.ranks()[stopped].suspend()
    assert launch.end() != 0
    assert 4 < time.monotonic() - began < 60
    assert f"Rank {stopped} has given no sign of life for 4 s." in launch.output
    assert "Traceback" not in launch.output.split("closing signal")[0].split("failed (exitcode")[0]


def test_a_mistake_is_told_once_and_every_process_ends_with_its_code(alone, tmp_path):
    folder = warmed_up(alone, tmp_path)
    before = sorted(folder.rglob("*"))
    with RunFolder(folder / "runs" / "r").lock():
        launch = Launch(folder, 2, *score(1, "loss"))
        began = time.monotonic()
        assert launch.end() != 0
    text = launch.output
    report = text.partition("failed (exitcode")[2]
    assert text.count("is in use by another process") == 1
    assert "Traceback" not in text.split("failed (exitcode")[0]
    codes = re.findall(r"exitcode  : (-?\d+)", report)
    assert codes[-1] == "2", text  # the first that ended
    assert set(codes) <= {"2", "-15"}, text  # torchrun may have ended the other one already
    assert time.monotonic() - began < 60
    launch.log.unlink()
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_a_full_disk_under_another_process_is_told_by_the_first(alone, tmp_path):
    folder = warmed_up(alone, tmp_path)
    feature = folder / "runs" / "r" / "features"
    launch = Launch(folder, 2, *score(1, "loss", "rows_per_part=1"))
    launch.wait_for(lambda: len(list(feature.glob("*/part-*.parquet"))) >= 3)
    launch.ranks()[1].rlimit(resource.RLIMIT_FSIZE, (64, 64))
    assert launch.end() != 0
    text = launch.output.split("failed (exitcode")[0]
    assert "error: rank 1: A file could not be written" in text, launch.output
    assert "Traceback" not in text
    done = len(parts(folder / "runs" / "r"))
    assert not list(feature.glob("*/_manifest.json"))
    text = run(folder, 1, score(1, "loss", "rows_per_part=1"))
    assert f"losses of the pool (200 rows, {done} already done)" in text


@pytest.mark.slow
def test_a_disk_that_becomes_read_only_under_two_processes(alone, tmp_path):
    with failing_disk(tmp_path) as disk:
        folder = warmed_up(alone, disk.folder)
        os.sync()  # what was copied; a run syncs what it writes itself
        feature = folder / "runs" / "r" / "features"
        launch = Launch(tmp_path, 2, *score(1, "loss", f"runs_dir={folder / 'runs'}"))
        try:
            launch.wait_for(lambda: len(list(feature.glob("*/part-*.parquet"))) >= 3)
            disk.fail()
            assert launch.end() != 0
        finally:
            launch.kill()
        text = launch.output.split("failed (exitcode")[0]
        assert text.count("error: ") == 1, launch.output
        assert "read-only" in text or "does not answer as it should" in text, launch.output
        assert "Traceback" not in text
        disk.repair()
        run(folder, 2, score(1, "loss"))
        assert scores(folder / "runs" / "r")["loss.score"] == scores(alone / "runs" / "r")["loss.score"]


@pytest.mark.parametrize(
    "damaged", ["round-00/checkpoint/adapter_model.safetensors", "pool/part-00000.parquet"]
)
def test_a_replaced_file_is_told_once_before_anything_is_scored(alone, tmp_path, damaged):
    folder = warmed_up(alone, tmp_path)
    path = folder / "runs" / "r" / damaged
    path.write_bytes(path.read_bytes()[:-4] + b"0000")
    launch = Launch(folder, 2, *score(1, "loss"))
    assert launch.end() != 0
    text = launch.output.split("failed (exitcode")[0]
    assert text.count("error: ") == 1, launch.output
    assert str(Path(damaged).parent) in text
    assert "Traceback" not in text
    assert not scores(folder / "runs" / "r")


@pytest.mark.slow
def test_of_two_launches_at_once_one_works_and_the_other_is_refused(alone, tmp_path):
    folder = warmed_up(alone, tmp_path)
    first, second = launches = [Launch(folder, 2, *score(1, "loss")) for _ in range(2)]
    owner = folder / "runs" / "r" / ".lock-owner"
    first.wait_for(lambda: owner.exists() and "process" in owner.read_text())
    pid = int(re.findall(r"\d+", owner.read_text())[0])
    one, other = (first, second) if pid in {rank.pid for rank in first.ranks().values()} else (second, first)
    held = list(one.ranks().values())
    for rank in held:
        rank.suspend()  # or it might be done before the other one asks
    try:
        assert other.end() != 0
    finally:
        for rank in held:
            rank.resume()
    assert one.end() == 0, [launch.output for launch in launches]
    refused = other.output
    assert refused.count("is in use by another process") == 1
    assert "Traceback" not in refused.split("failed (exitcode")[0]
    assert scores(folder / "runs" / "r")["loss.score"] == scores(alone / "runs" / "r")["loss.score"]


@pytest.fixture
def changing_clock(tmp_path) -> tuple[Path, dict[str, str]]:
    """The file that says by how many seconds the wall clock is off, and the variables that make it so."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("the changed clock is a small C file, and there is no compiler")
    library, shift = tmp_path / "shifted_clock.so", tmp_path / "shift"
    source = Path(__file__).parents[1] / "crash" / "shifted_clock.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    shift.write_text("0")
    return shift, {"LD_PRELOAD": str(library), "SHIFTED_CLOCK": str(shift)}


@pytest.mark.slow
def test_a_clock_that_jumps_by_hours_changes_nothing(alone, changing_clock, tmp_path):
    shift, variables = changing_clock
    folder = warmed_up(alone, tmp_path)
    feature = folder / "runs" / "r" / "features"
    launch = Launch(folder, 2, *score(1, "less", "ddp_timeout=20"), more=variables)
    for parts_seen, seconds in ((1, 5 * 3600), (20, -9 * 3600), (40, 0)):
        launch.wait_for(lambda: len(list(feature.glob("*/part-*.parquet"))) >= parts_seen)  # noqa: B023
        shift.write_text(str(seconds))
    assert launch.end() == 0, launch.output
    assert scores(folder / "runs" / "r")["less.score"] == scores(alone / "runs" / "r")["less.score"]
    times = [json.loads(line)["time"] for line in (folder / "runs/r/history.jsonl").read_text().splitlines()]
    assert times  # the history says what the clock said, and nothing reads it


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_other_and_both_go_on(alone, tmp_path):
    folder = warmed_up(alone, tmp_path)
    feature = folder / "runs" / "r" / "features"
    command = ("-m", "--", "dataflex_pipeline", *score(1, "less", "ddp_timeout=5"))
    with two_machines(tmp_path) as both:
        first, second = (each.start(folder, command) for each in both)
        try:
            first.wait_for(lambda: len(list(feature.glob("*/part-*.parquet"))) >= 3)
            owner = (folder / "runs" / "r" / ".lock-owner").read_text()
            assert owner.endswith(f" on {both[0].name}\n")
            second.kill()
            began = time.monotonic()
            assert first.end(90) != 0
            assert time.monotonic() - began < 60
            assert "Rank 1 has given no sign of life for 5 s." in first.output
            first, second = (each.start(folder, command) for each in both)
            assert first.end() == 0, first.output
            assert second.end() == 0, second.output
        finally:
            first.kill()
            second.kill()
    assert scores(folder / "runs" / "r")["less.score"] == scores(alone / "runs" / "r")["less.score"]
