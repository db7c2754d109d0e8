"""`python -m dataflex_pipeline`: the `dataflex` command, also for launchers such as torchrun."""

from dataflex_pipeline.stages.cli import main

if __name__ == "__main__":
    main()
