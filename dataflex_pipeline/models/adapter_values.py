"""Values of an adapter's configuration that peft takes as they are: numbers, names and patterns.

peft checks few of them, and fails on the rest wherever they are used first. Its patterns are regular
expressions, which can take longer than anyone waits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from dataflex_pipeline.limited import tried

LARGEST_RANK = 65_536
"""As for ``lora_rank``."""
SECONDS = 5
"""Time on a processor that the patterns may take for all names of layers; usual ones take milliseconds."""
_ROOM = 1 << 30


def _rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_RANK


def _number(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    with suppress(OverflowError):
        return math.isfinite(value)
    return False


def _names(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return value is None or isinstance(value, str) or is_list


def _places(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return value is None or all(type(each) is int and each >= 0 for each in listed)


def _by_pattern(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(check, value.values())))


def _switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_rank, f"a whole number from 1 to {LARGEST_RANK:,}"),
    "lora_alpha": (_number, "a finite number"),
    "lora_dropout": (lambda value: _number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "rank_pattern": (_by_pattern(_rank), f"patterns with whole numbers from 1 to {LARGEST_RANK:,}"),
    "alpha_pattern": (_by_pattern(_number), "patterns with finite numbers"),
    "target_modules": (_names, "a list of names, or a pattern"),
    "exclude_modules": (_names, "a list of names, or a pattern"),
    "target_parameters": (_names, "a list of names"),
    "layers_pattern": (_names, "a list of names, or a pattern"),
    "layers_to_transform": (_places, "a list of numbers of layers"),
    "use_rslora": (_switch, "true or false"),
    "use_dora": (_switch, "true or false"),
    "fan_in_fan_out": (_switch, "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
}
"""Keys -> what their values pass, and what they are then."""


def wrong_value(found: Mapping[str, Any]) -> str | None:
    """Return in words a value that cannot be; None where there is none.

    Args:
        found: the content of adapter_config.json. A key that is missing has peft's own default.
    """
    for key, (check, what) in CHECKS.items():
        if key in found and not check(found[key]):
            return f"{key} is {json.dumps(found[key])[:60]}, and not {what},"
    for name, pattern in _patterns(found):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return f"{name} has the pattern {json.dumps(pattern)[:60]}, which is none ({error}),"
    return None


def _patterns(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return each pattern of a configuration with its key, as peft compares it."""
    whole = [(key, found.get(key)) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    starts = [(key, name) for key in ("rank_pattern", "alpha_pattern") for name in found.get(key) or {}]
    return [(key, value) for key, value in whole if isinstance(value, str)] + [
        (key, rf"(.*\.)?({name})$") for key, name in starts
    ]


def endless_pattern(found: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the key whose pattern takes too long to compare with the names of layers; None for none.

    Args:
        found: the content of adapter_config.json, without wrong values. names: of all modules of the model.
    """
    patterns = [(key, pattern) for key, pattern in _patterns(found) if not re.fullmatch(r"[\w.-]+", pattern)]
    for key, pattern in patterns:

        def compare(compiled: re.Pattern[str] = re.compile(pattern)) -> str:
            for name in names:
                compiled.match(name), compiled.fullmatch(name)
            return ""

        if tried(compare, SECONDS, _ROOM) is None:
            return key
    return None
