"""The folder of a run and its configuration, from what a command or `Run(...)` was given."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from dataflex_pipeline.config.fields import DEMO
from dataflex_pipeline.config.load import Loaded, load_config
from dataflex_pipeline.config.overrides import COMMAND_LINE
from dataflex_pipeline.errors import CorruptError, UserError
from dataflex_pipeline.methods import check_methods
from dataflex_pipeline.pipeline.device import settle_bf16
from dataflex_pipeline.pipeline.epochs import as_counted
from dataflex_pipeline.store.run import RunFolder

NAMING_KEYS = ("runs_dir", "output_dir", "dataset", "component_name")
"""Settings that the place of a run follows from."""


LONGEST_PART = 240
"""Bytes of a name in the path of a run; 255 are what file systems take, and temporary names are longer."""


@dataclass(frozen=True)
class Options:
    """The options that all commands share.

    Attributes:
        config: the configuration file.
        overrides: key=value texts.
        run: the run's name.
        method: in place of component_name.
        overwrite: make anew what other settings made.
    """

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    run: str | None = None
    method: str | None = None
    overwrite: bool = False

    @property
    def settings(self) -> list[str]:
        """The overrides, the method among them."""
        return [*self.overrides, *([] if self.method is None else [f"component_name={self.method}"])]


def locate(options: Options) -> tuple[RunFolder, Loaded]:
    """Find the run folder and load the configuration; nothing is written.

    Raises:
        ConfigError: the configuration cannot be used. CorruptError: rounds of a run without its run.yaml.
    """
    if options.config is not None:
        run = RunFolder(run_folder(load_config(options.config, options.settings), options))
        loaded = load_for(run, options)
    else:
        # Where the run is comes first: its own settings are what the other overrides lie over.
        naming = [text for text in options.settings if text.partition("=")[0].strip() in NAMING_KEYS]
        run = RunFolder(run_folder(load_config(None, naming), options))
        loaded = load_for(run, options)
    check_methods(loaded.config, loaded.config_dir)
    unused = _unused_output_dir(loaded, options, run)
    return run, replace(loaded, notices=(*loaded.notices, *unused))


def load_for(run: RunFolder, options: Options) -> Loaded:
    """Load the configuration for a run folder: its own run.yaml, where it has one, under the overrides.

    A configuration file that is given takes the place of run.yaml.

    Raises:
        ConfigError: the configuration cannot be used. CorruptError: rounds of a run without its run.yaml.
    """
    if options.config is not None:
        return _settled(load_config(options.config, options.settings), run, options)
    base = run.read()[0] if run.exists() else None
    loaded = _settled(load_config(None, options.settings, base=base), run, options)
    if base is None and run.rounds() and loaded.sources.get("dataset") != COMMAND_LINE:
        raise CorruptError(
            f"{run.settings} is not there, and {run.folder} holds rounds of a run.",
            "It records what they were made with: data, model and every setting.",
            "Put it back, give the run's configuration file, or name another run.",
        )
    return loaded


def _settled(loaded: Loaded, run: RunFolder, options: Options) -> Loaded:
    """Return a configuration with what its run, or this machine, makes of epochs and ``bf16: auto``."""
    if options.overwrite:
        return settle_bf16(loaded, None)
    return settle_bf16(as_counted(loaded, run), run)


def _unused_output_dir(loaded: Loaded, options: Options, run: RunFolder) -> list[str]:
    given = loaded.config.output_dir
    if options.run is None or given is None or Path(given) == run.folder:
        return []
    return [f"the run folder is {run.folder}, as --run {options.run} says; output_dir ({given}) is not used"]


def run_folder(loaded: Loaded, options: Options) -> Path:
    """Return the run folder (see `_named_folder`), which a system can have and a message can name.

    Raises:
        UserError: it is none, or the run's name is none.
    """
    folder = _named_folder(loaded, options)
    longest = max(len(os.fsencode(part)) for part in (*folder.parts, ""))
    if longest > LONGEST_PART or not all(map(str.isprintable, folder.parts)):
        shown = ascii(str(folder))
        raise UserError(
            f"The run's folder would be {shown if len(shown) <= 100 else shown[:100] + '...'}.",
            f"A name in it has more than {LONGEST_PART} bytes, or characters that no message can show.",
            "Name it with --run and runs_dir, or with output_dir, in letters and digits.",
        )
    return folder


def _named_folder(loaded: Loaded, options: Options) -> Path:
    """Return the run folder as it is named: output_dir, or runs_dir and the run's name.

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
