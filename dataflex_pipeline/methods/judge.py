"""Judge: the rows whose last answer a judge grades best.

    score(z) = the grade of z

A language model (here, or behind an API), a reward model or a function grades every row once; a judge in
words gives 1 to 5 (features/grades.py, reward/grading_prompts.py). The rows of the best grades are taken
(``top_k``). With whole grades many rows are equal: ties go by row. ``at_least`` leaves out the rows below a
grade: they have no score, and the reason says their grade.

Source: Chen et al., AlpaGasus: Training a Better Alpaca with Fewer Data (ICLR 2024), who keep the rows that a
judge gives 4.5 of 5 or more. The prompts are our own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from pydantic import Field

from dataflex_pipeline import api
from dataflex_pipeline.features.score_params import GradeParams
from dataflex_pipeline.sampling.softmax import Softmax
from dataflex_pipeline.schemas import column


class Judge(api.Method):
    """The rows of the best grades."""

    summary = "rows whose answer a judge grades best (AlpaGasus)"
    source = "Chen et al. 2024, AlpaGasus"
    default_strategy = "top_k"
    columns = (
        column("grade", pa.float64(), "the grade: 1 to 5 of a judge in words, else the judge's own output"),
    )

    class Params(GradeParams):
        """Parameters of judge."""

        at_least: float | None = Field(
            None, allow_inf_nan=False, description="rows of a lower grade are left out; null: none"
        )
        temperature: float = Field(
            0.1,
            gt=0,
            description="for strategy: sample, which draws by exp(score / (largest |score| x temperature))",
        )

    params: Params

    def needs(self, selection: api.Selection) -> Mapping[str, api.Need]:
        """Ask for the grades of the pool."""
        return {"grades": api.Need("grades", "pool", params=GradeParams(**self.params.part(GradeParams)))}

    def score(self, block: api.Block, state: None) -> Mapping[str, np.ndarray]:
        """Return the grade, where it is high enough."""
        grade = block.column("grades", "grade")
        least = -np.inf if self.params.at_least is None else self.params.at_least
        low = grade < least
        reason = np.full(len(grade), None, dtype=object)
        for place in np.flatnonzero(low):
            reason[place] = f"its grade {grade[place]:g} is below {least:g} (at_least)"
        return {
            "score": np.where(low, np.nan, grade),
            "reason": reason,
            "grade": grade,
        }

    def fit(self, scores: api.BlockTable, selection: api.Selection) -> Softmax:
        """Find the largest score and the scale of the softmax."""
        return Softmax.fit(scores, self.params.temperature)

    def weigh(self, block: pa.RecordBatch, fitted: Softmax) -> np.ndarray:
        """Return exp((score - largest) / scale)."""
        return fitted.weigh(block)
