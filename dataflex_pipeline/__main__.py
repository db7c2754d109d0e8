"""`python -m dataflex_pipeline`: the `dataflex` command, also for launchers such as torchrun."""

from dataflex_pipeline import start


def main() -> None:
    """Run the command and leave with its exit code."""
    start.begin()
    from dataflex_pipeline.stages.cli import main as command

    command()


if __name__ == "__main__":
    main()
