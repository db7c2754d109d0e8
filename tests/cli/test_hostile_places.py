"""Places that hold something else, and names that a shell or a query would read otherwise."""

import os
import shlex

import pyarrow.parquet as pq
import pytest
from cli_runs import copied, dataflex, done, refused, small

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.home import expanded
from dataflex_pipeline.store.disk_errors import disk_error
from dataflex_pipeline.store.locks import held
from dataflex_pipeline.store.run import RunFolder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(
            {"dangling": "nowhere", "loop": path.name, "device": "/dev/zero", "text": "/etc/hosts"}[kind]
        )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (".lock", "folder"),
        (".lock", "dangling"),
        (".lock-owner", "folder"),
        ("history.jsonl", "folder"),
        ("history.jsonl", "device"),
        ("run.yaml", "pipe"),
        ("sources.json", "folder"),
        ("pool", "dangling"),
        ("pool", "text"),
        ("features", "text"),
        ("round-01", "loop"),
        ("round-01", "text"),
    ],
)
def test_what_lies_where_a_run_keeps_its_files(tmp_path, name, kind):
    make(tmp_path / "run" / name, kind)
    before = sorted((tmp_path / "run").iterdir())
    with pytest.raises(UserError, match=rf"{name} is no ") as caught, RunFolder(tmp_path / "run").lock():
        pass
    assert caught.value.exit_code == 2
    assert sorted((tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize("kind", ["dangling", "loop", "pipe", "text"])
def test_a_run_that_is_no_folder(here, tiny_demo, kind):
    make(here / "runs" / "trial", kind)
    ran = dataflex("warmup", *small(tiny_demo), "--run", "trial")
    assert ran.code == 2
    assert ran.err.rstrip().splitlines()[-1].startswith("-> ")
    assert list((here / "runs").iterdir()) == [here / "runs" / "trial"]


@pytest.mark.parametrize(
    "settings",
    [
        ("--run", "r" * 300),
        ("runs_dir=" + "r" * 300,),
        ("output_dir=" + "r/" * 3000,),
        ("--run", "a\nb"),
        ("--run", "a\x1bb"),
        ("--run", "a\udcffb"),
        ("runs_dir=/dev/null",),
        ("dataset=" + "r" * 300,),
        ("dataset=~nosuchuser/rows.jsonl",),
        ("model_name_or_path=~nosuchuser/model",),
        ("model_name_or_path=" + "m" * 300,),
        ("adapter_name_or_path=~nosuchuser/adapter",),
        ("features_dir=~nosuchuser/cache",),
        ("dataset_dir=" + "r" * 300,),
        ("components_cfg_file=" + "r" * 300,),
    ],
)
def test_names_that_are_no_places(here, tiny_demo, settings):
    text = refused(here, "round", 1, *small(tiny_demo), *settings)
    assert "\x1b" not in text
    assert not (here / "runs").exists()


@pytest.mark.parametrize("name", ["a*b", "[1]", "a=b", "a b'$(x)"])
def test_a_run_whose_name_a_shell_or_a_query_would_read_otherwise(here, tiny_demo, name):
    """Beside it lies a run that its name would match as a pattern."""
    folder = copied(tiny_demo, here / "runs", name)
    copied(tiny_demo, here / "runs", "axb")
    copied(tiny_demo, here / "runs", "1")
    expected = pq.read_table(folder / "round-02" / "scores" / "loss.parquet").num_rows
    query = "select count(*) as n from scores where round = 2"
    out = done("inspect", folder.relative_to(here), "--sql", query)
    assert str(expected) in out
    assert str(2 * expected) not in out
    status = done("status", "--run", name)
    commands = [line.split(":  ", 1)[1] for line in status.splitlines() if ":  dataflex " in line]
    for command in commands:
        words = shlex.split(command)  # what a shell makes of it when it is pasted
        assert any(word.endswith(name) for word in words), command
    done("export", f"runs/{name}", "--to", "rows.jsonl")
    assert (here / "rows.jsonl").is_file()


def test_a_place_of_another_kind_is_told_without_a_traceback(tmp_path):
    for error in (
        IsADirectoryError(21, "Is a directory", "x"),
        OSError(36, "File name too long", "y" * 5000),
    ):
        shown = disk_error(error)
        assert isinstance(shown, UserError)
        assert len(shown.what) < 300
    assert disk_error(FileNotFoundError(2, "No such file", "x")) is None
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match="lock is no file"), held(tmp_path / "lock"):
        pass


def test_a_home_that_nobody_has():
    assert str(expanded("a/b")) == "a/b"
    with pytest.raises(UserError, match="knows of none by that name"):
        expanded("~nosuchuser/x")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("export",), ("--to", "/proc/x")),
        (("export",), ("--to", "/proc/x.jsonl")),
        (("report",), ("--output", "/proc/x.html")),
    ],
)
def test_a_place_where_nothing_can_be_made(tiny_demo, tmp_path, command, option):
    folder = copied(tiny_demo, tmp_path)
    assert "Nothing can be made there" in refused(folder, *command, folder, *option)


def test_a_pick_finds_such_a_place_before_it_begins(tiny_demo, here):
    settings = ("fraction=0.5", *small(tiny_demo))
    assert "Nothing can be made there" in refused(here, "pick", "random", *settings, "--to", "/proc/x.jsonl")
    assert not list(here.iterdir())


def test_a_run_that_only_picks_is_no_run_to_compare(tiny_demo, here):
    done("pick", "random", *small(tiny_demo)[:3], "fraction=0.5", "--run", "only")
    assert "dataflex report only" in refused(here, "compare", "only", "only")
