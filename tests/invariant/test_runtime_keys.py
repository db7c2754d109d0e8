"""Keys of role runtime: on a finished run each may change, and every stage is done with byte-equal tables."""

import hashlib
import json
import re
import shutil

import pytest
from cli_runs import SMALL, data, dataflex, done, refused

from dataflex_pipeline.config.fields import Config, role_of
from dataflex_pipeline.features.losses import Losses
from dataflex_pipeline.features.plan import plan_feature
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.stale import found_ingredients

pytestmark = pytest.mark.slow

RUNTIME = {name for name in Config.model_fields if role_of(name) == "runtime"}
CHANGED = {
    "test_dataset": "test.jsonl",
    "preprocessing_num_workers": "3",
    "dataloader_num_workers": "1",
    "gradient_checkpointing": "true",
    "logging_steps": "1",
    "save_steps": "1",
    "keep_checkpoints": "true",
    "plot_loss": "true",
    "report_to": "tensorboard",
    "run_name": "other",
    "use_swanlab": "true",
    "swanlab_project": "other",
    "swanlab_workspace": "other",
    "swanlab_run_name": "other",
    "swanlab_mode": "local",
    "swanlab_logdir": "elsewhere",
    "swanlab_api_key": "k",
    "swanlab_lark_webhook_url": "https://lark.invalid/hook",
    "swanlab_lark_secret": "s",
    "deepspeed": "ds.json",
    "ddp_timeout": "60",
    "per_device_eval_batch_size": "3",
    "device": "cpu",
    "score_batch_tokens": "333",
    "rows_per_part": "7",
    "runs_dir": "moved",
    "output_dir": "runs/base",
    "features_dir": "cache",
    "export_dir": "out",
    "export_size": "2",
    "export_device": "auto",
}
"""Another value than the run's for each key; where a key needs a file, the test makes it."""


@pytest.fixture(scope="module")
def world(tiny_demo, tmp_path_factory):
    """A run at its horizon, with losses in parts and its data exported."""
    folder = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = ("warmup_step=1", "update_step=1", "update_times=2", *SMALL)
        settings = (*settings, "rows_per_part=64", "--run", "base")
        done("round", 2, *data(tiny_demo), *settings)
        done("export", "base", "--what", "data")
        (folder / "test.jsonl").write_text(tiny_demo.test.read_text())
        (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    return folder


def tables(folder):
    """Return digest and times of every table and checkpoint."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and (path.suffix == ".parquet" or "checkpoint" in path.parts or path.name == "_manifest.json")
    }


def test_every_runtime_key_is_tried():
    assert set(CHANGED) == RUNTIME


@pytest.mark.parametrize("key", CHANGED)
def test_a_runtime_key_may_change_at_any_time(world, tmp_path, monkeypatch, key):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    where = ["--run", "base"]
    folder = tmp_path / "runs" / "base"
    if key == "runs_dir":
        (tmp_path / "runs").rename(tmp_path / "moved")
        folder = tmp_path / "moved" / "base"
    if key == "output_dir":
        where = []
    before = tables(folder)
    assert len(before) > 30
    change = f"{key}={CHANGED[key]}"
    for stage in (
        ("round", 2),
        ("score", "--round", 1),
        ("score", "--round", 2),
        ("select", "--round", 2),
        ("train-round", "--round", 2),
    ):
        ran = dataflex(*stage, *where, change)
        assert ran.code == 0, (stage, ran.out, ran.err)
        summary = [line.split("\t") for line in ran.out.splitlines() if line.count("\t") == 3]
        stages = {line[0]: line[1] for line in summary[1:] if line[0] != "adapter"}
        assert stages
        assert set(stages.values()) == {"up to date"}, stages
    found = json.loads(done("status", *where, change, "--json"))
    assert {each["state"] for each in found["outputs"]} == {"done"}
    assert (found["changed_settings"], found["next"]) == (None, None)
    if key not in ("output_dir",):  # there the run is named by its path
        done("export", "base", "--what", "data", change)
    assert tables(folder) == before


def test_a_table_that_was_begun_with_other_parts_goes_on_with_them(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "base"
    before = tables(folder)
    shutil.rmtree(folder / "round-02")
    round_1 = digest(found_ingredients(folder / "round-01" / "checkpoint"))
    for features in (folder / "features").iterdir():
        manifest = json.loads((features / "_manifest.json").read_text())
        if manifest["ingredients"]["checkpoint"] != round_1:
            continue
        (features / "_manifest.json").unlink()
        for number in (0, 2):
            (features / manifest["parts"][number]["file"]).unlink()
    text = done("round", 2, "--run", "base", "rows_per_part=1000")
    assert "begun with 64 rows per part, and goes on so (rows_per_part is 1000 now)" in text
    after = tables(folder)
    same = {name for name in before if name.endswith(".parquet") and not name.startswith("export")}
    assert {name: after[name][0] for name in same} == {name: before[name][0] for name in same}


def test_logging_steps_that_say_when_to_evaluate_are_refused_by_name(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [each for each in SMALL if not each.startswith("eval")]
    settings = ("warmup_step=1", "update_step=1", "update_times=2", *small, "eval_strategy=steps")
    done("warmup", *data(tiny_demo), *settings, "--run", "base")
    error = refused(tmp_path, "round", 1, "--run", "base", "logging_steps=1")
    assert "logging_steps: 5 -> 1 (without eval_steps it says when to evaluate)" in error


def test_what_changed_inside_a_feature_is_named(tiny_demo, tmp_path, monkeypatch):
    """The tables of a method are made from features; the refusal names the feature's own ingredients."""
    monkeypatch.chdir(tmp_path)
    settings = ("warmup_step=1", "update_step=1", "update_times=2", *SMALL, "--run", "base")
    done("round", 1, *data(tiny_demo), *settings)

    version = Losses.version
    monkeypatch.setattr(Losses, "version", version + 1)
    error = refused(tmp_path, "round", 1, "--run", "base")
    assert f".version: {version} -> {version + 1}" in error
    assert "  features." in error
    assert "was made by another edition of this program" in error
    assert not re.search(r"[0-9a-f]{32}", error)


def test_another_base_model_is_named_and_not_its_digest(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_demo.model, tmp_path / "model")
    given = [each for each in data(tiny_demo) if not each.startswith("model")]
    settings = ("warmup_step=1", "update_step=1", "update_times=1", *SMALL, "--run", "base")
    done("warmup", *given, "model_name_or_path=./model", *settings)
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    error = refused(tmp_path, "round", 1, "--run", "base")
    assert re.search(
        r"  model: the files of model_name_or_path changed \([0-9a-f]{8} -> [0-9a-f]{8}\)", error
    )


def test_a_changed_data_set_is_named(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = tiny_demo.pool.read_text().splitlines()
    (tmp_path / "mine.jsonl").write_text("\n".join(rows[:50]))
    settings = ("warmup_step=1", "update_step=1", "update_times=1", *SMALL, "--run", "base")
    done("warmup", "dataset=mine.jsonl", f"model_name_or_path={tiny_demo.model}", *settings)
    (tmp_path / "mine.jsonl").write_text("\n".join(rows[:51]))
    error = refused(tmp_path, "warmup", "--run", "base")
    assert "  sources.mine.rows: 50 -> 51" in error
    assert "  sources.mine.digest: the content of the data set changed (" in error


def test_a_table_of_an_earlier_edition_says_so(tiny_demo, tmp_path, monkeypatch):
    """Of one in which rows_per_part decided a feature table: no value of the key would bring it back."""
    monkeypatch.chdir(tmp_path)
    settings = ("warmup_step=1", "update_step=1", "update_times=2", *SMALL, "--run", "base")
    plan = plan_feature

    def earlier(*given):
        made = plan(*given)
        made.ingredients["rows_per_part"] = 1024
        return made

    monkeypatch.setattr("dataflex_pipeline.pipeline.score.plan_feature", earlier)
    done("round", 1, *data(tiny_demo), *settings)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    error = refused(tmp_path, "round", 1, "--run", "base")
    assert "was made by another edition of this program" in error
    assert "rows_per_part: 1024 -> (not set)" in error
    assert "go on with the edition that began this one" in error
