"""Commands that look at a run whose features lie in a folder that other runs share."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_runs import SMALL, copied, data, dataflex, done

STEPS = ("warmup_step=1", "update_step=1", "update_times=1")


@pytest.fixture(scope="module")
def shared(tiny_demo, tmp_path_factory):
    """Two runs on one cache: the finished run, scored in round 3, and a run on half of the pool."""
    folder = tmp_path_factory.mktemp("shared")
    cache = f"features_dir={folder / 'cache'}"
    run = copied(tiny_demo, folder)
    done("score", "--run", run.name, f"runs_dir={folder}", "--round", 3, cache)
    given = (*data(tiny_demo), *STEPS, *SMALL, "max_samples=100", f"runs_dir={folder}", cache)
    done("round", 1, *given, "--run", "half")
    return folder


def views(run):
    """Return the feature tables that inspect lists: name to path."""
    tables = json.loads(done("inspect", run, "--json"))["tables"]
    return {each["view"]: each["path"] for each in tables if each["view"].startswith("losses_")}


def test_inspect_lists_a_runs_own_tables_and_no_others(shared):
    assert len(list((shared / "cache").glob("losses-pool-*"))) == 2
    base = views(shared / "base")
    assert sorted(base) == ["losses_pool_after_0", "losses_pool_after_1", "losses_pool_after_2"]
    assert base["losses_pool_after_1"].startswith("features/")  # made before there was a cache
    assert str(shared / "cache") in base["losses_pool_after_2"]
    assert list(views(shared / "half")) == ["losses_pool_after_0"]
    counted = done(
        "inspect", shared / "half", "--sql", "select count(*) as n from losses_pool_after_0", "--csv"
    )
    assert counted.split() == ["n", "100"]


def test_the_report_and_status_need_nothing_else(shared):
    text = done("status", "--run", "half", f"runs_dir={shared}")
    assert "round 1 scores/loss\tdone" in text
    done("report", shared / "half", "--output", shared / "report.html")
    assert "round 1" in (shared / "report.html").read_text()


def test_doctor_tells_what_is_there(shared):
    text = done("doctor", "--run", "half", f"runs_dir={shared}", "--json")
    (found,) = [each for each in json.loads(text)["findings"] if each["check"] == "features"]
    assert found["state"] == "ok"
    assert "2 finished tables" in found["found"]


def test_estimate_counts_what_is_there_as_done(shared, tiny_demo):
    given = (*data(tiny_demo), *STEPS, *SMALL, "max_samples=100", f"runs_dir={shared}")

    def losses(*more):
        content = json.loads(done("estimate", *given, *more, "--json"))
        return next(each for each in content["stages"] if each["stage"] == "losses, pool")

    assert losses("--run", "half")["note"] == "there already"
    assert losses("--run", "half")["seconds"] == 0
    assert losses("--run", "other")["seconds"] > 0


def test_embeddings_of_a_run_that_is_not_begun_are_found(shared, tiny_demo):
    """And one run's are another's, whatever their seeds."""
    np.save(shared / "pool.npy", np.ones((100, 4), np.float32))
    np.save(shared / "target.npy", np.ones((16, 4), np.float32))
    files = (f"near.embeddings={shared / 'pool.npy'}", f"near.query_embeddings={shared / 'target.npy'}")
    cache = f"features_dir={shared / 'cache'}"
    done("score", "--run", "half", f"runs_dir={shared}", "--round", 1, "--method", "near", *files)
    tables = {path: path.stat().st_mtime_ns for path in shared.glob("cache/embeddings-*/*")}
    given = (*data(tiny_demo), *STEPS, *SMALL, "max_samples=100", f"runs_dir={shared}", cache, "seed=7")
    stages = json.loads(done("estimate", *given, *files, "--run", "new", "--method", "near", "--json"))
    notes = {each["stage"]: each["note"] for each in stages["stages"] if "embeddings" in each["stage"]}
    assert notes == dict.fromkeys(("embeddings, pool", "embeddings, target"), "there already")
    said = done("round", 1, *given, *files, "--run", "new", "--method", "near")
    assert "embeddings of the pool: found in" in said
    assert {path: path.stat().st_mtime_ns for path in shared.glob("cache/embeddings-*/*")} == tables


def test_a_file_is_refused(shared, tiny_demo):
    (shared / "a file").touch()
    given = (*data(tiny_demo), f"runs_dir={shared}", f"features_dir={shared / 'a file'}", "--run", "bad")
    ran = dataflex("round", 0, *given)
    assert ran.code == 2
    assert "which is a file" in ran.err
    assert not (shared / "bad").exists()
