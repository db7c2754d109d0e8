"""Settings of a round's draw, from the configuration, the method and the score table."""

from __future__ import annotations

from typing import Any

from dataflex_pipeline.api import Method, Strategy
from dataflex_pipeline.declared.method import group_columns
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.score import Scoring
from dataflex_pipeline.sampling.rows import ScoreTable
from dataflex_pipeline.sampling.settings import DrawSettings
from dataflex_pipeline.seeds import derive_seed


def positions(run: OpenRun, number: int) -> int:
    """Return the training positions of a round: steps x global batch; 0 where rounds are not trained."""
    config = run.given
    if number == 0:
        return config.warmup_step * run.global_batch
    return config.update_step * run.global_batch if config.trains_rounds else 0


def draw_settings(
    run: OpenRun,
    number: int,
    strategy: Strategy,
    replacement: bool,
    groups: tuple[str, ...] = (),
    over_target_rows: bool = False,
    embeddings: str = "",
) -> DrawSettings:
    """Return how a round's rows are drawn, with the round's own random stream."""
    config = run.given
    return DrawSettings(
        strategy=strategy,
        positions=positions(run, number),
        num_samples=config.num_samples if number else None,
        fraction=config.fraction if number else None,
        token_budget=config.token_budget if number else None,
        replacement=replacement,
        weights=config.weights if number else "uniform",
        source_quotas=config.source_quotas if number else {},
        balanced=config.balanced is not None and number > 0,
        shuffle=not config.disable_shuffling,
        seed=derive_seed(config.seed, "select", number),
        group_columns=groups,
        over_target_rows=over_target_rows,
        order=config.order if number else "shuffled",
        max_similarity=config.max_similarity if number else None,
        embeddings=embeddings,
    )


def as_ingredients(settings: DrawSettings) -> dict[str, Any]:
    """Return how rows are drawn as plain values; what was added later is named only where it is set."""
    return {
        **{name: getattr(settings, name) for name in ("strategy", "positions", "num_samples", "fraction")},
        **{name: getattr(settings, name) for name in ("token_budget", "replacement", "weights", "shuffle")},
        "source_quotas": dict(settings.source_quotas),
        "group_columns": list(settings.group_columns),
        "seed": settings.seed,
        **({"over": "target_rows"} if settings.over_target_rows else {}),
        **({"balanced": "source"} if settings.balanced else {}),
        **({} if settings.order == "shuffled" else {"order": settings.order}),
        **_apart(settings),
    }


def _apart(settings: DrawSettings) -> dict[str, Any]:
    if settings.max_similarity is None:
        return {}
    return {"max_similarity": settings.max_similarity, "embeddings": settings.embeddings}


def round_settings(run: OpenRun, scoring: Scoring, scores: ScoreTable, embeddings: str = "") -> DrawSettings:
    """Return how the rows of a scored round are drawn; ``embeddings``: fingerprint of those compared."""
    strategy = run.given.strategy or scoring.method.default_strategy
    replacement = run.given.replacement
    if replacement is None:
        replacement = scoring.method.replaces and strategy == "sample"
    groups: tuple[str, ...] = ()
    over_rows = False
    if strategy == "round_robin":
        groups = group_columns(scoring.method, scores.schema)
        over_rows = _takes_turns_by_row(run, scoring, len(groups))
    return draw_settings(
        run,
        scoring.selection.round,
        strategy,
        replacement,
        () if over_rows else groups,
        over_rows,
        embeddings,
    )


def _takes_turns_by_row(run: OpenRun, scoring: Scoring, n_groups: int) -> bool:
    """Whether target rows take turns rather than groups.

    Raises:
        ConfigError: target rows were asked for, and the method has one ranking of the pool only.
    """
    over, able = run.given.round_robin_over, scoring.method.ranks_by_target_row
    check_turns(scoring.name, scoring.method, over)
    return able and (over == "target_rows" or (over is None and n_groups < 2))


def check_turns(name: str, method: Method, over: str | None) -> None:
    """Refuse turns of target rows by a method that has one ranking of the pool only.

    Args:
        name: of the method. method: itself. over: the setting ``round_robin_over``.

    Raises:
        ConfigError: they were asked for.
    """
    if over == "target_rows" and not method.ranks_by_target_row:
        raise ConfigError(
            f"round_robin_over: target_rows was set with the method {name}.",
            "Target rows take turns by their own rankings of the pool, and this method has only one for all.",
            "Set round_robin_over: groups if it has groups, or use a method that compares row with row, "
            "such as less.",
        )
