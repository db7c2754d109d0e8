"""Generators, which draw completions from a model with its adapter; one file per implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from dataflex_pipeline.api import Backend


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
