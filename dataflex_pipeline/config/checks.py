"""Rules between settings: combinations that are refused before anything runs, and settings without effect."""

from __future__ import annotations

from collections.abc import Callable

from dataflex_pipeline.config.candidates import check_candidates
from dataflex_pipeline.config.draw_rules import (
    AMOUNTS,
    check_amounts,
    check_balance,
    check_order,
    check_quotas,
    check_similarity,
    check_strategy,
)
from dataflex_pipeline.config.fields import DEMO, Config
from dataflex_pipeline.config.values import show
from dataflex_pipeline.errors import ConfigError, did_you_mean

TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "swanlab": ("swanlab",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
"""Where the training log can go -> the packages of which one has to be installed."""
SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "polynomial",
)
MOST_POSITIONS = 1 << 31
"""Rows that one round trains on at most; an index of them takes 100 GB."""
MOST_SCALING = 1024
"""LoRA's share of a layer is multiplied by lora_alpha / lora_rank, 2 by default; so much more is a slip."""
METRICS = ("eval_loss", "eval_token_accuracy")
_LORA_KEYS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target")

Place = Callable[[str], str]
"""Says where a key was set, for messages."""


def check(config: Config, place: Place) -> None:
    """Raise ConfigError for the first pair of settings that cannot both hold."""
    for rule in (
        _draw,
        _candidates,
        _sizes,
        schedule,
        _evaluation,
        _best,
        _trackers,
        _adapter,
        _scaling,
        _quantized,
    ):
        rule(config, lambda name: f"{name}: {show(name, getattr(config, name))} ({place(name)})")


def notices(config: Config) -> list[str]:
    """Return a line for every setting that has no effect, or more effect than one may think."""
    unused = config.similarity and config.max_similarity is None
    lines = ["similarity has no effect without max_similarity"] if unused else []
    return [*_model_notices(config), *_evaluation_notices(config), *lines]


def _draw(config: Config, said: Place) -> None:
    check_amounts({name: getattr(config, name) for name in AMOUNTS}, said)
    check_quotas(config.source_quotas, said)
    check_balance(config.balanced, config.source_quotas, said)
    check_strategy(config.strategy or "sample", config.replacement, config.weights, said)
    check_similarity(config.max_similarity, config.replacement, config.weights, said)
    check_order(config.order, config.disable_shuffling, said)


def _sizes(config: Config, said: Place) -> None:
    """Refuse more rows in one round than an index could hold, long before there is no memory for it."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    for name in ("warmup_step", "update_step"):
        rows = getattr(config, name) * batch
        if rows > MOST_POSITIONS:
            raise ConfigError(
                f"{said(name)}: {rows:,} rows in one round, with {batch:,} rows a step and process.",
                f"An index holds at most {MOST_POSITIONS:,} rows.",
                f"Lower {name}, per_device_train_batch_size or gradient_accumulation_steps.",
            )


def _candidates(config: Config, said: Place) -> None:
    amounts = {name: getattr(config, name) for name in AMOUNTS}
    check_candidates(config.candidates, config.component_name, amounts, said)


def _evaluation(config: Config, said: Place) -> None:
    if config.eval_strategy != "no" and config.eval_dataset is None:
        raise ConfigError(
            f"{said('eval_strategy')} is set without eval_dataset.",
            "Evaluation runs on the target set, and none is given.",
            "Set eval_dataset, or eval_strategy to no.",
        )
    best_metric(config, said)


def best_metric(config: Config, said: Place | None = None) -> str:
    """Return the metric that tells which checkpoint is best, with its ``eval_`` prefix.

    Args:
        config: with ``metric_for_best_model``.
        said: names the key with its value and place, for the error.

    Raises:
        ConfigError: it is none that an evaluation gives.
    """
    metric = "eval_" + config.metric_for_best_model.removeprefix("eval_")
    if metric not in METRICS:
        raise ConfigError(
            f"{_said(config, 'metric_for_best_model', said)} is not known.{did_you_mean(metric, METRICS)}",
            f"An evaluation on the target gives {' and '.join(METRICS)}.",
            "Set metric_for_best_model to one of them, or leave it out.",
        )
    return metric


def _said(config: Config, name: str, said: Place | None) -> str:
    return f"{name}: {getattr(config, name)}" if said is None else said(name)


def schedule(config: Config, said: Place | None = None) -> str:
    """Return the name of the learning-rate schedule.

    Args:
        config: with ``lr_scheduler_type``.
        said: names the key with its value and place, for the error.

    Raises:
        ConfigError: an unknown one, or one that needs parameters of its own.
    """
    name = config.lr_scheduler_type
    if name not in SCHEDULES:
        raise ConfigError(
            f"{_said(config, 'lr_scheduler_type', said)} is not known.{did_you_mean(name, SCHEDULES)}",
            f"Schedules that need nothing but the horizon and warmup_ratio are: {', '.join(SCHEDULES)}.",
            "Set lr_scheduler_type to one of them.",
        )
    return name


def _best(config: Config, said: Place) -> None:
    if config.eval_strategy != "no":
        return
    wanted = [n for n in ("load_best_model_at_end", "early_stopping_steps") if getattr(config, n)]
    if wanted:
        raise ConfigError(
            f"{said(wanted[0])} is set while eval_strategy is no.",
            "Without evaluations nothing tells which checkpoint is best, or when to stop.",
            "Set eval_strategy to steps or epoch together with eval_dataset, or leave it out.",
        )


def _trackers(config: Config, said: Place) -> None:
    known = ("none", *TRACKERS)
    names = [name.strip() for name in config.report_to.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise ConfigError(
            f"{said('report_to')} names '{unknown[0]}', which is not known.{hint}",
            f"The training log can go to: {', '.join(known)}.",
            "Choose one or more of them, comma-separated.",
        )
    if "none" in names and len(names) > 1:
        raise ConfigError(
            f"{said('report_to')} cannot be used.",
            "It asks for none and for a tracker.",
            "Keep none, or the tracker.",
        )


def _adapter(config: Config, said: Place) -> None:
    if config.finetuning_type == "full" and config.adapter_name_or_path is not None:
        raise ConfigError(
            f"Set together: {said('finetuning_type')}; {said('adapter_name_or_path')}.",
            "An adapter is trained on by LoRA; training all weights has no place for it.",
            "Set finetuning_type to lora, or export the adapter into a model first and start from that.",
        )


def _scaling(config: Config, said: Place) -> None:
    """Refuse a factor that no training takes: at 1e9 the second step is no finite number any more."""
    fresh = config.finetuning_type == "lora" and config.adapter_name_or_path is None
    alpha = config.lora_alpha
    if fresh and alpha is not None and alpha > MOST_SCALING * config.lora_rank:
        raise ConfigError(
            f"Set together: {said('lora_alpha')}; {said('lora_rank')}.",
            f"What the adapter adds is multiplied by lora_alpha / lora_rank, at most {MOST_SCALING:,}.",
            f"Lower lora_alpha; by default it is twice lora_rank, {2 * config.lora_rank}.",
        )


def _quantized(config: Config, said: Place) -> None:
    if config.quantization_bit is not None and config.finetuning_type == "full":
        raise ConfigError(
            f"Set together: {said('finetuning_type')}; {said('quantization_bit')}.",
            "Quantized weights are whole numbers, which no gradient step moves; LoRA is trained on top.",
            "Set finetuning_type to lora, or leave quantization_bit out.",
        )


def _model_notices(config: Config) -> list[str]:
    lines = []
    if config.finetuning_type == "full":
        fields = Config.model_fields
        unused = [name for name in _LORA_KEYS if getattr(config, name) != fields[name].default]
        if unused:
            lines.append(f"finetuning_type: full trains all weights, so {', '.join(unused)} has no effect")
    if config.trust_remote_code and config.model_name_or_path != DEMO:
        lines.append(f"trust_remote_code: true runs Python code that comes with {config.model_name_or_path}")
    return lines


def _evaluation_notices(config: Config) -> list[str]:
    lines = []
    if config.eval_steps is not None and config.eval_strategy != "steps":
        lines.append(f"eval_steps has no effect while eval_strategy is {config.eval_strategy}")
    if config.early_stopping_min_delta and config.early_stopping_steps is None:
        lines.append("early_stopping_min_delta has no effect without early_stopping_steps")
    counts = config.load_best_model_at_end or config.early_stopping_steps is not None
    if counts and config.greater_is_better and config.metric_for_best_model.endswith("loss"):
        lines.append("greater_is_better: true with a loss takes the checkpoint with the HIGHEST loss as best")
    return lines
