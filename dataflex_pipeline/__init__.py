"""Offline data selection for LLM fine-tuning, as files: score, select, train, go round again."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataflex_pipeline.api import Feature, Method, Need, Params
    from dataflex_pipeline.config.fields import Config
    from dataflex_pipeline.config.load import load_config
    from dataflex_pipeline.errors import UserError
    from dataflex_pipeline.pipeline.run import Run

__version__ = "0.1.0"

__all__ = ["Config", "Feature", "Method", "Need", "Params", "Run", "UserError", "load_config"]

_HOMES = {
    "Config": "config.fields",
    "Feature": "api",
    "Method": "api",
    "Need": "api",
    "Params": "api",
    "Run": "pipeline.run",
    "UserError": "errors",
    "load_config": "config.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for first, so that ``import dataflex_pipeline`` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
