"""Hostile inputs for commands: settings, YAML, components, data files, names, environment, damaged files."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from dataflex_pipeline.config.fields import Config

SECRET = "s3cr3t-Pa55w0rd"
MODEL = "MODEL"
"""Stands in arguments for the folder of the tiny model."""
ROWS = 12


@dataclass(frozen=True)
class Trial:
    """One command with all that is around it.

    Attributes:
        arguments: the command line. files: written into the working folder before it.
        environment: variables set for it. damage: place in a file of the finished run -> byte there.
    """

    arguments: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    damage: Mapping[str, tuple[int, bytes]] = field(default_factory=dict)


TEXTS = (
    "",
    " ",
    ".",
    "..",
    "-",
    "a/b",
    "../../victim",
    "/dev/null",
    "~nosuchuser/x",
    "*",
    "[ab]?",
    "a=b",
    "a" * 300,
    "\x1b[2J\x07",
    "\u202eabc",
    "\udcff",
    "null",
    "nan",
    "1e400",
    "9" * 5000,
    "{",
    "[1, {a: ",
    "&a [*a]",
    "!!python/object/apply:os.system [x]",
    "'",
    "😀",
    f"https://me:{SECRET}@nowhere.invalid/x",
    f"api_key: {SECRET}",
    f"{{api_key: {SECRET}, x: [",
)
NUMBERS = (-1, 0, 1, 2, 3, 2**31 - 1, 2**31, 2**63, 10**20, 0.5, -0.0, 1e-400, 1e308)
NAMES = tuple(text for text in TEXTS if "api_key" not in text)
texts = st.sampled_from(TEXTS) | st.text(st.characters(exclude_characters="\x00"), max_size=12)
scalars: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(NUMBERS), st.booleans(), st.none(), texts, st.integers(), st.floats()
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(sorted(Config.model_fields)) | st.sampled_from(
    ("less.projection", "less.proj_dim", "nice.reward_backend_params.api.api_key", "loss.focus", "near.k")
)
COSTLY = frozenset(
    {"warmup_step", "update_step", "update_times", "num_train_epochs", "model_name_or_path", "max_similarity"}
)
"""Settings that some value of makes a trial take long; they are tried where nothing is computed."""


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


settings = st.tuples(keys, values).map(lambda pair: f"{pair[0]}={_as_text(pair[1])}")


def _pick(data: str, *more: str) -> tuple[str, ...]:
    start = ("pick", "random", "--to", "out.jsonl", f"dataset={data}", f"model_name_or_path={MODEL}")
    return (*start, "fraction=0.5", "preprocessing_num_workers=1", *more)


def row(number: int) -> dict[str, Any]:
    """Return one sound row."""
    return {"instruction": f"say {number}", "input": "", "output": f"it is {number}"}


GOOD = b"".join(json.dumps(row(number)).encode() + b"\n" for number in range(ROWS))


@st.composite
def setting_trials(draw: st.DrawFn) -> Trial:
    """Settings on the command line: read, or picked with."""
    given = draw(st.lists(settings, min_size=1, max_size=3))
    picks = draw(st.booleans()) and not any(text.partition("=")[0] in COSTLY for text in given)
    if picks:
        return Trial(_pick("good.jsonl", *given), {"good.jsonl": GOOD})
    return Trial(("status", *given))


@st.composite
def yaml_trials(draw: st.DrawFn) -> Trial:
    """A configuration file: of odd values, or no YAML at all."""
    content = draw(st.dictionaries(keys | texts, values, max_size=4))
    text = json.dumps(content).encode("utf-8", "replace")
    text = draw(st.sampled_from((text, text[:-3], text.replace(b",", b"\n"), b"\xff\xfe" + text)))
    text = draw(st.just(text) | st.binary(max_size=40) | texts.map(lambda t: t.encode("utf-8", "replace")))
    command = draw(st.sampled_from((("status",), ("methods",))))
    return Trial((*command, "--config", "mine.yaml"), {"mine.yaml": text})


@st.composite
def component_trials(draw: st.DrawFn) -> Trial:
    """A components file with odd names, kinds and parameters."""
    entry = st.dictionaries(st.sampled_from(("name", "params", "file", "module")) | texts, values, max_size=3)
    name = st.sampled_from(("less", "loss", "nice", "selectors", "mine")) | texts
    content = draw(st.dictionaries(name, entry | values, max_size=3))
    key = {"reward_backend_params": {"api": {"api_key": SECRET}}}
    content |= draw(st.sampled_from(({}, {"nice": {"name": "nice", "params": key}})))
    files = {"c.yaml": json.dumps(content).encode(), "mine.yaml": b"components_cfg_file: c.yaml\n"}
    chosen = draw(st.sampled_from(("less", *content)))
    command = draw(st.sampled_from((("methods",), ("status", "--method", chosen or "loss"))))
    return Trial((*command, "--config", "mine.yaml"), files)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[str | None]]:
    names = dict.fromkeys(name for each in rows for name in each)
    return {name: [None if name not in r else _as_text(r[name]) for r in rows] for name in names}


def _encoded(rows: list[dict[str, Any]], kind: str) -> bytes:
    """Return rows as the content of a file of a kind."""
    if kind == "jsonl":
        return b"".join(json.dumps(each).encode() + b"\n" for each in rows)
    if kind == "json":
        return json.dumps(rows).encode()
    if kind == "csv":
        table = _columns(rows)
        lines = [list(table), *zip(*table.values(), strict=True)]
        return "\n".join(",".join(json.dumps(cell) for cell in line) for line in lines).encode()
    clean = {
        name.encode("utf-8", "replace").decode(): [
            None if cell is None else cell.encode("utf-8", "replace").decode() for cell in cells
        ]
        for name, cells in _columns(rows).items()
    }
    buffer, table = io.BytesIO(), pa.table(clean)
    if kind == "arrow":
        with pa.ipc.new_file(buffer, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, buffer)
    return buffer.getvalue()


@st.composite
def data_trials(draw: st.DrawFn) -> Trial:
    """A data file with odd rows, and then odd bytes."""
    rows = [row(number) for number in range(ROWS)]
    for number, odd in draw(st.dictionaries(st.integers(0, ROWS - 1), values, max_size=3)).items():
        name = draw(st.sampled_from(("instruction", "output", "input", "messages", "system")) | texts)
        rows[number] = {**rows[number], name: odd}
    kind = draw(st.sampled_from(("jsonl", "json", "csv", "parquet", "arrow")))
    content = bytearray(_encoded(rows, kind))
    for place, byte in draw(
        st.dictionaries(st.integers(0, 10_000), st.binary(max_size=3), max_size=3)
    ).items():
        at = place % len(content)
        content[at : at + 1] = byte
    end = draw(st.sampled_from((len(content), len(content) // 2, 0)))
    return Trial(_pick(f"d.{kind}"), {f"d.{kind}": bytes(content[:end])})


@st.composite
def name_trials(draw: st.DrawFn) -> Trial:
    """Names of runs, files, rounds, selections and methods."""
    name = draw(st.sampled_from(NAMES) | st.text(st.characters(exclude_characters="\x00"), max_size=12))
    return Trial(
        draw(
            st.sampled_from(
                (
                    _pick("good.jsonl", "--run", name),
                    ("select", "--run", "base", "--round", "1", "--name", name),
                    ("report", "runs/base", "--output", name),
                    ("export", "--run", "base", "--to", name),
                    ("inspect", name),
                    ("status", name),
                    ("compare", "base", name),
                    ("inspect", "base", "--find", name),
                    ("methods", name),
                    ("round", name),
                    ("score", "--run", "base", "--round", "1", "--method", name),
                    (name,),
                    ("status", "--run", "base", "--" + name),
                )
            )
        ),
        {"good.jsonl": GOOD},
    )


@st.composite
def environment_trials(draw: st.DrawFn) -> Trial:
    """Variables of the environment that are read, with odd values."""
    names = (
        "RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "HOME",
        "COLUMNS",
        "HF_HOME",
        "TERM",
        "NO_COLOR",
    )
    value = st.sampled_from(("", "x", "-1", "0", "3", "/nonexistent", "\udcff", "9" * 30))
    found = draw(st.dictionaries(st.sampled_from(names), value, min_size=1, max_size=3))
    if draw(st.booleans()):
        found["WORLD_SIZE"] = draw(st.sampled_from(("", "x", "-1", "0", "1", "1.5", "\u0663")))
    command = draw(st.sampled_from((("status", "--run", "base"), ("methods",), _pick("good.jsonl"))))
    return Trial(command, {"good.jsonl": GOOD}, found)


FILES = (
    "run.yaml",
    "history.jsonl",
    "pool/_manifest.json",
    "pool/part-00000.parquet",
    "round-01/scores/random.parquet",
    "round-01/probabilities/random.parquet",
    "round-01/selection.parquet",
    "sources.json",
)


@st.composite
def damage_trials(draw: st.DrawFn) -> Trial:
    """A finished run of which a byte was changed, or a file cut off."""
    place = st.tuples(st.integers(0, 20_000), st.binary(max_size=2))
    damage = draw(st.dictionaries(st.sampled_from(FILES), place, min_size=1, max_size=2))
    command = draw(
        st.sampled_from(
            (
                ("status", "--run", "base"),
                ("inspect", "base"),
                ("inspect", "base", "--row", "3"),
                ("export", "--run", "base", "--to", "again.jsonl"),
                ("select", "--run", "base", "--round", "1", "--name", "other", "fraction=0.25"),
                ("report", "runs/base"),
                ("compare", "base"),
            )
        )
    )
    return Trial(command, damage=damage)


trials = st.one_of(
    setting_trials(),
    yaml_trials(),
    component_trials(),
    data_trials(),
    name_trials(),
    environment_trials(),
    damage_trials(),
)
