"""`python -m dataflex_pipeline`: the `dataflex` command, also for launchers such as torchrun."""

from dataflex_pipeline import start


def main() -> None:
    """Run the command and leave with its exit code."""
    start.begin()
    try:
        from dataflex_pipeline.stages.cli import main as command

        command()
    except (MemoryError, ImportError, OSError) as error:
        if not start.lacks_memory(error):
            raise
        start.ends_without_memory()  # too little even to import what says so elsewhere


if __name__ == "__main__":
    main()
