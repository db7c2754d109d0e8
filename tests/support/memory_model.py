"""The capture on tensors without numbers (device meta), in a 7B model's shapes: bytes alive, operations.

Everything runs as on a GPU but for three stand-ins: attention is one operation that keeps what flash
attention keeps, labels are the first half of each row (which positions have one depends on numbers), and the
trials at opening are passed over.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, masking_utils

from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.models import token_losses

LAYERS = 32
"""Of the whole model; figures are those of two and four layers, extrapolated."""
ROWS, TOKENS = 8, 2048
LLAMA_2_7B = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
VIEWS = frozenset(
    {"view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "permute"}
    | {"detach", "alias", "as_strided", "split", "unbind", "split_with_sizes", "lift_fresh"}
)


class Alive(TorchDispatchMode):
    """Counts bytes of tensors that are alive, the most there were, the largest one made, and operations.

    Args:
        present: tensors that are there already, and count for nothing.
    """

    def __init__(self, present):
        super().__init__()
        self._seen, self._now = {}, 0
        self._present = [tensor.untyped_storage() for tensor in present]
        self.begin()
        for storage in self._present:
            self._note(storage)
        self.begin()

    def begin(self):
        """Count from here on."""
        self._base = self.peak = self._now
        self.largest, self.launches = 0, 0

    @property
    def more(self):
        """Bytes at the peak, beyond what was alive at the beginning."""
        return self.peak - self._base

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            self._note(tensor.untyped_storage())
        self.launches += func._schema.name.split("::")[-1] not in VIEWS
        return out

    def _note(self, storage):
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return
        self._now += size
        self.peak, self.largest = max(self.peak, self._now), max(self.largest, size)

        def gone(_):
            self._now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)


class Flash(torch.autograd.Function):
    """Attention that keeps its inputs, its output and one number per query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, *given):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def attention(q, k, v, attn_mask=None, is_causal=False, **_):
    """Stand in for scaled_dot_product_attention; a mask would take the fast kernels away."""
    assert attn_mask is None
    assert is_causal
    return Flash.apply(q, k, v)


class HalfLabelled(GradientCapture):
    """The capture with labels on the first half of each row."""

    def row_losses(self, ids, labels, attention):
        rows, width = ids.shape
        self._shape = rows, width
        inputs = self._losses._inputs(ids, attention)
        states = self._losses._shares.states(inputs)[:, : width // 2].flatten(0, 1)
        nll = self._losses._shares.losses(states, labels[:, : width // 2].flatten())
        return nll.view(rows, -1).mean(1)


@dataclass(frozen=True)
class Figures:
    """Of one batch: bytes per token beyond the weights, bytes of the largest tensor made, operations."""

    per_token: float
    largest: int
    launches: float


def capture_figures(rank, checkpointing=False, adapter=torch.bfloat16):
    """Return the figures of 8 rows of 2,048 tokens through a 7B model with LoRA on all linear layers."""
    few, more = (_measured(layers, rank, checkpointing, adapter) for layers in (2, 4))
    per_layer = (more.more - few.more) / 2
    whole = more.more + (LAYERS - 4) * per_layer
    launches = more.launches + (LAYERS - 4) * (more.launches - few.launches) / 2
    return Figures(whole / (ROWS * TOKENS), max(few.largest, more.largest), launches)


def _measured(layers, rank, checkpointing, adapter):
    with ExitStack() as stack, torch.device("meta"):
        for target, name, stand_in in (
            (functional, "scaled_dot_product_attention", attention),
            (masking_utils, "find_packed_sequence_indices", lambda _: None),
            (token_losses, "needs_mask", lambda *_, **__: False),
            (token_losses, "is_right_padded", lambda _: True),
            (token_losses._Shares, "_reaches_the_logits", lambda _: True),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**LLAMA_2_7B, num_hidden_layers=layers), dtype=torch.bfloat16
        )
        model.requires_grad_(False)
        lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter)
        batch = [torch.ones(ROWS, TOKENS, dtype=torch.long) for _ in range(3)]
        alive = stack.enter_context(Alive([*model.parameters(), *model.buffers()]))
        capture = HalfLabelled(model, lambda *_: None, print, checkpointing=checkpointing, verify=False)
        with capture:
            alive.begin()
            capture.run(*batch)
    return alive
