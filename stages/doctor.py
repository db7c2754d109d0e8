"""`dataflex doctor`: is this machine, and a configuration, fit to run? Reads only."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .options import EXAMPLES, ConfigOption, JsonOption, MethodOption, RunArguments, RunOption
from .subject import run_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dataflex_pipeline.checkup.findings import Finding

commands = typer.Typer()
ENVIRONMENT_CODE, CONFIGURATION_CODE = 1, 2


@commands.command(epilog=EXAMPLES + "dataflex doctor --config my-run.yaml")
def doctor(
    arguments: RunArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    json: JsonOption = False,
) -> None:
    """Check this machine and, where one is given, a configuration: what works, what does not, what to do."""
    from dataflex_pipeline.checkup.environment import environment
    from dataflex_pipeline.checkup.run import check_configuration
    from dataflex_pipeline.config.fields import Config
    from dataflex_pipeline.host_memory import check_libraries_fit
    from dataflex_pipeline.terminal.answers import print_json
    from dataflex_pipeline.terminal.checkup import draw_checkup

    from .opening import open_run

    check_libraries_fit()
    given = config is not None or bool(arguments) or run is not None or method is not None
    shown: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        opened = None
        if given:
            options = run_options(config, arguments or [], run, method, False, begins=True)
            opened = open_run(options, reads_only=True)
        findings = list(environment(Path(opened.given.runs_dir if opened is not None else Config().runs_dir)))
        if opened is not None:
            of_configuration, shown = check_configuration(opened)
            findings += of_configuration
    if json:
        print_json({"findings": [dataclasses.asdict(each) for each in findings], "example": shown})
    else:
        draw_checkup(findings, shown, given)
    _leave(findings)


def _leave(findings: Sequence[Finding]) -> None:
    """Leave with 2 for a problem of the configuration, else 1 for one of the environment."""
    from dataflex_pipeline.checkup.findings import worst

    for area, code in (("configuration", CONFIGURATION_CODE), ("environment", ENVIRONMENT_CODE)):
        if worst([each for each in findings if each.area == area]) == "problem":
            sys.exit(code)
