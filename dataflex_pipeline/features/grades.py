"""The grades of rows: what a judge, a reward model or a metric says of each row's last answer.

A judge in words grades from 1 to ``max_score`` (5): how well the last answer does what the conversation
before it asks. Its reply counts as the number that it wrote; one below 1 is none. A reward model or a
function gives its output as it is. Every reply is in a journal in the table's folder as soon as it is known,
so that after a kill nothing is asked, or paid, twice (features/judging.py). A reply without a grade is asked
for once more, and then the row is not valid, with the judge's words beside it.

``seconds``, and ``attempts`` at a remote endpoint, tell what happened and differ between runs; no score is
made from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dataflex_pipeline import api
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.features.judging import Judged, Judging, Line, remove_finished
from dataflex_pipeline.features.score_params import GradeParams, grading_settings
from dataflex_pipeline.reward import Reward
from dataflex_pipeline.reward.address import named_for
from dataflex_pipeline.reward.answers import JudgedAnswer, conversation_text, split_turns
from dataflex_pipeline.reward.journal import JOURNALS
from dataflex_pipeline.reward.settings import JudgeSettings, MetricSettings, Settings, identity_of
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column

METHOD = "judge"
"""The method whose settings these are, as errors name it."""
LOWEST = 1.0
NO_ANSWER = "the row has no answer to grade"
BELOW = "the judge's grade is below 1"

GRADES = pa.schema(
    [
        ROW,
        ROW_ID,
        column("grade", pa.float64(), "the grade, higher is better; null where there is none"),
        column("raw", pa.string(), "the judge's own last reply; null for backends without words"),
        column("attempts", pa.int32(), "requests that it took; 0 where an equal row's grade is taken"),
        column("seconds", pa.float64(), "seconds of the requests over the network; null elsewhere"),
        column("backend", pa.string(), "what judged: the backend and its model or metric", nullable=False),
        VALID,
        REASON,
    ]
)


class Grades(api.Feature):
    """The grade of every row's last answer."""

    Params = GradeParams
    params: GradeParams
    uses_model = False
    input_columns = ("row", "row_id", "messages", "valid", "reason")
    schema = GRADES
    side_files = JOURNALS

    def __init__(self, params: Any, config: Any) -> None:
        super().__init__(params, config)
        with named_for(METHOD):
            self.settings: Settings = grading_settings(params)

    def ingredients(self) -> dict[str, Any]:
        """Return what of the chosen backend's settings decides a grade, and its model or function."""
        with named_for(METHOD):
            return {"backend": identity_of(self.settings, self.config)}

    def check(self, need: api.Need, n_rows: int | None) -> None:
        """Check what the backend needs beside its settings: the API's key, the judge's files, a function.

        Raises:
            UserError: something is not there, or a metric compares with an answer that no row of a pool has.
        """
        with named_for(METHOD):
            self.settings.check()
        _check_metric(self.settings)

    def reach(self) -> Sequence[str]:
        """Try the endpoint, where there is one."""
        with named_for(METHOD):
            return self.settings.reach()

    @contextmanager
    def open(
        self, given: api.FeatureInput, progress: api.Progress
    ) -> Iterator[Callable[[pa.Table], pa.Table]]:
        """Load the backend once; yield the function from rows to grades.

        Raises:
            DataflexError: the backend finally failed; every reply that had arrived is in the journal.
        """
        if given.folder is None:
            raise ValueError("grades are kept in the folder of their table, and none was given")
        remove_finished(given.folder)
        with named_for(METHOD), self.settings.rewarder(self.config, progress.say) as rewarder:
            parts = GradeParts(rewarder, self.settings, given, progress)
            yield parts.part
        parts.say_unscored()
        remove_finished(given.folder)


def _check_metric(settings: Settings) -> None:
    """Refuse a shipped metric that compares with a reference: a row's last answer is what is graded.

    Raises:
        ConfigError: it is one.
    """
    if not isinstance(settings, MetricSettings) or settings.journalled:
        return
    from dataflex_pipeline.reward.metric_functions import NEEDS_NO_REFERENCE

    if settings.name not in NEEDS_NO_REFERENCE:
        raise ConfigError(
            f"judge.reward_backend_params.metric.name is {settings.name}.",
            "It compares answers with a reference; judge grades a row's own answer, and there is no other.",
            f"Set it to {', '.join(NEEDS_NO_REFERENCE)}, or to a function of your own (file.py:function).",
        )


class GradeParts(Judging):
    """Turns the rows of a part into their grades."""

    def lines(self, rows: pa.Table) -> list[Line]:
        """Return a line for each row, with its last answer."""
        return [_line(row) for row in rows.to_pylist()]

    def table(
        self, lines: Sequence[Line], references: Mapping[int, JudgedAnswer], judged: Judged
    ) -> pa.Table:
        """Put the lines of the table together."""
        made = [None if line.answer is None else self._graded(judged.reward(line.answer)) for line in lines]
        timed = self.settings.paid  # what is computed here is identical whenever it is, to the last column
        columns: dict[str, Any] = {
            "row": [line.row for line in lines],
            "row_id": [line.row_id for line in lines],
            "grade": [grade and grade.value for grade in made],
            "raw": [grade and grade.raw for grade in made],
            "attempts": [grade and grade.attempts for grade in made],
            "seconds": [grade and grade.seconds if timed else None for grade in made],
            "backend": [f"{self.settings.backend} {self.settings.subject}"] * len(lines),
            "valid": [grade is not None and grade.value is not None for grade in made],
            "reason": [
                line.reason if grade is None else grade.reason
                for line, grade in zip(lines, made, strict=True)
            ],
        }
        return pa.table({name: pa.array(columns[name], GRADES.field(name).type) for name in GRADES.names})

    def _graded(self, reward: Reward) -> Reward:
        """Return a reward on the scale of the grades; a judge's words are a share of the best one."""
        if reward.value is None or not isinstance(self.settings, JudgeSettings):
            return reward
        grade = reward.value * self.settings.max_score
        return replace(reward, value=grade) if grade >= LOWEST else replace(reward, value=None, reason=BELOW)


def _line(row: Mapping[str, Any]) -> Line:
    """Return the line of a prepared row."""
    before, own = split_turns(row["messages"])
    if not row["valid"] or own is None:
        return Line(row["row"], row["row_id"], 0, None, row["reason"] or NO_ANSWER)
    answer = JudgedAnswer(f"row {row['row']}", conversation_text(before), own, None, before)
    return Line(row["row"], row["row_id"], 0, answer, None)
