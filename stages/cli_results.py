"""The commands that look at runs and take something out of them; the ones that make runs are in cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dataflex_pipeline.errors import UserError

from .options import (
    EXAMPLES,
    ConfigOption,
    JsonOption,
    MethodOption,
    OverwriteOption,
    RunArguments,
    RunOption,
    SettingsArgument,
)
from .subject import run_options

results = typer.Typer()


@results.command(epilog=EXAMPLES + "dataflex compare random-seed1 random-seed2 less-seed1 less-seed2")
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN... [runs_dir=FOLDER]", help="Names below runs_dir, or folders."),
    ],
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Method to compare with; random, where it is there.")
    ] = None,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Go on where pools, targets or budgets differ.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Put runs side by side at equal budget: by method, over seeds, with a paired test."""
    from . import compare_runs

    compare_runs.compare(runs, baseline, allow_different, json)


@results.command(
    epilog=EXAMPLES + "dataflex inspect runs/quickstart-loss/round-01/scores/loss.parquet\n\n"  # noqa: S608
    "dataflex inspect quickstart-loss --sql 'select round, avg(score) from scores group by round'"
)
def inspect(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TABLE|RUN] [KEY=VALUE]...", help="A table's path, or a run's name or folder."
        ),
    ] = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    sql: Annotated[
        str | None,
        typer.Option(help="A query over scores, probabilities, idx, pool, target, features, this, ..."),
    ] = None,
    json: JsonOption = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="The table as CSV: the query's answer, or the numbers.")
    ] = False,
    rows: Annotated[int, typer.Option(help="Example rows of each kind; 0 for none.", min=0)] = 3,
) -> None:
    """Look at a table or a run: distribution, reasons, sources, example rows; or ask it with SQL."""
    from . import inspect_table

    if json and csv:
        raise UserError(
            "--json and --csv were given.", "The output is one or the other.", "Leave one of them out."
        )
    inspect_table.inspect_(
        config, arguments or [], run, method, sql, "json" if json else "csv" if csv else "text", rows
    )


@results.command(epilog=EXAMPLES + "dataflex report quickstart-loss")
def report(
    run: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN [runs_dir=FOLDER]", help="A name below runs_dir, or a folder."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; report.html in the run by default.")
    ] = None,
) -> None:
    """Write a run as one HTML page: rounds, curves, scores, what was selected, examples, settings."""
    from . import report_run

    report_run.report(run or [], output)


@results.command(
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

    from . import export as module

    options = run_options(config, arguments or [], run, method, overwrite)
    module.export(options, Asked(what, round_number, rows_of_round, push_to_hub, public))


@results.command(epilog=EXAMPLES + "dataflex doctor --config my-run.yaml")
def doctor(
    settings: SettingsArgument = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    json: JsonOption = False,
) -> None:
    """Check this machine and, where one is given, a configuration: what works, what does not, what to do."""
    from . import doctor as module

    module.doctor(config, settings or [], run, method, json)


@results.command(epilog=EXAMPLES + "dataflex estimate --config my-run.yaml --method less")
def estimate(
    settings: SettingsArgument = None,
    config: ConfigOption = None,
    run: RunOption = None,
    method: MethodOption = None,
    json: JsonOption = False,
) -> None:
    """Predict what a run takes, from a short calibration here: time, memory, disk, FLOPs, API requests."""
    from . import estimate as module

    module.estimate(config, settings or [], run, method, json)


@results.command(epilog=EXAMPLES + "dataflex evaluate quickstart-loss --metric exact_match")
def evaluate(
    arguments: RunArguments = None,
    config: ConfigOption = None,
    run: RunOption = None,
    round_number: Annotated[
        int | None, typer.Option("--round", "-r", help="The round; the last finished one by default.")
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
    """Evaluate a round's model: loss, perplexity, generated answers, a judge, benchmark tasks."""
    from dataflex_pipeline.pipeline.evaluate import Wanted

    from . import evaluate as module

    wanted = Wanted(
        tuple(metric or ()), judge, max_new_tokens, generator, tuple(task or ()), include_path, limit
    )
    options = run_options(config, arguments or [], run, None, overwrite)
    module.evaluate(options, round_number, wanted, json)
