"""The outputs of a run, in order: one list, which commands make, check and report by walking it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataflex_pipeline.api import Split
from dataflex_pipeline.errors import CorruptError, StaleError
from dataflex_pipeline.launch.accelerate import refuse_accelerate
from dataflex_pipeline.pipeline.damage import check_outputs, last_finished, set_aside_damaged_tables
from dataflex_pipeline.pipeline.device import say_device
from dataflex_pipeline.pipeline.epochs import settle_epochs
from dataflex_pipeline.pipeline.index import Index, WarmupIndex
from dataflex_pipeline.pipeline.open_run import OpenRun, require_run
from dataflex_pipeline.pipeline.output import Outcome, Output, State
from dataflex_pipeline.pipeline.preflight import check_method, check_model, check_target, check_training
from dataflex_pipeline.pipeline.prepare import Rows, Source, look, read_sources, splits_of
from dataflex_pipeline.pipeline.published import BestCheckpoint, PublishedAdapter
from dataflex_pipeline.pipeline.score import Scores, scores_of
from dataflex_pipeline.pipeline.score_checks import check_scored_round
from dataflex_pipeline.pipeline.select import Selection
from dataflex_pipeline.pipeline.settings import check_settings
from dataflex_pipeline.pipeline.train import Checkpoint
from dataflex_pipeline.pipeline.versions import say_versions
from dataflex_pipeline.store.stale import found_ingredients, is_complete
from dataflex_pipeline.training.finished import has_trained


def planned_outputs(
    run: OpenRun, last: int, sources: Mapping[Split, Source] | None = None
) -> Iterator[Output]:
    """Yield what the configured method makes up to round ``last``, in order.

    An output is looked at when the walk comes to it: what comes after an early stop is not there.

    Args:
        run: that they belong to.
        last: the last round.
        sources: of the splits, where they were looked at already.
    """
    method = run.given.component_name
    for split in splits_of(run):
        yield Rows(run, split, (sources or {}).get(split))
    yield from _warmup(run)
    for number in range(1, last + 1):
        if Checkpoint(run, number - 1).ended_early:
            return
        tables = scores_of(run, number, method)
        yield from tables
        yield from _chosen(run, tables[-1])


def _warmup(run: OpenRun) -> Iterator[Output]:
    """Yield what round 0 makes: nothing where it is the model as it is given."""
    if run.given.warmup_step:
        yield WarmupIndex(run)
        yield Checkpoint(run, 0)


def _chosen(run: OpenRun, scores: Scores) -> Iterator[Output]:
    """Yield what a round makes of its scores: a selection, and what is trained on it."""
    selection = Selection(scores)
    yield selection
    if run.given.trains_rounds:
        yield Index(selection)
        yield Checkpoint(run, scores.number)


def all_outputs(run: OpenRun) -> Iterator[Output]:
    """Yield every output of a run up to its horizon, in order: those of all methods that scored a round.

    The index of a round is that of the method that made it, whatever the configuration names now.
    """
    for split in splits_of(run):
        yield Rows(run, split)
    yield from _warmup(run)
    for number in range(1, run.given.last_round + 1):
        if Checkpoint(run, number - 1).ended_early:
            break
        scored = {
            path.stem: Scores(run, number, path.stem)
            for path in sorted(run.store.round(number).scores("any").parent.glob("*.parquet"))
        }
        selecting = _selecting_method(run, number)
        if not scored:
            scored = {selecting: Scores(run, number, selecting)}
            scored[selecting].label = f"round {number} scores"
        yield from sorted(
            scored.values(), key=lambda each: len(each.follows)
        )  # what chooses candidates first
        yield from _chosen(run, scored.get(selecting) or Scores(run, number, selecting))
        for path in run.store.round(number).named_selections():
            method = str(_recorded(path, run).get("method", selecting))
            yield Selection(scored.get(method) or Scores(run, number, method), path.parent.name)
    if last_finished(run) is not None:
        if run.given.load_best_model_at_end:
            yield BestCheckpoint(run)
        if run.given.output_dir is not None and run.given.finetuning_type == "lora":
            yield PublishedAdapter(run)


def _selecting_method(run: OpenRun, number: int) -> str:
    where = run.store.round(number)
    found = _recorded(where.index, run) or _recorded(where.selection, run)
    return str(found.get("method", run.given.component_name))


def _recorded(path: Path, run: OpenRun) -> Mapping[str, Any]:
    try:
        return found_ingredients(path) or {}
    except CorruptError:  # which the state of the output says
        return {}


def check_before_start(
    run: OpenRun, last: int, method: str | None = None, *, draws: bool = True
) -> dict[Split, Source]:
    """Find every mistake that can be found before anything is written.

    The method and its parameters, the data, what is on disk from other settings, and the model.

    Args:
        run: to be started or gone on with.
        last: the last round to be made.
        method: of a command that does a part of round 1; None: the configured one, for all up to ``last``.
        draws: whether rows are selected.

    Returns:
        The sources of the splits, looked at.
    """
    if run.given.horizon:
        refuse_accelerate()
    check_training(run, last)
    check_target(run, method)
    splits = splits_of(run)
    for split in splits:
        if not run.is_demo(split):  # mistakes in one's own data show before the demo model is made
            read_sources(run, split)
    sources = {split: look(run, split) for split in splits}
    settle_epochs(run)
    if method is None:
        check_planned(run, last, sources)
    check_method(run, sources, last, method, draws=draws)
    check_model(run, method)
    return sources


def prepare_rows(run: OpenRun, sources: Mapping[Split, Source]) -> list[Outcome]:
    """Prepare pool and target where they are missing, and write the settings of a run that begins.

    Those of one that has begun are replaced once what they were given for is made.

    Args:
        run: owned for writing.
        sources: from `check_before_start`.
    """
    rows = [Rows(run, split, source) for split, source in sources.items()]
    # The target first: it is the smaller one, so mistakes in it show sooner.
    prepared = {output.split: output.make() for output in reversed(rows)}
    if not run.store.exists():
        run.save_settings()
    return [prepared[split] for split in sources]


def check_planned(run: OpenRun, last: int, sources: Mapping[Split, Source]) -> None:
    """Hold every finished output up to round ``last`` against what the present settings would make.

    A command that would stop in the middle thus stops before it has written anything. With ``--overwrite``
    there is nothing to refuse.

    Raises:
        StaleError: an output was made with other settings. CorruptError: it cannot be read.
    """
    if run.overwrite or not run.store.exists():
        return
    check_settings(run)
    damage_checked = False
    for output in planned_outputs(run, last, sources):
        if not damage_checked and not isinstance(output, Rows):
            check_outputs(run, last)
            damage_checked = True
        if isinstance(output, Scores) and output.method == run.given.component_name:
            Selection(output).check_method()
        if isinstance(output, Checkpoint) and not is_complete(output.path):
            return
        if not output.is_current():
            return
        if isinstance(output, Rows):
            output.describe()  # opens the table


def make_part(run: OpenRun, number: int, outputs: Sequence[Output], *, keeps: bool = True) -> list[Outcome]:
    """Make outputs of one round, in order, for a command that does a part of it.

    Rows are prepared here where the run begins with the model as it is given.

    Args:
        run: that they belong to. number: the round.
        outputs: scores, a selection with its index, or a checkpoint.
        keeps: whether the settings given now hold for what follows.

    Raises:
        UserError: the round cannot be scored, selected or trained now, or with these settings.
    """
    first, last = outputs[0], outputs[-1]
    begins = not run.given.warmup_step and not has_trained(run.store)
    if not begins:
        require_run(run)
    if isinstance(last, Checkpoint):
        run.check_round(number)
    else:
        check_scored_round(run, number)
    check_settings(run)
    sources = None
    if begins:
        method = next((each.method for each in outputs[::-1] if isinstance(each, Scores | Selection)), None)
        sources = check_before_start(run, number, method, draws=not isinstance(first, Scores))
    say_versions(run)
    if any(isinstance(each, Scores | Checkpoint) for each in outputs):  # selecting computes with no model
        say_device(run)
    check_outputs(run, number - 1 if run.overwrite else number)
    with run.writing():
        if run.overwrite:
            set_aside_damaged_tables(run, number)
        outcomes = [] if sources is None else prepare_rows(run, sources)
        outcomes += [output.make() for output in outputs]
        if isinstance(last, Checkpoint):
            outcomes += PublishedAdapter.of(run)
        if keeps:  # as those given to the first command do
            run.save_settings()
    return outcomes


def make_up_to(
    run: OpenRun, last: int, sources: Mapping[Split, Source], *, keeps: bool = True
) -> list[Outcome]:
    """Make whatever is missing up to round ``last``; it stops where early stopping ended the run.

    Args:
        run: owned for writing.
        last: the last round; 0 is the warm-up.
        sources: from `check_before_start`.
        keeps: whether the settings given now are those of the run from here on.
    """
    outcomes = prepare_rows(run, sources)
    if keeps:
        run.save_settings()
    published: list[Outcome] = []
    done = 0
    for output in planned_outputs(run, last, sources):
        if isinstance(output, Rows):
            continue
        if isinstance(output, Scores):
            run.progress.say(f"Round {output.number}: {output.method}")
        outcomes.append(output.make())
        if isinstance(output, Checkpoint):
            done = output.number
            published += PublishedAdapter.of(run)
    if Checkpoint(run, done).ended_early and done < last:
        run.progress.say(f"The run ended in round {done} by early stopping; there is nothing to do after it.")
    # One line for the copies: it was copied if it was copied after any round.
    copied = any(each.done for each in published)
    return outcomes + [replace(each, done=copied) for each in published[-1:]]


def states(run: OpenRun) -> list[tuple[Output, State]]:
    """Return every output of a run with its state; nothing is written."""
    found: dict[str, tuple[Output, State]] = {}
    for output in all_outputs(run):
        state = output.state()
        before = [each for each in output.follows if each in found and found[each][1].name == "stale"]
        if state.name == "done" and before:
            state = State("stale", f"it follows from {before[0]}, which is stale")
        found[output.label] = output, state
    return list(found.values())


def changed_settings(run: OpenRun) -> str | None:
    """Return which settings given now are not the run's, in words; None if there are none."""
    try:
        check_settings(run)
    except StaleError as error:
        return error.what
    return None


def next_round(run: OpenRun, found: list[tuple[Output, State]]) -> tuple[int, bool] | None:
    """Return the round whose command goes on with a run, and whether it has to overwrite; None at its end."""
    last = last_finished(run)
    if last is not None and any(state.name == "damaged" for _, state in found):
        return last, True
    for number in range(run.given.first_round, run.given.last_round + 1):
        if not _is_done(run, number):
            return number, False
        if Checkpoint(run, number).ended_early:
            break
    if last is not None and any(state.name in ("missing", "unfinished") for _, state in found):
        return last, False
    return None


def _is_done(run: OpenRun, number: int) -> bool:
    """Whether everything of a round is there."""
    where = run.store.round(number)
    if number and not (any(where.scores("any").parent.glob("*.parquet")) and where.selection.is_file()):
        return False
    if number and not run.given.trains_rounds:
        return True
    return is_complete(where.checkpoint) and where.index.is_file()


def early_end(run: OpenRun, last: int) -> int | None:
    """Return the round up to ``last`` in which early stopping ended the run; None if it did not."""
    return next((n for n in range(last + 1) if Checkpoint(run, n).ended_early), None)
