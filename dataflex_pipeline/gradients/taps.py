"""Hooks on the layers of a model under the capture: activation checkpointing of its blocks, and the taps.

A tap is an identity on a layer's output that remembers the layer's input. The parameters themselves need no
gradient then: autograd computes what flows between the layers and not one weight gradient, and the input is
kept the way autograd keeps its own tensors, so activation checkpointing drops and recomputes it like any
other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch  # noqa: TID253  (imported lazily with the whole layer)
from torch import Tensor, nn  # noqa: TID253
from torch.utils.checkpoint import checkpoint  # noqa: TID253

from dataflex_pipeline.gradients.layers import LayerGradient

Deliver = Callable[["Tapped", Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Tapped:
    """A layer whose parameters are captured.

    Attributes:
        module: the layer. gradient: how its per-sample gradients are made.
        names: own name of a parameter in the layer -> its full name in the model.
        head: whether it is (in) the output head, which sees only the labelled positions of all rows.
    """

    module: nn.Module
    gradient: LayerGradient
    names: dict[str, str]
    head: bool


class Tap(torch.autograd.Function):
    """Pass a layer's output on, and give its gradient to ``deliver`` on the way back."""

    @staticmethod
    def forward(
        ctx: Any, trigger: Tensor, output: Tensor, x: Tensor, layer: Tapped, deliver: Deliver, copies: bool
    ) -> Tensor:
        """Return ``output``; ``trigger`` makes it need a gradient where nothing below it does.

        A model that goes on to change the output in place cannot do so with a view, and gets a copy.
        """
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.deliver = layer, deliver
        return output.clone() if copies else output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, Tensor | None, None, None, None, None]:
        """Deliver (layer, x, gradient of the output); None where the output led nowhere."""
        (dy,) = gradients
        if dy is not None:
            (x,) = ctx.saved_tensors
            ctx.deliver(ctx.layer, x, dy)
        return None, dy if ctx.needs_input_grad[1] else None, None, None, None, None


@dataclass(frozen=True)
class Contribution:
    """What one use of a layer adds to the gradients of one of its parameters.

    Attributes:
        layer, name: the layer and the parameter's own name in it.
        x, dy: the layer's input and the gradient of its output. [B, ...], or [1, W, ...] in the head
        bounds: where each row's labelled positions begin in W, then W; None outside the head. [B + 1]
    """

    layer: Tapped
    name: str
    x: Tensor
    dy: Tensor
    bounds: list[int] | None

    def gradient(self, rows: slice) -> Tensor:
        """Return the gradients of these rows. [b, *shape] float32"""
        if self.bounds is None:
            return self._of(self.x[rows], self.dy[rows])
        spans = [slice(*self.bounds[row : row + 2]) for row in range(rows.start, rows.stop)]
        return torch.cat([self._of(self.x[:, span], self.dy[:, span]) for span in spans])

    def _of(self, x: Tensor, dy: Tensor) -> Tensor:
        return self.layer.gradient(self.layer.module, self.name, x, dy)


def checkpointed_blocks(model: Any) -> list[torch.nn.Module]:
    """Return the blocks of a model whose activations can be recomputed, as transformers marks them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Recompute every block that transformers marks as one, also in eval mode, while the context lasts.

    transformers' own switch acts in training mode only, which would bring dropout back.
    """
    blocks = checkpointed_blocks(model)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is there again


@contextmanager
def inputs_need_gradients(model: Any) -> Iterator[None]:
    """Where transformers' checkpointing is on: make the embeddings' output need a gradient.

    The reentrant kind lets a gradient through a block only if one of the block's inputs needs it, and all
    parameters are frozen.
    """
    if not getattr(model, "is_gradient_checkpointing", False):
        yield
        return

    def require(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(require)
    try:
        yield
    finally:
        handle.remove()
