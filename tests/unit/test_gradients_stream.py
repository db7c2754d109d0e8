"""The stream gradient -> Adam -> projection against doing it with whole gradients, and its memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_models import gpt2, llama, lora, pad, random_rows, reference, trainable
from tiny_training import make_config, make_world, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataflex_pipeline.gradients.adam import AdamUpdate, adam_update, match_states
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.gradients.stream import ProjectedGradients, projected_batch
from dataflex_pipeline.models.base import load_for_scoring
from dataflex_pipeline.models.optimizer_states import AdamState, adam_states

MODELS = {
    "LoRA": lambda: lora(llama()),
    "all weights": llama,
    "all weights, tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
}


def random_states(model):
    generator = torch.Generator().manual_seed(0)
    return {
        name: AdamState(
            torch.randn(p.shape, generator=generator) * 1e-3,
            torch.rand(p.shape, generator=generator) * 1e-4,
            5,
            1e-3,
            (0.9, 0.999),
            1e-8,
            0.0,
        )
        for name, p in trainable(model).items()
    }


def projected(model, rows, size, kind, states=None, side="right"):
    """Return losses, projections and squared norms of rows, in batches of ``size``."""
    updates = None if states is None else {name: AdamUpdate.of(state) for name, state in states.items()}
    consumer = ProjectedGradients(make_projection(kind, 64, 7), updates)
    with GradientCapture(model, consumer, pytest.fail) as capture:
        batches = [
            projected_batch(capture, consumer, *pad(rows[first : first + size], side))
            for first in range(0, len(rows), size)
        ]
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


@pytest.mark.parametrize("kind", ["countsketch", "countshift", "rademacher"])
@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("model_kind", list(MODELS))
def test_equal_to_whole_gradients_projected_afterwards(model_kind, adam, kind):
    model, rows = MODELS[model_kind](), random_rows(4)
    states = random_states(model) if adam else None
    losses, found, squares = projected(model, rows, 4, kind, states)
    expected_losses, gradients = reference(model, rows)
    assert losses.tolist() == pytest.approx(expected_losses, abs=1e-5)
    projection = make_projection(kind, 64, 7)
    for row in range(4):
        into, square = torch.zeros(1, 64), 0.0
        for name, gradient in gradients[row].items():
            vector = adam_update(gradient[None], states[name]) if adam else gradient[None]
            projection.add(name, vector.reshape(1, -1), into)
            square += float(vector.double().square().sum())
        assert float((found[row] - into[0]).norm() / into.norm()) < 1e-5
        assert float(squares[row]) == pytest.approx(square, rel=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_kind", ["LoRA", "gpt2"])
def test_batches_of_one_and_eight_agree(model_kind, side):
    model, rows = MODELS[model_kind](), random_rows(16)
    states = random_states(model)
    _, singles, _ = projected(model, rows, 1, "countsketch", states)
    _, eights, _ = projected(model, rows, 8, "countsketch", states, side)
    unit = torch.nn.functional.normalize
    assert torch.allclose(unit(singles) @ unit(singles).T, unit(eights) @ unit(eights).T, rtol=0, atol=1e-5)
    assert float(((singles - eights).norm(dim=1) / singles.norm(dim=1)).max()) < 1e-5


def test_the_same_again_is_bit_equal():
    model, rows = lora(llama()), random_rows(6)
    states = random_states(model)
    first, second = (projected(model, rows, 3, "countsketch", states) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_gradient_that_is_not_finite_shows_in_its_row_only():
    model, rows = lora(llama()), random_rows(3)
    rows = [(ids.clamp(max=90), labels) for ids, labels in rows]
    rows[1] = (torch.full((5,), 96), torch.full((5,), 96))
    with torch.no_grad():
        model.get_input_embeddings().weight[96] = torch.inf
    consumer = ProjectedGradients(make_projection("countsketch", 64, 7))
    with GradientCapture(model, consumer, pytest.fail, verify=False) as capture:
        _, sums, squares = projected_batch(capture, consumer, *pad(rows))
    assert squares.isfinite().tolist() == [True, False, True]
    assert sums[[0, 2]].isfinite().all()


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor had that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


@pytest.mark.parametrize("model_kind", ["LoRA", "all weights", "all weights, tied"])
def test_no_tensor_holds_the_gradients_of_a_batch(model_kind):
    size = 16
    model, rows = MODELS[model_kind](), random_rows(size, longest=5)
    updates = {name: AdamUpdate.of(state) for name, state in random_states(model).items()}
    consumer = ProjectedGradients(make_projection("countsketch", 64, 7), updates)
    with GradientCapture(model, consumer, pytest.fail, verify=False) as capture, Largest() as largest:
        projected_batch(capture, consumer, *pad(rows))
    sizes = [p.numel() for p in trainable(model).values()]
    activations = size * 5 * 97  # the widest: the logits of all labelled positions
    assert largest.elements <= max(size * max(sizes), activations)
    assert largest.elements < size * sum(sizes) / 5


def test_one_parameter_of_few_rows_is_the_most_that_is_made():
    size, block = 16, 4000
    model, rows = llama(), random_rows(size, longest=5)
    consumer = ProjectedGradients(make_projection("countsketch", 64, 7))
    opened = GradientCapture(model, consumer, pytest.fail, verify=False, block_elements=block)
    with opened as capture, Largest() as largest:
        projected_batch(capture, consumer, *pad(rows))
    assert largest.elements <= max(block, size * 5 * 97)


def peak_bytes(work):
    """Return the most bytes that tensors held at a time while something ran, beyond those before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum([0, *changes]).max())


@pytest.mark.parametrize("kind", ["LoRA", "all weights"])
def test_peak_memory_is_that_of_training_and_one_layer(kind):
    model = llama(hidden_size=64, intermediate_size=256, num_hidden_layers=6)
    model = lora(model) if kind == "LoRA" else model
    rows, dim = random_rows(8, longest=60), 4096
    batch = pad(rows)
    updates = {name: AdamUpdate.of(state) for name, state in random_states(model).items()}
    consumer = ProjectedGradients(make_projection("countsketch", dim, 7), updates)

    def captured():
        with GradientCapture(model, consumer, pytest.fail, verify=False) as capture:
            projected_batch(capture, consumer, *batch)

    def trained():
        model(input_ids=batch[0], labels=batch[1], attention_mask=batch[2], use_cache=False).loss.backward()
        model.zero_grad()

    captured()  # makes the buckets
    trained()
    gradients = sum(4 * p.numel() for p in trainable(model).values())
    layer = 8 * max(4 * p.numel() for p in trainable(model).values())  # of the eight rows
    print(f"{kind}: training {peak_bytes(trained)}, capture {peak_bytes(captured)}, one layer {layer}")
    # Adam's update and the signs work on 1 MiB at a time, or on a layer where that is less.
    work = 3 * min(layer, 4 << 18)
    assert peak_bytes(captured) <= peak_bytes(trained) - gradients + layer + work + 2 * 8 * dim * 4
    if kind == "all weights":
        assert peak_bytes(captured) < peak_bytes(trained) + 8 * gradients / 2


@pytest.mark.parametrize("settings", [{}, {"finetuning_type": "full"}])
def test_a_checkpoint_of_the_training_has_the_states_of_every_trainable_parameter(tmp_path, settings):
    model_folder, pool, _ = make_world(tmp_path)
    config = make_config(model_folder, **settings)
    train(tmp_path / "run", [0], config, pool)
    checkpoint = tmp_path / "run" / "round-00" / "checkpoint"
    model = load_for_scoring(config, checkpoint, "cpu")
    states = match_states(trainable(model).items(), adam_states(checkpoint))
    assert {state.step for state in states.values()} == {3}
    rows = [(ids % 64, labels.clamp(max=63)) for ids, labels in random_rows(4)]
    _, found, squares = projected(model, rows, 4, "countsketch", states)
    # Adam's update has entries of about 1: its norm is that of the parameters' number, not of the gradient.
    count = sum(p.numel() for p in trainable(model).values())
    assert ((squares > count / 100) & (squares < count * 10)).all()
    assert found.isfinite().all()
