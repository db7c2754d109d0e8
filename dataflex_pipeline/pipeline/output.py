"""An output of a run: where it is, what it is made from, how it is made, and what state it is in."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataflex_pipeline import launch
from dataflex_pipeline.errors import CorruptError, RunError, StaleError, UserError
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.store.stale import found_ingredients, is_complete, is_current

StateName = Literal["done", "unfinished", "stale", "damaged", "missing", "unknown"]


@dataclass(frozen=True)
class State:
    """The state of an output.

    Attributes:
        name: done; unfinished (the next command goes on with it); stale (made from other settings); damaged;
            missing; or unknown, where what it is made from cannot be looked at.
        what: the finished output described, the settings that changed, or the reason.
    """

    name: StateName
    what: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.what})" if self.what else self.name


@dataclass(frozen=True)
class Outcome:
    """An output that a command was asked for.

    Attributes:
        stage: the piece of work, for the summary.
        output: where the result is.
        done: False if it was up to date already.
        seconds: spent on it.
        found: one line about the result.
    """

    stage: str
    output: Path
    done: bool
    seconds: float
    found: str


class Output(ABC):
    """One output of a run. Making, checking and reporting it are said here, once.

    Attributes:
        run: that it belongs to.
        label: as `dataflex status` lists it.
        stage: as the summary of a command names the work on it.
        name: as an error names it.
        path: the file or folder.
        made_from: files of the run that it was made from, and is nothing without.
        follows: labels of the outputs that it directly follows from: stale where one of them is.
    """

    follows: tuple[str, ...] = ()

    def __init__(
        self, run: OpenRun, label: str, stage: str, name: str, path: Path, made_from: tuple[Path, ...] = ()
    ) -> None:
        self.run, self.label, self.stage, self.name, self.path = run, label, stage, name, path
        self.made_from = made_from

    def __repr__(self) -> str:
        return f"<{self.label} of {self.run.folder}>"

    @abstractmethod
    def inputs(self) -> Mapping[str, Any]:
        """Return what the present settings would make it from, as it is recorded in the output itself.

        Raises:
            RunError: something that it is made from is not there.
        """

    @abstractmethod
    def write(self) -> None:
        """Make it; finished parts of an unfinished one are kept."""

    @abstractmethod
    def describe(self) -> str:
        """Return one line about the finished output."""

    def check(self) -> None:  # noqa: B027 (most are checked by what they hold)
        """Check a finished output against what was written.

        Raises:
            CorruptError: it is another one, or a file is missing.
        """

    def is_current(self, *, overwrite: bool = False) -> bool:
        """Decide whether it can be kept; see `store.stale.is_current`."""
        return is_current(self.path, self.inputs(), self.name, overwrite=overwrite)

    def make(self) -> Outcome:
        """Make it unless it is there.

        Raises:
            StaleError: it was made from other settings, and nothing is to be overwritten.
        """
        began = time.monotonic()
        current = self.is_current(overwrite=self.run.overwrite)
        if not current:
            self.write()
        return Outcome(self.stage, self.path, not current, time.monotonic() - began, self.describe())

    def state(self) -> State:
        """Return the state; nothing is written."""
        try:
            if found_ingredients(self.path) is None:
                return State("missing")
            if not is_complete(self.path):
                return State("unfinished", "the same command goes on with it")
            self.check()
            for needed in self.made_from:
                if not needed.is_file():
                    gone = f"{shown(needed, self.run.folder)} is gone: it was made from it"
                    return State("stale", gone)
            self.is_current()
            return State("done", self.describe())
        except StaleError as error:
            return State("stale", "; ".join(line.strip() for line in error.what.splitlines()[1:]))
        except CorruptError as error:
            return State("damaged", error.what)
        except RunError as error:
            return State("stale", error.what)
        except UserError as error:
            return State("unknown", error.what)


def note(
    run: OpenRun, stage: str, number: int | str, began: float, *, on_device: bool, **more: object
) -> None:
    """Add a finished stage of a round to the run's history: how many seconds it took, and on how many GPUs.

    Args:
        run: that it belongs to.
        stage: score, select, train or evaluate.
        number: the round; "base" where the base model is evaluated.
        began: `time.monotonic` then.
        on_device: whether a model ran; each process of the launch has one GPU.
        more: goes into the line as it is.
    """
    gpus = 0
    if on_device:
        from dataflex_pipeline.models.base import resolve_device

        gpus = 0 if resolve_device(run.given.device) == "cpu" else launch.world_size()
    run.store.note(stage=stage, round=number, seconds=time.monotonic() - began, gpus=gpus, **more)


def shown(path: Path, below: Path) -> str:
    """Return a path as it is shown: relative to the run folder, which is named once, where it lies in it."""
    return str(path.relative_to(below)) if path.is_relative_to(below) else str(path)
