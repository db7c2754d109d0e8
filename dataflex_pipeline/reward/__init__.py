"""Rewarders, which judge answers: a metric, a reward model, a local judge or one behind an API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dataflex_pipeline.api import Backend


@dataclass(frozen=True)
class Answer:
    """A completion to be judged.

    Attributes:
        key: says which it is, for messages and logs; unique within a table.
        prompt: the conversation as text, without the answer. completion: the answer.
        reference: the target row's own answer; None where it has none.
    """

    key: str
    prompt: str
    completion: str
    reference: str | None


@dataclass(frozen=True)
class Reward:
    """A judgement.

    Attributes:
        value: the reward; None where the answer could not be scored.
        raw: the judge's own words, or None where there are none.
        attempts: how often the backend was asked. seconds: from the first request to the last reply.
        reason: why there is no value.
    """

    value: float | None
    raw: str | None = None
    attempts: int = 1
    seconds: float = 0.0
    reason: str | None = None


class Rewarder(Backend, Protocol):
    """Judges answers."""

    def reward(self, answers: Sequence[Answer], keep: Callable[[int, Reward], None]) -> None:
        """Judge answers in any order.

        Args:
            answers: what to judge.
            keep: is called once per answer, with its position, as soon as its reward is known: what it was
                given is on disk when it returns.
        """
