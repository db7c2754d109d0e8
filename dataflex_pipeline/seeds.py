"""One seed in the configuration; every consumer derives its own named stream from it."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: object) -> int:
    """Derive a 64-bit seed for a named stream, the same on every machine and in every version.

    Args:
        seed: the configuration's seed.
        names: what the stream is for, such as ``("select", 2)``; strings and integers only.

    Returns:
        An integer in [0, 2**64).
    """
    for name in names:
        if not isinstance(name, str | int):
            raise TypeError(f"a stream name is a string or an integer, got {type(name).__name__}")
    text = "\x1f".join([str(int(seed)), *(f"{type(n).__name__}:{n}" for n in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
