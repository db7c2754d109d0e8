"""Rewards that are functions of (prompt, completion, reference), shipped or the user's own.

``module:function`` (an installed module) or ``file.py:function`` (a file, from the current folder) names a
function of the user's own that returns a number, or None for unscored.
"""

from __future__ import annotations

import importlib.util
import math
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from dataflex_pipeline.declared import shown, wrong_call, wrong_kind
from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.own_code import in_one_line, load_module, load_source, own_place
from dataflex_pipeline.reward import Answer, Reward
from dataflex_pipeline.reward.address import PLACE
from dataflex_pipeline.reward.metric_functions import (
    NEEDS_NO_REFERENCE,
    Metric,
    check_shipped,
    shipped_metric,
)
from dataflex_pipeline.reward.settings import MetricSettings
from dataflex_pipeline.store.fingerprint import file_digest


def source_digest(name: str) -> str | None:
    """Return the digest of the file that holds a function of the user's own; None for a shipped metric.

    Raises:
        ConfigError: there is no such metric, or no such file or module.
    """
    if ":" not in name:
        check_shipped(name)
        return None
    module, _ = _split(name)
    found = _own_file(name, module)
    return None if found is None else file_digest(found)


def _split(name: str) -> tuple[str, str]:
    module, _, function = name.rpartition(":")
    if not module or not function.isidentifier():
        raise ConfigError(
            f"{PLACE}.metric.name: {name} cannot be used.",
            "A function of your own is named module:function, or file.py:function.",
            "Correct the name.",
        )
    return module, function


def _own_file(name: str, module: str) -> Path | None:
    """Return the file of a module; None for one that has no file of its own (built in, namespace)."""
    if module.endswith(".py"):
        path = Path(module)
        if not path.is_file():
            raise _not_found(name, f"There is no file {module} (paths start at the current folder).")
        return path
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise _not_found(name, f"The module {module} cannot be found: {error}.") from error
    if spec is None:
        raise _not_found(name, f"There is no installed module {module}.")
    return Path(spec.origin) if spec.origin is not None and Path(spec.origin).is_file() else None


def _not_found(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"{PLACE}.metric.name: {name} cannot be used.",
        why,
        "Correct the name; a file is given as path/to/file.py:function, a module has to be installed.",
    )


def _own_function(name: str) -> Metric:
    module, function = _split(name)
    file = _own_file(name, module)
    try:
        if module.endswith(".py") and file:
            found = load_source(f"dataflex_metric_{file.stem}", file)
        else:
            found = load_module(module)
    except Exception as error:  # any error of the user's own module, told without a traceback
        raise _not_found(name, f"{module} cannot be imported: {in_one_line(error)}.") from error
    metric: Metric | None = getattr(found, function, None)
    if not callable(metric):
        raise _not_found(name, f"{module} has no function {function}.")
    is_odd = wrong_kind(metric)
    wrong = wrong_call(metric, ("prompt", "completion", "reference")) if is_odd is None else f"is {is_odd}"
    if wrong is not None:
        raise ConfigError(
            f"{PLACE}.metric.name: {name} cannot be used: {function} {wrong}.",
            f"It is called as {function}(prompt, completion, reference), and returns a number or None.",
            "Correct the function.",
        )
    return metric


class MetricRewarder:
    """Judges answers by a metric, one after the other."""

    def __init__(self, settings: MetricSettings, config: Any, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.metric = _own_function(settings.name) if ":" in settings.name else shipped_metric(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def reward(self, answers: Sequence[Answer], keep: Callable[[int, Reward], None]) -> None:
        """Judge answers in order."""
        for position, answer in enumerate(answers):
            began = time.monotonic()
            value, reason = self._score(answer)
            keep(position, Reward(value, None, 1, time.monotonic() - began, reason))

    def _score(self, answer: Answer) -> tuple[float | None, str | None]:
        try:
            value = self.metric(answer.prompt, answer.completion, answer.reference)
        except Exception as error:  # the user's own function may raise anything; it ends here, with its place
            place = own_place(error) or traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"The metric {self.settings.name} failed on {answer.key}: {in_one_line(error)}",
                f"It happened in line {place.lineno} of {Path(place.filename).name} ({place.name}).",
                "Correct the function; it may return None for an answer that it cannot score.",
            ) from error
        if value is None:
            missing = answer.reference is None and self.settings.name not in NEEDS_NO_REFERENCE
            return None, "the row has no reference answer" if missing else "the metric gave no score"
        return self._checked(answer, value)

    def _checked(self, answer: Answer, value: object) -> tuple[float | None, str | None]:
        try:
            if isinstance(value, str | bytes):
                raise TypeError("a text is no number")
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"The metric {self.settings.name} returned {shown(value)} for {answer.key}.",
                "A reward is a number, or None for an answer that cannot be scored.",
                "Correct the function.",
            ) from error
        return (number, None) if math.isfinite(number) else (None, "the metric's value is not finite")
