"""Progress of long work: a bar with rate and time left in a terminal or notebook, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from dataflex_pipeline.api import Progress as ProgressProtocol
from dataflex_pipeline.terminal import console

PLAIN_INTERVAL = 10.0
"""Seconds between two progress lines where there is no terminal."""


def progress() -> ProgressProtocol:
    """Return a progress bar in a terminal or a notebook, plain lines elsewhere."""
    # rich draws bars in a notebook with ipywidgets; without it, there would be a warning and no bar.
    in_notebook = console.out.is_jupyter and find_spec("ipywidgets") is not None
    return BarProgress() if console.out.is_terminal or in_notebook else PlainProgress()


def clock(seconds: float) -> str:
    """Return a duration as people write it: 0:07, 12:30, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def pace(count: int, seconds: float, unit: str = "") -> str:
    """Return a rate as people say it: 53.2/s (or 53.2 rows/s); below 1/s the time of one: 12.9 s each."""
    rate = count / max(seconds, 1e-9)
    return f"{1 / rate:,.1f} s each" if 0 < rate < 1 else f"{rate:,.1f}{unit and ' '}{unit}/s"


class _Times(ProgressColumn):
    """Time spent and time left; only the first where there is nothing left or nothing known."""

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        spent, left = task.finished_time or task.elapsed or 0.0, task.time_remaining
        running = not task.finished and left is not None
        return Text(f"{clock(spent)}, {clock(left or 0.0)} left" if running else clock(spent), style="cyan")


class BarProgress:
    """A live bar with rate and time left."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._unit = ""
        self._counted = 0
        self._began = 0.0

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        """Show a bar."""
        self.finish()
        self._unit, self._counted, self._began = unit, 0, time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            _Times(),
            console=console.out,
        )
        self._bar.start()
        self._task = self._bar.add_task(console.clean(what), total=total, completed=done, rate="")

    def advance(self, n: int) -> None:
        """Move the bar."""
        if self._bar is None:
            return
        self._counted += n
        rate = pace(self._counted, time.monotonic() - self._began, self._unit)
        self._bar.update(self._task, advance=n, rate=rate)

    def finish(self) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            task = self._bar.tasks[0]
            self._bar.update(self._task, total=task.total if task.total is not None else task.completed)
            self._bar.stop()
            self._bar = None

    def say(self, line_text: str) -> None:
        """Print a line above the bar."""
        console.line(line_text)


class PlainProgress:
    """A line at the start, every few seconds, and at the end."""

    def __init__(self) -> None:
        self._what = ""
        self._unit = ""
        self._total: int | None = None
        self._done = 0
        self._counted = 0
        self._began = 0.0
        self._spoke = 0.0
        self._running = False

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        """Say what begins, and how much of it is there already."""
        self.finish()
        self._what, self._unit, self._total = what, unit, total
        self._done, self._counted = done, 0
        self._began = self._spoke = time.monotonic()
        self._running = True
        there = f", {done:,} already done" if done else ""
        size = f" ({total:,} {unit}{there})" if total is not None else ""
        console.line(f"  {what}{size}")

    def advance(self, n: int) -> None:
        """Count; speak when it is time."""
        self._done += n
        self._counted += n
        if time.monotonic() - self._spoke >= PLAIN_INTERVAL:
            self._spoke = time.monotonic()
            self._status()

    def _status(self) -> None:
        seconds = time.monotonic() - self._began
        rate = pace(self._counted, seconds)
        if self._total is None:
            console.line(f"  {self._what}: {self._done:,} {self._unit}, {rate}")
            return
        left = (self._total - self._done) * seconds / max(self._counted, 1)
        there = f"{self._done:,} of {self._total:,} {self._unit}"
        console.line(f"  {self._what}: {there}, {rate}, {clock(left)} left")

    def finish(self) -> None:
        """Say how it went."""
        if self._running:
            self._running = False
            seconds = time.monotonic() - self._began
            of = "" if self._total is None or self._done >= self._total else f" of {self._total:,}"
            took = f"{seconds:.1f} s ({pace(self._counted, seconds)})"
            console.line(f"  {self._what}: {self._done:,}{of} {self._unit} in {took}")

    def say(self, line_text: str) -> None:
        """Print a line."""
        console.line(line_text)
        sys.stdout.flush()
