"""The methods to choose from, described as plain values: summary, source, parameters with their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex_pipeline.config.components import known_methods, method_parameters
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import load_config
from dataflex_pipeline.config.redaction import HIDDEN, is_secret
from dataflex_pipeline.errors import ConfigError, did_you_mean
from dataflex_pipeline.methods import check_methods, method_class, shipped_methods
from dataflex_pipeline.reward.address import PLACE
from dataflex_pipeline.reward.own import OWN, load_settings


def describe_methods(
    name: str | None = None, config: Path | None = None, settings: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return name, summary, source, strategy and parameters of each method.

    Args:
        name: of the only one to describe; None for all.
        config: the configuration file whose components are looked at; None for the defaults.
        settings: ``key=value`` over the configuration.

    Raises:
        ConfigError: there is no such method, or the configuration cannot be read.
    """
    loaded = load_config(config, settings)
    folder = config.parent if config is not None else None
    check_methods(loaded.config, folder)
    names = [
        each for each in known_methods(loaded.config, folder) if method_exists(loaded.config, each, folder)
    ]
    if name is not None and name not in names:
        raise ConfigError(
            f"The method '{name}' is not known.{did_you_mean(name, names)}",
            f"There are: {', '.join(names)}.",
            "Choose one of them, or add your own to components.yaml.",
        )
    return [_described(loaded.config, each, folder) for each in ([name] if name is not None else names)]


def method_exists(config: Config, name: str, folder: Path | None) -> bool:
    """Whether an entry of the components file has an implementation: shipped, or a file or module."""
    entry = method_parameters(config, name, folder)
    return entry.kind in shipped_methods() or entry.file is not None or entry.module is not None


def _described(config: Config, name: str, folder: Path | None) -> dict[str, Any]:
    entry = method_parameters(config, name, folder)
    kind = method_class(entry.kind, Path(entry.file) if entry.file else None, entry.module)
    parameters = []
    for parameter, info in kind.Params.model_fields.items():
        default = info.get_default(call_default_factory=True)
        value = entry.params.get(parameter, default)
        inner = info.json_schema_extra
        meanings: Mapping[str, Any] = {"": info.description, **(inner if isinstance(inner, Mapping) else {})}
        if parameter == PLACE.partition(".")[2]:
            default, meanings = _with_own_rewarder(entry.params, default, meanings)
        parameters += _parameters(f"{name}.{parameter}", value, default, meanings)
    return {
        "method": name,
        "summary": kind.summary,
        "source": kind.source,
        "strategy": kind.default_strategy,
        "parameters": parameters,
    }


def _with_own_rewarder(
    params: Mapping[str, Any], default: Mapping[str, Any], meanings: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the settings of the reward backends and what they mean, those of a rewarder of one's own too."""
    backend = params.get("reward_model_backend") or ""
    if ":" not in backend:
        return default, meanings
    fields = load_settings(backend).model_fields
    own = {key: field.get_default(call_default_factory=True) for key, field in fields.items()}
    told = {f"{OWN}.{key}": field.description or "" for key, field in fields.items()}
    return {**default, OWN: own}, {**meanings, **told}


def _parameters(
    parameter: str, value: Any, default: Any, meanings: Mapping[str, Any], place: str = ""
) -> list[dict[str, Any]]:
    """Return a parameter, or each of its settings where it is a mapping of them.

    Args:
        parameter: its name.
        value: as it is set.
        default: as it is declared.
        meanings: what the whole ("") and each setting (a path with dots) mean.
        place: of the settings inside, "" for the whole.
    """
    if not isinstance(default, Mapping) or not default:
        meaning = meanings.get(place) or ""
        shown = HIDDEN if is_secret(place.rpartition(".")[2], value) else value
        return [{"parameter": parameter, "value": shown, "default": default, "meaning": meaning}]
    given = value if isinstance(value, Mapping) else {}
    keys = [*default, *(key for key in given if key not in default)]
    return [
        line
        for key in keys
        for line in _parameters(
            f"{parameter}.{key}",
            given.get(key, default.get(key)),
            default.get(key),
            meanings,
            f"{place}.{key}" if place else key,
        )
    ]
