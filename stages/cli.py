"""The `dataflex` command. Everything heavy is imported inside the commands, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from dataflex_pipeline.errors import DataflexError

app = typer.Typer(
    name="dataflex",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Offline data selection for LLM fine-tuning, as files: score, select, train, go round again.",
)

Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="Configuration file (YAML). Without one: the run's own, or the demo's."
    ),
]
Run = Annotated[str | None, typer.Option("--run", help="Name of the run: a folder below runs_dir.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Make anew what was made with other settings; the old is kept aside."),
]
MethodOption = Annotated[
    str | None, typer.Option("--method", "-m", help="The method; `dataflex methods` lists them.")
]
RoundOption = Annotated[int, typer.Option("--round", "-r", help="The round, from 1.")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the configuration.")
]
EXAMPLES = "[bold]Example[/bold]  "
INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def _common(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from dataflex_pipeline import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog=EXAMPLES + "dataflex warmup dataset=my.json model_name_or_path=./model")
def warmup(
    settings: Settings = None, config: Config = None, run: Run = None, overwrite: Overwrite = False
) -> None:
    """Prepare the data and train round 0 on uniformly drawn rows."""
    from stages import commands

    commands.warmup(config, settings or [], run, overwrite)


@app.command(epilog=EXAMPLES + "dataflex score --round 1 --method loss loss.focus=medium")
def score(
    settings: Settings = None,
    config: Config = None,
    run: Run = None,
    round_number: RoundOption = 1,
    method: MethodOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Score every row of the pool with one method; the result is a table."""
    from stages import commands

    commands.score(config, settings or [], run, round_number, method, overwrite)


@app.command(epilog=EXAMPLES + "dataflex select --round 1 --method loss fraction=0.1 weights=importance")
def select(
    settings: Settings = None,
    config: Config = None,
    run: Run = None,
    round_number: RoundOption = 1,
    method: MethodOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn scores into probabilities and draw the weighted index of a round."""
    from stages import commands

    commands.select(config, settings or [], run, round_number, method, overwrite)


@app.command("train-round", epilog=EXAMPLES + "dataflex train-round --round 1")
def train_round(
    settings: Settings = None,
    config: Config = None,
    run: Run = None,
    round_number: RoundOption = 1,
    overwrite: Overwrite = False,
) -> None:
    """Train one round on its index, going on from the round before."""
    from stages import commands

    commands.train_round(config, settings or [], run, round_number, overwrite)


@app.command("round", epilog=EXAMPLES + "dataflex round 2 --method delta_loss learning_rate=1e-4")
def round_(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[N] [KEY=VALUE]...", help="How far to go (without N: to the horizon), and settings."
        ),
    ] = None,
    config: Config = None,
    run: Run = None,
    method: MethodOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Do whatever is missing up to round N: prepare, warm up, then score, select and train each round."""
    from stages import commands

    commands.round_(config, arguments or [], run, method, overwrite)


@app.command(epilog=EXAMPLES + "dataflex methods loss")
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method's parameters only.")] = None,
    config: Config = None,
    templates: Annotated[bool, typer.Option("--templates", help="List the chat templates instead.")] = False,
) -> None:
    """List the methods: what they do, their parameters, defaults and source."""
    from stages import listing

    listing.templates() if templates else listing.methods(name, config)


@app.command(epilog=EXAMPLES + "dataflex init my-run.yaml")
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the configuration.")] = Path("dataflex.yaml"),
) -> None:
    """Write a configuration file with every key, its default and its meaning."""
    from stages import listing

    listing.init(path)


@app.command(epilog=EXAMPLES + "dataflex status --run quickstart-loss")
def status(
    settings: Settings = None, config: Config = None, run: Run = None, method: MethodOption = None
) -> None:
    """Show what of a run is done, stale or missing."""
    from stages import status as module

    module.status(config, settings or [], run, method)


@app.command(epilog=EXAMPLES + "dataflex compare random-seed1 random-seed2 less-seed1 less-seed2")
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Names below runs_dir, or folders.")],
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="Where runs are named from.")] = Path("runs"),
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Method to compare with; random, where it is there.")
    ] = None,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Go on where pools, targets or budgets differ.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put runs side by side at equal budget: by method, over seeds, with a paired test."""
    from stages import compare_runs

    compare_runs.compare(runs, runs_dir, baseline, allow_different, as_json)


@app.command(
    epilog=EXAMPLES + "dataflex inspect runs/quickstart-loss/round-01/scores/loss.parquet\n\n"
    "dataflex inspect quickstart-loss --sql 'select round, avg(score) from scores group by round'"
)
def inspect(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TABLE|RUN] [KEY=VALUE]...", help="A table's path, or a run's name or folder."
        ),
    ] = None,
    config: Config = None,
    run: Run = None,
    method: MethodOption = None,
    sql: Annotated[
        str | None,
        typer.Option(help="A query over scores, probabilities, idx, pool, target, features, this, ..."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="The table as CSV: the query's answer, or the numbers.")
    ] = False,
    rows: Annotated[int, typer.Option(help="Example rows of each kind; 0 for none.", min=0)] = 3,
) -> None:
    """Look at a table or a run: distribution, reasons, sources, example rows; or ask it with SQL."""
    from stages import inspect_table

    inspect_table.inspect_(
        config, arguments or [], run, method, sql, "json" if json else "csv" if csv else "text", rows
    )


@app.command(epilog=EXAMPLES + "dataflex report quickstart-loss")
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A name below runs_dir, or a folder.")],
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="Where runs are named from.")] = Path("runs"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; report.html in the run by default.")
    ] = None,
) -> None:
    """Write a run as one HTML page: rounds, curves, scores, what was selected, examples, settings."""
    from stages import report_run

    report_run.report(run, runs_dir, output)


@app.command(
    epilog=EXAMPLES + "dataflex export quickstart-loss export_dir=my-model\n\n"
    "dataflex export --config merge.yaml"
)
def export(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN] [KEY=VALUE]...", help="A run's name or folder, and settings."),
    ] = None,
    config: Config = None,
    run: Run = None,
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
    overwrite: Overwrite = False,
) -> None:
    """Write a model that needs nothing of a run: merged weights, adapter, selected rows and a model card."""
    from stages import export as module

    asked = module.Asked(what, round_number, rows_of_round, push_to_hub, public)
    module.export(config, arguments or [], run, method, overwrite, asked)


@app.command(epilog=EXAMPLES + "dataflex doctor --config my-run.yaml")
def doctor(
    settings: Settings = None,
    config: Config = None,
    run: Run = None,
    method: MethodOption = None,
    json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Check this machine and, where one is given, a configuration: what works, what does not, what to do."""
    from stages import doctor as module

    module.doctor(config, settings or [], run, method, json)


@app.command(epilog=EXAMPLES + "dataflex estimate --config my-run.yaml --method less")
def estimate(
    settings: Settings = None,
    config: Config = None,
    run: Run = None,
    method: MethodOption = None,
    json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Predict what a run takes, from a short calibration here: time, memory, disk, FLOPs, API requests."""
    from stages import estimate as module

    module.estimate(config, settings or [], run, method, json)


@app.command(
    epilog=EXAMPLES + "dataflex evaluate --run quickstart-loss --metric exact_match test_dataset=demo"
)
def evaluate(
    settings: Settings = None,
    config: Config = None,
    run: Run = None,
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
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a round's model: loss, perplexity, generated answers, a judge, benchmark tasks."""
    from stages import evaluate as module

    wanted = module.Wanted(
        tuple(metric or ()), judge, max_new_tokens, generator, tuple(task or ()), include_path, limit
    )
    module.evaluate(config, settings or [], run, round_number, wanted, overwrite, as_json)


def main() -> None:
    """Run the command: exit code 0 done, 1 our failure, 2 the user's mistake, 130 interrupted."""
    from dataflex_pipeline import launch

    if launch.world_size() == 1:
        code = _run()
        launch.leave_process_group()
        sys.exit(code)
    from stages import several

    code = several.run(_run)
    if code:
        launch.end_now(code)
    sys.exit(0)


def _run() -> int:
    """Run the command in this process; its errors are printed. Return the exit code."""
    try:
        app(standalone_mode=True)
    except DataflexError as error:
        return _failed(error)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:  # typer has turned the KeyboardInterrupt into this
            typer.echo("interrupted; the same command goes on from here", err=True)
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception as error:
        from stages.disk import disk_error

        explained = disk_error(error)
        if explained is None:
            raise
        return _failed(explained)
    return 0


def _failed(error: DataflexError) -> int:
    from stages import console

    console.fail(error)
    return error.exit_code


if __name__ == "__main__":
    main()
