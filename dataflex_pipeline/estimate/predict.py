"""From counts and a calibration to the stages of a run: rows, tokens, FLOPs, seconds, bytes, requests.

    seconds = measured start + units of work x measured seconds per unit

Units are the tokens of rows (losses, gradients, embeddings), drawn tokens (generations) or compared pairs of
vectors (neighbours, density). Every figure names its basis: *counted* (no measurement in it), *measured*
(this very work, on sampled rows), *extrapolated* (from the rate of something else, or an upper bound) or
*unknown* (never a guess: the figure is left out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dataflex_pipeline.api import Need
from dataflex_pipeline.backends.judge_prompts import prompt_texts
from dataflex_pipeline.backends.reward_settings import ApiSettings, MetricSettings
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.estimate.costs import (
    ModelShape,
    RowCounts,
    embedding_flops,
    generation_flops,
    gradient_flops,
    loss_flops,
    row_bytes,
    training_flops,
)
from dataflex_pipeline.estimate.features import FeatureCost
from dataflex_pipeline.estimate.training import TrainingCost, checkpoint_bytes
from dataflex_pipeline.features.plan import make_feature
from dataflex_pipeline.neighbours.cells import SCAN, choose_layout

Basis = Literal["counted", "measured", "extrapolated", "unknown"]
CHARACTERS_PER_TOKEN = 4.0
"""Of English instructions to a judge, about."""
BACKWARD_SHARE = 2.0 / 3.0
"""Rate of a training step or of gradients, as a share of a forward pass's (docs/scaling.md)."""


@dataclass(frozen=True)
class StageCost:
    """What one stage of a run is predicted to take.

    Attributes:
        stage: its name. round: of which round; None before the warm-up.
        rows, tokens: that go through the model. steps: optimizer steps. flops: floating-point operations.
        seconds: None where nothing is known. disk_bytes: of what it leaves.
        memory_bytes: at most, as measured.
        requests: to a paid or remote endpoint, at most. basis: of the seconds. note: what is uncertain.
    """

    stage: str
    round: int | None
    rows: int = 0
    tokens: float = 0.0
    steps: int = 0
    flops: float = 0.0
    seconds: float | None = None
    disk_bytes: float = 0.0
    memory_bytes: int = 0
    requests: int = 0
    basis: Basis = "measured"
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """Everything that the predictions are made from.

    Attributes:
        config: of the run. model: its shape.
        import_seconds: for the libraries. load_seconds: for the weights.
        pool, target: counts of the splits; target None without one.
        training: None where it was not measured. features: by `kind_of`.
        write_seconds: per row of a score table. table_bytes: of a table without rows.
    """

    config: Config
    model: ModelShape
    import_seconds: float
    load_seconds: float
    pool: RowCounts
    target: RowCounts | None
    training: TrainingCost | None
    features: Mapping[str, FeatureCost] = field(default_factory=dict)
    write_seconds: float = 0.0
    table_bytes: float = 0.0

    def counts(self, split: str) -> RowCounts:
        """Return the counts of a split."""
        return self.target if split == "target" and self.target is not None else self.pool

    @property
    def forward_rate(self) -> float:
        """FLOP/s of a forward pass over rows."""
        cost = self.features["losses"]
        mix = self.pool.drawn(1)
        return loss_flops(self.model, mix) / mix.tokens / cost.unit_seconds


def kind_of(need: Need) -> str:
    """Return the name under which a feature's cost is kept: needs of one kind cost alike per unit."""
    side = f" {need.params['side']}" if "side" in need.params else ""
    return f"{need.feature}{side}"


def feature_stage(found: Measured, need: Need, number: int | None) -> StageCost:
    """Predict one feature table."""
    counts = found.counts(need.split)
    feature: Any = make_feature(need, found.config)
    stage = StageCost(f"{need.feature}, {need.split}", number, counts.rows, counts.tokens)
    special = _SPECIAL.get(need.feature)
    if special is not None:
        return special(found, need, feature, stage)
    cost = found.features[kind_of(need)]
    flops = {"losses": loss_flops, "gradients": gradient_flops}[need.feature]
    made = replace(_computed(found, stage, cost, counts.tokens), flops=flops(found.model, counts))
    if need.params.get("side") == "adam" and found.training is None:
        return replace(made, basis="extrapolated", note="measured without Adam's update, which adds little")
    return made


def _embeddings(found: Measured, need: Need, feature: Any, stage: StageCost) -> StageCost:
    if feature.made is not None:
        disk = stage.rows * row_bytes([each for each in feature.schema if each.name != "n_tokens"])
        return replace(
            stage, tokens=0.0, seconds=0.0, disk_bytes=disk, basis="counted", note="read from a file"
        )
    made = _computed(found, stage, found.features["embeddings"], stage.tokens)
    folder = feature.model.folder
    weights = 0 if folder is None else sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    note = "tokens as the tokenizer of the model to be trained counts them"
    if not weights:
        note += "; FLOPs not counted"
    return replace(made, flops=embedding_flops(weights // 4, stage.tokens), note=note)


def _computed(
    found: Measured, stage: StageCost, cost: FeatureCost, units: float, lines: int | None = None
) -> StageCost:
    parts = -(-stage.rows // found.config.rows_per_part)
    disk = parts * cost.part_bytes + (stage.rows if lines is None else lines) * cost.line_bytes
    seconds = cost.start_seconds + units * cost.unit_seconds
    return replace(stage, seconds=seconds, disk_bytes=disk, memory_bytes=cost.peak_bytes)


def _generations(found: Measured, need: Need, feature: Any, stage: StageCost) -> StageCost:
    cost = found.features["generations"]
    lines = stage.rows * feature.lines_per_row
    tokens = found.counts(need.split).valid * feature.lines_per_row * cost.tokens_per_line
    made = _computed(found, stage, cost, tokens, lines)
    notes = []
    if cost.cut:
        notes.append(
            f"{100 * cost.cut:.0f} % of the sampled answers were cut short and count as max_new_tokens: "
            "an upper bound"
        )
    if feature.params.generator == "vllm":
        notes.append("measured with transformers, and vLLM will draw, which is faster")
    basis: Basis = "extrapolated" if notes else "measured"
    flops = generation_flops(found.model, tokens)
    return replace(made, tokens=tokens, flops=flops, basis=basis, note="; ".join(notes))


def _rewards(found: Measured, need: Need, feature: Any, stage: StageCost) -> StageCost:
    """Count what is judged: every answer and, where they are wanted, the rows' own."""
    counts = found.counts(need.split)
    judged = round(counts.valid) * (feature.lines_per_row + bool(feature.params.reference))
    stage = replace(stage, rows=judged, tokens=0.0, basis="unknown")
    if isinstance(feature.settings, MetricSettings):
        return replace(stage, note="a function; not measured")
    if not isinstance(feature.settings, ApiSettings):
        return replace(stage, note=f"the judge {feature.subject} is not loaded to estimate")
    limit = feature.settings.requests_per_minute
    prompts = judged * _judge_tokens(found, need, feature.settings)
    stage = replace(stage, tokens=prompts)
    note = (
        f"requests to {feature.subject} at most, retries aside: equal answers are asked once; tokens are those "
        "sent, as the model to be trained would count them"
    )
    if limit is None:
        return replace(stage, requests=judged, note=note)
    return replace(
        stage,
        requests=judged,
        seconds=60.0 * judged / limit,
        basis="extrapolated",
        note=f"{note}; at its rate limit",
    )


def _judge_tokens(found: Measured, need: Need, settings: ApiSettings) -> float:
    """Return about how many tokens a judge is sent for one answer: request, answer, reference, instructions."""
    counts, answer = found.counts(need.split), found.features["generations"].tokens_per_line
    texts = prompt_texts(settings)
    request = (counts.tokens - counts.responses) / counts.valid
    reference = counts.responses / counts.valid if settings.show_reference else 0.0
    asked = texts["prompt_with_reference" if settings.show_reference else "prompt"]
    return request + answer + reference + (len(texts["system"]) + len(asked)) / CHARACTERS_PER_TOKEN


def _policy_gradients(found: Measured, need: Need, feature: Any, stage: StageCost) -> StageCost:
    """One gradient per answer, over its prompt and itself, at the rate of plain gradients."""
    counts, drawn = found.counts(need.split), found.features["generations"]
    samples = int(feature.needs(need)["generations"].params.get("mc_samples", 4))
    answers = counts.valid * samples
    tokens = samples * (counts.tokens - counts.responses) + answers * drawn.tokens_per_line
    responses = answers * drawn.tokens_per_line
    squares = tokens**2 / max(answers, 1.0)
    mix = RowCounts(round(answers), answers, tokens, squares, responses, exact=False)
    plain = next(cost for kind, cost in found.features.items() if kind.startswith("gradients"))
    made = _computed(found, stage, plain, tokens)
    note = "every answer counts: an upper bound, at the rate of the pool's gradients"
    flops = gradient_flops(found.model, mix)
    return replace(made, tokens=tokens, flops=flops, basis="extrapolated", note=note)


def _neighbours(found: Measured, need: Need, feature: Any, stage: StageCost) -> StageCost:
    cost, n_pool = found.features["neighbours"], found.pool.valid
    wanted = min(feature.params.max_K, round(n_pool))
    made = _searched(found, feature, stage, cost, found.counts("target").valid, n_pool, wanted)
    scale = wanted / min(feature.params.max_K, 4096)
    return replace(made, disk_bytes=made.disk_bytes * scale)


def _density(found: Measured, need: Need, feature: Any, stage: StageCost) -> StageCost:
    inner: Any = make_feature(feature.needs(need)["neighbours"], found.config)
    near = min(found.pool.valid, found.counts("target").valid * inner.params.max_K)
    wanted = min(feature.params.kde_K, round(near))
    made = _searched(found, feature, stage, found.features["density"], near, near, wanted)
    return replace(made, note=f"{made.note}; at most {near:,.0f} rows are near the target")


def _searched(
    found: Measured,
    feature: Any,
    stage: StageCost,
    cost: FeatureCost,
    queries: float,
    vectors: float,
    wanted: int,
) -> StageCost:
    """Predict a search among vectors: all pairs, or those inside the cells looked into."""
    inner: Any = make_feature(feature.needs(Need(stage.stage.split(",")[0]))["pool"], found.config)
    dimension, given = int(inner.dimension), feature.params
    layout = choose_layout(
        given.search, round(queries), round(vectors), dimension, wanted, given.nlist, given.nprobe
    )
    pairs = queries * vectors
    if layout is not None:
        pairs = SCAN * pairs * layout.nprobe / layout.nlist + (queries + vectors) * layout.nlist
    note = (
        "exact search of random vectors" if layout is None else f"{layout}, from the rate of an exact search"
    )
    made = _computed(found, replace(stage, tokens=0.0), cost, pairs)
    basis: Basis = "measured" if layout is None else "extrapolated"
    return replace(made, flops=2.0 * dimension * pairs, basis=basis, note=note)


_SPECIAL: dict[str, Callable[[Measured, Need, Any, StageCost], StageCost]] = {
    "embeddings": _embeddings,
    "generations": _generations,
    "rewards": _rewards,
    "policy_gradients": _policy_gradients,
    "neighbours": _neighbours,
    "density": _density,
}


def training_stage(found: Measured, number: int, batch: int) -> StageCost:
    """Predict the training of a round: its steps, its evaluations, its checkpoint."""
    config = found.config
    steps = config.warmup_step if number == 0 else config.update_step
    drawn = found.pool.drawn(steps * batch)
    evaluated = evaluations(config, steps) if found.target is not None else 0
    target = (
        found.target.drawn(round(found.target.valid)) if found.target is not None else found.pool.drawn(0)
    )
    flops = training_flops(found.model, drawn) + evaluated * loss_flops(found.model, target)
    evaluating = evaluated * target.tokens * found.features["losses"].unit_seconds
    stage = StageCost("train", number, steps * batch, drawn.tokens, steps, flops)
    cost = found.training
    if cost is None:
        seconds = training_flops(found.model, drawn) / (found.forward_rate * BACKWARD_SHARE)
        note = "from the rate of a forward pass: a checkpoint is too large to be written for an estimate"
        disk = float(checkpoint_bytes(found.model))
        seconds += found.load_seconds + evaluating
        return replace(stage, seconds=seconds, disk_bytes=disk, basis="extrapolated", note=note)
    seconds = cost.start_seconds + steps * cost.step_seconds + evaluating
    seconds += cost.once_seconds if number == 0 else 0.0
    disk = float(cost.checkpoint_bytes + steps * cost.log_bytes)
    if config.keep_checkpoints and config.save_steps is not None:
        disk += ((steps - 1) // config.save_steps) * cost.checkpoint_bytes
    note = "rows of one's own choice may be longer or shorter than the pool's" if number else ""
    return replace(stage, seconds=seconds, disk_bytes=disk, memory_bytes=cost.peak_bytes, note=note)


def evaluations(config: Config, steps: int) -> int:
    """Return how often a round of so many steps evaluates on the target."""
    if config.eval_strategy == "no":
        return 0
    if config.eval_strategy == "epoch":
        return 1
    return steps // (config.eval_steps or config.logging_steps)


def total(stages: Sequence[StageCost]) -> StageCost:
    """Return the sum over stages; seconds are those that are known, memory is the largest."""
    return StageCost(
        "all",
        None,
        sum(each.rows for each in stages),
        sum(each.tokens for each in stages),
        sum(each.steps for each in stages),
        sum(each.flops for each in stages),
        sum(each.seconds or 0.0 for each in stages),
        sum(each.disk_bytes for each in stages),
        max((each.memory_bytes for each in stages), default=0),
        sum(each.requests for each in stages),
        "extrapolated" if any(each.basis != "measured" for each in stages) else "measured",
        "; ".join(f"{each.stage} is not in the time" for each in stages if each.seconds is None),
    )
