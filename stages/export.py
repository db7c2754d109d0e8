"""`dataflex export`: model, adapter, selected rows and a card, for use elsewhere."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .options import EXAMPLES, ConfigOption, MethodOption, OverwriteOption, RunArguments, RunOption
from .subject import run_options

if TYPE_CHECKING:
    from dataflex_pipeline.export.bundle import Bundle

commands = typer.Typer()


@commands.command(
    epilog=EXAMPLES + "dataflex export quickstart-loss export_dir=my-model\n\n"
    "dataflex export --config merge.yaml"
)
def export(
    arguments: RunArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    what: Annotated[
        Literal["all", "model", "adapter", "data"],
        typer.Option(help="The merged model, the adapter, the selected rows, or all of it."),
    ] = "all",
    round_number: Annotated[
        int | None,
        typer.Option(
            "--round", "-r", help="Whose checkpoint; by default the best that was kept, else the last."
        ),
    ] = None,
    rows_of_round: Annotated[
        int | None,
        typer.Option(help="Only this round's rows; by default those of all rounds up to the checkpoint."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Upload it to this repository, privately.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push-to-hub: for everybody to see.")
    ] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a model that needs nothing of a run: merged weights, adapter, selected rows and a model card."""
    from dataflex_pipeline.pipeline.export import Asked
    from dataflex_pipeline.pipeline.export import export as export_run

    from .opening import open_run
    from .summary import report

    opened = open_run(run_options(config, arguments or [], run, method, overwrite))
    done = export_run(opened, Asked(what, round_number, rows_of_round, push_to_hub, public))
    of_run = done.bundle.origin.run
    report(done.bundle.folder if of_run is None else of_run.folder, done.outcomes, _next(done.bundle))


def _next(bundle: Bundle) -> list[str]:
    from dataflex_pipeline.export.subset import STEM

    folder = bundle.folder
    lines = []
    if "model" in bundle.parts:
        lines.append(f"use it:  AutoModelForCausalLM.from_pretrained('{folder}')")
    if "data" in bundle.parts:
        stems = sorted(path.stem for path in (folder / "data").glob(f"{STEM}*.jsonl"))
        named = [f"dataset={','.join(stems)}", f"dataset_dir={folder / 'data'}"]
        alone = str(folder / "data" / f"{STEM}.jsonl")
        lines.append(f"train on the same rows elsewhere:  {alone if stems == [STEM] else shlex.join(named)}")
    return lines
