"""Other versions of the packages between rounds: said and recorded; nothing is made stale by them."""

import json

import pandas as pd
import pyarrow.parquet as pq
import pytest
from cli_runs import copied, done

from dataflex_pipeline.store import versions
from dataflex_pipeline.store.versions import COMPARED, installed_versions, version_changes

ON = ("--run", "base", "runs_dir=runs")
NOW = installed_versions()


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_demo):
    """A copy of a run that has done rounds 0 to 2 of 3."""
    monkeypatch.chdir(tmp_path)
    return copied(tiny_demo, tmp_path / "runs")


def marker(run, number):
    return json.loads((run / f"round-{number:02d}" / "checkpoint" / "COMPLETE.json").read_text())


def rewrite(run, number, change):
    path = run / f"round-{number:02d}" / "checkpoint" / "COMPLETE.json"
    content = json.loads(path.read_text())
    change(content)
    content["own_digest"] = ""  # as in markers of an earlier edition
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def older(content):
    content["versions"] |= {"torch": "2.0.0", "peft": "0.1.0"}


def test_rounds_and_tables_record_their_versions(run):
    assert {*COMPARED, "python"} <= NOW.keys()
    for number in (0, 1, 2):
        assert marker(run, number)["versions"] == NOW
        for path in (run / f"round-{number:02d}").rglob("*.parquet"):
            found = pq.read_metadata(path).metadata
            assert json.loads(found[b"dataflex.versions"]) == NOW
            assert "torch" not in found[b"dataflex.ingredients"].decode()


@pytest.mark.slow
def test_other_versions_are_said_by_every_stage_and_make_nothing_stale(run):
    for number in (0, 1, 2):
        rewrite(run, number, older)
    changed = f"torch 2.0.0 -> {NOW['torch']}, peft 0.1.0 -> {NOW['peft']}"
    line = f"note: other versions are installed now than at round 2: {changed}"
    for command in (
        ("round", 2),
        ("score", "--round", 3),
        ("select", "--round", 3),
        ("train-round", "--round", 3),
    ):
        text = " ".join(done(*command, *ON).split())
        assert text.count(line) == 1, command
        if command == ("round", 2):
            assert "up to date" in text
            assert not pd.Series(text.split("Summary")[1:]).str.contains(r" [0-9.]+ s ").any()
    assert marker(run, 3)["versions"] == NOW
    assert "other versions" not in done("round", 3, *ON)

    between = f"round 3 was made with other versions than round 2: {changed}"
    begun = f"torch {NOW['torch']} -> 2.0.0, peft {NOW['peft']} -> 0.1.0"
    first = f"round 0 was made with other versions than the run's beginning: {begun}"
    status = json.loads(done("status", *ON, "--json"))
    assert status["versions"] == [first, between]
    assert {each["state"] for each in status["outputs"]} == {"done"}
    assert between in " ".join(done("status", *ON).split())
    done("report", run, "--output", "page.html")
    page = (run.parents[1] / "page.html").read_text().replace("&#39;", "'").replace("&gt;", ">")
    assert f"<li>{between}</li>" in page
    assert f"<li>{first}</li>" in page
    done("export", "base", "--what", "adapter", "export_dir=out")
    assert f"torch {NOW['torch']}" in (run.parents[1] / "out" / "README.md").read_text()


def test_status_says_it_before_anything_runs(run, monkeypatch):
    monkeypatch.setattr(versions, "_installed", lambda: tuple((NOW | {"trl": "99.0"}).items()))
    found = json.loads(done("status", *ON, "--json"))
    assert found["versions"] == [
        f"other versions are installed now than at round 2: trl {NOW['trl']} -> 99.0"
    ]
    assert {each["state"] for each in found["outputs"]} == {"done", "missing"}


def test_a_run_whose_rounds_did_not_record_them_goes_on(run):
    """As those of the edition before; what its beginning recorded is compared with."""
    for number in (0, 1, 2):
        rewrite(run, number, lambda content: content.pop("versions"))
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace(f"transformers: {NOW['transformers']}", "transformers: 5.0.0"))
    said = " ".join(done("round", 3, *ON).split())
    changed = f"transformers 5.0.0 -> {NOW['transformers']}"
    assert f"note: other versions are installed now than at the run's beginning: {changed}" in said
    assert "versions" not in marker(run, 2)
    assert marker(run, 3)["versions"] == NOW
    assert json.loads(done("status", *ON, "--json"))["versions"] == [
        f"round 3 was made with other versions than round 2: {changed}"
    ]


def test_what_counts_as_a_change():
    old = {"torch": "1", "trl": "2", "numpy": "3"}
    assert version_changes(old, {"torch": "1", "trl": "2.1", "numpy": "4"}) == ["trl 2 -> 2.1"]
    assert version_changes(old, {"torch": "1", "numpy": "3"}) == ["trl 2 -> not installed"]
    assert version_changes({}, {"torch": "1"}) == []
