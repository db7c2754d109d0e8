"""A judge behind any OpenAI-compatible chat endpoint: concurrent, patient, and never asked twice.

Each reply is kept as soon as it is there. A failure that another attempt may cure is tried again after a wait
drawn below a bound that doubles (full jitter), or after what Retry-After says; then no other request starts
either. A final failure stops the work when the requests under way have come back and are kept.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Self

import tenacity

from dataflex_pipeline import launch
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.reward import Answer, Reward
from dataflex_pipeline.reward.address import PLACE
from dataflex_pipeline.reward.endpoint import REFUSED, Endpoint, EndpointError, TransientError
from dataflex_pipeline.reward.judge_prompts import judge_messages
from dataflex_pipeline.reward.judge_replies import parse_score
from dataflex_pipeline.reward.pace import BudgetError, Pace, StoppedError
from dataflex_pipeline.reward.settings import ApiSettings

LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0
"""Seconds; an endpoint that asks for more ends the command instead."""

Keep = Callable[[int, Reward], None]


def read_key(settings: ApiSettings) -> str | None:
    """Return the key that the environment holds; None where the endpoint takes none.

    Raises:
        ConfigError: the variable is not set, or holds what no key is made of.
    """
    name = settings.api_key
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key:
        raise ConfigError(
            f"{PLACE}.api.api_key: {name} names an environment variable that is not set.",
            "The endpoint would refuse every request.",
            f"export {name}=... in the shell that starts the command; or set api_key: null if the endpoint "
            "takes no key.",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"The environment variable {name} ({PLACE}.api.api_key) holds spaces, line ends or letters that "
            "a key does not have (not shown).",
            "It cannot be sent in a header.",
            "Set it again, without quotation marks or a line end inside.",
        )
    return key


def own_budget(settings: ApiSettings) -> int | None:
    """Return how many requests this process may send: an equal share of ``max_requests``; None: any number.

    Raises:
        ConfigError: there is not one request for each process of the launch.
    """
    budget, world = settings.max_requests, launch.world_size()
    if budget is None:
        return None
    if budget < world:
        raise ConfigError(
            f"{PLACE}.api.max_requests: {budget} was set, and {world} processes were started.",
            "The processes share the budget, and each needs at least one request to get on.",
            f"Set max_requests to {world} or more, or start fewer processes.",
        )
    return budget // world


class ApiRewarder:
    """Judges answers over HTTP.

    Args:
        settings: the endpoint and how it is asked. config: the run's (not needed). say: prints one line.
    """

    def __init__(self, settings: ApiSettings, config: Any, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.say = say
        self.budget = own_budget(settings)
        self.pace = Pace(settings.requests_per_minute, self.budget)

    def __enter__(self) -> Self:
        self.endpoint = Endpoint(self.settings, read_key(self.settings))
        self.endpoint.__enter__()
        if self.budget is not None and launch.world_size() > 1:
            self.say(
                f"max_requests: {self.settings.max_requests} is shared by {launch.world_size()} processes: "
                f"each sends at most {self.budget}"
            )
        return self

    def __exit__(self, *error: object) -> None:
        self.endpoint.__exit__(*error)

    def reward(self, answers: Sequence[Answer], keep: Keep) -> None:
        """Judge answers, several at a time, in any order.

        Raises:
            EndpointError: the endpoint finally failed. BudgetError: ``max_requests`` were sent. Every reply
                that had arrived, and those under way, are kept first.
        """
        kept = 0
        lock = threading.Lock()
        stop = threading.Event()

        def commit(position: int, reward: Reward) -> None:
            nonlocal kept
            with lock:
                keep(position, reward)
                kept += 1

        def judge(position: int) -> None:
            try:
                commit(position, self._judge(answers[position], stop))
            except BaseException:
                stop.set()  # here, so that this thread does not take up another answer before it is heard of
                raise

        try:
            self._run(judge, len(answers), stop)
        except BudgetError as spent:
            raise BudgetError(spent.budget, len(answers) - kept) from None

    def _run(self, judge: Callable[[int], None], n_answers: int, stop: threading.Event) -> None:
        """Call ``judge`` for every position; raise what stopped the work when all have returned."""
        pool = ThreadPoolExecutor(self.settings.max_concurrency, "reward")
        try:
            for future in as_completed([pool.submit(judge, position) for position in range(n_answers)]):
                with contextlib.suppress(StoppedError):  # another thread's failure is the reason, and follows
                    future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _judge(self, answer: Answer, stop: threading.Event) -> Reward:
        """Ask for one score, trying again what may pass."""
        body = self._body(answer)
        attempts = 0
        began: float | None = None

        def once() -> str:
            nonlocal attempts, began
            self.pace.wait(stop)
            attempts += 1
            began = time.monotonic() if began is None else began
            try:
                return self.endpoint.ask(body)
            except TransientError as trouble:
                self._heed(trouble)
                raise

        try:
            reply = self._retrying(stop)(once)
            value, reason = parse_score(reply, self.settings.max_score)
        except TransientError as trouble:
            if stop.is_set():
                raise StoppedError from trouble
            raise self.endpoint.failed(trouble, attempts) from trouble
        except EndpointError as error:
            if not (self.settings.skip_refused and error.status in REFUSED):
                raise
            reply, value, reason = None, None, f"the endpoint refused it with status {error.status}"
        return Reward(value, reply, attempts, time.monotonic() - (began or time.monotonic()), reason)

    def _retrying(self, stop: threading.Event) -> tenacity.Retrying:
        jitter = tenacity.wait_random_exponential(multiplier=self.settings.backoff, max=LONGEST_WAIT)

        def wait(state: tenacity.RetryCallState) -> float:
            trouble = state.outcome.exception() if state.outcome is not None else None
            asked = trouble.retry_after if isinstance(trouble, TransientError) else None
            return jitter(state) if asked is None else asked

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            wait=wait,
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self.settings.max_retries + 1),
                tenacity.stop_when_event_set(stop),
            ),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )

    def _heed(self, trouble: TransientError) -> None:
        """Let the other requests wait too where the endpoint says how long, or end where that is too long."""
        if trouble.retry_after is None:
            return
        if trouble.retry_after > LONGEST_RETRY_AFTER:
            raise self.endpoint.too_late(trouble, LONGEST_RETRY_AFTER) from trouble
        self.pace.pause(trouble.retry_after)

    def _body(self, answer: Answer) -> dict[str, Any]:
        settings = self.settings
        body: dict[str, Any] = {
            "model": settings.model_name,
            "messages": judge_messages(answer, settings),
        }
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        if settings.max_tokens is not None:
            body["max_tokens"] = settings.max_tokens
        if settings.structured_output:
            body["response_format"] = response_format(settings.max_score)
        return body


def response_format(max_score: float) -> dict[str, Any]:
    """Return what constrains a reply to {"score": number}; its range is checked when it is read."""
    schema = {
        "type": "object",
        "properties": {"score": {"type": "number", "description": f"from 0 to {max_score:g}"}},
        "required": ["score"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "score", "strict": True, "schema": schema}}
