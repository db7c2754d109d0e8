"""The lines of one part of the rewards table: what has to be asked, asked, and put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.api import FeatureInput, Progress
from dataflex_pipeline.reward import Reward, Rewarder
from dataflex_pipeline.reward.answers import JudgedAnswer, conversation_text
from dataflex_pipeline.reward.journal import Journal, journal_path, journals, place
from dataflex_pipeline.reward.pace import BudgetError
from dataflex_pipeline.reward.settings import Settings
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, VALID, column
from dataflex_pipeline.store.parts import PartedTable

GENERATED = ("row", "sample", "completion", "valid", "reason")
REFERENCE = "reference"
SECONDS_BETWEEN_LINES = 30.0

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


@dataclass(frozen=True)
class Line:
    """One line of the table on its way.

    Attributes:
        row, row_id, sample: which it is.
        answer: what is to be judged; None where nothing was generated, which ``reason`` tells.
    """

    row: int
    row_id: str
    sample: int
    answer: JudgedAnswer | None
    reason: str | None


class Judged:
    """The rewards of a part's answers, each text judged once however often it was drawn for a prompt.

    Args:
        answers: all of them. journal: where rewards are.

    Attributes:
        different: the first answer of every text.
    """

    def __init__(self, answers: Sequence[JudgedAnswer], journal: Journal) -> None:
        self._journal = journal
        self._first: dict[str, JudgedAnswer] = {}
        for answer in answers:
            self._first.setdefault(place(answer)[1], answer)
        self.different = list(self._first.values())

    def reward(self, answer: JudgedAnswer) -> Reward:
        """Return an answer's reward; it took no attempt where an equal answer's is taken."""
        first = self._first[place(answer)[1]]
        found = self._journal.rewards[place(first)]
        return found if first.key == answer.key else replace(found, attempts=0, seconds=0.0)


class RewardParts:
    """Turns the rows of a part into its lines of the table.

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
        if given.folder is None:
            raise ValueError("rewards are kept in the folder of their table, and none was given")
        self.rewarder, self.settings, self.reference = rewarder, settings, reference
        self.given, self.folder, self.progress = given, given.folder, progress
        self.generations: PartedTable = given.tables["generations"]
        self.per_row = self.generations.n_rows // given.table.n_rows
        self.unscored: Counter[str] = Counter()
        self.judged = 0
        self._said = monotonic()

    def part(self, rows: pa.Table) -> pa.Table:
        """Return the rewards of a part's rows, asking only for what its journal does not have."""
        remove_finished(self.folder)
        lines = self._lines(rows)
        answers = [line.answer for line in lines if line.answer is not None]
        references = _references(lines) if self.reference else {}
        path = journal_path(self.folder, rows.column("row")[0].as_py())
        with Journal(path if self.settings.journalled else None, durable=self.settings.paid) as journal:
            judged = Judged([*answers, *references.values()], journal)
            different = judged.different
            known = sum(journal.known(answer) is not None for answer in different)
            if known:
                self.progress.say(
                    f"  {known:,} of {len(different):,} answers of this part were judged before"
                )
            self._ask(journal, [each for each in different if journal.known(each) is None], rows)
            self._ask(journal, self._without_score(journal, different), rows)
            self._count([judged.reward(answer) for answer in [*answers, *references.values()]])
            return self._table(lines, references, judged)

    def _lines(self, rows: pa.Table) -> list[Line]:
        first = rows.column("row")[0].as_py()
        start, stop = first * self.per_row, (first + rows.num_rows) * self.per_row
        drawn = self.generations.rows(start, stop, list(GENERATED)).to_pylist()
        return [
            _line(row, made)
            for number, row in enumerate(rows.to_pylist())
            for made in drawn[number * self.per_row : (number + 1) * self.per_row]
        ]

    def _ask(self, journal: Journal, answers: Sequence[JudgedAnswer], rows: pa.Table) -> None:
        """Have answers judged, each reward written down as soon as it is known."""
        if not answers:
            return
        done = 0

        def keep(position: int, reward: Reward) -> None:
            nonlocal done
            journal.keep(answers[position], reward)
            done += 1
            if monotonic() - self._said > SECONDS_BETWEEN_LINES:
                self._said = monotonic()
                self.progress.say(f"  {done:,} of {len(answers):,} answers judged")

        try:
            self.rewarder.reward(answers, keep)
        except BudgetError as spent:
            raise BudgetError(spent.budget, spent.left, self._rows_beyond(rows)) from None

    def _rows_beyond(self, rows: pa.Table) -> int:
        """Return the target rows of other parts that are not on disk."""
        there = sum(pq.read_metadata(path).num_rows for path in self.folder.glob("part-*.parquet"))
        return int(self.given.table.n_rows - rows.num_rows - there // self.per_row)

    def _without_score(self, journal: Journal, answers: Sequence[JudgedAnswer]) -> list[JudgedAnswer]:
        """Return, to be asked for once more, the answers whose only reply in words held no score."""
        if not self.settings.in_words:
            return []
        return [
            replace(answer, again=True) for answer in answers if journal.replied_once_without_score(answer)
        ]

    def _count(self, rewards: Sequence[Reward]) -> None:
        self.judged += len(rewards)
        self.unscored.update(reward.reason for reward in rewards if reward.reason is not None)

    def say_unscored(self) -> None:
        """Tell how many answers of the parts made just now have no reward, and why."""
        if self.unscored:
            reasons = "; ".join(f"{count:,} x {reason}" for reason, count in self.unscored.most_common())
            total = sum(self.unscored.values())
            self.progress.say(f"  {total:,} of {self.judged:,} answers have no reward: {reasons}")

    def _table(
        self, lines: Sequence[Line], references: Mapping[int, JudgedAnswer], judged: Judged
    ) -> pa.Table:
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
    turns = [(message["role"], message["content"]) for message in row["messages"]]
    answered = [number for number, (role, _) in enumerate(turns) if role == "assistant"]
    before = tuple(turns[: answered[-1]] if answered else turns)
    own = turns[answered[-1]][1] if answered else ""
    answer = JudgedAnswer(
        key=f"row {row['row']}, sample {sample}",
        prompt=conversation_text(before),
        completion=made["completion"],
        reference=own if own.strip() else None,
        turns=before,
    )
    return Line(row["row"], row["row_id"], sample, answer, None)


def _references(lines: Sequence[Line]) -> dict[int, JudgedAnswer]:
    """Return, by row, the target's own answers as answers to be judged like any other."""
    return {
        line.row: replace(line.answer, key=f"row {line.row}, {REFERENCE}", completion=line.answer.reference)
        for line in lines
        if line.answer is not None and line.answer.reference is not None
    }


def remove_finished(folder: Path) -> None:
    """Remove the journals of parts that are there."""
    if not any(journals(folder)):
        return
    for part in folder.glob("part-*.parquet"):
        first = pq.ParquetFile(part).read_row_group(0, ["row"]).column("row")[0].as_py()
        journal_path(folder, first).unlink(missing_ok=True)
