"""The address of a judge's endpoint: its allowed parts, and the form in which it may be shown."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import SplitResult, parse_qsl, urlsplit

from dataflex_pipeline.errors import ConfigError, DataflexError

PLACE = "nice.reward_backend_params"
"""Where the settings stand, as a user of `nice`, which passes them on, would type it."""
_OF_NICE = "nice.reward_"
QUERY = ("api-version", "api_version", "version", "deployment", "deployment-id", "region")
"""Query parameters that an address may have: keys go by too many names to list those instead."""
_QUERY_VALUE = re.compile(r"[\w.-]*", re.ASCII)


@contextmanager
def named_for(method: str) -> Iterator[None]:
    """Let errors about a rewarder's settings name them as a user of another method would type them."""
    try:
        yield
    except DataflexError as error:
        parts = (part.replace(_OF_NICE, f"{method}.reward_") for part in (error.what, error.why, error.fix))
        error.what, error.why, error.fix = parts
        error.args = (f"{error.what}\n{error.why}\n{error.fix}",)
        raise


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def endpoint(url: str) -> str:
    """Return an address as it may be shown: without user, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_url(url: str, *, sends_key: bool) -> None:
    """Refuse an address that cannot be asked, that holds a secret, or that would send the key in the clear.

    Plain http is taken where no key is sent (a server inside a cluster), or to this machine itself.

    Raises:
        ConfigError: any of that; secrets are not shown.
    """
    where = f"{PLACE}.api.api_url"
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        known = False
    if not known:
        raise ConfigError(
            f"{where} is not the address of an endpoint.",
            "It begins with https:// (or http://) and a host, such as "
            "https://api.openai.com/v1/chat/completions.",
            "Give the full address, up to and including /chat/completions.",
        )
    if _may_hold_secret(parts):
        raise ConfigError(
            f"{where} holds what may be a user name, password or key (not shown).",
            "An address ends up in tables, logs, messages and the model card, so beside host and path it may "
            f"only have the query parameters {', '.join(QUERY)}.",
            "Take the rest out of the address; api_key names the environment variable that holds the key.",
        )
    if sends_key and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ConfigError(
            f"{where}: {endpoint(url)} is plain http, and api_key is set.",
            "Everybody on the way could read the key.",
            "Use https://, or set api_key: null where the endpoint takes no key.",
        )


def _may_hold_secret(parts: SplitResult) -> bool:
    query = parse_qsl(parts.query, keep_blank_values=True)
    return (
        "@" in parts.netloc
        or bool(parts.fragment)
        or any(name.lower() not in QUERY or not _QUERY_VALUE.fullmatch(value) for name, value in query)
    )
