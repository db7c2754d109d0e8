"""Activation checkpointing under the capture: each block's activations are made again in the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch  # noqa: TID253  (imported lazily with the whole layer)
from torch.utils.checkpoint import checkpoint  # noqa: TID253


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Recompute every block that transformers marks as one, also in eval mode, while the context lasts.

    transformers' own switch acts in training mode only, which would bring dropout back.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
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
