"""The drawing of `dataflex inspect`: histograms, small tables, rows with their text."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dataflex_pipeline.terminal import console
from dataflex_pipeline.terminal.answers import clipped

BAR = 30
BESIDE_BAR = 48
"""Columns of the terminal that the numbers beside a bar take."""
LISTED = 12
"""Sources, reasons and groups that are shown; --json has all of them."""
LINES_PER_TURN = 2
INDENT = 4
_QUANTILES = {"0.05": "5 %", "0.25": "25 %", "0.5": "median", "0.75": "75 %", "0.95": "95 %"}


def draw_table(found: Mapping[str, Any]) -> None:
    """Print one look at a table."""
    console.line(_title(found), style="bold")
    console.line(f"  {found['path']}: {found['rows']:,} rows, {size(found['bytes'])}{_validity(found)}")
    for name, value in found["facts"].items():
        for text in value if name == "notices" else [_fact(value)]:
            console.line(f"  {'note' if name == 'notices' else name}: {text}")
    _draw_histogram(found)
    _draw_numbers(found["numbers"])
    _draw_kind(found)
    _draw_lists(found)
    rows = [[each["column"], each["type"], each["meaning"]] for each in found["columns"]]
    console.print_table("Columns", ["column", "type", "meaning"], rows, wraps="meaning")
    _draw_examples(found)


def _title(found: Mapping[str, Any]) -> str:
    number, name = found["facts"].get("round"), found["name"]
    of_round = f" of round {number}" if number is not None else ""
    if found["kind"] == "feature":
        return f"Feature {name} over the {found['facts'].get('split', 'pool')}"
    if found["kind"] in ("scores", "probabilities"):
        return f"{found['kind'].capitalize()}{of_round} by {name or found['facts'].get('method', 'unknown')}"
    if found["kind"] == "selection":
        return (
            f"Selection{' ' + name if name else ''}{of_round}, by {found['facts'].get('method', 'unknown')}"
        )
    if found["kind"] == "index":
        return f"Index{of_round}, {'by ' + found['facts']['method'] if number != '0' else 'drawn uniformly'}"
    return {"pool": "The pool", "target": "The target"}.get(found["kind"], "A table")


def _validity(found: Mapping[str, Any]) -> str:
    if "valid" not in found:
        return ""
    text = f"; {found['valid']:,} valid, {found['rows'] - found['valid']:,} not"
    scored = found.get("scored", found["valid"])
    return text if scored == found["valid"] else f"{text}; {scored:,} scored: the candidates"


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_fact(each)}" for key, each in value.items() if each not in (None, [], {}))
    if isinstance(value, list):
        return "; ".join(_fact(each) for each in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def size(n_bytes: float) -> str:
    """Return a number of bytes as people write it."""
    for unit in ("bytes", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} bytes" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


def number(value: float | None) -> str:
    """Return a number with four digits; empty where there is none."""
    return "" if value is None else f"{value:.4g}"


def _draw_histogram(found: Mapping[str, Any]) -> None:
    bins = found.get("histogram", {}).get("bins", [])
    if not bins:
        return
    most = max(each["count"] for each in bins)
    room = max(min(BAR, console.out.width - BESIDE_BAR), 8)
    rows = []
    for place, each in enumerate(bins):
        closing = "]" if place == len(bins) - 1 else ")"
        span = f"[{number(each['low'])}, {number(each['high'])}{closing}"
        rows.append([span, f"{each['count']:,}", bar(each["count"] / most, room)])
    shown = 3 if console.out.is_terminal else 2  # bars are for people
    names = ["from, to", "rows", ""][:shown]
    console.print_table(found["histogram"]["column"], names, [row[:shown] for row in rows], wraps="")


def bar(share: float, room: int = BAR) -> str:
    """Return a bar for a share of 1, ``room`` columns long, at least a sliver where it is not 0."""
    encoding = (console.out.encoding or "").lower()
    if "utf" not in encoding:
        return "#" * max(round(share * room), share > 0)
    eighths = max(round(share * room * 8), share > 0)
    rest = " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return "█" * (eighths // 8) + rest


def _draw_numbers(numbers: Sequence[Mapping[str, Any]]) -> None:
    if not numbers:
        return
    for shares in (list(_QUANTILES), ["0.5"]):
        columns, rows = _numbers_table(numbers, shares)
        if console.fits(columns, rows, "column"):
            break
    console.print_table("Numbers", columns, rows, wraps="column")


def _numbers_table(
    numbers: Sequence[Mapping[str, Any]], shares: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return names and cells of the table of numbers; with one quantile, the short form of it."""
    whole = len(shares) > 1
    names = ["column", "min", *(_QUANTILES[share] for share in shares), "max", "mean"]
    rows = [
        [
            each["column"],
            number(each["minimum"]),
            *(number(each["quantiles"].get(share)) for share in shares),
            number(each["maximum"]),
            number(each["mean"]),
            *([number(each["std"])] if whole else []),
            f"{each['missing']:,}",
        ]
        for each in numbers
    ]
    return [*names, *(["std"] if whole else []), "missing"], rows


def _draw_kind(found: Mapping[str, Any]) -> None:
    if "probability" in found:
        facts = found["probability"]
        effective = facts["effective_sample_size"]
        console.line(
            f"Sum {facts['sum']:.9g}; {facts['positive']:,} rows above 0; largest {number(facts['largest'])}"
        )
        share = effective / found["rows"]
        console.line(f"Effective sample size {effective:,.1f} rows ({share:.1%} of all)")
    if "drawn" in found:
        drawn = found["drawn"]
        console.line(f"{drawn['distinct']:,} different rows, at most {drawn['most_repeated']:,} times each")
        console.line(f"Effective sample size of the weights: {drawn['effective_sample_size']:,.1f} positions")
    rows = [
        [str(each["round"]), f"{each['rows']:,}", f"{each['share']:.1%}"] for each in found.get("overlap", [])
    ]
    if rows:
        console.print_table("Rows that were already in", ["round", "rows", "share"], rows, wraps="")


def _draw_lists(found: Mapping[str, Any]) -> None:
    _draw_list("Not valid, because", ["reason", "rows"], found.get("reasons", []), wraps="reason")
    _draw_list("Groups", ["group", "rows", "valid"], found.get("groups", []), wraps="group")
    sources = found.get("sources", [])
    if len(sources) > 1:
        names = ["source", "lines", *(n for n in ("mean", "share", "share_of_pool") if n in sources[0])]
        _draw_list("By source", names, sources, wraps="source")
    length = found.get("length")
    if length and len(length["bins"]) > 1:
        rows = [{"tokens": _span(each), **each} for each in length["bins"]]
        _draw_list("By response tokens", ["tokens", "lines", "mean"], rows, wraps="")
        if length["correlation"] is not None:
            console.line(f"Correlation with the number of response tokens: {length['correlation']:.3f}")


def _span(each: Mapping[str, Any]) -> str:
    low, high = each["shortest"], each["longest"]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _draw_list(title: str, names: list[str], lines: Sequence[Mapping[str, Any]], wraps: str) -> None:
    if not lines:
        return
    rows = [[_cell(name, line[name]) for name in names] for line in lines[:LISTED]]
    console.print_table(title, [name.replace("_", " ") for name in names], rows, wraps=wraps)
    if len(lines) > LISTED:
        console.line(f"  and {len(lines) - LISTED:,} more; --json has all")


def _cell(name: str, value: Any) -> str:
    if name.startswith("share"):
        return f"{value:.1%}"
    if isinstance(value, float) or value is None:
        return number(value)
    return f"{value:,}" if isinstance(value, int) else clipped(str(value), 200)


def _draw_examples(found: Mapping[str, Any]) -> None:
    width = min(console.out.width, 120) if console.out.is_terminal else 120
    for kind, lines in found.get("examples", {}).items():
        if not lines:
            continue
        console.line(f"{kind.capitalize()} rows", style="bold")
        for line in lines:
            parts = [f"row {line['row']:,}"]
            parts += [
                f"{name} {_cell(name, value)}"
                for name, value in line.items()
                if name not in ("row", "messages")
            ]
            console.line("  " + ", ".join(parts), style="cyan")
            for turn in line.get("messages") or []:
                text = clipped(f"{turn['role']}: {turn['content']}", LINES_PER_TURN * width)
                for part in textwrap.wrap(text, width - INDENT, max_lines=LINES_PER_TURN, placeholder="..."):
                    console.line(" " * INDENT + part)


def draw_run(found: Mapping[str, Any], again: str) -> None:
    """Print a run at one look."""
    console.line(f"Run {found['run']}", style="bold")
    console.line(f"  begun {found['created']}")
    for name, value in found["settings"].items():
        if value is not None:
            console.line(f"  {name}: {_short_path(value)}")
    rows = [
        [
            str(each["round"]),
            each.get("method", ""),
            _whole(each.get("selected")),
            _whole(each.get("positions")),
            _whole(each.get("rows")),
            _percent(each.get("already_in_round_before")),
            _whole(each.get("effective_sample_size")),
            number(each.get("train_loss")),
            number(each.get("target_loss")),
        ]
        for each in found["rounds"]
    ]
    names = ["round", "method", "selected", "positions", "rows", "in round before", "ESS", "train loss"]
    names.append("target loss")
    short = ["round", "method", "sel.", "pos.", "rows", "before", "ESS", "train", "target"]
    fits = console.fits(short, rows, "method") and not console.fits(names, rows, "method")
    console.print_table("Rounds", short if fits else names, rows, wraps="method")
    tables = [[t["view"], f"{t['lines']:,}", size(t["bytes"]), t["path"]] for t in found["tables"]]
    console.print_table("Tables", ["view", "lines", "size", "where"], tables, wraps="where")
    console.line("Next:")
    console.line(f"  look at a table:  dataflex inspect {_last_scores(found, again)}")
    query = "select round, method, avg(score) from scores group by all"
    console.line(f"  ask:  dataflex inspect {shlex.quote(again)} --sql {shlex.quote(query)}")


def _short_path(value: Any) -> str:
    return os.path.relpath(value) if isinstance(value, str) and Path(value).is_absolute() else str(value)


def _last_scores(found: Mapping[str, Any], again: str) -> str:
    paths = [each["path"] for each in found["tables"]]
    scores = [path for path in paths if "/scores/" in path]
    selecting = {f"scores/{each['method']}.parquet" for each in found["rounds"][-1:] if "method" in each}
    chosen = [path for path in scores if path.partition("/")[2] in selecting]
    return shlex.quote(str(Path(again) / (chosen or scores or paths)[-1]))


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
