"""The policy gradient of a reward: what every sampled answer weighs, and the weighted sum of gradients.

For a target row with the sampled answers y_1..y_n and the rewards R_1..R_n of those that were scored,

    g = (1/S) sum over kept s of A_s grad(- sum_t log p(y_st | prompt, y_s,<t))

over the generated tokens with the end token, summed (``token_mean`` divides by each answer's own number of
tokens). p is the policy that the answers were drawn from: the softmax of the logits over the sampling
temperature. Descending g raises the reward that this policy can expect, E[g] = - grad E[R], and a constant
reward has E[g] = 0, since E[grad log p] = 0 under p and no other distribution. ``top_p`` and ``top_k`` draw
from a part of p, so they bias g. Greedy answers (temperature 0) are drawn from nothing that has a gradient:
their log p is taken at temperature 1.

- ``policy: vanilla``: every scored answer is kept. S: how many those are.
- ``policy: rejection``: kept are those with R_s > 0. S: how many.
- ``policy: hard_rejection``: kept are those with R_s >= R_ref, the reward of the row's own answer. S: how
  many.
- ``policy: topk``: kept are the ``kept_samples`` with the highest rewards (ties: the earlier sample), as far
  as R_s > 0. S: how many.
- ``baseline: leave_one_out`` (default): A_s = R_s minus the mean reward of the other scored answers, kept or
  not. It needs two scored answers. With vanilla E[g] is the same and its variance usually smaller: of a
  reward that is far from 0 on the average, a few answers show little more than what the model says anyway.
- ``baseline: none``: A_s = R_s.

Where a policy other than vanilla keeps nothing, the row's own answer takes the place of the samples, with
S = A = 1 and log p at temperature 1: the gradient that LESS takes. A row whose A_s are all 0 has no signal:
its gradient is 0.

Source: Wang et al., NICE Data Selection for Instruction Tuning in LLMs with Non-differentiable Evaluation
Metric (ICML 2025), and its released code, where topk comes first and the threshold after, too. Differences:
the code leaves the sum of vanilla undivided, and multiplies the row's own answer by its reward; both change
a row's length and not its direction (unless that reward is not above 0, where the code gives 0 or the
opposite). It keeps R_s > R_ref - 1e-5. It takes log p at temperature 1 and has no baseline. The leave-one-out
baseline is Kool et al. (2019), Buy 4 REINFORCE Samples, Get a Baseline for Free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataflex_pipeline.models.batches import Sequences, batch_on
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.schemas import IGNORED

if TYPE_CHECKING:
    import torch

    from dataflex_pipeline.gradients.capture import GradientCapture
    from dataflex_pipeline.gradients.stream import ProjectedGradients

Policy = Literal["vanilla", "rejection", "hard_rejection", "topk"]
Baseline = Literal["none", "leave_one_out"]

UNSCORED = "none of its samples has a reward"
NO_BAR = "its own answer has no reward to compare with (policy: hard_rejection)"
ONE_SCORED = "only one of its samples has a reward (baseline: leave_one_out needs two)"


@dataclass(frozen=True)
class SampleWeights:
    """What each sampled answer weighs in its row's gradient.

    Attributes:
        weights: A_s / S of the kept answers, 0 elsewhere. [M, n] float64
        n_scored, n_kept: scored and kept answers per row. [M]
        reference: rows whose own answer takes the samples' place. [M] bool
        reasons: why a row has no gradient; None where it has one, be it 0. M of them
    """

    weights: np.ndarray
    n_scored: np.ndarray
    n_kept: np.ndarray
    reference: np.ndarray
    reasons: list[str | None]


def sample_weights(
    rewards: np.ndarray, reference: np.ndarray, policy: Policy, baseline: Baseline, kept_samples: int
) -> SampleWeights:
    """Return the weights of sampled answers, as the module says.

    Args:
        rewards: NaN where an answer was not scored. [M, n]
        reference: the rewards of the rows' own answers, NaN where there are none; read by hard_rejection. [M]
        policy, baseline, kept_samples: see the module.
    """
    scored = ~np.isnan(rewards)  # [M, n]
    n_scored = scored.sum(axis=1)
    kept = _kept(rewards, reference, policy, kept_samples) & scored
    n_kept = kept.sum(axis=1)
    advantages = np.where(scored, rewards, 0.0) if baseline == "none" else leave_one_out(rewards)
    reasons: list[str | None] = [None] * len(rewards)
    for row, number in enumerate(n_scored):
        if number == 0:
            reasons[row] = UNSCORED
        elif policy == "hard_rejection" and np.isnan(reference[row]):
            reasons[row] = NO_BAR
        elif baseline == "leave_one_out" and number < 2:
            reasons[row] = ONE_SCORED
    usable = np.array([reason is None for reason in reasons], dtype=bool)
    weights = np.where(kept & usable[:, None], advantages, 0.0) / np.maximum(n_kept, 1)[:, None]
    return SampleWeights(weights, n_scored, n_kept, usable & (n_kept == 0), reasons)


def _kept(rewards: np.ndarray, reference: np.ndarray, policy: Policy, kept_samples: int) -> np.ndarray:
    """Return which answers a policy keeps; unscored ones (NaN) fail every comparison. [M, n]"""
    if policy == "vanilla":
        return np.ones(rewards.shape, dtype=bool)
    if policy == "hard_rejection":
        above: np.ndarray = rewards >= reference[:, None]
        return above
    positive: np.ndarray = rewards > 0
    if policy == "topk":
        best = np.argsort(-rewards, axis=1, kind="stable")[:, :kept_samples]  # NaN comes last
        chosen = np.zeros(rewards.shape, dtype=bool)
        np.put_along_axis(chosen, best, True, axis=1)
        positive &= chosen
    return positive


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Return each reward minus the mean of the row's others, 0 where there is none. [M, n]

    Made from differences, so that equal rewards give exactly 0 whatever the rounding of their mean: a rest of
    1e-17 would become a direction of its own once the gradient is scaled to length 1.
    """
    scored = ~np.isnan(rewards)
    values = np.where(scored, rewards, 0.0)
    pairs = scored[:, :, None] & scored[:, None, :]
    differences = np.where(pairs, values[:, :, None] - values[:, None, :], 0.0)  # [M, n, n]
    others = np.maximum(scored.sum(axis=1) - 1, 1)
    advantages: np.ndarray = differences.sum(axis=2) / others[:, None]
    return advantages


@dataclass(frozen=True)
class WeightedAnswers:
    """Answers to take the gradients of.

    Attributes:
        sequences: prompt and answer of each; labels are the answers' tokens.
        rows: the row that each belongs to. weights: what it counts there. [n] each
    """

    sequences: Sequences
    rows: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, answers: Sequence[tuple[int, float, np.ndarray, np.ndarray]]) -> WeightedAnswers:
        """Put answers together.

        Args:
            answers: (row, weight, tokens of prompt and answer, labels) of each.
        """
        ids = [tokens for _, _, tokens, _ in answers]
        starts = np.concatenate([[0], np.cumsum([len(tokens) for tokens in ids], dtype=np.int64)])
        empty = [np.zeros(0, dtype=np.int64)]
        sequences = Sequences(
            np.concatenate(ids or empty), np.concatenate([labels for *_, labels in answers] or empty), starts
        )
        rows = np.array([row for row, *_ in answers], dtype=np.int64)
        return cls(sequences, rows, np.array([weight for _, weight, *_ in answers], dtype=np.float64))

    def scales(self, token_mean: bool) -> np.ndarray:
        """Return the factors of the answers' mean losses, which a capture takes the gradients of. [n]

        Args:
            token_mean: whether ``weights`` are of mean losses too, and not of sums over the tokens.
        """
        return self.weights * (1.0 if token_mean else self.sequences.n_labels())


def answer_labels(prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and labels of a prompt and the answer to it. [tokens] each"""
    labels = np.concatenate([np.full(len(prompt), IGNORED, dtype=np.int64), answer])
    return np.concatenate([prompt, answer]).astype(np.int64), labels.astype(np.int64)


def last_answer(labels: np.ndarray) -> np.ndarray:
    """Return the labels of a conversation's last answer alone, -100 before and after it. [tokens]"""
    labelled = np.flatnonzero(labels != IGNORED)
    only = np.full(len(labels), IGNORED, dtype=np.int64)
    if len(labelled):
        gaps = np.flatnonzero(np.diff(labelled) > 1)
        begin = labelled[gaps[-1] + 1] if len(gaps) else labelled[0]
        only[begin : labelled[-1] + 1] = labels[begin : labelled[-1] + 1]
    return only


def summed_gradients(
    model: Any,
    capture: GradientCapture,
    consumer: ProjectedGradients,
    answers: WeightedAnswers,
    shape: tuple[int, int],
    max_tokens: int | Room,
    token_mean: bool = False,
    temperature: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted sum of the answers' projected gradients by row, and which rows are finite.

    The projection is linear: each answer is projected once, in batches of answers of similar length from all
    rows, and the sums are over the projections.

    Args:
        model: of the capture. capture: open, made with ``consumer``, which gives plain gradients.
        answers: what is summed. shape: M rows, K dimensions.
        max_tokens: padded tokens per batch. token_mean: see the module.
        temperature: of the policy whose log p is taken.

    Returns:
        Sums [M, K] float64; finite [M] bool.
    """
    from dataflex_pipeline.gradients.stream import projected_batch

    sums, finite = np.zeros(shape), np.ones(shape[0], dtype=bool)
    if not len(answers.rows):
        return sums, finite
    n_labels = answers.sequences.n_labels()
    scales = answers.scales(token_mean)
    capture.temperature = temperature

    def run(some: Sequences, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return projected_batch(capture, consumer, *batch_on(model, some, batch))

    def work(batch: np.ndarray) -> None:
        results = run(answers.sequences, batch)
        losses, projected, squares = (result.cpu().double().numpy() for result in results)
        sound = np.isfinite(losses) & np.isfinite(squares) & np.isfinite(projected).all(axis=1)
        finite[answers.rows[batch[~sound]]] = False
        np.add.at(sums, answers.rows[batch[sound]], scales[batch[sound], None] * projected[sound])

    room = Room.of(max_tokens)
    room.settle(answers.sequences, run, model.device)
    room.each_batch(answers.sequences.lengths, n_labels, capture.max_labels, work)
    return sums, finite
