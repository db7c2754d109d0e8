"""A method of one's own: one file and one entry in a components file, as docs/extending.md shows it."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import done, refused, small

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
USE = ("--method", "shortest", "components_cfg_file=components.yaml")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with nothing but the two files that a user writes."""
    for name in ("shortest.py", "components.yaml"):
        shutil.copy2(EXAMPLES / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_takes_less_than_sixty_lines():
    assert (
        sum(len((EXAMPLES / name).read_text().splitlines()) for name in ("shortest.py", "components.yaml"))
        < 60
    )


def test_the_docs_show_these_very_files():
    text = PAGE.read_text(encoding="utf-8")
    for name in ("shortest.py", "components.yaml"):
        assert (EXAMPLES / name).read_text(encoding="utf-8").strip() in text


def test_a_round_with_it(here, tiny_demo):
    done("round", 1, *small(tiny_demo), *USE)
    folder = here / "runs" / "pool-shortest" / "round-01"
    pool = pq.read_table(here / "runs" / "pool-shortest" / "pool" / "part-00000.parquet")
    tokens = pool["n_response_tokens"].to_numpy()
    scores = pq.read_table(folder / "scores" / "shortest.parquet")
    assert scores["score"].to_pylist() == [-float(count) for count in tokens]
    expected = np.exp(-tokens / 5.0)
    found = pq.read_table(folder / "probabilities" / "shortest.parquet")["probability"].to_numpy()
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-12)
    assert (folder / "checkpoint" / "adapter_model.safetensors").is_file()


def test_it_is_listed_and_its_parameter_is_checked_like_any_other(here, tiny_demo):
    (here / "mine.yaml").write_text("components_cfg_file: components.yaml\n")
    text = done("methods", "shortest", "--config", "mine.yaml")
    assert "shortest: prefer rows with short answers" in text
    assert "shortest.scale\t5.0\t10.0\ttokens over which" in text
    text = refused(here, "round", 1, *small(tiny_demo), *USE, "shortest.scale=-1")
    assert "shortest.scale is -1" in text
    assert "greater than 0" in text
    assert "Did you mean 'scale'?" in refused(here, "round", 1, *small(tiny_demo), *USE, "shortest.scal=1")


@pytest.mark.slow
def test_a_parameter_on_the_command_line_for_a_run_that_is_there(here, tiny_demo):
    """The run's own run.yaml names the components file that knows the method."""
    done("warmup", *small(tiny_demo), USE[2], "component_name=shortest", "--run", "own")
    done("score", "--round", 1, "--run", "own", "shortest.scale=2")
    metadata = pq.read_metadata(here / "runs" / "own" / "round-01" / "scores" / "shortest.parquet").metadata
    assert b'"params":{"scale":2.0}' in metadata[b"dataflex.ingredients"]


@pytest.mark.slow
def test_a_changed_file_makes_its_scores_stale(here, tiny_demo):
    done("warmup", *small(tiny_demo), USE[2], "component_name=shortest", "--run", "own")
    done("score", "--round", 1, "--run", "own")
    with (here / "shortest.py").open("a") as stream:
        stream.write("# another edition\n")
    told = refused(here, "score", "--round", 1, "--run", "own")
    assert "implementation: the content of your own file changed (" in told


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: path.unlink(), "There is no Python file at that path"),
        (lambda path: path.write_text("class Broken(\n"), "cannot be imported"),
        (lambda path: path.write_text("import nothing_of_that_name\n"), "nothing_of_that_name"),
        (lambda path: path.write_text("x = 1\n"), "It defines 0 subclasses"),
    ],
)
def test_a_file_that_holds_no_method(here, tiny_demo, change, expected):
    change(here / "shortest.py")
    assert expected in refused(here, "round", 1, *small(tiny_demo), *USE)
    assert not (here / "runs").exists()
