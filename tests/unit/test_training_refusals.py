"""What a round does not continue from or train on, and how it says so."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from tiny_training import (
    STEPS,
    make_config,
    make_index,
    make_plan,
    train,
)

from dataflex_pipeline.api import Silent
from dataflex_pipeline.errors import ConfigError, CorruptError, DataError, RunError, StaleError, UserError
from dataflex_pipeline.store.atomic import read_json, write_json
from dataflex_pipeline.training import MARKER, train_round

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = 3


@pytest.fixture(scope="module")
def warm(world, tmp_path_factory):
    """A run with its warm-up done."""
    model, pool, _ = world
    run = tmp_path_factory.mktemp("warm")
    config = make_config(model)
    train(run, [0], config, pool)
    return run, config, pool


@pytest.fixture
def run(warm, tmp_path):
    """A copy of that run, to be damaged."""
    shutil.copytree(warm[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("damage", "kind", "wording"),
    [
        (lambda c: (c / "optimizer.pt").unlink(), CorruptError, "optimizer.pt.*missing[^.]*.\n.*start anew"),
        (lambda c: (c / "scheduler.pt").unlink(), CorruptError, "scheduler.pt.*missing[^.]*.\n.*start anew"),
        (
            lambda c: (c / "rng_state.pth").unlink(),
            CorruptError,
            "rng_state.pth.*missing[^.]*.\nWithout it dropout",
        ),
        (lambda c: (c / MARKER).unlink(), CorruptError, "has no COMPLETE.json"),
        (lambda c: (c / MARKER).write_text('{"a": 1}'), CorruptError, "not the marker of a checkpoint"),
        (lambda c: (c / MARKER).write_text('{"a": '), CorruptError, "not valid JSON"),
        (
            lambda c: (c / "adapter_model.safetensors").write_bytes(
                (c / "adapter_model.safetensors").read_bytes()[:-1] + b"\x55"
            ),
            CorruptError,
            "adapter_model.safetensors: its content is not what was written",
        ),
        (
            lambda c: (c / "optimizer.pt").write_bytes(b"x"),
            CorruptError,
            "optimizer.pt: it has 1 bytes where",
        ),
        (lambda c: (c / "pytorch_model.bin").write_bytes(b"x"), CorruptError, "put there after"),
    ],
)
def test_damaged_previous_checkpoint_is_refused(run, warm, damage, kind, wording):
    _, config, pool = warm
    damage(run / "round-00/checkpoint")
    with pytest.raises(kind, match=wording):
        train(run, [1], config, pool)
    assert not (run / "round-01").exists()


def edit_marker(run, **changed):
    path = run / "round-00/checkpoint" / MARKER
    write_json(path, read_json(path) | changed | {"own_digest": ""})


def test_previous_checkpoint_of_another_step_or_shape_is_refused(run, warm):
    _, config, pool = warm
    plan = make_plan(run, 1, config, pool)
    wrong = replace(plan, first_step=STEPS + 1, last_step=2 * STEPS + 1)
    with pytest.raises(RunError, match=r"at step 3, and round 1 starts at step 4"):
        train_round(config, wrong, pool, None, Silent())
    with pytest.raises(StaleError, match="horizon: 12 -> 15"):
        train_round(config, replace(plan, horizon=15), pool, None, Silent())
    edit_marker(run, finished=False)
    with pytest.raises(RunError, match="continues the optimizer"):
        train_round(config, plan, pool, None, Silent())


def test_other_settings_for_a_finished_checkpoint_are_told(run, warm):
    _, config, pool = warm
    changed = config.model_copy(update={"learning_rate": 1e-3})
    with pytest.raises(StaleError, match=r"learning_rate: 0.005 -> 0.001"):
        train(run, [0], changed, pool)
    plan = make_plan(run, 0, config, pool, index=make_index(9, STEPS, pool.n_rows))
    with pytest.raises(StaleError, match="index: "):
        train_round(config, plan, pool, None, Silent())


def test_an_index_that_does_not_fit_is_refused(warm, tmp_path):
    _, config, pool = warm
    good = make_index(0, STEPS, pool.n_rows)

    def attempt(index):
        train(tmp_path / "bad", [0], config, pool, index=index)

    with pytest.raises(CorruptError, match="11 positions where steps x global_batch = 12"):
        attempt(good.slice(0, 11))
    rows = good.column("row").to_numpy().copy()
    rows[3] = pool.n_rows
    with pytest.raises(CorruptError, match="row 40, and the pool has 40 rows"):
        attempt(good.set_column(1, good.schema.field(1), [rows]))
    rows[3] = (good["row"][3].as_py() + 1) % pool.n_rows
    with pytest.raises(CorruptError, match="row_id is another one"):
        attempt(good.set_column(1, good.schema.field(1), [rows]))
    weights = np.ones(12, np.float32)
    weights[0] = np.nan
    with pytest.raises(CorruptError, match="negative or not finite"):
        attempt(make_index(0, STEPS, pool.n_rows, weights))
    assert not (tmp_path / "bad/round-00/checkpoint").exists()


def test_a_pool_of_another_tokenizer_is_refused(world, tmp_path):
    _, pool, _ = world
    import torch
    from transformers import AutoModelForCausalLM

    small = AutoModelForCausalLM.from_pretrained(world[0])
    small.resize_token_embeddings(32)
    folder = shutil.copytree(world[0], tmp_path / "small")
    with torch.no_grad():
        small.save_pretrained(folder)
    with pytest.raises(DataError, match="The model knows 32 token ids"):
        train(tmp_path / "run", [0], make_config(folder), pool)


def test_loss_that_is_not_finite_stops_before_anything_is_saved(world, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    model, pool, _ = world
    folder = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"training loss of step 1 is nan.*\(pool rows \d+"):
        train(tmp_path / "run", [0], make_config(folder), pool)
    assert not (tmp_path / "run/round-00/checkpoint").exists()


def test_a_full_disk_is_one_clear_error_and_nothing_half_visible(world, tmp_path):
    import resource

    model, pool, _ = world
    config = make_config(model)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"could not be written(.|\n)*MiB are free(.|\n)*Make room"):
            train(tmp_path, [0], config, pool)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "round-00/checkpoint").exists()
    assert not list((tmp_path / "round-00/training").glob("checkpoint-*"))
    assert train(tmp_path, [0], config, pool).steps == STEPS


@pytest.mark.parametrize("number", [6_000, 100_000])
def test_torch_says_that_a_write_failed_in_words_that_are_known(tmp_path, number):
    import resource

    import torch

    from dataflex_pipeline.training.trainer import writing

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    (tmp_path / "draft").mkdir()
    try:
        with pytest.raises(UserError, match="could not be written"), writing(tmp_path / "draft"):
            torch.save({"a": torch.zeros(number)}, tmp_path / "draft" / "optimizer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "draft").exists()


def test_errors_that_are_no_failed_writes_stay_what_they_are(tmp_path):
    import torch

    from dataflex_pipeline.training.trainer import writing

    (tmp_path / "draft").mkdir()
    with pytest.raises(torch.OutOfMemoryError), writing(tmp_path / "draft"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), writing(tmp_path / "draft"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert (tmp_path / "draft").is_dir()


def test_a_checkpoint_is_not_lost_when_an_older_one_cannot_be_removed(world, tmp_path, monkeypatch):
    from dataflex_pipeline.training.conductor import Conductor

    model, pool, _ = world

    def busy(*_):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(Conductor, "prune", busy)
        with pytest.raises(OSError, match="busy"):
            train(tmp_path, [0], make_config(model, save_steps=2), pool)
    assert (tmp_path / "round-00/training/checkpoint-2" / MARKER).is_file()


def test_settings_that_cannot_work_are_refused_before_training(world, tmp_path):
    model, pool, _ = world

    def attempt(**settings):
        train(tmp_path, [0], make_config(model, **settings), pool)

    with pytest.raises(ConfigError, match=r"report_to: 'wandbb' is not known. Did you mean 'wandb'"):
        attempt(report_to="wandbb")
    with pytest.raises(ConfigError, match=r"mlflow is not installed(.|\n)*pip install mlflow"):
        attempt(report_to="mlflow")
    with pytest.raises(ConfigError, match="eval_strategy: epoch was set, and there is no target"):
        attempt(eval_strategy="epoch")
    with pytest.raises(ConfigError, match=r"metric_for_best_model: eval_los is not known. Did you mean"):
        attempt(metric_for_best_model="eval_los")
    with pytest.raises(ConfigError, match=r"lr_scheduler_type: cosin is not known. Did you mean 'cosine'"):
        attempt(lr_scheduler_type="cosin")
    with pytest.raises(ConfigError, match="There is no such file"):
        attempt(deepspeed="nowhere.json")
    with pytest.raises(ConfigError, match="device: cuda:7"):
        attempt(device="cuda:7")
    assert not any(tmp_path.iterdir())
