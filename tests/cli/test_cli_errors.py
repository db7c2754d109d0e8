"""Bad input: one clear message in three parts, exit code 2, and nothing on disk is changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import copied, dataflex, done, finished, refused, small, snapshot

from dataflex_pipeline.store.run import RunFolder

ROWS = [{"instruction": f"say {n}", "input": "", "output": f"it is {n}"} for n in range(20)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in; files that a command leaves in the current folder show there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- data


def test_a_missing_data_file(here, tiny_demo):
    text = refused(here, "round", 1, *small(tiny_demo), "dataset=nowhere.jsonl")
    assert "dataset 'nowhere.jsonl' is not there" in text
    assert not (here / "runs").exists()


@pytest.mark.parametrize("key", ["dataset", "eval_dataset"])
def test_a_mistake_in_ones_own_data_shows_before_the_demo_is_made(here, key):
    """The model is the demo's here, which would take a minute and leave a folder."""
    write_jsonl(here / "fine.jsonl", ROWS)
    other = {"dataset": "eval_dataset", "eval_dataset": "dataset"}[key]
    assert "'nowhere.jsonl' is not there" in refused(
        here, "round", 1, f"{key}=nowhere.jsonl", f"{other}=fine.jsonl"
    )
    assert not (here / "runs").exists()


def test_an_empty_data_file(here, tiny_demo):
    (here / "empty.jsonl").touch()
    assert "empty.jsonl" in refused(here, "round", 1, *small(tiny_demo), "dataset=empty.jsonl")


def test_malformed_json_names_file_and_line(here, tiny_demo):
    lines = [json.dumps(row) for row in ROWS]
    (here / "bad.jsonl").write_text("\n".join([*lines[:6], lines[6][:-1], *lines[7:]]))
    text = refused(here, "round", 1, *small(tiny_demo), "dataset=bad.jsonl")
    assert f"{here / 'bad.jsonl'}, line 7" in text


def test_a_malformed_array_names_file_and_line(here, tiny_demo):
    (here / "bad.json").write_text('[\n{"instruction": "a", "output": "b"},\n{"instruction": }\n]')
    assert "bad.json, line 3" in refused(here, "round", 1, *small(tiny_demo), "dataset=bad.json")


def test_an_unknown_format_lists_the_columns(here, tiny_demo):
    write_jsonl(here / "odd.jsonl", [{"frage": "a", "antwort": "b"}])
    text = refused(here, "round", 1, *small(tiny_demo), "dataset=odd.jsonl")
    assert "frage" in text
    assert "antwort" in text


def test_a_pool_without_a_single_valid_row(here, tiny_demo):
    write_jsonl(here / "void.jsonl", [{**row, "output": ""} for row in ROWS])
    text = refused(here, "round", 1, *small(tiny_demo), "dataset=void.jsonl")
    assert "None of the 20 rows" in text
    assert not (here / "runs").exists()


def test_a_mistake_in_the_target_leaves_no_pool_behind(here, tiny_demo):
    write_jsonl(here / "void.jsonl", [{**row, "output": ""} for row in ROWS])
    refused(here, "round", 1, *small(tiny_demo), "eval_dataset=void.jsonl")
    assert not (here / "runs").exists()


# ---------------------------------------------------------------- losses that are not numbers


def with_changed_weights(model: Path, copy: Path, change) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, copy)
    weights = load_file(copy / "model.safetensors")
    with torch.no_grad():
        change(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_a_model_that_gives_only_nan(here, tiny_demo):
    def spoil(weights):
        for tensor in weights.values():
            tensor.fill_(float("nan"))

    model = with_changed_weights(tiny_demo.model, here / "model", spoil)
    text = refused(here, "round", 1, *small(tiny_demo), f"model_name_or_path={model}")
    assert "gives no finite loss" in text
    assert not (here / "runs").exists()


def rare_token(demo) -> tuple[int, set[int]]:
    """A token of a few pool rows that the warm-up does not draw; and those rows."""
    run = finished(demo)
    pool = pq.read_table(run / "pool" / "part-00000.parquet", columns=["row", "input_ids"])
    drawn = set(pq.read_table(run / "round-00" / "index.parquet")["row"].to_pylist())
    rows_of: dict[int, set[int]] = {}
    for row, ids in zip(pool["row"].to_pylist(), pool["input_ids"].to_pylist(), strict=True):
        for token in ids:
            rows_of.setdefault(token, set()).add(row)
    usable = {token: rows for token, rows in rows_of.items() if len(rows) >= 2 and not rows & drawn}
    return min(usable.items(), key=lambda item: (len(item[1]), item[0]))


def test_a_row_whose_loss_is_nan_is_invalid_with_its_reason_and_never_drawn(here, tiny_demo):
    token, rows = rare_token(tiny_demo)

    def spoil(weights):
        weights["model.embed_tokens.weight"][token] = float("nan")

    model = with_changed_weights(tiny_demo.model, here / "model", spoil)
    done("round", 1, *small(tiny_demo), f"model_name_or_path={model}", "--run", "nan", "fraction=0.5")
    scores = pq.read_table(here / "runs" / "nan" / "round-01" / "scores" / "loss.parquet").to_pylist()
    assert {row["row"] for row in scores if not row["valid"]} == rows
    assert {row["reason"] for row in scores if not row["valid"]} == {"the loss is not finite"}
    assert all(row["score"] is None for row in scores if not row["valid"])
    assert all(row["reason"] is None for row in scores if row["valid"])
    index = pq.read_table(here / "runs" / "nan" / "round-01" / "index.parquet")
    assert not rows & set(index["row"].to_pylist())
    probabilities = pq.read_table(here / "runs" / "nan" / "round-01" / "probabilities" / "loss.parquet")
    for row, probability in zip(
        probabilities["row"].to_pylist(), probabilities["probability"].to_pylist(), strict=True
    ):
        assert (not probability) == (row in rows)


def test_scoring_where_every_loss_is_nan(here, tiny_demo):
    """The model was sound at the warm-up; its weights are damaged in memory when round 1 is scored."""
    from dataflex_pipeline.features import losses

    folder = copied(tiny_demo, here / "runs")
    for name in ("round-01", "round-02", "features"):
        shutil.rmtree(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "batch_loss_sums", lambda opened, sequences, rows: np.full(len(rows), np.nan))
        ran = dataflex("score", "--run", "base", "runs_dir=runs")
    assert ran.code == 2
    assert "no valid row in the pool (200 rows: the loss is not finite)" in ran.err
    assert not (folder / "round-01").exists()


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("learning_rte=1", "Did you mean 'learning_rate'?"),
        ("lora_rank=many", "lora_rank"),
        ("lora_rank=0", "lora_rank"),
        ("bf16=perhaps", "bf16"),
        ("strategy=best", "strategy"),
        ("loss.focus=hihg", "loss.focus"),
        ("loss.focsu=high", "Did you mean 'focus'?"),
        ("component_name=los", "Did you mean 'loss'?"),
        ("template=nonsense", "nonsense"),
        ("device=abacus", "abacus"),
        ("update_times=-1", "update_times"),
    ],
)
def test_a_setting_that_cannot_be_used(here, tiny_demo, argument, expected):
    text = refused(here, "round", 1, *small(tiny_demo), argument)
    assert expected in text
    assert not (here / "runs").exists()


def test_an_unknown_method(here, tiny_demo):
    text = refused(here, "round", 1, *small(tiny_demo), "--method", "delta_lose")
    assert "'delta_lose'" in text
    assert "Did you mean 'delta_loss'?" in text
    assert "delta_lose" in refused(here, "methods", "delta_lose")


def test_configuration_files(here):
    assert "none.yaml" in refused(here, "round", "--config", "none.yaml")
    (here / "bad.yaml").write_text("dataset: [a\nlora_rank: 4\n")
    assert "bad.yaml" in refused(here, "round", "--config", "bad.yaml")
    (here / "list.yaml").write_text("- a\n- b\n")
    assert "list.yaml" in refused(here, "round", "--config", "list.yaml")


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "/abs"])
def test_a_run_name_that_is_a_path(here, name):
    assert "--run is" in refused(here, "warmup", "--run", name)


@pytest.mark.parametrize(
    "arguments", [("warmup", "garbage"), ("round", "two"), ("round", "1", "2"), ("score", "1")]
)
def test_arguments_that_are_no_settings(here, arguments):
    assert f"'{arguments[-1]}'" in refused(here, *arguments)


# ---------------------------------------------------------------- models


def test_a_model_folder_that_is_not_there(here, tiny_demo):
    text = refused(here, "round", 1, *small(tiny_demo), "model_name_or_path=./no-model")
    assert "./no-model" in text
    assert not (here / "runs").exists()


def test_a_folder_that_is_no_model(here, tiny_demo):
    (here / "model").mkdir()
    (here / "model" / "notes.txt").write_text("nothing")
    assert "config.json" in refused(here, "round", 1, *small(tiny_demo), "model_name_or_path=./model")
    assert not (here / "runs").exists()


@pytest.mark.parametrize("pickled", [True, False])
def test_a_model_without_safetensors(here, tiny_demo, pickled):
    shutil.copytree(tiny_demo.model, here / "model")
    weights = here / "model" / "model.safetensors"
    if pickled:
        weights.rename(here / "model" / "pytorch_model.bin")
    else:
        weights.unlink()
    text = refused(here, "round", 1, *small(tiny_demo), "model_name_or_path=./model")
    assert "safetensors" in text
    assert ("pickle" in text) == pickled
    assert not (here / "runs").exists()


def test_weights_that_are_cut_off(here, tiny_demo):
    shutil.copytree(tiny_demo.model, here / "model")
    weights = here / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    text = refused(here, "round", 1, *small(tiny_demo), "model_name_or_path=./model")
    assert "The weights of the model 'model' could not be loaded" in text
    assert not (here / "runs").exists()


def test_a_model_without_a_chat_template(here, tiny_demo):
    shutil.copytree(tiny_demo.model, here / "model")
    (here / "model" / "chat_template.jinja").unlink()
    text = refused(here, "round", 1, *small(tiny_demo), "model_name_or_path=./model")
    assert "template" in text
    assert "chatml" in text
    assert not (here / "runs").exists()


# ---------------------------------------------------------------- order


def test_a_round_beyond_the_horizon(here, tiny_demo):
    text = refused(here, "round", 4, *small(tiny_demo))
    assert "Round 4 was asked for; update_times is 3" in text
    assert "at step 8" in text  # 2 + 3 x 2
    folder = copied(tiny_demo, here / "runs")
    for command in ("score", "select", "train-round"):
        text = refused(here, command, "--round", 4, "--run", folder.name, "runs_dir=runs")
        assert "update_times is 3" in text


def test_steps_out_of_order(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs")
    for name in ("round-01", "round-02"):
        shutil.rmtree(folder / name)
    on = ("--run", "base", "runs_dir=runs")
    assert "round 1 has no finished checkpoint" in refused(here, "score", "--round", 2, *on)
    assert "round 1 has no finished checkpoint" in refused(here, "select", "--round", 2, *on)
    assert "has no finished loss scores" in refused(here, "select", "--round", 1, *on)
    assert "Round 1 has no index" in refused(here, "train-round", "--round", 1, *on)
    assert "Round 0 is the warm-up, which draws uniformly" in refused(here, "score", "--round", 0, *on)
    shutil.rmtree(folder / "round-00" / "checkpoint")
    assert "Run `dataflex warmup` first" in refused(here, "score", "--round", 1, *on)


@pytest.mark.parametrize("command", ["score", "select", "train-round", "status"])
def test_a_run_that_was_never_started(here, command):
    assert "There is no run at" in refused(here, command, "--run", "nothing")


# ---------------------------------------------------------------- other settings


def test_a_run_of_other_settings_lists_every_change_and_two_ways_out(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    on = ("--run", "base", "runs_dir=runs")
    for command in (("round", 2), ("score", "--round", 2), ("train-round", "--round", 2)):
        text = refused(here, *command, *on, "learning_rate=0.01", "lora_rank=8")
        assert "learning_rate: 0.002 -> 0.01" in text
        assert "lora_rank: 4 -> 8" in text
        assert "another run name" in text
        assert "--overwrite" in text
    assert "params.focus" in refused(here, "round", 2, *on, "loss.focus=low")
    assert "method: loss -> random" in refused(here, "round", 2, *on, "--method", "random")
    assert "draw.fraction: null -> 0.5" in refused(here, "round", 2, *on, "fraction=0.5")
    text = refused(here, "round", 2, *on, f"dataset={tiny_demo.target}")
    assert "sources" in text


def test_a_selection_that_cannot_be_drawn_leaves_the_old_one(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    on = ("--round", 2, "--run", "base", "runs_dir=runs")
    for more in ((), ("--overwrite",)):
        text = refused(here, "select", *on, "source_quotas={nope: 0.5}", *more)
        assert "nope" in text or "settings changed" in text


def test_other_settings_before_the_warm_up_is_trained(here, tiny_demo):
    """What is there is judged by what it was made from: nothing was trained with the rank yet."""
    folder = copied(tiny_demo, here / "runs")
    for name in ("round-01", "round-02", "features"):
        shutil.rmtree(folder / name)
    shutil.rmtree(folder / "round-00" / "checkpoint")
    on = ("--run", "base", "runs_dir=runs")
    assert "cutoff_len: 2048 -> 64" in refused(here, "warmup", *on, "cutoff_len=64")
    done("warmup", *on, "lora_rank=2")
    adapter = json.loads((folder / "round-00" / "checkpoint" / "adapter_config.json").read_text())
    assert adapter["r"] == 2


def test_overwrite_makes_it_anew_and_keeps_the_old(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs")
    old = snapshot(folder)
    on = ("--run", "base", "runs_dir=runs")
    done("round", 1, *on, "learning_rate=0.01", "--overwrite")
    kept = list((folder / "round-00").glob("checkpoint.old-*"))
    assert len(kept) == 1
    name = "adapter_model.safetensors"
    assert snapshot(kept[0])[name] == old[f"round-00/checkpoint/{name}"]
    assert snapshot(folder)[f"round-00/checkpoint/{name}"] != old[f"round-00/checkpoint/{name}"]
    assert len(list((folder / "round-01" / "scores").glob("loss.parquet.old-*"))) == 1
    assert "up to date" in done("round", 1, *on)  # the new settings are the run's own now
    assert "learning_rate: 0.01" in (folder / "run.yaml").read_text()


# ---------------------------------------------------------------- damaged files


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "not parquet":
        path.write_bytes(b"no table" * (path.stat().st_size // 8))
    else:
        pq.write_table(pa.table({"row": [1, 2, 3]}), path)


@pytest.mark.parametrize("how", ["truncated", "not parquet", "foreign"])
@pytest.mark.parametrize("which", ["pool/part-00000", "round-02/scores/loss", "round-02/index"])
def test_a_damaged_table(here, tiny_demo, which, how):
    folder = copied(tiny_demo, here / "runs")
    path = folder / f"{which}.parquet"
    damage(path, how)
    text = refused(here, "round", 2, "--run", "base", "runs_dir=runs")
    assert str(path.relative_to(here)) in text


@pytest.mark.parametrize("how", ["truncated", "not parquet", "foreign"])
@pytest.mark.parametrize("complete", [True, False])
def test_a_damaged_part_of_a_feature(here, tiny_demo, how, complete):
    folder = copied(tiny_demo, here / "runs")
    shutil.rmtree(folder / "round-02")
    for feature in (folder / "features").iterdir():
        damage(feature / "part-00000.parquet", how)
        if not complete:
            (feature / "_manifest.json").unlink()
    text = refused(here, "score", "--round", 2, "--run", "base", "runs_dir=runs")
    assert "part-00000.parquet" in text


@pytest.mark.parametrize("name", ["run.yaml", "sources.json", "pool/_manifest.json"])
@pytest.mark.parametrize("content", ["", "{", "[1, 2]"])
def test_a_damaged_record(here, tiny_demo, name, content):
    folder = copied(tiny_demo, here / "runs")
    (folder / name).write_text(content)
    assert name in refused(here, "round", 2, "--run", "base", "runs_dir=runs")


def test_two_processes_on_one_run(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs")
    with RunFolder(folder).lock():
        text = refused(here, "round", 2, "--run", "base", "runs_dir=runs")
        assert "is in use by another process" in text
        assert "There is no run" not in done("status", "--run", "base", "runs_dir=runs")
    assert "up to date" in done("round", 2, "--run", "base", "runs_dir=runs")
