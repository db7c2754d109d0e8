"""`python -m dataflex_pipeline`: the `dataflex` command, also for launchers such as torchrun."""

from dataflex_pipeline import start


def main() -> None:
    """Run the command and leave with its exit code."""
    start.begin()
    try:
        from dataflex_pipeline.stages.cli import main as command

        command()
    except MemoryError:  # too little even to import what says so elsewhere
        start.ends_without_memory()


if __name__ == "__main__":
    main()
