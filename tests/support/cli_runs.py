"""Running commands in this process, on copies of one finished run of the tiny demo."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from dataflex_pipeline.stages import cli

from dataflex_pipeline.demo import Demo
from dataflex_pipeline.process import interrupts

STEPS = ("warmup_step=2", "update_step=2", "update_times=3")
SMALL = (
    "per_device_train_batch_size=4",
    "lora_rank=4",
    "learning_rate=0.002",
    "plot_loss=false",
    "eval_strategy=no",
)


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code and what it printed."""

    code: int
    out: str
    err: str


def dataflex(*arguments: object) -> Ran:
    """Run one command as a shell would, without the second that a new interpreter takes."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["dataflex", *map(str, arguments)]),
        mock.patch.object(interrupts, "watched", lambda command: command()),  # Ctrl-C stays pytest's
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> str:
    """Run a command that has to succeed; return what it printed."""
    ran = dataflex(*arguments)
    assert ran.code == 0, ran.out + ran.err
    return ran.out


def data(demo: Demo) -> tuple[str, ...]:
    """Return the settings that name the tiny demo's files."""
    return (f"dataset={demo.pool}", f"eval_dataset={demo.target}", f"model_name_or_path={demo.model}")


def small(demo: Demo) -> tuple[str, ...]:
    """Return the settings of a run that takes seconds."""
    return (*data(demo), *STEPS, *SMALL)


@functools.cache
def finished(demo: Demo) -> Path:
    """Return a run with method loss that has done rounds 0 to 2 of 3; never write to it."""
    runs = demo.folder.parent / "finished"
    done("round", 2, *small(demo), "--run", "base", f"runs_dir={runs}")
    return runs / "base"


def copied(demo: Demo, runs: Path, name: str = "base") -> Path:
    """Return a copy of the finished run, modification times and all."""
    folder = runs / name
    shutil.copytree(finished(demo), folder)
    return folder


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Return digest and modification time of everything below a folder, the empty lock file aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            found[f"{path.relative_to(folder)}/"] = ("", 0)
        elif path.name != ".lock":
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = (content, path.stat().st_mtime_ns)
    return found


def refused(watched: Path, *arguments: object) -> str:
    """Run a command that has to be refused: three parts, exit code 2, nothing changed; return the text."""
    before = snapshot(watched)
    ran = dataflex(*arguments)
    assert ran.code == 2, ran.out + ran.err
    assert "Traceback" not in ran.out + ran.err
    lines = ran.err.rstrip().splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) >= 3
    assert lines[-1].startswith("-> ")
    assert snapshot(watched) == before
    return ran.err


def two_rounds(
    demo: Demo, folder: Path, settings: tuple[str, ...], *, n_target: int, leaks: int | None = None
) -> tuple[Path, tuple[str, ...], str]:
    """Do two rounds on 60 rows of the tiny demo, its target in two groups, ``odd`` and ``even``.

    Args:
        demo: the tiny one.
        folder: for the data and the run, which is called ``run``.
        settings: of the run, the method among them.
        n_target: rows of the target.
        leaks: a pool row that is one more target row; None for none.

    Returns:
        The folder, all settings, and what was printed.
    """
    pool = [json.loads(line) for line in demo.pool.read_text().splitlines()][:60]
    target = [json.loads(line) for line in demo.target.read_text().splitlines()][:n_target]
    if leaks is not None:
        target.append({key: pool[leaks][key] for key in ("instruction", "input", "output")})
    for number, row in enumerate(target):
        row.pop("skill", None), row.pop("quality", None)
        row["kind"] = "odd" if number % 2 else "even"
    files = {"dataset": folder / "pool.json", "eval_dataset": folder / "target.json"}
    for path, rows in zip(files.values(), (pool, target), strict=True):
        path.write_text(json.dumps(rows))
    places = [f"{key}={path}" for key, path in files.items()]
    whole = (*settings, *places, f"model_name_or_path={demo.model}", f"runs_dir={folder}")
    return folder, whole, done("round", 2, *whole, "--run", "run")
