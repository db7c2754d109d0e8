"""Products of 16-bit matrices with float32 results.

A product of two bfloat16 numbers is exact in float32, so adding up in float32 loses nothing against making
both matrices float32 first, which takes twice their memory and, on a GPU, units that are many times slower.
"""

from __future__ import annotations

from functools import cache

import torch  # noqa: TID253  (imported lazily with the whole layer)
from torch import Tensor  # noqa: TID253

NARROW = (torch.bfloat16, torch.float16)


@cache
def has_wide_products(device: str) -> bool:
    """Return whether a kind of device multiplies 16-bit matrices into float32 (CUDA does, a CPU does not)."""
    one = torch.ones(1, 8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.bmm(one, one, out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def multiplies_wide(a: Tensor, b: Tensor) -> bool:
    """Return whether a product of these two is made without widening them first."""
    return a.dtype in NARROW and a.dtype == b.dtype and has_wide_products(a.device.type)


def wide_bmm(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of matrices [b, n, k] and [b, k, m], added up in float32. [b, n, m] float32"""
    if multiplies_wide(a, b):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


class WideLinear(torch.autograd.Function):
    """x W^T in float32 of a 16-bit x and a frozen 16-bit W, and the gradient of x in its own format."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        """Return the product. [..., n] float32. x: [..., k]. weight: [n, k]"""
        ctx.weight = weight  # type: ignore[attr-defined]
        flat = torch.mm(x.reshape(-1, x.shape[-1]), weight.T, out_dtype=torch.float32)
        return flat.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        weight: Tensor = ctx.weight  # type: ignore[attr-defined]
        return gradients[0].to(weight.dtype) @ weight, None
