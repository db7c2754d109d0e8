"""The Adam update of a row's gradient against the step of torch.optim.AdamW itself."""

from __future__ import annotations

import pytest
import torch

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.gradients.adam import AdamUpdate, adam_update, match_states
from dataflex_pipeline.models.optimizer_states import AdamState, adam_states


def state(shape=(5, 7), step=9, betas=(0.9, 0.999), eps=1e-8, scale=1e-3):
    generator = torch.Generator().manual_seed(step)
    mean = torch.randn(shape, generator=generator) * scale
    square = torch.rand(shape, generator=generator) * scale**2
    return AdamState(mean, square, step, 1e-3, betas, eps, 0.1)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
@pytest.mark.parametrize("eps", [1e-8, 1e-4])
@pytest.mark.parametrize("step", [1, 9, 4000])
def test_equal_to_the_change_that_a_real_step_makes(betas, eps, step):
    known = state(step=step, betas=betas, eps=eps)
    gradients = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(1)) * 1e-3
    found = adam_update(gradients, known)
    rate = 0.5
    for row in range(4):
        # In float64 so that the difference of two parameters has digits left.
        parameter = torch.nn.Parameter(torch.zeros(5, 7, dtype=torch.float64))
        optimizer = torch.optim.AdamW([parameter], lr=rate, betas=betas, eps=eps, weight_decay=0.0)
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": known.exp_avg.double(),
            "exp_avg_sq": known.exp_avg_sq.double(),
        }
        parameter.grad = gradients[row].double()
        optimizer.step()
        assert torch.allclose(found[row].double(), parameter.detach() / -rate, rtol=1e-5, atol=1e-6)


def test_the_released_rule_by_hand():
    known = AdamState(torch.tensor([2e-5]), torch.tensor([1e-10]), 7, 1e-3, (0.5, 0.5), 1.0, 0.0)
    found = adam_update(torch.tensor([[3e-5]]), known, rule="less")
    mean, square = 0.9 * 2e-5 + 0.1 * 3e-5, 0.999 * 1e-10 + 0.001 * 9e-10
    assert found.item() == pytest.approx(mean / (square + 1e-8) ** 0.5, rel=1e-6)
    outside = AdamState(known.exp_avg, known.exp_avg_sq, 10**6, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    assert adam_update(torch.tensor([[3e-5]]), outside).item() / found.item() == pytest.approx(10, rel=0.02)


def test_gradients_are_left_alone_and_in_place_is_the_same():
    gradients = torch.randn(3, 5, 7)
    kept = gradients.clone()
    found = adam_update(gradients, state())
    assert torch.equal(gradients, kept)
    assert torch.equal(AdamUpdate.of(state()).apply_(gradients), found)
    assert torch.equal(gradients, found)


def test_some_coordinates_at_a_time_is_the_same(monkeypatch):
    gradients = torch.randn(3, 5, 7)
    expected = adam_update(gradients, state())
    monkeypatch.setattr("dataflex_pipeline.gradients.adam.CACHED_ELEMENTS", 12)
    assert torch.equal(adam_update(gradients, state()), expected)


def test_states_are_matched_by_name_and_shape():
    parameters = {"b": torch.zeros(5, 7), "a": torch.zeros(2)}
    states = {"a": state((2,)), "b": state()}
    assert list(match_states(parameters.items(), states)) == ["b", "a"]


def test_a_parameter_that_never_had_a_gradient_is_where_the_optimizer_begins_with_it(tmp_path):
    used, unused = (torch.nn.Parameter(torch.ones(5, 7, dtype=torch.float64)) for _ in range(2))
    group = {"params": [used, unused], "param_names": ["used", "unused"]}
    optimizer = torch.optim.AdamW([group], lr=0.5, eps=1e-4, weight_decay=0.0)
    for _ in range(3):
        used.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    states = match_states({"used": used, "unused": unused}.items(), adam_states(tmp_path))
    gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e-3
    gradient[0] = 0.0
    found = adam_update(gradient[None].float(), states["unused"])[0]
    unused.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(found, (2.0 * (1.0 - unused.detach())).float(), rtol=1e-5, atol=0)
    assert torch.equal(found[0], torch.zeros(7))
    assert states["unused"].step == 0 < states["used"].step


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ({"a": state((2,))}, "no states of the parameter b"),
        (
            {"a": state((3,)), "b": state()},
            r"parameter a has the shape \[2\], and its Adam states have \[3\]",
        ),
        ({"a": state((2,)), "b": state(), "c": state()}, "states of 1 parameters .* such as c"),
    ],
)
def test_states_of_another_model_are_refused(states, words):
    parameters = {"b": torch.zeros(5, 7), "a": torch.zeros(2)}
    with pytest.raises(UserError, match=words + r"[\s\S]*another model[\s\S]*gradient_type: sgd"):
        match_states(parameters.items(), states)
