"""What of entries and columns is passed over or read otherwise: said, counted, and the same in doctor."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import dataflex, done
from data_fixtures import Lines, alpaca_rows, byte_tokenizer, write_jsonl

from dataflex_pipeline.data import DataSettings, prepare, scan_sources
from dataflex_pipeline.errors import DataError


def settings(folder: Path, *names: str, **more) -> DataSettings:
    return replace(DataSettings(names, str(folder), "chatml", 512, None), **more)


def scan(folder: Path, *names: str, **more):
    return scan_sources(settings(folder, *names, **more))


def entries(folder: Path, **made) -> None:
    (folder / "dataset_info.json").write_text(json.dumps(made))


def prepared(folder: Path, *names: str, **more):
    """Return the table, its rows as (messages, reason) and what was said."""
    byte_tokenizer(folder / "tokenizer", extra=("<|im_start|>", "<|im_end|>"))
    wanted, said = settings(folder, *names, **more), Lines()
    found = scan_sources(wanted)
    table = prepare(wanted, found, str(folder / "tokenizer"), "d", folder / "out", "pool", said)
    rows = pa.Table.from_batches(table.blocks(), table.schema).to_pylist()
    return table, rows, said.said


def turns(row) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in row["messages"]]


def openai(*contents: str):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def sharegpt(*contents: str):
    roles = ("human", "gpt") * len(contents)
    return [{"from": role, "value": text} for role, text in zip(roles, contents, strict=False)]


# Entries of dataset_info.json


def test_keys_of_an_entry_without_a_meaning_here_are_said(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(2))
    entries(
        tmp_path,
        old={"file_name": "rows.jsonl", "load_from": "file", "ranking": False, "ms_hub_url": "a/b"},
        hub_only={"file_name": "rows.jsonl", "subset": "en", "revision": "main", "folder": "x"},
    )
    info = "in its entry of dataset_info.json is not used"
    assert scan(tmp_path, "old").notices == [
        f"data set 'old': load_from: file {info} (file_name or hf_hub_url says where the rows come from)",
        f"data set 'old': ms_hub_url: a/b {info} (data is fetched from the Hugging Face hub only)",
    ]
    assert scan(tmp_path, "hub_only").notices == [
        f"data set 'hub_only': {key}: {value} {info} (rows come from file_name, not from the hub)"
        for key, value in (("subset", "en"), ("folder", "x"), ("revision", "main"))
    ]


def test_the_checksum_of_an_entry_is_checked(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(2))
    right = hashlib.sha1(path.read_bytes()).hexdigest()
    entries(
        tmp_path,
        right={"file_name": "rows.jsonl", "file_sha1": right.upper()},
        wrong={"file_name": "rows.jsonl", "file_sha1": "0" * 40},
    )
    assert scan(tmp_path, "right").notices == []
    assert scan(tmp_path, "wrong").notices == [
        f"data set 'wrong': file_sha1 says {'0' * 40}, and {path} has {right}: it is another file than the "
        "entry describes, and is read as it is"
    ]


def test_the_revision_of_an_entry_is_loaded(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, **more):
        asked.append((*names, more))
        return datasets.Dataset.from_list(alpaca_rows(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("dataflex_pipeline.data.sources.hub.hub_reachable", lambda: True)
    entries(
        tmp_path, x={"hf_hub_url": "owner/x", "revision": "v1.2", "file_name": "x.json", "ms_hub_url": "y/x"}
    )
    found = scan(tmp_path, "x")
    assert {each[1]["revision"] for each in asked} == {"v1.2"}
    assert found.notices == [
        "data set 'x': ms_hub_url: y/x in its entry of dataset_info.json is not used (data is fetched "
        "from the Hugging Face hub only)",
        "data set 'x': file_name: x.json in its entry of dataset_info.json is not used (hf_hub_url comes "
        "first)",
    ]


def test_formatting_openai_reads_messages(tmp_path):
    write_jsonl(tmp_path / "oai.jsonl", [{"messages": openai("hi", "ho")}])
    entries(
        tmp_path,
        oai={"file_name": "oai.jsonl", "formatting": "openai", "columns": {"messages": "messages"}},
        bare={"file_name": "oai.jsonl", "formatting": "openai"},
    )
    for name in ("oai", "bare"):
        [scanned] = scan(tmp_path, name).sources
        assert dict(scanned.layout.columns) == {"messages": "messages"}
        assert (scanned.layout.tags["role_tag"], scanned.layout.tags["assistant_tag"]) == (
            "role",
            "assistant",
        )
        assert scanned.notices == ()


def test_an_entry_that_changes_the_meaning_of_rows_is_refused_by_name(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", alpaca_rows(2))
    for entry, message in (
        (
            {"columns": {"prompt": "instruction", "chosen": "output", "rejected": "input"}},
            "sets columns: chosen",
        ),
        ({"ranking": True}, "sets ranking: true"),
        ({"columns": ["prompt"]}, "sets columns"),
        ({"stage": "rm"}, "has the key 'stage'"),
    ):
        entries(tmp_path, x={"file_name": "rows.jsonl", **entry})
        with pytest.raises(DataError, match=message):
            scan(tmp_path, "x")


def test_a_declared_column_of_images_refuses_rows_that_fill_it(tmp_path):
    rows = [
        {**row, "pictures": pictures} for row, pictures in zip(alpaca_rows(2), ([], ["a.png"]), strict=True)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = {"prompt": "instruction", "query": "", "response": "output", "images": "pictures"}
    entries(tmp_path, x={"file_name": "rows.jsonl", "columns": columns})
    table, [text, image], _ = prepared(tmp_path, "x")
    assert (text["valid"], image["valid"]) == (True, False)
    assert image["reason"] == "the row has images, and only text is trained on"
    assert table.summary["reasons"] == {image["reason"]: 1}


def test_declared_columns_that_are_empty_or_not_there_are_said(tmp_path):
    rows = [{"instruction": "q", "output": "a", "images": [], "sytem": "s"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    columns = {"prompt": "instruction", "response": "output", "images": "images", "system": "system"}
    entries(tmp_path, x={"file_name": "rows.jsonl", "columns": columns})
    assert scan(tmp_path, "x").notices == [
        "data set 'x': columns says images: images, and 'images' is empty in every row, so rows are "
        "read as text",
        "data set 'x': columns says system: system, and no row has a column 'system', so there is none. "
        "Did you mean 'sytem'?",
    ]


def test_a_declared_kto_tag_refuses_the_bad_answers(tmp_path):
    write_jsonl(
        tmp_path / "rows.jsonl", [{"messages": openai("q", "a"), "good": good} for good in (True, False)]
    )
    entries(
        tmp_path,
        x={
            "file_name": "rows.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "good"},
        },
    )
    _, [good, bad], _ = prepared(tmp_path, "x")
    assert (good["valid"], bad["valid"]) == (True, False)
    assert bad["reason"].startswith("kto_tag is false")


# Columns

EXTRA = {
    "instruction": "Add 2 and 3.",
    "input": "SCRATCH: the answer is 5",
    "system": "internal note",
    "history": [["old q", "old a"]],
    "output": "5",
}


def test_an_entry_that_lists_columns_has_only_those_read(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [EXTRA, EXTRA])
    entries(
        tmp_path, t={"file_name": "rows.jsonl", "columns": {"prompt": "instruction", "response": "output"}}
    )
    table, rows, said = prepared(tmp_path, "t")
    assert [turns(row) for row in rows] == [[("user", "Add 2 and 3."), ("assistant", "5")]] * 2
    lines = [
        f"data set 't': the column '{name}' is not used (columns does not list it); elsewhere it is {meaning}"
        for name, meaning in (
            ("input", "the prompt, or a part of it"),
            ("system", "the system prompt"),
            ("history", "earlier turns, as [prompt, response] pairs"),
        )
    ]
    assert said[:3] == lines
    assert table.summary["notices"] == lines
    assert table.summary["passed_over"] == {"t": {"input": 2, "system": 2, "history": 2}}


def test_a_plain_file_has_its_columns_found_by_name(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [EXTRA])
    table, [row], _ = prepared(tmp_path, "rows")
    assert turns(row) == [
        ("system", "internal note"),
        ("user", "old q"),
        ("assistant", "old a"),
        ("user", "Add 2 and 3.\nSCRATCH: the answer is 5"),
        ("assistant", "5"),
    ]
    assert table.summary["notices"] == []
    assert table.summary["passed_over"] == {}


def test_an_entry_without_columns_has_them_found_by_name_and_said(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [EXTRA])
    entries(tmp_path, t={"file_name": "rows.jsonl"})
    found = scan(tmp_path, "t")
    assert dict(found.sources[0].layout.columns)["history"] == "history"
    assert found.notices == [
        f"data set 't': its entry lists no columns; the column '{name}' is read as what it is named"
        for name in ("history", "system")
    ]


def test_data_columns_are_a_list_too(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [EXTRA])
    found = scan(tmp_path, "rows", columns={"prompt": "instruction", "response": "output"})
    assert dict(found.sources[0].layout.columns) == {"prompt": "instruction", "response": "output"}
    assert found.passed_over == {"rows": {"input": 1, "system": 1, "history": 1}}
    only_system = scan(tmp_path, "rows", columns={"system": "input"})
    assert dict(only_system.sources[0].layout.columns) == {
        "history": "history",
        "system": "input",
        "prompt": "instruction",
        "query": "input",
        "response": "output",
    }


def test_columns_with_a_meaning_elsewhere_are_said_and_counted(tmp_path):
    beside = {
        "sample_weight": 0.5,
        "input_ids": [1, 2],
        "attention_mask": [1, 1],
        "chosen": "c",
        "split": "test",
        "text": "",
        "id": 7,
    }
    rows = [{"messages": openai("q", "a"), **beside}, {"messages": openai("q", "a"), "sample_weight": None}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = scan(tmp_path, "rows")
    assert found.notices == [
        "data set 'rows': the column 'sample_weight' is not used; elsewhere it is the row's weight in the "
        "loss; here weights come from the selection",
        "data set 'rows': the column 'attention_mask' is not used; elsewhere it is a row that is tokenised "
        "already; here rows are tokenised from their text",
        "data set 'rows': the column 'chosen' is not used; elsewhere it is the better answer of a "
        "preference pair",
        "data set 'rows': the column 'split' is not used; elsewhere it is the split that the row belongs to",
    ]
    assert found.passed_over == {"rows": {"sample_weight": 1, "attention_mask": 1, "chosen": 1, "split": 1}}


def test_a_system_column_beside_a_system_turn_is_said(tmp_path):
    system = {"role": "system", "content": "turn"}
    rows = [
        {"messages": [system, *openai("q", "a")], "system": "column"},
        {"messages": openai("q", "b"), "system": "column"},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    table, made, said = prepared(tmp_path, "rows")
    assert [turns(row)[0] for row in made] == [("system", "turn"), ("system", "column")]
    line = "data set 'rows': some rows begin with a system turn and fill 'system' too; the turn is read there"
    assert said[0] == line
    assert table.summary["passed_over"] == {"rows": {"system": 1}}


# Formats


@pytest.mark.parametrize("empty", [[], None, [None], "", "[]", [{}]])
@pytest.mark.parametrize("kind", ["openai", "sharegpt"])
def test_keys_are_told_from_the_first_list_with_a_turn(tmp_path, empty, kind):
    rows = [
        {"messages": {"openai": openai, "sharegpt": sharegpt}[kind](f"Say {n}.", f"{n}.")} for n in range(3)
    ]
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": empty}, *rows])
    _, made, _ = prepared(tmp_path, "rows")
    assert [row["valid"] for row in made] == [False, True, True, True]
    assert turns(made[3]) == [("user", "Say 2."), ("assistant", "2.")]


FILLED = {
    "conversations": {"conversations": sharegpt("Say it.", "It.")},
    "instruction": {"instruction": "Say it.", "input": "", "output": "It."},
    "prompt": {"prompt": "Say it.", "completion": "It."},
}


@pytest.mark.parametrize("other", FILLED)
@pytest.mark.parametrize("empty", [None, []])
def test_the_columns_that_are_filled_are_read(tmp_path, other, empty):
    write_jsonl(tmp_path / "rows.jsonl", [{"messages": empty, **FILLED[other]}] * 3)
    table, made, _ = prepared(tmp_path, "rows")
    assert [turns(row) for row in made] == [[("user", "Say it."), ("assistant", "It.")]] * 3
    assert table.summary["notices"] == []


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_several_formats_in_one_file_are_all_read(tmp_path, suffix):
    rows = [{"messages": openai("Say it.", "It.")}, *FILLED.values()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in names} for row in rows] * 2
    if suffix == ".jsonl":
        write_jsonl(tmp_path / "rows.jsonl", rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    table, made, _ = prepared(tmp_path, f"rows{suffix}")
    assert [turns(row) for row in made] == [[("user", "Say it."), ("assistant", "It.")]] * 8
    assert len({row["row_id"] for row in made}) == 1
    assert table.summary["valid"] == 8
    assert table.summary["notices"] == []


def test_rows_that_fill_two_formats_say_which_is_read(tmp_path):
    both = {"messages": openai("A?", "A."), "instruction": "B?", "output": "B."}
    write_jsonl(tmp_path / "rows.jsonl", [both, {**both, "messages": None}, {"messages": both["messages"]}])
    table, made, _ = prepared(tmp_path, "rows")
    assert [turns(row)[1][1] for row in made] == ["A.", "B.", "A."]
    assert table.summary["notices"] == [
        "data set 'rows': some rows fill both 'messages' and 'output'; 'messages' is read there"
    ]
    assert table.summary["passed_over"] == {"rows": {"output": 1}}


def test_the_formats_of_a_source_are_part_of_what_it_is(tmp_path):
    from dataflex_pipeline.data.formats.layout import Layout

    rows = [{"messages": openai("A?", "A.")}, FILLED["instruction"]]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    [scanned] = scan(tmp_path, "rows").sources
    assert [each.kind for each in scanned.layout.all] == ["conversation", "alpaca"]
    again = Layout.from_plain(json.loads(json.dumps(scanned.layout.as_plain())))
    assert again.as_plain() == scanned.layout.as_plain()
    assert [again.of(row).kind for row in rows] == ["conversation", "alpaca"]


# Commands


def test_doctor_and_the_prepare_step_say_the_same(tmp_path, monkeypatch, tiny_demo):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    lines = tiny_demo.pool.read_text().splitlines()[:20]
    (tmp_path / "data" / "rows.jsonl").write_text(
        "".join(json.dumps({**json.loads(line), "sample_weight": 2}) + "\n" for line in lines)
    )
    (tmp_path / "data" / "notes.tsv").write_text("x")
    entries(tmp_path, some={"file_name": "data", "num_samples": 12, "load_from": "file"})
    given = [
        "dataset=some",
        "dataset_dir=.",
        f"model_name_or_path={tiny_demo.model}",
        "component_name=random",
    ]
    given += ["warmup_step=1", "per_device_train_batch_size=2", "gradient_accumulation_steps=1"]
    ran = dataflex("doctor", *given, "--json")
    assert ran.code == 0, ran.out + ran.err
    found = [each["found"] for each in json.loads(ran.out)["findings"] if each["check"] == "pool data"]
    assert len(found) == 4
    out = done("warmup", *given, "--run", "r")
    manifest = json.loads((tmp_path / "runs" / "r" / "pool" / "_manifest.json").read_text())
    assert manifest["summary"]["notices"][:4] == found
    joined = " ".join(out.split())
    assert all(" ".join(line.split()) in joined for line in found)
    again = done("warmup", *given, "--run", "r")
    assert "up to date" in again


def test_a_context_beside_prompt_and_answer_is_said_and_counted(tmp_path):
    """Dolly's columns, and the same text beside an alpaca row."""
    dolly = [{"instruction": f"Q{n}", "context": f"C{n}" if n else "", "response": f"A{n}"} for n in range(3)]
    write_jsonl(tmp_path / "dolly.jsonl", dolly)
    write_jsonl(tmp_path / "alpaca.jsonl", [{**each, "context": "C"} for each in alpaca_rows(2)])
    columns = {"prompt": "instruction", "response": "response"}
    settings = DataSettings(("dolly",), str(tmp_path), "chatml", 128, None, columns=columns)
    found = scan_sources(settings)
    assert found.notices == [
        "data set 'dolly': the column 'context' is not used (columns does not list it); elsewhere it is the "
        "prompt, or a part of it"
    ]
    assert found.passed_over == {"dolly": {"context": 2}}
    plain = scan_sources(replace(settings, datasets=("alpaca",), columns={}))
    assert plain.notices == [
        "data set 'alpaca': the column 'context' is not used; elsewhere it is the prompt, or a part of it"
    ]
    assert plain.passed_over == {"alpaca": {"context": 2}}
