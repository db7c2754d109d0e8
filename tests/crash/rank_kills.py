"""The long kill test over several processes: a rank, or a whole launch, dies at a random moment.

Run as ``PYTHONPATH=tests python -m crash.cold_kills --nproc 1,2,4 --kills 200``. The stages are run one by
one; each start takes a random number of processes, is killed at a random moment of its work and started
again, until the stage is done. The run is then compared with one that a single process made undisturbed.

Training starts with 1 or 2 processes: the sum of two processes' gradients has one order only, so that the
results are equal to the bit; scoring and selecting take any number.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from crash.launches import Launch
from crash.same_run import differences
from crash.small_run import NAME, Recipe

# Random streams restart with another number of processes, and an evaluation's sum over rows has their order.
SAME_FOR_ALL = ("lora_dropout=0", "eval_strategy=no", "per_device_train_batch_size=2", "rows_per_part=8")
ROWS_PER_STEP = 4
DEPENDS_ON_PROCESSES = "rng_state"
"""Beginning of the names of files that may differ: the random streams of each process."""
AVERAGES = frozenset({"gradient_accumulation_steps", "entropy", "mean_token_accuracy"})
"""Keys that may differ: the accumulation that was given, and two entries of TRL's own log, which it averages
by tokens over processes and without weights over accumulated batches (SFTTrainer.compute_loss and log)."""
PATIENCE = 900.0


@dataclass
class Siege:
    """Runs under fire.

    Attributes:
        commands: of a run. reference: an undisturbed one. seconds: of work, by command. kills: wanted.
        counts: numbers of processes. draw: the stream of moments. most: kills of one stage of one run, so
            that a machine that has become slower still reaches the later stages.
        done: kills. lost, wrong: see cold_kills.
    """

    commands: Sequence[tuple[str, ...]]
    reference: Path
    seconds: Sequence[float]
    kills: int
    counts: Sequence[int]
    draw: random.Random
    most: int = 5
    began: float = field(default_factory=time.monotonic)
    done: int = 0
    lost: int = 0
    wrong: int = 0

    def one_run(self, folder: Path) -> None:
        """Run all stages, each killed and started again until it is done, then compare."""
        for number, command in enumerate(self.commands):
            kills = self.draw.randint(1, self.most)
            while not self._start(folder, number, command, kills > 0):
                kills -= 1
                if self.lost:
                    return
        found = [
            line
            for line in differences(self.reference, folder / "runs" / NAME, AVERAGES)
            if not line.rpartition("/")[2].startswith(DEPENDS_ON_PROCESSES)
        ]
        self.wrong += bool(found)
        print(f"run finished after its kills: {'; '.join(found) if found else 'identical'}", flush=True)

    def _start(self, folder: Path, number: int, command: tuple[str, ...], disturbed: bool) -> bool:
        """Start one command, and kill it where it is to be disturbed; return whether it came to its end."""
        processes = self.draw.choice([n for n in self.counts if n <= 2 or not trains(command)])
        aim = self.draw.uniform(0.0, 1.2) * self.seconds[number]
        launch = Launch(folder, processes, *with_batch(command, processes))
        disturbed = disturbed and self.done < self.kills and worked(launch, folder / "runs" / NAME, aim)
        killed = self._kill(launch) if disturbed else ""
        if killed:
            self.done += 1
            left = (time.monotonic() - self.began) / self.done * (self.kills - self.done)
            where = f"{command[0]} with {processes}, {killed} after {aim:.1f} s"
            print(f"kill {self.done}/{self.kills}: {where}  (about {left:.0f} s left)", flush=True)
        code = launch.end(PATIENCE)
        if code and not killed:
            self.lost += 1
            print(launch.output, f"exit code {code}", sep="\n")
        return code == 0

    def _kill(self, launch: Launch) -> str:
        """Kill a rank, or all; return which, or nothing if it ended by itself meanwhile."""
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks = launch.ranks()
            victim = self.draw.choice([*ranks, None])
            if victim is None:
                launch.kill()
                return "all"
            ranks[victim].kill()
            return f"rank {victim}"
        return ""


def trains(command: tuple[str, ...]) -> bool:
    """Whether a stage trains."""
    return command[0] in ("warmup", "train-round")


def with_batch(command: tuple[str, ...], processes: int) -> tuple[str, ...]:
    """Return a command with the accumulation that gives a step the same rows on every number of processes."""
    if not trains(command):
        return command
    return (*command, f"gradient_accumulation_steps={ROWS_PER_STEP // 2 // processes}")


def state(run: Path) -> dict[str, int]:
    """Return when each file of a run was changed."""
    found = {}
    for path in run.rglob("*"):
        try:
            found[str(path)] = path.stat().st_mtime_ns
        except FileNotFoundError:  # renamed or removed meanwhile
            continue
    return found


def worked(launch: Launch, run: Path, seconds: float) -> bool:
    """Wait until a launch has worked that long since its first change to a file; False if it ended before."""
    before, began = state(run), None
    while launch.process.poll() is None:
        if began is None and state(run) != before:
            began = time.monotonic()
        if began is not None and time.monotonic() - began >= seconds:
            return True
        time.sleep(0.01)
    return False


def undisturbed(commands: Sequence[tuple[str, ...]], folder: Path) -> list[float]:
    """Run all stages by one process; return the seconds that each worked."""
    seconds = []
    for command in commands:
        launch = Launch(folder, 1, *with_batch(command, 1))
        worked(launch, folder / "runs" / NAME, 0.0)
        began = time.monotonic()
        if launch.end(PATIENCE):
            raise SystemExit(f"{launch.output}\nthe undisturbed run failed")
        seconds.append(time.monotonic() - began)
    return seconds


def besiege(demo, method: str, kills: int, seed: int, counts: Sequence[int]) -> int:
    """Return 0 if nothing was lost and nothing is wrong."""
    commands = Recipe.of(demo, method, *SAME_FOR_ALL).stages()
    with tempfile.TemporaryDirectory() as place:
        seconds = undisturbed(commands, Path(place) / "calm")
        print(f"undisturbed: {sum(seconds):.1f} s of work in {len(seconds)} stages", flush=True)
        reference = Path(place) / "calm" / "runs" / NAME
        siege = Siege(commands, reference, seconds, kills, counts, random.Random(seed))
        number = 0
        while siege.done < kills and not siege.lost:
            number += 1
            siege.one_run(Path(place) / f"run-{number}")
    among = ", ".join(map(str, counts))
    print(f"{siege.done} kills with {among} processes, {siege.lost} lost, {siege.wrong} wrong")
    return int(bool(siege.lost or siege.wrong))
