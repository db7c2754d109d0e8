"""Options that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
