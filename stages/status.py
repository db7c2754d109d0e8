"""`dataflex status`: what of a run is done, stale or missing. Reads only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from .options import EXAMPLES, ConfigOption, JsonOption, MethodOption, RunArguments, RunOption
from .subject import run_options

if TYPE_CHECKING:
    from dataflex_pipeline.pipeline.output import Output, State
    from dataflex_pipeline.pipeline.run import Run

commands = typer.Typer()
COLUMNS = ("output", "state", "what")


@commands.command(epilog=EXAMPLES + "dataflex status --run quickstart-loss")
def status(
    arguments: RunArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    json: JsonOption = False,
) -> None:
    """Show what of a run is done, stale or missing."""
    from dataflex_pipeline.pipeline.open_run import require_run
    from dataflex_pipeline.pipeline.outputs import changed_settings, states
    from dataflex_pipeline.pipeline.versions import versions_said
    from dataflex_pipeline.terminal import console
    from dataflex_pipeline.terminal.answers import print_json

    from .opening import open_run

    with console.messages_to_stderr(json):
        opened = open_run(run_options(config, arguments or [], run, method, False), reads_only=True)
    require_run(opened)
    found = states(opened)
    rows = [(output.label, state.name, state.what) for output, state in found]
    changed, command = changed_settings(opened), _next_command(opened, found)
    if json:
        content = {
            "run": str(opened.folder),
            "outputs": [dict(zip(COLUMNS, row, strict=True)) for row in rows],
            "changed_settings": changed,
            "versions": versions_said(opened),
            "next": command,
        }
        print_json(content)
        return
    console.print_table(f"Run {opened.folder}", COLUMNS, rows, wraps="what")
    for line in versions_said(opened):
        console.line(line)
    if changed is not None:
        console.line(changed, style="yellow")
    console.line(f"Next:  {command}" if command is not None else _ending(opened, found))


def _next_command(run: Run, found: list[tuple[Output, State]]) -> str | None:
    """Return the command that goes on with the run, or repairs it; None where it has ended."""
    from dataflex_pipeline.pipeline.outputs import next_round

    following = next_round(run, found)
    if following is None:
        return None
    number, overwrite = following
    return f"dataflex round {number} {run.again}" + (" --overwrite" if overwrite else "")


def _ending(run: Run, found: list[tuple[Output, State]]) -> str:
    from dataflex_pipeline.pipeline.outputs import early_end

    number = early_end(run, run.given.last_round)
    if any(state.name not in ("done", "missing") for _, state in found):
        return "Set the old settings or files again, or make it anew with --overwrite."
    if number is None:
        return "The run is at its horizon." if run.given.trains_rounds else "The run is selected."
    return f"The run ended in round {number} by early stopping."
