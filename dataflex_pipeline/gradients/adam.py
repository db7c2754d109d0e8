"""The Adam update of one row's gradient, from the states that the optimizer has at a checkpoint.

``torch``, what torch.optim.AdamW's next step would do with g alone (clipping and weight decay aside):

    m' = (b1 m + (1 - b1) g) / (1 - b1^(t+1))
    v' = (b2 v + (1 - b2) g^2) / (1 - b2^(t+1))
    Gamma = m' / (sqrt(v') + eps)

``less``, as released with the paper (Xia et al., 2024, "LESS", section 3.1 and its code): b1 = 0.9,
b2 = 0.999, eps = 1e-8, no bias correction, eps inside the root:

    Gamma = (b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps)

m, v: running means of the gradient and of its square; t: steps taken so far; b1, b2, eps: the optimizer's
own. The two differ by a factor of 10 per element at v = 1e-10.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dataflex_pipeline.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dataflex_pipeline.models.optimizer_states import AdamState

Rule = Literal["torch", "less"]
LESS_BETAS, LESS_EPS = (0.9, 0.999), 1e-8
CACHED_ELEMENTS = 1 << 18
"""Elements that a CPU works on at a time (1 MiB), so that its passes over them stay in its cache."""


@dataclass(frozen=True)
class AdamUpdate:
    """The update of one parameter as a function of the gradient, its constant parts made once.

    Attributes:
        mean, square: the parts of m' and v' that do not depend on g; shape of the parameter, float32.
        mean_factor, square_factor: what g and g^2 are multiplied by in m' and v'.
        eps: added to v' where ``eps_inside``, else to its root.
    """

    mean: Tensor
    square: Tensor
    mean_factor: float
    square_factor: float
    eps: float
    eps_inside: bool

    @classmethod
    def of(cls, state: AdamState, rule: Rule = "torch", device: torch.device | str = "cpu") -> AdamUpdate:
        """Prepare the update from a parameter's states."""
        inside = rule == "less"
        (b1, b2), eps = (LESS_BETAS, LESS_EPS) if inside else (state.betas, state.eps)
        unbias1, unbias2 = (1.0, 1.0) if inside else (1 - b1 ** (state.step + 1), 1 - b2 ** (state.step + 1))
        mean = state.exp_avg.to(device).float().contiguous()
        square = state.exp_avg_sq.to(device).float().contiguous()
        square = square * (b2 / unbias2)
        return cls(
            mean=mean * (b1 / unbias1),
            square=square + eps if inside else square,
            mean_factor=(1 - b1) / unbias1,
            square_factor=(1 - b2) / unbias2,
            eps=eps,
            eps_inside=inside,
        )

    def apply_(self, gradient: Tensor) -> Tensor:
        """Turn gradients into updates, in place, some coordinates at a time. [b, *shape] float32"""
        flat = gradient.view(len(gradient), self.mean.numel())
        for tile in tiles(flat):
            self.apply_to(flat[:, tile], tile)
        return gradient

    def apply_to(self, gradient: Tensor, tile: slice) -> None:
        """Turn the gradients of some coordinates into updates, in place. [b, tile] float32"""
        mean, square = self.mean.view(-1)[tile], self.square.view(-1)[tile]
        root = gradient.square().mul_(self.square_factor).add_(square).sqrt_()
        if not self.eps_inside:
            root.add_(self.eps)
        gradient.mul_(self.mean_factor).add_(mean).div_(root)


def tiles(flat: Tensor) -> Iterator[slice]:
    """Yield the coordinates that are worked on at a time: all, but on a CPU. flat: [b, numel]"""
    size = flat.shape[1]
    step = size if flat.device.type != "cpu" else max(1, CACHED_ELEMENTS // max(1, len(flat)))
    for first in range(0, size, max(1, step)):
        yield slice(first, first + step)


def adam_update(gradient: Tensor, state: AdamState, rule: Rule = "torch") -> Tensor:
    """Return the Adam update of each gradient of a batch, leaving the gradients as they are.

    Args:
        gradient: [b, *shape of the parameter]. state: the parameter's. rule: see the module.
    """
    import torch

    return AdamUpdate.of(state, rule, gradient.device).apply_(
        gradient.float().clone(memory_format=torch.contiguous_format)
    )


def match_states(
    trainable: Iterable[tuple[str, Tensor]], states: Mapping[str, AdamState]
) -> dict[str, AdamState]:
    """Return the states of every trainable parameter, in the parameters' order.

    A parameter that never had a gradient (of an image encoder, where text is trained on) is where the
    optimizer would begin with it: m = v = 0, t = 0.

    Args:
        trainable: names and parameters that require a gradient. states: by parameter name.

    Raises:
        UserError: a parameter without states or with states of another shape, or states left over.
    """
    matched: dict[str, AdamState] = {}
    for name, parameter in trainable:
        state = states.get(name)
        if state is None:
            raise _foreign(f"The checkpoint's optimizer has no states of the parameter {name}.")
        if state.step == 0:
            nothing = parameter.detach().new_zeros(parameter.shape, device="cpu")
            state = replace(state, exp_avg=nothing, exp_avg_sq=nothing)
        for found in (state.exp_avg, state.exp_avg_sq):
            if found.shape != parameter.shape:
                raise _foreign(
                    f"The parameter {name} has the shape {list(parameter.shape)}, and its Adam states "
                    f"have {list(found.shape)}."
                )
        matched[name] = state
    extra = [name for name in states if name not in matched]
    if extra:
        raise _foreign(
            f"The checkpoint's optimizer has states of {len(extra)} parameters that the model does not "
            f"train, such as {extra[0]}."
        )
    return matched


def _foreign(what: str) -> UserError:
    return UserError(
        what,
        "These look like the states of another model or adapter, and an update from them would mean nothing.",
        "Score with the checkpoint that was trained with this model, finetuning_type and lora_* settings, "
        "or set gradient_type: sgd to go without Adam.",
    )
