"""What the commands look like: tables, progress, colours, and which messages of libraries are let through."""

import io
import os
import re
import signal
import subprocess
import sys

import pytest
from cli_runs import copied, dataflex, done

ENVIRONMENT = dict(os.environ)
MANY = "select a.row from pool a, pool b, pool c"
ON = ("--run", "base", "runs_dir=runs")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns; returns what was drawn on it, without colours."""
    from rich.console import Console

    from dataflex_pipeline.terminal import console

    drawn = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False, soft_wrap=True)
    monkeypatch.setattr(console, "out", drawn)
    return lambda: re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.file.getvalue())


@pytest.fixture
def folder(here, tiny_demo):
    return copied(tiny_demo, here / "runs")


def test_the_summary_is_readable_on_80_columns(folder, terminal):
    done("round", 2, *ON)
    lines = [line.rstrip() for line in terminal().splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[lines.index("Round 2: loss") + 1] == "Summary of runs/base"
    assert lines[-1] == "  look at it in a browser:  dataflex report runs/base"
    for path in ("round-02/scores/loss.parquet", "round-02/checkpoint"):
        assert any(line.endswith(path) for line in lines)  # whole, on one line
        assert (folder / path).exists()


def test_a_bar_shows_rate_and_time_left_and_ends_with_the_time_it_took(terminal, monkeypatch):
    from dataflex_pipeline.terminal.progress import BarProgress

    now = iter(range(0, 100000, 2))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    bar = BarProgress()
    bar.start("computing", 4, "rows", done=1)
    bar.advance(1)
    bar.say("a line between")
    bar.finish()
    text = terminal()
    assert re.search(r"computing .* 2/4 2\.0 s each", text)
    assert "a line between" in text


@pytest.mark.parametrize(("widgets", "kind"), [(True, "BarProgress"), (False, "PlainProgress")])
def test_a_notebook_has_bars_where_it_can_draw_them(widgets, kind, monkeypatch):
    from rich.console import Console

    from dataflex_pipeline.terminal import console, progress

    notebook = Console(file=io.StringIO(), force_jupyter=True, width=80)
    assert not notebook.is_terminal
    monkeypatch.setattr(console, "out", notebook)
    monkeypatch.setattr(progress, "find_spec", lambda name: object() if widgets else None)
    assert type(progress.progress()).__name__ == kind


def test_plain_lines_say_how_much_was_there_and_what_is_left(monkeypatch, capsys):
    from dataflex_pipeline.terminal import progress

    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    plain = progress.PlainProgress()
    plain.start("computing", 100, "rows", done=20)
    now[0] = 10.0
    plain.advance(20)
    plain.advance(20)  # within the ten seconds: nothing is said
    now[0] = 20.0
    plain.finish()
    plain.finish()
    assert capsys.readouterr().out.splitlines() == [
        "  computing (100 rows, 20 already done)",
        "  computing: 40 of 100 rows, 2.0/s, 0:30 left",
        "  computing: 60 of 100 rows in 20.0 s (2.0/s)",
    ]


def test_a_slow_pace_is_the_time_of_one():
    from dataflex_pipeline.terminal.progress import pace

    assert [pace(*given) for given in ((4, 2.0), (2, 2.0), (3, 37.5), (0, 5.0))] == [
        *("2.0/s", "1.0/s", "12.5 s each", "0.0/s")
    ]
    assert pace(5000, 2.0, "rows") == "2,500.0 rows/s"


def test_a_reader_that_has_seen_enough_is_no_failure_of_ours(folder, here):
    """As in ``dataflex inspect base | head``: the shell's own number for it, and no word on stderr."""
    command = [sys.executable, "-m", "dataflex_pipeline", "inspect", "base", "--csv", "--sql", MANY]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as process:
        assert process.stdout.readline() == "row\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.slow
def test_an_interrupted_query_ends_with_130(folder, here):
    command = [sys.executable, "-m", "dataflex_pipeline", "inspect", "base", "--csv", "--sql", MANY]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said.splitlines()[-1].partition(";")[0]) == (130, "interrupted")


def test_nothing_is_coloured_outside_a_terminal(tiny_demo, here):
    copied(tiny_demo, here / "runs")
    ran = dataflex("status", *ON, "learning_rate=0.01")
    assert "\x1b" not in ran.out + ran.err
    assert "\x1b" not in dataflex("round", 9, *ON).err


def test_noise_of_the_libraries_is_dropped_and_their_errors_are_not(caplog):
    import logging

    from dataflex_pipeline.process.libraries import quieten

    quieten()
    quieten()
    logger = logging.getLogger("DeepSpeed")
    assert len(logger.filters) == 1
    logger.addHandler(caplog.handler)
    try:
        logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, ...")
        logger.warning("something that matters")
        logger.error("Setting accelerator to CPU failed")
    finally:
        logger.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"something that matters", "Setting accelerator to CPU failed"}
