"""The memory of a model's work: what is free on its device, and the peak of a piece of work.

On an accelerator its allocator tells both. On a CPU every operation's new storages are counted while they
live (a torch dispatch mode over forward and backward), which is the same number each time, as the process's
resident size is not; scratch inside an operation is not seen, and neither is what the allocator keeps.

A batch of rows of t tokens each is taken to need, with N its padded tokens,

    fixed + N x (per_token + per_row / t)

The three are measured on rows of which every token is labelled, which no real row exceeds: a long one, one
of a quarter of its length, and two of these.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch  # noqa: TID253  (imported lazily by the features that load a model)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: TID253

from dataflex_pipeline.host_memory import available_bytes, local_processes

if TYPE_CHECKING:
    from dataflex_pipeline.models.batches import Sequences

CPU_SHARE, ACCELERATOR_SHARE = 0.6, 0.85
"""Of the free memory, what a batch may take: an accelerator's allocator counts exactly and loses a little to
fragments; on a CPU scratch and kept pages come on top, and other programs take memory, too."""
SHORTER = 4
"""The shorter of the measured rows has this part of the longest one's tokens."""
MIB = 1 << 20


def counts_itself(device: torch.device) -> bool:
    """Whether an accelerator's allocator tells the peak; elsewhere storages are counted."""
    return device.type not in ("cpu", "mps")


def free_bytes(device: torch.device | str) -> int | None:
    """Return what this process may still take on a device, in bytes; None where that is not known."""
    device = torch.device(device)
    if device.type == "cpu":
        return available_bytes(local_processes())
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    free, _ = torch.accelerator.get_memory_info(device)
    # What the allocator holds and has not given out can be used, too.
    kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return int(free) + int(kept)


def share_of(device: torch.device | str) -> float:
    """Return the share of a device's free memory that a batch may take."""
    return ACCELERATOR_SHARE if counts_itself(torch.device(device)) else CPU_SHARE


def peak_of(work: Callable[[], object], device: torch.device | str) -> int:
    """Return the bytes that a piece of work takes at most, beyond what there was before it."""
    device = torch.device(device)
    if not counts_itself(device):
        with LiveStorages() as counter:
            work()
        return int(counter.peak)
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    work()
    return int(torch.accelerator.max_memory_allocated(device) - before)


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations make while the context lasts, as long as each lives.

    Attributes:
        live: bytes now. peak: bytes at most.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and importing what would be kept from it takes seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count the storages of its outputs that are none of its inputs'."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = _storages(result)
        if outputs:
            there = {id(storage) for storage in _storages((args, kwargs))}
            for storage in outputs:
                if id(storage) not in there and storage not in self._seen:
                    self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self._seen.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size).atexit = False

    def _drop(self, size: int) -> None:
        self.live -= size


def _storages(values: Any) -> list[Any]:
    """Return the storages of the tensors in an operation's arguments or results: tuples, lists and dicts."""
    found, waiting = [], [values]
    while waiting:  # once per operation: torch's own walk over trees takes longer than a small model's work
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            found.append(value.untyped_storage())
        elif isinstance(value, (tuple, list)):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
    return found


@dataclass(frozen=True)
class BatchMemory:
    """What a batch takes, in bytes; see the module.

    Attributes:
        fixed: of any batch. per_token: of a padded token. per_row: of a row, beside its tokens.
        longest: of a single row of the longest length.
    """

    fixed: float
    per_token: float
    per_row: float
    longest: float

    def of_tokens(self, mean_length: float) -> float:
        """Return the bytes of a padded token in batches of rows of about so many tokens."""
        return self.per_token + self.per_row / max(1.0, mean_length)

    def of_batch(self, rows: int, length: int) -> float:
        """Return the bytes of a batch of so many rows, padded to so many tokens."""
        return self.fixed + rows * (self.per_row + length * self.per_token)

    def tokens_in(self, free: float, mean_length: float) -> int:
        """Return the padded tokens that fit so many bytes."""
        return max(0, int((free - self.fixed) / max(1.0, self.of_tokens(mean_length))))


def measure_batches(
    run: Callable[[Sequences, np.ndarray], object],
    ids: np.ndarray,
    device: torch.device | str,
    fits: Callable[[float], bool] = lambda size: True,
) -> BatchMemory:
    """Measure what batches take.

    Args:
        run: does the work of a batch: sequences and the rows of them that are in it; the result is dropped.
        ids: tokens of the longest row. [T]
        device: where the work is done.
        fits: is asked before the long row is run, with the bytes that it may take.

    Raises:
        OutOfMemoryError: a row does not fit.
    """
    long = len(ids)
    short = max(1, long // SHORTER)

    def batch(*lengths: int) -> int:
        probe = _labelled(ids, lengths)
        return peak_of(lambda: run(probe, np.arange(len(lengths))), device)

    batch(short, max(1, short // 2))  # makes what later batches find there, and is checked as the first one
    one = batch(short)
    if short == long:
        return BatchMemory(0.0, one / long, 0.0, one)
    expected = one * long / short
    if not fits(expected):
        raise torch.OutOfMemoryError(f"a row of {long:,} tokens takes about {expected / MIB:,.0f} MiB")
    whole = batch(long)
    per_token = max(0.0, (whole - one) / (long - short))
    per_row = max(0.0, batch(short, short) - one - per_token * short)
    fixed = max(0.0, whole - per_row - per_token * long)
    return BatchMemory(fixed, per_token, per_row, whole)


def _labelled(ids: np.ndarray, lengths: tuple[int, ...]) -> Sequences:
    """Return rows that are the beginnings of one, every token labelled."""
    from dataflex_pipeline.models.batches import Sequences

    tokens = np.concatenate([ids[:length] for length in lengths])
    return Sequences(tokens, tokens, np.concatenate([[0], np.cumsum(lengths)]))


def quantised(tokens: int) -> int:
    """Return the largest of 1, 2, 3, 4, 6, 8, 12, ... that is not above: small changes make no other one."""
    if tokens < 2:
        return 1
    power = 1 << (tokens.bit_length() - 1)
    return power + power // 2 if tokens >= power + power // 2 else power
