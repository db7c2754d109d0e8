"""What a model's device computes has no float64 where the device lacks it (Apple's GPUs)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_models import llama, lora, pad, random_rows, trainable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataflex_pipeline.features.losses import mean_losses
from dataflex_pipeline.gradients import directions, influence, stream
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.directions import DirectionSums, RowGradients, add_rows
from dataflex_pipeline.gradients.influence import Influences, influence_batch
from dataflex_pipeline.gradients.policy import WeightedAnswers, answer_labels, summed_gradients
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.gradients.stream import ProjectedGradients, projected_batch
from dataflex_pipeline.models.base import widest_float
from dataflex_pipeline.models.batches import Sequences
from dataflex_pipeline.models.token_losses import token_losses

K = 32


class Lacking(TorchDispatchMode):
    """Fails where an operation makes float64 of anything but what `Tensor.cpu` brought to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        on_host = any(hasattr(each, "on_host") for each in tree_leaves(args))
        for each in tree_leaves(made):
            if on_host and isinstance(each, torch.Tensor):
                each.on_host = True
            elif isinstance(each, torch.Tensor) and each.dtype == torch.float64:
                raise TypeError(f"{func} makes float64, which this device does not have")
        return made


@pytest.fixture
def device_without_float64(monkeypatch):
    def brought_to_the_host(tensor):
        there = tensor.detach().clone()
        there.on_host = True
        return there

    monkeypatch.setattr(torch.Tensor, "cpu", brought_to_the_host)
    for module in (directions, influence, stream):
        monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    with Lacking():
        yield


def test_the_guard_works(device_without_float64):
    x = torch.ones(3)
    assert x.cpu().double().numpy().dtype == np.float64
    for float64 in (
        x.double,
        lambda: torch.zeros(3, dtype=torch.float64),
        lambda: x.sum(dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="does not have"):
            float64()


def test_only_apple_gpus_lack_it():
    assert widest_float("cpu") == widest_float("cuda:1") == torch.float64
    assert widest_float("mps") == widest_float(torch.device("mps", 0)) == torch.float32


def test_losses(device_without_float64):
    rows = [(list(range(3, 3 + n)), list(range(3, 3 + n))) for n in (5, 9, 2)]
    model = llama()
    with torch.no_grad(), token_losses(model) as losses:
        found = mean_losses(losses, sequences(rows), 100)
    assert np.isfinite(found).all()


def sequences(rows):
    import pyarrow as pa

    ids, labels = zip(*rows, strict=True)
    return Sequences.of(pa.table({"input_ids": ids, "labels": labels}))


def test_projected_gradients(device_without_float64):
    model = lora(llama())
    consumer = ProjectedGradients(make_projection("countsketch", K, 7))
    with GradientCapture(model, consumer, pytest.fail) as capture:
        found = projected_batch(capture, consumer, *pad(random_rows(3), "right"))
    assert {each.dtype for each in found} == {torch.float32}
    assert torch.isfinite(found[2]).all()


def test_directions_and_influence(device_without_float64):
    model, rows = lora(llama()), random_rows(3)
    consumer = RowGradients(trainable(model), 2, "cpu")
    sums = DirectionSums.empty(trainable(model), "cpu", ["a"])
    answers = [(row, 1.0, ids.numpy(), labels.numpy()) for row, (ids, labels) in enumerate(rows)]
    with GradientCapture(model, consumer, pytest.fail) as capture:
        slots = dict.fromkeys(range(3), 0)
        norms, _ = add_rows(model, capture, consumer, WeightedAnswers.of(answers), slots, sums, 100)
    assert np.isfinite(norms).all()
    assert {each.dtype for each in sums.tensors.values()} == {torch.float32}
    influences = Influences([sums.tensors])
    with GradientCapture(model, influences, pytest.fail) as capture:
        found = influence_batch(capture, influences, *pad(rows, "right"))
    assert {each.dtype for each in found} == {torch.float32}
    assert torch.isfinite(found[1]).all()


@pytest.mark.parametrize("kind", ["countsketch", "countshift", "rademacher"])
def test_policy_gradients(device_without_float64, kind):
    model = lora(llama())
    consumer = ProjectedGradients(make_projection(kind, K, 7))
    answers = [(row, 0.5, *answer_labels(np.arange(3, 6), np.arange(7, 9 + row))) for row in range(2)]
    with GradientCapture(model, consumer, pytest.fail) as capture:
        sums, finite = summed_gradients(model, capture, consumer, WeightedAnswers.of(answers), (2, K), 100)
    assert sums.dtype == np.float64
    assert finite.all()
