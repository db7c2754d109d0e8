"""The policy_gradients feature over made-up answers and rewards, against autograd row by row."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from gradient_models import trainable
from tiny_training import VOCABULARY, Listener, make_config, make_pool, train

from dataflex_pipeline import api
from dataflex_pipeline.api import FeatureInput, Need, Silent
from dataflex_pipeline.errors import ConfigError, DataError
from dataflex_pipeline.features.params import DrawnParams, JudgedParams
from dataflex_pipeline.features.policy_gradients import PolicyGradients
from dataflex_pipeline.gradients.policy import UNSCORED
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.methods import build_method, method_class
from dataflex_pipeline.models.base import load_for_scoring
from dataflex_pipeline.store.parts import PartsWriter

K, SAMPLES, ROWS = 64, 3, 6
BROKEN = 4
"""A row that could not be answered."""


def parted(folder, table, size):
    """Write a table in parts of so many lines."""
    writer = PartsWriter(folder, table.schema, {"made": "up", "folder": folder.name})
    numbers = range(-(-table.num_rows // size))
    for number in numbers:
        writer.write(number, table.slice(number * size, size))
    return writer.finish(len(numbers), {})


def made_up(target, root, rewards, own):
    """Return tables of answers and rewards in the columns that those features have."""
    rng = np.random.default_rng(5)
    rows = target.rows(0, ROWS, ["row", "row_id", "input_ids", "labels"]).to_pylist()
    lines = []
    for row in rows:
        prompt = row["input_ids"][: row["labels"].count(-100)]
        for sample in range(SAMPLES):
            fine = row["row"] != BROKEN
            reward = rewards[row["row"]][sample]
            lines.append(
                {
                    "row": row["row"],
                    "row_id": row["row_id"],
                    "sample": sample,
                    "prompt": prompt if fine else None,
                    "token_ids": rng.integers(3, VOCABULARY, rng.integers(1, 7)).tolist() if fine else None,
                    "reward": None if np.isnan(reward) else reward,
                    "reference_reward": own,
                    "valid": fine,
                    "reason": None if fine else "there is nothing to answer",
                }
            )
    ids = pa.list_(pa.int32())
    kinds = {"prompt": ids, "token_ids": ids, "reward": pa.float64(), "reference_reward": pa.float64()}
    made = pa.table({name: pa.array([line[name] for line in lines], kinds.get(name)) for name in lines[0]})
    answers = made.select(["row", "row_id", "sample", "prompt", "token_ids", "valid", "reason"])
    judged = made.select(["row", "row_id", "sample", "reward", "reference_reward"])
    return {
        "generations": parted(root / "generations", answers, 2 * SAMPLES),
        "rewards": parted(root / "rewards", judged, 3 * SAMPLES),
    }


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A model with the adapter of a warm-up, and a target of six rows."""
    model, pool, _ = world
    root = tmp_path_factory.mktemp("policy")
    config = make_config(model)
    train(root / "run", [0], config, pool)
    target = make_pool(root / "target", rows=ROWS, seed=3, group=True)
    return SimpleNamespace(
        config=config, target=target, checkpoint=root / "run" / "round-00" / "checkpoint", pool=pool
    )


REWARDS = np.array(
    [[1.0, 0.0, 0.5], [2.0, -1.0, 0.0], [0.25, 0.25, 0.25], [np.nan, 1.0, 3.0], [1.0] * 3, [np.nan] * 3]
)


def computed(trained, tmp_path, rewards=REWARDS, own=None, parts=((0, 4), (4, 6)), config=None, **params):
    """Return the feature's table, computed part by part, and the tables that it came from."""
    tables = made_up(trained.target, tmp_path, rewards, own)
    params = {"proj_dim": K, "dtype": "float32", "seed": 7, "baseline": "none"} | params
    feature = PolicyGradients(PolicyGradients.Params(**params), config or trained.config)
    given = FeatureInput(trained.target, "t", trained.checkpoint, "c", tables)
    with feature.open(given, Silent()) as compute:
        columns = list(feature.input_columns)
        found = [compute(trained.target.rows(first, last, columns)) for first, last in parts]
    return pa.concat_tables(found), tables


def vectors(table):
    return np.array([[0.0] * K if v is None else v for v in table["gradient"].to_pylist()])


def direction(model, answers, temperature):
    """Return the unit projected gradient of sum_s weight_s (- sum_t log p), by autograd."""
    total = 0.0
    for weight, prompt, answer in answers:
        ids = torch.tensor([[*prompt, *answer]])
        steps = (model(input_ids=ids, use_cache=False).logits[0] / temperature).log_softmax(-1)
        total = total - weight * sum(steps[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1]))
    named = trainable(model)
    projection, into = make_projection("countsketch", K, 7), torch.zeros(1, K)
    for name, gradient in zip(named, torch.autograd.grad(total, list(named.values())), strict=True):
        projection.add(name, gradient.reshape(1, -1).contiguous(), into)
    return (into / into.norm())[0].double().numpy()


def advantages(rewards, baseline):
    """Return each scored reward, minus the mean of the others under a baseline; NaN where unscored."""
    if baseline == "none":
        return rewards
    others = [np.delete(rewards, s) for s in range(len(rewards))]
    return np.array([r - np.nanmean(rest) for r, rest in zip(rewards, others, strict=True)])


@pytest.mark.parametrize(("baseline", "temperature"), [("leave_one_out", 0.7), ("none", 1.0), ("none", 0)])
def test_every_row_equals_autograd(trained, tmp_path, baseline, temperature):
    drawn = DrawnParams(generation_temperature=temperature)
    table, tables = computed(trained, tmp_path, baseline=baseline, generations=drawn)
    signal = [True, True, baseline == "none", True]
    model = load_for_scoring(trained.config, trained.checkpoint, "cpu")
    lines = tables["generations"].rows(0, ROWS * SAMPLES, ["prompt", "token_ids"]).to_pylist()
    for row in np.flatnonzero(signal):
        weights = advantages(REWARDS[row], baseline)
        answers = [
            (weights[s], lines[row * SAMPLES + s]["prompt"], lines[row * SAMPLES + s]["token_ids"])
            for s in range(SAMPLES)
            if not np.isnan(REWARDS[row, s])
        ]
        expected = direction(model, answers, temperature or 1.0)
        np.testing.assert_allclose(vectors(table)[row], expected, rtol=0, atol=1e-5)
    assert table["mean_reward"].to_pylist() == [0.5, pytest.approx(1 / 3), 0.25, 2.0, 1.0, None]
    assert table["min_reward"].to_pylist() == [0.0, -1.0, 0.25, 1.0, 1.0, None]
    assert table["max_reward"].to_pylist() == [1.0, 2.0, 0.25, 3.0, 1.0, None]
    assert table["n_scored"].to_pylist() == [3, 3, 3, 2, 3, 0]
    assert table["valid"].to_pylist() == [True, True, True, True, False, False]
    assert table["reason"].to_pylist() == [None] * 4 + ["there is nothing to answer", UNSCORED]
    assert table["signal"].to_pylist() == signal + [None] * 2
    assert table["gradient"].null_count == 2
    np.testing.assert_allclose(np.linalg.norm(vectors(table)[:4], axis=1), signal, atol=1e-6)


def test_the_rows_own_answer_has_the_gradient_that_less_takes(trained, tmp_path):
    from dataflex_pipeline.features.gradients import Gradients

    table, _ = computed(trained, tmp_path, rewards=np.minimum(REWARDS, 0), policy="rejection")
    assert table["from_reference"].to_pylist() == [True] * 4 + [None] * 2
    assert table["n_kept"].to_pylist()[:4] == [0] * 4
    params = Gradients.Params(side="sgd", proj_dim=K, seed=7, dtype="float32")
    feature = Gradients(params, trained.config)
    given = FeatureInput(trained.target, "t", trained.checkpoint, "c")
    with feature.open(given, Silent()) as compute:
        plain = compute(trained.target.rows(0, ROWS, list(feature.input_columns)))
    np.testing.assert_allclose(vectors(table)[:4], vectors(plain)[:4], atol=1e-6)


def test_the_reward_of_the_rows_own_answer_is_the_bar(trained, tmp_path):
    table, _ = computed(trained, tmp_path, own=0.5, policy="hard_rejection")
    assert table["n_kept"].to_pylist()[:4] == [2, 1, 0, 2]
    assert table["from_reference"].to_pylist()[:4] == [False, False, True, False]


def test_a_row_of_equal_rewards_has_no_signal_under_a_baseline(trained, tmp_path):
    table, _ = computed(trained, tmp_path, baseline="leave_one_out")
    assert table["signal"].to_pylist() == [True, True, False, True, None, None]
    assert table["valid"].to_pylist() == [True] * 4 + [False] * 2
    assert vectors(table)[2].tolist() == [0.0] * K
    assert table["projected_norm"][2].as_py() == 0


def test_parts_and_batches_change_nothing(trained, tmp_path):
    whole, _ = computed(trained, tmp_path / "a", parts=((0, 6),))
    parts, _ = computed(trained, tmp_path / "b", parts=((0, 1), (1, 2), (2, 5), (5, 6)))
    small = trained.config.model_copy(update={"score_batch_tokens": 16})
    batches, _ = computed(trained, tmp_path / "c", config=small)
    for other in (parts, batches):
        np.testing.assert_allclose(vectors(other), vectors(whole), atol=1e-5)
        assert other.drop(["gradient", "projected_norm"]).equals(whole.drop(["gradient", "projected_norm"]))
    again, _ = computed(trained, tmp_path / "d", parts=((0, 6),))
    assert again.equals(whole)


def test_its_needs_are_at_its_own_checkpoint_and_count_by_their_tables_alone(trained):
    own = DrawnParams(mc_samples=3)
    params = PolicyGradients.Params(generations=own, policy="hard_rejection")
    needs = PolicyGradients(params, trained.config).needs(Need(PolicyGradients, "target", 2, params))
    assert needs == {
        "generations": Need("generations", "target", 2, own),
        "rewards": Need("rewards", "target", 2, JudgedParams(reference=True, generations=own)),
    }
    dumped = params.model_dump()
    assert "generations" not in dumped
    assert "rewards" not in dumped


# ---------------------------------------------------------------- the method on such a table


class Memory:
    """A table in memory, read in blocks."""

    def __init__(self, table):
        self.table, self.schema, self.n_rows = table, table.schema, table.num_rows

    def blocks(self, columns=None, max_rows=65536):
        yield from (self.table if columns is None else self.table.select(columns)).to_batches(max_chunksize=4)


def nice(**params):
    params = {"reward_model_backend": "metric", "baseline": "none", "proj_dim": K} | params
    return build_method("nice", method_class("nice"), params, "a test")


def begun(table, selection=None, **params):
    said = Listener()
    about = selection or api.Selection(1, 3, 5, said.say, 0.01, shared_seed=9)
    state = nice(**{"mc_samples": SAMPLES} | params).begin(
        {"target": Memory(table), "pool": Memory(table.set_column(1, "row_id", [["x"] * len(table)]))}, about
    )
    return state, said.lines


def test_what_the_method_says_about_the_rewards(trained, tmp_path):
    table, _ = computed(trained, tmp_path, baseline="leave_one_out")
    state, lines = begun(table, baseline="leave_one_out")
    scored = REWARDS[~np.isnan(REWARDS)]
    assert lines == [
        f"mean reward {scored.mean():.4g} of 14 of 18 answers to the target's 6 prompts",
        "1 of 4 target rows have no signal (all their rewards are equal): their similarity is 0 with every "
        "row, and counts in the mean",
    ]
    np.testing.assert_allclose(state.terms[0].means[0], vectors(table)[:4].sum(0) / 4, atol=1e-6)


def test_the_method_says_where_own_answers_took_over(trained, tmp_path):
    table, _ = computed(trained, tmp_path, rewards=np.minimum(REWARDS, 0), policy="rejection")
    _, lines = begun(table, policy="rejection")
    assert lines[1] == (
        "4 target rows take the gradient of their own answer: none of their samples passed policy: rejection"
    )


@pytest.mark.parametrize(
    ("reward", "baseline", "words"),
    [
        (0.0, "none", "all their rewards are 0.*policy=rejection"),
        (0.0, "leave_one_out", "all their rewards are 0.*policy=rejection"),
        (0.3, "leave_one_out", "all their rewards are equal.*Draw more"),
    ],
)
def test_a_target_without_any_signal_is_refused(trained, tmp_path, reward, baseline, words):
    """A constant reward among them: its gradients are exactly 0, and there is no ranking."""
    table, _ = computed(trained, tmp_path, rewards=REWARDS * 0 + reward, baseline=baseline)
    assert (vectors(table) == 0).all()
    with pytest.raises(DataError, match=f"(?s)None of the 4 target rows has a signal: .*{words}"):
        nice(mc_samples=SAMPLES, baseline=baseline).check_target({"target": Memory(table)})


def test_rewards_that_hardly_differ_and_such_that_are_all_0_are_said(trained, tmp_path):
    rewards = np.array(
        [[1.0, 0.0, 0.5], [0.5, 0.5, 0.54], [0.0] * 3, [np.nan, 0.4, 0.4], [1.0] * 3, [0.2] * 3]
    )
    table, _ = computed(trained, tmp_path, rewards=rewards, baseline="leave_one_out")
    _, lines = begun(table, baseline="leave_one_out")
    assert lines[1].startswith(
        "3 of 5 target rows have no signal (all their rewards are equal, for 1 of them 0):"
    )
    assert lines[2].startswith(
        "the rewards of 1 of 5 target rows differ by at most 0.05, 5% of the range of all rewards:"
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"mc_samples": 1}, "baseline: none, since mc_samples: 1 leaves no other answer to compare with"),
        ({"generation_temperature": 0}, "baseline: none, since generation_temperature: 0 draws the same"),
        ({"top_p": 0.9}, "top_p 0.9 and top_k 0 cut the distribution of the answers: the policy gradient is"),
        ({"top_k": 20}, "top_p 1 and top_k 20 cut the distribution of the answers: the policy gradient is"),
    ],
)
def test_what_is_said_of_the_draws(trained, tmp_path, settings, line):
    table, _ = computed(trained, tmp_path)
    assert begun(table, **settings)[1][0].startswith(line)


def test_the_default_baseline_follows_the_draws():
    def made(**settings):
        settings = {"reward_model_backend": "metric"} | settings
        return build_method("nice", method_class("nice"), settings, "a test").params

    assert made().baseline == "leave_one_out"
    assert made(mc_samples=1).baseline == made(generation_temperature=0).baseline == "none"
    for lone in ({"mc_samples": 1}, {"generation_temperature": 0}):
        with pytest.raises(ConfigError, match="baseline: leave_one_out needs"):
            made(baseline="leave_one_out", **lone)


def test_the_score_is_the_mean_cosine_and_accumulates_as_less_does(trained, tmp_path):
    table, _ = computed(trained, tmp_path)
    pool = np.random.default_rng(0).normal(size=(5, K)).astype(np.float32)
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(pool.reshape(-1)), K)
    batch = pa.record_batch({"gradient": lists, "valid": [True] * 5})
    expected = np.array([[u @ v for v in vectors(table)[:4]] for u in pool.astype(float)]).mean(axis=1)
    state, _ = begun(table)
    block = api.Block(batch, {"pool": batch})
    np.testing.assert_allclose(nice().score(block, state)["score"], expected, atol=1e-9)
    state, _ = begun(table, accumulate=True)
    np.testing.assert_allclose(nice(accumulate=True).score(block, state)["score"], 0.01 * expected, atol=1e-9)
    ranking = nice().by_target_row({"target": Memory(table)}, None)
    assert ranking.rows.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(ranking.values(block).mean(axis=1), expected, atol=1e-6)
