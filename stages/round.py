"""`dataflex round N`: whatever is missing up to a round, in order."""

from __future__ import annotations

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.pipeline.locate import Options

from .opening import open_run
from .summary import after_round, report


def round_(options: Options, number: int | None) -> None:
    """Do whatever is missing up to a round; None for the last of the horizon."""
    run = open_run(options)
    last = run.given.update_times if number is None else number
    run.round(last)
    report(run.folder, run.outcomes, after_round(run, last))


def parse_round(arguments: list[str]) -> tuple[int | None, list[str]]:
    """Split ``[N] key=value ...`` into the round number and the assignments."""
    if arguments and "=" not in arguments[0]:
        try:
            return int(arguments[0]), arguments[1:]
        except ValueError as error:
            raise UserError(
                f"The round is given as '{arguments[0]}'.",
                "A round is a whole number: 0 is the warm-up, then 1, 2, ...",
                "Write for example `dataflex round 2`; settings are given as key=value.",
            ) from error
    return None, arguments
