"""num_train_epochs as steps: against a loop that counts them, and through a run's settings."""

import itertools
import json

import pytest
from cli_runs import done

from dataflex_pipeline import Run
from dataflex_pipeline.errors import StaleError
from dataflex_pipeline.pipeline.epochs import shared_out, steps_for_epochs


def counted(epochs: int, rows: int, batch: int) -> int:
    """Steps of a plain loop over batches."""
    return sum(1 for _ in range(epochs) for _ in range(0, rows, batch))


@pytest.mark.parametrize(
    ("epochs", "rows", "batch"), itertools.product((1, 2, 3, 7), (1, 7, 8, 9, 64, 1001), (1, 8, 32))
)
def test_whole_epochs_are_the_steps_of_a_loop(epochs, rows, batch):
    assert steps_for_epochs(epochs, rows, batch) == counted(epochs, rows, batch)
    assert steps_for_epochs(float(epochs), rows, batch) == counted(epochs, rows, batch)


def test_a_part_of_an_epoch_is_rounded_up():
    assert steps_for_epochs(0.5, 100, 10) == 5
    assert steps_for_epochs(0.51, 100, 10) == 6
    assert steps_for_epochs(0.1, 30, 1) == 3  # 0.1 * 30 is 3.0000000000000004 in floats
    assert steps_for_epochs(1e-9, 30, 1) == 1


@pytest.mark.parametrize("fixed", [True, False])
def test_the_steps_come_nearest_from_below(fixed):
    for total, warmup, rounds in itertools.product(range(1, 60), (0, 1, 20), (1, 2, 5)):
        first, each = shared_out(total, warmup, rounds, fixed=fixed)
        assert first == warmup if fixed else first <= warmup
        assert each >= 1
        if first + rounds <= total:  # otherwise a round has the one step that it must have
            assert first + each * rounds <= total < first + (each + 1) * rounds
        if not fixed and total > rounds:
            assert first + each * rounds <= total


SMALL = {"per_device_train_batch_size": 8, "lora_rank": 2, "update_times": 2, "seed": 3}


def settings(demo):
    return SMALL | {"dataset": str(demo.pool), "model_name_or_path": str(demo.model)}


def steps(config):
    return config.warmup_step, config.update_step


def test_a_run_records_what_epochs_came_to(tiny_demo, tmp_path):
    said = []

    class Told:
        def say(self, line):
            said.append(line)

        def start(self, *a, **k): ...
        def advance(self, *a, **k): ...
        def finish(self, *a, **k): ...

    given = settings(tiny_demo) | {"num_train_epochs": 0.5}
    run = Run(tmp_path / "a", progress=Told(), **given)
    run.warmup()  # 200 rows, 8 a step: 25 steps an epoch, 13 for a half
    assert steps(run.given) == (4, 4)
    assert [line for line in said if "num_train_epochs" in line] == [
        "note: num_train_epochs: 0.5 is taken as steps: over 200 rows, 8 a step, they are 13; warmup_step=4, "
        "then update_step=4 in each of 2 rounds"
    ]
    trained = run.folder / "round-00" / "checkpoint" / "trainer_state.json"
    assert json.loads(trained.read_text())["global_step"] == 4
    run.score(1)
    assert steps(run.given) == (4, 4)
    assert len(run.select(1).to_pandas()) == 32
    assert steps(Run.open(tmp_path / "a").given) == (4, 4)
    assert steps(Run(tmp_path / "a", **given).given) == (4, 4)
    with pytest.raises(StaleError, match=r"update_step: 4 -> 10"):  # 25 steps, of which 4 were the warm-up
        Run(tmp_path / "a", **given | {"num_train_epochs": 1}).warmup()


def test_a_file_with_epochs_goes_on_with_its_run(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"{key}: {value}" for key, value in settings(tiny_demo).items()]
    (tmp_path / "sft.yaml").write_text("\n".join([*lines, "num_train_epochs: 0.5", "warmup_step: 2"]))
    text = done("warmup", "--config", "sft.yaml")
    assert "they are 13; warmup_step=2, then update_step=5 in each of 2 rounds" in " ".join(text.split())
    again = done("warmup", "--config", "sft.yaml")
    assert again.count("up to date") == 3
    assert "num_train_epochs" not in again
    assert "update_step: 5" in (tmp_path / "runs" / "sft-loss" / "run.yaml").read_text()
    assert "stale" not in done("status", "--config", "sft.yaml")
