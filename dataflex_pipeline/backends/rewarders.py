"""Picks a rewarder by name, importing only what it uses."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from dataflex_pipeline.backends import Rewarder
from dataflex_pipeline.backends.reward_settings import (
    ApiSettings,
    LocalVllmSettings,
    MetricSettings,
    RewardModelSettings,
    Settings,
)

CLASSES = {
    "local_vllm": ("reward_local_vllm", "LocalVllmRewarder"),
    "api": ("reward_api", "ApiRewarder"),
    "reward_model": ("reward_model", "ModelRewarder"),
    "metric": ("reward_metric", "MetricRewarder"),
}
IN_WORDS = ("local_vllm", "api")
"""Backends that reply in words: a reply without a score is asked for once more."""
PAID = ("api",)
"""Backends whose replies cost money: each is flushed to the disk before the next is waited for."""


def is_journalled(settings: Settings) -> bool:
    """Whether a reward takes long enough to be written down at once: all but those of shipped metrics."""
    return not isinstance(settings, MetricSettings) or ":" in settings.name


def make_rewarder(backend: str, settings: Settings, config: Any, say: Callable[[str], None]) -> Rewarder:
    """Make a rewarder; entering it loads.

    Args:
        backend: local_vllm, api, reward_model or metric. settings: its own, checked.
        config: the run's, for device and precision. say: prints one line.
    """
    module, name = CLASSES[backend]
    kind = getattr(importlib.import_module(f"dataflex_pipeline.backends.{module}"), name)
    made: Rewarder = kind(settings, config, say)
    return made


def check_ready(settings: Settings) -> None:
    """Check what a backend needs beside its settings, before anything costly is done for it.

    Raises:
        ConfigError: the key's environment variable is not set, the budget is too small for the processes of
            the launch, a package is missing, or a function of the user's own cannot be found.
    """
    if isinstance(settings, ApiSettings):
        from dataflex_pipeline.backends.reward_api import own_budget, read_key

        read_key(settings)
        own_budget(settings)
    elif isinstance(settings, MetricSettings):
        from dataflex_pipeline.backends.reward_metric import MetricRewarder

        MetricRewarder(settings, None, lambda line: None)
    elif isinstance(settings, LocalVllmSettings) or (
        isinstance(settings, RewardModelSettings) and settings.engine == "vllm"
    ):
        from dataflex_pipeline.backends.vllm_engine import require_vllm

        require_vllm("The reward backend")
