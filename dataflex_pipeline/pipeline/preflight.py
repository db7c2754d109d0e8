"""Checks before a new run: all that the method needs is there, and the model gives a finite loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dataflex_pipeline.api import Feature, Method, Need, Selection, Split
from dataflex_pipeline.declared.feature import doubts
from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.features.plan import method_needs, with_upstream
from dataflex_pipeline.host_memory import check_libraries_fit
from dataflex_pipeline.models.one_base import let_go
from dataflex_pipeline.pipeline.checkpoints import check_kept_checkpoints
from dataflex_pipeline.pipeline.drawing import check_draw_fits, check_turns, draw_settings, positions
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.prepare import Source, splits_of
from dataflex_pipeline.pipeline.score_checks import check_pool_columns
from dataflex_pipeline.pipeline.similarity import similarity_need
from dataflex_pipeline.sampling.exported import check_export
from dataflex_pipeline.sampling.quotas import check_quotas
from dataflex_pipeline.schemas import PREPARED
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.stale import is_complete
from dataflex_pipeline.training.finished import has_trained

ROWS, TOKENS = 8, 16
"""Made-up sequences; one finite loss among them is enough, since single bad rows are found when scoring."""


def scoring_methods(run: OpenRun, name: str | None = None) -> list[str]:
    """Return the methods that score a round: what chooses the candidates, and the one that they are for.

    Args:
        run: to be started. name: of the method; by default the configured one.
    """
    name = name or run.given.component_name
    rule = run.given.candidates_of(name)
    return [name] if rule is None else [rule.method, name]


def check_target(run: OpenRun, name: str | None = None) -> None:
    """Check that there is a target if the method selects towards one.

    Args:
        run: to be started. name: of the method; by default the configured one.

    Raises:
        ConfigError: the method needs a target and ``eval_dataset`` is not set.
    """
    for each in scoring_methods(run, name):
        _check_target(run, each)


def _check_target(run: OpenRun, name: str) -> None:
    method, _ = run.method(name)
    check_kept_checkpoints(run, name)
    first = Selection(1, run.given.last_round, 0, run.progress.say)
    wants = any(need.split == "target" for need in method_needs(method, first).values())
    has_query = "query" in type(method.params).model_fields
    if wants and "target" not in splits_of(run):
        raise ConfigError(
            f"The method {name} was chosen{_for_candidates(run, name)} and eval_dataset is not set.",
            f"{name} selects rows towards a target set, and there is none.",
            "Set eval_dataset to rows of what the model should get good at"
            + (", or query: first_100 for the first 100 rows of the pool." if has_query else "."),
        )


def _for_candidates(run: OpenRun, name: str) -> str:
    """Return " for candidates" where a method was only named to choose them."""
    rule = run.given.candidates_of(run.given.component_name)
    return " for candidates" if rule is not None and rule.method == name else ""


def check_method(
    run: OpenRun, sources: Mapping[Split, Source], last: int, name: str | None = None, *, draws: bool = True
) -> None:
    """Check what the method will need in round 1, and how rows are drawn, before anything is trained.

    Servers are tried where a round after the warm-up was asked for and is not scored yet.

    Args:
        run: to be started. sources: of its splits.
        last: the last round to be made.
        name: of the method; by default the configured one. draws: whether rows are selected.

    Raises:
        UserError: something is not there, or does not fit the rows.
    """
    if last and draws:
        check_how_many(run, name)
        _check_quotas(run, sources["pool"])
    if has_trained(run.store):
        return
    check_draw_fits(run, 0, "sample")
    names = scoring_methods(run, name)
    for each in names:
        _check_scoring(run, sources, last, each)
    if last and draws:
        for need, feature in similarity_features(run, names):
            feature.check(need, sources["pool"].scan.n_rows)


def _check_scoring(run: OpenRun, sources: Mapping[Split, Source], last: int, name: str) -> None:
    """Check what one method will need in round 1."""
    method, _ = run.method(name)
    if last and method.compares_rounds and not run.given.trains_rounds:
        raise ConfigError(
            f"The method {name} was chosen{_for_candidates(run, name)}, and no round is trained (update_step "
            "or update_times is 0).",
            f"{name} compares the model with itself some rounds later; till then all rows score the same.",
            "Choose another method, such as loss or perplexity, or set update_step and update_times.",
        )
    n_rows = {split: source.scan.n_rows for split, source in sources.items()}
    originals = [each.field.name for each in sources["pool"].scan.columns]
    check_pool_columns(name, method, [*PREPARED.names, *originals])
    method.check_pool(n_rows["pool"])
    if method.probabilities_to is not None and not run.overwrite:
        check_export(method.probabilities_to, n_rows["pool"])
    scored = run.store.round(1).scores(name).is_file()
    for need, feature in features_of(run, method):
        feature.check(need, n_rows[need.split])
        for line in doubts(feature) if last and not scored else ():
            run.progress.say(f"note: {line}")


def check_how_many(run: OpenRun, name: str | None = None) -> None:
    """Refuse a selection of nobody knows how many rows, or a random draw by a strategy that is none.

    Args:
        run: to be started. name: of the method; by default the configured one.

    Raises:
        ConfigError: no round is trained and no amount is set; or replacement or weights are set where the
            method's own strategy is no random draw.
        UserError: the memory cannot hold so many rows.
    """
    config = run.given
    draw_settings(run, 1, "sample", replacement=False)
    chosen = name or config.component_name
    method = run.method(chosen)[0]
    strategy = method.default_strategy
    check_draw_fits(run, 1, config.strategy or strategy)
    if (config.strategy or strategy) == "round_robin":
        check_turns(chosen, method, config.round_robin_over)
    if config.strategy is not None or strategy == "sample":
        return
    given = [f"weights={config.weights}"] if config.weights != "uniform" else []
    given += ["replacement=true"] if config.replacement else []
    if given:
        raise ConfigError(
            f"{given[0]} was set, and {chosen} selects by {strategy} unless told otherwise.",
            "That strategy is not a random draw: each row is selected once or not at all.",
            f"Set strategy=sample, or leave {given[0].partition('=')[0]} out.",
        )


def _check_quotas(run: OpenRun, pool: Source) -> None:
    """Check the quotas of sources; what is left over only where the rows to select are counted by now."""
    config = run.given
    if config.source_quotas:
        counted = config.token_budget or config.num_samples or positions(run, 1)
        sources = [scanned.source.name for scanned in pool.scan.sources]
        check_quotas(config.source_quotas, sources, 0 if config.fraction is not None else counted)


def features_of(run: OpenRun, method: Method) -> Iterator[tuple[Need, Feature]]:
    """Yield each feature that a method needs in round 1, and those that they are computed from, once."""
    first = Selection(1, run.given.last_round, 0, run.progress.say)
    seen: list[Need] = []
    for asked in method_needs(method, first).values():
        for need, feature in with_upstream(asked, run.given):  # as given: no check needs the demo to be made
            if need not in seen:
                seen.append(need)
                yield need, feature


def similarity_features(run: OpenRun, names: Sequence[str]) -> Iterator[tuple[Need, Feature]]:
    """Yield the embeddings that rows are kept apart by, where they are.

    Args:
        run: to be started. names: of the methods that score a round.
    """
    need = similarity_need(run.given, [run.method(name)[0] for name in names])
    yield from () if need is None else with_upstream(need, run.given)


def check_training(run: OpenRun, last: int) -> None:
    """Refuse settings that cannot train, where a round up to ``last`` is still to be trained.

    Raises:
        ConfigError: tracker, schedule, device, batch size, DeepSpeed file, or checkpoints to keep and none
            made.
    """
    if not run.given.horizon or is_complete(run.store.round(last).checkpoint):
        return
    check_libraries_fit()
    from dataflex_pipeline.training.arguments import check_settings

    check_settings(run.given, run.global_batch)


def check_model(run: OpenRun, name: str | None = None) -> None:
    """Load the model once and compute a few losses, before an hour of preparing and training.

    Left out once round 1 is scored or a round is trained, and where no model is scored or trained with.

    Args:
        run: to be started. name: of the method; by default the configured one.

    Raises:
        UserError: the model or adapter cannot be loaded, has no layers that ``lora_target`` means or no
            routers for ``router_aux_loss_coef``, or every loss is NaN or infinite.
    """
    scored = run.store.round(1).scores(name or run.given.component_name).is_file()
    if has_trained(run.store) or scored or not _uses_model(run, name):
        return
    check_libraries_fit()
    run.progress.say(f"checking the model {run.config.model_name_or_path}")
    _check_memory(run)
    losses = _sample_losses(run, name)  # [ROWS] nats per token
    if run.given.warmup_step:  # rows are prepared and the warm-up is trained before anything is scored
        let_go()
    if np.isfinite(losses).any():
        return
    config = run.config
    raise UserError(
        f"The model {config.model_name_or_path} gives no finite loss: {ROWS} of {ROWS} made-up sequences "
        f"have the loss {losses[0]}.",
        "Its weights hold NaN or infinite numbers, or overflow in the precision that they are loaded in, "
        "so nothing can be scored or trained.",
        "Use sound weights; for a model that was trained in bfloat16 set bf16: true.",
    )


def _check_memory(run: OpenRun) -> None:
    """Refuse a model that the processes of this launch cannot hold, each for itself.

    Raises:
        UserError: the weights, or what training all of them needs, are larger than the memory.
    """
    from dataflex_pipeline.host_memory import local_processes
    from dataflex_pipeline.models.base import precision, resolve_device
    from dataflex_pipeline.models.weights import check_training_fits, check_weights_fit

    config, device = run.config, resolve_device(run.config.device)
    check_weights_fit(config, device, precision(config, device).dtype, local_processes())
    if config.horizon:
        check_training_fits(config, device, local_processes())


def _uses_model(run: OpenRun, name: str | None) -> bool:
    config = run.given
    if config.horizon:
        return True
    methods = [run.method(each)[0] for each in scoring_methods(run, name)]
    return any(feature.uses_model for method in methods for _, feature in features_of(run, method))


def _check_trained_layers(run: OpenRun, model: Any, name: str | None) -> None:
    """Refuse settings of the training, or of gradients, that this model has no layers for."""
    from dataflex_pipeline.models.targets import find_targets
    from dataflex_pipeline.training.arguments import check_router_coefficient

    config = run.config
    methods = [run.method(each)[0] for each in scoring_methods(run, name)]
    trains = config.horizon or any(
        feature.of_trained_weights for method in methods for _, feature in features_of(run, method)
    )
    if trains and config.finetuning_type == "lora" and config.adapter_name_or_path is None:
        find_targets(config.lora_target, model)
    if config.horizon:
        check_router_coefficient(config, model)


def _sample_losses(run: OpenRun, name: str | None) -> np.ndarray:
    import torch

    from dataflex_pipeline.features.losses import mean_losses
    from dataflex_pipeline.models.base import load_for_scoring, resolve_device
    from dataflex_pipeline.models.batches import Sequences
    from dataflex_pipeline.models.token_losses import token_losses

    config = run.config
    model = load_for_scoring(config, None, resolve_device(config.device))
    _check_trained_layers(run, model, name)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    stream = np.random.default_rng(derive_seed(config.seed, "preflight"))
    ids = stream.integers(0, vocabulary, ROWS * TOKENS)
    sequences = Sequences(ids, ids, np.arange(ROWS + 1) * TOKENS)
    with torch.inference_mode(), token_losses(model) as losses:
        return mean_losses(losses, sequences, ROWS * TOKENS)
