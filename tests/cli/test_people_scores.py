"""ifd, rds, bm25 and judge through the commands: tables, selections, estimates and single rows."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import copied, done, refused
from misbehaving_server import MisbehavingServer, reply

ON = ("--run", "base", "runs_dir=runs")


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_demo):
    """A copy of a run that has done rounds 0 to 2 of 3."""
    monkeypatch.chdir(tmp_path)
    return copied(tiny_demo, tmp_path / "runs")


def scores(run, name):
    return pq.read_table(run / "round-03" / "scores" / f"{name}.parquet")


@pytest.mark.parametrize("name", ["ifd", "rds", "bm25"])
def test_a_round_is_scored_selected_looked_at_and_estimated(run, name):
    done("score", *ON, "--round", 3, "--method", name)
    table = scores(run, name)
    assert table.num_rows == 200
    assert np.isfinite(table["score"].drop_null().to_numpy()).all()
    assert table["valid"].to_numpy().mean() > 0.9
    done("select", *ON, "--round", 3, "--method", name, "num_samples=10")
    index = pq.read_table(run / "round-03" / "selection.parquet")
    assert index.num_rows == 10
    shown = done("inspect", "base", "runs_dir=runs", "--row", 3)
    assert "score" in shown
    assert ("Nearest target rows by embedding" in shown) == (name == "rds")
    cost = json.loads(done("estimate", *ON, "--method", name, "--json"))
    assert not [each for each in cost["stages"] if name == "rds" and "not known" in each["note"]]


def test_a_score_model_scores_and_one_without_a_template_is_refused(run, tiny_demo):
    given = (f"ifd.score_model={tiny_demo.model}", f"perplexity.score_model={tiny_demo.model}")
    done("score", *ON, "--round", 3, "--method", "ifd", *given)
    done("score", *ON, "--round", 3, "--method", "perplexity", *given)
    assert scores(run, "ifd")["loss"].equals(scores(run, "perplexity")["loss"])
    error = refused(run, "score", *ON, "--round", 3, "--method", "ifd", "ifd.score_model=./nowhere")
    assert "score_model" in error


def test_a_judge_is_asked_once_per_row(run):
    with MisbehavingServer(lambda number, answer: reply(f"Score: {3 + number % 2}")) as server:
        settings = f"{{api_url: '{server.url}', api_key: null, prompt: 'answer-x {{completion}}'}}"
        api = f"judge.reward_backend_params.api={settings}"
        cost = done("estimate", *ON, "--method", "judge", "judge.reward_model_backend=api", api, "--json")
        assert "requests to gpt-4o at most" in cost
        assert not server.log, "an estimate asks nothing"
        done("score", *ON, "--round", 3, "--method", "judge", "judge.reward_model_backend=api", api)
        asked = len(server.log)
        assert 0 < asked <= 200
        done("score", *ON, "--round", 3, "--method", "judge", "judge.reward_model_backend=api", api)
        assert len(server.log) == asked
    assert set(scores(run, "judge")["grade"].to_pylist()) == {3.0, 4.0}
