"""`dataflex export`: model, adapter, selected rows and a card, for use elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import (
    EXAMPLES,
    ConfigOption,
    MethodOption,
    OverwriteOption,
    RunArguments,
    RunOption,
    TrainerOption,
)
from .subject import run_options

commands = typer.Typer()


@commands.command(
    epilog=EXAMPLES + "dataflex export quickstart-loss --to selected.jsonl\n\n"
    "dataflex export quickstart-loss export_dir=my-model\n\n"
    "dataflex export --config merge.yaml"
)
def export(
    arguments: RunArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    what: Annotated[
        Literal["all", "model", "adapter", "data"] | None,
        typer.Option(help="The merged model, the adapter, the selected rows, or all of it."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            help="A file ending in .jsonl, for the rows alone; or a folder, in place of export_dir."
        ),
    ] = None,
    round_number: Annotated[
        int | None,
        typer.Option("--round", "-r", help="Whose rows or checkpoint; by default the last or the best."),
    ] = None,
    rows_of_round: Annotated[
        int | None, typer.Option(help="With a model: only this round's rows, not all up to the checkpoint.")
    ] = None,
    selection: Annotated[str | None, typer.Option(metavar="NAME", help="Rows of this selection.")] = None,
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="Add the warm-up's rows, which have no scores.")
    ] = False,
    trainer: TrainerOption = "original",
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Upload it to this repository, privately.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub: for all to see.")] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Write the selected rows, merged weights, the adapter and a card, which need nothing of the run."""
    from .exported import next_steps
    from .opening import open_run
    from .summary import report

    opened = open_run(run_options(config, arguments or [], run, method, overwrite))
    place = opened.export(
        to,
        what=what,
        round=round_number,
        rows_of=rows_of_round,
        selection=selection,
        warm_up=warm_up,
        trainer=trainer,
        hub=push_to_hub,
        public=public,
    )
    report(opened.folder if opened.store.exists() else place, opened.outcomes, next_steps(opened, trainer))
