"""The judging of one part of a table: what has to be asked, asked, each reply written down as it comes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.api import FeatureInput, Progress
from dataflex_pipeline.reward import Reward, Rewarder
from dataflex_pipeline.reward.answers import JudgedAnswer
from dataflex_pipeline.reward.journal import Journal, journal_path, journals, place
from dataflex_pipeline.reward.pace import BudgetError
from dataflex_pipeline.reward.settings import Settings

SECONDS_BETWEEN_LINES = 30.0


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


class Judging(ABC):
    """Turns the rows of a part into lines of a table whose answers are judged.

    Args:
        rewarder: entered already. settings: its own.
        given: the folder of the table. progress: where to report.

    Attributes:
        lines_per_row: of the table.
    """

    lines_per_row = 1

    def __init__(
        self, rewarder: Rewarder, settings: Settings, given: FeatureInput, progress: Progress
    ) -> None:
        if given.folder is None:
            raise ValueError("rewards are kept in the folder of their table, and none was given")
        self.rewarder, self.settings = rewarder, settings
        self.given, self.folder, self.progress = given, given.folder, progress
        self.unscored: Counter[str] = Counter()
        self.judged = 0
        self._said = monotonic()

    @abstractmethod
    def lines(self, rows: pa.Table) -> list[Line]:
        """Return the lines of some rows, with what is to be judged."""

    def references(self, lines: Sequence[Line]) -> Mapping[int, JudgedAnswer]:
        """Return, by row, further answers that are judged as a standard."""
        return {}

    @abstractmethod
    def table(
        self, lines: Sequence[Line], references: Mapping[int, JudgedAnswer], judged: Judged
    ) -> pa.Table:
        """Put the lines of the table together."""

    def part(self, rows: pa.Table) -> pa.Table:
        """Return the table of a part's rows, asking only for what its journal does not have."""
        remove_finished(self.folder)
        lines = self.lines(rows)
        answers = [line.answer for line in lines if line.answer is not None]
        references = self.references(lines)
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
            return self.table(lines, references, judged)

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
        """Return the rows of other parts that are not on disk."""
        there = sum(pq.read_metadata(path).num_rows for path in self.folder.glob("part-*.parquet"))
        return int(self.given.table.n_rows - rows.num_rows - there // self.lines_per_row)

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


def remove_finished(folder: Path) -> None:
    """Remove the journals of parts that are there."""
    if not any(journals(folder)):
        return
    for part in folder.glob("part-*.parquet"):
        first = pq.ParquetFile(part).read_row_group(0, ["row"]).column("row")[0].as_py()
        journal_path(folder, first).unlink(missing_ok=True)
