"""The check whether a model needs an attention mask for rows that are padded on the right.

In a causal model no position sees a later one, so what stands behind a row's last token changes nothing in
the row. A mask says the same again, and costs: with one, attention runs without its fast kernels, writes out
keys and values that groups of heads share, and makes a [B, 1, T, T] mask per batch. Whether a model is causal
in this sense is tried on two short rows of random tokens, one of them padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch  # noqa: TID253  (imported lazily with the whole layer)
from torch import Tensor, nn  # noqa: TID253

from dataflex_pipeline.models.rounding import EXACT, rounding

LENGTHS = (8, 3)
"""Tokens of the two rows."""


def is_right_padded(attention: Tensor) -> bool:
    """Return whether no row of a mask [B, T] has padding before or between its tokens."""
    return bool((attention[:, 1:] <= attention[:, :-1]).all())


def needs_mask(model: Any, with_gradients: bool) -> bool:
    """Return whether leaving out the mask of right-padded rows changes what the model says of them.

    It does not if the logits at the rows' own tokens are those with the mask, up to rounding, and the same
    whatever token the padding is; with ``with_gradients``, if the gradients of the rows' loss by the embedded
    tokens are the same, too, and 0 at the padding.

    Args:
        model: a causal LM in eval mode; with gradients, its parameters are frozen.
        with_gradients: see above.
    """
    tokens, attention = random_batch(model)
    own = attention.bool()
    other = torch.where(own, tokens, (tokens + 1) % vocabulary(model))
    with torch.no_grad():
        masked = _centred_logits(model, tokens, attention)
        without = _centred_logits(model, tokens, None)
        changed = _centred_logits(model, other, None)
    same = _close(without, masked, own, rounding(model)) and _close(changed, without, own, EXACT)
    if not (same and with_gradients):
        return not same
    expected, found = (_embedding_gradient(model, tokens, own, mask) for mask in (attention, None))
    behind = float(found[~own].norm()) <= EXACT * float(found[own].norm())
    return not (behind and _close(found, expected, own, rounding(model)))


def vocabulary(model: Any) -> int:
    """Return the number of tokens that a model knows."""
    return int(model.config.get_text_config().vocab_size)


def random_batch(model: Any) -> tuple[Tensor, Tensor]:
    """Return tokens and mask of two rows, the second padded on the right with its last token. [2, T] each"""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary(model), (len(LENGTHS), LENGTHS[0]), generator=generator)
    attention = torch.ones_like(tokens)
    tokens[1, LENGTHS[1] :], attention[1, LENGTHS[1] :] = tokens[1, LENGTHS[1] - 1], 0
    return tokens.to(model.device), attention.to(model.device)


def _centred_logits(model: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return the logits less their mean, which no probability depends on. [B, T, V] float32"""
    logits: Tensor = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.float()
    return logits - logits.mean(-1, keepdim=True)


def _embedding_gradient(model: Any, tokens: Tensor, own: Tensor, mask: Tensor | None) -> Tensor:
    """Return the gradient of the rows' summed loss by the embedded tokens. [B, T, H] float32"""
    with torch.enable_grad(), _embedded(model) as embedded:
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        scored = own[:, 1:]  # position t predicts token t + 1
        loss = nn.functional.cross_entropy(
            logits[:, :-1][scored].float(), tokens[:, 1:][scored], reduction="sum"
        )
        torch.autograd.backward(
            loss
        )  # autograd.grad does not go through transformers' reentrant checkpointing
    gradient = embedded[0].grad
    return torch.zeros_like(embedded[0]) if gradient is None else gradient.float()


@contextmanager
def _embedded(model: Any) -> Iterator[list[Tensor]]:
    """Make the embedded tokens of a forward call need a gradient, and note them."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = model.get_input_embeddings().register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _close(found: Tensor, expected: Tensor, own: Tensor, tolerance: float) -> bool:
    """Return whether each row agrees at its own tokens, by the relative size of the difference."""
    for row, tokens in enumerate(own):
        error = float((found[row, tokens] - expected[row, tokens]).norm())
        if not error <= tolerance * float(expected[row, tokens].norm()):
            return False
    return True
