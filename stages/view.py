"""`dataflex view`: all rows of a run in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from .completion import complete_run
from .folders import run_folder
from .options import EXAMPLES, RunOption
from .words import with_run

commands = typer.Typer()


@commands.command(epilog=EXAMPLES + "dataflex view quickstart-loss")
def view(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN [runs_dir=FOLDER]",
            help="A name below runs_dir, or a folder.",
            autocompletion=complete_run,
        ),
    ] = None,
    run: RunOption = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine; a free one where it is taken, or 0.")
    ] = 5055,
) -> None:
    """Show all rows of a run in the browser: texts, scores, selections, map. Only for this machine."""
    from dataflex_pipeline.reports.joined import joined_table
    from dataflex_pipeline.reports.viewer.serve import front_end, serve
    from dataflex_pipeline.store.run import RunFolder
    from dataflex_pipeline.terminal import console
    from dataflex_pipeline.terminal.progress import progress

    fix = "Name one: `dataflex view quickstart-loss`."
    folder = run_folder(with_run(arguments or [], run), "A view", fix)
    front_end()

    def ready(address: str, taken: int) -> None:
        if taken != port and port:
            console.line(f"Port {port} is not free: {taken} is taken instead.", style="yellow")
        console.line(f"{joined.n_rows:,} rows of {folder.name}: {address}")
        console.line("Open it in a browser of this machine. Ctrl-C ends it.")

    with joined_table(RunFolder(folder), progress()) as joined:
        serve(joined, folder.name, port, ready)
