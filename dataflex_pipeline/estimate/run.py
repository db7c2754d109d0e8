"""Estimate of a whole run before it is run. Nothing is written into the run."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from dataflex_pipeline import launch
from dataflex_pipeline.api import Method, Split
from dataflex_pipeline.config.fields import DEMO
from dataflex_pipeline.errors import UserError
from dataflex_pipeline.estimate.machine import import_seconds
from dataflex_pipeline.estimate.records import Measured, StageCost, total
from dataflex_pipeline.estimate.sample import Sample, sample_prepared, sample_sources
from dataflex_pipeline.host_memory import available_bytes, check_libraries_fit
from dataflex_pipeline.models.weights import check_model_here
from dataflex_pipeline.pipeline.prepare import read_sources, splits_of
from dataflex_pipeline.pipeline.run import Run
from dataflex_pipeline.store.parts import PartedTable

LIBRARIES = ("torch", "transformers", "peft")
NEAR = 0.7
"""Share of the memory above which it is said to be short."""
GIB = 1 << 30
BUDGET = 3.0
"""Seconds of computing per measurement, about."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A predicted run.

    Attributes:
        stages: in order. measured: the calibration. batch: rows per optimizer step. warnings: in words.
    """

    stages: list[StageCost]
    measured: Measured
    batch: int
    warnings: list[str]

    def plain(self) -> dict[str, Any]:
        """Return everything as plain values, for --json."""
        found = self.measured
        training = found.training
        return {
            "stages": [dataclasses.asdict(each) for each in self.stages],
            "total": dataclasses.asdict(total(self.stages)),
            "global_batch": self.batch,
            "pool": dataclasses.asdict(found.pool),
            "target": None if found.target is None else dataclasses.asdict(found.target),
            "model": dataclasses.asdict(found.model)
            | {"gradient_bytes": found.model.gradient_bytes, "adam_bytes": found.model.adam_bytes},
            "calibration": {
                "import_seconds": found.import_seconds,
                "load_seconds": found.load_seconds,
                "training": None
                if training is None
                else {k: v for k, v in dataclasses.asdict(training).items() if k != "checkpoint"},
                "features": {name: dataclasses.asdict(cost) for name, cost in found.features.items()},
            },
            "memory": {
                "step": None if found.step is None else found.step.plain(),
                "score_batch_tokens": {
                    name: cost.batch_tokens for name, cost in found.features.items() if cost.batch_tokens
                },
            },
            "warnings": self.warnings,
        }


def predict(context: Run, budget: float = BUDGET) -> Estimate:
    """Count, measure and predict.

    Args:
        context: of the run, which need not exist. budget: seconds of computing per measurement, about.

    Raises:
        UserError: several processes were started, or the configuration cannot work.
        DataflexError: a limit of this process is too low to load what computes.
    """
    from dataflex_pipeline.estimate.calibrate import calibrate
    from dataflex_pipeline.estimate.needs import candidate_keys, needs_by_round, tables_there
    from dataflex_pipeline.estimate.stages import Chooser, run_stages
    from dataflex_pipeline.pipeline.epochs import settle_epochs
    from dataflex_pipeline.pipeline.preflight import check_target

    if launch.world_size() > 1:
        raise UserError(
            f"`dataflex estimate` was started in {launch.world_size()} processes.",
            "It measures what one process takes; features take about so much divided by their number.",
            "Run it without torchrun.",
        )
    check_libraries_fit()
    imports = import_seconds(LIBRARIES)
    if context.given.model_name_or_path != DEMO:  # the demo's is made when it is asked for
        check_model_here(context.config)
    check_target(context)
    settle_epochs(context)
    name = context.given.component_name
    chosen, _ = context.method(name)
    doubts = _check_features(context, chosen)
    rule = context.given.candidates_of(name)
    chooser = None if rule is None else context.method(rule.method)[0]
    doubts += [] if chooser is None else _check_features(context, chooser)
    rounds = needs_by_round(chosen, context.config, chooser)
    few = candidate_keys(chosen, context.config, chooser)
    with tempfile.TemporaryDirectory(prefix="dataflex-estimate-") as folder:
        scratch = Path(folder)
        context.progress.say("reading the data")
        made = [_sample(context, split, scratch) for split in splits_of(context)]
        samples = [sample for sample, _ in made]
        needs = [need for needed in rounds for need in needed]
        measured = calibrate(
            context.config,
            samples,
            needs,
            context.global_batch,
            imports,
            scratch,
            budget,
            context.progress.say,
        )
        stages = run_stages(
            measured,
            samples,
            [count for _, count in made],
            chosen,
            rounds,
            context.global_batch,
            tables_there(context, rounds, few),
            None if rule is None or chooser is None else Chooser(rule, chooser, few),
        )
    return Estimate(stages, measured, context.global_batch, [*doubts, *_warnings(context, measured)])


def _check_features(context: Run, method: Method) -> list[str]:
    """Check what the measurements need; return what else the run would stop at, in words.

    Raises:
        UserError: a feature that is measured cannot be computed.
    """
    from dataflex_pipeline.estimate.predict import follows_from_others
    from dataflex_pipeline.pipeline.preflight import features_of

    doubts = []
    for need, feature in features_of(context, method):
        try:
            feature.check(need, None)
        except UserError as error:
            if not follows_from_others(need):
                raise
            doubts.append(f"the run would not begin yet: {error.what} {error.fix}")
    return doubts


def _sample(context: Run, split: Split, scratch: Path) -> tuple[Sample, int]:
    """Return a sample of a split, and how many processes would prepare it."""
    from dataflex_pipeline.data.chat.labelled import ChatFormat

    folder, seed = context.store.split(split), context.given.seed
    if PartedTable.is_complete(folder):
        return sample_prepared(PartedTable.open(folder), split, seed), 1
    settings, scan = read_sources(context, split)
    config = context.config
    chat = ChatFormat.load(config.model_name_or_path, config.template, config.trust_remote_code)
    return sample_sources(settings, scan, chat, split, seed, scratch), settings.workers


def _warnings(context: Run, found: Measured) -> list[str]:
    config, lines = context.given, []
    if config.deepspeed is not None:
        lines.append("training was measured without DeepSpeed, in one process")
    if found.training is None and config.horizon:
        lines.append("training was not measured: a checkpoint is larger than an estimate should write")
    if config.finetuning_type == "full" and found.training is not None:
        lines.append("a checkpoint holds all weights and Adam's moments, and every round leaves one")
    lines += [f"training: {found.step}"] if found.step is not None else []
    lines += _batch_sizes(found)
    lines += _memory_warnings(found)
    if not found.pool.exact:
        lines.append("tokens are scaled up from a sample of the pool")
    lines.append(
        "seconds are those of this machine as busy as it is now; a longer row than the sample's "
        "takes more memory"
    )
    return lines


def _batch_sizes(found: Measured) -> list[str]:
    """Return the sizes of scoring batches that follow from the memory."""
    sizes = [
        f"{cost.batch_tokens:,} padded tokens for {name}"
        for name, cost in found.features.items()
        if cost.batch_tokens
    ]
    return [f"score_batch_tokens: auto makes batches of {', '.join(sizes)}"] if sizes else []


def _memory_warnings(found: Measured) -> list[str]:
    """Return what was seen to come near the memory that there is, on a CPU."""
    from dataflex_pipeline.models.base import resolve_device

    peaks = [cost.peak_bytes for cost in found.features.values()]
    peaks += [found.training.peak_bytes] if found.training is not None else []
    most, free = max(peaks, default=0), available_bytes()
    if free is None or most < NEAR * (free + most) or resolve_device(found.config.device) != "cpu":
        return []
    return [
        f"memory is short: the sample took {most / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free now; less "
        "is taken with gradient_checkpointing: true, a lower cutoff_len, or a lower "
        "per_device_train_batch_size with more gradient_accumulation_steps"
    ]
