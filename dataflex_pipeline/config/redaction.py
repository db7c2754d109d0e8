"""Secrets in a configuration: never written to disk, never shown."""

from __future__ import annotations

import re
from typing import Any

from dataflex_pipeline.config.fields import SECRETS

_WORDS = "(?:api_?key|secret|password|access_token|auth_token|webhook_url)"
_SECRET_NAME = re.compile(f"{_WORDS}$", re.IGNORECASE)
_SECRET_SET = re.compile(rf"({_WORDS}[\"']?\s*[:=]\s*)[^\s,}}\]]+", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_VARIABLE_NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
HIDDEN = "(a secret, not shown)"


def is_secret_name(name: str) -> bool:
    """Whether the value of a key or parameter of this name may be a secret."""
    return name in SECRETS or _SECRET_NAME.search(name) is not None


def is_secret(name: str, value: Any) -> bool:
    """Whether a value must not be written to disk or shown.

    A value that looks like the name of an environment variable (``api_key: DF_API_KEY``) is no secret.
    """
    if not is_secret_name(name) or isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    return _VARIABLE_NAME.fullmatch(str(value)) is None


def redacted(text: str) -> str:
    """Return a text as it may be shown: without the user and password of an address."""
    return _USER_IN_URL.sub(HIDDEN, text)


def redacted_source(text: str) -> str:
    """Return a piece of YAML that could not be read as it may be shown: values of secret names left out."""
    return _SECRET_SET.sub(_hidden, redacted(text))


def _hidden(found: re.Match[str]) -> str:
    """Return what stands in place of a value: nothing does for the name of a variable, or no value."""
    name, value = found[1], found[0][len(found[1]) :].strip("\"'.;)")
    harmless = value in ("null", "~", "") or _VARIABLE_NAME.fullmatch(value)
    return found[0] if harmless or found.string.startswith(HIDDEN, found.end(1)) else name + HIDDEN


def without_secrets(value: Any) -> Any:
    """Return a copy of nested dictionaries and lists in which secrets are left out."""
    if isinstance(value, dict):
        return {k: without_secrets(v) for k, v in value.items() if not is_secret(str(k), v)}
    return [without_secrets(v) for v in value] if isinstance(value, list) else value
