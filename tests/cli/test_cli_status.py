"""`dataflex status`: done, unfinished, stale, damaged, missing, unknown; it reads only."""

import json
import re
import shutil

import pytest
from cli_runs import copied, done, snapshot

ON = ("--run", "base", "runs_dir=runs")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def states(text: str) -> dict[str, tuple[str, str]]:
    lines = [line.split("\t") for line in text.splitlines() if line.count("\t") == 2]
    return {output: (state, what) for output, state, what in lines[1:]}


def test_status_of_a_run_on_its_way(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    before = snapshot(here)
    text = done("status", *ON)
    assert snapshot(here) == before
    assert "reading" not in text
    found = states(text)
    assert {output for output, (state, _) in found.items() if state == "missing"} == {
        "round 3 scores",
        "round 3 selection",
        "round 3 index",
        "round 3 checkpoint",
    }
    assert {state for state, _ in found.values()} == {"done", "missing"}
    assert found["pool"][1] == "200 rows, 200 valid"
    assert found["round 0 index"][1] == "8 positions, 8 different rows, drawn uniformly"
    assert text.endswith("Next:  dataflex round 3 --run base\n")
    plain = json.loads(done("status", *ON, "--json"))
    assert {each["output"]: (each["state"], each["what"]) for each in plain["outputs"]} == found
    assert (plain["changed_settings"], plain["next"]) == (None, "dataflex round 3 --run base")
    changed = json.loads(done("status", *ON, "--json", "learning_rate=0.5"))["changed_settings"]
    assert "learning_rate" in changed


def test_status_says_what_is_stale_damaged_and_unknown(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs")
    for name in ("pool", "target"):
        shutil.copy2(getattr(tiny_demo, name), here / f"{name}.jsonl")
    mine = (*ON, f"dataset={here / 'pool.jsonl'}", f"eval_dataset={here / 'target.jsonl'}")
    assert states(done("status", *mine))["pool"][0] == "done"  # the same content elsewhere
    assert states(done("status", *mine, "loss.focus_weight=7"))["round 1 scores/loss"] == (
        "stale",
        "params.focus_weight: 5.0 -> 7.0",
    )
    with (here / "pool.jsonl").open("a") as stream:
        stream.write('{"instruction": "a", "output": "b"}\n')
    (here / "target.jsonl").unlink()
    table = folder / "round-02" / "scores" / "loss.parquet"
    table.write_bytes(table.read_bytes()[:100])
    before = snapshot(here)
    found = states(done("status", *mine))
    assert snapshot(here) == before
    assert found["pool"][0] == "stale"
    assert "rows" in found["pool"][1]
    assert found["target"][0] == "unknown"
    assert found["round 2 scores/loss"][0] == "damaged"
    assert found["round 2 index"][0] == "damaged"
    text = done("status", *ON, "learning_rate=0.01")
    assert states(text)["round 0 checkpoint"] == ("stale", "training.learning_rate: 0.002 -> 0.01")
    assert "learning_rate: 0.002 -> 0.01" in text


def test_status_does_not_make_the_demo_again(here, tiny_demo, monkeypatch):
    folder = copied(tiny_demo, here / "runs")
    text = re.sub(
        r"^(dataset|eval_dataset|model_name_or_path): .*$",
        r"\1: demo",
        (folder / "run.yaml").read_text(),
        flags=re.M,
    )
    (folder / "run.yaml").write_text(text)
    before = snapshot(here)
    found = states(done("status", *ON))
    assert snapshot(here) == before
    assert found["pool"][0] == "unknown"
    assert "The embedded demo is not in runs any more" in found["round 0 checkpoint"][1]
    monkeypatch.setattr("dataflex_pipeline.demo.find_demo", lambda root: tiny_demo)
    assert states(done("status", *ON))["round 0 checkpoint"][0] == "done"


def test_status_of_a_run_that_was_cut_off(here, tiny_demo):
    folder = copied(tiny_demo, here / "runs")
    (folder / "pool" / "_manifest.json").unlink()
    shutil.rmtree(folder / "round-02" / "checkpoint")
    found = states(done("status", *ON))
    assert found["pool"][0] == "unfinished"
    assert found["round 2 checkpoint"][0] == "missing"
