"""Completion in the shell, --json of the methods, and the words that name a run and a round."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import done
from dataflex_pipeline.stages.completion import (
    complete_argument,
    complete_method,
    complete_run,
    complete_setting,
)
from dataflex_pipeline.stages.round import split_round
from dataflex_pipeline.stages.words import with_run

from dataflex_pipeline.errors import UserError


@pytest.fixture
def runs(tmp_path, monkeypatch):
    for name in ("mine", "maybe", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.yaml").write_text("")
    (tmp_path / "runs" / "mixed").mkdir()  # no run
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_methods_and_settings_are_completed(runs):
    assert complete_run("m") == ["maybe", "mine"]
    assert complete_method("l") == ["less", "loss"]
    assert "learning_rate=" in complete_setting("lear")
    assert complete_argument("mi")[0] == "mine"


def test_without_any_run_nothing_is_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert complete_run("") == []


@pytest.mark.parametrize(
    ("words", "answer"),
    [("dataflex status mi", "mine"), ("dataflex status --run mi", "mine"), ("dataflex score -m le", "less")],
)
def test_a_shell_asks_the_command_itself(runs, words, answer):
    ran = subprocess.run(
        [Path(sys.executable).parent / "dataflex"],
        env={
            **os.environ,
            "_DATAFLEX_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer in ran.stdout.split(), ran.stderr


@pytest.mark.parametrize("words", [["2", "mine", "seed=1"], ["mine", "2", "seed=1"], ["mine", "seed=1", "2"]])
def test_a_whole_number_is_the_round_wherever_it_stands(words):
    assert split_round(words) == (2, ["mine", "seed=1"])


def test_two_rounds_are_refused():
    with pytest.raises(UserError, match="Two rounds") as refusal:
        split_round(["2", "3"])
    assert "--run" in refusal.value.fix


def test_a_run_that_is_named_in_both_ways_is_refused():
    assert with_run(["runs_dir=there"], "mine") == ["mine", "runs_dir=there"]
    with pytest.raises(UserError, match="twice"):
        with_run(["mine"], "other")


def test_the_methods_as_json():
    (found,) = json.loads(done("methods", "loss", "--json"))["methods"]
    assert found["method"] == "loss"
    by_name = {each["parameter"]: each for each in found["parameters"]}
    assert by_name["loss.focus"]["default"] == "high"
    assert "alpaca" in json.loads(done("methods", "--templates", "--json"))["templates"]
