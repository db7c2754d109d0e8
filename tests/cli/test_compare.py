"""`dataflex compare` against figures worked out by hand from the runs' own files."""

from __future__ import annotations

import json
import shutil
import statistics

import pandas
import pyarrow.parquet as pq
import pytest
from cli_runs import data, dataflex, done
from scipy import stats

from dataflex_pipeline.reports.likeness import rank_correlation
from dataflex_pipeline.store.stale import found_ingredients
from dataflex_pipeline.store.tables import table_writer

SETTINGS = (
    "warmup_step=2",
    "update_step=2",
    "update_times=2",
    "per_device_train_batch_size=4",
    "lora_rank=4",
    "learning_rate=0.01",
    "plot_loss=false",
    "eval_strategy=epoch",
)
RUNS = [("random", 1), ("random", 2), ("loss", 1), ("loss", 2)]


@pytest.fixture(scope="module")
def runs(tiny_demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    for method, seed in RUNS:
        name = ("--run", f"{method}-{seed}", "--method", method)
        done("round", 1, *data(tiny_demo), *SETTINGS, *name, f"seed={seed}", f"runs_dir={folder}")
    return folder


def names():
    return [f"{method}-{seed}" for method, seed in RUNS]


def compared(runs, *options):
    return json.loads(done("compare", *names(), f"runs_dir={runs}", "--json", *options))


def target_loss(runs, name):
    marker = json.loads((runs / name / "round-01" / "checkpoint" / "COMPLETE.json").read_text())
    return marker["result"]["metrics"]["eval_loss"]


def selected(runs, name):
    return set(pq.read_table(runs / name / "round-01" / "index.parquet")["row"].to_pylist())


@pytest.mark.slow
def test_means_and_paired_differences_are_those_of_the_markers(runs):
    found = compared(runs)
    loss = {name: target_loss(runs, name) for name in names()}
    assert found["figures"]["target loss"]["loss"]["mean"] == pytest.approx(
        statistics.mean([loss["loss-1"], loss["loss-2"]])
    )
    assert found["figures"]["target loss"]["random"]["max"] == max(loss["random-1"], loss["random-2"])
    paired = found["paired"]["target loss"]["loss"]
    differences = [loss[f"loss-{seed}"] - loss[f"random-{seed}"] for seed in (1, 2)]
    assert paired["difference"] == pytest.approx(statistics.mean(differences))
    # The paired t statistic by its definition, with one degree of freedom.
    t = statistics.mean(differences) / (statistics.stdev(differences) / 2**0.5)
    assert paired["p"] == pytest.approx(2 * stats.t.sf(abs(t), df=1))
    assert found["baseline"] == "random"
    assert (found["step"], found["positions"]) == (4, 16)


def test_overlap_and_tokens_are_those_of_the_indices(runs):
    found = compared(runs)
    shares = [
        len(selected(runs, f"random-{s}") & selected(runs, f"loss-{s}"))
        / len(selected(runs, f"random-{s}") | selected(runs, f"loss-{s}"))
        for s in (1, 2)
    ]
    (overlap,) = found["overlap"]
    assert overlap["value"] == pytest.approx(statistics.mean(shares))
    pool = pandas.read_parquet(runs / "loss-1" / "pool").set_index("row")["n_tokens"]
    rows = [pandas.read_parquet(runs / "loss-1" / f"round-{r:02d}" / "index.parquet")["row"] for r in (0, 1)]
    by_hand = sum(pool.loc[each].sum() for each in rows)
    assert found["figures"]["tokens trained on"]["loss"]["by_seed"]["1"] == by_hand


def test_gpu_hours_are_counted_from_what_the_history_says(runs, tmp_path):
    """And where one run has no such record, they are not shown."""
    folders = [copied_to(runs / name, tmp_path) for name in ("random-1", "loss-1")]
    rewrite_history(folders[1], lambda line: line | {"gpus": 2, "seconds": 90.0})
    figures = json.loads(done("compare", *folders, "--json"))["figures"]["GPU hours"]
    lines = [json.loads(line) for line in (folders[1] / "history.jsonl").read_text().splitlines()]
    stages = [line for line in lines if line["stage"] in ("score", "select", "train")]
    assert len(stages) == 4  # warm-up and round 1
    assert figures["loss"]["mean"] == pytest.approx(4 * 2 * 90 / 3600)
    assert figures["random"]["mean"] == 0.0
    rewrite_history(folders[1], lambda line: {key: line[key] for key in line if key != "gpus"})
    assert "loss" not in json.loads(done("compare", *folders, "--json"))["figures"]["GPU hours"]


def copied_to(run, folder):
    shutil.copytree(run, folder / run.name)
    return folder / run.name


def rewrite_history(folder, change):
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(change(line)) + "\n" for line in lines)
    (folder / "history.jsonl").write_text(text)


def test_a_constant_score_has_no_rank_correlation(runs):
    assert compared(runs)["rank_correlation"] == []  # random's scores are all alike


def test_rank_correlation_of_two_methods(runs, tiny_demo):
    """Pearson's correlation of the ranks, by pandas."""
    done(
        *("round", 1, *data(tiny_demo), *SETTINGS, "--run", "less-1", "--method", "less"),
        *("seed=1", f"runs_dir={runs}"),
    )
    found = json.loads(done("compare", "loss-1", "less-1", f"runs_dir={runs}", "--json"))["rank_correlation"]
    loss, less = (
        pandas.read_parquet(runs / f"{name}-1" / "round-01" / "scores" / f"{name}.parquet")["score"]
        for name in ("loss", "less")
    )
    assert found[0]["value"] == pytest.approx(loss.rank().corr(less.rank()))


def test_the_printed_tables_name_every_method(runs):
    text = done("compare", *names(), f"runs_dir={runs}")
    assert "At the end of round 1: 4 steps, 16 rows trained on." in text
    assert "random (seeds 1 2), loss (seeds 1 2)" in text
    assert "Target loss by step" in text


def test_runs_of_another_budget_are_refused_unless_told(runs, tiny_demo):
    settings = [s for s in SETTINGS if not s.startswith("update_step")]
    done(
        *("round", 1, *data(tiny_demo), *settings, "update_step=3", "--run", "longer", "--method", "loss"),
        *("seed=3", f"runs_dir={runs}"),
    )
    ran = dataflex("compare", "random-1", "longer", f"runs_dir={runs}")
    assert ran.code == 2
    assert "optimizer steps up to round 1 (random-1: 4, longer: 5)" in ran.err
    assert "--allow-different" in ran.err
    text = done("compare", "random-1", "longer", f"runs_dir={runs}", "--allow-different")
    assert "not the same: optimizer steps" in text


def test_runs_of_other_settings_of_a_method_are_no_repetitions(runs, tiny_demo):
    """Another parameter of the method and another strategy, with another seed."""
    more = ("loss.focus=low", "strategy=top_k", "seed=4", f"runs_dir={runs}")
    done("round", 1, *data(tiny_demo), *SETTINGS, "--run", "other", "--method", "loss", *more)
    ran = dataflex("compare", "loss-1", "other", f"runs_dir={runs}")
    assert ran.code == 2
    said = " ".join(ran.err.split())
    assert "strategy (loss-1: sample, other: top_k)" in said
    assert "loss.focus (loss-1: high, other: low)" in said
    assert "seed (" not in said


def test_another_number_of_rows_is_another_budget(runs, tiny_demo):
    more = ("num_samples=3", "seed=1", f"runs_dir={runs}")
    done("round", 1, *data(tiny_demo), *SETTINGS, "--run", "fewer", "--method", "loss", *more)
    ran = dataflex("compare", "random-1", "fewer", f"runs_dir={runs}")
    assert ran.code == 2
    assert "num_samples (random-1: None, fewer: 3)" in " ".join(ran.err.split())


def test_a_run_of_several_methods_is_refused(runs, tiny_demo):
    given = (*data(tiny_demo), *SETTINGS, "--run", "mixed", "seed=1", f"runs_dir={runs}")
    done("round", 1, *given, "--method", "loss")
    for stage in ("score", "select"):
        done(stage, "--round", 2, *given, "--method", "random")
    done("train-round", "--round", 2, *given)
    ran = dataflex("compare", "mixed", "mixed", f"runs_dir={runs}", "--allow-different")
    assert ran.code == 2
    assert "selected by different methods: round 1 by loss, round 2 by random" in " ".join(ran.err.split())


def test_scores_of_other_pools_have_no_rank_correlation(runs, tmp_path):
    """The same lengths and scores; only the pool that they say they are of differs."""
    path = runs / "loss-1" / "round-01" / "scores" / "loss.parquet"
    table, made_from = pq.read_table(path), found_ingredients(path)
    for name, pool in (("same", made_from["pool"]), ("other", "0" * 32)):
        with table_writer(tmp_path / name, table.schema, {**made_from, "pool": pool}) as write:
            write(table)
    assert rank_correlation(path, tmp_path / "same") == pytest.approx(1.0)
    assert rank_correlation(path, tmp_path / "other") is None


def test_evaluated_figures_stand_beside_those_of_training(runs, tmp_path):
    for name in ("random-1", "loss-1"):
        shutil.copytree(runs / name, tmp_path / name)
        done("evaluate", "--run", name, f"runs_dir={tmp_path}")
    found = json.loads(done("compare", "random-1", "loss-1", f"runs_dir={tmp_path}", "--json"))["figures"]
    assert found["target loss"]["loss"]["mean"] == target_loss(tmp_path, "loss-1")
    assert "loss" in found["evaluated target loss"]
    for name, most in (("random-1", 2), ("loss-1", 3)):
        given = ("--metric", "contains", "--generator", "transformers", "--max-new-tokens", most)
        done("evaluate", "--run", name, f"runs_dir={tmp_path}", *given)
    ran = dataflex("compare", "random-1", "loss-1", f"runs_dir={tmp_path}")
    assert ran.code == 2
    said = "settings of evaluated target contains (of random-1 and loss-1)"
    assert said in " ".join(ran.err.split())


def test_the_base_model_has_a_row_where_it_was_evaluated(runs, tmp_path):
    for name in ("random-1", "loss-1"):
        shutil.copytree(runs / name, tmp_path / name)
        done("evaluate", "--run", name, f"runs_dir={tmp_path}")
    both = ("random-1", "loss-1", f"runs_dir={tmp_path}")
    assert "base model:  not evaluated; `dataflex evaluate RUN --round base`" in done("compare", *both)
    assert json.loads(done("compare", *both, "--json"))["base_model"] == {}
    text = done("evaluate", "--run", "loss-1", f"runs_dir={tmp_path}", "--round", "base", "--json")
    loss, *_ = json.loads(text)["figures"]
    found = json.loads(done("compare", *both, "--json"))
    assert found["base_model"]["base model"]["evaluated target loss"] == loss["value"]
    assert found["methods"] == ["random", "loss"]
    lines = [line.split("\t") for line in done("compare", *both).splitlines()]
    assert ["evaluated target loss", "base model", f"{loss['value']:.4g}", "not trained", "", ""] in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["random-1", "--baseline", "random"], "--baseline or --allow-different was given for 1 run"),
        (["random-1", "loss-1", "--top", 3], "--top was given for 2 run"),
        (["nowhere"], "There is no run at"),
        (["random-1", "nowhere"], "There is no run at"),
        (["random-1", "random-1"], "are both of random, seed 1"),
        (["random-1", "loss-1", "--baseline", "less"], "--baseline is less"),
    ],
)
def test_what_cannot_be_compared_is_said(runs, arguments, message):
    ran = dataflex("compare", *arguments, f"runs_dir={runs}")
    assert ran.code == 2
    assert message in ran.err
    assert "Traceback" not in ran.err
