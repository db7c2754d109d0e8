"""Runs with tsds and near: data by other names, probabilities in and out of a file, mistakes found first."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import SMALL, STEPS, data, done, refused

METHODS = ("tsds", "near")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vectors(here):
    """Files of vectors for the tiny demo's 200 + 16 rows, as settings of a method."""
    made = np.random.default_rng(0).normal(size=(216, 8)).astype(np.float32)
    made[::3, 0] += 3
    np.save("pool.npy", made[:200])
    np.save("target.npy", made[200:])

    def _vectors(method: str, target: str = "target.npy") -> tuple[str, ...]:
        return (f"{method}.embeddings=pool.npy", f"{method}.query_embeddings={target}")

    return _vectors


def settings(demo, method, **replaced):
    given = {name.partition("=")[0]: name.partition("=")[2] for name in (*data(demo), *STEPS, *SMALL)}
    given |= replaced
    return (*(f"{name}={value}" for name, value in given.items()), "--method", method)


def probability(run, method="tsds", number=1):
    path = Path("runs") / run / f"round-{number:02d}" / "probabilities" / f"{method}.parquet"
    return pq.read_table(path)["probability"].to_numpy()


@pytest.mark.parametrize("method", METHODS)
def test_a_round_on_vectors_of_ones_own(here, tiny_demo, vectors, method):
    done("round", 1, *settings(tiny_demo, method), *vectors(method), "--run", "a")
    p = probability("a", method)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    again = done("round", 1, "--run", "a")
    assert again.count("up to date") == 8


def test_vectors_that_do_not_fit_are_found_before_the_warm_up(here, tiny_demo, vectors):
    np.save("short.npy", np.ones((3, 8), np.float32))
    given = settings(tiny_demo, "tsds")
    text = refused(here, "round", 1, *given, *vectors("tsds", "short.npy"), "--run", "a")
    assert "short.npy cannot be used" in text
    assert "It has 3 vectors, for 16 rows." in text


def test_a_model_that_is_not_there_is_found_before_the_warm_up(here, tiny_demo):
    chosen = ("tsds.embed_method=sentence-transformers", "tsds.model_name=./nowhere")
    text = refused(here, "round", 1, *settings(tiny_demo, "tsds"), *chosen, "--run", "a")
    assert "The model folder './nowhere' does not exist" in text
    assert "embed_model" in text


@pytest.mark.slow
def test_real_text_finds_the_language_of_the_target(here, tiny_demo, shared_data, minilm):
    """Half of the pool is Chinese and all of the target: most of the probability goes to Chinese rows."""
    english, chinese = (
        json.loads((shared_data / f"alpaca_{language}_demo.json").read_text()) for language in ("en", "zh")
    )
    for name, rows in (("en", english[:100]), ("zh", chinese[:100]), ("target", chinese[100:150])):
        (here / f"{name}.json").write_text(json.dumps(rows))
    replaced = {"dataset": "en.json,zh.json", "eval_dataset": "target.json", "cutoff_len": 512}
    chosen = (f"tsds.embed_model={minilm}", "tsds.embed_method=sentence-transformers", "tsds.max_length=64")
    done("round", 2, *settings(tiny_demo, "tsds", **replaced), *chosen, "--run", "a")
    is_chinese = pq.read_table("runs/a/pool")["source"].to_numpy(zero_copy_only=False) == "zh"
    for number in (1, 2):
        assert probability("a", number=number)[is_chinese].sum() > 0.8


# ---------------------------------------------------------------- data by other names


def test_candidate_path_and_query_path_are_the_data(here, tiny_demo, vectors):
    given = [text for text in settings(tiny_demo, "tsds") if "dataset=" not in text]
    named = (f"tsds.candidate_path={tiny_demo.pool}", f"tsds.query_path={tiny_demo.target}")
    done("round", 1, *given, *named, *vectors("tsds"), "--run", "a")
    done("round", 1, *settings(tiny_demo, "tsds"), *vectors("tsds"), "--run", "b")
    assert np.array_equal(probability("a"), probability("b"))
    assert done("round", 1, "--run", "a").count("up to date") == 8


@pytest.mark.parametrize("many", [False, True])
def test_the_first_rows_of_the_pool_are_the_target(here, tiny_demo, vectors, many):
    lines = tiny_demo.pool.read_text().splitlines(keepends=True)
    (here / "one.jsonl").write_text("".join(lines[:30]))
    (here / "two.jsonl").write_text("".join(lines[30:]))
    pool = "one.jsonl,two.jsonl" if many else str(tiny_demo.pool)
    np.save("head.npy", np.load("pool.npy")[:100])
    given = [text for text in settings(tiny_demo, "tsds", dataset=pool) if "eval_dataset" not in text]
    text = done(
        "round",
        1,
        *given,
        "tsds.query=first_100",
        *vectors("tsds", "head.npy"),
        "--run",
        "a",
        "eval_dataset=null",
    )
    assert "eval_dataset: first_100, as tsds.query (" in text
    pool_rows, target_rows = (
        pq.read_table(f"runs/a/{split}")["row_id"].to_pylist() for split in ("pool", "target")
    )
    assert target_rows == pool_rows[:100]
    assert done("round", 1, "--run", "a").count("up to date") == 8


def test_a_pool_of_fewer_rows_is_its_own_target(here, tiny_demo):
    (here / "few.jsonl").write_text("".join(tiny_demo.pool.read_text().splitlines(keepends=True)[:20]))
    done(
        "round",
        0,
        *settings(tiny_demo, "random", dataset="few.jsonl", eval_dataset="first_100"),
        "--run",
        "a",
    )
    assert pq.read_table("runs/a/target").num_rows == 20


@pytest.mark.parametrize("method", METHODS)
def test_no_target_is_refused_and_says_how_the_guide_does_it(here, tiny_demo, vectors, method):
    given = [text for text in settings(tiny_demo, method) if "eval_dataset" not in text]
    text = refused(here, "round", 1, *given, "eval_dataset=null", *vectors(method), "--run", "a")
    assert f"The method {method} was chosen and eval_dataset is not set." in text
    assert "query: first_100" in text


# ---------------------------------------------------------------- probabilities in a file


@pytest.fixture
def saved(here, tiny_demo, vectors):
    """A run that saved its probabilities to out/p.npy."""
    text = done(
        "round",
        1,
        *settings(tiny_demo, "tsds"),
        *vectors("tsds"),
        "tsds.save_probs_path=out/p.npy",
        "--run",
        "a",
    )
    assert "probabilities also in out/p.npy" in text
    return here / "out" / "p.npy"


def test_the_saved_file_is_what_the_peers_trainer_reads(saved):
    array = np.load(saved)
    assert array.dtype == np.float64
    assert np.array_equal(array, probability("a"))
    assert [path.name for path in saved.parent.iterdir()] == ["p.npy"]


def test_it_is_written_again_when_it_is_gone_and_left_alone_when_it_is_there(saved):
    before = saved.read_bytes()
    state = saved.stat().st_mtime_ns
    assert done("round", 1, "--run", "a").count("up to date") == 8
    assert saved.stat().st_mtime_ns == state
    saved.unlink()
    done("select", "--round", 1, "--run", "a")
    assert saved.read_bytes() == before


def test_another_file_in_its_place_is_never_written_over(saved, here):
    np.save(saved, np.full(200, 1 / 200))
    text = refused(here, "select", "--round", 1, "--run", "a")
    assert "out/p.npy is there already, with another content" in text
    done("select", "--round", 1, "--run", "a", "--overwrite")
    assert np.array_equal(np.load(saved), probability("a"))
    (aside,) = saved.parent.glob("p.npy.old-*")
    assert np.array_equal(np.load(aside), np.full(200, 1 / 200))


@pytest.mark.parametrize(
    ("path", "content", "why"),
    [
        ("p.txt", None, "ends in .npy"),
        ("p.npy", "text", "with another content"),
        ("p.npy", np.zeros(3), "with another content"),
    ],
)
def test_what_cannot_become_the_saved_file_is_found_before_the_warm_up(
    here, tiny_demo, vectors, path, content, why
):
    if isinstance(content, str):
        Path(path).write_text(content)
    elif content is not None:
        np.save(path, content)
    given = (*settings(tiny_demo, "tsds"), *vectors("tsds"), f"tsds.save_probs_path={path}")
    assert why in refused(here, "round", 1, *given, "--run", "a")


@pytest.mark.slow
def test_imported_probabilities_need_no_embeddings_and_no_target(saved, tiny_demo):
    given = [text for text in settings(tiny_demo, "tsds") if "eval_dataset" not in text]
    done(
        "round",
        2,
        *given,
        "eval_dataset=null",
        "tsds.probs_path=out/p.npy",
        "tsds.embed_model=./nowhere",
        "--run",
        "b",
    )
    for number in (1, 2):
        assert np.array_equal(probability("b", number=number), probability("a"))
        scores = pq.read_table(f"runs/b/round-{number:02d}/scores/tsds.parquet")
        assert np.array_equal(scores["score"].to_numpy(), np.load(saved))
    assert not Path("runs/b/features").exists()
    assert not Path("runs/b/target").exists()


@pytest.mark.slow
def test_an_imported_file_counts_by_its_content(saved, tiny_demo):
    done("round", 1, *settings(tiny_demo, "tsds"), "tsds.probs_path=out/p.npy", "--run", "b")
    saved.rename("moved.npy")
    assert done("round", 1, "--run", "b", "tsds.probs_path=moved.npy").count("up to date") == 8
    np.save("moved.npy", np.full(200, 1 / 200))
    text = refused(Path(), "round", 1, "--run", "b", "tsds.probs_path=moved.npy")
    assert "settings changed" in text
    assert "params.probabilities" in text


def test_probabilities_of_unusable_rows_are_said_and_recorded(here, tiny_demo):
    lines = tiny_demo.pool.read_text().splitlines(keepends=True)[:10]
    lines[4] = '{"instruction": "a", "input": "", "output": ""}\n'
    (here / "few.jsonl").write_text("".join(lines))
    np.save("p.npy", np.full(10, 0.1))
    given = settings(tiny_demo, "tsds", dataset="few.jsonl")
    text = done("round", 1, *given, "tsds.probs_path=p.npy", "--run", "a")
    assert "1 rows that cannot be used had 0.1 of the probability in p.npy" in text.replace("\n", " ")
    p = probability("a")
    assert p[4] == 0
    assert np.allclose(np.delete(p, 4), 1 / 9)
    notes = pq.read_metadata("runs/a/round-01/probabilities/tsds.parquet").metadata
    assert notes[b"dataflex.notices"].startswith(b"1 rows that cannot be used")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no such file"),
        (np.full(3, 1 / 3), "has 3 numbers and the pool has 200 rows"),
        (np.full(200, 0.1), "its numbers sum to 20"),
        (np.r_[-0.5, np.full(199, 1.5 / 199)], "the number of row 0 is -0.5"),
        (np.full((200, 1), 1 / 200), "holds float64[200, 1]"),
    ],
)
def test_files_that_are_no_probabilities_are_found_before_the_warm_up(here, tiny_demo, content, why):
    if content is not None:
        np.save("p.npy", content)
    given = settings(tiny_demo, "tsds")
    text = refused(here, "round", 1, *given, "tsds.probs_path=p.npy", "--run", "a")
    assert "probs_path=p.npy" in text
    assert why in text
