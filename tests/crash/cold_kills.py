"""The long kill test: SIGKILLs of the real command at random times, each from a cold start.

Run as ``PYTHONPATH=tests python -m crash.cold_kills --kills 40`` or ``make test-slow``. A run is killed and
started again until it is done, then compared with an undisturbed one; a new run begins as long as kills
are left. The last line says how many restarts failed (lost) and how many results differed (wrong).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from crash.same_run import differences
from crash.small_run import NAME, Recipe

SPAN = 0.4
"""Kill times are uniform over this share of an undisturbed run's work, so that a run dies a few times."""
FROM_LOCK = 0.25
"""Share of the kills whose time counts from when the command owns the run; the others count from the first
change it makes to a file, since for most of the time before that it only imports."""
PATIENCE = 900.0
"""Seconds after which a command counts as hung."""


def small_demo(folder: Path):
    """Make a demo of a few hundred rows and a barely trained model."""
    from dataflex_pipeline.demo import DemoSettings, ensure_demo
    from dataflex_pipeline.demo.corpus import CorpusSettings
    from dataflex_pipeline.demo.pretrain import ModelSettings

    settings = DemoSettings(
        CorpusSettings(pool_rows=200, target_rows=16, test_rows=8),
        ModelSettings(hidden=64, layers=2, heads=2, intermediate=128, steps=20, batch_rows=16, threads=1),
    )
    return ensure_demo(folder, lambda line: None, settings)


class Command:
    """The real command in a session of its own; its work counts from its lock or its first other change."""

    def __init__(self, arguments: tuple[str, ...], folder: Path, from_lock: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run, self.from_lock = folder / "runs" / NAME, from_lock
        self.before = self._state()
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("dataflex")), *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.lines: list[str] = []
        self.began: float | None = None
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def _state(self) -> dict[str, int]:
        state = {}
        for folder, _, names in os.walk(self.run):
            for name in names:
                if self.from_lock or not name.startswith(".lock"):
                    with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                        state[f"{folder}/{name}"] = Path(folder, name).stat().st_mtime_ns
        return state

    def worked(self) -> float:
        """Return the seconds since it began to change files."""
        if self.began is None and self._state() != self.before:
            self.began = time.monotonic()
        return 0.0 if self.began is None else time.monotonic() - self.began

    def end(self, after: float | None) -> bool:
        """Wait for the end, or kill the whole group after that many seconds of work; say whether killed."""
        deadline = time.monotonic() + PATIENCE
        try:
            while self.process.poll() is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no end after {PATIENCE:.0f} s; the last line was: {self.stage()}")
                worked = self.worked()
                if after is not None and self.began is not None and worked >= after:
                    os.killpg(self.process.pid, signal.SIGKILL)
                    break
                time.sleep(0.01)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.reader.join()
        return self.process.returncode == -signal.SIGKILL

    def stage(self) -> str:
        """Return the last line that was printed: how far it came."""
        return next((line.strip() for line in reversed(self.lines) if line.strip()), "before its first line")


@dataclass
class Siege:
    """Runs under fire.

    Attributes:
        recipe: the run. reference: an undisturbed one. seconds: its work. kills: wanted.
        draw: the stream of kill times. done: kills so far. lost: failed restarts. wrong: runs that differ.
    """

    recipe: Recipe
    reference: Path
    seconds: float
    kills: int
    draw: random.Random
    began: float = field(default_factory=time.monotonic)
    done: int = 0
    lost: int = 0
    wrong: int = 0

    def one_run(self, folder: Path) -> None:
        """Kill a run and start it again until it is done, then compare it."""
        while True:
            aim = self.draw.uniform(0.0, SPAN * self.seconds)
            command = Command(self.recipe.round()[0], folder, self.draw.random() < FROM_LOCK)
            if command.end(aim if self.done < self.kills else None):
                self.done += 1
                self._tell(command, aim)
            elif command.process.returncode == 0:
                break
            else:
                self.lost += 1
                print("\n".join(command.lines[-20:]), f"exit code {command.process.returncode}", sep="\n")
                return
        found = differences(self.reference, folder / "runs" / NAME)
        self.wrong += bool(found)
        print(f"run finished after its kills: {'; '.join(found) if found else 'identical'}", flush=True)

    def _tell(self, command: Command, aim: float) -> None:
        left = (time.monotonic() - self.began) / self.done * (self.kills - self.done)
        print(
            f"kill {self.done}/{self.kills} after {aim:.1f} s of work, at: {command.stage()}"
            f"  (about {left:.0f} s left)",
            flush=True,
        )


def main() -> int:
    """Return 0 if nothing was lost and nothing is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="loss")
    parser.add_argument("--nproc", help="numbers of processes, such as 1,2,4: see rank_kills.py")
    options = parser.parse_args()
    if options.nproc:
        from crash.rank_kills import besiege

        counts = [int(number) for number in options.nproc.split(",")]
        with tempfile.TemporaryDirectory() as place:
            demo = small_demo(Path(place))
            return besiege(demo, options.method, options.kills, options.seed, counts)
    with tempfile.TemporaryDirectory() as place:
        print("making a small demo and an undisturbed run", flush=True)
        recipe = Recipe.of(small_demo(Path(place)), options.method)
        calm = Command(recipe.round()[0], Path(place) / "calm", from_lock=True)
        calm.end(None)
        seconds = calm.worked()
        if calm.process.returncode:
            print("\n".join(calm.lines), "the undisturbed run failed", sep="\n")
            return 1
        print(f"undisturbed: {seconds:.1f} s of work", flush=True)
        reference = Path(place) / "calm" / "runs" / NAME
        siege = Siege(recipe, reference, seconds, options.kills, random.Random(options.seed))
        number = 0
        while siege.done < siege.kills:
            number += 1
            siege.one_run(Path(place) / f"run-{number}")
            if siege.lost:
                break
    print(f"{siege.done} kills, {siege.lost} lost, {siege.wrong} wrong")
    return int(bool(siege.lost or siege.wrong))


if __name__ == "__main__":
    sys.exit(main())
