"""One key of the configuration: how it is declared, and the kinds of values that several keys take."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

Role = Literal["run", "selection", "runtime"]
LARGEST = 2**31 - 1
"""Whole numbers of a configuration are at most this large: 32 bits, as the libraries below hold them."""
MOST_WORKERS = 1024
"""Processes beside each other that are started without asking whether that was meant."""


def _count_or_auto(value: Any) -> int | Literal["auto"]:
    """Return ``auto`` or a count; a union of the two would explain a wrong value by one of them only."""
    if value == "auto":
        return "auto"
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or len(text) > 10 or not 1 <= int(text) <= LARGEST:
        raise ValueError(f"It should be auto, or a whole number from 1 to {LARGEST}")
    return int(text)


COUNT_OR_AUTO = BeforeValidator(_count_or_auto)
CountOrAuto = Annotated[int | Literal["auto"], COUNT_OR_AUTO]
"""A number above 0, or auto where the program finds one."""


def key(default: Any, meaning: str, role: Role, group: str, **limits: Any) -> Any:
    """Declare one configuration key with its default, meaning, role and the section that it is shown in.

    A whole number is at most LARGEST, unless a smaller limit is given.
    """
    if isinstance(limits.get("ge"), int):
        limits.setdefault("le", LARGEST)
    if isinstance(default, dict | list):
        limits["default_factory"] = default.copy
    else:
        limits["default"] = default
    return Field(description=meaning, json_schema_extra={"role": role, "group": group}, **limits)
