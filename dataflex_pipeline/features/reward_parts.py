"""The lines of one part of the rewards table: the generations of its rows, judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dataflex_pipeline.api import FeatureInput, Progress
from dataflex_pipeline.features.judging import Judged, Judging, Line
from dataflex_pipeline.reward import Rewarder
from dataflex_pipeline.reward.answers import JudgedAnswer, conversation_text, split_turns
from dataflex_pipeline.reward.settings import Settings
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column
from dataflex_pipeline.store.parts import PartedTable

GENERATED = ("row", "sample", "completion", "valid", "reason")
REFERENCE = "reference"

REWARDS = pa.schema(
    [
        ROW,
        ROW_ID,
        column("sample", pa.int32(), "number of the sample within its row, from 0", nullable=False),
        column("reward", pa.float64(), "the reward, higher is better; null where unscored"),
        column("raw", pa.string(), "the judge's own last reply; null for backends without words"),
        column(
            "attempts",
            pa.int32(),
            "requests that it took; 0 where an equal answer's reward is taken; null without an answer",
        ),
        column(
            "seconds",
            pa.float64(),
            "seconds of the requests over the network; null for what is computed here",
        ),
        column("backend", pa.string(), "what judged: the backend and its model or metric", nullable=False),
        column("reference_reward", pa.float64(), "reward of the row's own answer; null where not asked for"),
        VALID,
        REASON,
    ]
)


class RewardParts(Judging):
    """Turns the target rows of a part into lines of the rewards table.

    Args:
        rewarder: entered already.
        settings: its own.
        reference: whether the rows' own answers are judged too.
        given: the generations and the folder.
        progress: where to report.
    """

    def __init__(
        self,
        rewarder: Rewarder,
        settings: Settings,
        reference: bool,
        given: FeatureInput,
        progress: Progress,
    ) -> None:
        super().__init__(rewarder, settings, given, progress)
        self.reference = reference
        self.generations: PartedTable = given.tables["generations"]
        self.lines_per_row = self.generations.n_rows // given.table.n_rows

    def lines(self, rows: pa.Table) -> list[Line]:
        """Return a line for each generation."""
        first = rows.column("row")[0].as_py()
        start, stop = first * self.lines_per_row, (first + rows.num_rows) * self.lines_per_row
        drawn = self.generations.rows(start, stop, list(GENERATED)).to_pylist()
        return [
            _line(row, made)
            for number, row in enumerate(rows.to_pylist())
            for made in drawn[number * self.lines_per_row : (number + 1) * self.lines_per_row]
        ]

    def references(self, lines: Sequence[Line]) -> Mapping[int, JudgedAnswer]:
        """Return the rows' own answers, where they are judged too."""
        return _references(lines) if self.reference else {}

    def table(
        self, lines: Sequence[Line], references: Mapping[int, JudgedAnswer], judged: Judged
    ) -> pa.Table:
        """Put the lines of the table together."""
        made = [None if line.answer is None else judged.reward(line.answer) for line in lines]
        own = {row: judged.reward(answer) for row, answer in references.items()}
        standards = [own.get(line.row) for line in lines]
        timed = self.settings.paid  # what is computed here is identical whenever it is, to the last column
        columns: dict[str, Any] = {
            "row": [line.row for line in lines],
            "row_id": [line.row_id for line in lines],
            "sample": [line.sample for line in lines],
            "reward": [reward and reward.value for reward in made],
            "raw": [reward and reward.raw for reward in made],
            "attempts": [reward and reward.attempts for reward in made],
            "seconds": [reward and reward.seconds if timed else None for reward in made],
            "backend": [f"{self.settings.backend} {self.settings.subject}"] * len(lines),
            "reference_reward": [reward and reward.value for reward in standards],
            "valid": [reward is not None and reward.value is not None for reward in made],
            "reason": [
                line.reason if reward is None else reward.reason
                for line, reward in zip(lines, made, strict=True)
            ],
        }
        schema = REWARDS
        return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names})


def _line(row: Mapping[str, Any], made: Mapping[str, Any]) -> Line:
    """Return a line of the table from a target row and one of its generations."""
    if made["row"] != row["row"]:
        raise ValueError(f"generations of row {made['row']} stand where those of row {row['row']} belong")
    sample = made["sample"]
    if not made["valid"]:
        return Line(row["row"], row["row_id"], sample, None, made["reason"])
    key = f"row {row['row']}, sample {sample}"
    before, own = split_turns(row["messages"])
    answer = JudgedAnswer(key, conversation_text(before), made["completion"], own, before)
    return Line(row["row"], row["row_id"], sample, answer, None)


def _references(lines: Sequence[Line]) -> dict[int, JudgedAnswer]:
    """Return, by row, the target's own answers as answers to be judged like any other."""
    return {
        line.row: replace(line.answer, key=f"row {line.row}, {REFERENCE}", completion=line.answer.reference)
        for line in lines
        if line.answer is not None and line.answer.reference is not None
    }
