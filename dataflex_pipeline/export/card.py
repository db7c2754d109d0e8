"""The model card: the model, the rows that it was trained on, and the reasons for these.

A card is published, so it holds no path of the machine and no secret: folders become their last name, and
of the settings only those that decide a result are listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dataflex_pipeline import __version__
from dataflex_pipeline.config.fields import Config, role_of
from dataflex_pipeline.config.redaction import is_secret_name, without_secrets
from dataflex_pipeline.config.yaml_files import dump_yaml
from dataflex_pipeline.home import expanded

PATH_KEYS = ("dataset_dir", "components_cfg_file")
"""Settings that only say where a file is."""
_NAMES = re.compile(r"(path|file|folder|dir|dataset|embeddings|embed_model)$")
"""How keys end that name files, folders, models or data sets, several with commas between."""
_PATH = re.compile(r"(~[^/\n]*/|\.{1,2}/|/[^/\n]+/)[^\n]*")
"""A text that is a path whatever its key is called."""
_ADDRESS = re.compile(r"(https?://)(?:[^\s/?#]*@)?([^\s?#]*)(?:[?#]\S*)?", re.IGNORECASE)


@dataclass(frozen=True)
class RoundLine:
    """What a card says of one round.

    Attributes:
        round: its number. method: that selected. params, draw: ingredients of its tables.
        positions, rows: training positions and different rows. result: of its training.
    """

    round: int
    method: str
    params: Mapping[str, Any]
    draw: Mapping[str, Any]
    positions: int
    rows: int
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        title: of the card. base: the base model as it was given. kind: lora or full.
        exported: which checkpoint, in words. contents: file or folder -> what it is.
        settings: of the run; empty where no run is known. rounds: up to the exported checkpoint.
        sources: selected rows per source. versions: of the packages that the run was made with.
    """

    title: str
    base: str
    kind: str
    exported: str
    contents: Mapping[str, str]
    settings: Mapping[str, Any]
    rounds: Sequence[RoundLine]
    sources: Mapping[str, int]
    versions: Mapping[str, str]


def model_card(facts: Facts) -> str:
    """Return the card as Markdown with the header that model hubs read."""
    blocks = [
        _header(facts),
        f"# {facts.title}",
        _summary(facts),
        _rounds(facts.rounds),
        _sources(facts.sources),
        _contents(facts.contents),
        _settings(facts.settings),
        _versions(facts.versions),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def public_name(name: str) -> str:
    """Return what may be published of a model's or data set's name.

    A path's last part, a hub name whole, an address without user and query.
    """
    if not name:
        return name
    if _ADDRESS.match(name):
        return _without_query(name)
    path = expanded(name)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists()
    return path.resolve().name if looks_local else name


def public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a result, without paths, secrets and those at their default."""
    kept = {}
    for name, value in settings.items():
        known = name in Config.model_fields and role_of(name) != "runtime"
        if (
            known
            and name not in PATH_KEYS
            and value != Config.model_fields[name].get_default(call_default_factory=True)
        ):
            kept[name] = _public(without_secrets(value), name)
    return kept


def _public(value: Any, name: str) -> Any:
    """Return what may be published of a value; ``name`` is the key that it stands under."""
    if isinstance(value, Mapping):
        return {key: _public(each, str(key)) for key, each in value.items() if not is_secret_name(str(key))}
    if isinstance(value, list | tuple):
        return [_public(each, name) for each in value]
    if not isinstance(value, str):
        return value
    if _NAMES.search(name):
        return ",".join(public_name(part.strip()) for part in value.split(","))
    return public_name(value) if _PATH.fullmatch(value) else _without_query(value)


def _without_query(text: str) -> str:
    """Return a text whose http(s) addresses have no user, query or fragment: these may hold a key."""
    return _ADDRESS.sub(r"\1\2", text)


def _header(facts: Facts) -> str:
    tags = ["dataflex-pipeline", "data-selection", "sft", *(["lora"] if facts.kind == "lora" else [])]
    header = {
        "base_model": public_name(facts.base),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    return f"---\n{dump_yaml(header)}---"


def _summary(facts: Facts) -> str:
    how = "a LoRA adapter" if facts.kind == "lora" else "all weights"
    text = f"{public_name(facts.base)}, fine-tuned ({how}) with DataFlex Pipeline {__version__}"
    if not facts.rounds:
        return f"{text}. Exported: {facts.exported}."
    data = ", ".join(public_name(name.strip()) for name in str(facts.settings.get("dataset", "")).split(","))
    return (
        f"{text} on rows that were selected from {data} round by round: every row of the pool is scored with "
        f"the model of the round before, rows are drawn by these scores, and the next round trains on "
        f"exactly them. Exported: {facts.exported}."
    )


def _rounds(rounds: Sequence[RoundLine]) -> str:
    if not rounds:
        return ""
    lines = [
        "## What it was trained on",
        "",
        "| round | selected by | strategy | positions | different rows | train loss | target loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in rounds:
        result, metrics = each.result, each.result.get("metrics") or {}
        cells = [
            str(each.round),
            method_words(each.method, each.params),
            draw_words(each.draw),
            f"{each.positions:,}",
            f"{each.rows:,}",
            _number(result.get("train_loss")),
            _number(metrics.get("eval_loss")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "Losses are mean negative log-likelihoods of the response, nats per token."]
    )


def method_words(method: str, params: Mapping[str, Any]) -> str:
    """Return a method and its parameters as they may be published."""
    given = ", ".join(
        f"{name}={_public(value, name)}" for name, value in without_secrets(dict(params)).items()
    )
    return f"{method} ({given})" if given else method


def draw_words(draw: Mapping[str, Any]) -> str:
    """Return how rows were drawn, in words."""
    shown = [str(draw.get("strategy", ""))]
    shown += ["with replacement"] if draw.get("replacement") else []
    shown += [
        f"{name} {draw[name]}" for name in ("num_samples", "fraction", "token_budget") if draw.get(name)
    ]
    shown += [f"{draw['weights']} weights"] if draw.get("weights", "uniform") != "uniform" else []
    return ", ".join(shown)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _sources(sources: Mapping[str, int]) -> str:
    if not sources:
        return ""
    lines = ["Training positions by source:", "", "| source | positions |", "|---|---|"]
    ranked = sorted(sources.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(lines + [f"| {public_name(name)} | {count:,} |" for name, count in ranked])


def _contents(contents: Mapping[str, str]) -> str:
    lines = ["## Files", ""]
    return "\n".join(lines + [f"- `{name}`: {meaning}" for name, meaning in contents.items()])


def _settings(settings: Mapping[str, Any]) -> str:
    shown = public_settings(settings)
    if not shown:
        return ""
    return f"## Settings\n\nEverything else has its default.\n\n```yaml\n{dump_yaml(shown)}```"


def _versions(versions: Mapping[str, str]) -> str:
    if not versions:
        return ""
    return "## Made with\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items())
