"""The run that a command works on: its name or folder as the first word, or --run."""

import pytest
from cli_runs import copied, dataflex, refused

from dataflex_pipeline.errors import RunError
from dataflex_pipeline.pipeline.locate import locate
from dataflex_pipeline.pipeline.run import Run
from dataflex_pipeline.reports.records import RunRecord

OPENING = (
    ("warmup",),
    ("score", "--round", "1"),
    ("select", "--round", "1"),
    ("train-round", "--round", "1"),
    ("round", "1"),
    ("round",),
    ("status",),
    ("inspect",),
    ("export",),
    ("doctor",),
    ("estimate",),
    ("evaluate",),
)
READING = (("report",), ("compare",))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def opened(here, tiny_demo, monkeypatch):
    """The folders of the runs that commands open, which then end: nothing is computed."""
    copied(tiny_demo, here / "runs")
    found = []

    def end(folder, *_, **__):
        folder = getattr(folder, "folder", folder)
        found.append(folder.resolve())
        raise RunError("This test has seen enough.", "It asks which run is meant.", "Nothing.")

    monkeypatch.setattr(Run, "of", lambda options, *_, **__: end(locate(options)[0].folder))
    monkeypatch.setattr(RunRecord, "read", end)
    monkeypatch.setattr("dataflex_pipeline.reports.within.compare_methods", end)
    return found


@pytest.mark.parametrize("naming", [("base",), ("--run", "base"), ("--run=base",)], ids=" ".join)
@pytest.mark.parametrize("command", [*OPENING, *READING], ids=" ".join)
def test_a_run_is_named_by_the_first_word_or_an_option(command, naming, here, opened):
    ran = dataflex(*command, *naming)
    assert "seen enough" in ran.err, ran.out + ran.err
    assert opened == [here / "runs" / "base"]


@pytest.mark.parametrize("command", [c for c in (*OPENING, *READING) if c != ("inspect",)], ids=" ".join)
def test_a_run_is_named_by_its_folder(command, here, opened):
    assert "seen enough" in dataflex(*command, "runs/base").err
    assert opened == [here / "runs" / "base"]


@pytest.mark.parametrize(
    "command", [c for c in (*OPENING, *READING) if c not in {("inspect",), ("compare",)}], ids=" ".join
)
def test_a_run_is_named_once(command, here, opened):
    assert "given twice: base and --run other" in refused(here, *command, "base", "--run", "other")
    assert opened == []


def test_a_word_that_is_no_round_is_told_what_one_is(here, opened):
    said = refused(here, "round", "two")
    assert "'two'" in said
    assert "A round is a whole number: 0 is the warm-up, then 1, 2, ..." in said
    assert "neither a run that is there" in said
    assert "--run two" in said
    assert "whole number" not in refused(here, "score", "two")
    assert opened == []


def test_a_comparison_of_nothing_is_refused(here):
    said = refused(here, "compare")
    assert "No run was named." in said
    assert "dataflex compare random-seed1 less-seed1" in said
