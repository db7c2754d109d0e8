"""The policy gradient: the weights by hand, the sum against autograd, its mean against the exact gradient."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gradient_models import gpt2, llama, lora, trainable

from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.policy import (
    NO_BAR,
    ONE_SCORED,
    UNSCORED,
    WeightedAnswers,
    answer_labels,
    last_answer,
    leave_one_out,
    sample_weights,
    summed_gradients,
)
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.gradients.stream import ProjectedGradients

NAN = float("nan")
K = 64


def weigh(rewards, own=NAN, policy="vanilla", baseline="none", kept_samples=2):
    """Return the weights of one row's samples, and everything else about it."""
    found = sample_weights(np.array([rewards], float), np.array([own]), policy, baseline, kept_samples)
    return found.weights[0].tolist(), found


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("policy", "own", "rewards", "expected", "n_kept"),
    [
        ("vanilla", NAN, [1.0, 0.0, -2.0, 3.0], [1 / 4, 0, -2 / 4, 3 / 4], 4),
        ("vanilla", NAN, [1.0, NAN, -2.0, 3.0], [1 / 3, 0, -2 / 3, 3 / 3], 3),
        ("rejection", NAN, [1.0, 0.0, -2.0, 3.0], [1 / 2, 0, 0, 3 / 2], 2),
        ("hard_rejection", 1.0, [1.0, 0.0, NAN, 3.0], [1 / 2, 0, 0, 3 / 2], 2),
        ("hard_rejection", -2.0, [1.0, 0.0, -2.0, -3.0], [1 / 3, 0, -2 / 3, 0], 3),
        ("topk", NAN, [1.0, 2.0, NAN, 3.0], [0, 2 / 2, 0, 3 / 2], 2),
        ("topk", NAN, [2.0, 1.0, 2.0, 2.0], [2 / 2, 0, 2 / 2, 0], 2),  # ties: the earlier samples
        ("topk", NAN, [-1.0, 0.0, -2.0, 3.0], [0, 0, 0, 3.0], 1),  # the second best is not above 0
    ],
)
def test_weights_by_hand(policy, own, rewards, expected, n_kept):
    weights, found = weigh(rewards, own, policy)
    assert weights == pytest.approx(expected)
    assert found.n_kept[0] == n_kept
    assert found.n_scored[0] == sum(np.isfinite(rewards))
    assert not found.reference[0]
    assert found.reasons == [None]


@pytest.mark.parametrize(
    ("policy", "own", "rewards"),
    [
        ("rejection", NAN, [0.0, -1.0, NAN]),
        ("hard_rejection", 5.0, [4.0, 4.9, NAN]),
        ("topk", NAN, [0.0, -1.0, -2.0]),
    ],
)
def test_the_rows_own_answer_where_nothing_is_kept(policy, own, rewards):
    weights, found = weigh(rewards, own, policy)
    assert weights == [0.0, 0.0, 0.0]
    assert found.reference[0]
    assert found.n_kept[0] == 0
    assert found.reasons == [None]


def test_the_baseline_is_the_mean_of_the_other_scored_samples():
    weights, _ = weigh([1.0, 0.0, NAN, 5.0], baseline="leave_one_out")
    assert weights == pytest.approx([(1 - 2.5) / 3, (0 - 3) / 3, 0, (5 - 0.5) / 3])
    weights, _ = weigh([1.0, 0.0, NAN, 5.0], policy="rejection", baseline="leave_one_out")
    assert weights == pytest.approx([(1 - 2.5) / 2, 0, 0, (5 - 0.5) / 2])  # others: kept or not


@pytest.mark.parametrize("policy", ["vanilla", "rejection", "hard_rejection", "topk"])
@pytest.mark.parametrize("samples", range(2, 9))
def test_a_constant_reward_weighs_exactly_nothing_under_a_baseline(policy, samples):
    for reward in np.random.default_rng(samples).uniform(0, 3, 50):
        weights, _ = weigh([reward] * samples, own=reward, policy=policy, baseline="leave_one_out")
        assert weights == [0.0] * samples


def test_equal_rewards_are_exactly_no_signal_under_a_baseline():
    rewards = np.full((1, 7), 0.1)
    assert (rewards[0, 0] - np.delete(rewards[0], 0).mean()) != 0  # what the mean of the others would leave
    assert (leave_one_out(rewards) == 0).all()
    weights, found = weigh([0.1] * 7, baseline="leave_one_out")
    assert weights == [0.0] * 7
    assert found.reasons == [None]
    assert not found.reference[0]


@pytest.mark.parametrize(
    ("settings", "rewards", "reason"),
    [
        ({}, [NAN, NAN], UNSCORED),
        ({"policy": "rejection"}, [NAN, NAN], UNSCORED),
        ({"policy": "hard_rejection"}, [1.0, 2.0], NO_BAR),
        ({"baseline": "leave_one_out"}, [1.0, NAN], ONE_SCORED),
    ],
)
def test_rows_that_have_no_gradient_say_why(settings, rewards, reason):
    weights, found = weigh(rewards, **settings)
    assert found.reasons == [reason]
    assert weights == [0.0, 0.0]
    assert not found.reference[0]


def test_the_last_answer_of_a_conversation():
    labels = np.array([-100, 4, 5, -100, -100, 6, 7, 8, -100])
    assert last_answer(labels).tolist() == [-100, -100, -100, -100, -100, 6, 7, 8, -100]
    assert last_answer(np.array([-100, 4, 5])).tolist() == [-100, 4, 5]
    assert last_answer(np.array([-100, -100])).tolist() == [-100, -100]


# ---------------------------------------------------------------- the sum against autograd


def draw(rng, vocabulary=97):
    """Return a random prompt and an answer to it."""
    return rng.integers(3, vocabulary, rng.integers(1, 6)), rng.integers(3, vocabulary, rng.integers(1, 8))


def log_probability(model, prompt, answer, temperature):
    """Return log p of an answer, token by token."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    steps = (logits / temperature).log_softmax(-1)
    return sum(steps[t - 1, ids[t]] for t in range(len(prompt), len(ids)))


def written_out(model, answers, token_mean, temperature=1.0):
    """Return the gradient of sum_s weight_s (- sum_t log p(y_t)) by autograd, unpadded."""
    total = 0.0
    for weight, prompt, answer in answers:
        nll = -log_probability(model, prompt, answer, temperature)
        total = total + weight * (nll / len(answer) if token_mean else nll)
    named = trainable(model)
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def project(gradients, kind="countsketch"):
    projection = make_projection(kind, K, 7)
    into = torch.zeros(1, K)
    for name, gradient in gradients.items():
        projection.add(name, gradient.reshape(1, -1).contiguous(), into)
    return into[0].double().numpy()


def summed(model, answers, rows, max_tokens=10_000, token_mean=False, kind="countsketch", temperature=1.0):
    """Return the sums of (row, weight, prompt, answer) by row."""
    consumer = ProjectedGradients(make_projection(kind, K, 7))
    listed = [(row, weight, *answer_labels(prompt, answer)) for row, weight, prompt, answer in answers]
    with GradientCapture(model, consumer, pytest.fail) as capture:
        sums, finite = summed_gradients(
            model,
            capture,
            consumer,
            WeightedAnswers.of(listed),
            (rows, K),
            max_tokens,
            token_mean,
            temperature,
        )
    assert finite.all()
    return sums


@pytest.mark.parametrize(
    ("kind", "temperature"), [("countsketch", 0.7), ("countshift", 1.0), ("rademacher", 1.0)]
)
@pytest.mark.parametrize("token_mean", [False, True])
@pytest.mark.parametrize("make", [lambda: lora(llama()), llama, gpt2], ids=["LoRA", "all weights", "gpt2"])
def test_equal_to_autograd_on_the_written_out_objective(make, token_mean, kind, temperature):
    """Three rows of four samples each: padding, a cut, a baseline, a negative weight."""
    model, rng = make(), np.random.default_rng(1)
    rewards = np.array([[1.0, 0.0, 0.5, -2.0], [1.0, NAN, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    found = sample_weights(rewards, np.full(3, NAN), "vanilla", "leave_one_out", 2)
    drawn = [[draw(rng) for _ in range(4)] for _ in range(3)]
    answers = [(r, found.weights[r, s], *drawn[r][s]) for r in range(3) for s in range(4)]
    weighing = [answer for answer in answers if answer[1]]
    sums = summed(model, weighing, 3, 24, token_mean, kind, temperature)  # batches of a few answers
    for row in range(2):
        mine = [(w, prompt, answer) for r, w, prompt, answer in answers if r == row]
        expected = project(written_out(model, mine, token_mean, temperature), kind)
        np.testing.assert_allclose(sums[row], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert (sums[2] == 0).all()


def test_other_batches_give_the_same_within_rounding():
    model, rng = lora(llama()), np.random.default_rng(2)
    answers = [(i % 3, float(rng.normal()), *draw(rng)) for i in range(12)]
    whole, alone = summed(model, answers, 3), summed(model, answers, 3, 1)
    np.testing.assert_allclose(whole, alone, rtol=0, atol=1e-5 * np.abs(whole).max())
    assert np.array_equal(whole, summed(model, answers, 3))


def test_a_sample_that_is_not_finite_spoils_its_row_alone():
    model, answer = lora(llama()), np.array([5, 6])
    model.get_input_embeddings().weight.data[96] = NAN
    prompts = [np.array([3, 4]), np.array([96]), np.array([7])]
    consumer = ProjectedGradients(make_projection("countsketch", K, 7))
    listed = [(row, 1.0, *answer_labels(prompt, answer)) for row, prompt in enumerate(prompts)]
    with GradientCapture(model, consumer, print, verify=False) as capture:
        sums, finite = summed_gradients(model, capture, consumer, WeightedAnswers.of(listed), (3, K), 10_000)
    assert finite.tolist() == [True, False, True]
    assert np.isfinite(sums).all()


# ---------------------------------------------------------------- its mean against the exact gradient

WORDS, END, LONGEST = 5, 0, 2
PROMPT = np.array([1, 3, 2])


def all_answers():
    """Every answer of at most two tokens that a vocabulary of five allows: ended, or cut off."""
    first = [(t,) for t in range(WORDS) if t == END]
    return first + [(a, b) for a, b in itertools.product(range(WORDS), repeat=LONGEST) if a != END]


def reward_of(answer):
    """A reward without a gradient, far from 0 on the average: the case that a baseline is for."""
    return 2.0 + (3 in answer) - 0.5 * len(answer) + (answer[-1] == END)


@pytest.fixture(scope="module", params=[1.0, 0.7])
def temperature(request):
    """What answers are drawn at, and their log p is taken at."""
    return request.param


def probabilities_of(model, answers, temperature):
    """Return the probability of each answer, a tensor with its graph. [answers]"""
    return torch.stack([log_probability(model, PROMPT, each, temperature) for each in answers]).exp()


@pytest.fixture(scope="module")
def enumerated(temperature):
    """Probabilities and rewards of all answers, the projected gradient of each, and the exact one."""
    model = llama(vocab_size=WORDS, initializer_range=0.3)
    answers = [np.array(answer) for answer in all_answers()]
    probabilities = probabilities_of(model, answers, temperature)
    rewards = np.array([reward_of(tuple(answer.tolist())) for answer in answers])
    expected = (probabilities * torch.from_numpy(rewards)).sum()
    named = trainable(model)
    exact = torch.autograd.grad(-expected, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), exact, strict=True)
    exact = project({n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs})
    each = every_gradient(model, answers, temperature)
    return model, answers, probabilities.detach().double().numpy(), rewards, each, exact


def every_gradient(model, answers, temperature):
    """Return the projected gradient of every answer's - log p. [answers, K]"""
    listed = [(i, 1.0, PROMPT, answer) for i, answer in enumerate(answers)]
    return summed(model, listed, len(answers), temperature=temperature)


def test_the_enumeration_is_whole_and_its_sum_is_the_exact_gradient(enumerated):
    _, _, probabilities, rewards, each, exact = enumerated
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose((probabilities * rewards) @ each, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("drawn_at", [0.5, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("taken_at", [0.5, 0.7, 1.0, 1.5])
def test_a_constant_reward_expects_no_gradient_at_the_temperature_of_the_draws_alone(drawn_at, taken_at):
    """The sum over every answer, not a sample of them: sum_y p(y) grad log q(y) = 0 where q = p."""
    model = llama(vocab_size=WORDS, initializer_range=0.3)
    answers = [np.array(answer) for answer in all_answers()]
    probabilities = probabilities_of(model, answers, drawn_at).detach().double().numpy()
    each = every_gradient(model, answers, taken_at)
    size = np.linalg.norm(probabilities @ each) / np.sqrt(probabilities @ (each**2).sum(axis=1))
    assert size < 1e-5 if drawn_at == taken_at else size > 0.03


def estimates(enumerated, rows, samples, baseline, seed):
    """Return the policy gradients of rows whose samples are drawn from the model. [rows, K]"""
    _, answers, probabilities, rewards, each, _ = enumerated
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(answers), (rows, samples), p=probabilities / probabilities.sum())
    found = sample_weights(rewards[drawn], np.full(rows, NAN), "vanilla", baseline, 2)
    return np.einsum("rs,rsk->rk", found.weights, each[drawn]), drawn, found.weights


def test_its_mean_over_many_samples_is_the_exact_gradient_of_the_expected_reward(enumerated):
    """Both baselines; the mean of 40,000 rows of 4 samples lies within its own standard errors."""
    exact, variances = enumerated[-1], {}
    for baseline in ("none", "leave_one_out"):
        found, _, _ = estimates(enumerated, 40_000, 4, baseline, 11)
        error = found.mean(axis=0) - exact
        standard = found.std(axis=0) / np.sqrt(len(found))
        assert np.abs(error / standard)[standard > 0].max() < 4.5  # of K = 64 coordinates
        assert np.linalg.norm(error) < 0.05 * np.linalg.norm(exact)
        variances[baseline] = found.var(axis=0).sum()
    print(f"\nvariance of the estimate (sum over coordinates), |g|^2 = {exact @ exact:.4f}: {variances}")
    assert variances["leave_one_out"] < variances["none"]


def test_the_estimate_through_the_model_is_the_one_from_the_table_of_gradients(enumerated, temperature):
    """The rows of the test above, a few of them through the whole path instead of from the table."""
    model, answers, *_ = enumerated
    found, drawn, weights = estimates(enumerated, 50, 4, "leave_one_out", 12)
    listed = [
        (row, weights[row, s], PROMPT, answers[drawn[row, s]])
        for row in range(50)
        for s in range(4)
        if weights[row, s]
    ]
    sums = summed(model, listed, 50, temperature=temperature)
    np.testing.assert_allclose(sums, found, atol=1e-5 * np.abs(found).max())
