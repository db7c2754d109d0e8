"""Records of a run, read for comparing and reporting: settings, rounds, evaluations, costs, indices."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_pipeline.errors import CorruptError, RunError
from dataflex_pipeline.evaluation.figures import Figure, read_figures
from dataflex_pipeline.store.parquet import read_whole
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.run import RoundFolder, RunFolder
from dataflex_pipeline.store.tables import TableFile
from dataflex_pipeline.training.marker import Marker, read_marker

PER_ROUND = ("score", "select", "train")
"""Stages of a round, as the history names them."""


_NEEDED = {
    "model_name_or_path": str,
    "component_name": str,
    **dict.fromkeys(("warmup_step", "update_step", "update_times", "seed"), int),
}
"""Settings of run.yaml that are read without a configuration being made of them."""


@dataclass(frozen=True)
class RunRecord:
    """One run, read only.

    Attributes:
        run: its folder. settings: the configuration in run.yaml. record: how it came about.
        markers: of the checkpoints of finished rounds, by round.
    """

    run: RunFolder
    settings: dict[str, Any]
    record: dict[str, Any]
    markers: dict[int, Marker]

    @classmethod
    def read(cls, folder: Path, *, trained: bool = True) -> RunRecord:
        """Read a run.

        Args:
            folder: its folder.
            trained: whether a finished round is needed; else scores are enough.

        Raises:
            RunError: there is no run, or no round of it is finished.
            CorruptError: run.yaml or a marker is not what was written.
        """
        run = RunFolder(folder)
        if not run.exists():
            raise RunError(
                f"There is no run at {folder}.",
                "A run's folder holds a run.yaml.",
                "Name a run below runs_dir, or give the path of its folder.",
            )
        settings, record = run.read()
        for key, kind in _NEEDED.items():
            if not isinstance(settings.get(key), kind):
                raise run.unreadable(f"{key} is missing, or no {'text' if kind is str else 'whole number'}")
        markers = {}
        first = 0 if settings["warmup_step"] else 1
        for number in range(first, int(settings["update_times"]) + 1):
            marker = read_marker(run.round(number).checkpoint)
            if marker is None or not marker.finished:
                break
            markers[number] = marker
        if not markers and trained and not settings["update_times"]:
            raise RunError(
                f"Nothing is trained in the run {folder}: update_times is 0, as `dataflex pick` sets it.",
                "Runs are compared by the models that they train.",
                f"See what it picked with `dataflex report {shlex.quote(folder.name)}`; train runs with "
                "`dataflex round N`.",
            )
        if not markers and (trained or not _is_scored(run)):
            raise RunError(
                f"No round of the run {folder} is finished.",
                "There is nothing to compare yet." if trained else "There is nothing to look at yet.",
                f"Run `dataflex round --run {folder.name}` first.",
            )
        return cls(run, settings, record, markers)

    @property
    def name(self) -> str:
        """The run's folder name."""
        return self.run.folder.name

    @property
    def method(self) -> str:
        """The method that the run goes on with."""
        return str(self.settings["component_name"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.settings["seed"])

    @property
    def last(self) -> int:
        """The last finished round; 0 where nothing was trained."""
        return max(self.markers, default=0)

    @property
    def rounds(self) -> list[int]:
        """The rounds that are finished, or selected without being trained yet."""
        own = [number for number in self.run.rounds() if self.round(number).selection.is_file()]
        return sorted({*self.markers, *own})

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step."""
        return int(self.record["global_batch"])

    def pool(self, number: int) -> str:
        """Return the fingerprint of the pool that a round trained on."""
        return str(self.markers[number].ingredients["pool"])

    def selected_by(self, last: int) -> str:
        """Return the method that selected rounds 1..``last``, as their indices say; `method` before round 1.

        Raises:
            RunError: they were selected by different methods.
        """
        methods = {
            number: TableFile(self.round(number).index).metadata.get("method", self.method)
            for number in range(1, last + 1)
        }
        if len(set(methods.values())) > 1:
            listed = ", ".join(f"round {number} by {method}" for number, method in methods.items())
            raise RunError(
                f"The rounds of {self.name} were selected by different methods: {listed}.",
                "Its results are those of none of them alone, so it belongs beside no other run.",
                "Leave it out, or run it again in a new folder with one method.",
            )
        return methods.get(last, self.method)

    def round(self, number: int) -> RoundFolder:
        """Return the files of a round."""
        return self.run.round(number)

    def step(self, number: int) -> int:
        """Return the optimizer steps of the whole run up to the end of a round; none without a warm-up."""
        return self.markers[number].step if number or number in self.markers else 0

    def evaluated(self, number: int) -> list[Figure]:
        """Return the figures of `dataflex evaluate` at the end of a round, if there are any."""
        path = self.round(number).metrics
        return read_figures(path) if path.is_file() else []

    def base_evaluated(self) -> list[Figure]:
        """Return the figures of `dataflex evaluate --round base`, if there are any."""
        path = self.run.base_metrics
        return read_figures(path) if path.is_file() else []

    def selected(self, number: int) -> np.ndarray:
        """Return the different rows that a round trained on, sorted. [n] int64"""
        rows = read_whole(self.round(number).index, ["row"])["row"].to_numpy()
        return np.unique(rows)

    def tokens(self, number: int) -> int:
        """Return the tokens (prompts and responses) of the positions that a round trained on."""
        rows = read_whole(self.round(number).index, ["row"])["row"].to_numpy()
        return int(self._lengths[rows].sum())

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Tokens of every row of the pool. [rows]"""
        blocks = PartedTable.open(self.run.pool).blocks(["n_tokens"])
        lengths: np.ndarray = np.concatenate([block.column("n_tokens").to_numpy() for block in blocks])
        return lengths

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The training log of all finished rounds: one entry per step and per evaluation, in order."""
        entries = []
        for number in self.markers:
            # The round's own copy is for people; this one has a digest in the checkpoint's marker.
            path = self.round(number).checkpoint / "training_log.jsonl"
            if path.is_file():
                entries += [{"round": number, **line} for line in _lines(path)]
        return entries

    def evaluations(self, metric: str = "eval_loss") -> dict[int, float]:
        """Return a metric of the evaluations on the target while training, by step."""
        return {int(entry["step"]): float(entry[metric]) for entry in self.log if metric in entry}

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """What was done when, and how many seconds it took, in order; a damaged entry is passed over."""
        if not self.run.history.is_file():
            return []
        return [entry for entry in _lines(self.run.history) if _is_entry(entry)]

    def gpu_hours(self, last: int) -> float | None:
        """Return the hours that GPUs were held for rounds up to ``last``; None where it was not recorded."""
        entries = [e for e in self.history if e["stage"] in PER_ROUND and e.get("round", 0) <= last]
        if any("gpus" not in entry for entry in entries):
            return None
        return float(sum(entry["seconds"] * entry["gpus"] for entry in entries)) / 3600

    def seconds(self, stage: str, last: int) -> float:
        """Return the seconds spent on a stage (score, select, train) in rounds up to ``last``."""
        return float(
            sum(
                entry["seconds"]
                for entry in self.history
                if entry["stage"] == stage and entry.get("round", 0) <= last
            )
        )


def _is_entry(entry: Any) -> bool:
    """Whether an entry of the history has what is read of it."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("stage"), str)
        and isinstance(entry.get("seconds"), int | float)
        and isinstance(entry.get("round", 0), int)
        and isinstance(entry.get("gpus", 0), int | float)
    )


def _is_scored(run: RunFolder) -> bool:
    return any(run.folder.glob("round-*/scores/*.parquet"))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, one JSON object each.

    Raises:
        CorruptError: one is no such line, as where a full disk cut it off.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise CorruptError(
                f"{path}, line {number}: it is no line of a log.",
                "It was cut off or edited. No result depends on it; what it said of times or steps is lost.",
                "Delete that line, and run the command again.",
            )
        found.append(value)
    return found
