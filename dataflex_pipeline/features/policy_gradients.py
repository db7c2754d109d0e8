"""The policy gradients of target rows, projected: the direction in which a reward falls fastest.

The row's sampled answers come from the generations table and their rewards from the rewards table, both of
the same checkpoint; which answers count and how much is in gradients/policy.py. What is kept is what the
gradients feature keeps of a plain gradient: the random projection, scaled to length 1, in columns of the same
names, so that the same cosines can be taken with either. The length before projection is not known: each
answer is projected alone and the sum is over projections.

Samples count by log p at the temperature that they were drawn at, a row's own answer by log p at temperature
1. A row without signal (every weight is 0, such as equal rewards under a baseline, or all rewards 0) is valid
and has the gradient 0: its cosine with anything is 0, and it counts in the mean over the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.features.answers import COLUMNS as ANSWER_COLUMNS
from dataflex_pipeline.features.answers import PartAnswers, answer_needs, read_answers
from dataflex_pipeline.features.capturing import COLUMNS, load, number_ingredients
from dataflex_pipeline.features.params import SketchParams, TargetPolicy
from dataflex_pipeline.gradients.policy import summed_gradients
from dataflex_pipeline.models.weights import row_flops
from dataflex_pipeline.schemas import GROUP, REASON, ROW, ROW_ID, VALID, column

if TYPE_CHECKING:
    from dataflex_pipeline.gradients.capture import GradientCapture
    from dataflex_pipeline.gradients.stream import ProjectedGradients
    from dataflex_pipeline.models.room import Room


class PolicyGradients(api.Feature):
    """Projected policy gradient of every target row at one checkpoint."""

    version = 2
    of_trained_weights = True
    input_columns = COLUMNS

    class Params(SketchParams, TargetPolicy):
        """Parameters of policy_gradients."""

    params: Params

    DTYPES: ClassVar[dict[str, pa.DataType]] = {"float16": pa.float16(), "float32": pa.float32()}

    def __init__(self, params: Any, config: Any) -> None:
        super().__init__(params, config)
        vector = pa.list_(self.DTYPES[params.dtype], params.proj_dim)
        meaning = "projected policy gradient, scaled to length 1 (0 where there is no signal)"
        self.schema = pa.schema(
            [
                ROW,
                ROW_ID,
                column("gradient", vector, meaning),
                column("projected_norm", pa.float32(), "length after projection, before scaling"),
                *ANSWER_COLUMNS,
                GROUP.with_nullable(True),
                VALID,
                REASON,
            ]
        )

    def needs(self, need: api.Need) -> Mapping[str, api.Need]:
        """Ask for the sampled answers and their rewards at the same checkpoint."""
        return answer_needs(self.params, need)

    def ingredients(self) -> dict[str, Any]:
        """Return the precision and attention kernel, which move the last digits."""
        return number_ingredients(self.config)

    def row_flops(self, tokens: float) -> float:
        """Return those of a forward and a backward pass over each sample, taken as long as the row itself."""
        return row_flops(self.config, tokens, passes=3 * self.params.generations.mc_samples)

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load base and adapter once; yield the function from rows to projected policy gradients."""
        from dataflex_pipeline.gradients.projection import make_projection
        from dataflex_pipeline.gradients.stream import ProjectedGradients

        loaded = load(given, self.config, progress)
        projection = make_projection(
            self.params.projection, self.params.proj_dim, self.params.seed, device=loaded.device
        )
        consumer = ProjectedGradients(projection)
        with loaded.capturing(consumer, counts_rows=False) as (capture, room):

            def compute(rows: pa.Table) -> pa.Table:
                answers = read_answers(given, rows, self.params)
                sums, finite = self._sums(loaded.model, capture, consumer, answers, rows.num_rows, room)
                return self._table(rows, answers, sums, finite)

            yield compute

    def _sums(
        self,
        model: Any,
        capture: GradientCapture,
        consumer: ProjectedGradients,
        answers: PartAnswers,
        n_rows: int,
        room: Room,
    ) -> tuple[np.ndarray, np.ndarray]:
        shape = (n_rows, self.params.proj_dim)
        sums, finite = np.zeros(shape), np.ones(n_rows, dtype=bool)
        for some, temperature in answers.by_temperature:
            part, sound = summed_gradients(
                model, capture, consumer, some, shape, room, self.params.token_mean, temperature
            )
            sums += part
            finite &= sound
        return sums, finite

    def _table(self, rows: pa.Table, answers: PartAnswers, sums: np.ndarray, finite: np.ndarray) -> pa.Table:
        kept, reasons = answers.outcome(finite)
        norms = np.linalg.norm(sums, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = np.where((kept & (norms > 0))[:, None], sums / norms[:, None], 0.0)
        flat = pa.array(unit.astype(np.dtype(self.params.dtype)).reshape(-1), self.DTYPES[self.params.dtype])
        columns = {
            "row": rows.column("row"),
            "row_id": rows.column("row_id"),
            "gradient": pa.FixedSizeListArray.from_arrays(flat, self.params.proj_dim, mask=pa.array(~kept)),
            "projected_norm": pa.array(norms.astype(np.float32), mask=~kept),
            **answers.columns(kept),
            "group": rows.column("group"),
            "valid": pa.array(kept),
            "reason": pa.array(reasons, pa.string()),
        }
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)
