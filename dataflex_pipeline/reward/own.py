"""Rewarders of the user's own: a class in a file or an installed module, with its settings."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import new_class
from typing import Any, ClassVar, Self, cast

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.own_code import in_one_line, load_source
from dataflex_pipeline.reward import Answer, Reward, Rewarder
from dataflex_pipeline.reward.settings import Settings
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
        return super().identity(config) | {"class": self.backend, "file": file_digest(self.source)}

    def rewarder(self, config: Any, say: Callable[[str], None]) -> Rewarder:
        """Make an object of the class."""
        return self.made(self, config, say)

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
            module = importlib.import_module(place)
    except Exception as error:  # any error of the user's own module, told without a traceback
        raise _unusable(backend, f"{place} cannot be imported: {in_one_line(error)}.") from error
    kind = getattr(module, name, None)
    if not (
        isinstance(kind, type) and issubclass(kind, OwnRewarder) and issubclass(kind.Settings, OwnSettings)
    ):
        raise _unusable(backend, f"{place} has no class {name} that is an OwnRewarder with OwnSettings.")
    if inspect.isabstract(kind):
        raise _unusable(backend, f"{name} has no method reward(answers, keep).")
    given = {
        "made": kind,
        "source": Path(inspect.getfile(kind)),
        "backend": name,
        "__module__": kind.__module__,
    }
    made = new_class("Settings", (kind.Settings,), {}, lambda names: names.update(given))
    return cast("type[Settings]", made)


def _unusable(backend: str, why: str) -> ConfigError:
    return ConfigError(
        f"nice.reward_model_backend: {backend} cannot be used.",
        why,
        "Give path/to/file.py:Class (from the current folder) or module:Class, a class that inherits from "
        "dataflex_pipeline.reward.own.OwnRewarder.",
    )
