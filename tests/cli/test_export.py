"""`dataflex export`: the model by its logits, the rows by reading them back, the card by what it may hold."""

import json
import shutil
import socket
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from cli_runs import copied, data, dataflex, done, finished, refused, small, snapshot
from selections import row_ids, selected_lines

from dataflex_pipeline.api import Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.data.prepare import prepare
from dataflex_pipeline.data.scan import scan_sources
from dataflex_pipeline.data.settings import DataSettings
from dataflex_pipeline.export.card import Facts, RoundLine, model_card, public_name, public_settings
from dataflex_pipeline.export.subset import ADDED, write_subset

GUIDES = Path(__file__).resolve().parents[1] / "guides"
ON = ("--run", "base", "runs_dir=runs")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def exported(tiny_demo, tmp_path_factory):
    """An export of the finished run; never write to it."""
    folder = tmp_path_factory.mktemp("exported")
    run = copied(tiny_demo, folder / "runs")
    text = done("export", run, f"export_dir={folder / 'out'}")
    return run, folder / "out", text


def logits(model, tokenizer):
    import torch

    ids = tokenizer("Say this in Velan.\nred lion sits", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


def with_adapter(base, adapter):
    """Return the logits of base and adapter, put together by transformers and peft alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return logits(model, AutoTokenizer.from_pretrained(base))


def reloaded(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return logits(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))


def assert_same(one, other, tolerance=1e-6):
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= tolerance * max(1.0, float(one.abs().max()))


# The model


def test_the_merged_model_is_base_and_adapter(exported, tiny_demo):
    run, out, _ = exported
    expected = with_adapter(tiny_demo.model, run / "round-02" / "checkpoint")
    assert_same(reloaded(out), expected)
    assert_same(with_adapter(tiny_demo.model, out / "adapter"), expected, 0)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = logits(AutoModelForCausalLM.from_pretrained(tiny_demo.model), AutoTokenizer.from_pretrained(out))
    assert float((base - expected).abs().max()) > 1e-3  # the training did something


def test_the_round_asked_for_is_exported(exported, tiny_demo, here):
    run, _, _ = exported
    text = done("export", run, "--round", 0, "--what", "model", "export_dir=first")
    assert_same(reloaded(here / "first"), with_adapter(tiny_demo.model, run / "round-00" / "checkpoint"))
    assert "of round 0, after 2 optimizer steps" in text
    assert not (here / "first" / "data").exists()


def test_the_best_checkpoint_is_taken_where_it_was_kept(here, tiny_demo):
    run = copied(tiny_demo, here / "runs")
    shutil.copytree(run / "round-00" / "checkpoint", run / "best")
    assert "the checkpoint, of round 2" in done("export", "base", "export_dir=last", "--what", "adapter")
    text = (run / "run.yaml").read_text()
    text = text.replace("load_best_model_at_end: false", "load_best_model_at_end: true")
    (run / "run.yaml").write_text(text.replace("eval_strategy: 'no'", "eval_strategy: epoch"))
    assert "the best checkpoint, of round 0" in done("export", "base", "export_dir=out")
    assert_same(reloaded(here / "out"), with_adapter(tiny_demo.model, run / "best"))
    assert not (here / "out" / "data").exists()  # it was trained on the warm-up's rows alone
    done("export", "base", "export_dir=more", "--warm-up")
    assert set(pd.read_parquet(here / "more/data/selected.parquet")["_round"]) == {0}


def test_all_weights(here, tiny_demo):
    settings = [each for each in small(tiny_demo) if not each.startswith("lora")]
    done("warmup", *settings, "finetuning_type=full", *ON)
    done("export", "base", "export_dir=out")
    assert_same(reloaded(here / "out"), reloaded(here / "runs/base/round-00/checkpoint"), 0)
    assert not (here / "out" / "adapter").exists()
    assert "There is no adapter" in refused(here, "export", "base", "--what", "adapter", "export_dir=b")


def test_an_export_is_in_the_number_format_of_the_base(here, tiny_demo):
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_demo.model, here / "half")
    AutoModelForCausalLM.from_pretrained(here / "half", dtype=torch.bfloat16).save_pretrained(here / "half")
    settings = [each for each in small(tiny_demo) if not each.startswith("model_name")]
    done("warmup", *settings, "model_name_or_path=./half", *ON)
    assert "weights in bfloat16" in done("export", "base", "export_dir=out")
    model = AutoModelForCausalLM.from_pretrained(here / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    expected = with_adapter(here / "half", here / "runs/base/round-00/checkpoint")
    assert_same(reloaded(here / "out").float(), expected.float(), 0.05)


def test_large_weights_come_in_several_files(here, tiny_demo, monkeypatch):
    from transformers import PreTrainedModel

    asked = []
    original = PreTrainedModel.save_pretrained

    def save(self, folder, max_shard_size, **more):
        asked.append(max_shard_size)
        return original(self, folder, max_shard_size="200KB", **more)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    copied(tiny_demo, here / "runs")
    done("export", "base", "--what", "model", "export_dir=out", "export_size=3")
    assert asked == ["3GB"]
    assert len(list((here / "out").glob("model-*.safetensors"))) > 1
    assert_same(reloaded(here / "out"), with_adapter(tiny_demo.model, here / "runs/base/round-02/checkpoint"))


def test_a_named_template_goes_into_the_tokenizer_and_ends_generation(here, tiny_demo):
    from transformers import AutoTokenizer, GenerationConfig

    from dataflex_pipeline.data.chat.labelled import ChatFormat

    for name in ("llama3", "chatml"):
        done("warmup", *small(tiny_demo), f"template={name}", "--run", name)
        done("export", name, "--what", "model", f"export_dir={name}")
        tokenizer = AutoTokenizer.from_pretrained(here / name)
        turns = [{"role": "user", "content": "What colour is grass?"}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        pool = pq.read_table(here / "runs" / name / "pool" / "part-00000.parquet").to_pylist()
        row = next(each for each in pool if each["valid"] and len(each["messages"]) == 2)
        asked = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_dict=False
        )
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        assert asked == row["input_ids"][:start]
        assert prompt[0] == row["input_ids"][0]
        stop = ChatFormat.load(str(tiny_demo.model), name).stop_ids
        generation = GenerationConfig.from_pretrained(here / name)
        ends = generation.eos_token_id
        assert len(stop) > 1 or stop[0] in (ends if isinstance(ends, list) else [ends])


def test_generation_settings_that_contradict_themselves_can_be_saved(here, tiny_demo):
    shutil.copytree(tiny_demo.model, here / "model")
    path = here / "model" / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}))
    settings = [each for each in small(tiny_demo) if not each.startswith("model_name")]
    done("warmup", *settings, "model_name_or_path=./model", *ON)
    assert "do_sample is set: true" in done("export", "base", "--what", "model", "export_dir=out")
    saved = json.loads((here / "out" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"]) == (True, 0.6)


# The rows


def test_the_selected_rows_are_those_of_the_indexes(exported):
    run, out, _ = exported
    rows = pd.read_parquet(out / "data" / "selected.parquet")
    assert rows["_round"].unique().tolist() == [1, 2]  # the warm-up's rows were not selected
    for number in (1, 2):
        ours = rows[rows["_round"] == number].reset_index(drop=True)
        scores = pd.read_parquet(run / f"round-{number:02d}/scores/loss.parquet")["score"]
        assert ours["_rank"].tolist() == list(range(1, len(ours) + 1))
        assert ours["_score"].tolist() == scores[ours["_row"]].tolist()
        selection = run / f"round-{number:02d}" / "selection.parquet"
        if selection.is_file():
            table = pd.read_parquet(selection)
            assert ours["_row_id"].tolist() == table["row_id"].tolist()
            assert ours["_weight"].tolist() == table["weight"].tolist()


def test_the_rows_are_in_their_original_format(exported, tiny_demo, tmp_path):
    _, out, _ = exported
    sources = [json.loads(line) for line in tiny_demo.pool.read_text().splitlines()]
    lines = [json.loads(line) for line in (out / "data" / "selected.jsonl").read_text().splitlines()]
    added = {f"_{name}" for name in ADDED}
    originals = [{name: value for name, value in line.items() if name not in added} for line in lines]
    assert all(each in sources for each in originals)
    frame = pd.read_parquet(out / "data" / "selected.parquet")
    assert frame["instruction"].tolist() == [each["instruction"] for each in originals]

    # Read back as a data set of its own, they are the same rows.
    settings = DataSettings((str(out / "data" / "selected.jsonl"),), "data", None, 2048, None)
    scan = scan_sources(settings, Silent())
    table = prepare(settings, scan, str(tiny_demo.model), "x", tmp_path / "again", "pool", Silent())
    again = [row_id for block in table.blocks(["row_id"]) for row_id in block.column("row_id").to_pylist()]
    assert again == frame["_row_id"].tolist()


def test_one_rounds_rows(exported, here):
    run, _, _ = exported
    done("export", run, "--what", "data", "--rows-of-round", 1, "export_dir=out")
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "README.md",
        "data",
        "dataflex_export.json",
    ]
    assert set(pd.read_parquet(here / "out/data/selected.parquet")["_round"]) == {1}
    error = refused(here, "export", run, "--what", "data", "--round", 2, "--rows-of-round", 1, "export_dir=b")
    assert "--round 2 and --rows-of-round 1 were given" in error
    error = refused(here, "export", run, "--round", 0, "--rows-of-round", 1, "export_dir=b")
    assert "checkpoint is of round 0" in error


def test_nested_columns_and_columns_of_our_names(tmp_path, tiny_demo):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [
        {"conversations": turns, "_score": 5, "mixed": 1},
        {"conversations": turns[:2], "_score": None, "mixed": ["x"]},
        {"instruction": "q", "output": "r", "_score": 7},
    ]
    (tmp_path / "one.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:2]))
    (tmp_path / "two.jsonl").write_text(json.dumps(rows[2]))
    names = (str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl"))
    settings = DataSettings(names, "data", None, 2048, None)
    scan = scan_sources(settings, Silent())
    pool = prepare(settings, scan, str(tiny_demo.model), "x", tmp_path / "pool", "pool", Silent())
    said = []
    written = write_subset(pool, selected_lines(pool, [2, 0, 1, 0]), tmp_path, said.append)
    assert (written.rows, written.different_rows) == (4, 3)
    assert written.files == {"selected-sharegpt.jsonl": 3, "selected-alpaca.jsonl": 1}
    ids = row_ids(pool)
    (alpaca,) = [json.loads(line) for line in (tmp_path / "selected-alpaca.jsonl").read_text().splitlines()]
    place = {"_file": alpaca["_file"], "_line": alpaca["_line"]}  # where the pool has them
    ours = {"_row": 2, "_row_id": ids[2], "_source": "two", "selected_score": 0.0, "_rank": 1}
    assert alpaca == {**rows[2], **ours, **place, "_weight": 1.0, "_round": 1}
    lines = [json.loads(line) for line in (tmp_path / "selected-sharegpt.jsonl").read_text().splitlines()]
    assert [line["conversations"] for line in lines] == [turns, turns, turns]
    assert [line["mixed"] for line in lines] == [1, ["x"], 1]
    assert [line["_score"] for line in lines] == [5, None, 5]  # its own column
    assert [line["_rank"] for line in lines] == [2, 3, 4]  # a row that was drawn again is there again
    table = pq.read_table(tmp_path / "selected-sharegpt.parquet")
    assert table.column("conversations").to_pylist() == [turns, turns, turns]
    assert table.column("mixed").to_pylist() == ["1", '["x"]', "1"]
    assert any("_score -> selected_score" in line for line in said)
    assert any("mixed holds values of several kinds" in line for line in said)


# The guides' merge files


@pytest.mark.parametrize("guide", sorted(path.name for path in GUIDES.glob("merge_*.yaml")))
def test_a_guides_merge_file(here, tiny_demo, guide):
    run = copied(tiny_demo, here, "saves")
    (here / "adapter").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy2(run / "round-02" / "checkpoint" / name, here / "adapter" / name)
    paths = (
        f"model_name_or_path={tiny_demo.model}",
        f"adapter_name_or_path={here / 'adapter'}",
        "export_dir=out",
    )
    text = done("export", "--config", GUIDES / guide, *paths)
    assert "lies in no run" in text
    assert_same(reloaded(here / "out"), with_adapter(tiny_demo.model, here / "adapter"))
    assert not (here / "out" / "data").exists()
    marker = "<|im_start|>" if guide == "merge_tsds.yaml" else "<|start_header_id|>"
    assert marker in (here / "out" / "chat_template.jinja").read_text()
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "out", "saves"]  # no demo was made


def test_an_adapter_at_the_top_of_a_run_brings_its_rows(here, tiny_demo):
    run = copied(tiny_demo, here, "saves")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy2(run / "round-01" / "checkpoint" / name, run / name)
    paths = (f"model_name_or_path={tiny_demo.model}", f"adapter_name_or_path={run}", "export_dir=out")
    text = done("export", "--config", GUIDES / "merge_less.yaml", *paths)
    assert "the adapter of round 1" in text
    assert "template is llama3 here, and the run was trained with None" in text
    assert set(pd.read_parquet(here / "out/data/selected.parquet")["_round"]) == {1}
    assert "| 1 | loss (" in (here / "out" / "README.md").read_text()


def test_legacy_weights_are_refused(here, tiny_demo):
    error = refused(
        here, "export", "--config", GUIDES / "merge_loss.yaml", "export_legacy_format=true", *data(tiny_demo)
    )
    assert "export writes safetensors" in error


# The folder


def test_a_second_time_it_is_up_to_date(exported):
    run, out, _ = exported
    before = snapshot(out)
    assert "up to date" in done("export", run, f"export_dir={out}")
    assert snapshot(out) == before
    assert not [path for path in out.parent.iterdir() if path.name not in ("out", "runs")]


def test_an_export_of_other_settings_is_kept(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    done("export", "base", "--what", "adapter", "export_dir=out")
    old = snapshot(here / "out")
    error = refused(here, "export", "base", "--what", "adapter", "--round", 0, "export_dir=out")
    assert "round: 2 -> 0" in error
    done("export", "base", "--what", "adapter", "--round", 0, "export_dir=out", "--overwrite")
    (aside,) = here.glob("out.old-*")
    assert snapshot(aside) == old
    assert snapshot(here / "out") != old


def test_what_no_export_wrote_is_never_touched(here, tiny_demo):
    run = copied(tiny_demo, here / "runs")
    for folder in (run, here):
        error = refused(here, "export", "base", f"export_dir={folder}", "--overwrite")
        assert "no export wrote" in error


def test_a_damaged_export_is_noticed(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    done("export", "base", "--what", "data", "export_dir=out")
    (here / "out" / "data" / "selected.jsonl").write_text("")
    assert "missing or of another size" in refused(here, "export", "base", "--what", "data", "export_dir=out")
    done("export", "base", "--what", "data", "export_dir=out", "--overwrite")
    assert (here / "out" / "data" / "selected.jsonl").stat().st_size


def test_a_failure_half_way_leaves_nothing(here, tiny_demo, monkeypatch):
    copied(tiny_demo, here / "runs")
    done("export", "base", "--what", "data", "export_dir=out")
    before = snapshot(here)

    def fails(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dataflex_pipeline.export.bundle.model_card", fails)
    monkeypatch.setattr("dataflex_pipeline.export.bundle.data_card", fails)
    assert dataflex("export", "base", "export_dir=new").code == 130
    assert dataflex("export", "base", "export_dir=out", "--overwrite").code == 130
    assert snapshot(here) == before


def test_nothing_of_this_machine_is_published(exported, tiny_demo):
    run, out, _ = exported
    own = (str(run.parents[1]), str(tiny_demo.folder), str(Path.home()), socket.gethostname(), "/tmp")
    for path in out.rglob("*"):
        if path.is_file() and path.suffix not in (".safetensors", ".parquet"):
            text = path.read_text()
            assert not [word for word in own if len(word) > 3 and word in text], path
    assert (
        json.loads((out / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "model"
    )


def test_the_card_says_what_was_selected_and_how(exported):
    run, out, _ = exported
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: model\n")
    for number in (1, 2):
        marker = json.loads((run / f"round-{number:02d}/checkpoint/COMPLETE.json").read_text())
        line = next(each for each in card.splitlines() if each.startswith(f"| {number} | loss ("))
        assert "focus_weight=5.0" in line
        assert f"| {marker['result']['train_loss']:.4f} |" in line
    assert "| 0 | drawn uniformly |" in card
    assert "torch " in card
    assert "learning_rate: 0.002" in card


def test_secrets_and_paths_stay_out_of_the_card():
    settings = Config(
        model_name_or_path="/home/anna/models/base",
        dataset="/home/anna/a.json,org/set",
        swanlab_api_key="SECRET1",
        swanlab_workspace="anna-lab",
        methods={"nice": {"api_key": "SECRET2", "prompts": {"file": "/home/anna/p.txt"}, "k": 3}},
        components_cfg_file="/home/anna/c.yaml",
        output_dir="/home/anna/out",
    ).model_dump()
    line = RoundLine(1, "nice", {"api_key": "SECRET3", "file": "~/x/y.txt"}, {"strategy": "top_k"}, 8, 8, {})
    facts = Facts(
        "t", settings["model_name_or_path"], "lora", "it", {}, settings, [line], {"/home/anna/a": 3}, {}
    )
    card = model_card(facts)
    assert "anna" not in card
    assert "SECRET" not in card
    for kept in ("base_model: base", "a.json,org/set", "k: 3", "y.txt", "| a | 3 |"):
        assert kept in card
    assert "seed" not in public_settings(settings)  # at its default
    assert [public_name(name) for name in ("org/name", "/x/y/z", "./m", "gpt2")] == [
        "org/name",
        "z",
        "m",
        "gpt2",
    ]


def test_a_card_shortens_paths_alone_and_shows_no_query_of_an_address():
    api = {
        "api_url": "https://anna:SECRET@judge.example/v1/chat/completions?auth=SECRET#SECRET",
        "model_name": "accounts/judges/models/big",
        "prompt": "Grade and/or rank, from 1/10 to 10/10: {completion}",
        "note": "/home/anna/a b.txt",
    }
    settings = Config(
        model_name_or_path="org/base",
        dataset="https://anna:SECRET@data.example/a.json?token=SECRET, data/mine/b.json",
        methods={"nice": {"api": api}},
    ).model_dump()
    shown = public_settings(settings)
    assert shown["methods"]["nice"]["api"] == {
        "api_url": "https://judge.example/v1/chat/completions",
        "model_name": "accounts/judges/models/big",
        "prompt": api["prompt"],
        "note": "a b.txt",
    }
    assert shown["dataset"] == "https://data.example/a.json,b.json"
    card = model_card(Facts("t", "org/base", "lora", "it", {}, settings, [], {}, {}))
    assert "anna" not in card
    assert "SECRET" not in card


# Mistakes


def test_another_base_model_is_refused(here, tiny_demo):
    copied(tiny_demo, here / "runs")
    shutil.copytree(tiny_demo.model, here / "other")
    weights = here / "other" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    error = refused(here, "export", "base", "model_name_or_path=./other", "export_dir=out")
    assert "is not the one that this was trained on" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "There is no run at runs/nowhere"),
        (("base", "--round", 3), "no finished checkpoint of round 3"),
        (("base", "--what", "data", "--round", 3), "Round 3 has no selection"),
        (("base", "--what", "data", "--selection", "mine"), "has a selection mine"),
        (("base", "--what", "all", "--selection", "mine"), "Add --what data"),
        (("base", "--what", "model", "--for", "trl"), "--for is about rows"),
        (("base", "--to", "a.csv"), "Rows are exported as JSON lines"),
        (("base", "--to", "gone/a.jsonl"), "There is no folder gone"),
        (("base", "--run", "base"), "The run is given twice"),
        (("base", "export_legacy_format=true"), "cannot be used here"),
        (("base", "export_size=0"), "export_size"),
        (("adapter_name_or_path=none", "--run", "new", "export_dir=x"), "adapter_name_or_path: none"),
    ],
)
def test_mistakes(here, tiny_demo, arguments, said):
    copied(tiny_demo, here / "runs")
    assert said in refused(here, "export", *arguments)


def test_a_damaged_checkpoint_is_refused(here, tiny_demo):
    run = copied(tiny_demo, here / "runs")
    path = run / "round-02" / "checkpoint" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "its content is not what was written" in refused(here, "export", "base", "export_dir=out")


def test_an_adapter_of_another_model_is_refused(here, tiny_demo):
    run = finished(tiny_demo)
    shutil.copytree(tiny_demo.model, here / "wide")
    config = json.loads((here / "wide" / "config.json").read_text())
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**{**config, "hidden_size": 32, "head_dim": 16})).save_pretrained(
        here / "wide"
    )
    adapter = here / "adapter"
    adapter.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy2(run / "round-02" / "checkpoint" / name, adapter / name)
    error = refused(
        here, "export", "model_name_or_path=./wide", "adapter_name_or_path=adapter", "export_dir=out"
    )
    assert (
        "The adapter in adapter does not fit: model.layers.0.self_attn.q_proj.lora_A.weight is 4 x " in error
    )


# The hub


def test_an_upload_needs_a_token_before_anything_is_made(here, tiny_demo, monkeypatch):
    copied(tiny_demo, here / "runs")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no token is set" in refused(here, "export", "base", "--push-to-hub", "me/x", "export_dir=out")
    assert "no name of a repository" in refused(
        here, "export", "base", "--push-to-hub", "a/b/c", "export_dir=out"
    )


@pytest.mark.parametrize("public", [False, True])
def test_the_upload(here, tiny_demo, monkeypatch, public):
    import huggingface_hub

    asked = {}

    class Hub:
        def __init__(self, token):
            asked["token"] = token

        def create_repo(self, name, **more):
            asked["created"] = (name, more)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/datasets/{name}")

        def upload_folder(self, **more):
            asked["uploaded"] = more
            asked["files"] = sorted(path.name for path in Path(more["folder_path"]).iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    copied(tiny_demo, here / "runs")
    options = ("--what", "data", "--push-to-hub", "me/rows", *(["--public"] if public else []))
    text = done("export", "base", "export_dir=out", *options)
    assert asked["created"] == ("me/rows", {"private": not public, "exist_ok": True, "repo_type": "dataset"})
    assert asked["files"] == ["README.md", "data", "dataflex_export.json"]
    assert "https://huggingface.co/datasets/me/rows" in text
    assert "hf_secret" not in text
    assert not [path for path in here.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]


def test_a_failed_upload_keeps_the_export(here, tiny_demo, monkeypatch):
    copied(tiny_demo, here / "runs")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    ran = dataflex("export", "base", "--what", "data", "export_dir=out", "--push-to-hub", "me/rows")
    assert ran.code == 1
    assert "The upload to me/rows failed" in ran.err
    assert "Traceback" not in ran.err
    assert (here / "out" / "dataflex_export.json").is_file()
