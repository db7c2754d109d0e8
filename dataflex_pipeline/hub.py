"""A quick check that the hub can be reached: its own client would try again for most of a minute."""

from __future__ import annotations

import functools
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies


@functools.cache
def hub_reachable() -> bool:
    """Return whether the hub's host has an address; asked once per process.

    Behind a proxy that is not for us to say, so yes. Without this check a mistyped name costs the time of
    all the retries, per file, where there is no network.
    """
    if getproxies():
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
