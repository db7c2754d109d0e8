"""A run at hand: its configuration, its folder, the embedded demo, and what is remembered of its files."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_pipeline import launch
from dataflex_pipeline.api import Method, Progress, Silent, Split
from dataflex_pipeline.config.components import ComponentEntry, method_parameters
from dataflex_pipeline.config.fields import DEMO, Config
from dataflex_pipeline.config.load import Loaded, dump_config
from dataflex_pipeline.errors import ConfigError, DataError, RunError, UserError
from dataflex_pipeline.home import expanded
from dataflex_pipeline.methods import configured_method
from dataflex_pipeline.pipeline.memo import Memo
from dataflex_pipeline.store.run import RunFolder, provenance

if TYPE_CHECKING:
    from dataflex_pipeline.demo import Demo


@dataclass
class OpenRun:
    """A run that is open, whether it exists already or not.

    Attributes:
        loaded: the configuration as given, with what was said about it.
        store: the run on disk.
        overwrite: make anew what other settings made.
        progress: where to report; by default nothing is said.
        said: notices of the configuration that were said already.
        reads_only: whether nothing at all may be written.
    """

    loaded: Loaded
    store: RunFolder
    overwrite: bool = False
    progress: Progress = field(default_factory=Silent)
    said: set[str] = field(default_factory=set)
    reads_only: bool = False

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.store.folder

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
        if found is not None:
            return found
        if not self.store.exists():
            raise DataError(
                f"The embedded demo is not in {root} yet.",
                "The first round makes it, and a command that only reads makes nothing.",
                "Run `dataflex warmup` (or `dataflex round N`) first, or set dataset and model_name_or_path.",
            )
        raise DataError(
            f"The embedded demo is not in {root} any more.",
            "This run was made with it, and a command that only reads does not make it again.",
            "The next `dataflex round` makes it; it is the same every time.",
        )

    @property
    def lacks_demo(self) -> bool:
        """Whether the embedded demo is not there, and is not made now either."""
        from dataflex_pipeline.demo import find_demo

        return self.reads_only and find_demo(Path(self.given.runs_dir)) is None

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
    def features(self) -> Path:
        """The folder that features are looked up in and written to: the run's own, or a shared one."""
        shared = self.given.features_dir
        return self.store.features if shared is None else expanded(shared)

    @property
    def again(self) -> str:
        """The options that name this run in another command, whatever named it in this one."""
        folder, runs = self.folder, self.given.runs_dir
        if folder.parent != Path(runs):
            return shlex.join([f"output_dir={folder}"])
        elsewhere = [] if runs == Config.model_fields["runs_dir"].default else [f"runs_dir={runs}"]
        return shlex.join(["--run", folder.name, *elsewhere])

    @cached_property
    def memo(self) -> Memo:
        """What this run knows of its sources and its model from the last time."""
        return Memo(self.folder / "sources.json")

    @cached_property
    def record(self) -> dict[str, Any]:
        """What run.yaml keeps beside the configuration: the frozen global batch and the provenance."""
        if self.store.exists():
            return self.store.read()[1]
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
        """Return a method with its parameters checked, and its entry; what there is to note is said once."""
        method, entry = configured_method(self.given, name, self.loaded.config_dir)
        for notice in entry.notices:
            if notice not in self.said:
                self.said.add(notice)
                self.progress.say(f"note: {notice}")
        return method, entry

    def check_round(self, number: int) -> None:
        """Refuse a round outside the horizon."""
        last = self.given.last_round
        if number > 1 and not self.given.trains_rounds:
            raise RunError(
                f"Round {number} was asked for; update_step is {self.given.update_step}, update_times "
                f"{self.given.update_times}.",
                "Nothing is trained on what round 1 selects: a second round would score with the same model.",
                "Ask for round 1, or start another run with update_step and update_times above 0.",
            )
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

        A mistake found before a run has begun leaves nothing behind, not even the folders above it. A setting
        that cannot be used is not kept in run.yaml, unless something was made with the settings by then.
        """
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            with self.store.lock():
                begins = bool(missing)
                settings, made = self.store.settings_text(), self.store.made(begins=begins)
                try:
                    yield
                    self.memo.save()
                except UserError as error:
                    if isinstance(error, ConfigError) and self.store.made(begins=begins) == made:
                        self.store.take_back(settings)
                    if missing and not self.store.exists():
                        shutil.rmtree(self.folder)
                    raise
        except UserError:
            for path in missing:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
            raise
        finally:
            self.progress.finish()

    def forget(self) -> None:
        """Forget what was read of the configuration and the run's files; it is read again when needed."""
        for name in [
            key for key in self.__dict__ if isinstance(getattr(type(self), key, None), cached_property)
        ]:
            del self.__dict__[name]

    def save_settings(self) -> None:
        """Write run.yaml: the configuration as given, replayable, with the record beside it."""
        self.store.write(dump_config(self.given), self.record)


def require_run(run: OpenRun) -> None:
    """Refuse a command that needs a run that was never started."""
    if not run.store.exists():
        raise RunError(
            f"There is no run at {run.folder}.",
            "This command goes on from a warm-up, and nothing was run there yet.",
            "Run `dataflex warmup` (or `dataflex round N`) first, or name another run.",
        )
