"""The real command on several processes, under the real torchrun, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import psutil
from cli_runs import done

BIN = Path(sys.executable).parent
PATIENCE = 240.0
"""Seconds after which a launch counts as hung."""


def command(processes: int, arguments: tuple[str, ...], module: str = "dataflex_pipeline") -> list[str]:
    """Return the command line of a launch; one process needs no launcher."""
    if processes == 1:
        return [sys.executable, "-m", module, *arguments]
    # A port of its own for every launch, so that tests can run side by side.
    own = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--shutdown-timeout", "2"]
    return [
        *(str(BIN / "torchrun"), *own, "--nproc_per_node", str(processes)),
        *("-m", "--", module, *arguments),
    ]


def environment() -> dict[str, str]:
    """Return the environment of a launch: one thread per process, no network, ninja on the path."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }


class Launch:
    """A running launch, in a session of its own; its output goes to a file."""

    def __init__(
        self,
        folder: Path,
        processes: int,
        *arguments: str,
        module: str = "dataflex_pipeline",
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.started(folder, processes, command(processes, arguments, module), environment() | more)

    def started(self, folder: Path, processes: int, line: list[str], variables: Mapping[str, str]) -> None:
        """Start a command line in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"output-{time.monotonic_ns()}"
        self.processes = processes
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                line,
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=variables,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes of the ranks, as far as they have started."""
        if self.processes == 1:
            return {0: psutil.Process(self.process.pid)}
        found = {}
        for child in psutil.Process(self.process.pid).children():
            try:
                found[int(child.environ()["RANK"])] = child
            except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
                continue
        return found

    def wait_for(self, seen: Callable[[], bool], seconds: float = 120.0) -> None:
        """Wait until something has happened while the launch runs."""
        deadline = time.monotonic() + seconds
        while not seen():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.005)

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait for the end and return the exit code; nothing stays behind."""
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill every process of the launch, stopped ones too (torchrun gives each a session of its own)."""
        try:
            tree = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            tree = []
        for child in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(folder: Path, processes: int, *commands: tuple[str, ...]) -> str:
    """Run commands in one launch; they have to succeed. Return what they printed.

    One process needs no launch: they run in this one, which has imported everything already.
    """
    if processes == 1:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.chdir(folder):
            return "".join(done(*arguments) for arguments in commands)
    launch = Launch(folder, processes, json.dumps(commands), module="crash.several_commands")
    code = launch.end()
    assert code == 0, launch.output
    return launch.output
