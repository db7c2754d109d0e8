"""Pydantic's errors in the words of this program: the first complaint as a ConfigError in three parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from dataflex_pipeline.config.redaction import HIDDEN, is_secret_name
from dataflex_pipeline.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Complaint:
    """The first of the complaints in a ValidationError.

    Attributes:
        path: keys that lead to the value; empty where the values do not go together.
        value: what was given there.
        reason: pydantic's message, or that of the validator, as a sentence.
        unknown: whether there is no such key.
        others: further keys that there are complaints about, sorted.
    """

    path: tuple[str, ...]
    value: Any
    reason: str
    unknown: bool
    others: tuple[str, ...]

    @property
    def key(self) -> str:
        """The outermost key; an empty text where the values do not go together."""
        return self.path[0] if self.path else ""


def first_complaint(error: ValidationError) -> Complaint:
    """Return the first complaint of an error."""
    problems = error.errors()
    first = problems[0]
    path = tuple(str(part) for part in first["loc"] if part != "[key]")
    others = {str(problem["loc"][0]) for problem in problems[1:] if problem["loc"]} - set(path[:1])
    return Complaint(
        path=path,
        value=first["input"],
        reason=f"{first['msg'].removeprefix('Value error, ')}.",
        unknown=first["type"] == "extra_forbidden",
        others=tuple(sorted(others)),
    )


def explain(
    error: ValidationError,
    model: type[BaseModel],
    name: str,
    *,
    noun: str = "parameter",
    place: str = "",
    see: str = "",
) -> ConfigError:
    """Return the error to raise about values that a model of parameters or settings refused.

    Args:
        error: what pydantic raised.
        model: the class that the values were for.
        name: of the method or part as a user types it before the dot, such as ``less``.
        noun: what one of the values is called.
        place: where they were set, such as "my.yaml, line 3"; empty where only the name is known.
        see: a sentence on where the parameters are explained, for a name that is not known.
    """
    complaint = first_complaint(error)
    key, where = complaint.key, f" (in {place})" if place else ""
    short = name.rpartition(".")[2]
    if complaint.unknown:
        return ConfigError(
            f"{name}.{key}{where} is not a {noun} of {short}.{did_you_mean(key, model.model_fields)}",
            f"{short} takes: {', '.join(model.model_fields) or f'no {noun}s'}.",
            f"Correct the name, or remove it.{see and ' ' + see}",
        )
    if not key:
        return ConfigError(
            f"The {noun}s of {name}{where} cannot be used as they are.",
            complaint.reason,
            f"Set one of them otherwise, for example {name}.NAME=VALUE.",
        )
    shown = HIDDEN if is_secret_name(key) else repr(complaint.value)
    return ConfigError(f"{name}.{key} is {shown}{where}.", complaint.reason, meaning(model, key))


def meaning(model: type[BaseModel], key: str) -> str:
    """Return one line that says what a parameter is and its default."""
    info = model.model_fields.get(key)
    if info is None:
        return "`dataflex methods` lists the parameters."
    return f"{key}: {info.description} (default {info.get_default(call_default_factory=True)})."
