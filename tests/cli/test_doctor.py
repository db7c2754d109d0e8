"""`dataflex doctor`: what is wrong is found, with what to do; what is right is not complained about."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import data, dataflex, done, finished, snapshot
from seen_accelerators import see

from dataflex_pipeline.checkup import batching, environment
from dataflex_pipeline.checkup.environment import TESTED, deepspeed_ready
from dataflex_pipeline.checkup.findings import Finding, checked, worst
from dataflex_pipeline.checkup.rows import check_begin, check_labels, check_rows, spans
from dataflex_pipeline.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own(here, tiny_demo):
    """The tiny demo's files as one's own, to be spoilt; the settings that name them."""
    shutil.copytree(tiny_demo.model, here / "model")
    shutil.copy2(tiny_demo.pool, here / "pool.jsonl")
    shutil.copy2(tiny_demo.target, here / "target.jsonl")
    return ("dataset=pool.jsonl", "eval_dataset=target.jsonl", "model_name_or_path=./model")


def findings(*arguments, code=0):
    ran = dataflex("doctor", *arguments, "--json")
    assert ran.code == code, ran.out + ran.err
    assert "Traceback" not in ran.err
    return {each["check"]: each for each in json.loads(ran.out)["findings"]}


def bad(found):
    return {name: each["state"] for name, each in found.items() if each["state"] != "ok"}


# A configuration


def test_a_sound_configuration(here, tiny_demo):
    before = snapshot(here)
    found = findings(*data(tiny_demo))
    assert bad({n: f for n, f in found.items() if f["area"] == "configuration"}) == {}
    assert snapshot(here) == before  # it writes nothing
    assert {"method", "pool beginning", "pool labels", "target labels", "batching", "losses"} <= set(found)
    losses = pq.read_table(
        next((finished(tiny_demo) / "features").glob("losses-*"))
    )  # after a round: another model
    assert losses.num_rows == 200


def test_the_mean_loss_is_the_models(tiny_demo):
    """Against transformers' own loss, row by row."""
    import torch
    from transformers import AutoModelForCausalLM

    from dataflex_pipeline.config.fields import Config

    rows = pq.read_table(finished(tiny_demo) / "pool" / "part-00000.parquet")
    found = {
        each.check: each
        for each in batching.check_model(Config(model_name_or_path=str(tiny_demo.model)), rows)
    }
    chosen = batching.different_lengths(rows).to_pylist()
    assert len(chosen) == 8
    lengths = [each["n_tokens"] for each in chosen]
    assert lengths == sorted(lengths)
    assert lengths[0] == min(rows["n_tokens"].to_pylist())
    assert lengths[-1] == max(rows["n_tokens"].to_pylist())
    model = AutoModelForCausalLM.from_pretrained(tiny_demo.model).eval()
    with torch.inference_mode():
        losses = [
            float(
                model(input_ids=torch.tensor([each["input_ids"]]), labels=torch.tensor([each["labels"]])).loss
            )
            for each in chosen
        ]
    assert f"mean loss {np.mean(losses):.3f}" in found["losses"].found
    assert found["batching"].state == "ok"


def test_a_model_that_looks_at_the_padding_is_a_problem(own, monkeypatch):
    from dataflex_pipeline.models import batches

    padded = batches.padded

    def without_mask(sequences, rows, length):
        ids, labels, attention = padded(sequences, rows, length)
        return ids[:, ::-1].copy(), labels[:, ::-1].copy(), attention  # padding before the row, and seen

    monkeypatch.setattr(batches, "padded", without_mask)
    assert findings(*own, code=2)["batching"]["state"] == "problem"


def test_a_template_that_begins_twice(own, here):
    path = here / "model" / "chat_template.jinja"
    path.write_text("{{- bos_token -}}" + path.read_text())
    found = findings(*own, code=2)
    assert found["pool beginning"]["state"] == "problem"
    assert "64 of 64 rows begin with <|begin|> more than once" in found["pool beginning"]["found"]
    assert found["pool beginning"]["advice"]


def test_a_template_that_writes_other_words_than_the_assistants(own, here):
    path = here / "model" / "chat_template.jinja"
    found = findings(*own, "mask_history=true")
    assert found["pool labels"]["state"] == "ok"
    path.write_text(
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- 'I say nothing' + eos_token -}}"
        "{%- else -%}{{- bos_token + m.content + m.content | upper -}}{%- endif -%}{%- endfor -%}"
    )
    found = findings(*own, code=2)
    assert found["pool rows"]["state"] == "problem"
    assert found["pool rows"]["found"] == (
        "0 of the first 64 rows can be used; not usable: the chat template leaves out a part of an answer "
        "that is to be learnt (such as what stands before </think>); choose a named template, or correct the "
        "model's own"
    )


def test_what_rows_hold_besides_is_said_as_the_preparation_says_it(own, here):
    """Turns without labels, a template that ignores the generation prompt, and a column of no use."""
    turns = [("user", "Hi"), ("assistant", "No."), ("user", "Sure?"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1]["weight"] = 0
    rows = [{"messages": messages, "rejected": "x"}] * 70
    (here / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = here / "model" / "chat_template.jinja"
    path.write_text(
        "{{- bos_token -}}{%- for m in messages -%}{{- 'Turn: ' + m.content + eos_token -}}{%- endfor -%}"
    )
    ran = dataflex("doctor", *own, "--json")
    lines = [each for each in json.loads(ran.out)["findings"] if each["area"] == "configuration"]
    said = {each["found"] for each in lines if each["state"] == "warning"}
    assert {
        "64 of the first 64 rows: a turn marked weight 0 is not trained on",
        "64 of the first 64 rows: rejected, the worse answer of a preference pair, is not used",
        "the chat template does not read add_generation_prompt: 'Turn: ' before each answer carries labels "
        "like the answer itself; choose the named template of the model's family (dataflex methods "
        "--templates lists them)",
    } <= said
    assert {each["check"]: each["state"] for each in lines}["pool labels"] == "ok"


def test_rows_that_the_model_has_no_positions_or_tokens_for(own, here):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "bos_token_id": 0, "eos_token_id": 1}
    GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_positions=16, **sizes)).save_pretrained(here / "model")
    found = findings(*own, code=2)
    assert found["pool limits"]["state"] == "problem"
    assert "and the model has 16 positions." in found["pool limits"]["found"]
    assert found["pool limits"]["advice"].startswith("Set cutoff_len=16 (or less)")
    refused = dataflex("warmup", *own)
    assert refused.code == 2
    assert "and the model has 16 positions." in " ".join(refused.err.split())
    GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=4096, **sizes)).save_pretrained(here / "model")
    found = findings(*own, code=2)
    assert "and the model's embedding has 5 rows." in found["pool limits"]["found"]
    refused = dataflex("warmup", *own)
    assert refused.code == 2
    assert "and the model's embedding has 5 rows." in " ".join(refused.err.split())


def test_rows_without_an_end_and_rows_that_are_cut(own, here):
    path = here / "model" / "chat_template.jinja"
    path.write_text("{%- for m in messages -%}{{- m.content + '\n' -}}{%- endfor -%}")
    found = findings(*own, "cutoff_len=12")
    assert found["pool end"]["state"] == found["pool length"]["state"] == "warning"
    assert "cutoff_len 12" in found["pool length"]["found"]


def test_other_mistakes_of_a_configuration(own, here):
    refused = dataflex("doctor", *own, "loss.focus=no")
    assert (refused.code, "loss.focus is" in refused.out + refused.err) == (2, True)
    assert bad(findings("dataset=none.jsonl", *own[1:], code=2)) == {"pool": "problem"}
    (here / "pool.jsonl").write_text('{"instruction": "a", "output": ""}\n' * 3)
    found = findings(*own, code=2)
    assert found["pool rows"]["state"] == "problem"
    assert "0 of the first 3 rows" in found["pool rows"]["found"]
    assert dataflex("doctor", "no_such_key=1").code == 2
    assert dataflex("doctor", "--config", "none.yaml").code == 2


def test_weights_that_are_not_finite(own, here):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(here / "model")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(here / "model")
    assert findings(*own, code=2)["losses"]["state"] == "problem"


def test_only_the_beginning_of_large_data_is_read(own, here, monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.checkup.run.COMPARED", 64)
    lines = (here / "pool.jsonl").read_text().splitlines()
    (here / "pool.jsonl").write_text("\n".join([*lines[:64], "this is no JSON"]) + "\n")
    assert findings(*own)["pool rows"]["found"] == "64 of the first 64 rows can be used"


def test_a_mistake_further_on_is_found_where_the_target_is_looked_for(own, here):
    lines = (here / "pool.jsonl").read_text().splitlines()
    (here / "pool.jsonl").write_text("\n".join([*lines[:64], "this is no JSON"]) + "\n")
    assert findings(*own, code=2)["target in pool"]["state"] == "problem"


def test_rows_of_the_target_that_are_in_the_pool(own, here):
    found = findings(*own)["target in pool"]
    assert found["state"] == "ok"
    assert found["found"].startswith("0 of 16 target rows are in the pool word for word, 0 more but for case")
    target = [json.loads(line) for line in (here / "target.jsonl").read_text().splitlines()]
    changed = target[2] | {"instruction": target[2]["instruction"].upper() + " !"}
    with (here / "pool.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in (target[5], changed))
    found = findings(*own)["target in pool"]
    assert found["state"] == "warning"
    assert found["found"] == (
        "1 of 16 target rows are in the pool word for word, 1 more but for case, punctuation and white "
        "space: target row 5 = pool row 200, target row 2 = pool row 201"
    )
    found = findings("dataset=target.jsonl", *own[1:])["target in pool"]
    assert found["state"] == "warning"
    assert found["found"].startswith("16 of 16 target rows are in the pool word for word, 0 more")
    found = findings(own[0], "eval_dataset=first_5", *own[2:])["target in pool"]
    assert (found["state"], "first 5 rows" in found["found"]) == ("ok", True)


def test_the_demo_is_not_missed_before_the_first_round(here, default_demo_is_tiny):
    found = findings("component_name=loss")
    assert found["pool"]["state"] == "ok"
    assert "which the first round makes" in found["pool"]["found"]
    assert list(here.iterdir()) == []
    ran = dataflex("estimate")
    assert "any more" not in ran.out + ran.err


def test_the_example_shows_what_carries_loss(own, here, tiny_demo):
    ran = dataflex("doctor", *own, "--json")
    stretches = json.loads(ran.out)["example"]
    first = json.loads(tiny_demo.pool.read_text().splitlines()[0])
    assert first["output"] in "".join(each["text"] for each in stretches if each["carries_loss"])
    assert first["instruction"] in "".join(each["text"] for each in stretches if not each["carries_loss"])
    text = done("doctor", *own)
    assert re.search(r"\[\[" + re.escape(first["output"]) + r".*\]\]", text)


@pytest.mark.parametrize("coloured", [True, False])
def test_the_mask_is_in_colour_only_where_there_is_any(own, monkeypatch, coloured):
    import io

    from rich.console import Console

    from dataflex_pipeline.terminal import checkup, console

    file = io.StringIO()
    drawn = Console(file=file, force_terminal=True, color_system="standard", no_color=not coloured, width=80)
    monkeypatch.setattr(console, "out", drawn)
    checkup.draw_example(
        [{"text": "ask\x1b[2J", "carries_loss": False}, {"text": "say", "carries_loss": True}]
    )
    assert ("[[say]]" in file.getvalue()) != coloured
    assert ("\x1b[1;32msay" in file.getvalue()) == coloured
    assert "\x1b[2J" not in file.getvalue()


# Rows


class Words:
    """A tokenizer of whole words: ids are places in a list."""

    def __init__(self, bos=None, adds=False):
        self.bos_token_id, self.bos_token, self.adds = bos, "<s>", adds

    def __call__(self, text):
        return {"input_ids": [self.bos_token_id, 9] if self.adds else [9]}

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


@pytest.mark.parametrize(
    ("rows", "tokenizer", "state"),
    [
        ([[1, 2], [1, 3]], Words(1, True), "ok"),
        ([[1, 1, 2], [1, 3]], Words(1, True), "problem"),
        ([[2], [3]], Words(1, True), "warning"),
        ([[1, 2], [3]], Words(1, True), "problem"),
        ([[2], [3]], Words(1, False), "ok"),
        ([[1, 2], [3]], Words(1, False), "problem"),
        ([[2], [3]], Words(None), "ok"),
        ([[2, 1, 1], [3, 1]], Words(1, False), "ok"),  # the same token elsewhere, as GPT-2's end
    ],
)
def test_beginnings(rows, tokenizer, state):
    assert check_begin(rows, tokenizer).state == state


@pytest.mark.parametrize("adds", [True, False])
def test_beginnings_that_differ_are_said_to(adds):
    found = check_begin([[1, 2], [3], [1, 4]], Words(1, adds)).found
    assert found == "1 of 3 rows lack <s>, and the others begin with it"


def test_labels_against_the_assistants_words():
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    row = {"row": 0, "input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "messages": turns}
    assert check_labels([row], Words(), mask_history=False).state == "ok"
    for labels in ([-100, -100, 3, 4], [-100, 2, -100, 3], [-100] * 4):
        wrong = check_labels([row | {"labels": labels}], Words(), mask_history=False)
        assert wrong.state == "problem"
    two = [*turns, {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    both = {"row": 0, "input_ids": [1, 2, 3, 5, 6], "labels": [-100, 2, 3, -100, 6], "messages": two}
    last = both | {"labels": [-100, -100, -100, -100, 6]}
    assert check_labels([both], Words(), mask_history=False).state == "ok"
    assert check_labels([last], Words(), mask_history=False).state == "problem"
    assert check_labels([last], Words(), mask_history=True).state == "ok"
    assert check_labels([row, row, last | {"row": 7}], Words(), mask_history=False).state == "warning"


def test_spans_put_together_are_the_row():
    ids, labels = [5, 6, 7, 8, 9], [-100, 6, 7, -100, 9]
    assert spans(ids, labels) == [([5], False), ([6, 7], True), ([8], False), ([9], True)]


# The environment


def test_the_tested_versions_are_those_of_the_constraints():
    text = (REPOSITORY / "requirements" / "constraints.txt").read_text()
    pinned = dict(line.split("==") for line in text.split() if "==" in line)
    assert {name: pinned[name] for name in TESTED} == TESTED


def test_this_environment_is_fit():
    found = findings()
    assert "problem" not in {each["state"] for each in found.values()}
    assert set(TESTED) <= set(found)
    assert "To check a configuration too" in done("doctor")


@pytest.mark.parametrize(
    ("installed", "state"),
    [(None, "problem"), ("0.9", "problem"), ("6.0.0", "warning"), ("5.99.1", "ok"), ("5.19.0+local", "ok")],
)
def test_versions_of_a_package(monkeypatch, installed, state):
    real = environment.installed_version
    monkeypatch.setattr(
        environment, "installed_version", lambda n: installed if n == "transformers" else real(n)
    )
    found = {each.check: each for each in environment._packages()}
    assert found["transformers"].state == state
    assert bool(found["transformers"].advice) == (state != "ok")


def test_a_problem_of_the_environment_alone_is_code_1(monkeypatch):
    monkeypatch.setattr(environment, "NO_DISK", 1 << 60)
    found = findings(code=1)
    assert found["disk"]["state"] == "problem"


def test_deepspeed_needs_a_compiler_and_ninja(monkeypatch, here):
    monkeypatch.setenv("PATH", str(here))
    assert environment._compiler(needed=False).state == "ok"
    (found,) = deepspeed_ready()
    assert found.state == "problem"
    assert "a C++ compiler and ninja not found" in found.found
    for name in ("g++", "ninja"):
        (here / name).write_text("#!/bin/sh\n")
        (here / name).chmod(0o755)
    assert deepspeed_ready()[0].state == "ok"


def test_a_torchvision_of_another_torch_is_a_problem(monkeypatch, here):
    (here / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr(environment, "installed_version", lambda n: "0.1" if n == "torchvision" else None)
    (found,) = environment._torch_partners()
    assert found.state == "problem"
    assert "nms does not exist" in found.found


def test_errors_of_a_check_become_problems():
    def fails():
        raise DataError("what", "why", "fix")

    assert checked("pool", fails) == [Finding("pool", "problem", "what why", "fix", "configuration")]
    assert worst([]) == "ok"
    assert worst([Finding("a", "warning", ""), Finding("b", "ok", "")]) == "warning"


def test_it_fits_80_columns_and_has_an_example_in_its_help():
    assert "Example" in done("doctor", "--help")
    lines = done("doctor").splitlines()
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("compiler", [None, "/usr/bin/gcc"])
def test_a_gpu_and_the_compiler_that_its_training_needs(monkeypatch, compiler):

    see(monkeypatch, "cuda", memory=(70 << 30, 80 << 30), name="NVIDIA H100")
    monkeypatch.setattr(environment.shutil, "which", lambda name: compiler if name == "gcc" else None)
    gpu, *more = environment._torch()
    assert (gpu.state, gpu.found) == ("ok", "NVIDIA H100, 70.0 of 80.0 GiB free, bf16")
    assert [each.state for each in more] == ([] if compiler else ["warning"])
    assert all("Install gcc or clang" in each.advice for each in more)


# What a template writes around a row: doctor and preparation say the same

ANGLES = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def looked_at(folder, template, **more):
    """The notices of a preparation, and doctor's findings on the same rows by their check."""
    from data_fixtures import rows_of

    from dataflex_pipeline.data.chat.labelled import ChatFormat

    table, _, said = rows_of(folder, [ROW] * 3, template)
    chat = ChatFormat.load(str(folder / "tokenizer"), None)
    for name, value in more.items():
        setattr(chat.tokenizer, name, value)
    rows = next(iter(table.blocks()))
    found = check_rows(pa.Table.from_batches([rows]), chat, 4096, mask_history=False)
    assert all(line in said for line in table.summary["notices"])
    return chat, table.summary["notices"], {each.check: each for each in found}


def test_answers_that_end_with_another_special_token_than_the_tokenizers(here):
    for folder, end in (("a", {}), ("b", {"eos_token": None})):
        chat, notices, found = looked_at(here / folder, ANGLES, **end)
        assert (chat.tokenizer.eos_token is None) == bool(end)
        assert (notices, chat.notices()) == ([], [])
        assert found["end"].state == "ok"
        assert found["end"].found == "3 of 3 responses end with <|im_end|>, and learn it"


def test_answers_that_end_with_nothing(here):
    chat, _, found = looked_at(here, ANGLES.replace("<|im_end|>", ""))
    assert any("does not learn to stop" in line for line in chat.notices())
    assert found["end"].state == "warning"
    assert found["end"].found == "0 of 3 responses end with </s>, and learn it"


def test_the_case_of_answers_is_the_templates_affair(here):
    chat, notices, found = looked_at(here, ANGLES.replace("m.content", "(m.content | lower)"))
    assert (notices, chat.notices()) == ([], [])
    assert found["end"].found == "3 of 3 responses end with <|im_end|>, and learn it"


def test_rows_that_lack_what_the_tokenizer_puts_before_other_texts(here, monkeypatch):
    import data_fixtures
    from tokenizers.processors import TemplateProcessing

    made = data_fixtures.byte_tokenizer

    def adding(folder, *args, **more):
        fast = made(folder, *args, **more)
        fast.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", fast.bos_token_id)]
        )
        fast.save_pretrained(folder)

    monkeypatch.setattr(data_fixtures, "byte_tokenizer", adding)
    line = (
        "rows do not begin with <s>, which the tokenizer puts before every other text: the chat template "
        "does not write it, and nothing else adds it to what a template wrote"
    )
    _, notices, found = looked_at(here / "a", ANGLES)
    assert notices == [line]
    assert (found["beginning"].state, found["beginning"].found) == ("warning", line)
    _, notices, found = looked_at(here / "b", "{{ bos_token }}" + ANGLES)
    assert (notices, found["beginning"].state) == ([], "ok")


def test_what_rows_lack_is_said_once(own, here):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(here / "model")
    begin = tokenizer.eos_token
    tokenizer.bos_token = begin
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.convert_tokens_to_ids(begin))]
    )
    tokenizer.chat_template = ANGLES.replace("<|im_end|>", begin)
    tokenizer.save_pretrained(here / "model")
    ran = dataflex("doctor", *own, "template=null", "--json")
    found = json.loads(ran.out)["findings"]
    said = [each for each in found if each["found"].startswith(f"rows do not begin with {begin}, which")]
    assert [(each["check"], each["state"]) for each in said] == [
        ("pool beginning", "warning"),
        ("target beginning", "warning"),
    ]
