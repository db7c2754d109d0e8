"""Settings of a round's draw, from the configuration, the method and the score table."""

from __future__ import annotations

from typing import Any

from dataflex_pipeline.api import Method, Strategy
from dataflex_pipeline.declared.method import group_columns
from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.host_memory import available_bytes
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.score import Scoring
from dataflex_pipeline.sampling.rows import ScoreTable
from dataflex_pipeline.sampling.settings import DrawSettings
from dataflex_pipeline.seeds import derive_seed

GIB = 1 << 30
DRAWN_BYTES = 120
"""Memory that a row of a random draw takes at least while it is drawn; 150 to 187 were seen."""
POSITION_BYTES = 90
"""Memory that a training position takes at least while an index is laid out; 111 were seen."""


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


def check_draw_fits(run: OpenRun, number: int, strategy: Strategy) -> None:
    """Refuse a draw that the memory of this machine cannot hold, before anything is computed for it.

    A random draw has as many rows as were asked for, however few there are: it repeats them. Other
    strategies end with the pool.

    Args:
        run: the run. number: of the round; 0 is the warm-up. strategy: that its rows are drawn by.

    Raises:
        UserError: rows and positions take more than is free, by what they take at least.
    """
    config, laid_out = run.given, positions(run, number)
    steps = "update_step" if number else "warmup_step"
    name, drawn = _drawn_at_least(run, number) if strategy == "sample" else ("", 0)
    needed, free = DRAWN_BYTES * drawn + POSITION_BYTES * laid_out, available_bytes()
    if free is None or needed <= free:
        return
    by_amount = name and DRAWN_BYTES * drawn > POSITION_BYTES * laid_out
    key, rows = (name, drawn) if by_amount else (steps, laid_out)
    batch = "" if by_amount else f" with {run.global_batch:,} rows a step"
    raise UserError(
        f"{key}={getattr(config, key)}{batch}: {rows:,} rows at once.",
        f"They take at least {needed / GIB:.1f} GiB of memory, and {free / GIB:.1f} GiB are free.",
        f"Lower {key}, or use a machine with more memory.",
    )


def _drawn_at_least(run: OpenRun, number: int) -> tuple[str, int]:
    """Return the setting that says how many rows a random draw has, "" for the positions, and how many."""
    config = run.given
    if number and config.num_samples is not None:
        return "num_samples", config.num_samples
    if number and config.token_budget is not None:  # no row has more tokens; without replacement none twice
        return "token_budget", config.token_budget // config.cutoff_len if config.replacement else 0
    if number and config.fraction is not None:
        return "fraction", 0  # of rows that are there
    return "", positions(run, number)


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
