"""The control of a training: evaluations, checkpoints and the end of a round, and its records."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback  # noqa: TID253 (this module is only imported to train)

from dataflex_pipeline.api import Progress
from dataflex_pipeline.errors import RunError
from dataflex_pipeline.store.atomic import atomic_folder
from dataflex_pipeline.store.stale import MARKER
from dataflex_pipeline.training.course import LOG, Course, Judge, StepLog, result_of
from dataflex_pipeline.training.marker import missing_pieces, read_marker, write_marker
from dataflex_pipeline.training.plan import RoundPlan
from dataflex_pipeline.training.trainer import WeightedTrainer, refuse_not_finite, remove_unkept, writing

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config


class Conductor(TrainerCallback):  # type: ignore[misc]
    """The trainer's callback for one round.

    Args:
        config: when to log, evaluate and save.
        plan: the round.
        course, log: as of the checkpoint that the training continues.
        rule: which evaluation is best, when to stop.
        progress: where to report to.
    """

    def __init__(
        self, config: Config, plan: RoundPlan, course: Course, log: StepLog, rule: Judge, progress: Progress
    ) -> None:
        self.config = config
        self.plan = plan
        self.course = course
        self.log = log
        self.rule = rule
        self.progress = progress
        self.trainer: WeightedTrainer
        self.rate = 0.0
        self.step = plan.first_step
        self.stopped = False
        self.fresh_best = False
        self.notices: list[str] = []
        self.started = time.monotonic()
        self.seconds_before = course.seconds

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the learning rate that the step is about to apply."""
        self.rate = self.trainer._get_learning_rate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Book the step and decide what follows it."""
        self.step = state.global_step
        loss = self.trainer.take_step_loss()
        refuse_not_finite(loss, self.trainer.norm_of_step, self.step, self._rows_of_step())
        self.log.step(self.step, loss, self.rate, self.trainer.norm_of_step)
        self._report(loss)
        last = self.step == self.plan.last_step
        control.should_evaluate = self._evaluates_now(last)
        control.should_save = last or self._saves_now()
        control.should_training_stop = last
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> Any:
        """Judge the evaluation; stop the run when the patience is used up."""
        self.fresh_best = self.course.judge(self.rule, self.plan.round, self.step, metrics)
        self.log.evaluation(self.step, metrics)
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.progress.say(f"step {self.step}: {numbers}{' (best so far)' if self.fresh_best else ''}")
        if self.course.exhausted(self.rule):
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
            self.progress.say(
                f"Early stopping at step {self.step}: {self.course.waited} evaluations without an "
                f"improvement of {self.rule.metric} by more than {self.rule.min_delta}."
            )
        return control

    def _evaluates_now(self, last: bool) -> bool:
        if self.config.eval_strategy == "steps":
            return self.step % (self.config.eval_steps or self.config.logging_steps) == 0
        return self.config.eval_strategy == "epoch" and last

    def _saves_now(self) -> bool:
        return self.config.save_steps is not None and self.step % self.config.save_steps == 0

    def _rows_of_step(self) -> list[int]:
        start = (self.step - 1 - self.plan.first_step) * self.plan.global_batch
        rows: list[int] = self.plan.index.column("row").slice(start, self.plan.global_batch).to_pylist()
        return rows

    def _report(self, loss: float) -> None:
        self.progress.advance(1)
        if self.step % self.config.logging_steps == 0:
            self.progress.say(
                f"step {self.step}/{self.plan.horizon}: loss {loss:.4f}, learning rate {self.rate:.3g}"
            )

    def note(self, line: str) -> None:
        """Say something about how this model is trained, and record it with the round's result."""
        self.notices.append(line)
        self.progress.say(line)

    def say_streams_restarted(self) -> None:
        """Say that the training continues a checkpoint made with another number of processes."""
        self.progress.say(
            "Another number of processes made the checkpoint, so the random streams start anew; that "
            "changes dropout and nothing else."
        )

    def keep_best(self, trainer: WeightedTrainer) -> None:
        """Write the weights of a new best evaluation beside the checkpoints inside the round.

        Called on every process, since gathering sharded weights needs all of them.
        """
        if not (self.fresh_best and self.config.load_best_model_at_end):
            return
        final = self.plan.work / f"best-{self.step}"
        draft = self.plan.work / f"draft-{self.step}"
        with writing(draft):
            trainer.save_model(str(draft), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            self._commit_best(draft, final)
        trainer.accelerator.wait_for_everyone()

    def _commit_best(self, draft: Path, final: Path) -> None:
        shutil.rmtree(final, ignore_errors=True)
        with writing(draft), atomic_folder(final) as folder:
            remove_unkept(draft)
            for path in draft.iterdir():
                path.rename(folder / path.name)
            best = self.course.best
            write_marker(folder, self.plan.ingredients, self.plan.describe(), self.step, {"best": best}, best)
        shutil.rmtree(draft)
        self._prune_bests()

    def complete(self, folder: Path) -> None:
        """Make a folder that the trainer just wrote a checkpoint.

        Raises:
            RunError: something that a continuation needs was not written.
        """
        self.course.seconds = self.seconds_before + time.monotonic() - self.started
        (folder / LOG).write_text(self.log.text())
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        full = self.config.finetuning_type == "full"
        lacking = missing_pieces(names, full, self.config.deepspeed is not None)
        if lacking:
            raise RunError(
                f"The checkpoint {folder} was written without {', '.join(lacking)}.",
                "The next round could not continue from it exactly.",
                "Check that the installed transformers and peft are versions that this package supports.",
            )
        ended = self.step == self.plan.last_step or self.stopped
        result = self._result() if ended else None
        write_marker(
            folder, self.plan.ingredients, self.plan.describe(), self.step, self.course.plain(), result
        )

    def _result(self) -> dict[str, Any]:
        return result_of(self.plan, self.course, self.log, self.stopped, self.notices).plain()

    def prune(self, newest: Path) -> None:
        """Remove what no continuation needs any more now that the newest checkpoint is whole.

        With ``keep_checkpoints`` the older checkpoints stay.
        """
        if not self.config.keep_checkpoints:
            for older in self.plan.work.glob("checkpoint-*"):
                if older != newest and (older / MARKER).is_file():
                    shutil.rmtree(older)
        self._prune_bests()

    def _prune_bests(self) -> None:
        """Keep the best weights so far and those that a checkpoint inside the round records as best.

        A training that goes on from that checkpoint may end without a better evaluation.
        """
        markers = [read_marker(folder) for folder in self.plan.work.glob("checkpoint-*")]
        bests = [self.course.best, *(marker.course["best"] for marker in markers if marker is not None)]
        needed = {f"best-{best['step']}" for best in bests if best is not None}
        for folder in self.plan.work.glob("best-*"):
            if folder.name not in needed:
                shutil.rmtree(folder)
