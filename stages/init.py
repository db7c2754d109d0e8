"""`dataflex init`: a commented configuration file to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dataflex_pipeline.errors import UserError

from .options import EXAMPLES

commands = typer.Typer()


@commands.command(epilog=EXAMPLES + "dataflex init my-run.yaml")
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the configuration.")] = Path("dataflex.yaml"),
) -> None:
    """Write a configuration file with every key, its default and its meaning."""
    from dataflex_pipeline.config.render import commented_yaml
    from dataflex_pipeline.store.atomic import write_text
    from dataflex_pipeline.terminal import console

    if path.exists():
        raise UserError(
            f"{path} exists.",
            "A file of yours is never overwritten.",
            "Choose another name, or move the old file away.",
        )
    write_text(path, commented_yaml())
    console.line(f"Wrote {path}: every key with its default and meaning.")
    console.line("Next:")
    console.line("  set model_name_or_path, dataset and (for early stopping or targets) eval_dataset in it")
    console.line(f"  dataflex round 1 --config {path}")
