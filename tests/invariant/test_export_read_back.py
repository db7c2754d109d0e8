"""Random mixed pools, exported and read back: every row, with its row_id, in the order of the selection."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selections import row_ids, selected_lines

from dataflex_pipeline.api import Silent
from dataflex_pipeline.data.prepare import prepare
from dataflex_pipeline.data.scan import scan_sources
from dataflex_pipeline.data.settings import DataSettings
from dataflex_pipeline.data.sources.exported import EXPORT_MANIFEST
from dataflex_pipeline.errors import DataError
from dataflex_pipeline.export.subset import write_info, write_subset

WORDS = st.text(st.sampled_from("abc é\n\"'{}[]<>0"), min_size=1, max_size=8).filter(str.strip)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {"type": "object", "properties": {"at": {"default": None}}},
        },
    }
]
VALUES = st.one_of(st.none(), st.integers(-3, 3), st.booleans(), WORDS, st.just(0.5), st.just([1, None]))
ARGUMENTS = st.dictionaries(st.sampled_from(["at", "deep", "x"]), VALUES, max_size=2)
EXTRA = st.dictionaries(
    st.sampled_from(["tag", "score", "_row_id", "weight"]),
    st.one_of(st.none(), st.integers(0, 9), WORDS),
    max_size=2,
)


@st.composite
def alpaca(draw):
    row = {"instruction": draw(WORDS), "input": draw(st.one_of(st.just(""), WORDS)), "output": draw(WORDS)}
    if draw(st.booleans()):
        row["system"] = draw(st.one_of(st.none(), st.just(""), WORDS))
    if draw(st.booleans()):
        row["history"] = draw(st.lists(st.lists(WORDS, min_size=2, max_size=2), max_size=2))
    return row


@st.composite
def turns(draw, *, calls=True):
    made = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        made.append({"role": "user", "content": draw(WORDS)})
        if calls and draw(st.booleans()):
            function = {"name": "look", "arguments": draw(ARGUMENTS)}
            call = {"type": "function", "function": function}
            made.append(
                {"role": "assistant", "content": draw(st.one_of(st.none(), WORDS)), "tool_calls": [call]}
            )
            made.append({"role": "tool", "content": draw(WORDS)})
        answer = {"role": "assistant", "content": draw(WORDS)}
        mark = draw(st.sampled_from([None, "reasoning_content", "weight", "name"]))
        if mark is not None:
            answer[mark] = {"weight": 0}.get(mark) if mark == "weight" else "ann"
        made.append(answer)
    made[-1].pop("weight", None)
    return made


@st.composite
def messages(draw):
    row = {"messages": draw(turns())}
    if draw(st.booleans()):
        row["tools"] = draw(st.sampled_from([TOOLS, json.dumps(TOOLS), None, "", []]))
    if draw(st.booleans()):
        row["chat_template_kwargs"] = draw(st.sampled_from([{}, {"enable_thinking": False}, None]))
    return row


@st.composite
def sharegpt(draw):
    made = []
    for _ in range(draw(st.integers(1, 2))):
        made += [{"from": "human", "value": draw(WORDS)}, {"from": "gpt", "value": draw(WORDS)}]
    if draw(st.booleans()):
        call = json.dumps(
            {"name": "look", "arguments": draw(ARGUMENTS)}, indent=draw(st.sampled_from([None, 1]))
        )
        made[1:1] = [{"from": "function_call", "value": call}, {"from": "observation", "value": draw(WORDS)}]
    return {"conversations": made} | ({"system": draw(WORDS)} if draw(st.booleans()) else {})


@st.composite
def prompt_completion(draw):
    if draw(st.booleans()):
        return {"prompt": draw(WORDS), "completion": draw(WORDS)}
    asked = [*draw(turns()), {"role": "user", "content": draw(WORDS)}]
    return {"prompt": asked, "completion": [{"role": "assistant", "content": draw(WORDS)}]}


@st.composite
def preference(draw):
    """What unpaired preference looks like: a bad answer is refused, and so never selected."""
    row = draw(st.one_of(prompt_completion(), messages()))
    return row | {"label": draw(st.booleans())}


ROWS = st.one_of(alpaca(), messages(), sharegpt(), prompt_completion(), preference())


@st.composite
def pools(draw):
    """One to three files, each of one kind of rows or of several, one of them perhaps Parquet."""
    files = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from([alpaca(), messages(), sharegpt(), prompt_completion(), ROWS, ROWS]))
        rows = [draw(kind) | draw(EXTRA) for _ in range(draw(st.integers(1, 5)))]
        files.append((draw(st.sampled_from(["jsonl", "jsonl", "parquet"])), rows))
    return files


def written(folder: Path, files) -> list[str]:
    """Write the files of a pool; what Arrow cannot hold is written as lines."""
    names = []
    for number, (kind, rows) in enumerate(files):
        path = folder / f"file{number}.{kind}"
        try:
            if kind == "parquet":
                pq.write_table(pa.Table.from_pylist(rows), path)
        except (pa.ArrowException, OverflowError):
            path = path.with_suffix(".jsonl")
        if path.suffix == ".jsonl":
            write_jsonl(path, rows)
        names.append(str(path))
    return names


def prepared(tiny_demo, names, folder):
    given = DataSettings(tuple(map(str, names)), "nowhere", "chatml", 2048, None)
    scan = scan_sources(given, Silent())
    return prepare(given, scan, str(tiny_demo.model), "x", folder, "pool", Silent())


def labels(table):
    return [tuple(each) for block in table.blocks(["labels"]) for each in block.column("labels").to_pylist()]


def export(pool, rows, folder, trainer="original"):
    (folder / "data").mkdir(parents=True)
    said: list[str] = []
    made = write_subset(pool, selected_lines(pool, rows), folder / "data", said.append, trainer)
    write_info(folder / "data", made.entries)
    (folder / EXPORT_MANIFEST).write_text(json.dumps({"data": made.notes()}))
    return made, said


def usable(pool):
    valid = [each for block in pool.blocks(["valid"]) for each in block.column("valid").to_pylist()]
    return [row for row, good in enumerate(valid) if good]


@pytest.fixture
def places(tmp_path_factory):
    return lambda: tmp_path_factory.mktemp("mixed")


@given(files=pools(), data=st.data())
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
def test_a_mixed_pool_is_read_back(tiny_demo, places, files, data):
    folder = places()
    try:
        pool = prepared(tiny_demo, written(folder, files), folder / "pool")
    except DataError:  # a pool that cannot be read at all has nothing to export
        return
    ids = row_ids(pool)
    rows = data.draw(st.permutations(usable(pool)))
    rows = [*rows, *rows[:2]]  # drawn again, with replacement
    made, _ = export(pool, rows, folder / "out")
    expected = [ids[row] for row in rows]
    assert sum(made.files.values()) == len(rows)

    for given_name in ("out", "out/data"):
        back = prepared(tiny_demo, [folder / given_name], folder / "back" / given_name)
        lines = [
            json.loads(line)
            for name in made.files
            for line in (folder / "out" / "data" / name).read_text().splitlines()
        ]
        key = "selected_row_id" if any("selected_row_id" in line for line in lines) else "_row_id"
        assert row_ids(back) == [line[key] for line in lines]
        assert sorted(row_ids(back)) == sorted(expected)
        assert back.summary["valid"] == len(rows)

    for name in made.files:  # each file alone, both kinds of it, in rank order
        for suffix in (".jsonl", ".parquet"):
            path = (folder / "out" / "data" / name).with_suffix(suffix)
            alone = prepared(tiny_demo, [path], folder / "alone" / path.name)
            lines = (folder / "out" / "data" / name).read_text().splitlines()
            inside = [json.loads(line)["_row"] for line in lines]
            assert inside == [row for row in rows if row in set(inside)]
            assert row_ids(alone) == [ids[row] for row in inside]


@given(files=pools(), data=st.data())
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
def test_messages_teach_the_same(tiny_demo, places, files, data):
    folder = places()
    try:
        pool = prepared(tiny_demo, written(folder, files), folder / "pool")
    except DataError:
        return
    rows = data.draw(st.permutations(usable(pool)))
    made, said = export(pool, rows, folder / "out", "messages")
    assert made.files == {"selected.jsonl": len(rows)}
    ids, learnt = row_ids(pool), labels(pool)
    for path in (
        folder / "out",
        folder / "out" / "data" / "selected.jsonl",
        folder / "out/data/selected.parquet",
    ):
        back = prepared(tiny_demo, [path], folder / "back" / path.name)
        same = [one == ids[row] for one, row in zip(row_ids(back), rows, strict=True)]
        for number, each in enumerate(labels(back)):
            # a call whose text was written in a way of its own is written anew, which is said
            assert not same[number] or each == learnt[rows[number]]
        told = [line for line in said if "another row_id" in line]
        assert all(same) or told
        if told:
            assert same.count(False) == int(told[0].split()[0])
