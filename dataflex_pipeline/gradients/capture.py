"""True per-sample gradients of a causal language model from one batched forward and backward.

The loss of a row is its own mean negative log-likelihood (nats) over its response tokens, as in the losses
feature; the backward pass runs once, from the sum over the rows. Taps behind the layers (taps.py) see x and
dy, which are enough for the per-sample gradients of known kinds of layers (layers.py). As soon as all uses of
a parameter have delivered, its gradients are made, some rows at a time, given to the consumer and dropped: at
no time do the gradients of all parameters exist. A parameter used several times (tied weights) is given as
the sum of its uses, since what follows (Adam) is not linear.

Parameters of layers of any other kind go the slow way, row by row (single_rows.py), and are named in a
notice. So do those for which the captured gradient of a padded row is not what autograd says of that row
alone, such as weights that a model reads past their own layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch  # noqa: TID253  (imported lazily with the whole layer)
from torch import Tensor, nn  # noqa: TID253

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.gradients.layers import gradient_of
from dataflex_pipeline.gradients.single_rows import Comparison, alone, row_gradients
from dataflex_pipeline.gradients.taps import (
    Contribution,
    Tap,
    Tapped,
    checkpointed,
    checkpointed_blocks,
    inputs_need_gradients,
)
from dataflex_pipeline.models.rounding import CANCELLED, rounding
from dataflex_pipeline.models.token_losses import predicting, token_losses

BLOCK_ELEMENTS = 1 << 26
"""Gradient elements that are made at a time (256 MiB in float32): as many rows of one parameter as fit."""


class GradientConsumer(Protocol):
    """Takes the per-sample gradients, parameter by parameter."""

    def __call__(self, name: str, rows: slice, gradient: Tensor) -> None:
        """Take one parameter's gradients of some rows of the batch; called once per parameter and row.

        Args:
            name: of the parameter. rows: of the batch, a contiguous range.
            gradient: [b, *shape] float32, the consumer's to overwrite
        """


def _longest_and_shortest(predicts: Tensor, attention: Tensor) -> list[int]:
    """Return the longest and the shortest row that have labels: both, the one there is, or none."""
    labelled = predicts.any(1).nonzero().flatten().tolist()
    lengths = attention.sum(1).tolist()
    ordered = sorted(labelled, key=lambda row: -lengths[row])  # ties: the earlier row first
    return ordered if len(ordered) < 2 else [ordered[0], ordered[-1]]


class GradientCapture:
    """Per-sample gradients of the parameters that require one, while the context lasts.

    Inside the context the parameters' ``requires_grad`` is off; it is put back at the end. Every parameter is
    given for every row of every batch, as zeros where it had no part in the loss, so that what a row gives
    does not depend on its batch.

    Args:
        model: a causal LM in eval mode (transformers, with or without a PEFT adapter).
        consumer: takes the gradients; called from inside the backward pass.
        say: prints one line: what goes the slow way, and why.
        checkpointing: recompute the activations of each block in the backward pass, to save memory.
        block_elements: gradient elements made at a time. verify: compare one row with autograd first.

    Attributes:
        largest_error: of the comparison with autograd, the largest relative difference of a parameter that
            passed it; None before there was one.
        temperature: what the logits are divided by before the loss, from here on; 1 at first.

    Raises:
        UserError: on entering, if the model has no parameter that requires a gradient.
    """

    def __init__(
        self,
        model: Any,
        consumer: GradientConsumer,
        say: Callable[[str], None],
        *,
        checkpointing: bool = False,
        block_elements: int = BLOCK_ELEMENTS,
        verify: bool = True,
    ) -> None:
        self._model, self._consumer, self._say = model, consumer, say
        self._checkpointing, self._block, self._verify = checkpointing, block_elements, verify
        self.temperature = 1.0
        self.parameters: dict[str, nn.Parameter] = {}
        self.slow: set[str] = set()
        self.largest_error: float | None = None
        self._uses: dict[str, int] = {}
        self._pending: dict[str, list[Contribution]] = {}
        self._given: set[str] = set()
        self._tapping = self._in_backward = self._copies = False
        self._shape, self._bounds = (0, 0), [0]

    def __enter__(self) -> GradientCapture:
        self.parameters = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UserError(
                "Gradients of the model were asked for, and none of its parameters is trainable.",
                "There is nothing to take a gradient with respect to (before the warm-up, a LoRA run has no "
                "adapter yet).",
                "Score with a checkpoint that has an adapter, or set finetuning_type: full.",
            )
        device = next(iter(self.parameters.values())).device
        self._trigger = torch.zeros((), device=device, requires_grad=True)
        with ExitStack() as stack:
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_, True)
            self._losses = stack.enter_context(token_losses(self._model, self._say, self.parameters.values()))
            self._tap_layers(stack)
            stack.enter_context(inputs_need_gradients(self._model))
            if self._checkpointing:
                stack.enter_context(checkpointed(self._model))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def max_labels(self) -> int:
        """Predicted tokens that a batch may have."""
        return self._losses.max_labels

    def save_memory(self) -> bool:
        """Recompute activations from here on; return whether that is new, and possible with this model."""
        if self._checkpointing or not checkpointed_blocks(self._model):
            return False
        self._checkpointing = True
        self._stack.enter_context(checkpointed(self._model))
        self._say(
            "a row did not fit the memory alone: activations are recomputed from here on, which is slower"
        )
        return True

    def run(self, ids: Tensor, labels: Tensor, attention: Tensor) -> Tensor:
        """Give the consumer the gradients of a batch of rows.

        Args:
            ids, labels, attention: tokens, labels (-100: no loss) and mask, int64, padded on either side.
                [B, T] each

        Returns:
            The rows' losses, NaN for a row without labels (its gradients are zeros). [B] float32
        """
        if self._verify:
            self._compare_one_row(ids, labels, attention)
        return self._capture(ids, labels, attention, self._consumer)

    def row_losses(self, ids: Tensor, labels: Tensor, attention: Tensor) -> Tensor:
        """Return the rows' mean losses in nats per response token, 0 without any. [B] float32"""
        mask = predicting(labels, attention)
        counts = mask.sum(1)
        self._bounds = [0, *counts.cumsum(0).tolist()]
        self._shape = (ids.shape[0], ids.shape[1])
        nll = self._losses(ids, labels, attention, mask, self.temperature)  # [W]
        table = nll.new_zeros(ids.shape)
        table[mask] = nll  # summed by row in a fixed order, on every device
        return table.sum(1) / counts.clamp(min=1)

    def _capture(self, ids: Tensor, labels: Tensor, attention: Tensor, consumer: GradientConsumer) -> Tensor:
        self._sink = consumer
        try:
            losses = self._tapped_losses(ids, labels, attention)
            self._in_backward = True
            if losses.requires_grad:  # not where all parameters go the slow way
                torch.autograd.backward(losses.sum())
            for name in list(self._pending):  # a use whose output led nowhere never delivers
                self._give(name)
        finally:
            self._tapping, self._pending = False, {}
        self._give_zeros()
        if self.slow:
            slow = {name: self.parameters[name] for name in self.parameters if name in self.slow}
            row_gradients(self.row_losses, slow, (ids, labels, attention), consumer)
        labelled = predicting(labels, attention).any(1)
        return losses.detach().masked_fill(~labelled, torch.nan)

    def _tapped_losses(self, ids: Tensor, labels: Tensor, attention: Tensor) -> Tensor:
        """Return the rows' losses with the layers tapped.

        Taps return views, which cost nothing; a model that changes a layer's output in place gets copies.
        """
        self._uses, self._pending, self._given = dict.fromkeys(self.parameters, 0), {}, set()
        self._tapping, self._in_backward = True, False
        try:
            return self.row_losses(ids, labels, attention)
        except RuntimeError as error:
            if self._copies or "modified inplace" not in str(error):
                raise
        self._copies = True
        return self._tapped_losses(ids, labels, attention)

    def _tap_layers(self, stack: ExitStack) -> None:
        full = {id(parameter): name for name, parameter in self.parameters.items()}
        head = set(self._model.get_output_embeddings().modules())
        unknown: dict[str, str] = {}
        for module in self._model.modules():
            own = {n: full[id(p)] for n, p in module._parameters.items() if id(p) in full}
            if not own:
                continue
            gradient = gradient_of(module)
            if gradient is None:
                unknown |= dict.fromkeys(own.values(), type(module).__name__)
                continue
            layer = Tapped(module, gradient, own, module in head)
            handle = module.register_forward_hook(self._hook_of(layer), with_kwargs=True)
            stack.callback(handle.remove)
        kinds = ", ".join(sorted(set(unknown.values())))
        self._go_slow(list(unknown), f"no batched per-sample gradients are known for {kinds}")

    def _hook_of(self, layer: Tapped) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self._tapping:
                return None
            names = [name for name in layer.names.values() if name not in self.slow]
            if not self._in_backward:
                for name in names:
                    self._uses[name] += 1
            x = args[0] if args else next(iter(kwargs.values()))
            if not self._by_rows(layer, x, output):
                shape = list(x.shape)
                self._go_slow(names, f"a {type(module).__name__} sees its input as {shape}, not by rows")
                return None
            return Tap.apply(  # type: ignore[no-untyped-call]
                self._trigger, output, x.detach(), layer, self._deliver, self._copies
            )

        return hook

    def _by_rows(self, layer: Tapped, x: Tensor, output: Any) -> bool:
        """Return whether rows can be told apart: [B, ..., T, ...], or [1, W] in the output head."""
        if not isinstance(output, Tensor) or x.dim() < 2 or x.shape[0] != output.shape[0]:
            return False
        if layer.head:
            return tuple(x.shape[:2]) == (1, self._bounds[-1])
        between = x.shape[1:] if not x.is_floating_point() else x.shape[1:-1]
        return x.shape[0] == self._shape[0] and self._shape[1] in between

    def _deliver(self, layer: Tapped, x: Tensor, dy: Tensor) -> None:
        bounds = self._bounds if layer.head else None
        for own, name in layer.names.items():
            if name in self.slow:
                continue
            uses = self._pending.setdefault(name, [])
            uses.append(Contribution(layer, own, x, dy, bounds))
            if len(uses) == self._uses[name]:
                self._give(name)

    def _give(self, name: str) -> None:
        uses = self._pending.pop(name)
        if name in self.slow:
            return
        tapping, self._tapping = self._tapping, False  # some layers are run again for their gradients
        for rows in self._row_blocks(name):
            gradient = uses[0].gradient(rows)
            for use in uses[1:]:
                gradient += use.gradient(rows)
            self._sink(name, rows, gradient)
        self._tapping = tapping
        self._given.add(name)

    def _give_zeros(self) -> None:
        for name, parameter in self.parameters.items():
            if name not in self._given and name not in self.slow:
                for rows in self._row_blocks(name):
                    shape = (rows.stop - rows.start, *parameter.shape)
                    self._sink(name, rows, torch.zeros(shape, device=parameter.device))

    def _row_blocks(self, name: str) -> list[slice]:
        count = self._shape[0]
        step = max(1, self._block // max(1, self.parameters[name].numel()))
        return [slice(first, min(first + step, count)) for first in range(0, count, step)]

    def _compare_one_row(self, ids: Tensor, labels: Tensor, attention: Tensor) -> None:
        """Send the slow way every parameter whose captured gradient is not autograd's.

        The shortest row of a batch is compared, in the company of the longest; where that has no padding, so
        is that of the first batch which has.
        """
        rows = _longest_and_shortest(predicting(labels, attention), attention)
        has_padding = bool(rows) and not bool(attention[rows[-1]].all())
        if not rows or (self.largest_error is not None and not has_padding):
            return
        batch = ids[rows], labels[rows], attention[rows]
        comparison = Comparison(len(rows) - 1)
        fast = {name: p for name, p in self.parameters.items() if name not in self.slow}
        if fast:
            row_gradients(self.row_losses, fast, alone(*batch, len(rows) - 1), comparison.expect)
            self._capture(*batch, comparison)
        wrong = [
            name
            for name in comparison.different(max(CANCELLED, rounding(self._model)))
            if name not in self.slow
        ]
        self._go_slow(wrong, "what their layers saw does not explain the gradient of a row")
        right = [error for name, error in comparison.relative().items() if name not in self.slow]
        self.largest_error = max([self.largest_error or 0.0, *right])
        self._verify = not has_padding

    def _go_slow(self, names: list[str], why: str) -> None:
        if names:
            self.slow.update(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self._say(f"Gradients of {names[0]}{more} are made row by row, which is slow: {why}.")
