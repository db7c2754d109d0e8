"""The time of the next request: requests per minute, the budget, pauses that the endpoint asks for."""

from __future__ import annotations

import threading
import time

from dataflex_pipeline.errors import UserError


class BudgetError(UserError):
    """``max_requests`` requests were sent and answers are left.

    Args:
        budget: the setting. left: answers of this part of the table that still have no reward.
        rows_beyond: rows of parts that were not begun.
    """

    def __init__(self, budget: int, left: int, rows_beyond: int = 0) -> None:
        beyond = f", and {rows_beyond} rows beyond this part of the table" if rows_beyond else ""
        super().__init__(
            f"max_requests: {budget} requests were sent. {left} answers are left without a reward{beyond}.",
            "The budget holds for one command, retries included; what has arrived is kept.",
            "Run the same command again to go on with the same budget, or raise max_requests.",
        )
        self.budget, self.left = budget, left


class StoppedError(Exception):
    """The work was called off while a request waited for its turn."""


class Pace:
    """Shared by all threads that send requests.

    Args:
        per_minute: requests that may start per minute, evenly spaced; None: no limit.
        budget: requests in all; None: no limit.
    """

    def __init__(self, per_minute: float | None, budget: int | None) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._budget = budget
        self._lock = threading.Lock()
        self._next = 0.0
        self._sent = 0

    def wait(self, stop: threading.Event) -> None:
        """Return when a request may be sent, which counts as sent.

        Raises:
            BudgetError: it would be one too many. StoppedError: ``stop`` was set meanwhile.
        """
        while not stop.is_set():
            with self._lock:
                if self._budget is not None and self._sent >= self._budget:
                    raise BudgetError(self._budget, 0)
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._interval
                    self._sent += 1
                    return
                delay = self._next - now
            stop.wait(delay)
        raise StoppedError

    def pause(self, seconds: float) -> None:
        """Let no request start for a while: the endpoint said so."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)
