"""`dataflex methods`: the methods to choose from, with their parameters; or the chat templates."""

from __future__ import annotations

from typing import Annotated

import typer

from .completion import complete_method_argument
from .options import EXAMPLES, ConfigOption, JsonOption
from .words import split_subject

commands = typer.Typer()


@commands.command(epilog=EXAMPLES + "dataflex methods loss")
def methods(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[METHOD] [KEY=VALUE]...",
            help="One method to show instead of all, and settings over the configuration.",
            autocompletion=complete_method_argument,
        ),
    ] = None,
    config: ConfigOption = None,
    templates: Annotated[bool, typer.Option("--templates", help="List the chat templates instead.")] = False,
    json: JsonOption = False,
) -> None:
    """List the methods: what they do, their parameters, defaults and source."""
    from dataflex_pipeline.data.chat.templates import TEMPLATES
    from dataflex_pipeline.reports.methods import describe_methods
    from dataflex_pipeline.terminal.answers import plain, print_json
    from dataflex_pipeline.terminal.methods import draw_methods, draw_templates

    if templates:
        found = {name: template.summary for name, template in sorted(TEMPLATES.items())}
        print_json({"templates": found}) if json else draw_templates(found)
        return
    name, settings = split_subject(arguments or [])
    described = describe_methods(name, config, settings)
    print_json({"methods": plain(described)}) if json else draw_methods(described)
