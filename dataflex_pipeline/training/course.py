"""The state of a training besides weights and optimizer, from step to step and from round to round.

Best evaluation so far and early stopping's patience are counted over the whole run; they travel in the
markers of the checkpoints, so that a killed and continued run decides exactly as an undisturbed one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.config.checks import best_metric
from dataflex_pipeline.training.plan import RoundPlan, RoundResult

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config

LOG = "training_log.jsonl"


@dataclass(frozen=True)
class Judge:
    """The rule that says which evaluation is best and when to stop.

    Attributes:
        metric: name of the metric, with its ``eval_`` prefix.
        greater: whether larger is better.
        patience: evaluations without improvement after which the run stops; None: never.
        min_delta: what an improvement must exceed to count for the patience.
    """

    metric: str
    greater: bool
    patience: int | None
    min_delta: float

    @classmethod
    def of(cls, config: Config) -> Judge:
        """Return the rule that the configuration says.

        Raises:
            ConfigError: the metric is none that an evaluation gives.
        """
        metric = best_metric(config)
        greater = config.greater_is_better
        return cls(
            metric=metric,
            greater=not metric.endswith("loss") if greater is None else greater,
            patience=config.early_stopping_steps,
            min_delta=config.early_stopping_min_delta,
        )


@dataclass
class Course:
    """The state that travels in the markers.

    Attributes:
        best: round, step, metric and value of the best evaluation so far.
        waited: evaluations since the last improvement that counted.
        evaluated: step and metrics of the last evaluation.
        seconds: wall time of this round's training up to here.
    """

    best: dict[str, Any] | None = None
    waited: int = 0
    evaluated: dict[str, Any] | None = None
    seconds: float = 0.0

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None) -> Course:
        """Return the course as a marker recorded it, or a new one."""
        return cls(**saved) if saved else cls()

    def plain(self) -> dict[str, Any]:
        """Return the course as plain values for a marker."""
        return asdict(self)

    def judge(self, rule: Judge, round_number: int, step: int, metrics: Mapping[str, float]) -> bool:
        """Take in one evaluation.

        Returns:
            Whether it is the best one so far. An evaluation that is not a number is never the best.
        """
        value = metrics[rule.metric]
        before = None if self.best is None else self.best["value"]
        self.evaluated = {"step": step, "metrics": dict(metrics)}
        gain = math.inf if before is None else (value - before if rule.greater else before - value)
        better = math.isfinite(value) and gain > 0
        self.waited = 0 if better and gain > rule.min_delta else self.waited + 1
        if better:
            self.best = {"round": round_number, "step": step, "metric": rule.metric, "value": value}
        return better

    def exhausted(self, rule: Judge) -> bool:
        """Whether the patience is used up."""
        return rule.patience is not None and self.waited >= rule.patience


@dataclass
class StepLog:
    """The lines of a round's training log: one per step, one per evaluation, in order."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> StepLog:
        """Read the lines of a log file."""
        return cls([json.loads(line) for line in text.splitlines()])

    def text(self) -> str:
        """Return the content of the log file: one JSON object per line."""
        return "".join(json.dumps(line) + "\n" for line in self.lines)

    def step(self, step: int, loss: float, learning_rate: float, grad_norm: float | None) -> None:
        """Add one optimizer step.

        Args:
            step: optimizer steps of the whole run, this one included.
            loss: weighted loss of the step, nats per token.
            learning_rate: rate that was applied in it.
            grad_norm: norm of the whole gradient before clipping; None where DeepSpeed does not say.
        """
        self.lines.append(
            {"step": step, "loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        )

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one evaluation after that many steps."""
        self.lines.append({"step": step, **metrics})

    def steps(self) -> list[dict[str, Any]]:
        """Return the lines of steps, without those of evaluations."""
        return [line for line in self.lines if "loss" in line]


def result_of(
    plan: RoundPlan, course: Course, log: StepLog, stopped: bool, notices: Sequence[str]
) -> RoundResult:
    """Sum a round up from its log and the course at its end."""
    lines = log.steps()
    evaluated = course.evaluated
    here = evaluated is not None and evaluated["step"] > plan.first_step
    return RoundResult(
        steps=len(lines),
        mean_learning_rate=mean([line["learning_rate"] for line in lines]),
        train_loss=mean([line["loss"] for line in lines]),
        metrics=evaluated["metrics"] if here and evaluated is not None else {},
        seconds=course.seconds,
        stopped_early=stopped,
        best=course.best,
        notices=list(notices),
    )


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean; the sum is exact, so it does not depend on the order."""
    return math.fsum(values) / len(values)
