"""Values that a key accepts, in words, and errors about values in the same words."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic import ValidationError

from dataflex_pipeline.config.explain import Complaint, first_complaint
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.keys import COUNT_OR_AUTO, LARGEST
from dataflex_pipeline.config.redaction import HIDDEN, is_secret_name, without_secrets
from dataflex_pipeline.errors import ConfigError, did_you_mean

_BOUNDS: tuple[tuple[type, str, str], ...] = (
    (at.Ge, "ge", "of at least"),
    (at.Gt, "gt", "above"),
    (at.Le, "le", "of at most"),
    (at.Lt, "lt", "below"),
)
_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}

_VALUES: dict[Any, str] = {float: "numbers", str: "text", str | float | int: "text and numbers"}


def base_type(name: str) -> Any:
    """Return the type of a key without what stands beside it: str, int, a Literal, dict[str, float], ..."""
    return _alternatives(name)[0]


def _alternatives(name: str) -> tuple[Any, ...]:
    """Return the types that a key takes, the main one first: (bool, Literal["auto"]), (int, NoneType)."""
    annotation = Config.model_fields[name].annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def is_text(name: str) -> bool:
    """Whether a key takes text (free, or one of a few words)."""
    kind = base_type(name)
    return kind is str or (get_origin(kind) is Literal and all(isinstance(a, str) for a in get_args(kind)))


def is_mapping(name: str) -> bool:
    """Whether a key takes a mapping."""
    return get_origin(base_type(name)) is dict


def _nested(name: str) -> bool:
    """Whether a key takes a mapping of mappings."""
    return is_mapping(name) and get_origin(get_args(base_type(name))[1]) is dict


def accepted(name: str, value: Any = None) -> str:
    """Say what a key accepts: "a whole number of at least 1, or null".

    Args:
        name: the key.
        value: that was given; the limit of every whole number is only spoken of where it is over that.
    """
    main, *beside = _alternatives(name)
    words = [", or " + ("null" if kind is type(None) else str(get_args(kind)[0])) for kind in beside]
    return _type_in_words(main) + _bounds_in_words(name, value) + "".join(words)


def show(name: str, value: Any) -> str:
    """Write a value for a message, shortened; a secret is never shown."""
    if is_secret_name(name):
        return HIDDEN
    text = json.dumps(without_secrets(value), ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def validated(values: dict[str, Any], place: Callable[[str], str]) -> Config:
    """Build the configuration from checked key names.

    Args:
        values: key -> value; every key is a field of Config.
        place: says where a key was set, for messages.

    Raises:
        ConfigError: a value of the wrong type or out of range; names the key, the value and the place.
    """
    for name, value in values.items():
        if isinstance(value, str) and not value.strip():
            raise ConfigError(
                f"{name} is an empty text ({place(name)}).",
                f"{name} takes {accepted(name)}.",
                "Give a value, or leave the key out.",
            )
    try:
        return Config.model_validate(values, strict=True)
    except ValidationError as error:
        raise _value_error(first_complaint(error), place) from error


def _type_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(a) for a in get_args(kind))
    if get_origin(kind) is dict:
        return f"a mapping of names to {_VALUES.get(get_args(kind)[1], 'mappings')}"
    return _PLAIN[kind]


def _bounds_in_words(name: str, value: Any) -> str:
    over = isinstance(value, int) and value > LARGEST
    if COUNT_OR_AUTO in Config.model_fields[name].metadata:
        return " of at least 1" + (f" and of at most {LARGEST}" if over else "")
    found = [
        f"{words} {_plain(getattr(bound, attribute))}"
        for kind, attribute, words in _BOUNDS
        for bound in Config.model_fields[name].metadata
        if isinstance(bound, kind) and (over or getattr(bound, attribute) != LARGEST)
    ]
    return " " + " and ".join(found) if found else ""


def _value_error(complaint: Complaint, place: Callable[[str], str]) -> ConfigError:
    # Where several types are taken, the path ends with the one that was tried.
    path = complaint.path[: 1 + is_mapping(complaint.key) + _nested(complaint.key)]
    name, full = complaint.key, ".".join(path)
    shown = show(path[-1], complaint.value)
    more = f" Look at {', '.join(complaint.others)} as well." if complaint.others else ""
    return ConfigError(
        f"{full}: {shown} ({place(name)}) cannot be used.",
        f"{name} takes {accepted(name, complaint.value)}.",
        _advice(name, full, complaint.value) + more,
    )


def _advice(name: str, full: str, value: Any) -> str:
    kind = base_type(name)
    if get_origin(kind) is Literal:
        choices = [str(a) for a in get_args(kind)]
        return f"Choose one of them.{did_you_mean(str(value), choices)}"
    number = _meant(name, value) if kind in (int, float) else None
    if number is not None:
        return f"Write {name}: {number}"
    if kind is str and isinstance(value, bool | int | float) and not is_secret_name(name):
        return f'If it is meant as text, write it in quotes: {name}: "{value}"'
    return f"Give {full} such a value, or leave it out to take the default."


def _meant(name: str, value: Any) -> int | float | None:
    """Return the number that quoted text or a decimal stands for, if the key takes that one."""
    try:
        number = float(value) if isinstance(value, str | float) else math.nan
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    meant = int(number) if number.is_integer() else number
    try:
        Config.model_validate({name: meant}, strict=True)
    except ValidationError:
        return None
    return meant


def _plain(bound: float) -> str:
    """Write a limit in digits: 1000000000, 0.5, 1."""
    return str(int(bound)) if float(bound).is_integer() else str(bound)
