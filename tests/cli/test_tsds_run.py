"""tsds and near through the commands, on vectors made elsewhere: tables, selections, kills, refusals."""

import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import copied, dataflex, done, refused, snapshot
from neighbour_tables import clustered, unit

from dataflex_pipeline.store import atomic


class Killed(BaseException):
    """What a kill looks like from inside: nothing catches it."""


@pytest.fixture(scope="module")
def vectors(tmp_path_factory, tiny_demo):
    """Vectors of the tiny demo's 200 pool rows and 16 target rows, around five centres."""
    rng = np.random.default_rng(3)
    centres, folder = unit(rng.standard_normal((5, 8))), tmp_path_factory.mktemp("vectors")
    np.save(folder / "pool.npy", clustered(rng, 200, centres))
    np.save(folder / "target.npy", clustered(rng, 16, centres[:2]))
    return folder


@pytest.fixture
def run(tmp_path, tiny_demo):
    return copied(tiny_demo, tmp_path / "runs")


def asked(run, vectors, method, *more):
    files = (f"{method}.embeddings={vectors}/pool.npy", f"{method}.query_embeddings={vectors}/target.npy")
    where = ("--run", run.name, f"runs_dir={run.parent}", "--round", 3, "--method", method)
    return (*where, *files, *more)


def table(run, kind, method):
    return pq.read_table(run / "round-03" / kind / f"{method}.parquet").to_pydict()


def notices(run, method):
    path = run / "round-03" / "scores" / f"{method}.parquet"
    return pq.read_metadata(path).metadata[b"dataflex.notices"].decode()


def test_the_probabilities_are_the_transport(run, vectors):
    settings = ("tsds.max_K=20", "tsds.C=1.0")
    done("score", *asked(run, vectors, "tsds", *settings))
    done("select", *asked(run, vectors, "tsds", *settings))
    scores, drawn = table(run, "scores", "tsds"), table(run, "probabilities", "tsds")
    assert np.abs(np.array(drawn["probability"]) - scores["transport"]).max() < 1e-15
    assert abs(sum(drawn["probability"]) - 1) < 1e-12
    assert min(drawn["probability"]) >= 0
    near = {
        row for row, value in zip(scores["row"], scores["nearest_target"], strict=True) if value is not None
    }
    assert near == {row for row, value in zip(scores["row"], scores["rho"], strict=True) if value is not None}
    assert 20 <= len(near) < 200
    positive = {row for row, p in zip(drawn["row"], drawn["probability"], strict=True) if p > 0}
    assert positive <= near
    index = pq.read_table(run / "round-03" / "index.parquet").to_pydict()
    assert set(index["row"]) <= positive
    assert f"{len(near)} of 200 rows are near the target" in notices(run, "tsds")
    assert "kde_K 1000" in notices(run, "tsds")


def test_another_alpha_computes_no_feature_and_another_sigma_only_the_density(run, vectors):
    def features():
        return {path.name for path in (run / "features").iterdir()} if (run / "features").is_dir() else set()

    before = features()
    done("score", *asked(run, vectors, "tsds"))
    first = features()
    assert sorted(name.split("-")[0] for name in first - before) == [
        "density",
        "embeddings",
        "embeddings",
        "neighbours",
    ]
    done("score", "--overwrite", *asked(run, vectors, "tsds", "tsds.alpha=0.1", "tsds.C=2.0"))
    assert features() == first
    done("score", "--overwrite", *asked(run, vectors, "tsds", "tsds.sigma=0.5"))
    assert [name.split("-")[0] for name in features() - first] == ["density"]
    second = features()
    done("score", *asked(run, vectors, "near"))
    assert features() == second, "near works on the same embeddings"


@pytest.mark.slow
def test_killed_at_any_write_the_table_is_the_same(run, vectors, tmp_path, monkeypatch):
    settings = ("tsds.search=ivf", "tsds.nlist=6", "tsds.nprobe=2", "rows_per_part=64")
    untouched = tmp_path / "untouched"
    shutil.copytree(run, untouched)
    done("score", *asked(run, vectors, "tsds", *settings))
    whole = {name: found for name, found in snapshot(run).items() if "features" in name or "round-03" in name}
    replace, kills = os.replace, 0
    while kills < 100:
        shutil.rmtree(run)
        shutil.copytree(untouched, run)
        writes = []

        def counting(source, target, writes=writes, kills=kills):
            if ("features" in str(target) or "round-03" in str(target)) and len(writes) == kills:
                raise Killed
            writes.append(str(target))
            replace(source, target)

        monkeypatch.setattr(atomic.os, "replace", counting)
        try:
            done("score", *asked(run, vectors, "tsds", *settings))
            break
        except Killed:
            kills += 1
        finally:
            monkeypatch.setattr(atomic.os, "replace", replace)
        done("score", *asked(run, vectors, "tsds", *settings))
        again = {
            name: found for name, found in snapshot(run).items() if "features" in name or "round-03" in name
        }
        assert {name: digest for name, (digest, _) in again.items()} == {
            name: digest for name, (digest, _) in whole.items()
        }
    assert kills > 8, "embeddings, neighbours and density have parts and manifests, and there is the table"


def test_near_takes_the_best_and_lets_target_rows_take_turns(run, vectors):
    pool = np.load(vectors / "pool.npy").astype(np.float64)
    cosines = pool @ np.load(vectors / "target.npy").astype(np.float64).T
    done("score", *asked(run, vectors, "near"))
    scores = table(run, "scores", "near")
    assert np.allclose(scores["score"], cosines.max(1), atol=1e-6)
    assert scores["nearest_target"] == cosines.argmax(1).tolist()
    done("select", *asked(run, vectors, "near", "num_samples=6"))
    best = np.lexsort((np.arange(200), -cosines.max(1)))[:6]
    assert set(pq.read_table(run / "round-03" / "index.parquet")["row"].to_pylist()) == set(best.tolist())
    turns = ("strategy=round_robin", "num_samples=6", "--overwrite")
    done("select", *asked(run, vectors, "near", *turns))
    taken = []
    for target in range(6):
        order = [row for row in np.argsort(-cosines[:, target], kind="stable") if row not in taken]
        taken.append(int(order[0]))
    assert set(pq.read_table(run / "round-03" / "index.parquet")["row"].to_pylist()) == set(taken)


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("tsds.sigma=-1", "sigma is -1"),
        ("tsds.alpha=2", "alpha is 2"),
        ("tsds.C=0", "C is 0"),
        ("tsds.kde_k=3", "kde_K"),
    ],
)
def test_settings_that_cannot_work_change_nothing(run, vectors, setting, shown):
    assert shown in refused(run, "score", *asked(run, vectors, "tsds", setting))


def test_vectors_of_another_length_are_refused(run, vectors, tmp_path):
    short = tmp_path / "short.npy"
    np.save(short, np.load(vectors / "target.npy")[:, :5])
    ran = dataflex("score", *asked(run, vectors, "tsds"), f"tsds.query_embeddings={short}")
    assert ran.code == 2
    assert "8 dimensions, the target's 5" in ran.err
    assert "Traceback" not in ran.out + ran.err
    assert not (run / "round-03" / "scores" / "tsds.parquet").exists()
