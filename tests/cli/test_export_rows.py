"""`dataflex export` of rows alone: any selection, trained or not, for this program and for other trainers."""

import json
import shutil

import datasets
import pandas as pd
import pytest
import yaml
from cli_runs import copied, done, refused, small, snapshot
from data_fixtures import write_jsonl
from selections import row_ids, selected_lines, write_selection

from dataflex_pipeline import Run
from dataflex_pipeline.api import Silent
from dataflex_pipeline.data.prepare import prepare
from dataflex_pipeline.data.scan import scan_sources
from dataflex_pipeline.data.settings import DataSettings
from dataflex_pipeline.errors import DataError, UserError
from dataflex_pipeline.export.subset import write_subset
from dataflex_pipeline.store.parts import PartedTable

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, tiny_demo):
    """A copy of the finished run; round 3 has a selection that is not trained: 7 rows, one of them twice."""
    folder = copied(tiny_demo, here / "runs")
    pool = PartedTable.open(folder / "pool")
    write_selection(folder / "round-03/selection.parquet", pool, [9, 3, 40, 9, 7, 8, 11], [2.0, *[5 / 6] * 6])
    write_selection(folder / "round-03/selections/other/selection.parquet", pool, [5, 4])
    return folder


def prepared(tiny_demo, names, folder):
    settings = DataSettings(tuple(map(str, names)), "nowhere", "qwen3", 2048, None)
    return prepare(
        settings, scan_sources(settings, Silent()), str(tiny_demo.model), "x", folder, "pool", Silent()
    )


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def loaded(path, cache, kind="json"):
    """Return the rows as a plain user of `datasets` has them."""
    return datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(cache))


def pool_of(tiny_demo, folder, rows):
    write_jsonl(folder / "mine.jsonl", rows)
    return prepared(tiny_demo, [folder / "mine.jsonl"], folder / "pool")


# Which rows


def test_the_last_selection_is_exported_though_nothing_is_trained_on_it(here, run, tiny_demo):
    shutil.rmtree(run / "round-01" / "checkpoint")
    shutil.rmtree(run / "round-02" / "checkpoint")
    text = done("export", "base", "--to", "rows.jsonl")
    assert "7 lines: the rows selected for round 3" in " ".join(text.split())
    lines = lines_of(here / "rows.jsonl")
    assert [line["_row"] for line in lines] == [9, 3, 40, 9, 7, 8, 11]
    assert [line["_rank"] for line in lines] == list(range(1, 8))
    assert [line["_score"] for line in lines] == [0, -1, -2, -3, -4, -5, -6]
    assert [line["_weight"] for line in lines] == pytest.approx([2, *[5 / 6] * 6])
    assert {line["_round"] for line in lines} == {3}
    assert {line["_source"] for line in lines} == {"pool"}
    source = lines_of(tiny_demo.pool)
    assert [line["instruction"] for line in lines] == [source[line["_row"]]["instruction"] for line in lines]
    pool = PartedTable.open(run / "pool")
    assert [line["_row_id"] for line in lines] == [row_ids(pool)[line["_row"]] for line in lines]
    if "line" in pool.schema.names:
        assert [line["_line"] for line in lines] == [line["_row"] + 1 for line in lines]
        assert {line["_file"] for line in lines} == {"pool.jsonl"}
    assert loaded(here / "rows.jsonl", here / "cache").to_list() == lines


def test_another_round_a_named_selection_and_the_warm_up(here, run):
    done("export", "base", "--to", "two.jsonl", "--round", 2)
    assert {line["_round"] for line in lines_of(here / "two.jsonl")} == {2}
    done("export", "base", "--to", "other.jsonl", "--selection", "other")
    assert [line["_row"] for line in lines_of(here / "other.jsonl")] == [5, 4]
    assert "Round 3 has other" in refused(
        here, "export", "base", "--to", "o.jsonl", "--round", 3, "--selection", "x"
    )
    done("export", "base", "--to", "warm.jsonl", "--warm-up")
    warm = lines_of(here / "warm.jsonl")
    assert [line["_round"] for line in warm[:7]] == [3] * 7
    index = pd.read_parquet(run / "round-00/index.parquet")
    assert [line["_row"] for line in warm[7:]] == list(dict.fromkeys(index["row"]))
    assert {(line["_round"], line["_score"]) for line in warm[7:]} == {(0, None)}
    done("export", "base", "--to", "only.jsonl", "--round", 0)
    assert [line["_row"] for line in lines_of(here / "only.jsonl")] == [line["_row"] for line in warm[7:]]


def test_a_run_without_any_selection_says_so(here, tiny_demo):
    done("warmup", *small(tiny_demo), "--run", "base", "runs_dir=runs")
    error = refused(here, "export", "base", "--what", "data")
    assert "No round of runs/base has a selection" in error
    assert "Only what is trained" not in error


def test_a_damaged_selection_is_refused(here, run):
    path = next(
        path
        for path in (run / "round-02/selection.parquet", run / "round-02/index.parquet")
        if path.is_file()
    )
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert path.name in refused(here, "export", "base", "--to", "again.jsonl", "--round", 2)
    assert not (here / "again.jsonl").exists()


# Files and folders


def test_a_file_of_ones_own_is_never_written_over(here, run):
    (here / "rows.jsonl").write_text("mine\n")
    before = snapshot(here)
    assert "rows.jsonl exists, and holds something else" in refused(
        here, "export", "base", "--to", "rows.jsonl"
    )
    assert snapshot(here) == before
    assert "is now" in done("export", "base", "--to", "rows.jsonl", "--overwrite")
    (aside,) = here.glob("rows.jsonl.old-*")
    assert aside.read_text() == "mine\n"
    before = snapshot(here)
    assert "up to date" in done("export", "base", "--to", "rows.jsonl")
    assert snapshot(here) == before


def test_a_folder_remembers_what_it_was_made_from(here, run):
    done("export", "base", "--what", "data", "--to", "out")
    assert "up to date" in done("export", "base", "--what", "data", "--to", "out")
    write_selection(run / "round-03/selection.parquet", PartedTable.open(run / "pool"), [1])
    error = refused(here, "export", "base", "--what", "data", "--to", "out")
    assert "holds another export" in error
    assert "selected.round 3" in error
    error = refused(here, "export", "base", "--what", "data", "--to", "out", "--for", "messages")
    assert 'form: (not set) -> "messages"' in error


def test_several_formats_have_a_file_each_beside_the_one_that_was_named(here, tiny_demo):
    rows = [
        {"instruction": "a", "output": "b"},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
        {"prompt": "e", "completion": "f"},
    ]
    write_jsonl(here / "mixed.jsonl", rows * 2)
    settings = (
        "dataset=mixed.jsonl",
        f"model_name_or_path={tiny_demo.model}",
        "warmup_step=1",
        "update_times=1",
    )
    done("warmup", *settings, "per_device_train_batch_size=2", "--run", "mixed")
    write_selection(
        here / "runs/mixed/round-01/selection.parquet", PartedTable.open(here / "runs/mixed/pool"), [4, 0, 2]
    )
    text = " ".join(done("export", "mixed", "--to", "best.jsonl").split())
    for name in ("alpaca", "messages", "prompt_completion"):
        assert f"best-{name}.jsonl (1 rows)" in text
    assert not (here / "best.jsonl").exists()
    ids = [
        line["_row_id"]
        for name in ("alpaca", "messages", "prompt_completion")
        for line in lines_of(here / f"best-{name}.jsonl")
    ]
    names = [here / f"best-{name}.jsonl" for name in ("alpaca", "messages", "prompt_completion")]
    assert row_ids(prepared(tiny_demo, names, here / "back")) == ids
    assert len(set(ids)) == 3


def test_in_python(here, run):
    opened = Run.open(run)
    assert opened.export("rows.jsonl", selection="other") == (here / "rows.jsonl").relative_to(here)
    assert [outcome.done for outcome in opened.outcomes] == [True]
    assert opened.export("out", what="data", trainer="messages", warm_up=True).name == "out"
    with pytest.raises(UserError, match="'llamafactory'"):
        opened.export("b.jsonl", trainer="llamafactory")


# The card, and the hub


def test_the_card_of_rows_is_that_of_a_data_set(here, run, monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.pipeline.export.model_digest", None)  # nothing of a model is read
    monkeypatch.setattr("dataflex_pipeline.pipeline.export.origin_of_run", None)
    done("export", "base", "--what", "data", "--to", "out")
    card = (here / "out/README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["configs"] == [{"config_name": "default", "data_files": "data/selected.parquet"}]
    assert header["size_categories"] == ["n<1K"]
    assert "base_model" not in header
    assert "license" not in header
    assert "6 of the 200 usable rows of pool.jsonl (3 %)" in card
    assert "| 3 | loss" in card
    assert "| pool | 7 | 200 |" in card
    assert "p_i = (w_i + eps)^(1/T)" in card
    assert "Seed: 42" in card
    assert "dataflex select --round 3 --config selection.yaml" in card
    assert "`_row_id`: content hash" in card
    assert str(here) not in card
    rows = datasets.load_dataset(str(here / "out"), split="train", cache_dir=str(here / "cache"))
    assert rows["_row"] == [9, 3, 40, 9, 7, 8, 11]  # each once: the lines are not read beside the columns


# Other trainers


MIXED = [
    {"instruction": "Say", "input": "it", "output": "It.", "system": "Be brief.", "history": [["a", "b"]]},
    {
        "messages": [
            {"role": "user", "content": "Look twice."},
            {
                "role": "assistant",
                "content": "So.",
                "reasoning_content": "Two looks.",
                "tool_calls": [
                    {"id": "x", "type": "function", "function": {"name": "look", "arguments": {"at": None}}},
                    {"id": "y", "type": "function", "function": {"name": "look", "arguments": '{"deep": 1}'}},
                ],
            },
            {"role": "tool", "content": "second", "tool_call_id": "y"},
            {"role": "tool", "content": "first", "tool_call_id": "x"},
            {"role": "assistant", "content": "Seen."},
        ],
        "tools": TOOLS,
        "chat_template_kwargs": {"enable_thinking": True},
    },
    {
        "conversations": [
            {"from": "human", "value": "Look."},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 3}}'},
            {"from": "observation", "value": "dark"},
            {"from": "gpt", "value": "Dark."},
        ],
        "tools": json.dumps(TOOLS),
    },
    {"prompt": "Go on", "completion": "on"},
    {
        "prompt": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Two?"},
        ],
        "completion": [{"role": "assistant", "content": "Three."}],
    },
]


def test_messages_for_trl_and_axolotl(here, tiny_demo):
    pool = pool_of(tiny_demo, here, MIXED)
    assert pool.summary["valid"] == 5, pool.summary["reasons"]
    said = []
    weights = [1.0, 1.5, 1.0, 0.5, 1.0]
    made = write_subset(pool, selected_lines(pool, [4, 3, 2, 1, 0], weights), here, said.append, "messages")
    assert made.files == {"selected.jsonl": 5}
    lines = lines_of(here / "selected.jsonl")
    assert all(set(line) >= {"messages", "tools", "chat_template_kwargs", "_row_id"} for line in lines)
    by_row = {line["_row"]: line for line in lines}
    assert by_row[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "Say\nit"},
        {"role": "assistant", "content": "It."},
    ]
    assert by_row[1]["messages"][1]["reasoning_content"] == "Two looks."
    assert by_row[1]["messages"][1]["content"] == "So."
    assert [call["function"]["arguments"] for call in by_row[1]["messages"][1]["tool_calls"]] == [
        {"at": None},
        {"deep": 1},
    ]
    ids = [call["id"] for call in by_row[1]["messages"][1]["tool_calls"]]
    assert [turn["tool_call_id"] for turn in by_row[1]["messages"][2:4]] == ids[::-1]
    assert by_row[1]["chat_template_kwargs"] == {"enable_thinking": True}
    assert json.loads(by_row[1]["tools"]) == TOOLS
    assert by_row[3]["tools"] == "[]"
    assert [turn.get("train") for turn in by_row[4]["messages"]] == [None, False, None, None]
    assert any("know no weights" in line for line in said)
    assert any("1 rows have turns marked train: false" in line for line in said)
    for name in ("selected.jsonl", "selected.parquet"):
        back = prepared(tiny_demo, [here / name], here / "back" / name)
        assert row_ids(back) == [row_ids(pool)[row] for row in (4, 3, 2, 1, 0)]
        learnt = [each for block in pool.blocks(["labels"]) for each in block.column("labels").to_pylist()]
        again = [each for block in back.blocks(["labels"]) for each in block.column("labels").to_pylist()]
        assert again == learnt[::-1]
    rows = loaded(here / "selected.jsonl", here / "cache")
    assert [row["messages"] for row in rows] == [line["messages"] for line in lines]


def test_trl_trains_on_messages(here, tiny_demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    pool = pool_of(tiny_demo, here, MIXED)
    write_subset(pool, selected_lines(pool, range(5)), here, print, "trl")
    tokenizer = AutoTokenizer.from_pretrained(tiny_demo.model)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}\n{% endfor %}"
    )
    settings = SFTConfig(
        str(here / "t"), max_steps=1, report_to=[], use_cpu=True, per_device_train_batch_size=2
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_demo.model)
    rows = loaded(here / "selected.jsonl", here / "cache")
    trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().training_loss > 0
    texts = [tokenizer.decode(each["input_ids"]) for each in trainer.train_dataset]
    assert '"name": "look"' in texts[1]
    assert "tool: second" in texts[1]


def test_llama_factory_gets_entries_and_what_it_cannot_read_as_sharegpt(here, tiny_demo):
    plain = [
        MIXED[0],
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
        MIXED[2],
        MIXED[3],
        {"instruction": "x", "output": "y", "tools": TOOLS},
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So.", "thinking": "Hm."},
            ]
        },
    ]
    pool = pool_of(tiny_demo, here, plain[:5])
    made = write_subset(pool, selected_lines(pool, range(5)), here, print, "llama-factory")
    entries = dict(made.entries)
    assert entries["selected-prompt_completion"] == {
        "file_name": "selected-prompt_completion.jsonl",
        "formatting": "alpaca",
        "columns": {"prompt": "prompt", "response": "completion"},
    }
    assert entries["selected-alpaca"]["columns"]["history"] == "history"
    assert entries["selected-messages"]["tags"]["user_tag"] == "user"
    for stem, entry in entries.items():  # every column that an entry names is there, in every line
        for line in lines_of(here / f"{stem}.jsonl"):
            assert set(entry["columns"].values()) <= set(line)
            assert isinstance(line.get("tools", ""), str)
    (here / "dataset_info.json").write_text(json.dumps(entries))
    settings = DataSettings(tuple(entries), str(here), "qwen3", 2048, None)
    back = prepare(
        settings, scan_sources(settings, Silent()), str(tiny_demo.model), "x", here / "back", "pool", Silent()
    )
    assert sorted(row_ids(back)) == sorted(row_ids(pool))

    (here / "again").mkdir()
    pool = pool_of(tiny_demo, here / "again", plain[5:])
    said = []
    made = write_subset(pool, selected_lines(pool, [0]), here, said.append, "llama-factory", "think")
    (line,) = lines_of(here / "think.jsonl")
    assert line["conversations"][1] == {"from": "gpt", "value": "<think>\nHm.\n</think>\n\nSo."}
    assert made.entries["think"]["columns"]["messages"] == "conversations"
    assert any("written as sharegpt" in text for text in said)


@pytest.mark.parametrize(
    ("row", "trainer", "reason"),
    [
        (MIXED[4], "llama-factory", "a turn that is not trained on"),
        (MIXED[1], "llama-factory", "two results of tools in a row"),
    ],
)
def test_what_a_trainer_has_no_form_for_is_refused_by_name(here, tiny_demo, row, trainer, reason):
    pool = pool_of(tiny_demo, here, [row])
    with pytest.raises(DataError, match=reason) as error:
        write_subset(pool, selected_lines(pool, [0]), here, print, trainer)
    assert row_ids(pool)[0] in error.value.why


def test_weights_for_ms_swift(here, tiny_demo):
    pool = pool_of(tiny_demo, here, MIXED)
    said = []
    write_subset(pool, selected_lines(pool, [0, 4], [0.5, 1.0]), here, said.append, "ms-swift")
    weighted, plain = lines_of(here / "selected.jsonl")
    marks = [turn.get("loss_scale") for turn in weighted["messages"]]
    assert marks == [None, None, 0.5, None, 0.5]
    assert [turn.get("loss") for turn in plain["messages"]] == [None, False, None, None]
    assert any("--is_binary_loss_scale false" in line for line in said)
    write_subset(pool, selected_lines(pool, [1]), here, said.append, "ms-swift", "calls")
    (line,) = lines_of(here / "calls.jsonl")
    assert [turn["role"] for turn in line["messages"]] == [
        "user",
        "assistant",
        "tool_call",
        "tool_call",
        "tool_response",
        "tool_response",
        "assistant",
    ]
    assert [turn["content"] for turn in line["messages"][4:6]] == [
        "first",
        "second",
    ]  # in the order of the calls
    with pytest.raises(DataError, match="a weight other than 1, on a turn that calls tools"):
        write_subset(pool, selected_lines(pool, [1], [2.0]), here, said.append, "ms-swift", "no")


def test_an_entry_of_ones_own_file_stays_as_it_is(here, run):
    text = done("export", "base", "--to", "rows.jsonl", "--for", "llama-factory")
    info = json.loads((here / "dataset_info.json").read_text())
    assert info["rows"]["file_name"] == "rows.jsonl"
    assert "dataset: rows" in text
    (here / "dataset_info.json").write_text('{"mine": {"file_name": "m.json"}}')
    text = " ".join(done("export", "base", "--to", "more.jsonl", "--for", "llama-factory").split())
    assert json.loads((here / "dataset_info.json").read_text()) == {"mine": {"file_name": "m.json"}}
    assert "paste into it" in text
    assert '"file_name": "more.jsonl"' in text
