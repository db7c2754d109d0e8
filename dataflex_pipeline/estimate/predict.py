"""The predicted cost of each feature table of a run, from counts and the calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dataflex_pipeline.api import Need
from dataflex_pipeline.estimate.costs import (
    ModelShape,
    RowCounts,
    embedding_flops,
    generation_flops,
    gradient_flops,
    loss_flops,
    row_bytes,
)
from dataflex_pipeline.estimate.features import VECTORS, FeatureCost
from dataflex_pipeline.estimate.records import Basis, Measured, StageCost
from dataflex_pipeline.features.plan import OF_GRADIENTS, make_feature, params_of
from dataflex_pipeline.neighbours.cells import SCAN, affordable_on, choose_layout, search_device
from dataflex_pipeline.reward.settings import AnswerTokens, RewardCost

COMPUTED_ELSEWHERE = ("rewards", "grades", "policy_gradients")
"""Features whose cost follows from others'."""


def kind_of(need: Need) -> str:
    """Return the name under which a feature's cost is kept: needs of one kind cost alike per unit."""
    params = params_of(need)
    side = getattr(params, "side", None) or ("alone" if getattr(params, "alone", False) else None)
    return need.name if side is None else f"{need.name} {side}"


def follows_from_others(need: Need) -> bool:
    """Whether a feature's cost is worked out from those of others."""
    return need.name in COMPUTED_ELSEWHERE or _is_drawn(need)


def _is_drawn(need: Need) -> bool:
    """Whether a table is of policy gradients."""
    drawn = need.name == "target_directions" and params_of(need).policy is not None
    return need.name == "policy_gradients" or drawn


def feature_stage(found: Measured, need: Need, number: int | None) -> StageCost:
    """Predict one feature table."""
    counts = found.counts(need.split)
    feature: Any = make_feature(need, found.config)
    stage = StageCost(f"{need.name}, {need.split}", number, counts.rows, counts.tokens)
    special = _policy_gradients if _is_drawn(need) else _SPECIAL.get(need.name)
    if special is not None:
        return special(found, need, feature, stage)
    cost = found.features[kind_of(need)]
    flops = _FLOPS.get(need.name)
    made = _computed(found, stage, cost, counts.tokens)
    if flops is None:  # of a feature of the user's own, or of another model, only the time is known
        return replace(made, note="its FLOPs are not known")
    made = replace(made, flops=flops(found.model, counts))
    if need.name == "target_directions":
        return replace(made, disk_bytes=made.disk_bytes + _directions_bytes(found, need))
    if kind_of(need) in ("gradients adam", "influence adam") and found.training is None:
        return replace(made, basis="extrapolated", note="measured without Adam's update, which adds little")
    return made


def _alone_flops(model: ModelShape, counts: RowCounts) -> float:
    """Return the FLOPs of the responses' own losses: those of rows that are nothing but responses."""
    squares = counts.responses**2 / max(counts.valid, 1.0)
    alone = RowCounts(counts.rows, counts.valid, counts.responses, squares, counts.responses, exact=False)
    return loss_flops(model, alone)


def _headless_flops(model: ModelShape, counts: RowCounts) -> float:
    """Return the FLOPs of hidden states: those of losses without any label."""
    return loss_flops(model, replace(counts, responses=0.0))


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
    set_rows = found.config.rows_per_part
    parts = -(-stage.rows // (cost.rows_per_part if set_rows == "auto" else set_rows))
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
    return _judged(stage, judged, feature.settings.cost(judged, _answer_tokens(found, need)))


def _grades(found: Measured, need: Need, feature: Any, stage: StageCost) -> StageCost:
    """Count what is graded: the last answer of every row."""
    counts = found.counts(need.split)
    valid = counts.valid or 1
    each = AnswerTokens((counts.tokens - counts.responses) / valid, counts.responses / valid, 0.0)
    return _judged(stage, round(counts.valid), feature.settings.cost(round(counts.valid), each))


def _judged(stage: StageCost, judged: int, cost: RewardCost) -> StageCost:
    """Return a stage that is nothing but judging."""
    basis: Basis = "unknown" if cost.seconds is None else "extrapolated"
    return replace(
        stage,
        rows=judged,
        tokens=cost.tokens,
        requests=cost.requests,
        seconds=cost.seconds,
        basis=basis,
        note=cost.note,
    )


def _answer_tokens(found: Measured, need: Need) -> AnswerTokens:
    """Return the mean tokens of the conversation before an answer, the answer, and the row's own."""
    counts, valid = found.counts(need.split), found.counts(need.split).valid or 1
    drawn = found.features["generations"].tokens_per_line
    return AnswerTokens((counts.tokens - counts.responses) / valid, drawn, counts.responses / valid)


def _policy_gradients(found: Measured, need: Need, feature: Any, stage: StageCost) -> StageCost:
    """One gradient per answer, over its prompt and itself, at the rate of plain gradients."""
    counts, drawn = found.counts(need.split), found.features["generations"]
    policy = feature.params if need.name == "policy_gradients" else feature.params.policy
    samples = int(policy.generations.mc_samples)
    answers = counts.valid * samples
    tokens = samples * (counts.tokens - counts.responses) + answers * drawn.tokens_per_line
    responses = answers * drawn.tokens_per_line
    squares = tokens**2 / max(answers, 1.0)
    mix = RowCounts(round(answers), answers, tokens, squares, responses, exact=False)
    plain = next(cost for kind, cost in found.features.items() if kind.startswith(OF_GRADIENTS))
    made = _computed(found, stage, plain, tokens)
    note = "every answer counts: an upper bound, at the rate of the pool's gradients"
    flops = gradient_flops(found.model, mix)
    disk = made.disk_bytes + (_directions_bytes(found, need) if need.name == "target_directions" else 0.0)
    return replace(made, tokens=tokens, flops=flops, disk_bytes=disk, basis="extrapolated", note=note)


def _directions_bytes(found: Measured, need: Need) -> float:
    """Return the bytes of the directions: one per group, or per target row, of all trained parameters."""
    counted = found.features.get("target_directions")
    groups = max(1, 0 if counted is None else counted.groups)
    number = found.counts("target").valid if params_of(need).per == "row" else groups
    return 4.0 * number * found.model.trained


def _neighbours(found: Measured, need: Need, feature: Any, stage: StageCost) -> StageCost:
    cost, n_pool = found.features["neighbours"], found.pool.valid
    wanted = min(feature.params.max_K, round(n_pool))
    made = _searched(found, feature, stage, cost, found.counts("target").valid, n_pool, wanted)
    scale = wanted / min(feature.params.max_K, VECTORS)
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
        given.search,
        round(queries),
        round(vectors),
        dimension,
        wanted,
        given.nlist,
        given.nprobe,
        affordable_on(search_device(found.config.device)),
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


_FLOPS: dict[str, Callable[[ModelShape, RowCounts], float]] = {
    "losses": loss_flops,
    "response_losses": _alone_flops,
    "model_embeddings": _headless_flops,
    **dict.fromkeys(OF_GRADIENTS, gradient_flops),
}
_SPECIAL: dict[str, Callable[[Measured, Need, Any, StageCost], StageCost]] = {
    "embeddings": _embeddings,
    "generations": _generations,
    "rewards": _rewards,
    "grades": _grades,
    "neighbours": _neighbours,
    "density": _density,
}
