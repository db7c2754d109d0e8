"""The processes of one launch, and the messages between them.

Rank 0 gives out jobs: a share of a feature's parts, or a round to train. All of it is small texts in the
launcher's own key-value store (torch.distributed's, over TCP); results go through files.

Every process gives a sign of life each second, and watches: rank 0 all others, the others rank 0. When one
fails, ends or falls silent, the rest end within seconds, in whatever call they are.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

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


class TeamError(DataflexError):
    """Another process of the launch failed; ``code`` is what this one exits with."""

    def __init__(self, what: str, why: str, fix: str, code: int = 1) -> None:
        super().__init__(what, why, fix)
        self.exit_code = code


class Team:
    """This process among those of the launch. Made by `join`, once.

    Args:
        store: torch.distributed.Store, where all of them read and write.
        rank, size: of this process, and how many there are.
        tell: shows the error of another process where this one cannot end by itself any more.
    """

    def __init__(self, store: Any, rank: int, size: int, tell: Callable[[DataflexError], None]) -> None:
        self.rank, self.size = rank, size
        self.patience = SILENCE
        self._store, self._tell = store, tell
        self._jobs = 0
        self._trouble: TeamError | None = None
        self._told = False
        self._closed = threading.Event()
        self._seen: dict[int, tuple[int, int]] = {}
        threading.Thread(target=self._watch, name="dataflex-watch", daemon=True).start()

    # -- rank 0 ---------------------------------------------------------------------------------------

    @contextmanager
    def job(self, kind: str, content: Mapping[str, Any], patience: int) -> Iterator[Job]:
        """Give a job to all others; on leaving, wait until each of them is done with it.

        Args:
            kind, content: what to do, as plain values. patience: ``ddp_timeout`` in seconds.
        """
        self.check()
        self._jobs += 1
        self.patience = min(patience, SILENCE)
        self._put(f"job/{self._jobs}", {"do": kind, "patience": self.patience, **content})
        given = Job(self, self._jobs)
        yield given
        given.finish()

    def dismiss(self, code: int) -> None:
        """Tell the others that the command has ended, and wait a moment until they have left."""
        self._put("end", code)
        deadline = time.monotonic() + 2 * GRACE
        while self._count("left", 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(POLL)
        self._closed.set()

    # -- the others -----------------------------------------------------------------------------------

    def next_job(self) -> tuple[Job, dict[str, Any]] | None:
        """Wait for a job; None when the command has ended well.

        Raises:
            SystemExit: the command has failed, with its exit code.
            TeamError: rank 0 is gone.
        """
        key = f"job/{self._jobs + 1}"
        while not self._store.check([f"{key}/size"]):
            self.check()
            if self._ended() == 0:
                return None
            time.sleep(POLL)
        self._jobs += 1
        content = self._get(key)
        self.patience = content["patience"]
        return Job(self, self._jobs), content

    def fail(self, error: BaseException) -> bool:
        """Report the failure of this process to rank 0; return whether rank 0 has taken notice of it."""
        self._closed.set()
        if error is self._trouble:  # rank 0 is gone
            return False
        if isinstance(error, DataflexError):
            parts = {"what": error.what, "why": error.why, "fix": error.fix, "code": error.exit_code}
        else:
            lines = str(error).splitlines() or [""]
            parts = {
                "what": f"{type(error).__name__}: {lines[0]}",
                "why": "This was not expected; the traceback is in the output of that process.",
                "fix": "Run the same command again, with any number of processes: finished parts are kept.",
                "code": 1,
            }
        try:
            if not self._store.check(["failed/size"]):
                self._put("failed", {"rank": self.rank, **parts})
            deadline = time.monotonic() + 2 * GRACE
            while self._ended() is None and time.monotonic() < deadline:
                time.sleep(POLL)
            return self._ended() is not None
        except _store_errors():
            return False

    def has_failed(self) -> bool:
        """Whether something went wrong elsewhere before; a broken connection is then no news."""
        try:
            return self._store.check(["failed/size"]) or bool(self._ended())
        except _store_errors():
            return True

    def leave(self) -> None:
        """Say that this process ends."""
        self._closed.set()
        with suppress(_store_errors()):  # rank 0 may have held the store and left first
            self._count("left", 1)

    # -- all ------------------------------------------------------------------------------------------

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

    def _put(self, key: str, value: Any) -> None:
        text = json.dumps(value)
        pieces = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
        for number, piece in enumerate(pieces):
            self._store.set(f"{key}/{number}", piece)
        self._store.set(f"{key}/size", str(len(pieces)))

    def _get(self, key: str) -> Any:
        pieces = int(self._store.get(f"{key}/size"))
        return json.loads(b"".join(self._store.get(f"{key}/{number}") for number in range(pieces)))

    def _count(self, key: str, more: int) -> int:
        return int(self._store.add(key, more))

    def _watch(self) -> None:
        """Give signs of life and look for those of the others, until the command ends."""
        watched = range(1, self.size) if self.rank == 0 else (0,)
        while not self._closed.wait(BEAT):
            try:
                self._count(f"beat/{self.rank}", 1)
                found = self._look(watched)
            except _store_errors():
                found = TeamError(
                    "The launcher's key-value store cannot be reached any more.",
                    "The launcher or the machine of rank 0 has ended.",
                    "Run the same command again, with any number of processes: finished parts are kept.",
                )
            if found is not None and not self._closed.is_set():
                self._trouble = found
                time.sleep(GRACE)
                if not self._closed.is_set():
                    self._exit(found)

    def _look(self, watched: Sequence[int]) -> TeamError | None:
        if self.rank == 0 and self._store.check(["failed/size"]):
            failed = self._get("failed")
            what = f"rank {failed['rank']}: {failed['what']}"
            return TeamError(what, failed["why"], failed["fix"], failed["code"])
        if self.rank and (code := self._ended()):
            self._told = True
            return TeamError("The command has failed.", "Rank 0 says why.", "", code)
        for other in watched:
            count = self._count(f"beat/{other}", 0)
            last, ticks = self._seen.get(other, (-1, 0))
            # Counted in this process' own seconds: a job that was stopped and continued as a whole is none.
            self._seen[other] = (count, 0 if count != last else ticks + 1)
            if self._seen[other][1] * BEAT > self.patience:
                return TeamError(
                    f"Rank {other} has given no sign of life for {self.patience} s.",
                    "It was stopped, its machine is gone or cannot be reached.",
                    "Run the same command again, with any number of processes: finished parts are kept "
                    "(ddp_timeout sets how long to wait).",
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
                self._count("left", 1)
        end_now(found.exit_code)


class Job:
    """One job that all processes work on, each taking the next ticket when it is free.

    Args:
        team: the processes. number: of the job, from 1.
    """

    def __init__(self, team: Team, number: int) -> None:
        self._team = team
        self._key = f"work/{number}"

    def tickets(self, order: Sequence[int]) -> Iterator[int]:
        """Yield members of ``order`` that no other process has, as long as there are any."""
        while (ticket := self._team._count(f"{self._key}/next", 1) - 1) < len(order):
            self._team.check()
            yield order[ticket]

    def add(self, units: int) -> int:
        """Count units of work as done, for the progress; return those of all processes."""
        return self._team._count(f"{self._key}/units", units)

    def done(self) -> None:
        """Say that this process has nothing more to do."""
        self._team._count(f"{self._key}/done", 1)

    def finish(self, look: Callable[[], object] = lambda: None) -> None:
        """On rank 0: wait until all others are done, calling ``look`` meanwhile.

        Raises:
            TeamError: one of them failed.
        """
        while self._team._count(f"{self._key}/done", 0) < self._team.size - 1:
            self._team.check()
            look()
            time.sleep(POLL)
        self._team.check()


def end_now(code: int) -> NoReturn:
    """End the process without the clean-up of libraries, which would wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _store_errors() -> type[Exception]:
    import torch.distributed as dist

    error: type[Exception] = dist.DistError
    return error
