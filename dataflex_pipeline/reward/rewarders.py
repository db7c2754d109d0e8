"""The choice of a rewarder, shipped or the user's own, and the check of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dataflex_pipeline.config.explain import explain
from dataflex_pipeline.errors import ConfigError, did_you_mean
from dataflex_pipeline.reward.address import PLACE
from dataflex_pipeline.reward.own import OWN, load_settings
from dataflex_pipeline.reward.settings import (
    ApiSettings,
    LocalVllmSettings,
    MetricSettings,
    RewardModelSettings,
    Settings,
)

SHIPPED: Mapping[str, type[Settings]] = {
    kind.backend: kind for kind in (LocalVllmSettings, ApiSettings, RewardModelSettings, MetricSettings)
}


def read_settings(backend: str, params: Mapping[str, Any]) -> Settings:
    """Check every backend's settings and return the chosen one's.

    Args:
        backend: the name of a shipped one, or ``file.py:Class`` or ``module:Class`` of the user's own.
        params: backend -> its settings, as the guide nests them, those of the user's own below ``settings``;
            a backend may be missing or null.

    Raises:
        ConfigError: an unknown backend or key, or a value that cannot be used, of any backend.
    """
    for name in params:
        if name not in (*SHIPPED, OWN):
            raise ConfigError(
                f"{PLACE}.{name} is none of the reward backends.{did_you_mean(name, SHIPPED)}",
                f"They are: {', '.join(SHIPPED)}; {OWN} is for a rewarder of your own.",
                f"Correct or remove it; each backend's settings stand below {PLACE}.<backend>.",
            )
    if backend not in SHIPPED and ":" not in backend:
        raise ConfigError(
            f"nice.reward_model_backend is '{backend}', which is not known.{did_you_mean(backend, SHIPPED)}",
            f"The backends are: {', '.join(SHIPPED)}.",
            "Choose one of them, or name a class of your own as file.py:Class or module:Class.",
        )
    made = {name: _checked(name, kind, params.get(name)) for name, kind in SHIPPED.items()}
    chosen = made.get(backend) or _checked(OWN, load_settings(backend), params.get(OWN))
    chosen.require()
    return chosen


def _checked(name: str, kind: type[Settings], values: Any) -> Settings:
    if values is not None and not (isinstance(values, Mapping) and all(isinstance(k, str) for k in values)):
        raise ConfigError(
            f"{PLACE}.{name} is not a mapping from names to values.",
            "It holds the backend's settings by name.",
            f"The settings of {name} are: {', '.join(kind.model_fields) or 'nothing'}.",
        )
    try:
        return kind(**(values or {}))
    except ValidationError as error:
        # from None: the original shows values, and one may be a key
        raise explain(error, kind, f"{PLACE}.{name}", noun="setting") from None
