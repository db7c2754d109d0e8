"""Captured per-sample gradients against autograd over single rows, for every kind of layer and batch."""

from __future__ import annotations

import math

import pytest
import torch
from gradient_models import (
    VOCABULARY,
    Collect,
    family,
    gpt2,
    llama,
    lora,
    pad,
    random_rows,
    reference,
    trainable,
)
from torch import nn

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.layers import gradient_of

MODELS = {
    "llama": llama,
    "llama, tied, with biases": lambda: llama(tie_word_embeddings=True, attention_bias=True),
    "llama, eager attention": lambda: llama(attn_implementation="eager"),
    "gpt2": gpt2,
    "llama, LoRA": lambda: lora(llama()),
    "gpt2, LoRA and a trained norm": lambda: lora(gpt2(), modules_to_save=["ln_f"]),
}


def capture(model, batch, **settings):
    """Return losses, what was given, and what was said."""
    given, said = Collect(), []
    with GradientCapture(model, given, said.append, **settings) as open_capture:
        losses = open_capture.run(*batch)
    return losses, given, said


def assert_equal(model, rows, losses, given):
    expected_losses, expected = reference(model, rows)
    assert losses.tolist() == pytest.approx(expected_losses, abs=1e-5)
    assert set(given.rows) == {(row, name) for row in range(len(rows)) for name in trainable(model)}
    for row, gradients in enumerate(expected):
        whole = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        for name, gradient in gradients.items():
            error = float((given.rows[row, name] - gradient).norm())
            # A key's bias has the gradient 0, of which only rounding is seen: hence the second term.
            assert error <= 1e-5 * float(gradient.norm()) + 1e-7 * whole, name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_equal_to_autograd_row_by_row(kind, side):
    model, rows = MODELS[kind](), random_rows()
    losses, given, said = capture(model, pad(rows, side))
    assert said == []
    assert_equal(model, rows, losses, given)


SLOW = {
    "gemma2": [],  # scaled embeddings, soft-capped logits, a norm with 1 + w
    "cohere": [],  # a LayerNorm of its own
    "qwen3_moe": ["gate.weight", "experts.gate_up_proj", "experts.down_proj"],
    "opt": ["embed_positions.weight", "fc1.weight", "fc2.bias"],  # flattens tokens before its last layers
    "gemma3n": ["altup.correct_output_scale"],  # changes a layer's output in place
    "mamba": ["A_log", "dt_proj.weight"],  # reads a layer's weight behind its back
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", list(SLOW))
def test_other_families_are_right_and_say_what_is_slow(name, side):
    model, rows = family(name), random_rows()
    given, said = Collect(), []
    with GradientCapture(model, given, said.append) as open_capture:
        losses = open_capture.run(*pad(rows, side))
    assert_equal(model, rows, losses, given)
    assert bool(said) == bool(SLOW[name]) == bool(open_capture.slow)
    for ending in SLOW[name]:
        assert any(parameter.endswith(ending) for parameter in open_capture.slow)


@pytest.mark.parametrize("kind", ["llama, tied, with biases", "llama, LoRA"])
def test_batches_of_one_and_few_rows_at_a_time(kind):
    model, rows = MODELS[kind](), random_rows(8)
    losses, given, _ = capture(model, pad(rows), block_elements=300)
    assert_equal(model, rows, losses, given)
    for row in range(8):
        _, single, _ = capture(model, pad(rows[row : row + 1]))
        for name in trainable(model):
            assert torch.allclose(given.rows[row, name], single.rows[0, name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("kind", ["llama, tied, with biases", "llama, LoRA"])
def test_activation_checkpointing(kind, reentrant):
    model, rows = MODELS[kind](), random_rows()
    if reentrant is None:  # our own switch, in eval mode
        losses, given, said = capture(model, pad(rows), checkpointing=True)
    else:
        model.train()  # the models have no dropout
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses, given, said = capture(model, pad(rows))
        model.gradient_checkpointing_disable()
    assert said == []
    assert_equal(model.eval(), rows, losses, given)


def test_the_model_is_left_as_it_was():
    model = lora(llama())
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    capture(model, pad(random_rows()), checkpointing=True)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


class Gate(nn.Module):
    """A layer of no known kind: a parameter of its own shape."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.gate = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x):
        return self.inner(x) * self.gate.sin()


class ReadsPast(nn.Module):
    """Uses its layer's weight once by calling the layer and once behind its back."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x @ self.inner.weight.T.flip(1)


class Flat(nn.Module):
    """Gives its layer all tokens of the batch in one dimension, as routers of experts do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.flatten(0, 1)).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    ("wrapper", "notice"),
    [(Gate, "known for Gate"), (ReadsPast, "does not explain"), (Flat, "not by rows")],
)
def test_what_cannot_be_captured_goes_the_slow_way_and_is_named(wrapper, notice):
    model, rows = llama(), random_rows()
    model.model.layers[1].mlp.up_proj = wrapper(model.model.layers[1].mlp.up_proj)
    losses, given, said = capture(model, pad(rows, "left"))
    assert len(said) == 1
    assert notice in said[0]
    assert "mlp.up_proj" in said[0]
    assert_equal(model, rows, losses, given)


def test_a_layer_used_twice_is_given_once_as_the_sum():
    model, rows = llama(num_hidden_layers=3), random_rows()
    model.model.layers[2] = model.model.layers[1]
    losses, given, said = capture(model, pad(rows))
    assert said == []
    assert_equal(model, rows, losses, given)


def test_a_parameter_without_part_in_the_loss_is_given_as_zeros():
    model, rows = llama(), random_rows(3)
    model.extra = nn.Linear(3, 2)
    _, given, said = capture(model, pad(rows))
    assert said == []
    assert all(not given.rows[row, "extra.weight"].any() for row in range(3))


def test_a_parameter_of_an_unknown_kind_without_part_in_the_loss_is_given_as_zeros():
    """As an image encoder's first layer, where all weights of such a model are trained on text."""
    model, rows = llama(), random_rows(3)
    model.extra = nn.Conv2d(1, 2, 3)
    losses, given, said = capture(model, pad(rows))
    assert "extra.weight" in said[0]
    for row in range(3):
        assert torch.equal(given.rows[row, "extra.weight"], torch.zeros(2, 1, 3, 3))
    assert_equal(model, rows, losses, given)


def test_a_row_without_labels_has_no_loss_and_zeros():
    model, rows = llama(), random_rows(3)
    rows[1] = (rows[1][0], torch.full_like(rows[1][1], -100))
    losses, given, _ = capture(model, pad(rows))
    assert losses.isnan().tolist() == [False, True, False]
    assert all(not given.rows[1, name].any() for name in trainable(model))
    assert all(gradient.isfinite().all() for gradient in given.rows.values())


def test_a_row_that_overflows_spoils_no_other():
    model, rows = lora(llama()), random_rows(3)
    ids = torch.full((4,), VOCABULARY - 1)
    rows = [(ids.clone() if row == 1 else torch.clamp(i, max=90), lab) for row, (i, lab) in enumerate(rows)]
    rows[1] = (ids, ids.clone())
    _, clean, _ = capture(model, pad(rows), verify=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = torch.nan
    losses, given, _ = capture(model, pad(rows), verify=False)
    assert losses.isnan().tolist() == [False, True, False]
    for row in (0, 2):
        for name in trainable(model):
            assert torch.allclose(given.rows[row, name], clean.rows[row, name], rtol=1e-5, atol=1e-7)


def test_bf16_is_close_and_given_in_float32():
    model, rows = lora(llama()), random_rows()
    _, expected = reference(model, rows)
    for parameter in model.parameters():  # the adapter stays in float32, as in training
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    _, given, said = capture(model, pad(rows))
    assert said == []
    for row in range(len(rows)):
        mine = torch.cat([given.rows[row, name].flatten() for name in expected[row]])
        theirs = torch.cat([gradient.flatten() for gradient in expected[row].values()])
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm() / theirs.norm()) < 0.05


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.RMSNorm(6), torch.randn(3, 5, 6)),
        (nn.RMSNorm(6, eps=1e-2), torch.randn(3, 5, 2, 6)),
        (nn.LayerNorm(6), torch.randn(3, 5, 2, 6)),
        (nn.Linear(6, 4), torch.randn(3, 5, 2, 6)),
        (nn.Embedding(9, 6, padding_idx=2), torch.randint(0, 9, (3, 20))),
    ],
)
def test_each_kind_of_layer_alone(layer, x):
    dy = torch.randn_like(layer(x))
    for name, parameter in layer.named_parameters():
        found = gradient_of(layer)(layer, name, x, dy)
        for row in range(len(x)):
            y = layer(x[row : row + 1])
            (expected,) = torch.autograd.grad(y, parameter, dy[row : row + 1])
            assert torch.allclose(found[row], expected, rtol=1e-5, atol=1e-6)


def test_a_model_with_nothing_trainable_is_refused():
    model = llama().requires_grad_(False)
    with pytest.raises(UserError, match=r"none of its parameters is trainable[\s\S]*finetuning_type: full"):
        GradientCapture(model, Collect(), print).__enter__()
