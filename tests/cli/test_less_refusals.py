"""What LESS cannot score: rows whose gradient is not finite, checkpoints without or with foreign states."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cli_runs import copied, data, dataflex, done, finished, refused, small, snapshot
from test_cli_errors import rare_token, with_changed_weights

from dataflex_pipeline.store.atomic import read_json, write_json
from dataflex_pipeline.store.fingerprint import file_digest
from dataflex_pipeline.store.tables import TableFile

LESS = ("component_name=less", "less.proj_dim=64")


@pytest.fixture
def scored(tiny_demo, tmp_path):
    """A copy of a run whose warm-up is done, and the command that scores it with less."""
    folder = copied(tiny_demo, tmp_path / "runs")
    for name in ("round-01", "round-02", "features"):
        shutil.rmtree(folder / name)
    return folder, ("score", "--method", "less", "--run", "base", f"runs_dir={tmp_path / 'runs'}", LESS[1])


def change_file(checkpoint, name, change):
    """Change a file of a checkpoint as if the training had written it so."""
    change(checkpoint / name)
    marker = read_json(checkpoint / "COMPLETE.json")
    if (checkpoint / name).exists():
        marker["files"][name] = {
            "bytes": (checkpoint / name).stat().st_size,
            "digest": file_digest(checkpoint / name),
        }
    else:
        del marker["files"][name]
    write_json(checkpoint / "COMPLETE.json", marker | {"own_digest": ""})


def assert_nothing_computed(folder, ran):
    assert ran.code == 2, ran.out + ran.err
    assert "Traceback" not in ran.err
    assert not list(folder.glob("features/*/part-*"))
    assert not (folder / "round-01").exists()


def test_a_checkpoint_without_optimizer_states_says_how_to_get_them(scored):
    folder, command = scored
    change_file(folder / "round-00" / "checkpoint", "optimizer.pt", lambda path: path.unlink())
    ran = dataflex(*command)
    assert_nothing_computed(folder, ran)
    assert "has no optimizer.pt" in ran.err
    assert "the warm-up makes the first one" in ran.err
    done(*command, "less.gradient_type=sgd")  # needs none


def test_states_of_another_model_are_refused(scored):
    folder, command = scored

    def rename(path):
        saved = torch.load(path, weights_only=True)
        for group in saved["param_groups"]:
            group["param_names"] = [name.replace("q_proj", "other_proj") for name in group["param_names"]]
        torch.save(saved, path)

    change_file(folder / "round-00" / "checkpoint", "optimizer.pt", rename)
    ran = dataflex(*command)
    assert_nothing_computed(folder, ran)
    assert "has no states of the parameter" in ran.err
    assert "states of another model or adapter" in ran.err


def test_states_of_another_rank_are_refused(scored):
    folder, command = scored

    def cut(path):
        saved = torch.load(path, weights_only=True)
        for state in saved["state"].values():
            state["exp_avg"] = state["exp_avg"][:2]
        torch.save(saved, path)

    change_file(folder / "round-00" / "checkpoint", "optimizer.pt", cut)
    ran = dataflex(*command)
    assert_nothing_computed(folder, ran)
    assert "and its Adam states have" in ran.err


def test_a_checkpoint_with_nothing_trainable_is_refused(scored):
    folder, command = scored

    def freeze(path):
        config = json.loads(path.read_text())
        config["target_modules"] = ["no_such_layer"]
        path.write_text(json.dumps(config))

    change_file(folder / "round-00" / "checkpoint", "adapter_config.json", freeze)
    ran = dataflex(*command)
    assert_nothing_computed(folder, ran)
    assert "cannot be used: Target modules {'no_such_layer'} not found" in ran.err


def test_rows_whose_gradient_is_not_finite_are_named_and_never_selected(tiny_demo, tmp_path):
    token, rows = rare_token(tiny_demo)

    def spoil(weights):
        weights["model.embed_tokens.weight"][token] = float("nan")

    model = with_changed_weights(tiny_demo.model, tmp_path / "model", spoil)
    settings = (*small(tiny_demo), LESS[0], f"model_name_or_path={model}", f"runs_dir={tmp_path}")
    text = done("round", 1, *settings, "--run", "nan", "num_samples=150")
    names = [f"row {row} (the loss or its gradient is not finite)" for row in sorted(rows)[:3]]
    assert f"{len(rows)} rows of the pool could not be scored: {', '.join(names)}" in text
    table = TableFile(tmp_path / "nan" / "round-01" / "scores" / "less.parquet")
    assert names[0] in table.metadata["notices"]
    scores = pq.read_table(table.path).to_pylist()
    assert {row["row"] for row in scores if not row["valid"]} == rows
    assert all((row["score"] is None) == (row["row"] in rows) for row in scores)
    assert np.isfinite([row["score"] for row in scores if row["valid"]]).all()
    index = pq.read_table(tmp_path / "nan" / "round-01" / "index.parquet")
    assert not rows & set(index["row"].to_pylist())
    assert len(set(index["row"].to_pylist())) == 8


def test_a_projection_that_is_none_has_no_dimensions(scored):
    folder, command = scored
    ran = dataflex(*command, "less.projection=none")
    assert_nothing_computed(folder, ran)
    assert "projection: none projects nothing, and proj_dim is 64" in ran.err
    assert "projection: countsketch" in ran.err


def test_a_projection_that_needs_a_gpu_is_refused_before_the_warm_up(tiny_demo, tmp_path):
    settings = (*small(tiny_demo), f"runs_dir={tmp_path}", "device=cpu", "less.projection=trak")
    text = refused(tmp_path, "round", 1, *settings, "--method", "less", "--run", "trak")
    assert "projection: trak was set" in text


def test_where_no_gradient_is_finite_nothing_is_selected(scored, monkeypatch):
    from dataflex_pipeline.gradients import stream

    folder, command = scored
    real = stream.projected_batch

    def spoiled(*arguments):
        losses, vectors, squares = real(*arguments)
        return losses, vectors * torch.nan, squares

    monkeypatch.setattr(stream, "projected_batch", spoiled)
    ran = dataflex(*command)
    assert ran.code == 2
    assert "the loss or its gradient is not finite" in ran.err
    assert "has no valid row" in ran.err
    assert not (folder / "round-01").exists()


def test_a_target_without_a_valid_row_is_refused(tiny_demo, tmp_path):
    (tmp_path / "target.json").write_text(json.dumps([{"instruction": "a " * 900, "output": "b"}] * 3))
    settings = (*small(tiny_demo), *LESS, f"eval_dataset={tmp_path / 'target.json'}", "cutoff_len=64")
    text = refused(tmp_path, "round", 1, *settings, f"runs_dir={tmp_path / 'runs'}")
    assert "None of the 3 rows of" in text
    assert "no response tokens left after cutoff_len 64" in text


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("less.proj_dim=0", "less.proj_dim is 0"),
        ("less.temperature=0", "less.temperature is 0"),
        ("less.checkpoints=some", "'last' or 'all'"),
        ("less.projection=trak", "projection: trak was set"),
        ("less.dtype=float32", "projection: none stores none"),
        ("round_robin_over=rows", "round_robin_over"),
    ],
)
def test_wrong_values_are_refused(tiny_demo, tmp_path, setting, words):
    run = finished(tiny_demo)
    before = snapshot(run)
    shutil.copytree(run, tmp_path / "base")
    ran = dataflex(
        *("score", "--round", 2, "--method", "less", *data(tiny_demo)),
        *(setting, "--run", "base", f"runs_dir={tmp_path}"),
    )
    assert ran.code == 2
    assert words in ran.err, ran.err
    assert "\n-> " in ran.err
    assert snapshot(run) == before
