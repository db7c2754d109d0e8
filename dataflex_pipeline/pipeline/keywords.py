"""Keyword arguments of `Run` and its calls: settings, and the number of a round."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.values import is_mapping, is_text
from dataflex_pipeline.errors import ConfigError, RunError
from dataflex_pipeline.methods import shipped_methods


def whole_round(number: int) -> int:
    """Return a round's number.

    Raises:
        RunError: it is no whole number.
    """
    if isinstance(number, bool) or not isinstance(number, int):
        raise RunError(
            f"The round is given as {number!r}.",
            "A round is a whole number: 0 is the warm-up, then 1, 2, ...",
            "Give for example 1.",
        )
    return number


def as_overrides(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each setting as its key and the ``key=value`` of a command line; mappings entry by entry.

    Raises:
        ConfigError: a value that no configuration file could hold.
    """
    for key, value in settings.items():
        value = value.item() if hasattr(value, "item") else value  # a number of numpy's
        if isinstance(value, list | tuple) and key in Config.model_fields and is_text(key):
            value = ",".join(map(str, value))  # several data sets
        if isinstance(value, Mapping) and not value and key in Config.model_fields:
            yield key, f"{key}=null"  # an empty mapping is the default of every key that takes one
        elif isinstance(value, Mapping) and (key not in Config.model_fields or is_mapping(key)):
            yield from as_overrides({f"{key}.{inner}": each for inner, each in value.items()})
        elif key in shipped_methods():
            raise ConfigError(
                f"{key}={value!r} was given.",
                f"{key} is a method; its parameters are given as a mapping.",
                f'Write {key}={{"NAME": VALUE}}; `dataflex methods {key}` lists them.',
            )
        elif isinstance(value, str | Path) and not _reads_otherwise(str(value)):
            yield key, f"{key}={value}"
        else:
            try:
                yield key, f"{key}={json.dumps(str(value) if isinstance(value, Path) else value)}"
            except TypeError as error:
                raise ConfigError(
                    f"{key} is {value!r}, a {type(value).__name__}.",
                    "A setting is what a configuration file can hold: text, numbers, true, false, lists and "
                    "mappings of them.",
                    "Give such a value.",
                ) from error


def _reads_otherwise(text: str) -> bool:
    """Whether a text means another thing on a command line: nothing at all, or what is within its quotes."""
    return text.strip() in ("", "~", "null") or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\"")
