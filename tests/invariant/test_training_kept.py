"""Checkpoints inside a round that are kept: the same ones whatever happened to the training."""

from __future__ import annotations

import shutil

import pytest
from test_training_resume import stop_at_replace
from tiny_training import Listener, assert_same, log_of, make_config, states, train

from dataflex_pipeline.errors import ConfigError, CorruptError
from dataflex_pipeline.training import MARKER, read_marker, verify_checkpoint
from dataflex_pipeline.training.kept import checkpoints_of, kept_folder

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

STEPS = 5


@pytest.fixture(scope="module")
def calm(world, tmp_path_factory):
    """A round of five steps that nothing disturbed, checkpoints 2 and 4 kept."""
    run = tmp_path_factory.mktemp("calm")
    train(run, [0], keeping(world), world[1], steps=STEPS)
    return run


def keeping(world, **changes):
    return make_config(world[0], **{"save_steps": 2, "keep_checkpoints": True, "lora_dropout": 0.2} | changes)


def kept(run, number=0):
    folder = run / f"round-{number:02d}" / "checkpoints"
    return sorted(path.name for path in folder.glob("*")) if folder.exists() else None


def assert_same_round(calm, run):
    assert kept(run) == ["step-000002", "step-000004"]
    for name in ("checkpoints/step-000002", "checkpoints/step-000004", "checkpoint"):
        verify_checkpoint(run / "round-00" / name)
        assert_same(states(calm / "round-00" / name), states(run / "round-00" / name))
    assert sorted(path.name for path in (run / "round-00").iterdir()) == [
        "checkpoint",
        "checkpoints",
        "training_log.jsonl",
    ]


def test_each_is_what_the_training_went_through(calm, world, tmp_path):
    config = keeping(world, keep_checkpoints=False)
    train(tmp_path, [0], config, world[1], steps=STEPS)
    assert kept(tmp_path) is None
    assert_same(states(tmp_path / "round-00/checkpoint"), states(calm / "round-00/checkpoint"))
    # Going on from the kept one reaches the same end: it is the whole state of step 4.
    again = tmp_path / "again" / "round-00"
    again.mkdir(parents=True)
    shutil.copytree(
        kept_folder(calm / "round-00/checkpoint", 4), again / "training" / "checkpoint-4", dirs_exist_ok=True
    )
    heard = Listener()
    train(again.parent, [0], config, world[1], progress=heard, steps=STEPS)
    assert any("goes on from step 4" in line for line in heard.lines)
    assert_same(states(again / "checkpoint"), states(calm / "round-00/checkpoint"))


def test_learning_rates_are_means_over_the_steps_since_the_one_before(calm):
    rates = [line["learning_rate"] for line in log_of(calm, 0)]
    found = checkpoints_of(calm / "round-00" / "checkpoint")
    assert [one.step for one in found] == [2, 4, None]
    assert [one.learning_rate for one in found] == pytest.approx(
        [sum(rates[:2]) / 2, sum(rates[2:4]) / 2, rates[4]]
    )


def test_dying_before_any_rename_keeps_the_same(calm, world, tmp_path, monkeypatch):
    config, pool = keeping(world), world[1]
    with monkeypatch.context() as patch:
        count = stop_at_replace(patch, -1)
        train(tmp_path / "counted", [0], config, pool, steps=STEPS)
    assert count[0] >= 6  # three markers, the log, two kept checkpoints, the end
    for number in range(1, count[0] + 1):
        run = tmp_path / str(number)
        with monkeypatch.context() as patch:
            stop_at_replace(patch, number)
            with pytest.raises(KeyboardInterrupt):
                train(run, [0], config, pool, steps=STEPS)
        assert not (run / "round-00/checkpoint").exists()
        train(run, [0], config, pool, steps=STEPS)
        assert_same_round(calm, run)


def cut_after(world, run, monkeypatch, renames, **changes):
    """Train until so many durable writes were made."""
    with monkeypatch.context() as patch:
        stop_at_replace(patch, renames + 1)
        with pytest.raises(KeyboardInterrupt):
            train(run, [0], keeping(world, **changes), world[1], steps=STEPS)


def test_a_damaged_one_makes_the_training_go_back(calm, world, tmp_path, monkeypatch):
    cut_after(world, tmp_path, monkeypatch, 2)
    (tmp_path / "round-00/training/checkpoint-2/optimizer.pt").write_bytes(b"")
    heard = Listener()
    train(tmp_path, [0], keeping(world), world[1], progress=heard, steps=STEPS)
    assert any("checkpoint of step 4" in line and "one before it is missing" in line for line in heard.lines)
    assert not any("goes on" in line for line in heard.lines)
    assert_same_round(calm, tmp_path)


def test_wanting_them_after_a_kill_makes_the_training_go_back(calm, world, tmp_path, monkeypatch):
    cut_after(world, tmp_path, monkeypatch, 2, keep_checkpoints=False)
    assert not (tmp_path / "round-00/training/checkpoint-2").exists()
    train(tmp_path, [0], keeping(world), world[1], steps=STEPS)
    assert_same_round(calm, tmp_path)


def test_other_save_steps_after_a_kill_keep_theirs_only(world, tmp_path, monkeypatch):
    cut_after(world, tmp_path, monkeypatch, 2)
    train(tmp_path, [0], keeping(world, save_steps=3), world[1], steps=STEPS)
    assert kept(tmp_path) == ["step-000003"]


@pytest.mark.parametrize("changes", [{"save_steps": 4}, {"keep_checkpoints": False}])
def test_other_settings_after_a_kill_between_two_moves_keep_theirs_only(
    world, tmp_path, monkeypatch, changes
):
    cut_after(world, tmp_path, monkeypatch, 5)  # three markers, the log, one kept checkpoint
    moved = kept(tmp_path)
    assert len(moved) == 1
    heard = Listener()
    train(tmp_path, [0], keeping(world, **changes), world[1], progress=heard, steps=STEPS)
    assert kept(tmp_path) == (["step-000004"] if "save_steps" in changes else [])
    assert any(f"Removed: {tmp_path}" in line and moved[0] in line for line in heard.lines)
    steps = [one.step for one in checkpoints_of(tmp_path / "round-00" / "checkpoint")]
    assert steps == ([4, None] if "save_steps" in changes else [None])


def test_training_anew_sets_the_kept_ones_aside(calm, world, tmp_path):
    shutil.copytree(calm / "round-00", tmp_path / "round-00")
    shutil.rmtree(tmp_path / "round-00" / "checkpoint")
    train(tmp_path, [0], keeping(world, learning_rate=1e-3), world[1], steps=STEPS)
    ends = {read_marker(path).fingerprint for path in (tmp_path / "round-00/checkpoints").iterdir()}
    assert ends == {read_marker(tmp_path / "round-00/checkpoint").fingerprint}
    assert len(list((tmp_path / "round-00").glob("checkpoints.old-*"))) == 1


def test_later_rounds_keep_by_the_steps_of_the_whole_run(calm, world, tmp_path):
    shutil.copytree(calm / "round-00", tmp_path / "round-00")
    train(tmp_path, [1], keeping(world), world[1], steps=STEPS)
    assert kept(tmp_path, 1) == ["step-000006", "step-000008"]  # 10 is the end
    steps = [one.step for one in checkpoints_of(tmp_path / "round-01/checkpoint")]
    assert steps == [6, 8, None]


def test_the_best_and_an_early_stop_are_as_without(world, tmp_path):
    model, pool, target = world
    settings = {
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "early_stopping_steps": 1,
        "early_stopping_min_delta": 100.0,
    }
    train(tmp_path / "plain", [0], make_config(model, **settings), pool, target)
    train(tmp_path / "keep", [0], make_config(model, keep_checkpoints=True, **settings), pool, target)
    ends = [read_marker(tmp_path / run / "round-00/checkpoint") for run in ("plain", "keep")]
    assert ends[0].step == ends[1].step == 2  # the first evaluation is the best, the second is one too many
    assert ends[1].result["stopped_early"]
    assert kept(tmp_path / "keep") == ["step-000001"]
    bests = [
        (tmp_path / run / "best" / "adapter_model.safetensors").read_bytes() for run in ("plain", "keep")
    ]
    assert bests[0] == bests[1]


def test_keeping_without_making_any_is_refused(world, tmp_path):
    with pytest.raises(ConfigError, match="keep_checkpoints: true was set without save_steps"):
        train(tmp_path, [0], keeping(world, save_steps=None), world[1])


def test_foreign_or_damaged_folders_are_refused(calm, world, tmp_path):
    shutil.copytree(calm / "round-00", tmp_path / "round-00")
    end = tmp_path / "round-00" / "checkpoint"
    kept_folder(end, 4).rename(kept_folder(end, 3))
    with pytest.raises(CorruptError, match=r"step-000003 is no checkpoint of that step"):
        checkpoints_of(end)
    shutil.rmtree(kept_folder(end, 3))
    (kept_folder(end, 2) / MARKER).unlink()
    with pytest.raises(CorruptError, match=r"step-000002 is no checkpoint"):
        checkpoints_of(end)
