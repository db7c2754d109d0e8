"""The directions of the target: the mean of its rows' unit gradients by group, or each row's own.

    D_g = mean over the rows z' of group g of  grad l(z'; theta) / |grad l(z'; theta)|

at one checkpoint, over the trainable parameters theta; a zero gradient counts as zeros. With a ``policy`` the
gradient of a row is the policy gradient of a reward, from the answers that the model gave to it
(gradients/policy.py). The table has a line per target row with the length of its gradient; the directions are
beside it in ``directions.safetensors`` (gradients/directions.py), one tensor of [directions, numel] per
parameter. Labels are the names of the groups, or the numbers of the rows (``per: row``); a group without a
valid row has no direction.

A part's sums are a file of their own until the table is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.features.answers import COLUMNS as ANSWER_COLUMNS
from dataflex_pipeline.features.answers import PartAnswers, answer_needs, numbers, read_answers
from dataflex_pipeline.features.capturing import COLUMNS, NOT_FINITE, Loaded, load, number_ingredients
from dataflex_pipeline.features.params import DirectionParams
from dataflex_pipeline.gradients.policy import WeightedAnswers
from dataflex_pipeline.gradients.similarity import DIRECTIONS
from dataflex_pipeline.models.weights import row_flops
from dataflex_pipeline.schemas import GROUP, REASON, ROW, ROW_ID, VALID, column

if TYPE_CHECKING:
    from torch import Tensor

    from dataflex_pipeline.gradients.directions import DirectionSums, Label

ROWS_COMPARED = 256
"""Target rows that are compared with one row at a time."""
Sums = TypeVar("Sums", bound="DirectionSums")


@dataclass(frozen=True)
class Lot:
    """Rows of a part whose sequences are captured alike.

    Attributes:
        rows: places in the part. answers: their sequences. temperature: that the logits are divided by.
    """

    rows: list[int]
    answers: WeightedAnswers
    temperature: float


Add = Callable[[Lot, Mapping[int, int], "DirectionSums"], tuple[np.ndarray, np.ndarray]]
"""Adds the rows of a lot to sums, each to the one given; returns their gradients' lengths and losses."""


class TargetDirections(api.Feature):
    """Mean unit gradients of the target at one checkpoint."""

    of_trained_weights = True
    input_columns = COLUMNS
    side_files = "sums-*.safetensors"

    class Params(DirectionParams):
        """Parameters of target_directions."""

    params: Params

    def __init__(self, params: Any, config: Any) -> None:
        super().__init__(params, config)
        loss = column("loss", pa.float64(), "mean response loss, nats per token")
        own = ANSWER_COLUMNS if params.policy is not None else (loss,)
        norm = column("norm", pa.float64(), "length of the row's gradient (0: no signal)")
        self.schema = pa.schema([ROW, ROW_ID, norm, *own, GROUP.with_nullable(True), VALID, REASON])

    def needs(self, need: api.Need) -> Mapping[str, api.Need]:
        """Ask for the sampled answers and their rewards at the same checkpoint, for a policy gradient."""
        return {} if self.params.policy is None else answer_needs(self.params.policy, need)

    def ingredients(self) -> dict[str, Any]:
        """Return the precision and attention kernel, which move the last digits."""
        return number_ingredients(self.config)

    def row_flops(self, tokens: float) -> float:
        """Return those of a forward and a backward pass over each sequence, each as long as the row."""
        policy = self.params.policy
        return row_flops(self.config, tokens, 3 * (1 if policy is None else policy.generations.mc_samples))

    def has_beside(self, folder: Path, first_row: int, fingerprint: str) -> bool:
        """Whether the sums of a part are there, or the directions that were made of them."""
        from dataflex_pipeline.gradients.directions import is_sound

        paths = (_sums_of(folder, first_row), folder / DIRECTIONS)
        return any(is_sound(path, fingerprint) for path in paths)

    def finish(self, folder: Path, first_rows: Sequence[int], fingerprint: str) -> None:
        """Combine the parts' sums into the directions."""
        from dataflex_pipeline.gradients.directions import combine, is_sound

        if not is_sound(folder / DIRECTIONS, fingerprint):
            parts = [_sums_of(folder, first) for first in first_rows]
            combine(parts, folder / DIRECTIONS, fingerprint)

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load base and adapter once; yield the function from rows to their lengths, sums beside."""
        from dataflex_pipeline.gradients.directions import DirectionSums, write_sums

        loaded = load(given, self.config, progress)
        self._check_room(loaded)
        with self._adding(loaded) as add:

            def compute(rows: pa.Table) -> pa.Table:
                labels = rows.column("row" if self.params.per == "row" else "group").to_pylist()
                made, sums = self._compute(
                    rows, labels, loaded, add, partial(DirectionSums.empty, loaded.trainable, loaded.device)
                )
                if given.folder is not None:
                    first = rows.column("row")[0].as_py()
                    write_sums(_sums_of(given.folder, first), sums, given.made)
                return made

            yield compute

    @contextmanager
    def _adding(self, loaded: Loaded) -> Iterator[Add]:
        """Open a model to take whole gradients; yield the function that adds rows to sums."""
        from dataflex_pipeline.gradients.directions import RowGradients, add_rows, rows_in_flight

        numel = sum(p.numel() for p in loaded.trainable.values())
        in_flight = rows_in_flight(numel, loaded.given.table.n_rows)
        consumer = RowGradients(loaded.trainable, in_flight, loaded.device)
        with loaded.capturing(consumer, counts_rows=False) as (capture, room):

            def add(lot: Lot, slots: Mapping[int, int], sums: DirectionSums) -> tuple[np.ndarray, np.ndarray]:
                capture.temperature = lot.temperature
                return add_rows(loaded.model, capture, consumer, lot.answers, slots, sums, room)

            yield add

    def cosines(self, loaded: Loaded, direction: Mapping[str, Tensor]) -> Iterator[pa.Table]:
        """Yield the cosine of every target row's gradient with a direction of length 1, in blocks of rows.

        Args:
            loaded: the model, with the target's rows and the tables of their answers.
            direction: by parameter name. [numel] each

        Yields:
            row, cosine (0 without a signal) and valid of some rows.
        """
        from dataflex_pipeline.gradients.directions import Cosines

        columns = [name for name in COLUMNS if name in loaded.given.table.schema.names]
        with self._adding(loaded) as add:
            for block in loaded.given.table.blocks(columns, ROWS_COMPARED):
                rows = pa.Table.from_batches([block])
                numbers = rows.column("row").to_pylist()
                made, found = self._compute(rows, numbers, loaded, add, partial(Cosines.empty, direction))
                values = [found.values.get(row, 0.0) for row in numbers]
                yield made.select(["row", "valid"]).append_column("cosine", pa.array(values, pa.float64()))

    def _check_room(self, loaded: Loaded) -> None:
        from dataflex_pipeline.gradients.directions import check_room

        blocks = loaded.given.table.blocks(["group"])
        groups = {name for block in blocks for name in block.column("group").to_pylist()}
        count = loaded.given.table.n_rows if self.params.per == "row" else len(groups)
        size = 4 * count * sum(p.numel() for p in loaded.trainable.values())
        doubled = count if self.params.per == "group" else 0  # sums of groups are in float64
        check_room(size, loaded.trainable, 1 + doubled, loaded.device, self.params.per)

    def _compute(
        self,
        rows: pa.Table,
        labels: list[Label],
        loaded: Loaded,
        add: Add,
        empty: Callable[[list[Label]], Sums],
    ) -> tuple[pa.Table, Sums]:
        """Return the table of a part, and the sums of its rows.

        Args:
            rows: of the part. labels: what the sum is of that each one is added to. [rows]
            loaded, add: the model. empty: makes the sums of no rows yet, from their labels.
        """
        answers = None
        if self.params.policy is None:
            lots = [_plain(rows)]
        else:
            answers = read_answers(loaded.given, rows, self.params.policy)
            lots = _drawn(answers, self.params.policy.token_mean)
        found = sorted({labels[row] for lot in lots for row in lot.rows})
        sums = empty(found)
        norms, losses = np.full(rows.num_rows, np.nan), np.full(rows.num_rows, np.nan)
        for lot in lots:
            slots = {row: found.index(labels[row]) for row in lot.rows}
            norms[lot.rows], losses[lot.rows] = add(lot, slots, sums)
        if answers is None:
            return self.table(rows, {"norm": norms, "loss": losses}, NOT_FINITE), sums
        kept, reasons = answers.outcome(np.isfinite(norms))
        columns = {
            **{name: rows.column(name) for name in ("row", "row_id", "group")},
            "norm": pa.array(norms, mask=~kept),
            **answers.columns(kept),
            "valid": pa.array(kept),
            "reason": pa.array(reasons, pa.string()),
        }
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema), sums


def _plain(rows: pa.Table) -> Lot:
    """Return the usable rows of a part with their own responses."""
    valid = np.flatnonzero(rows.column("valid").to_numpy(zero_copy_only=False)).tolist()
    own = [(row, 1.0, numbers(rows, "input_ids", row), numbers(rows, "labels", row)) for row in valid]
    return Lot(valid, WeightedAnswers.of(own), 1.0)


def _drawn(answers: PartAnswers, token_mean: bool) -> list[Lot]:
    """Return the rows that have a gradient, be it 0: those with their samples, and those with their own."""
    usable = np.array([reason is None for reason in answers.weighing.reasons], dtype=bool)
    own = answers.weighing.reference
    return [
        Lot(np.flatnonzero(mask).tolist(), replace(some, weights=some.scales(token_mean)), temperature)
        for mask, (some, temperature) in zip((usable & ~own, own), answers.by_temperature, strict=True)
    ]


def _sums_of(folder: Path, first_row: int) -> Path:
    return folder / f"sums-{first_row:09d}.safetensors"
