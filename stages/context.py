"""What every command begins with: the configuration, the run folder, the prepared data."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline import launch
from dataflex_pipeline.api import Method, Progress, Split
from dataflex_pipeline.config.components import ComponentEntry, method_parameters
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.config.load import Loaded, dump_config, load_config
from dataflex_pipeline.config.overrides import COMMAND_LINE
from dataflex_pipeline.errors import CorruptError, DataError, RunError, UserError
from dataflex_pipeline.methods import check_methods, configured_method
from dataflex_pipeline.sampling.imported import Imported
from dataflex_pipeline.store.run import RunFolder, provenance

from . import console
from .libraries import quieten
from .memo import Memo
from .progress import progress

if TYPE_CHECKING:
    from dataflex_pipeline.demo import Demo

DEMO = "demo"
NAMING_KEYS = ("runs_dir", "output_dir", "dataset", "component_name")
"""Settings that the place of a run follows from."""


@dataclass(frozen=True)
class Options:
    """The options that all commands share.

    Attributes:
        config: the configuration file. overrides: key=value pairs. run: the run's name.
        method: over component_name. overwrite: make anew what other settings made.
    """

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    run: str | None = None
    method: str | None = None
    overwrite: bool = False


@dataclass
class Context:
    """One command at work on one run.

    Attributes:
        loaded: the configuration as given, with what was said about it.
        run: the run folder. overwrite: see Options.
        progress: where to report. said: notices that were shown already.
        reads_only: whether nothing at all may be written.
    """

    loaded: Loaded
    run: RunFolder
    overwrite: bool = False
    progress: Progress = field(default_factory=progress)
    said: set[str] = field(default_factory=set)
    reads_only: bool = False

    @property
    def given(self) -> Config:
        """The configuration as given: demo is still called demo."""
        return self.loaded.config

    @cached_property
    def demo(self) -> Demo:
        """The embedded demo, made now if it is not there (a command that only reads makes nothing)."""
        from dataflex_pipeline.demo import ensure_demo, find_demo

        root = Path(self.given.runs_dir)
        if not self.reads_only:
            return ensure_demo(root, self.progress.say)
        found = find_demo(root)
        if found is None:
            raise DataError(
                f"The embedded demo is not in {root} any more.",
                "This run was made with it, and a command that only reads does not make it again.",
                "The next `dataflex round` makes it; it is the same every time.",
            )
        return found

    @cached_property
    def config(self) -> Config:
        """The configuration with the demo's files in place of the word demo."""
        files = {
            "model_name_or_path": "model",
            "dataset": "pool",
            "eval_dataset": "target",
            "test_dataset": "test",
        }
        named = [key for key in files if getattr(self.given, key) == DEMO]
        return self.given.model_copy(update={key: str(getattr(self.demo, files[key])) for key in named})

    @property
    def again(self) -> str:
        """The options that name this run in another command, whatever named it in this one."""
        folder, runs = self.run.folder, self.given.runs_dir
        if folder.parent != Path(runs):
            return shlex.join([f"output_dir={folder}"])
        elsewhere = [] if runs == Config.model_fields["runs_dir"].default else [f"runs_dir={runs}"]
        return shlex.join(["--run", folder.name, *elsewhere])

    @cached_property
    def memo(self) -> Memo:
        """What this run knows of its sources and its model from the last time."""
        return Memo(self.run.folder / "sources.json")

    @cached_property
    def record(self) -> dict[str, Any]:
        """What run.yaml keeps beside the configuration: the frozen global batch and the provenance."""
        if self.run.exists():
            return self.run.read()[1]
        return {"global_batch": self._configured_batch(), **provenance()}

    def _configured_batch(self) -> int:
        config = self.given
        return config.per_device_train_batch_size * config.gradient_accumulation_steps * launch.world_size()

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step, frozen when the run began."""
        return int(self.record["global_batch"])

    def is_demo(self, split: Split) -> bool:
        """Whether the rows of a split are the embedded demo's."""
        return self._named(self._taken_from(split)) == DEMO

    def _taken_from(self, split: Split) -> Split:
        """Return the split whose files a split's rows come from: the target may be the pool's first rows."""
        return "pool" if split == "target" and self.given.target_head is not None else split

    def _named(self, split: Split) -> str | None:
        given = self.given
        return {"pool": given.dataset, "target": given.eval_dataset, "test": given.test_dataset}[split]

    def datasets(self, split: Split) -> tuple[str, ...]:
        """Return the data sets of a split, as a tuple of names; none where nothing is configured."""
        split = self._taken_from(split)
        names = self._named(split)
        if names == DEMO:
            return (str({"pool": self.demo.pool, "target": self.demo.target, "test": self.demo.test}[split]),)
        return tuple(name.strip() for name in (names or "").split(",") if name.strip())

    def entry(self, name: str) -> ComponentEntry:
        """Return the configured entry of a method."""
        return method_parameters(self.given, name, self.loaded.config_dir)

    def method(self, name: str) -> tuple[Method, ComponentEntry]:
        """Return a method with its parameters checked, and its entry.

        Where its probabilities are imported from a file, `Imported` stands in for it.
        """
        method, entry = configured_method(self.given, name, self.loaded.config_dir)
        for notice in entry.notices:
            if notice not in self.said:
                self.said.add(notice)
                self.progress.say(f"note: {notice}")
        if method.probabilities_from is not None:
            return Imported(method.probabilities_from, method.probabilities_to), entry
        return method, entry

    def check_round(self, number: int) -> None:
        """Refuse a round outside the horizon."""
        last = self.given.update_times
        if number < 0 or number > last:
            raise RunError(
                f"Round {number} was asked for; update_times is {last}.",
                f"The run's horizon is the warm-up (round 0) and {last} rounds: the learning-rate schedule "
                f"reaches its end there, at step {self.given.horizon}.",
                f"Ask for a round from 0 to {last}, or start another run with a larger update_times.",
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Own the run for writing; what was read of the sources is remembered at the end.

        A mistake found before a run has begun leaves nothing behind, not even the folders above it.
        """
        missing = [path for path in (self.run.folder, *self.run.folder.parents) if not path.exists()]
        try:
            with self.run.lock():
                try:
                    yield
                    self.memo.save()
                except UserError:
                    if missing and not self.run.exists():
                        shutil.rmtree(self.run.folder)
                    raise
        except UserError:
            for path in missing:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
            raise
        finally:
            self.progress.finish()

    def save_settings(self) -> None:
        """Write run.yaml: the configuration as given, replayable, with the record beside it."""
        self.run.write(dump_config(self.given), self.record)


def open_context(options: Options, quiet: Progress | None = None) -> Context:
    """Load the configuration and find the run folder; nothing is written.

    The configuration of an existing run is its own run.yaml, under the overrides given now; a
    configuration file given now takes its place.

    Args:
        options: of the command.
        quiet: for a command that only reads: where to report instead of the console.
    """
    quieten()
    overrides = list(options.overrides)
    if options.method is not None:
        overrides.append(f"component_name={options.method}")
    if options.config is not None:
        loaded = load_config(options.config, overrides)
        run = RunFolder(run_folder(loaded, options))
    else:
        # Where the run is comes first: its own settings are what the other overrides lie over.
        naming = [text for text in overrides if text.partition("=")[0].strip() in NAMING_KEYS]
        run = RunFolder(run_folder(load_config(None, naming), options))
        base = run.read()[0] if run.exists() else None
        loaded = load_config(None, overrides, base=base)
        if base is None and run.round(0).folder.exists() and loaded.sources.get("dataset") != COMMAND_LINE:
            raise CorruptError(
                f"{run.settings} is not there, and {run.folder} holds rounds of a run.",
                "It records what they were made with: data, model and every setting.",
                "Put it back, give the run's configuration (--config), or name another run (--run NAME).",
            )
    check_methods(loaded.config, loaded.config_dir)
    notices = [*loaded.notices, *_unused_output_dir(loaded, options, run)]
    for notice in notices:
        console.line(f"note: {notice}", style="yellow")
    reads_only = quiet is not None
    return Context(loaded, run, options.overwrite, progress=quiet or progress(), reads_only=reads_only)


def _unused_output_dir(loaded: Loaded, options: Options, run: RunFolder) -> list[str]:
    given = loaded.config.output_dir
    if options.run is None or given is None or Path(given) == run.folder:
        return []
    return [f"the run folder is {run.folder}, as --run {options.run} says; output_dir ({given}) is not used"]


def run_folder(loaded: Loaded, options: Options) -> Path:
    """Return the run folder: output_dir, or runs_dir and the run's name.

    The run.yaml of a run stands for that run, unless another place is given on the command line.
    Without ``--run`` the name is <what>-<method>: what is the configuration file's name, ``quickstart``
    without one, or the first data set's name when ``dataset=`` was given on the command line.
    """
    config = loaded.config
    if options.run is not None:
        if not options.run or Path(options.run).name != options.run or options.run.startswith("."):
            raise UserError(
                f"--run is '{options.run}'.",
                "A run's name is the name of a folder below runs_dir, without slashes or a leading dot.",
                "Use a plain name such as --run trial-1, and runs_dir=FOLDER for the place.",
            )
        return Path(config.runs_dir) / options.run
    if loaded.run_folder is not None and loaded.sources["output_dir"] != COMMAND_LINE:
        named = Path(config.runs_dir) / loaded.run_folder.name
        moved = loaded.sources["runs_dir"] == COMMAND_LINE
        return named if moved or named.resolve() == loaded.run_folder else loaded.run_folder
    if config.output_dir is not None:
        return Path(config.output_dir)
    if loaded.sources.get("dataset") == COMMAND_LINE and config.dataset != DEMO:
        what = Path(config.dataset.split(",")[0].strip()).stem
    else:
        what = options.config.stem if options.config is not None else "quickstart"
    return Path(config.runs_dir) / f"{what}-{config.component_name}"


def require_run(context: Context) -> None:
    """Refuse a command that needs a run that was never started."""
    if not context.run.exists():
        raise RunError(
            f"There is no run at {context.run.folder}.",
            "This command goes on from a warm-up, and nothing was run there yet.",
            "Run `dataflex warmup` (or `dataflex round N`) first, or name another run with --run.",
        )


def parse_assignments(arguments: Sequence[str]) -> tuple[str, ...]:
    """Check that the free arguments of a command are key=value pairs."""
    for argument in arguments:
        if "=" not in argument:
            raise UserError(
                f"The argument '{argument}' is not understood.",
                "Settings are given as key=value, for example learning_rate=1e-4.",
                "Write key=value, or see --help for the options of this command.",
            )
    return tuple(arguments)
