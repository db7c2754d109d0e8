"""Options that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Configuration file (YAML). Without one: the run's own, or the demo's."
    ),
]
RunOption = Annotated[str | None, typer.Option("--run", help="Name of the run: a folder below runs_dir.")]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Make anew what was made with other settings; the old is kept aside."),
]
MethodOption = Annotated[
    str | None, typer.Option("--method", "-m", help="The method; `dataflex methods` lists them.")
]
RoundOption = Annotated[int, typer.Option("--round", "-r", help="The round, from 1.")]
SettingsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the configuration.")
]
RunArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN] [KEY=VALUE]...", help="A run's name or folder, and settings."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Everything as JSON.")]
EXAMPLES = "[bold]Example[/bold]  "
