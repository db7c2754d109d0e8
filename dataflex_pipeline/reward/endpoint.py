"""One OpenAI-compatible chat endpoint: a request, the faults of its reply, and the errors.

A 408, 425, 429 or 5xx, a timeout, a broken connection and a reply that is not what the protocol says are
worth another attempt; any other status is final. Redirects are not followed, because the key would go along.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self
from urllib.parse import urljoin, urlsplit, urlunsplit

import httpx

from dataflex_pipeline.config.redaction import HIDDEN
from dataflex_pipeline.errors import UserError
from dataflex_pipeline.reward.address import PLACE, endpoint, is_loopback
from dataflex_pipeline.reward.settings import ApiSettings

AGAIN = (408, 425, 429)
REFUSED = (400, 413, 422)
"""Statuses that can be about one answer: too long, or against the endpoint's rules."""
MAX_REPLY_BYTES = 8 << 20
SHOWN_CHARACTERS = 200
TRIAL_SECONDS = 10.0
"""How long a server may take to show that it is there."""
KEPT = "What had arrived is kept; the same command goes on from there."


class EndpointError(UserError):
    """The endpoint finally failed.

    Attributes:
        status: of its last reply; None where there was none.
    """

    def __init__(self, what: str, why: str, fix: str, status: int | None = None) -> None:
        super().__init__(what, why, f"{fix} {KEPT}")
        self.status = status


class TransientError(Exception):
    """A failure that another attempt may cure.

    Attributes:
        found: what happened, in words. status: of the reply, if there was one.
        retry_after: seconds that the endpoint asks to wait.
    """

    def __init__(self, found: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(found)
        self.found, self.status, self.retry_after = found, status, retry_after


class Endpoint:
    """Sends requests; entering opens the connections.

    Args:
        settings: where to and how. key: the key itself, None for none; it is never shown or kept in files.
    """

    def __init__(self, settings: ApiSettings, key: str | None) -> None:
        self.settings = settings
        self.shown = endpoint(settings.api_url)
        self._key = key

    def __enter__(self) -> Self:
        self._client = _client(self.settings, self.settings.timeout)
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def ask(self, body: Mapping[str, Any]) -> str:
        """Send one request and return the words of the reply, empty where it has none.

        Raises:
            TransientError: another attempt may help. EndpointError: none will.
        """
        status, headers, content = self._post(body)
        if 300 <= status < 400:
            raise self._redirected(status, headers.get("location", ""))
        if status in AGAIN or status >= 500:
            raise TransientError(
                f"status {status}{self._said(content)}",
                status,
                retry_after(headers.get("retry-after"), headers.get("date")),
            )
        if status != 200:
            raise self._refused(status, self._said(content))
        return self._hide(words(content, headers.get("content-type", "no content type")))

    def _post(self, body: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        until = time.monotonic() + self.settings.timeout
        header = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        content = bytearray()
        try:
            with self._client.stream(
                "POST", self.settings.api_url, json=dict(body), headers=header
            ) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > until:  # httpx limits each read, not the whole reply
                        raise TransientError(f"no whole reply within {self.settings.timeout:g} s")
                    if len(content) > MAX_REPLY_BYTES:
                        raise TransientError(f"a reply of more than {MAX_REPLY_BYTES >> 20} MiB")
                return response.status_code, response.headers, bytes(content)
        except httpx.TimeoutException as error:
            raise TransientError(f"no reply within {self.settings.timeout:g} s") from error
        except (
            httpx.NetworkError,
            httpx.RemoteProtocolError,
            httpx.DecodingError,
            httpx.ProxyError,
        ) as error:
            raise TransientError(self._hide(f"{type(error).__name__}: {error}")) from error

    def _hide(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, HIDDEN)

    def _said(self, content: bytes) -> str:
        """Return the endpoint's own words about a failure, cut, on one line, without the key."""
        text = content.decode("utf-8", "replace")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        for name in ("error", "message"):
            value = value.get(name, value) if isinstance(value, dict) else value
        shown = " ".join(self._hide(str(value)).split())[:SHOWN_CHARACTERS]
        return f" ({shown})" if shown else ""

    def _redirected(self, status: int, location: str) -> EndpointError:
        target = endpoint(urljoin(self.settings.api_url, location))
        return EndpointError(
            f"The reward endpoint {self.shown} answered {status}: it redirects to {target}.",
            "Redirects are not followed, because the key would be sent to another address.",
            f"Set {PLACE}.api.api_url to the address that answers itself.",
            status,
        )

    def _refused(self, status: int, said: str) -> EndpointError:
        why, fix = _REASONS.get(status, ("The endpoint does not take the request.", _CHECK))
        return EndpointError(f"The reward endpoint {self.shown} answered {status}{said}.", why, fix, status)

    def failed(self, trouble: TransientError, attempts: int) -> EndpointError:
        """Return the error for an endpoint that failed at every attempt."""
        why, fix = _REASONS.get(trouble.status or 0, ("It cannot be used at the moment.", _LATER))
        return EndpointError(
            f"The reward endpoint {self.shown} failed {attempts} times; the last time: {trouble.found}.",
            why,
            fix,
            trouble.status,
        )

    def too_late(self, trouble: TransientError, limit: float) -> EndpointError:
        """Return the error for an endpoint that wants to be left alone for longer than we wait."""
        return EndpointError(
            f"The reward endpoint {self.shown} answered {trouble.found} and asks to wait "
            f"{trouble.retry_after:.0f} s.",
            f"That is more than the {limit:.0f} s that a command waits.",
            "Run it again after that time, or set requests_per_minute below the endpoint's limit.",
            trouble.status,
        )


def _client(settings: ApiSettings, timeout: float) -> httpx.Client:
    # a proxy for the outside world would not reach this machine itself
    outside = not is_loopback(urlsplit(settings.api_url).hostname or "")
    # A connection to each request: what a broken proxy sends after a reply would be read as the next one's.
    limits = httpx.Limits(max_connections=settings.max_concurrency, max_keepalive_connections=0)
    return httpx.Client(timeout=timeout, limits=limits, trust_env=outside, follow_redirects=False)


_CHECK = f"Check the settings below {PLACE}.api."
_LATER = "Check the address and the network, or try later; max_retries and timeout give it more time."
_KEY = f"Check the key in the environment variable that {PLACE}.api.api_key names, and what it may use."
_RATE = "Set requests_per_minute or a smaller max_concurrency, check the account's quota, or try later."
_ADDRESS = f"Check {PLACE}.api.model_name and api_url, the full address up to /chat/completions."
_BODY = (
    f"Check {PLACE}.api (model_name, temperature, max_tokens, structured_output); where single answers are "
    "at fault, skip_refused: true leaves them unscored."
)
_REASONS: dict[int, tuple[str, str]] = {
    400: ("The endpoint does not take this request.", _BODY),
    401: ("The endpoint does not know the key, or got none.", _KEY),
    403: ("The endpoint does not allow this with the key that it got.", _KEY),
    404: ("There is no such address, or no such model.", _ADDRESS),
    405: ("The address is not that of a chat endpoint.", _ADDRESS),
    413: ("The request is too long for the endpoint.", _BODY),
    422: ("The endpoint does not take this request.", _BODY),
    429: ("More was asked than the endpoint allows.", _RATE),
}


def try_endpoint(settings: ApiSettings, key: str | None) -> list[str]:
    """Ask for the list of models, which costs nothing; any answer shows that the server is there.

    Returns:
        What is doubtful, in words: the key is not known, or no answer came in time.

    Raises:
        UserError: no connection can be made.
    """
    shown, header = endpoint(settings.api_url), {} if key is None else {"Authorization": f"Bearer {key}"}
    address = urlsplit(settings.api_url)
    models = urlunsplit(address._replace(path=address.path.removesuffix("/chat/completions") + "/models"))
    try:
        with (
            _client(settings, min(TRIAL_SECONDS, settings.timeout)) as client,
            client.stream("GET", models, headers=header) as response,
        ):
            status = response.status_code  # what the reply holds does not matter
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise UserError(
            f"The reward endpoint {shown} cannot be reached ({type(error).__name__}: {error}).",
            "Answers are judged there after the training before, which would then have been for nothing.",
            f"Start the server, check the network, or correct {PLACE}.api.api_url.",
        ) from error
    except httpx.HTTPError as error:
        return [f"the reward endpoint {shown} does not list its models ({type(error).__name__})"]
    if status in (401, 403):
        return [f"the reward endpoint {shown} answers {status} to a list of its models. {_KEY}"]
    return []


def words(content: bytes, kind: str) -> str:
    """Return the text of a chat completion; empty where it has no choice or no text.

    Raises:
        TransientError: it is no chat completion.
    """
    try:
        value = json.loads(content)
        choices = value["choices"]
        text = choices[0]["message"]["content"] if choices else None
    except (ValueError, RecursionError, KeyError, TypeError, IndexError) as error:
        raise TransientError(f"a reply that is no chat completion ({kind[:40]})", 200) from error
    if text is not None and not isinstance(text, str):
        raise TransientError("a chat completion whose content is not text", 200)
    return text or ""


def retry_after(header: str | None, sent: str | None = None) -> float | None:
    """Return the seconds that a Retry-After header asks for (a number or an HTTP date); None: neither.

    Args:
        header: its value. sent: the reply's Date header: a date is counted from there, by the endpoint's own
            clock, and from now only where there is none.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        until = _http_date(header)
        if until is None:
            return None
        seconds = (until - (_http_date(sent or "") or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _http_date(text: str) -> datetime | None:
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)
