"""Philox-4x32 with 10 rounds: random words of a counter and a key, the same on every device and in any order.

A counter of four 32-bit words and a key of two give four random words. One round:

    (c0, c1, c2, c3) <- (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))
    (k0, k1)         <- (k0 + W0, k1 + W1)    between rounds, modulo 2^32

Words live in int64 tensors in [0, 2^32): the product of two of them wraps modulo 2^64, which leaves both
halves right once the sign bits of the shifted upper half are masked off.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

import torch  # noqa: TID253  (imported lazily with the whole layer)

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: Words, key: int) -> Words:
    """Return four random words for every counter.

    Args:
        counter: four int64 tensors of values in [0, 2^32), of shapes that broadcast.
        key: 64 bits; the lower half is the first key word.

    Returns:
        Four int64 tensors of values in [0, 2^32), of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & MASK) ^ c1 ^ k0,
            second & MASK,
            ((first >> 32) & MASK) ^ c3 ^ k1,
            first & MASK,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def counter_words(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split non-negative int64 numbers into their lower and upper 32-bit words."""
    return numbers & MASK, numbers >> 32


def random_octets(counter: Words, key: int) -> torch.Tensor:
    """Return the 16 bytes of each counter's four words, lowest byte of the first word first.

    Args:
        counter, key: as for `philox`.

    Returns:
        [*broadcast shape, 16] uint8
    """
    words = torch.stack(philox(counter, key), -1)
    # A cast to int32 keeps the lower 32 bits, and a view splits them: no int64 has the size of the bytes.
    return words.to(torch.int32).view(torch.uint8)
