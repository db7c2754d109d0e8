"""The run as an object: the front door of the library.

    from dataflex_pipeline import Run

    run = Run("runs/mine", dataset="pool.jsonl", eval_dataset="target.jsonl", model_name_or_path="./model")
    run.warmup()
    scores = run.score(1, "less")
    chosen = run.select(1, "less", fraction=0.1)
    run.train(1)

Each call does what the command of that name does, finds the same mistakes, and leaves the same files: what is
there already and was made from the same settings is kept. Nothing is printed; errors are exceptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from dataflex_pipeline import launch
from dataflex_pipeline.api import Progress, Silent
from dataflex_pipeline.config.load import QUICKSTART
from dataflex_pipeline.errors import RunError
from dataflex_pipeline.evaluation.figures import Figure
from dataflex_pipeline.export.conversations import Trainer
from dataflex_pipeline.home import expanded
from dataflex_pipeline.pipeline.calls import CalledRun
from dataflex_pipeline.pipeline.damage import set_aside_damaged_tables
from dataflex_pipeline.pipeline.device import say_device
from dataflex_pipeline.pipeline.evaluate import Wanted, evaluate
from dataflex_pipeline.pipeline.export import (
    Asked,
    What,
    export,
    export_rows,
    is_file_of_rows,
)
from dataflex_pipeline.pipeline.index import Index
from dataflex_pipeline.pipeline.keywords import as_overrides, whole_round
from dataflex_pipeline.pipeline.locate import Options
from dataflex_pipeline.pipeline.open_run import require_run
from dataflex_pipeline.pipeline.output import Output
from dataflex_pipeline.pipeline.outputs import (
    all_outputs,
    check_before_start,
    early_end,
    make_part,
    make_up_to,
)
from dataflex_pipeline.pipeline.pick import NOTHING_TRAINED, pick
from dataflex_pipeline.pipeline.row import RowStory, row_story
from dataflex_pipeline.pipeline.row_search import Found, find_text
from dataflex_pipeline.pipeline.score import Scores, scores_of
from dataflex_pipeline.pipeline.score_together import share_passes
from dataflex_pipeline.pipeline.select import Selection
from dataflex_pipeline.pipeline.table import Table
from dataflex_pipeline.pipeline.train import Checkpoint
from dataflex_pipeline.pipeline.versions import say_versions
from dataflex_pipeline.store.stale import is_complete


class Run(CalledRun):
    """A run: one folder, one configuration, rounds of scoring, selecting and training.

    Args:
        folder: the run's folder; without one it is named after data and method, below ``runs_dir``.
        config: a YAML file, as ``--config`` takes it.
        progress: told how far long work is, and every notice; by default nobody is.
        overwrite: make anew what other settings made; the old is kept beside it.
        settings: keys of the configuration; those of a method as ``loss={"focus": "low"}``.

    Attributes:
        outcomes: what the last call was asked for, done or up to date.
        notices: what the configuration has to say.

    Raises:
        ConfigError: a setting is unknown or cannot be used.
        RunError: several processes were started; commands run in several, this object in one.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        config: str | Path | None = None,
        progress: Progress | None = None,
        overwrite: bool = False,
        **settings: Any,
    ) -> None:
        launch.check_environment()
        if launch.world_size() > 1 and launch.current() is None:
            raise RunError(
                f"A Run was made in one of {launch.world_size()} processes of a launch.",
                "Each of them would do all the work, in the same folder.",
                "Start plain python; for several processes use the commands: torchrun ... -m -- "
                "dataflex_pipeline round 2.",
            )
        place = None if folder is None else expanded(folder)
        named = dict(as_overrides(settings))
        if place is not None:
            named |= dict(as_overrides({"runs_dir": place.parent}))
        options = Options(
            None if config is None else Path(config),
            tuple(named.values()),
            None if place is None else place.name,
            overwrite=overwrite,
        )
        self._open(options, progress or Silent())

    @classmethod
    def of(cls, options: Options, progress: Progress, *, reads_only: bool = False) -> Self:
        """Return the run that a command's options name."""
        run = cls.__new__(cls)
        run._open(options, progress, reads_only=reads_only)
        return run

    @classmethod
    def open(cls, folder: str | Path, *, progress: Progress | None = None) -> Self:
        """Return a run that exists, to read it or to go on with it.

        Raises:
            RunError: there is none.
        """
        run = cls(folder, progress=progress)
        require_run(run)
        return run

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def notices(self) -> tuple[str, ...]:
        """What the configuration has to say: keys that stand for others, files that were taken instead."""
        return self.loaded.notices

    def warmup(self, **settings: Any) -> Checkpoint | None:
        """Prepare the data, draw uniformly and train round 0.

        Returns:
            Its checkpoint; None with ``warmup_step: 0``, where round 0 is the model as it is given.

        Raises:
            UserError: data, model or settings cannot be used; nothing is written then.
        """
        return self.round(0, **settings)

    def round(self, last: int | None = None, **settings: Any) -> Checkpoint | None:
        """Do whatever is missing up to a round: prepare, warm up, then score, select and train each round.

        Args:
            last: the round; by default the last of the horizon.
            settings: keys of the configuration, from now on.

        Returns:
            The checkpoint of the last round that was trained: an earlier one after an early stop; None where
            nothing was trained.

        Raises:
            UserError: data, model or settings cannot be used, or an output was made from other settings.
        """
        with self._call(settings):
            last = self.given.last_round if last is None else whole_round(last)
            self.check_round(last)
            say_versions(self)
            say_device(self)
            sources = check_before_start(self, last)
            with self.writing():
                if self.overwrite:
                    for number in range(last + 1):
                        set_aside_damaged_tables(self, number)
                self.outcomes = make_up_to(self, last, sources)
            ended = early_end(self, last)
            if not (last or self.given.warmup_step):
                self.progress.say("warmup_step: 0: round 0 is the model as it is given; nothing is trained.")
            checkpoint = Checkpoint(self, last if ended is None else ended)
            return checkpoint if is_complete(checkpoint.path) else None

    def score(self, number: int, method: str | None = None, **settings: Any) -> Table:
        """Score every row of the pool with the model of the round before.

        Args:
            number: the round, from 1.
            method: the method's name; by default the configured one.
            settings: keys of the configuration, from now on.

        Returns:
            The score table; its ``summary`` says how many rows have a score, and the spread.

        Raises:
            RunError: the round before is not trained.
        """
        with self._call(settings):
            tables = scores_of(self, whole_round(number), method or self.given.component_name)
            self.outcomes = make_part(self, number, tables)
            scores = tables[-1]
            return Table(scores.path, scores.describe(), by="score")

    def score_together(self, number: int, methods: Sequence[str], **settings: Any) -> dict[str, Table]:
        """Score a round with several methods; those that need the same gradients share a pass over the pool.

        Args:
            number: the round, from 1. methods: their names.
            settings: keys of the configuration, from now on.

        Returns:
            The score table of each, the same as one by one.

        Raises:
            RunError: the round before is not trained.
        """
        with self._call(settings):
            every = (one for method in methods for one in scores_of(self, whole_round(number), method))
            tables = {scores.method: scores for scores in every}
            alone = [each for each in tables.values() if self.given.candidates_of(each.method) is None]
            for table in tables.values():
                table.before_features = lambda: share_passes(self, [each.plan for each in alone])
            self.outcomes = make_part(self, number, list(tables.values()))
            return {name: Table(each.path, each.describe(), by="score") for name, each in tables.items()}

    def select(
        self, number: int, method: str | None = None, *, name: str | None = None, **settings: Any
    ) -> Table:
        """Choose the rows of a round from its scores, best first; where rounds are trained, lay them out too.

        What was selected before with other settings is replaced as long as nothing was trained on it.

        Args:
            number: the round, from 1.
            method: whose scores; by default the configured method.
            name: try it beside the round's own selection, under this name; nothing is trained on it.
            settings: keys of the configuration, such as ``fraction`` or ``strategy``; from now on, but for a
                selection with a name.

        Returns:
            The selection: exactly the rows that were asked for, in order of rank.

        Raises:
            RunError: the round is not scored by that method.
            StaleError: the round is trained on another selection.
        """
        with self._call(settings, passing=name is not None):
            scores = Scores(self, whole_round(number), method or self.given.component_name)
            selection = Selection(scores, name, replace=True)
            index = [Index(selection)] if name is None and self.given.trains_rounds else []
            self.outcomes = make_part(self, number, [selection, *index], keeps=name is None)
            return Table(selection.path, selection.describe(), by="score")

    def pick(
        self,
        method: str | None = None,
        to: str | Path | None = None,
        *,
        trainer: Trainer = "original",
        **settings: Any,
    ) -> Table:
        """Choose the best rows and write them to a file: prepare, score, select and export round 1.

        Nothing is trained, unless ``warmup_step`` or ``update_times`` is given for it. Another selection than
        the last call's replaces that one; the scores are kept.

        Args:
            method: the method's name; by default the configured one.
            to: the file, which ends in .jsonl; by default selected.jsonl in the run, replaced each time.
            trainer: the form of the rows, as for `export`.
            settings: keys of the configuration, such as ``fraction``, from now on.

        Returns:
            The selection: exactly the rows that were asked for, in order of rank.

        Raises:
            UserError: data, model or settings cannot be used; nothing is written then.
        """
        unsaid = (
            {} if self.store.exists() else {k: v for k, v in NOTHING_TRAINED.items() if not self._says(k)}
        )
        with self._call(unsaid | settings):
            name = method or self.given.component_name
            place = None if to is None else expanded(to)
            selection, self.outcomes = pick(self, name, place, trainer)
        return Table(selection.path, selection.describe(), by="score")

    def _says(self, key: str) -> bool:
        """Whether a setting was given, in a file or to a call."""
        return self.loaded.sources.get(key) not in (None, "default", QUICKSTART)

    def train(self, number: int, **settings: Any) -> Checkpoint:
        """Train a round on its index, going on from the round before.

        Raises:
            RunError: the round has no index, or the round before is not trained.
        """
        with self._call(settings):
            checkpoint = Checkpoint(self, whole_round(number))
            self.outcomes = make_part(self, number, [checkpoint])
            return checkpoint

    def evaluate(
        self,
        number: int | Literal["base"] | None = None,
        metrics: str | Sequence[str] = (),
        *,
        judge: bool = False,
        max_new_tokens: int = 512,
        generator: str = "auto",
        tasks: Sequence[str] = (),
        include_path: str | Path | None = None,
        limit: int | None = None,
    ) -> list[Figure]:
        """Evaluate the model of a round.

        Args:
            number: the round; by default the last finished one; "base" for the model before any training.
            metrics: of generated answers, beside the loss: exact_match, f1, rouge_l, ...
            judge: grade the answers with the reward backend set for nice.
            max_new_tokens: longest answer.
            generator: auto, vllm or transformers.
            tasks: of the lm-evaluation-harness.
            include_path: folder of task files of your own.
            limit: documents of each task; None for all.

        Returns:
            All figures of that round or model, earlier ones included.

        Raises:
            UserError: no such round is finished, or there are no rows to evaluate on.
        """
        names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        place = None if include_path is None else Path(include_path)
        wanted = Wanted(names, judge, max_new_tokens, generator, tuple(tasks), place, limit)
        with self._call({}):
            chosen = number if number is None or number == "base" else whole_round(number)
            _, _, figures = evaluate(self, chosen, wanted)
            return figures

    def export(
        self,
        to: str | Path | None = None,
        *,
        what: What | None = None,
        round: int | None = None,
        rows_of: int | None = None,
        selection: str | None = None,
        warm_up: bool = False,
        trainer: Trainer = "original",
        hub: str | None = None,
        public: bool = False,
    ) -> Path:
        """Write the selected rows, or a model that needs nothing of the run.

        Args:
            to: a file ending in .jsonl: selected rows, one line each, best first. Else the folder for model,
                adapter and rows; by default export/ in the run.
            what: of a folder: all (the default; with ``selection`` data), model, adapter or data.
            round: whose rows, or whose checkpoint; by default the last selected, or the best or last one.
            rows_of: of a folder with a model: the only round whose rows it has.
            selection: name of a selection beside the round's own; of rows alone.
            warm_up: add the rows of the warm-up, without scores.
            trainer: the form of the rows: original (as they came), messages (TRL, axolotl), llama-factory or
                ms-swift.
            hub: of a folder: the repository to upload it to.
            public: with ``hub``: for everybody to see.

        Returns:
            The file or folder; of rows in several formats the first file (``outcomes`` has all of them).

        Raises:
            UserError: there is nothing to export, or something else is there already.
        """
        place = None if to is None else expanded(to)
        number = None if round is None else whole_round(round)
        of_folder = what not in (None, "data") or rows_of is not None or hub is not None or public
        if place is not None and is_file_of_rows(place, of_folder):
            with self._call({}):
                self.outcomes = export_rows(
                    self, place, Asked("data", number, None, selection, warm_up, trainer)
                )
                return self.outcomes[0].output
        what = what or ("all" if selection is None else "data")
        asked = Asked(what, number, rows_of, selection, warm_up, trainer, hub, public, place)
        with self._call({}):
            done = export(self, asked)
            self.outcomes = list(done.outcomes)
            return done.bundle.folder

    def row(self, row: int | str, gradients: bool = False) -> RowStory:
        """Return all that the run knows of one row of the pool; see ``dataflex inspect RUN --row N``.

        Args:
            row: its number, or the beginning of its row_id.
            gradients: take the gradients of scores without a projection anew, which needs the model, and
                name the target rows that agree most.

        Returns:
            Where it came from, its conversation, its scores and ranks, the target rows that it is like, and
            where it was selected.

        Raises:
            RunError: the pool is not prepared.
            UserError: there is no such row, or several rows have such a row_id.
        """
        with self._call({}):
            return row_story(self, row, gradients)

    def find(self, text: str) -> Found:
        """Return the rows of the pool that hold a text, capitals or not, in their turns or text columns.

        Raises:
            RunError: the pool is not prepared.
            UserError: no row holds it.
        """
        with self._call({}):
            return find_text(self, text)

    def outputs(self) -> list[Output]:
        """Return every output of the run in order; ``state()`` says whether it is done, stale or missing."""
        with self._call({}):
            return list(all_outputs(self))

    def plot_losses(self) -> Any:
        """Return training and target loss over the steps as a chart, an object of Vega-Altair.

        Raises:
            RunError: no round is finished.
        """
        from dataflex_pipeline.reports.displays import loss_curves
        from dataflex_pipeline.reports.records import RunRecord

        return loss_curves(RunRecord.read(self.folder))

    def _repr_html_(self) -> str:
        """Return its outputs with their states, and what to do next, for a notebook."""
        from dataflex_pipeline.reports.displays import run_html, safely

        def show() -> str:
            with self._call({}):
                return run_html(self)

        return safely(show)
