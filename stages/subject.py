"""The run that a command names as its first word, or with --run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_pipeline.errors import UserError

from .words import split_subject, with_run

if TYPE_CHECKING:
    from dataflex_pipeline.pipeline.locate import Options


def run_options(
    config: Path | None,
    arguments: Sequence[str],
    run: str | None,
    method: str | None,
    overwrite: bool,
    *,
    begins: bool = False,
    rounds: bool = False,
) -> Options:
    """Return the options of a command whose first word may be a run: its name, or its folder.

    Args:
        config, run, method, overwrite: as they were given.
        arguments: the words without a dash.
        begins: whether the command can begin a run; the first word then has to be one that is there, so that
            a slip of the pen begins none.
        rounds: whether it takes a round among them, which the refusal of a word then speaks of.

    Raises:
        UserError: the run is named twice, or is none.
    """
    from dataflex_pipeline.pipeline.locate import Options

    named, settings = split_subject(with_run(arguments, run, names=False))
    if named is not None:
        if begins and not is_run(named, settings):
            raise _not_understood(named, rounds)
        if Path(named).is_dir():
            settings.append(f"output_dir={named}")
        else:
            run = named
    return Options(config, tuple(settings), run, method, overwrite)


def is_run(named: str, settings: Sequence[str]) -> bool:
    """Return whether there is a run of that name, or in that folder."""
    from dataflex_pipeline.config.load import load_config

    naming = [text for text in settings if text.partition("=")[0].strip() == "runs_dir"]
    below = Path(load_config(None, naming).config.runs_dir) / named
    return any((folder / "run.yaml").is_file() for folder in (Path(named), below))


def _not_understood(named: str, rounds: bool) -> UserError:
    round_said = "A round is a whole number: 0 is the warm-up, then 1, 2, ... " if rounds else ""
    return UserError(
        f"The argument '{named}' is not understood.",
        f"{round_said}It is neither a run that is there (a name or a folder) nor a setting, such as "
        "learning_rate=1e-4.",
        f"Write {'the number, or ' if rounds else ''}key=value; to begin a run of that name: --run {named}.",
    )
