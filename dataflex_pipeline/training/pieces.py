"""Micro-batches in smaller pieces, from the step on in which the memory turned out to be too small.

The first step of a round is measured before it is taken (first_step.py); a later one can need more: another
program takes memory, or the allocator's is in fragments. An accelerator raises an error then. The step is
begun anew, with the random numbers that it began with, and from there on no more than half the failed piece's
padded tokens are taken at a time. A step's loss is a sum over its rows, divided by a count that pieces do not
change, so its gradient is the same sum in another order; only dropout draws other numbers.

From which step on how many tokens are taken is noted in the unfinished round's folder. A training that was
killed takes the same pieces in the same steps, whether memory is short again or not.

Processes that train together call each other once per micro-batch, so one of them cannot take more pieces
than the others: there the training ends, in words, and is gone on with by fewer rows at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch  # noqa: TID253 (this module is only imported to train)

from dataflex_pipeline.errors import CorruptError, UserError
from dataflex_pipeline.models.room import give_memory_back, memory_failure
from dataflex_pipeline.store.agreed import agreed_file
from dataflex_pipeline.store.atomic import write_text

if TYPE_CHECKING:
    from dataflex_pipeline.training.plan import RoundPlan

Batch = Mapping[str, torch.Tensor]
"""A micro-batch, padded on the right: attention_mask, input_ids and labels [B, T], weight [B]."""
Run = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""Does forward and backward of a piece, and returns its share of the step's loss."""


class RowTooLargeError(UserError):
    """A row alone is too large for the memory."""


@dataclass(frozen=True)
class Limit:
    """From a step on, so many padded tokens are taken at a time at most."""

    step: int
    tokens: int


class Pieces:
    """The pieces that a training's micro-batches are taken in.

    Args:
        plan: of the round; the limits are noted in its folder. device: where it trains.
        note: says something and records it. drop_gradients: of a step that is begun anew.
        dropout: whether the model draws random numbers.
    """

    def __init__(
        self,
        plan: RoundPlan,
        device: torch.device,
        note: Callable[[str], None],
        drop_gradients: Callable[[], None],
        dropout: bool,
    ) -> None:
        self._path = agreed_file(plan.work, plan.pieces_name)
        self._device, self._note, self._drop_gradients = device, note, drop_gradients
        self._but = ", but for dropout, which draws other numbers" if dropout else ""
        self._limits = read_limits(self._path)
        self._batches: Sequence[Batch] = ()
        self._taken, self._step, self._largest = 0, 0, (0, 0)
        self._random: list[torch.Tensor] = []
        if self._limits:
            last = self._limits[-1]
            note(
                f"The memory was too small in this round before: from step {last.step} on it takes at most "
                f"{last.tokens:,} padded tokens at a time{self._but}."
            )

    def begin(self, batches: Sequence[Batch]) -> None:
        """Begin an optimizer step with these micro-batches."""
        self._batches, self._taken = batches, 0

    def take(self, step: int, run: Run) -> tuple[torch.Tensor, bool]:
        """Do the next micro-batch of the step, and where memory fails, again all of the step so far.

        Args:
            step: its number in the whole run. run: does the work of a piece.

        Returns:
            The loss of what was done, and whether that is all of the step so far.

        Raises:
            RowTooLargeError: a row alone is too large.
        """
        if self._taken == 0:
            self._step, self._random = step, _random_state(self._device)
        self._taken += 1
        found = self._attempt(self._batches[self._taken - 1 : self._taken], run)
        anew = found is None
        while found is None:
            self._drop_gradients()
            give_memory_back()
            _set_random_state(self._device, self._random)
            found = self._attempt(self._batches[: self._taken], run)
        return found, anew

    def _attempt(self, batches: Sequence[Batch], run: Run) -> torch.Tensor | None:
        """Return the loss of some micro-batches; None where the memory was too small: the limit is lower."""
        losses: list[torch.Tensor] = []
        failure = memory_failure(partial(self._run, batches, run, losses))
        if failure is None:
            return torch.stack(losses).sum()
        losses.clear()
        rows, length = self._largest
        tokens = halved(rows, length, f"step {self._step}", failure, self._device)
        self._limits.append(Limit(self._step, tokens))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps([asdict(limit) for limit in self._limits]) + "\n")
        self._note(
            f"The memory of {self._device} was too small for {rows} rows of up to {length:,} tokens in step "
            f"{self._step}: from there on at most {tokens:,} padded tokens are taken at a time. The numbers "
            f"of the run stay as they are{self._but}."
        )
        return None

    def _run(self, batches: Sequence[Batch], run: Run, losses: list[torch.Tensor]) -> None:
        for batch in batches:
            for piece in cut(batch, self._limit):
                rows, length = piece["input_ids"].shape
                self._largest = rows, length
                losses.append(run(piece).detach())

    @property
    def _limit(self) -> int | None:
        return min((limit.tokens for limit in self._limits if limit.step <= self._step), default=None)


def cut(batch: Batch, tokens: int | None) -> list[dict[str, torch.Tensor]]:
    """Cut a micro-batch into pieces of so many padded tokens at most, or of one row.

    Args:
        batch: padded on the right. tokens: padded ones of a piece; None leaves it whole.
    """
    rows, length = batch["input_ids"].shape
    if tokens is None or rows * length <= tokens:
        return [dict(batch)]
    size = max(1, tokens // length)
    return [_rows(batch, first, first + size) for first in range(0, rows, size)]


def _rows(batch: Batch, first: int, end: int) -> dict[str, torch.Tensor]:
    """Return some rows, without the padding that none of them needs."""
    longest = int(batch["attention_mask"][first:end].sum(1).max())
    return {
        name: tensor[first:end] if tensor.ndim == 1 else tensor[first:end, :longest]
        for name, tensor in batch.items()
    }


def halved(rows: int, length: int, work: str, failure: str, device: torch.device) -> int:
    """Return the padded tokens of half a piece that did not fit, a row of it at least.

    Raises:
        RowTooLargeError: it was one row.
    """
    if rows > 1:
        return max(length, rows * length // 2)
    raise RowTooLargeError(
        f"The memory of {device} is too small for one row of {length:,} tokens in {work}: "
        f"{failure.splitlines()[0]}",
        "A step cannot be taken in pieces of less than a row.",
        "Make room on the device.",
    )


def read_limits(path: Path) -> list[Limit]:
    """Return the limits that a killed training noted.

    Raises:
        CorruptError: the file is not one that this program wrote.
    """
    if not path.is_file():
        return []
    try:
        return [Limit(int(each["step"]), int(each["tokens"])) for each in json.loads(path.read_text("utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{path} does not hold steps and numbers of tokens.",
            "It was written whole by this program, so something else changed it.",
            "Delete it, and run the same command again.",
        ) from error


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device.type).get_rng_state())  # of the one that it trains on
    return states


def _set_random_state(device: torch.device, states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device.type).set_rng_state(states[1])
