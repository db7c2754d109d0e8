"""Losses of labelled tokens with logits made in shares, against all logits at once; and 16-bit numbers."""

from __future__ import annotations

import pytest
import torch
from gradient_models import VOCABULARY, Collect, family, gpt2, llama, lora, pad, random_rows, trainable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.models import token_losses as module
from dataflex_pipeline.models import wide_products
from dataflex_pipeline.models.batches import label_budget, length_batches
from dataflex_pipeline.models.token_losses import predicting, token_losses

MODELS = {
    "llama, LoRA": lambda: lora(llama()),
    "gpt2, LoRA and a trained norm": lambda: lora(gpt2(), modules_to_save=["ln_f"]),
    "gemma2 (soft-capped logits), LoRA": lambda: lora(family("gemma2")),
    "cohere (scaled logits), LoRA": lambda: lora(family("cohere")),
}
STEP, WIDTH = 3, 32


@pytest.fixture
def shares(monkeypatch):
    """Make logits for a few positions at a time."""
    monkeypatch.setattr(module, "SHARE_ELEMENTS", STEP * VOCABULARY)


def whole(monkeypatch):
    """Make all logits of a batch at once, by the model's own call."""
    monkeypatch.setattr(module._Shares, "of", lambda *_: None)


def found(model, batch):
    """Return a batch's token losses [W] and the gradients of every row."""
    with torch.inference_mode(), token_losses(model) as losses:
        tokens = losses(*batch, predicting(*batch[1:]))
    given = Collect()
    with GradientCapture(model, given, pytest.fail, verify=False) as capture:
        capture.run(*batch)
    return tokens, given.rows


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_shares_are_equal_to_all_logits_at_once(kind, side, shares, monkeypatch):
    model, batch = MODELS[kind](), pad(random_rows(), side)
    tokens, gradients = found(model, batch)
    whole(monkeypatch)
    expected, expected_gradients = found(model, batch)
    assert torch.allclose(tokens, expected, rtol=0, atol=1e-6)
    for key, gradient in expected_gradients.items():
        assert float((gradients[key] - gradient).norm()) <= 2e-6 * float(gradient.norm()), key


class Logits(TorchDispatchMode):
    """Notes the most rows of a tensor as wide as the vocabulary, the head's own weight aside."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            if tensor.shape[-1:] == (VOCABULARY,) and tensor.shape != (WIDTH, VOCABULARY):
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return out


def test_no_more_logits_than_a_share_ever_exist(shares):
    model, batch = MODELS["gemma2 (soft-capped logits), LoRA"](), pad(random_rows())
    with token_losses(model) as losses, Logits() as seen, torch.no_grad():
        losses(*batch, predicting(*batch[1:]))
    with GradientCapture(model, Collect(), pytest.fail, verify=False) as capture, Logits() as seen_too:
        capture.run(*batch)
    assert (seen.rows, seen_too.rows) == (STEP, STEP)


@pytest.mark.parametrize("trained_head", [True, False])
def test_logits_are_divided_by_a_temperature(trained_head, shares):
    model, batch = llama(), pad(random_rows())
    trained = trainable(model).values() if trained_head else None
    predicts = predicting(*batch[1:])
    with torch.no_grad(), token_losses(model, trained=trained) as losses:
        found = losses(*batch, predicts, 0.5)
    with torch.no_grad():
        logits = model(input_ids=batch[0]).logits[predicts] / 0.5
    expected = torch.nn.functional.cross_entropy(logits, batch[1][:, 1:][predicts[:, :-1]], reduction="none")
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_a_large_vocabulary_does_not_make_batches_small():
    model = lora(llama(vocab_size=262_144, hidden_size=8))
    with GradientCapture(model, Collect(), pytest.fail) as capture:
        (batch,) = length_batches(*torch.full((2, 16), 1024).numpy(), 16384, capture.max_labels)
    assert len(batch) == 16
    assert label_budget(model) == 1024


@pytest.mark.parametrize("make", [llama, lambda: family("opt")])
def test_a_trained_head_or_hidden_states_out_of_reach_keep_the_label_budget(make):
    model = make()
    with token_losses(model, trained=trainable(model).values()) as losses:
        assert (losses.in_shares, losses.max_labels) == (False, label_budget(model))


def test_the_model_is_left_as_it_was():
    model = lora(llama())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with token_losses(model) as losses:
        assert losses.in_shares
    assert not any("forward" in vars(part) for part in model.modules())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_a_share_that_does_not_fit_leaves_the_model_usable(shares, monkeypatch):
    model, batch = lora(llama()), pad(random_rows())
    predicts, plain = predicting(*batch[1:]), torch.nn.functional.cross_entropy
    with torch.inference_mode(), token_losses(model) as losses:
        expected = losses(*batch, predicts)

        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(torch.nn.functional, "cross_entropy", full)
        with pytest.raises(torch.OutOfMemoryError):
            losses(*batch, predicts)
        monkeypatch.setattr(torch.nn.functional, "cross_entropy", plain)
        assert torch.equal(losses(*batch, predicts), expected)


@pytest.fixture
def wide(monkeypatch):
    """Give the CPU CUDA's products of 16-bit matrices with float32 results."""
    plain = {name: getattr(torch, name) for name in ("mm", "bmm")}

    def stand_in(name):
        def multiply(a, b, out_dtype=None):
            return plain[name](a, b) if out_dtype is None else plain[name](a.to(out_dtype), b.to(out_dtype))

        return multiply

    for name in plain:
        monkeypatch.setattr(torch, name, stand_in(name))
    monkeypatch.setattr(wide_products, "has_wide_products", lambda device: True)


def narrow_model():
    """A model in bfloat16 with an adapter in bfloat16, its logits large enough to be rounded."""
    model = lora(llama()).to(torch.bfloat16)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(64)
    return model


def from_states(model, batch):
    """Return token losses from the model's own hidden states, by float32 products. [W]"""
    states, predicts = [], predicting(*batch[1:])
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _head, args: states.append(args[0])
    )
    with torch.no_grad():
        model(input_ids=batch[0], use_cache=False)
    handle.remove()
    logits = states[0][predicts].float() @ model.get_output_embeddings().weight.float().T
    targets = batch[1][:, 1:][predicts[:, :-1]]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def test_logits_of_a_16_bit_model_are_not_rounded_where_that_is_possible(request):
    model, batch = narrow_model(), pad(random_rows())
    expected, (rounded, _) = from_states(model, batch), found(model, batch)
    request.getfixturevalue("wide")
    tokens, gradients = found(model, batch)
    assert float((tokens - expected).abs().max()) < 1e-5
    assert float((rounded - expected).abs().max()) > 1e-3
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_a_wide_product_has_the_gradient_of_a_linear_layer(wide):
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    weight, dy = torch.randn(5, 8).bfloat16(), torch.randn(2, 3, 5).bfloat16()
    y = wide_products.WideLinear.apply(x, weight)
    assert y.dtype == torch.float32
    assert torch.allclose(y, x.float() @ weight.float().T, rtol=1e-6, atol=1e-6)
    (found,) = torch.autograd.grad(y, x, dy.float())
    assert torch.equal(found, dy @ weight)
