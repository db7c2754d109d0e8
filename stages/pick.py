"""`dataflex pick METHOD`: the best rows of a data set, as a file for any trainer. Nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .completion import complete_method
from .options import EXAMPLES, ConfigOption, OverwriteOption, RunOption, TrainerOption
from .words import parse_assignments

commands = typer.Typer()


@commands.command(
    epilog=EXAMPLES + "dataflex pick near dataset=pool.jsonl eval_dataset=wanted.jsonl fraction=0.1 "
    "--to selected.jsonl\n\n"
    "dataflex pick loss loss.focus=low strategy=top_k dataset=pool.jsonl model_name_or_path=./model "
    "num_samples=500"
)
def pick(
    method: Annotated[
        str, typer.Argument(help="The method; `dataflex methods` lists them.", autocompletion=complete_method)
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="The data, how many rows, and other settings."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="The file to write (.jsonl); by default selected.jsonl in the run.")
    ] = None,
    trainer: TrainerOption = "original",
    config: ConfigOption = None,
    run: RunOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Score every row, choose rows as the method does (strategy=top_k: the best), and write them.

    No model is trained, unless warmup_step says so.
    It is an ordinary run: the same command goes on where it was cut off; report and inspect show it.
    """
    from dataflex_pipeline.pipeline.locate import Options
    from dataflex_pipeline.pipeline.prepare import open_split
    from dataflex_pipeline.reports.chosen import chosen
    from dataflex_pipeline.terminal.chosen import draw_chosen

    from .opening import open_run
    from .summary import after_pick, report

    opened = open_run(Options(config, parse_assignments(settings or []), run, method, overwrite))
    picked = opened.pick(to=to, trainer=trainer)
    report(opened.folder, opened.outcomes, after_pick(opened))
    draw_chosen(chosen(open_split(opened, "pool"), picked.path))
