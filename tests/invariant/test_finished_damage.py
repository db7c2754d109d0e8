"""A finished run whose files were deleted, cut or changed: no command calls it done."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from cli_runs import SMALL, data, dataflex, done, refused

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"
ON = ("--run", "base")


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_end(path):
    """Change the last byte but the ending's: of a table, inside its footer."""
    content = bytearray(path.read_bytes())
    content[-12] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def world(tiny_demo, tmp_path_factory):
    """A run at its horizon that keeps its best checkpoint and has its adapter at the top."""
    folder = tmp_path_factory.mktemp("done")
    settings = [each for each in SMALL if not each.startswith("eval")]
    settings += ["warmup_step=1", "update_step=1", "update_times=2"]
    settings += ["eval_strategy=epoch", "load_best_model_at_end=true", "output_dir=runs/base"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done("round", 2, *data(tiny_demo), *settings)
        done("export", "base")
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "base"


def status(*more):
    found = json.loads(done("status", *ON, *more, "--json"))
    return {each["output"]: (each["state"], each["what"]) for each in found["outputs"]}, found["next"]


def test_an_undamaged_run_is_done(run):
    states, following = status()
    assert {state for state, _ in states.values()} == {"done"}
    assert {"best", "adapter", "round 2 checkpoint"} <= states.keys()
    assert following is None
    for command in (
        ("round", 2),
        ("score", "--round", 2),
        ("select", "--round", 2),
        ("train-round", "--round", 2),
    ):
        assert "up to date" in done(*command, *ON)
    assert "up to date" in done("export", "base")


@pytest.mark.parametrize("damage", [delete, truncate, flip])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_checkpoint(run, damage, number):
    path = run / f"round-{number:02d}" / "checkpoint" / WEIGHTS
    original = path.read_bytes()
    damage(path)
    states, following = status()
    assert states[f"round {number} checkpoint"][0] == "damaged"
    assert str(path.relative_to(run.parents[1])) in states[f"round {number} checkpoint"][1]
    assert following == "dataflex round 2 --run base --overwrite"
    for command in (
        ("round", 2, *ON),
        ("score", "--round", 2, *ON),
        ("select", "--round", 2, *ON),
        ("train-round", "--round", 2, *ON),
        ("export", "base", "--round", 2),
    ):
        error = refused(run, *command)
        assert f"round-{number:02d}/checkpoint/{WEIGHTS}: " in error
        assert "or train that round again with --overwrite" in error
    done("round", 2, *ON, "--overwrite")
    assert path.read_bytes() == original
    assert status()[1] is None


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("round-01/scores/loss.parquet", flip),
        ("round-02/scores/loss.parquet", truncate),
        ("round-02/scores/loss.parquet", flip_end),
        ("round-00/index.parquet", flip),
        ("round-01/index.parquet", truncate),
        ("round-02/index.parquet", flip),
        ("round-02/index.parquet", flip_end),
        ("round-02/probabilities/loss.parquet", flip),
    ],
)
def test_a_table(run, name, damage):
    path = run / name
    original = pq.read_table(path, partitioning=None)
    damage(path)
    states, following = status()
    assert "damaged" in {state for state, _ in states.values()}
    assert following == "dataflex round 2 --run base --overwrite"
    for command in (
        ("round", 2, *ON),
        ("score", "--round", 2, *ON),
        ("train-round", "--round", 2, *ON),
        ("export", "base", "--round", 2),
    ):
        error = refused(run, *command)
        assert name in error
    done("round", 2, *ON, "--overwrite")
    assert pq.read_table(path, partitioning=None).equals(original)
    assert any(".old-" in each.name for each in path.parent.iterdir())
    assert status()[1] is None


@pytest.mark.parametrize("name", ["round-01/scores/loss.parquet", "round-02/index.parquet"])
def test_a_table_that_was_deleted_is_missing_and_made_again(run, name):
    path = run / name
    original = path.read_bytes()
    path.unlink()
    states, following = status()
    assert "missing" in {state for state, _ in states.values()}
    assert following == f"dataflex round {int(name[7])} --run base"
    done("round", 2, *ON)
    assert path.read_bytes() == original
    assert status()[1] is None


@pytest.mark.parametrize("damage", [delete, truncate, flip])
def test_the_best_checkpoint(run, damage):
    damage(run / "best" / WEIGHTS)
    assert status()[0]["best"][0] == "damaged"
    for command in (("round", 2, *ON), ("train-round", "--round", 2, *ON), ("export", "base")):
        assert f"best/{WEIGHTS}: " in refused(run, *command)


def test_the_best_checkpoint_gone_is_not_replaced_by_the_last(run):
    kept = json.loads((run / "best" / "COMPLETE.json").read_text())
    shutil.rmtree(run / "best")
    assert status()[0]["best"][0] == "damaged"
    number = kept["course"]["best"]["round"]
    for command in (("round", 2, *ON), ("export", "base")):
        error = refused(run, *command)
        assert (
            f"best is not there, and the best evaluation was at step {kept['step']}, in round {number}"
            in error
        )
        assert f"move runs/base/round-{number:02d}/checkpoint away" in error
    (run / f"round-{number:02d}" / "checkpoint").rename(run.parent / "away")
    done("round", 2, *ON)
    assert status()[1] is None
    assert (run / "best" / WEIGHTS).read_bytes() == (run.parent / "away" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("damage", [delete, truncate, flip])
def test_the_copy_at_the_top(run, tiny_demo, damage):
    path = run / WEIGHTS
    original = path.read_bytes()
    damage(path)
    assert status()[0]["adapter"][0] == ("missing" if damage is delete else "damaged")
    if damage is not delete:
        error = refused(
            run,
            "export",
            f"adapter_name_or_path={run}",
            "--run",
            "none",
            "export_dir=out2",
            f"model_name_or_path={tiny_demo.model}",
        )
        assert "is none of the adapters that the run" in error
    ran = dataflex("round", 2, *ON)
    assert ran.code == 0
    line = next(line for line in ran.out.splitlines() if line.startswith("adapter\t"))
    assert "up to date" not in line
    assert ("is not what was written there; it is copied again" in ran.out) is (damage is not delete)
    assert path.read_bytes() == original
    assert status()[1] is None


def test_a_file_put_back_with_another_time_is_the_same_file(run):
    path = run / "round-02" / "checkpoint" / WEIGHTS
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    table = run / "round-02" / "scores" / "loss.parquet"
    content = table.read_bytes()
    table.unlink()
    table.write_bytes(content)
    assert status()[1] is None
    assert "up to date" in done("round", 2, *ON)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_marker_of_which_one_digit_changed(run, number):
    """The next scoring weighs by the mean learning rate that it records."""
    path = run / f"round-{number:02d}" / "checkpoint" / "COMPLETE.json"
    marker = json.loads(path.read_text())
    marker["result"]["mean_learning_rate"] *= 1.01
    path.write_text(json.dumps(marker))
    for command in (("round", 2), ("score", "--round", 2), ("train-round", "--round", 2)):
        what = refused(run, *command, *ON)
        assert "checkpoint/COMPLETE.json: its content is not what was written." in what


def test_rounds_without_their_settings_are_not_taken_for_the_demo(run):
    (run / "run.yaml").unlink()
    what = refused(run, "round", 2, *ON)
    assert "run.yaml is not there" in what
    assert "holds rounds of a run" in what
    assert not list(run.parent.glob("demo*"))


def test_a_report_says_what_is_missing_or_cut(run):
    index = run / "round-02" / "index.parquet"
    index.rename(index.with_suffix(".aside"))
    said = refused(run, "report", "base")
    assert "round-02/index.parquet is not there, and round 2 was trained on it" in said
    index.with_suffix(".aside").rename(index)
    history = run / "history.jsonl"
    history.write_text(history.read_text()[:-20])
    lines = len(history.read_text().splitlines())
    assert f"history.jsonl, line {lines}: it is no line of a log." in refused(run, "report", "base")


def test_another_number_of_rows_per_step_is_refused_by_its_keys(run):
    """The rows of a step are frozen; run.yaml would record what was not trained."""
    before = (run / "run.yaml").read_text()
    for settings, shown in (
        (
            ["per_device_train_batch_size=3"],
            "per_device_train_batch_size: 4 -> 3 (a step of this run has 4 rows)",
        ),
        (
            ["gradient_accumulation_steps=2"],
            "gradient_accumulation_steps: 1 -> 2 (a step of this run has 4 rows)",
        ),
    ):
        for command in (("round", 2), ("train-round", "--round", 2)):
            assert shown in refused(run, *command, *ON, *settings)
        assert (run / "run.yaml").read_text() == before
    split = ["per_device_train_batch_size=2", "gradient_accumulation_steps=2"]
    assert "up to date" in done("round", 2, *ON, *split)
