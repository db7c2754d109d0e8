"""The findings of a checkup drawn line by line, and an example row with its loss marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataflex_pipeline.checkup.findings import Finding
from dataflex_pipeline.terminal import console

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def draw_checkup(findings: Sequence[Finding], shown: Sequence[dict[str, Any]], given: bool) -> None:
    """Print one line per finding, and the example.

    Args:
        findings: of the environment and the configuration.
        shown: an example row in stretches; may be empty.
        given: whether a configuration was checked.
    """
    for area in ("environment", "configuration"):
        chosen = [each for each in findings if each.area == area]
        if chosen:
            console.line(area.capitalize(), style="bold")
        for each in chosen:
            _draw_finding(each)
    draw_example(shown)
    counts = {state: sum(each.state == state for each in findings) for state in STYLES}
    said = {"ok": "ok", "warning": "warnings", "problem": "problems"}
    pieces = [
        (f"{counts[state]} {said[state]}", STYLES[state] if counts[state] else "dim") for state in STYLES
    ]
    console.pieces(pieces[0], (", ", None), pieces[1], (", ", None), pieces[2])
    if not given:
        console.line("To check a configuration too: dataflex doctor --config FILE (or key=value)")


def _draw_finding(finding: Finding) -> None:
    """Print a finding, its state in colour, and below it what to do."""
    style = STYLES[finding.state]
    said = None if finding.state == "ok" else style
    console.pieces((f"  {finding.state:<8} ", style), (f"{finding.check}: ", "bold"), (finding.found, said))
    if finding.advice:
        console.pieces(("           -> ", "bold"), (finding.advice, None))


def draw_example(shown: Sequence[dict[str, Any]]) -> None:
    """Print a row as it is trained on; what carries loss in colour, or in brackets where there is none."""
    if not shown:
        return
    from rich.text import Text

    coloured = console.out.is_terminal and not console.out.no_color and console.out.color_system is not None
    how = "in green" if coloured else "between [[ and ]]"
    console.line(f"A row as it is trained on; what carries loss is {how}:", style="bold")
    text = Text()
    for each in shown:
        piece = "".join(c if c.isprintable() or c == "\n" else " " for c in each["text"])
        if each["carries_loss"]:
            text.append(piece if coloured else f"[[{piece}]]", style="bold green" if coloured else None)
        else:
            text.append(piece)
    console.out.print(text)
