"""How much of LESS' ranking survives the projection: on the demo, and what the variance law says.

With x a row's unit gradient and y the mean of the target's unit gradients, a projected score is <x, y> plus
noise of variance (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) / K. Adding normal noise of that size to the
exact scores says which rank correlation to expect; the measured one has to be that.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dataflex_pipeline.demo.corpus import Row
from dataflex_pipeline.demo.make import encode_rows
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.models.batches import Sequences, length_batches, padded

POOL_ROWS, TARGET_ROWS = 160, 24
SEEDS = 4


class Whole:
    """Keeps every row's gradient of every parameter."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.by_name: dict[str, torch.Tensor] = {}
        self.batch: np.ndarray = np.arange(0)

    def __call__(self, name: str, rows: slice, gradient: torch.Tensor) -> None:
        flat = gradient.reshape(len(gradient), -1)
        kept = self.by_name.setdefault(name, torch.zeros(self.rows, flat.shape[1]))
        kept[torch.from_numpy(self.batch[rows])] = flat


def sequences(tokenizer, path, count):
    lines = path.read_text(encoding="utf-8").splitlines()
    step = len(lines) // count
    rows = encode_rows(tokenizer, [Row(**json.loads(line)) for line in lines[: step * count : step]])
    starts = np.cumsum([0] + [len(ids) for ids, _ in rows])
    ids, labels = (np.concatenate([row[side] for row in rows]) for side in (0, 1))
    return Sequences(ids, labels, starts)


def rank_correlation(one, other):
    """Return Spearman's correlation of two samples without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(one)), np.argsort(np.argsort(other)))[0, 1])


@pytest.fixture(scope="module")
def gradients(demo):
    """Whole gradients of pool and target rows under a LoRA adapter, by parameter name."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(demo.model), lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    found = []
    for path, count in ((demo.pool, POOL_ROWS), (demo.target, TARGET_ROWS)):
        rows = sequences(tokenizer, path, count)
        consumer = Whole(count)
        with GradientCapture(model, consumer, print, verify=False) as capture:
            for batch in length_batches(rows.lengths, rows.n_labels(), 2048, 1 << 20):
                consumer.batch = batch
                capture.run(*(torch.from_numpy(array) for array in padded(rows, batch)))
        found.append(consumer.by_name)
    return found


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def whole(by_name):
    return unit(torch.cat([by_name[name] for name in sorted(by_name)], dim=1).double().numpy())


def projected(kind, by_name, dim, seed):
    projection = make_projection(kind, dim, seed)
    into = torch.zeros(len(next(iter(by_name.values()))), dim)
    for name in sorted(by_name):
        projection.add(name, by_name[name].contiguous(), into)
    return unit(into.double().numpy())


@pytest.mark.parametrize("kind", ["countsketch", "countshift"])
@pytest.mark.parametrize("dim", [512, 4096, 16384])
@pytest.mark.slow
def test_rank_correlation_is_what_the_variance_law_predicts(gradients, dim, kind, record_property):
    pool, target = gradients
    x, y = whole(pool), whole(target).mean(axis=0)
    exact = x @ y
    variance = ((y @ y) + exact**2 - 2 * (x**2) @ (y**2)) / dim
    rng = np.random.default_rng(0)
    noisy = [exact + rng.normal(size=len(exact)) * np.sqrt(variance) for _ in range(200)]
    predicted = float(np.mean([rank_correlation(exact, scores) for scores in noisy]))
    sketched = [
        projected(kind, pool, dim, seed) @ projected(kind, target, dim, seed).mean(axis=0)
        for seed in range(SEEDS)
    ]
    measured = float(np.mean([rank_correlation(exact, scores) for scores in sketched]))
    print(f"{kind}, K = {dim}: rank correlation measured {measured:.4f}, predicted {predicted:.4f}")
    found = {"kind": kind, "K": dim, "measured": measured, "predicted": predicted}
    record_property("rank_correlation", found)
    assert abs(measured - predicted) < 0.25 * (1 - predicted) + 0.005
