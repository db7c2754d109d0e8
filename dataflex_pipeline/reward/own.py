"""Rewarders of the user's own: a class in a file or an installed module, with its settings."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from numbers import Real
from pathlib import Path
from types import new_class
from typing import Any, ClassVar, Self, cast

import numpy as np

from dataflex_pipeline.declared import broken, check_flags, check_functions, check_params, check_plain, shown
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.own_code import in_one_line, load_module, load_source
from dataflex_pipeline.reward import Answer, Reward, Rewarder
from dataflex_pipeline.reward.settings import RewardCost, Settings
from dataflex_pipeline.store.fingerprint import file_digest

OWN = "settings"
"""Where the settings of such a rewarder stand below ``reward_backend_params``."""


class OwnSettings(Settings):
    """The settings of a rewarder of the user's own; its fields are declared in a class ``Settings`` there.

    Attributes:
        made: the rewarder's class.
        source: the file that holds it.
    """

    made: ClassVar[type[OwnRewarder]]
    source: ClassVar[Path]

    @property
    def subject(self) -> str:
        """The name of the file."""
        return self.source.name

    def identity(self, config: Any) -> dict[str, Any]:
        """Return the settings and the content of the file."""
        check_plain(self.made, self, Settings, "Settings")
        return super().identity(config) | {"class": self.backend, "file": file_digest(self.source)}

    def rewarder(self, config: Any, say: Callable[[str], None]) -> Rewarder:
        """Make an object of the class; what it gives is looked at."""
        return _Checked(self.made(self, config, say))

    def check(self) -> None:
        """Ask the rewarder whether it can be used."""
        self.made(self, None, lambda line: None).check()


class OwnRewarder(ABC):
    """What a rewarder of one's own subclasses; ``reward`` is all that it has to have.

    Its class ``Settings`` may declare pydantic fields and set ``in_words`` and ``paid``.

    Args:
        settings: its settings, checked.
        config: the run's, for device and precision; None where only ``check`` is called.
        say: prints one line.
    """

    class Settings(OwnSettings):
        """No settings."""

    def __init__(self, settings: Any, config: Any, say: Callable[[str], None]) -> None:
        self.settings, self.config, self.say = settings, config, say

    def check(self) -> None:  # noqa: B027 (a rewarder that needs nothing has nothing to check)
        """Check what is needed beside the settings, without loading anything.

        Raises:
            UserError: it is not there, or cannot be used.
        """

    def __enter__(self) -> Self:
        """Load what is needed."""
        return self

    def __exit__(self, *error: object) -> None:
        """Free memory and end every process that was started."""
        return

    @abstractmethod
    def reward(self, answers: Sequence[Answer], keep: Callable[[int, Reward], None]) -> None:
        """Judge answers in any order.

        Args:
            answers: what to judge.
            keep: is called once per answer, with its position, as soon as its reward is known.
        """


class _Checked:
    """A rewarder of the user's own, held to what every rewarder promises.

    Args:
        made: it.
    """

    def __init__(self, made: OwnRewarder) -> None:
        self._made = made

    def __enter__(self) -> Self:
        entered: Any = self._made.__enter__()
        if not isinstance(entered, OwnRewarder):
            raise broken(self._made, "__enter__()", f"returns {shown(entered)}", "It returns self.")
        self._made = entered
        return self

    def __exit__(self, *error: Any) -> None:
        self._made.__exit__(*error)

    def reward(self, answers: Sequence[Answer], keep: Callable[[int, Reward], None]) -> None:
        """Judge answers; each is kept once, as a number or with the reason why there is none."""
        kept: set[int] = set()
        said = (
            "It calls keep(position, reward) once for each answer: a finite number, or None and the reason."
        )

        def checked(position: int, reward: Reward) -> None:
            wrong = _wrong_position(position, kept, len(answers)) or _wrong_reward(reward)
            if wrong is not None:
                raise broken(self._made, "reward()", f"calls keep with {wrong}", said)
            kept.add(position)
            value = reward.value
            keep(position, reward if value is None else replace(reward, value=float(value)))

        self._made.reward(answers, checked)
        if len(kept) < len(answers):
            first = next(each.key for place, each in enumerate(answers) if place not in kept)
            lacking = f"keeps {len(kept)} rewards of {len(answers)}: that of {first} is missing"
            raise broken(self._made, "reward()", lacking, said)


def _wrong_position(position: Any, kept: Collection[int], n_answers: int) -> str | None:
    whole = isinstance(position, int | np.integer) and not isinstance(position, bool)
    if not whole or not 0 <= position < n_answers:
        return f"the position {shown(position)} of {n_answers} answers"
    return f"the position {position} twice" if position in kept else None


def _wrong_reward(reward: Any) -> str | None:
    """Return what is wrong with a reward; None where nothing is."""
    if not isinstance(reward, Reward):
        return f"{shown(reward)}, which is no dataflex_pipeline.reward.Reward"
    value, texts = reward.value, (reward.raw, reward.reason)
    if not all(text is None or isinstance(text, str) for text in texts):
        return f"raw or reason that is no text: {shown(reward)}"
    if not isinstance(reward.attempts, int) or not isinstance(reward.seconds, int | float):
        return f"attempts or seconds that are no numbers: {shown(reward)}"
    if value is None:
        return None if reward.reason else "neither a value nor a reason"
    if not isinstance(value, Real) or not math.isfinite(value):
        return f"the value {shown(value)}"
    return "a value and a reason why there is none" if reward.reason else None


def load_settings(backend: str) -> type[Settings]:
    """Return the settings class of a rewarder of the user's own.

    Args:
        backend: ``file.py:Class`` (from the current folder) or ``module:Class``.

    Raises:
        ConfigError: there is no such class, or it cannot be used.
    """
    place, _, name = backend.rpartition(":")
    try:
        if place.endswith(".py"):
            module = load_source(f"dataflex_rewarder_{Path(place).stem}", Path(place))
        else:
            module = load_module(place)
    except Exception as error:  # any error of the user's own module, told without a traceback
        raise _unusable(backend, f"{place} cannot be imported: {in_one_line(error)}.") from error
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, OwnRewarder)):
        raise _unusable(backend, f"{place} has no class {name} that is an OwnRewarder.")
    if inspect.isabstract(kind):
        raise _unusable(backend, f"{name} has no method reward(answers, keep).")
    check_functions(kind, OwnRewarder)
    check_params(kind, OwnSettings, "Settings")
    check_functions(kind.Settings, Settings)
    check_flags(kind.Settings, "in_words", "paid")
    held = {
        name: _held(name, getattr(kind.Settings, name))
        for name in RETURNED
        if getattr(kind.Settings, name) is not getattr(OwnSettings, name)
    }
    given = held | {
        "made": kind,
        "source": Path(inspect.getfile(kind)),
        "backend": name,
        "__module__": kind.__module__,
    }
    made = new_class("Settings", (kind.Settings,), {}, lambda names: names.update(given))
    return cast("type[Settings]", made)


def _is_rewarder(found: Any) -> bool:
    return all(callable(getattr(type(found), name, None)) for name in ("__enter__", "__exit__", "reward"))


RETURNED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "rewarder": (_is_rewarder, "It returns a rewarder: an object of the class, or what super() returns."),
    "cost": (lambda found: isinstance(found, RewardCost), "It returns a RewardCost, with a note."),
    "reach": (
        lambda found: isinstance(found, list | tuple) and all(isinstance(line, str) for line in found),
        "It returns a sequence of sentences, an empty one where nothing is doubtful.",
    ),
}
"""Functions that a class Settings may bring -> what tells a sound result, and what it is."""


def _held(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the user's own settings whose result is looked at."""
    is_sound, said = RETURNED[name]

    @wraps(function)
    def held(self: OwnSettings, *given: Any) -> Any:
        found = function(self, *given)
        if not is_sound(found):
            raise broken(self.made, f"Settings.{name}()", f"returns {shown(found)}", said)
        return _Checked(found) if isinstance(found, OwnRewarder) else found

    return held


def _unusable(backend: str, why: str) -> ConfigError:
    return ConfigError(
        f"nice.reward_model_backend: {backend} cannot be used.",
        why,
        "Give path/to/file.py:Class (from the current folder) or module:Class, a class that inherits from "
        "dataflex_pipeline.reward.own.OwnRewarder.",
    )
