"""Per-sample parameter gradients of single layers, from their input x and the gradient dy of their output.

For a layer y = f(x; w) that treats positions alike, the gradient of row b's loss is the sum over the row's
positions t of dy_bt (d y_bt / d w). Kinds: linear (``dW = sum_t dy_t x_t^T``, LoRA's A and B are two of
them), GPT-2's Conv1D (its transpose), embeddings, LayerNorm and RMSNorms. All sums are in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch  # noqa: TID253  (imported lazily with the whole layer)
from torch import Tensor, nn  # noqa: TID253
from torch.nn import functional  # noqa: TID253

from dataflex_pipeline.models.wide_products import wide_bmm

LayerGradient = Callable[[Any, str, Tensor, Tensor], Tensor]
"""(layer, name of its parameter, x [b, ..., in], dy [b, ..., out]) -> gradients [b, *shape] float32."""


def gradient_of(module: nn.Module) -> LayerGradient | None:
    """Return how the per-sample gradients of a layer's own parameters are made; None: of no known kind."""
    from transformers.pytorch_utils import Conv1D

    forward = type(module).forward
    if forward is nn.Linear.forward:
        return linear_gradient
    if forward is Conv1D.forward:
        return conv1d_gradient
    if isinstance(module, nn.Embedding) and not module.max_norm and not module.scale_grad_by_freq:
        plain = forward is nn.Embedding.forward
        return embedding_gradient if plain or hasattr(module, "embed_scale") else None
    if forward is nn.LayerNorm.forward:
        return layer_norm_gradient
    if forward is nn.RMSNorm.forward:
        return rms_norm_gradient
    return broadcast_gradient if _takes_a_weight_per_row(module) else None


def _takes_a_weight_per_row(module: nn.Module) -> bool:
    """Return whether it is a model's own norm with one weight [n], and works as well with one per row."""
    weights = list(module.named_parameters())
    if not type(module).__name__.endswith("Norm") or [weight.dim() for _, weight in weights] != [1]:
        return False
    name, weight = weights[0]
    with torch.no_grad():
        x = torch.linspace(-1, 1, 6 * len(weight), device=weight.device).view(2, 3, -1)
        copies = weight.detach().float().expand(2, 1, -1)
        try:
            found = torch.func.functional_call(module, {name: copies}, (x,))
        except (RuntimeError, TypeError, ValueError):  # such as a kernel that wants a weight [n]
            return False
        same: bool = torch.allclose(found, torch.func.functional_call(module, {name: copies[0, 0]}, (x,)))
        return same


def _positions(tensor: Tensor) -> Tensor:
    """Put all positions of a row into one dimension. [b, ..., n] -> [b, positions, n]"""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def linear_gradient(module: Any, name: str, x: Tensor, dy: Tensor) -> Tensor:
    """Return the gradients of a linear layer's weight [b, out, in] or bias [b, out]."""
    if name == "bias":
        return _positions(dy).sum(1, dtype=torch.float32)
    return wide_bmm(_positions(dy).transpose(1, 2), _positions(x))


def conv1d_gradient(module: Any, name: str, x: Tensor, dy: Tensor) -> Tensor:
    """Return the gradients of GPT-2's Conv1D: weight [b, in, out] or bias [b, out]."""
    if name == "bias":
        return _positions(dy).sum(1, dtype=torch.float32)
    return wide_bmm(_positions(x).transpose(1, 2), _positions(dy))


def embedding_gradient(module: Any, name: str, x: Tensor, dy: Tensor) -> Tensor:
    """Return the gradients of an embedding's weight [b, V, H]; x are token ids [b, ...]."""
    entries, width = module.weight.shape
    rows = x.shape[0]
    ids = x.reshape(rows, -1)
    values = _positions(dy).float() * float(getattr(module, "embed_scale", 1.0))
    if module.padding_idx is not None:
        # Not multiplied by 0: what flows back to padding may be no number, and autograd leaves it out, too.
        values = values.masked_fill((ids == module.padding_idx)[..., None], 0.0)
    flat = (ids + torch.arange(rows, device=ids.device)[:, None] * entries).flatten()
    result = torch.zeros(rows * entries, width, device=dy.device)
    # An accelerator adds in a fixed order only in index_put_, which sorts; a CPU always does.
    if dy.device.type != "cpu":
        result.index_put_((flat,), values.reshape(-1, width), accumulate=True)
    else:
        result.index_add_(0, flat, values.reshape(-1, width))
    return result.view(rows, entries, width)


def _sum_over_positions(product: Tensor, shape: torch.Size) -> Tensor:
    return product.reshape(product.shape[0], -1, *shape).sum(1)


def layer_norm_gradient(module: Any, name: str, x: Tensor, dy: Tensor) -> Tensor:
    """Return the gradients of LayerNorm's weight or bias. [b, *normalized_shape]"""
    shape = module.weight.shape
    if name == "bias":
        return _sum_over_positions(dy.float(), shape)
    normed = functional.layer_norm(x.float(), shape, None, None, module.eps)
    return _sum_over_positions(dy.float() * normed, shape)


def rms_norm_gradient(module: Any, name: str, x: Tensor, dy: Tensor) -> Tensor:
    """Return the gradients of torch's RMSNorm weight. [b, *normalized_shape]"""
    # Without an eps, torch takes that of the dtype it normalises in, which is x's own.
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    normed = functional.rms_norm(x.float(), module.weight.shape, None, eps)
    return _sum_over_positions(dy.float() * normed, module.weight.shape)


def broadcast_gradient(module: Any, name: str, x: Tensor, dy: Tensor) -> Tensor:
    """Return the gradients of the weight [b, n] of a model's own norm, however it applies the weight.

    The layer is run again with one copy of the weight per row, which autograd then tells apart.
    """
    weight = getattr(module, name).detach().float()
    copies = weight.expand(x.shape[0], *(1,) * (x.dim() - 2), -1).clone().requires_grad_()
    with torch.enable_grad():
        y = torch.func.functional_call(module, {name: copies}, (x.detach().float(),))
        gradient: Tensor = torch.autograd.grad(y, copies, dy.to(y.dtype))[0]
    return gradient.reshape(x.shape[0], -1)
