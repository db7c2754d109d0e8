"""The processes of one launch, and the messages between them.

Rank 0 gives out jobs: the parts of a feature, or a round to train. All of it is small texts in the launcher's
own key-value store (torch.distributed's, over TCP); results go through files.

Every process gives a sign of life each second, and watches: rank 0 all others, the others rank 0. When one
fails, ends or falls silent, the rest end within seconds, in whatever call they are.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, PlainSerializer

from dataflex_pipeline.errors import DataflexError

BEAT = 1.0
"""Seconds between two signs of life."""
POLL = 0.05
"""Seconds between two looks at the store while waiting."""
GRACE = 3.0
"""Seconds that a process has to end by itself once the launch has failed."""
SILENCE = 300
"""Seconds without a sign of life after which a process counts as dead, unless ddp_timeout is shorter."""
CHUNK = 1 << 22
"""Characters per value of the store, which refuses values of more than 8 MiB."""
Place = Annotated[Path, PlainSerializer(lambda path: str(path.absolute()), return_type=str)]
"""A file or folder that all processes find at the same place; the others are told the whole path."""
AGAIN = "Run the same command again, with any number of processes: finished parts are kept"


class TeamError(DataflexError):
    """Another process of the launch failed; ``code`` is what this one exits with."""

    def __init__(self, what: str, why: str, fix: str, code: int = 1) -> None:
        super().__init__(what, why, fix)
        self.exit_code = code


class Job(BaseModel, ABC, extra="forbid", ser_json_inf_nan="constants"):
    """What rank 0 gives out; its fields travel to the others as JSON."""

    @abstractmethod
    def do(self, team: Team) -> None:
        """Do the share of a process that is not rank 0."""


class Team:
    """This process among those of the launch. Made by `launch.join`, once.

    Args:
        store: torch.distributed.Store, where all of them read and write.
        rank: of this process.
        size: how many there are.
        tell: shows the error of another process where this one cannot end by itself any more.
    """

    def __init__(self, store: Any, rank: int, size: int, tell: Callable[[DataflexError], None]) -> None:
        self.rank, self.size = rank, size
        self.patience = SILENCE
        self._store, self._tell = store, tell
        self._jobs = self._units = 0
        self._trouble: TeamError | None = None
        self._told = False
        self._closed = threading.Event()
        self._seen: dict[int, tuple[int, int]] = {}
        threading.Thread(target=self._watch, name="dataflex-watch", daemon=True).start()

    # -- a job ----------------------------------------------------------------------------------------

    @contextmanager
    def give(self, job: Job, patience: int, look: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Give a job to all others, on rank 0; on leaving, wait until each of them is done with it.

        Args:
            job: what to do.
            patience: ``ddp_timeout`` in seconds.
            look: called meanwhile.

        Raises:
            TeamError: one of them failed.
        """
        self.check()
        self._jobs, self._units = self._jobs + 1, 0
        self.patience = min(patience, SILENCE)
        kind = f"{type(job).__module__}:{type(job).__qualname__}"
        self._put(f"job/{self._jobs}", [kind, self.patience, job.model_dump(mode="json")])
        yield
        while self._count("done") < self.size - 1:
            self.check()
            look()
            time.sleep(POLL)
        self.check()

    def follow(self) -> None:
        """Do the share of this process in each job, until rank 0 says that the command has ended well.

        Raises:
            SystemExit: the command has failed, with its exit code.
            TeamError: rank 0 is gone, or gives out what this program does not know.
        """
        while (job := self._next_job()) is not None:
            job.do(self)
            self._count("done", 1)

    def tickets(self, order: Sequence[int]) -> Iterator[int]:
        """Yield members of ``order`` that no other process has, as long as there are any."""
        while (ticket := self._count("next", 1) - 1) < len(order):
            self.check()
            yield order[ticket]

    def add(self, units: int) -> int:
        """Count units of the job's work as done; return those of all processes since the call before."""
        before, self._units = self._units, self._count("units", units)
        return self._units - before

    def _next_job(self) -> Job | None:
        key = f"job/{self._jobs + 1}"
        while not self._store.check([f"{key}/size"]):
            self.check()
            if self._ended() == 0:
                return None
            time.sleep(POLL)
        self._jobs, self._units = self._jobs + 1, 0
        kind, self.patience, content = self._get(key)
        module, _, name = kind.partition(":")
        try:
            if not module.startswith("dataflex_pipeline.") and module not in sys.modules:
                raise ImportError(f"{module} is no module of this program")  # a message imports no other
            job: Job = getattr(importlib.import_module(module), name).model_validate(content)
        except (ImportError, AttributeError, ValueError) as error:
            raise TeamError(
                f"Rank 0 gives out the job {kind}, which cannot be read here: {error}",
                "The processes run different versions of this program.",
                "Use one environment on all machines.",
                code=2,
            ) from error
        return job

    # -- the end --------------------------------------------------------------------------------------

    def end(self, code: int) -> None:
        """Say that this process ends; rank 0 tells the exit code, and waits a moment until all have left."""
        if self.rank == 0:
            self._put("end", code)
            self._soon(lambda: int(self._store.add("left", 0)) >= self.size - 1)
        self._closed.set()
        with suppress(_store_errors()):  # rank 0 may have held the store and left first
            self._store.add("left", 1)

    def fail(self, error: Exception) -> bool:
        """Report the failure of this process to rank 0; return whether rank 0 has taken notice of it."""
        self._closed.set()
        if error is self._trouble:  # rank 0 is gone
            return False
        if not isinstance(error, DataflexError):
            error = TeamError(
                f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                "This was not expected; the traceback is in the output of that process.",
                f"{AGAIN}.",
            )
        try:
            if not self._store.check(["failed/size"]):
                self._put(
                    "failed", [f"rank {self.rank}: {error.what}", error.why, error.fix, error.exit_code]
                )
            return self._soon(lambda: self._ended() is not None)
        except _store_errors():
            return False

    def has_failed(self) -> bool:
        """Whether something went wrong elsewhere before; a broken connection is then no news."""
        try:
            return self._store.check(["failed/size"]) or bool(self._ended())
        except _store_errors():
            return True

    def check(self) -> None:
        """Raise what has happened to the launch, if something has.

        Raises:
            TeamError: another process failed or fell silent.
            SystemExit: (not on rank 0) the command has failed, with its exit code.
        """
        if self._trouble is not None:
            self._told = True
            raise self._trouble
        code = self._ended() if self.rank else None
        if code:
            raise SystemExit(code)

    def _ended(self) -> int | None:
        return int(self._get("end")) if self._store.check(["end/size"]) else None

    def _soon(self, happened: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 2 * GRACE
        while not happened():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    def _put(self, key: str, value: Any) -> None:
        text = json.dumps(value)
        pieces = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
        for number, piece in enumerate(pieces):
            self._store.set(f"{key}/{number}", piece)
        self._store.set(f"{key}/size", str(len(pieces)))

    def _get(self, key: str) -> Any:
        pieces = int(self._store.get(f"{key}/size"))
        return json.loads(b"".join(self._store.get(f"{key}/{number}") for number in range(pieces)))

    def _count(self, what: str, more: int = 0) -> int:
        """Return a counter of the present job, raised by so many; atomic over all processes."""
        return int(self._store.add(f"work/{self._jobs}/{what}", more))

    # -- signs of life --------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Give signs of life and look for those of the others, until the command ends."""
        while not self._closed.wait(BEAT):
            try:
                self._store.add(f"beat/{self.rank}", 1)
                found = self._look()
            except _store_errors():
                found = TeamError(
                    "The launcher's key-value store cannot be reached any more.",
                    "The launcher or the machine of rank 0 has ended.",
                    f"{AGAIN}.",
                )
            if found is not None and not self._closed.is_set():
                self._trouble = found
                time.sleep(GRACE)
                if not self._closed.is_set():
                    self._exit(found)

    def _look(self) -> TeamError | None:
        if self.rank == 0 and self._store.check(["failed/size"]):
            return TeamError(*self._get("failed"))
        if self.rank and (code := self._ended()):
            self._told = True
            return TeamError("The command has failed.", "Rank 0 says why.", "", code)
        for other in (0,) if self.rank else range(1, self.size):
            count = int(self._store.add(f"beat/{other}", 0))
            last, ticks = self._seen.get(other, (-1, 0))
            # Counted in this process' own seconds: a job that was stopped and continued as a whole is none.
            self._seen[other] = (count, 0 if count != last else ticks + 1)
            if self._seen[other][1] * BEAT > self.patience:
                return TeamError(
                    f"Rank {other} has given no sign of life for {self.patience} s.",
                    "It was stopped, its machine is gone or cannot be reached.",
                    f"{AGAIN} (ddp_timeout sets how long to wait).",
                )
        return None

    def _exit(self, found: TeamError) -> None:
        """End this process from the watching thread: its main one does not come back."""
        if not self._told:
            self._tell(found)
        with suppress(_store_errors()):
            if self.rank == 0:
                self._put("end", found.exit_code)
            else:
                self._store.add("left", 1)
        end_now(found.exit_code)


def end_now(code: int) -> NoReturn:
    """End the process without the clean-up of libraries, which would wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _store_errors() -> type[Exception]:
    import torch.distributed as dist

    error: type[Exception] = dist.DistError
    return error
