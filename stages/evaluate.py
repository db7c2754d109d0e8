"""`dataflex evaluate`: how good the model of a round is, as a table in the run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    EXAMPLES,
    ConfigOption,
    JsonOption,
    OverwriteOption,
    RunArguments,
    RunOption,
    round_or_base,
)
from .subject import run_options

commands = typer.Typer()


@commands.command(epilog=EXAMPLES + "dataflex evaluate quickstart-loss --metric exact_match --round base")
def evaluate(
    arguments: RunArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    round_number: Annotated[
        str | None,
        typer.Option("--round", "-r", help="The round (the last finished one by default), or base."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Of generated answers: exact_match, f1, rouge_l, ...; several times."),
    ] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="Grade the answers with the reward backend set for nice.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.", min=1)] = 512,
    generator: Annotated[str, typer.Option("--generator", help="auto, vllm or transformers.")] = "auto",
    task: Annotated[
        list[str] | None, typer.Option("--task", help="A task of the lm-evaluation-harness; several times.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder of task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Documents of each task.", min=1)] = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Evaluate a round's model, or the base model: loss, perplexity, answers, a judge, benchmark tasks."""
    from dataflex_pipeline.pipeline.evaluate import Wanted, base_figures
    from dataflex_pipeline.pipeline.evaluate import evaluate as evaluate_run
    from dataflex_pipeline.terminal import console
    from dataflex_pipeline.terminal.answers import print_json
    from dataflex_pipeline.terminal.figures import draw_figures

    from .opening import open_run

    wanted = Wanted(
        tuple(metric or ()), judge, max_new_tokens, generator, tuple(task or ()), include_path, limit
    )
    with console.messages_to_stderr(json):
        opened = open_run(run_options(config, arguments or [], run, None, overwrite))
        chosen, path, figures = evaluate_run(opened, round_or_base(round_number), wanted)
    base = base_figures(opened)
    if json:
        found, untouched = ([asdict(figure) for figure in each] for each in (figures, base))
        print_json({"run": opened.folder.name, "round": chosen, "figures": found, "base_model": untouched})
        return
    label = "The base model" if chosen == "base" else f"Round {chosen}"
    console.line(f"{label} of {opened.folder}", style="bold")
    draw_figures(figures, None if chosen == "base" else base)
    if chosen != "base" and not base:
        console.line(f"base model:  not evaluated; `dataflex evaluate {opened.again} --round base` adds it")
    console.line(f"table:  {path}")
