"""The card of a data set: selected rows, where they came from, and how they were selected.

As the model's card it is published: no path of the machine, no secret. Its header names the Parquet files
alone, one config for each format, so that ``datasets.load_dataset`` does not read every row twice.
"""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline import __version__
from dataflex_pipeline.config.yaml_files import dump_yaml
from dataflex_pipeline.data.sources.exported import ROWS_FOLDER
from dataflex_pipeline.export.card import draw_words, method_words, public_name, public_settings
from dataflex_pipeline.export.conversations import Trainer
from dataflex_pipeline.export.formats import STEM
from dataflex_pipeline.export.selected import Choice
from dataflex_pipeline.methods import method_class, shipped_methods
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.tables import TableFile

_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
)
_COLUMNS = {
    "_row": "position of the row in the prepared pool, from 0",
    "_row_id": "content hash of the row: equal for equal conversations, in whatever format",
    "_source": "the data set that the row came from",
    "_file, _line": "its place there: the line of a text file, else the row; empty where that is not known",
    "_score": "the method's score, higher is better; empty where the method gives none",
    "_rank": "place in the selection, from 1, best first",
    "_weight": "loss weight of the row; mean 1 over the selection",
    "_round": "round of training that it was selected for; 0 is the warm-up, drawn uniformly",
}


@dataclass(frozen=True)
class Selected:
    """What a card says of the rows that were selected for one round.

    Attributes:
        round: its number. method: that scored the rows; None where they were drawn uniformly.
        params, draw: of the method and of the selection. lines, rows: selected, and different ones.
    """

    round: int
    method: str | None
    params: Mapping[str, Any]
    draw: Mapping[str, Any]
    lines: int
    rows: int


@dataclass(frozen=True)
class DataFacts:
    """What the card of a data set is written from.

    Attributes:
        title: of the card. settings: of the run. files: name of each JSONL file -> its lines.
        selected: round by round. sources: name -> (selected lines, rows of the pool).
        pool_rows, usable: rows of the pool, and those of them that could be selected.
        name: of the selection; None for a round's own. trainer: form of the rows.
        versions: of the packages.
    """

    title: str
    settings: Mapping[str, Any]
    files: Mapping[str, int]
    selected: Sequence[Selected]
    sources: Mapping[str, tuple[int, int]]
    pool_rows: int
    usable: int
    name: str | None = None
    trainer: Trainer = "original"
    versions: Mapping[str, str] = field(default_factory=dict)


def data_facts(choice: Choice, files: Mapping[str, int], trainer: Trainer) -> DataFacts:
    """Return what the card of a choice of rows says.

    Args:
        choice: the rows. files: name of each JSONL file -> its lines. trainer: their form.
    """
    settings, record = choice.run.read()
    pool = PartedTable.open(choice.run.pool)
    summary = pool.summary
    lines = choice.lines()
    names = pool.take(lines.column("row").to_numpy(), ["source"]).column("source")
    counts = {each["values"]: each["counts"] for each in pc.value_counts(names).to_pylist()}
    sources = {name: (counts.get(name, 0), each["rows"]) for name, each in summary["sources"].items()}
    return DataFacts(
        title=f"{public_name(str(choice.run.folder))}: selected rows",
        settings=settings,
        files=files,
        selected=[_selected(choice, number, path, lines) for number, path in choice.tables()],
        sources=sources,
        pool_rows=int(summary["rows"]),
        usable=int(summary["valid"]),
        name=choice.name,
        trainer=trainer,
        versions=record.get("versions", {}),
    )


def _selected(choice: Choice, number: int, path: Path, lines: pa.Table) -> Selected:
    made_from = json.loads(TableFile(path).metadata["ingredients"])
    method, where = made_from.get("method"), choice.run.round(number)
    params = made_from.get("params") or {}
    if not params and method is not None and where.probabilities(method).is_file():
        params = json.loads(TableFile(where.probabilities(method)).metadata["ingredients"]).get("params", {})
    own = lines.filter(pc.equal(lines.column("round"), number))
    distinct = pc.count_distinct(own.column("row")).as_py()
    return Selected(number, method, params, made_from.get("draw") or {}, own.num_rows, distinct)


def data_card(facts: DataFacts) -> str:
    """Return the card as Markdown with the header that hubs read."""
    blocks = [
        _header(facts),
        f"# {facts.title}",
        _summary(facts),
        _rounds(facts),
        *_methods(facts.selected),
        _sources(facts.sources),
        _columns(),
        _files(facts),
        _again(facts),
        _versions(facts.versions),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _header(facts: DataFacts) -> str:
    stems = [Path(name).stem for name in facts.files]
    configs = [
        {"config_name": _config(stem), "data_files": f"{ROWS_FOLDER}/{stem}.parquet"} for stem in stems
    ]
    header = {
        "configs": configs,
        "size_categories": [_size(sum(facts.files.values()))],
        "task_categories": ["text-generation"],
        "tags": ["dataflex-pipeline", "data-selection", "sft"],
    }
    return f"---\n{dump_yaml(header)}---"


def _config(stem: str) -> str:
    return stem.removeprefix(STEM).lstrip("-") or "default"


def _size(lines: int) -> str:
    return next((name for bound, name in _SIZES if lines < bound), "100M<n<1B")


def _summary(facts: DataFacts) -> str:
    data = ", ".join(public_name(name.strip()) for name in str(facts.settings.get("dataset", "")).split(","))
    rows = sum(each.rows for each in facts.selected)
    share = f"{100 * rows / facts.usable:.3g} %" if facts.usable else "none"
    named = f" (the selection {facts.name})" if facts.name is not None else ""
    text = (
        f"{rows:,} of the {facts.usable:,} usable rows of {data} ({share}){named}, selected with DataFlex "
        f"Pipeline {__version__}: every row of the pool was scored, and these were chosen by their scores."
    )
    passed = facts.pool_rows - facts.usable
    return text + (f" {passed:,} rows of the pool could not be used." if passed else "")


def _rounds(facts: DataFacts) -> str:
    lines = [
        "## How they were selected",
        "",
        "| round | method | selection | lines | different rows | share of the usable rows |",
        "|---|---|---|---|---|---|",
    ]
    for each in facts.selected:
        method = "drawn uniformly" if each.method is None else method_words(each.method, each.params)
        share = f"{100 * each.rows / facts.usable:.3g} %" if facts.usable else ""
        cells = [str(each.round), method, draw_words(each.draw), f"{each.lines:,}", f"{each.rows:,}", share]
        lines.append(f"| {' | '.join(cells)} |")
    scored_by = public_name(str(facts.settings.get("model_name_or_path", "")))
    seed = facts.settings.get("seed", 42)
    return "\n".join([*lines, "", f"Model: {scored_by}. Seed: {seed}."])


def _methods(selected: Sequence[Selected]) -> Iterator[str]:
    """Yield what each method is, with its formula."""
    known = shipped_methods()
    for name in dict.fromkeys(each.method for each in selected):
        if name is None or name not in known:
            continue
        kind = method_class(name)
        formula = _formula(inspect.getmodule(kind).__doc__ or "")
        shown = f"\n\n```text\n{formula}\n```" if formula else ""
        yield f"**{name}**: {kind.summary} ({kind.source}).{shown}"


def _formula(doc: str) -> str:
    """Return the first indented paragraphs of a docstring: the formula, as it stands in the method's file."""
    taken: list[str] = []
    for line in doc.splitlines():
        if line.startswith("    "):
            taken.append(line[4:])
        elif taken and line.strip():
            break
        elif taken:
            taken.append("")
    return "\n".join(taken).strip("\n")


def _sources(sources: Mapping[str, tuple[int, int]]) -> str:
    lines = ["## Sources", "", "| source | selected | rows in the pool |", "|---|---|---|"]
    ranked = sorted(sources.items(), key=lambda item: (-item[1][0], item[0]))
    return "\n".join(
        [*lines, *(f"| {public_name(name)} | {found:,} | {rows:,} |" for name, (found, rows) in ranked)]
    )


def _columns() -> str:
    lines = [
        "## Columns",
        "",
        "Those of the rows themselves, and beside them (after `selected`, where rows have such a name):",
        "",
    ]
    return "\n".join([*lines, *(f"- `{name}`: {meaning}" for name, meaning in _COLUMNS.items())])


def _files(facts: DataFacts) -> str:
    lines = ["## Files", ""]
    for name, count in facts.files.items():
        stem = Path(name).stem
        lines.append(
            f"- `{ROWS_FOLDER}/{name}` and `{ROWS_FOLDER}/{stem}.parquet`: {count:,} lines, the same in both"
        )
    form = (
        "in the format that they came in"
        if facts.trainer == "original"
        else f"in the form for {facts.trainer}"
    )
    return "\n".join(
        [*lines, "", f"Rows are {form}; `{ROWS_FOLDER}/dataset_info.json` says how each is read."]
    )


def _again(facts: DataFacts) -> str:
    """Return the settings and commands that make the same rows again."""
    last = max((each.round for each in facts.selected), default=0)
    settings = public_settings(facts.settings)
    settings["seed"] = facts.settings.get("seed", 42)
    named = [] if facts.name is None else ["--selection", facts.name]
    export = [
        "dataflex",
        "export",
        "--config",
        "selection.yaml",
        "--what",
        "data",
        "--round",
        str(last),
        *named,
    ]
    commands = [f"dataflex round {max(last - 1, 0)} --config selection.yaml"]
    if last:
        commands += [
            f"dataflex {name} --round {last} --config selection.yaml" for name in ("score", "select")
        ]
    return "\n".join(
        [
            "## Made again",
            "",
            "With these settings as `selection.yaml` (all others have their default; data sets and models "
            "are named without their folders):",
            "",
            f"```yaml\n{dump_yaml(settings)}```",
            "",
            "```bash",
            *commands,
            shlex.join(export),
            "```",
        ]
    )


def _versions(versions: Mapping[str, str]) -> str:
    if not versions:
        return ""
    return "## Made with\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items())
