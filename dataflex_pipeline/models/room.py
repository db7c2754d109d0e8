"""The size of scoring batches: as many padded tokens as the memory has room for.

``score_batch_tokens: auto`` measures what a token takes with the work at hand (memory.py), before the first
batch of a table, and takes what the free memory allows: at most LARGEST tokens, rounded down to 2^k or 3 x
2^k. That number decides which rows share a batch, and so the last digits, so it is agreed on
(store/agreed.py): a restart and all processes of a launch form the batches that the first one formed.

A batch that does not fit after all is left, its memory is freed, and the rows that are not done yet are put
into batches of half its size. That is this process's own matter, and is said.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dataflex_pipeline.models.batches import length_batches
from dataflex_pipeline.models.source import quiet
from dataflex_pipeline.store.agreed import BATCH_TOKENS, agree

if TYPE_CHECKING:
    import torch

    from dataflex_pipeline.models.batches import Sequences
    from dataflex_pipeline.models.memory import BatchMemory

Tokens = int | Literal["auto"]
"""What ``score_batch_tokens`` may be."""
Run = Callable[["Sequences", np.ndarray], object]
"""Does the work of the rows of one batch among some sequences."""
LARGEST = {"cpu": 16_384}
LARGEST_ELSEWHERE = 32_768
"""Padded tokens of a batch at most, by device; larger batches are not faster."""
MEMORY_ERRORS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory",
)
"""What torch says where memory is too small, beside its own OutOfMemoryError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory was too small."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in MEMORY_ERRORS)


class Room:
    """How many padded tokens a batch may have: fewer from where the memory was too small for as many.

    Args:
        tokens: padded tokens per batch, at first; auto: `settle` finds them.
        say: told what was chosen, and once for every size that was too large.
        relieve: makes a row take less memory, for one that does not fit alone; false where it cannot (again).
        folder: of the table that is computed, where the number of tokens is agreed on; None: it is not.
        advance: told how many rows are done, batch by batch.
    """

    def __init__(
        self,
        tokens: Tokens,
        say: Callable[[str], None] = quiet,
        relieve: Callable[[], bool] = lambda: False,
        folder: Path | None = None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._tokens: Tokens = tokens
        self._say, self._relieve, self._folder, self._advance = say, relieve, folder, advance

    @classmethod
    def of(cls, tokens: int | Room) -> Room:
        """Return a room as it is, or one of so many tokens."""
        return tokens if isinstance(tokens, Room) else cls(tokens)

    @property
    def tokens(self) -> int:
        """Padded tokens per batch; `settle` comes first where it is to be measured."""
        if self._tokens == "auto":
            raise RuntimeError("score_batch_tokens: auto has to be settled before the first batch")
        return self._tokens

    def settle(self, sequences: Sequences, run: Run, device: torch.device | str) -> None:
        """Find the size of batches where it is auto and not known yet; nothing of the measured work is kept.

        Args:
            sequences: the rows at hand; the longest one is measured.
            run: does the work of one batch of sequences. device: where it is done.

        Raises:
            OutOfMemoryError: a single row does not fit.
        """
        if self._tokens != "auto" or not len(sequences.ids):
            return
        find = partial(self._measured, sequences, run, device)
        self._tokens = find() if self._folder is None else agree(self._folder, BATCH_TOKENS, find)

    def _measured(self, sequences: Sequences, run: Run, device: torch.device | str) -> int:
        from dataflex_pipeline.models.memory import MIB, free_bytes, quantised, share_of

        lengths = sequences.lengths
        longest = int(np.argmax(lengths))
        ids = sequences.ids[sequences.starts[longest] : sequences.starts[longest + 1]]
        give_memory_back()
        free = free_bytes(device)
        allowed = inf if free is None else share_of(device) * free
        there = "" if free is None else f"{allowed / MIB:,.0f} of {free / MIB:,.0f} MiB free may be taken"
        found = self._memory_of(run, ids, device, allowed, there)
        largest = LARGEST.get(str(device).partition(":")[0], LARGEST_ELSEWHERE)
        mean = float(lengths[lengths > 0].mean())
        tokens = quantised(largest if free is None else min(largest, found.tokens_in(allowed, mean)))
        per_token = found.of_tokens(mean) / MIB
        self._say(f"score_batch_tokens: auto is {tokens:,} ({per_token:.3g} MiB a token measured; {there})")
        return tokens

    def _memory_of(
        self, run: Run, ids: np.ndarray, device: torch.device | str, allowed: float, there: str
    ) -> BatchMemory:
        """Measure, and where a row alone does not fit, once more after making it take less."""
        import torch

        from dataflex_pipeline.models.memory import MIB, measure_batches

        while True:
            found: list[BatchMemory] = []
            failure = memory_failure(
                lambda: found.append(measure_batches(run, ids, device, lambda size: size <= allowed))  # noqa: B023
            )
            if failure is None and found[0].longest <= allowed:
                return found[0]
            taken = (
                f"a row of {len(ids):,} tokens takes {found[0].longest / MIB:,.0f} MiB" if found else failure
            )
            give_memory_back()
            if not self._relieve():
                raise torch.OutOfMemoryError(f"{taken}; {there}" if there else str(taken))

    def each_batch(
        self, lengths: np.ndarray, n_labels: np.ndarray, max_labels: int, work: Callable[[np.ndarray], None]
    ) -> None:
        """Do a piece of work for every batch of rows of similar length.

        Args:
            lengths: tokens per row. [rows]
            n_labels: predicted tokens per row. [rows]
            max_labels: predicted tokens per batch.
            work: takes row numbers, and keeps nothing of a batch that it fails at.

        Raises:
            OutOfMemoryError: a single row does not fit.
        """
        left = np.arange(len(lengths))
        while len(left):
            batches = length_batches(lengths[left], n_labels[left], self.tokens, max_labels)
            done, failure = 0, None
            for batch in batches:
                failure = memory_failure(partial(work, left[batch]))
                if failure is not None:
                    self._shrink(lengths[left[batch]], failure)
                    break
                self._advance(len(batch))
                done += 1
            left = np.sort(left[np.concatenate(batches[done:])]) if failure is not None else left[:0]

    def _shrink(self, lengths: np.ndarray, failure: str) -> None:
        import torch

        give_memory_back()
        if len(lengths) == 1:
            if self._relieve():
                return
            raise torch.OutOfMemoryError(failure)
        longest, before = int(lengths.max()), int(lengths.max()) * len(lengths)
        self._tokens = max(longest, before // 2)
        self._say(
            f"the memory was too small for a batch of {before:,} padded tokens: batches of {self._tokens:,} "
            "from here on (score_batch_tokens)"
        )


def memory_failure(work: Callable[[], object]) -> str | None:
    """Do some work; return what was said where memory was too small, so that nothing of it is held."""
    try:
        work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return str(error)
    return None


def give_memory_back() -> None:
    """Free what failed work has left behind."""
    from dataflex_pipeline.models.base import free_memory

    free_memory()
