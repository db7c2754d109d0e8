"""`dataflex status`: what of a run is done, stale or missing. Reads only."""

from __future__ import annotations

import json

from dataflex_pipeline.pipeline.locate import Options
from dataflex_pipeline.pipeline.open_run import require_run
from dataflex_pipeline.pipeline.output import Output, State
from dataflex_pipeline.pipeline.outputs import changed_settings, early_end, next_round, states
from dataflex_pipeline.pipeline.run import Run
from dataflex_pipeline.pipeline.versions import versions_said

from . import console
from .opening import open_run

COLUMNS = ("output", "state", "what")


def status(options: Options, as_json: bool = False) -> None:
    """Print one line per output of the run, or all of it as JSON.

    done; unfinished (the next command goes on with it); stale, with the changed settings; damaged;
    missing; or unknown, where what it was made from cannot be looked at.
    """
    with console.messages_to_stderr(as_json):
        run = open_run(options, reads_only=True)
    require_run(run)
    found = states(run)
    rows = [(output.label, state.name, state.what) for output, state in found]
    changed, command = changed_settings(run), _next_command(run, found)
    if as_json:
        content = {
            "run": str(run.folder),
            "outputs": [dict(zip(COLUMNS, row, strict=True)) for row in rows],
            "changed_settings": changed,
            "versions": versions_said(run),
            "next": command,
        }
        console.out.file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return
    console.print_table(f"Run {run.folder}", COLUMNS, rows, wraps="what")
    for line in versions_said(run):
        console.line(line)
    if changed is not None:
        console.line(changed, style="yellow")
    console.line(f"Next:  {command}" if command is not None else _ending(run))


def _next_command(run: Run, found: list[tuple[Output, State]]) -> str | None:
    """Return the command that goes on with the run, or repairs it; None where it has ended."""
    following = next_round(run, found)
    if following is None:
        return None
    number, overwrite = following
    return f"dataflex round {number} {run.again}" + (" --overwrite" if overwrite else "")


def _ending(run: Run) -> str:
    number = early_end(run, run.given.update_times)
    if number is None:
        return "The run is at its horizon."
    return f"The run ended in round {number} by early stopping."
