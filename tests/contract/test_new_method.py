"""A method of one's own: one file and one entry in a components file, as docs/extending.md shows it."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_runs import data, dataflex, done, refused, small

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


def edited(old, new):
    """Return what replaces a text in a file."""
    return lambda path: path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: path.unlink(), "There is no Python file at that path"),
        (lambda path: path.write_text("class Broken(\n"), "cannot be imported"),
        (lambda path: path.write_text("import nothing_of_that_name\n"), "nothing_of_that_name"),
        (lambda path: path.write_text("x = 1\n"), "It defines 0 subclasses"),
        (
            edited("def score(self, block, state)", "def score(self, block)"),
            "The program calls score(block, state)",
        ),
        (edited("def weigh", "def weight"), "weigh() of the method Shortest"),
        (edited("10.0, gt=0", "-1.0, gt=0"), "Params.scale of the method Shortest"),
        (
            edited("import numpy as np", "import os\nimport numpy as np\nos.chdir('/')"),
            "the working directory",
        ),
    ],
)
def test_a_file_that_holds_no_method(here, tiny_demo, change, expected):
    change(here / "shortest.py")
    assert expected in refused(here, "round", 1, *small(tiny_demo), *USE)
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import typer; raise typer.Exit(0)", "Exit: 0"),
        ("raise MemoryError", "MemoryError"),
        ("raise PermissionError(13, 'no')", "PermissionError: [Errno 13] no"),
        ("import os; os.chdir('/')", "working directory was changed"),
        ("return -block.column('row').to_numpy() - 1", "returns -1 for row 0"),
    ],
)
def test_what_it_raises_or_returns_is_told_with_its_file(here, tiny_demo, line, said):
    """Whatever the command would make of it by itself: a good end, a lack of memory, a disk's fault."""
    edited("return np.exp", f"{line}\n        return np.exp")(here / "shortest.py")
    ran = dataflex("pick", *USE[1:], *data(tiny_demo), "warmup_step=0", "num_samples=9", "--run", "x")
    assert ran.code == 2, ran.out + ran.err
    assert "shortest.py" in ran.err or "os.chdir" in ran.err
    assert said in ran.err
    assert "Traceback" not in ran.err
