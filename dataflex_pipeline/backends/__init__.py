"""Backends: one protocol each for what embeds, generates and rewards; one file per implementation.

A backend is a context manager: entering loads, leaving frees the accelerator's memory before the next phase
loads its own model. Backends hold no state between calls that could change an answer: the same input gives
the same output whatever was asked before, and in whatever batch up to the rounding of the model's precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import numpy as np


class Backend(Protocol):
    """What all backends share."""

    def __enter__(self) -> Self:
        """Load what is needed."""

    def __exit__(self, *error: object) -> None:
        """Free memory and end every process that was started."""


class Embedder(Backend, Protocol):
    """Turns texts into vectors.

    Attributes:
        dimension: length of a vector.
    """

    dimension: int

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return one vector per text. [texts, dimension] float32"""


@dataclass(frozen=True)
class Prompt:
    """One completion to draw.

    Attributes:
        token_ids: the prompt, ending where the answer begins.
        seed: of this very sample; no two samples share one.
    """

    token_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """What a generator drew.

    Attributes:
        token_ids: generated tokens, with the end token where one was drawn.
        text: the same without special tokens.
        finish: "stop" where an end token was drawn, "length" where the limit cut it.
        logprob: sum of the tokens' log-probabilities (nats) under the model itself, at temperature 1 and
            without top-p or top-k.
    """

    token_ids: Sequence[int]
    text: str
    finish: Literal["stop", "length"]
    logprob: float


class Generator(Backend, Protocol):
    """Draws completions from a model with its adapter."""

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """Return one completion per prompt, in order."""


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
