"""Picks a rewarder by name, importing only what it uses."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from dataflex_pipeline.reward import Rewarder
from dataflex_pipeline.reward.settings import (
    ApiSettings,
    LocalVllmSettings,
    MetricSettings,
    RewardModelSettings,
    Settings,
)

CLASSES = {
    "local_vllm": ("local_vllm", "LocalVllmRewarder"),
    "api": ("api", "ApiRewarder"),
    "reward_model": ("reward_model", "ModelRewarder"),
    "metric": ("metric", "MetricRewarder"),
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
    kind = getattr(importlib.import_module(f"dataflex_pipeline.reward.{module}"), name)
    made: Rewarder = kind(settings, config, say)
    return made


def check_ready(settings: Settings) -> None:
    """Check what a backend needs beside its settings, before anything costly is done for it.

    No model is loaded: the files of one are looked at.

    Raises:
        UserError: the key's environment variable is not set, the budget is too small for the processes of
            the launch, a package is missing, a function of the user's own cannot be found, or the files of a
            judge or reward model are not those of one.
    """
    if isinstance(settings, ApiSettings):
        from dataflex_pipeline.reward.api import own_budget, read_key

        read_key(settings)
        own_budget(settings)
    elif isinstance(settings, MetricSettings):
        from dataflex_pipeline.reward.metric import MetricRewarder

        MetricRewarder(settings, None, lambda line: None)
    elif isinstance(settings, LocalVllmSettings):
        from dataflex_pipeline.reward.local_vllm import LocalVllmRewarder

        LocalVllmRewarder(settings, None, lambda line: None).check()
    elif isinstance(settings, RewardModelSettings):
        from dataflex_pipeline.reward.reward_model import ModelRewarder

        ModelRewarder(settings, None, lambda line: None).check()


def reach(settings: Settings) -> Sequence[str]:
    """Try the endpoint of a backend that has one, at no cost; return what is doubtful about it.

    Raises:
        UserError: it cannot be reached.
    """
    if not isinstance(settings, ApiSettings):
        return ()
    from dataflex_pipeline.reward.api import read_key
    from dataflex_pipeline.reward.endpoint import try_endpoint

    return try_endpoint(settings, read_key(settings))
