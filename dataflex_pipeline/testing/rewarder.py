"""The contract of a rewarder: what its tests inherit to show that it can be relied on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import ConfigError, DataflexError
from dataflex_pipeline.reward import Answer, Reward, Rewarder
from dataflex_pipeline.reward.own import OWN
from dataflex_pipeline.reward.rewarders import SHIPPED, read_settings
from dataflex_pipeline.reward.settings import Settings

ANSWERS = (
    Answer("row 0, sample 0", "What is 6 x 7?", "It is 42.", "42"),
    Answer("row 0, sample 1", "What is 6 x 7?", "I do not know.", "42"),
    Answer("row 1, sample 0", "Name a colour.", "blue", "blue"),
    Answer("row 2, sample 0", "Say nothing.", "", "nothing"),
    Answer("row 3, sample 0", "No reference here.", "Whatever.", None),
    Answer("row 4, sample 0", "", "\x00 \u202e 得分 {score}\n" * 20, "得分"),
)
"""Answers of every kind: right, wrong, empty, without a reference, odd characters."""


class RewarderContract:
    """Tests that every rewarder passes; a subclass whose name begins with Test says which it is.

    Attributes:
        backend: as ``reward_model_backend`` names it.
        settings: its settings, by name.
        answers: what is judged; the shipped ones are of every kind.
        environment: variables that hold secrets it uses, with made-up values; they may show nowhere.
    """

    backend: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]] = {}
    answers: ClassVar[Sequence[Answer]] = ANSWERS
    environment: ClassVar[Mapping[str, str]] = {}

    def chosen(self, **more: Any) -> Settings:
        """Return the checked settings, with more over them."""
        place = self.backend if self.backend in SHIPPED else OWN
        return read_settings(self.backend, {place: dict(self.settings) | more})

    @contextmanager
    def rewarder(self, say: Callable[[str], None]) -> Iterator[Rewarder]:
        """Yield the rewarder, entered, its secrets in the environment."""
        with mock.patch.dict(os.environ, self.environment):
            chosen = self.chosen()
            chosen.check()
            with chosen.rewarder(Config(), say) as made:
                yield made

    def judged(self, *batches: Sequence[Answer]) -> list[dict[str, Reward]]:
        """Return the rewards by key of each batch, judged one after the other by one rewarder."""
        made: list[dict[str, Reward]] = []
        with self.rewarder(lambda line: None) as rewarder:
            for batch in batches:
                kept: dict[str, Reward] = {}
                rewarder.reward(batch, lambda at, reward, b=batch, k=kept: k.update({b[at].key: reward}))  # type: ignore[misc]
                made.append(kept)
        return made

    def test_every_answer_is_kept_exactly_once(self) -> None:
        """No position is left out, given twice or made up."""
        kept: list[int] = []
        with self.rewarder(lambda line: None) as rewarder:
            rewarder.reward(self.answers, lambda position, reward: kept.append(position))
        assert sorted(kept) == list(range(len(self.answers)))

    def test_no_answers_are_no_trouble(self) -> None:
        """An empty part is judged without a word."""
        assert self.judged(()) == [{}]

    def test_a_reward_is_a_number_or_has_a_reason(self) -> None:
        """Either a finite value or words why there is none."""
        for reward in self.judged(self.answers)[0].values():
            assert isinstance(reward, Reward)
            assert (reward.value is None) == bool(reward.reason)
            assert reward.value is None or abs(float(reward.value)) < float("inf")

    def test_the_same_answer_earns_the_same_reward(self) -> None:
        """Whatever was judged before, in whatever order and company, up to rounding."""
        alone = [[answer] for answer in self.answers]
        first, backwards, *single = self.judged(self.answers, self.answers[::-1], *alone)
        again = self.judged(self.answers)[0]
        for answer, one in zip(self.answers, single, strict=True):
            wanted = first[answer.key].value
            for found in (backwards[answer.key], again[answer.key], one[answer.key]):
                assert (found.value is None) == (wanted is None)
                assert wanted is None or found.value is None or abs(found.value - wanted) <= 1e-5

    def test_the_identity_is_plain_and_stays(self) -> None:
        """What goes into the fingerprint is JSON and the same each time."""
        with mock.patch.dict(os.environ, self.environment):
            one, two = (json.dumps(self.chosen().identity(Config()), sort_keys=True) for _ in range(2))
            assert one == two
            assert self.chosen().subject

    def test_an_unknown_setting_is_refused_in_three_parts(self) -> None:
        """What was set, why it cannot work, what to do."""
        try:
            self.chosen(no_such_setting=1)
        except ConfigError as error:
            assert "no_such_setting" in error.what
            assert error.why
            assert error.fix
        else:
            raise AssertionError("a setting that does not exist was taken")

    def test_no_secret_is_shown(self) -> None:
        """Neither in rewards, lines, identity nor errors."""
        shown: list[str] = []
        try:
            with self.rewarder(shown.append) as rewarder:
                rewarder.reward(self.answers, lambda position, reward: shown.append(repr(reward)))
                shown += [json.dumps(self.chosen().identity(Config())), self.chosen().subject]
        except DataflexError as error:
            shown.append(str(error))
        for secret in self.environment.values():
            assert not any(secret in text for text in shown)
