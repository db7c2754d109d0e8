"""The features that a method, or another feature, asks for: a mapping from names to needs, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from dataflex_pipeline.api import Feature, Need, Params, Split
from dataflex_pipeline.declared import broken, shown

OF_A_METHOD: tuple[Split, ...] = ("pool", "target")
"""The splits that a method looks at; the test split is for evaluations."""


def checked_needs(
    owner: object, what: str, needs: Any, class_of: Callable[[Need], type[Feature]], latest: int | None = None
) -> Mapping[str, Need]:
    """Return what was asked for.

    Args:
        owner: the method or feature that asks. what: the function that it asked by.
        needs: what that returned. class_of: finds the feature of a need.
        latest: the last round that has a checkpoint; None where that is not known.

    Raises:
        ConfigError: it is no mapping from names to needs, or a need cannot be met.
    """
    said = "It returns a mapping from names of its own to needs: {'now': api.Need('losses')}."
    if not isinstance(needs, Mapping):
        raise broken(owner, what, f"returns {shown(needs)}", said)
    for key, need in needs.items():
        if not isinstance(key, str) or not key or not isinstance(need, Need):
            raise broken(owner, what, f"returns {shown(key)}: {shown(need)}", said)
        wrong = _wrong(need, class_of, latest)
        if wrong is not None:
            raise broken(owner, what, f"asks for {need.name} with {wrong[0]}", wrong[1])
    return needs


def _wrong(
    need: Need, class_of: Callable[[Need], type[Feature]], latest: int | None
) -> tuple[str, str] | None:
    """Return what is wrong with a need, and what it should be; None where nothing is."""
    splits, at = get_args(Split) if latest is None else OF_A_METHOD, need.checkpoint
    if need.split not in splits:
        return f"split {shown(need.split)}", f"The splits are: {', '.join(splits)}."
    if not (at is None or at == "base" or _is_count(at)):
        rounds = "It is the number of a round, 'base' for the model as it was given, or left out."
        return f"checkpoint {shown(at)}", rounds
    if latest is not None and isinstance(at, int) and at > latest:
        there = f"The rows of round {latest + 1} are selected with the rounds before it: {latest} at most."
        return f"checkpoint {at}", there
    if not (need.step is None or _is_count(need.step)):
        return f"step {shown(need.step)}", "It is a number of optimizer steps, or left out."
    kind = class_of(need)
    if isinstance(need.params, Params):
        given = type(need.params)  # or a base that declares the same, which features share
        related = issubclass(given, kind.Params) or issubclass(kind.Params, given)
        if not related or given.model_fields.keys() != kind.Params.model_fields.keys():
            other = f"They are an instance of {kind.__qualname__}.Params, or a mapping."
            return f"params of {type(need.params).__qualname__}", other
    elif not isinstance(need.params, Mapping) or not all(isinstance(key, str) for key in need.params):
        by_name = f"They are an instance of {kind.__qualname__}.Params, or their values by name."
        return f"params {shown(need.params)}", by_name
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
