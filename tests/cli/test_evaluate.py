"""`dataflex evaluate` against figures worked out from the tables and with transformers itself."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas
import pytest
from cli_runs import copied, dataflex, done

from dataflex_pipeline.evaluation.figures import (
    Figure,
    loss_figures,
    read_figures,
    reward_figure,
    write_figures,
)


@pytest.fixture
def run(tiny_demo, tmp_path):
    return copied(tiny_demo, tmp_path)


def evaluated(run, *arguments):
    where = ("--run", run.name, f"runs_dir={run.parent}")
    text = done(
        "evaluate", *where, "--generator", "transformers", "--max-new-tokens", 6, "--json", *arguments
    )
    found = json.loads(text)  # nothing else on standard output
    return found["round"], {(f["task"], f["metric"]): f for f in found["figures"]}


class Table:
    """A table in memory, as the figures read one."""

    def __init__(self, **columns):
        self.columns = columns

    def blocks(self, columns, max_rows=65536):
        import pyarrow as pa

        yield pa.RecordBatch.from_pydict({name: self.columns[name] for name in columns})


def test_loss_and_its_error_by_hand():
    table = Table(loss=[1.0, 3.0, None], n_tokens=[3, 1, 0], valid=[True, True, False])
    loss, perplexity = loss_figures("test", table)
    assert loss.value == pytest.approx(6 / 4)  # (3 x 1 + 1 x 3) / 4 tokens
    # Deviations 3 (1 - 1.5) = -1.5 and 1 (3 - 1.5) = 1.5: sqrt(2/1 x 4.5) / 4.
    assert loss.stderr == pytest.approx(3 / 4)
    assert (loss.n, loss.unscored) == (2, 1)
    assert perplexity.value == pytest.approx(math.exp(1.5))


def test_the_error_of_a_loss_is_that_of_many_samples():
    """Rows drawn again and again from one population: the spread of L is the standard error."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 40, 20_000)
    losses = rng.gamma(2.0, 0.5, 20_000) + 3.0 / tokens

    def sample():
        rows = rng.integers(0, len(tokens), 400)
        return loss_figures("t", Table(loss=losses[rows], n_tokens=tokens[rows], valid=[True] * 400))[0]

    found = [sample() for _ in range(400)]
    spread = np.std([figure.value for figure in found])
    assert np.mean([figure.stderr for figure in found]) == pytest.approx(spread, rel=0.1)


def test_unscored_answers_do_not_count_as_zero():
    figure = reward_figure("test", "judge", Table(reward=[1.0, 0.5, None, float("nan")]))
    assert (figure.value, figure.n, figure.unscored) == (0.75, 2, 2)
    assert figure.stderr == pytest.approx(np.std([1.0, 0.5], ddof=1) / 2**0.5)
    assert reward_figure("test", "judge", Table(reward=[None, None])) is None


def test_figures_of_the_same_model_are_kept_and_of_another_dropped(tmp_path):
    path = tmp_path / "evaluation" / "metrics.parquet"
    write_figures(path, [Figure("test", "loss", 1.0), Figure("arc", "acc", 0.5)], {"checkpoint": "a"})
    write_figures(path, [Figure("test", "loss", 2.0)], {"checkpoint": "a"})
    assert {(f.task, f.metric): f.value for f in read_figures(path)} == {
        ("test", "loss"): 2.0,
        ("arc", "acc"): 0.5,
    }
    write_figures(path, [Figure("test", "loss", 3.0)], {"checkpoint": "b"})
    assert [(f.task, f.value) for f in read_figures(path)] == [("test", 3.0)]


def test_figures_over_other_rows_are_dropped_and_of_other_tasks_kept(tmp_path):
    path = tmp_path / "metrics.parquet"
    write_figures(path, [Figure("test", "loss", 1.0, rows="a"), Figure("test", "bleu", 0.5, rows="a")], {})
    write_figures(path, [Figure("target", "loss", 3.0, rows="t"), Figure("arc", "acc", 0.5)], {})
    found = write_figures(path, [Figure("test", "loss", 2.0, rows="b")], {})
    assert {(f.task, f.metric, f.value) for f in found} == {
        ("test", "loss", 2.0),
        ("target", "loss", 3.0),
        ("arc", "acc", 0.5),
    }


def test_target_loss_is_that_of_the_losses_table(run):
    number, figures = evaluated(run)
    assert number == 2  # the last finished round
    (folder,) = run.glob("features/losses-target-*")
    table = pandas.read_parquet(folder)
    by_hand = (table["loss"] * table["n_tokens"]).sum() / table["n_tokens"].sum()
    assert figures["target", "loss"]["value"] == pytest.approx(by_hand)
    assert figures["target", "perplexity"]["value"] == pytest.approx(math.exp(by_hand))


def test_answers_are_those_of_greedy_generate(run, tiny_demo):
    """Exact match of the test rows, recomputed row by row with transformers' own generate."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, figures = evaluated(
        run, f"test_dataset={tiny_demo.test}", "--metric", "exact_match", "--metric", "rouge_l"
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_demo.model)
    model = PeftModel.from_pretrained(base, run / "round-02" / "checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_demo.model)
    hits = []
    for messages in pandas.read_parquet(run / "test")["messages"]:
        turns = [{"role": m["role"], "content": m["content"]} for m in messages]
        text = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(out, skip_special_tokens=True)
        hits.append(answer.strip() == turns[-1]["content"].strip())
    assert figures["test", "exact_match"]["value"] == pytest.approx(np.mean(hits))
    assert figures["test", "exact_match"]["n"] == len(hits)
    assert ("test", "rouge_l") in figures
    assert ("test", "loss") in figures


def test_a_second_call_computes_nothing_and_adds_to_the_table(run):
    evaluated(run)
    folder = next(run.glob("features/losses-target-*"))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    _, figures = evaluated(run, "--metric", "contains")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert ("target", "loss") in figures
    settings = json.loads(figures["target", "contains"]["settings"])
    assert settings["params"]["reward_model_backend"] == "metric"
    assert settings["generations"]["generator"] == "transformers"
    assert settings["generations"]["max_new_tokens"] == 6
    assert figures["target", "loss"]["settings"] is None


def test_the_base_model_is_evaluated_as_transformers_does(run, tiny_demo):
    """Mean loss over all response tokens of the target, in a plain loop; nothing of the run is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    _, trained = evaluated(run)
    number, figures = evaluated(run, "--round", "base")
    assert number == "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_demo.model).eval()
    total, tokens = 0.0, 0
    target = pandas.read_parquet(run / "target")
    for ids, labels in zip(target["input_ids"], target["labels"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids.tolist()])).logits[0, :-1]
        wanted = torch.tensor(labels.tolist())[1:]
        kept = wanted != -100
        total += float(torch.nn.functional.cross_entropy(logits[kept], wanted[kept], reduction="sum"))
        tokens += int(kept.sum())
    assert figures["target", "loss"]["value"] == pytest.approx(total / tokens, rel=1e-5)
    assert figures["target", "loss"]["value"] != trained["target", "loss"]["value"]
    table = run / "base" / "evaluation" / "metrics.parquet"
    assert {f.metric: f.value for f in read_figures(table)}["loss"] == figures["target", "loss"]["value"]


def test_the_base_models_row_stands_beside_a_rounds(run):
    where = ("--run", run.name, f"runs_dir={run.parent}")
    assert "base model:  not evaluated; `dataflex evaluate " in done("evaluate", *where)
    done("evaluate", *where, "--round", "base")
    before = [path.stat().st_mtime_ns for path in sorted(run.glob("features/*/*"))]
    done("evaluate", *where, "--round", "base")
    assert [path.stat().st_mtime_ns for path in sorted(run.glob("features/*/*"))] == before
    lines = [line.split("\t")[:3] for line in done("evaluate", *where).splitlines()]
    assert ["target", "loss", "base model"] in lines
    content = json.loads(done("evaluate", *where, "--json"))
    assert [figure["metric"] for figure in content["base_model"]] == ["loss", "perplexity"]
    views = json.loads(done("inspect", run, "--json"))["tables"]
    assert "losses_target_of_base" in {each["view"] for each in views}


def test_base_models_that_share_features_are_told_apart(run, tiny_demo, tmp_path):
    """The same tokenizer and rows with other weights; a copy of the model elsewhere is the same one."""
    import shutil

    from safetensors.torch import load_file, save_file

    models = [tmp_path / name for name in ("copy", "changed")]
    for folder in models:
        shutil.copytree(tiny_demo.model, folder)
    weights = {name: 1.1 * tensor for name, tensor in load_file(models[1] / "model.safetensors").items()}
    save_file(weights, models[1] / "model.safetensors", metadata={"format": "pt"})
    cache, found = tmp_path / "cache", []
    for model in (tiny_demo.model, *models):
        given = (f"features_dir={cache}", f"model_name_or_path={model}", "--round", "base")
        found.append(evaluated(run, *given)[1]["target", "loss"]["value"])
    assert found[0] == found[1] != found[2]
    assert len(list(cache.glob("losses-target-*"))) == 2


@pytest.mark.slow
def test_a_local_benchmark_task(run, tiny_demo, tmp_path):
    """Two documents whose right choice is the likelier one by construction of the metric: counted by hand."""
    pytest.importorskip("lm_eval")
    documents = [
        {"question": "What is this in Velan?", "choices": ["yes", "no"], "answer": n} for n in (0, 1)
    ]
    (tmp_path / "documents.json").write_text(json.dumps(documents))
    (tmp_path / "two_choices.yaml").write_text(
        "task: two_choices\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'documents.json'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    _, figures = evaluated(run, "--task", "two_choices", "--include-path", tmp_path)
    # The same question twice, with the other answer right: one of the two is always hit.
    assert figures["two_choices", "acc"]["value"] == 0.5
    assert figures["two_choices", "acc"]["n"] == 2
    assert json.loads(figures["two_choices", "acc"]["settings"]) == {"limit": None}
    # Test rows that are added later do not touch it.
    _, figures = evaluated(run, f"test_dataset={tiny_demo.test}")
    assert ("two_choices", "acc") in figures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--round", 3], "Round 3 was asked for, and it has no finished checkpoint"),
        (["--round", 9], "Round 9 was asked for"),
        (["--round", "basis"], "--round is 'basis'"),
        (["--metric", "exactmatch"], "exact_match"),
        pytest.param(
            ["--task", "no_such_task_at_all"], "no task or group of that name", marks=pytest.mark.slow
        ),
        (["--task", "arc_easy", "--include-path", "no/such/folder"], "there is no such folder"),
    ],
)
def test_what_cannot_be_evaluated_is_said(run, arguments, message):
    ran = dataflex("evaluate", "--run", run.name, f"runs_dir={run.parent}", *arguments)
    assert ran.code == 2, ran.out + ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
