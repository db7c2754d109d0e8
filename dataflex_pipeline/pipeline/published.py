"""Copies beside the rounds: the best checkpoint, and the newest adapter at the top of ``output_dir``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex_pipeline.errors import CorruptError
from dataflex_pipeline.models.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dataflex_pipeline.pipeline.damage import check_best, last_finished
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.output import Outcome, Output, State, shown
from dataflex_pipeline.store.atomic import atomic_file
from dataflex_pipeline.store.run import BEST
from dataflex_pipeline.store.stale import is_complete
from dataflex_pipeline.training import read_marker
from dataflex_pipeline.training.finished import checkpoint_that_counts


class BestCheckpoint(Output):
    """The folder best/: the weights of the best evaluation, which training writes."""

    def __init__(self, run: OpenRun) -> None:
        super().__init__(run, BEST, BEST, "The best checkpoint", run.folder / BEST)

    def inputs(self) -> Mapping[str, Any]:
        """Return nothing: it is a copy, and its marker says of which step."""
        return {}

    def is_current(self, *, overwrite: bool = False) -> bool:
        """Whether it holds the best weights so far.

        Raises:
            CorruptError: it is damaged, or not there although an evaluation was the best.
        """
        check_best(self.run, last_finished(self.run) or 0)
        return is_complete(self.path)

    def write(self) -> None:
        """Do nothing: training makes it."""

    def state(self) -> State:
        """Return the state; one that is missing is damage where an evaluation was the best."""
        found = super().state()
        if found.name == "missing":
            try:
                self.is_current()
            except CorruptError as error:
                return State("damaged", error.what)
        return found

    def describe(self) -> str:
        """Return the step that it is of."""
        marker = read_marker(self.path)
        return "not finished" if marker is None else f"the best checkpoint, of step {marker.step}"


class PublishedAdapter(Output):
    """The trained adapter at the top of ``output_dir``, where users of other trainers look for it.

    With ``load_best_model_at_end`` it is the best one so far, as other trainers have it. Each file appears
    whole or not at all, and is left alone where it is the same already.
    """

    def __init__(self, run: OpenRun) -> None:
        super().__init__(run, "adapter", "adapter", "The adapter", run.folder / ADAPTER_WEIGHTS)

    @classmethod
    def of(cls, run: OpenRun) -> list[Outcome]:
        """Copy the newest adapter of a run, after every round, so that one that is ended early has it too.

        All weights of a full fine-tuning are not copied: they would be there twice.

        Returns:
            What was done: nothing without output_dir or before the first round is finished.
        """
        source = newest(run)
        if run.given.output_dir is None or source is None:
            return []
        if run.given.finetuning_type == "full":
            run.progress.say(f"The weights are in {source}; they are not copied to the top of {run.folder}.")
            return []
        return [cls(run).make()]

    def inputs(self) -> Mapping[str, Any]:
        """Return nothing: it is a copy, compared byte by byte."""
        return {}

    def is_current(self, *, overwrite: bool = False) -> bool:
        """Whether every file of it is the newest checkpoint's."""
        source = newest(self.run)
        return source is not None and not any(
            self._differs(source / name) for name in [ADAPTER_WEIGHTS, *_beside_the_weights(source)]
        )

    def make(self) -> Outcome:
        """Copy what is not the same."""
        began = time.monotonic()
        state = self.state()
        if state.name == "damaged":
            self.run.progress.say(f"  adapter: {state.what}; it is copied again")
        current = self.is_current()
        if not current:
            self.write()
        return Outcome(self.stage, self.path, not current, time.monotonic() - began, self.describe())

    def write(self) -> None:
        """Copy the weights, the tokenizer and, last, the configuration that makes it an adapter."""
        source = newest(self.run)
        if source is None:
            return
        for name in [ADAPTER_WEIGHTS, *_beside_the_weights(source)]:
            if self._differs(source / name):
                final = self.run.folder / name
                with atomic_file(final) as temporary:
                    shutil.copyfile(source / name, temporary)
                self.run.memo.digest(final)  # so that the next command need not read it

    def _differs(self, source: Path) -> bool:
        digest, final = self.run.memo.digest, self.run.folder / source.name
        return not final.is_file() or digest(final) != digest(source)

    def state(self) -> State:
        """Return the state: damaged where it is the copy of no checkpoint of the run."""
        run, source = self.run, newest(self.run)
        if source is None or not (source / ADAPTER_WEIGHTS).is_file():
            return State("unknown", "there is no checkpoint that it is a copy of")
        if not self.path.is_file() or not (run.folder / ADAPTER_CONFIG).is_file():
            return State("missing", f"a copy of {shown(source, run.folder)}")
        found = run.memo.digest(self.path)
        if found == run.memo.digest(source / ADAPTER_WEIGHTS):
            return State("done", f"a copy of {shown(source, run.folder)}")
        others = [run.folder / BEST] if run.given.load_best_model_at_end else []
        others += [run.store.round(number).checkpoint for number in range(run.given.last_round + 1)]
        weights = [folder / ADAPTER_WEIGHTS for folder in others]
        if found in [run.memo.digest(path) for path in weights if path.is_file()]:
            return State("unfinished", "a copy of an earlier checkpoint; the same command goes on with it")
        return State("damaged", f"{self.path} is not what was written there")

    def describe(self) -> str:
        """Return which checkpoint it is a copy of."""
        source = newest(self.run)
        return "" if source is None else f"the adapter of {shown(source, self.run.folder)}"


def newest(run: OpenRun) -> Path | None:
    """Return the folder whose weights count; None before the first round is finished."""
    return checkpoint_that_counts(run.given, run.store)


def _beside_the_weights(source: Path) -> list[str]:
    """Return the tokenizer's files and the adapter's configuration, as the checkpoint's marker lists them."""
    marker = read_marker(source)
    listed = sorted(marker.files) if marker is not None else sorted(path.name for path in source.iterdir())
    tokenizer = [
        name for name in listed if name.startswith(("tokenizer", "chat_template", "special_tokens", "vocab"))
    ]
    return [
        *tokenizer,
        *(name for name in listed if name in ("merges.txt", "added_tokens.json")),
        ADAPTER_CONFIG,
    ]
