"""The feature tables that a run computes, round by round; none is computed twice."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

from dataflex_pipeline.api import Checkpoint, FeatureInput, Method, Need, Selection, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import UserError
from dataflex_pipeline.features.candidates import Cascade
from dataflex_pipeline.features.plan import (
    method_needs,
    plain_need,
    plan_feature,
    ranking_needs,
    with_rounds,
    with_upstream,
)
from dataflex_pipeline.pipeline.base_model import is_given
from dataflex_pipeline.pipeline.checkpoints import checkpoint_of
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.prepare import look
from dataflex_pipeline.pipeline.score import candidates
from dataflex_pipeline.pipeline.similarity import similarity_need
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.stale import is_complete


def needs_by_round(method: Method, config: Config, chooser: Method | None = None) -> list[list[Need]]:
    """Return the feature tables that every round 1..update_times computes, in the order of computing.

    Args:
        method: the one that scores all rounds. config: of the run.
        chooser: the method that chooses its candidates first; None: it scores every row.
    """
    seen: set[str] = set()
    rounds = []
    for number in range(1, config.last_round + 1):
        fresh = []
        for one in (chooser, method):
            for each in () if one is None else _needs(one, config, number):
                key = need_key(each)
                if key not in seen:
                    seen.add(key)
                    fresh.append(each)
        for each in _compared(method, config, chooser, number):
            if need_key(each) not in seen:
                seen.add(need_key(each))
                fresh.append(each)
        rounds.append(fresh)
    return rounds


def candidate_keys(method: Method, config: Config, chooser: Method | None) -> frozenset[str]:
    """Return the `need_key` of the tables that are made of the candidates alone.

    Those that the chooser has of every row are not among them.

    Args:
        method, config, chooser: as for `needs_by_round`.
    """
    if chooser is None:
        return frozenset()
    numbers = range(1, config.last_round + 1)
    whole = {need_key(need) for number in numbers for need in _needs(chooser, config, number)}
    own = {need_key(need) for number in numbers for need in _needs(method, config, number)}
    own |= {need_key(need) for number in numbers for need in _compared(method, config, chooser, number)}
    return frozenset(own) - whole


def _compared(method: Method, config: Config, chooser: Method | None, number: int) -> Iterator[Need]:
    """Yield the embeddings that a round's rows are kept apart by, where they are."""
    need = similarity_need(config, [each for each in (chooser, method) if each is not None])
    if need is not None:
        yield from with_rounds({"pool": need}, _selection(method, config, number)).values()


def _needs(method: Method, config: Config, number: int) -> Iterator[Need]:
    """Yield the feature tables that scoring a round takes, and turns of target rows where asked for."""
    selection = _selection(method, config, number)
    needs = list(method_needs(method, selection).values())
    if config.strategy == "round_robin" and config.round_robin_over == "target_rows":
        needs += ranking_needs(method, selection).values()
    for need in needs:
        for each, _ in with_upstream(need, config):
            yield each


def tables_there(
    run: OpenRun, rounds: Sequence[Sequence[Need]], of_candidates: Collection[str] = ()
) -> set[str]:
    """Return which feature tables are finished already, in the run or in the folder that runs share.

    Args:
        run: need not exist; nothing is written. rounds: its feature tables by round.
        of_candidates: `candidate_keys`; such a table is there where its candidates are known by now.

    Returns:
        The `need_key` of each.
    """
    if not run.features.is_dir():
        return set()
    found = set()
    for number, needs in enumerate(rounds, 1):
        cascade = _cascade(run, number) if of_candidates else None
        for need in needs:
            key = need_key(need)
            if key not in of_candidates:
                found |= {key} if _is_there(run, need, None) else set()
            elif cascade is not None:
                found |= {key} if _is_there(run, need, cascade) else set()
    return found


def _cascade(run: OpenRun, number: int) -> Cascade | None:
    """Return the candidates of a round, where they are chosen already."""
    try:
        chosen = candidates(run, number, run.given.component_name)
    except UserError:
        return None
    return None if chosen is None else chosen[1]


def need_key(need: Need) -> str:
    """Return what tells needs of one run apart."""
    return digest(plain_need(need))


def _is_there(run: OpenRun, need: Need, cascade: Cascade | None) -> bool:
    number = need.checkpoint
    if (
        isinstance(number, int)
        and not is_given(run, number)
        and not is_complete(run.store.round(number).checkpoint)
    ):
        return False

    def given(each: Need) -> FeatureInput:
        """Return the fingerprints alone: the rows may not be prepared yet, and none of them is read."""
        folder = run.store.split(each.split)
        prepared = PartedTable.is_complete(folder)
        rows = PartedTable.open(folder).fingerprint if prepared else digest(look(run, each.split).wanted)
        checkpoint, fingerprint = checkpoint_of(run, each)
        return FeatureInput(cast(Any, None), rows, checkpoint, fingerprint)

    plan = plan_feature(need, run.config, given, run.given.rows_per_part, cascade)
    return PartedTable.is_complete(plan.folder(run.features))


def _selection(method: Method, config: Config, number: int) -> Selection:
    rate, several = config.learning_rate, _checkpoints(method, config, number)
    adds = method.accumulates and number > 1
    shared = derive_seed(config.seed, "features", number)
    return Selection(number, config.last_round, 0, Silent().say, rate, adds, several, shared_seed=shared)


def _checkpoints(method: Method, config: Config, number: int) -> tuple[Checkpoint, ...]:
    """Return the checkpoints of the round before, for a method that scores with all of them."""
    if not method.every_checkpoint or config.save_steps is None:
        return ()
    last = config.warmup_step + (number - 1) * config.update_step
    first = 0 if number == 1 else last - config.update_step
    inside = [step for step in range(first + 1, last) if step % config.save_steps == 0]
    return tuple(Checkpoint(step, config.learning_rate) for step in (*inside, None))
