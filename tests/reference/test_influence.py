"""Exact influence against loops over single rows: autograd, torch.optim's own step, directions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradient_models import family, gpt2, llama, lora, pad, random_rows, reference, trainable

from dataflex_pipeline.errors import CorruptError, UserError
from dataflex_pipeline.gradients import directions as module
from dataflex_pipeline.gradients.adam import AdamUpdate
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.directions import (
    DirectionSums,
    RowGradients,
    add_rows,
    check_room,
    combine,
    file_bytes,
    read_directions,
    write_sums,
)
from dataflex_pipeline.gradients.influence import Influences, influence_batch
from dataflex_pipeline.gradients.policy import WeightedAnswers
from dataflex_pipeline.models.optimizer_states import AdamState
from dataflex_pipeline.models.room import Room

MODELS = {
    "LoRA": lambda: lora(llama()),
    "rsLoRA": lambda: lora(llama(), use_rslora=True),
    "DoRA": lambda: lora(llama(), use_dora=True),
    "all weights": llama,
    "all weights, tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "experts": lambda: family("qwen3_moe"),
}
GROUPS = ["b", "a", "b", "c", "a", "b"]


def optimizer_of(model, steps=3):
    """Train a copy for some steps with torch.optim.AdamW and return its states by parameter name."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in trainable(model).items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.98), eps=1e-7)
    for step in range(steps):
        _, [gradients] = reference(model, random_rows(1, seed=step + 50))
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        optimizer.step()
    return {name: optimizer.state[parameter] for name, parameter in parameters.items()}


def next_step(gradients, states):
    """Return what torch.optim's next step with these gradients subtracts at a rate of 1, in float64."""
    updates = {}
    for name, gradient in gradients.items():
        parameter = torch.zeros_like(gradient, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.0)
        optimizer.state[parameter] = {
            key: value.clone() if key == "step" else value.double() for key, value in states[name].items()
        }
        parameter.grad = gradient.double()
        optimizer.step()
        updates[name] = -parameter.detach()
    return updates


def flat(gradients):
    return torch.cat([gradients[name].double().reshape(-1) for name in sorted(gradients)])


def sequences_of(rows):
    return [(n, 1.0, ids.numpy(), labels.numpy()) for n, (ids, labels) in enumerate(rows)]


def made_directions(model, rows, labels, tmp_path, part=None, max_tokens=40):
    """Return the directions of target rows, made part by part."""
    part = part or len(rows)
    paths = []
    consumer = RowGradients(trainable(model), 2, "cpu")
    with GradientCapture(model, consumer, lambda line: None) as capture:
        for first in range(0, len(rows), part):
            own = labels[first : first + part]
            sums = DirectionSums.empty(capture.parameters, "cpu", sorted(set(own)))
            answers = WeightedAnswers.of(sequences_of(rows[first : first + part]))
            slots = {n: sums.labels.index(label) for n, label in enumerate(own)}
            add_rows(model, capture, consumer, answers, slots, sums, max_tokens)
            paths.append(tmp_path / f"sums-{first}.safetensors")
            write_sums(paths[-1], sums, "a table")
    combine(paths, tmp_path / "directions.safetensors", "a table")
    return read_directions(tmp_path / "directions.safetensors", "a table", trainable(model), "cpu")


def influence(model, rows, directions, states=None, size=3):
    """Return losses, inner products and norms of pool rows, in batches."""
    updates = None
    if states is not None:
        numbers = {"learning_rate": 0.0, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.0}
        found = {
            name: AdamState(s["exp_avg"], s["exp_avg_sq"], int(s["step"]), **numbers)
            for name, s in states.items()
        }
        updates = {name: AdamUpdate.of(state) for name, state in found.items()}
    consumer = Influences([directions.tensors], updates)
    with GradientCapture(model, consumer, lambda line: None) as capture:
        batches = [
            influence_batch(capture, consumer, *pad(rows[n : n + size])) for n in range(0, len(rows), size)
        ]
    losses, dots, squares = (torch.cat(each) for each in zip(*batches, strict=True))
    return losses, dots, squares.sqrt()


@pytest.mark.parametrize("side", ["adam", "sgd"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_equal_to_a_loop_over_single_rows(kind, side, tmp_path):
    model = MODELS[kind]()
    target, pool = random_rows(6, seed=1), random_rows(7, seed=2)
    states = optimizer_of(model) if side == "adam" else None
    found = made_directions(model, target, GROUPS, tmp_path)
    assert found.labels == ["a", "b", "c"]
    losses, dots, norms = influence(model, pool, found, states)
    unit = np.array([(flat(g) / flat(g).norm()).numpy() for g in reference(model, target)[1]])
    mean = torch.from_numpy(np.stack([unit[np.array(GROUPS) == name].mean(0) for name in "abc"]))
    expected_losses, gradients = reference(model, pool)
    updates = [flat(g if states is None else next_step(g, states)) for g in gradients]
    expected = torch.stack([mean @ (u / u.norm()) for u in updates])  # [rows, G]
    scores = dots / norms[:, None]
    assert losses.tolist() == pytest.approx(expected_losses, abs=1e-5)
    assert float((scores - expected).abs().max() / expected.abs().max()) < 1e-6
    assert norms.tolist() == pytest.approx([float(u.norm()) for u in updates], rel=1e-5)


def test_parts_rows_in_flight_and_batches_change_no_more_than_rounding(tmp_path):
    model, target = lora(llama()), random_rows(6, seed=1)
    whole = made_directions(model, target, GROUPS, tmp_path)
    for more in ({"part": 2}, {"part": 1}, {"max_tokens": 1}, {"max_tokens": 10_000}):
        other = made_directions(model, target, GROUPS, tmp_path, **more)
        assert other.labels == whole.labels
        for name, tensor in whole.tensors.items():
            assert torch.allclose(other.tensors[name], tensor, rtol=0, atol=1e-6), more
    again = made_directions(model, target, GROUPS, tmp_path)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_a_direction_of_each_row_is_its_unit_gradient(tmp_path):
    model, target = lora(llama()), random_rows(4, seed=1)
    found = made_directions(model, target, [0, 1, 2, 3], tmp_path, part=3)
    assert found.labels == [0, 1, 2, 3]
    for row, gradients in enumerate(reference(model, target)[1]):
        own = torch.cat([found.tensors[name][row].double() for name in sorted(found.tensors)])
        unit = flat(gradients) / flat(gradients).norm()
        assert float((own - unit).norm()) < 1e-5


def test_weighted_answers_of_a_row_are_added_before_its_length_is_taken(tmp_path):
    model, rows = lora(llama()), random_rows(5, seed=3)
    weights = [(0, 2.0), (2, 1.0), (0, -0.5), (2, 0.25), (0, 1.5)]
    answers = WeightedAnswers.of(
        [(*weight, *row) for weight, (_, _, *row) in zip(weights, sequences_of(rows), strict=True)]
    )
    consumer = RowGradients(trainable(model), 2, "cpu")
    sums = DirectionSums.empty(trainable(model), "cpu", ["g"])
    with GradientCapture(model, consumer, pytest.fail) as capture:
        norms, _ = add_rows(model, capture, consumer, answers, dict.fromkeys(range(3), 0), sums, 30)
    g = [flat(each) for each in reference(model, rows)[1]]
    whole = [2.0 * g[0] - 0.5 * g[2] + 1.5 * g[4], g[1] + 0.25 * g[3]]
    expected = sum(each / each.norm() for each in whole)
    found = torch.cat([sums.tensors[name][0] for name in sorted(sums.tensors)])
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert norms.tolist() == pytest.approx([float(whole[0].norm()), 0.0, float(whole[1].norm())], rel=1e-5)
    assert sums.counts == [3]  # a row of no answers is a zero, and counts


def test_a_row_that_is_not_finite_is_in_no_sum(tmp_path):
    model, rows = lora(llama()), random_rows(3)
    rows = [(ids.clamp(max=90), labels.clamp(max=90)) for ids, labels in rows]
    rows[1] = (torch.full((5,), 96), torch.full((5,), 96))
    with torch.no_grad():
        model.get_input_embeddings().weight[96] = torch.inf
    consumer = RowGradients(trainable(model), 3, "cpu")
    sums = DirectionSums.empty(trainable(model), "cpu", ["g"])
    with GradientCapture(model, consumer, lambda line: None, verify=False) as capture:
        answers, slots = WeightedAnswers.of(sequences_of(rows)), dict.fromkeys(range(3), 0)
        norms, _ = add_rows(model, capture, consumer, answers, slots, sums, 1000)
    assert np.isfinite(norms).tolist() == [True, False, True]
    assert sums.counts == [2]
    assert all(tensor.isfinite().all() for tensor in sums.tensors.values())


def test_memory_that_is_too_small_for_a_batch_adds_no_row_twice(tmp_path):
    model, target = lora(llama()), random_rows(6, seed=1)
    whole = made_directions(model, target, GROUPS, tmp_path)
    failures = []

    class Failing(RowGradients):
        def __call__(self, name, rows, gradient):
            super().__call__(name, rows, gradient)
            if len(self._slots) > 1 and "layers.0" in name:  # half of the parameters are added by then
                failures.append(name)
                raise torch.OutOfMemoryError("out of memory, as a test wants it")

    consumer = Failing(trainable(model), 4, "cpu")
    sums = DirectionSums.empty(trainable(model), "cpu", ["a", "b", "c"])
    with GradientCapture(model, consumer, lambda line: None, verify=False) as capture:
        slots = {n: "abc".index(label) for n, label in enumerate(GROUPS)}
        add_rows(model, capture, consumer, WeightedAnswers.of(sequences_of(target)), slots, sums, Room(100))
    assert failures
    for name, tensor in whole.tensors.items():
        means = sums.tensors[name] / torch.tensor(sums.counts)[:, None]
        assert torch.allclose(means.float(), tensor, rtol=0, atol=1e-6)


def test_damaged_and_foreign_files_are_noticed(tmp_path):
    model = lora(llama())
    made_directions(model, random_rows(2), ["a", "a"], tmp_path)
    path = tmp_path / "directions.safetensors"
    with pytest.raises(CorruptError, match="belongs to another table"):
        read_directions(path, "another", trainable(model), "cpu")
    few = dict(list(trainable(model).items())[1:])
    with pytest.raises(CorruptError, match="not those of the parameters"):
        read_directions(path, "a table", few, "cpu")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="not what was written"):
        read_directions(path, "a table", trainable(model), "cpu")
    path.write_bytes(content[:-100])
    with pytest.raises(CorruptError, match="it is missing"):
        file_bytes(tmp_path / "none.safetensors")
    with pytest.raises(CorruptError, match="cannot be read"):
        read_directions(path, "a table", trainable(model), "cpu")


def test_directions_that_do_not_fit_are_refused_with_figures(monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda device: 10**9)
    parameters = {"w": torch.empty(10**6)}
    check_room(4 * 100 * 10**6, parameters, 2, "cpu", "group")
    with pytest.raises(UserError) as raised:
        check_room(4 * 300 * 10**6, parameters, 2, "cpu", "group")
    assert "1.2 GB, 300 of 1,000,000 trained parameters each, with 1.21 GB in all" in raised.value.what
    assert "fewer groups" in raised.value.fix
    assert "countsketch" in raised.value.fix
