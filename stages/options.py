"""Options that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dataflex_pipeline.errors import UserError

from .completion import complete_argument, complete_method, complete_run

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Configuration file (YAML). Without one: the run's own, or the demo's."
    ),
]
RunOption = Annotated[
    str | None,
    typer.Option("--run", help="Name of the run: a folder below runs_dir.", autocompletion=complete_run),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Make anew what was made with other settings; the old is kept aside."),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        "-m",
        help="The method; `dataflex methods` lists them.",
        autocompletion=complete_method,
    ),
]
TrainerOption = Annotated[
    Literal["original", "messages", "trl", "axolotl", "llama-factory", "ms-swift"],
    typer.Option("--for", help="Rows in the form of a trainer; else in the format that they came in."),
]
RoundOption = Annotated[int, typer.Option("--round", "-r", help="The round, from 1.")]
RunArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN] [KEY=VALUE]...",
        help="A run's name or folder, and settings over the configuration.",
        autocompletion=complete_argument,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Everything as JSON.")]
EXAMPLES = "[bold]Example[/bold]  "


def round_or_base(given: str | None) -> int | Literal["base"] | None:
    """Return what --round of a command on a model names: a round, or the base model.

    Raises:
        UserError: it is neither.
    """
    if given is None or given == "base":
        return "base" if given else None
    if not given.isascii() or not given.isdigit():
        raise UserError(
            f"--round is '{given}'.",
            "It is a whole number (0 is the warm-up), or base: the model before any training.",
            "Give for example --round 1 or --round base.",
        )
    return int(given)
