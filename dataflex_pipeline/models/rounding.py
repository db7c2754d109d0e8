"""Bounds on the rounding difference of two ways to the same number, in the precision of a model.

In float32 a bound of 1e-3 lies far above rounding and far below anything wrong: a gradient of other rows or
positions is off by about 1. In bfloat16 the two come nearer, and the bound follows the model's depth.

Each number that is stored in bfloat16 is off by at most the unit roundoff u = 2^-8 of its size, and evenly
so, which is u / sqrt(3) in the mean square. A layer stores about 8 tensors on the way from its input to its
output (two norms; the projections, scores and output of attention; the MLP's two halves; the sums), and as
many on the way back. What reaches a parameter's gradient has so been rounded n = 2 x 8 x L times in a model
of L layers. Independent errors add up by their squares, and two evaluations, whose kernels round in other
places, differ by those of both:

    difference / size = u / sqrt(3) x sqrt(2 n) = u / sqrt(3) x sqrt(32 L)

4 times that is allowed, for what a layer enlarges and for sums that cancel, and never more than 1/2, half of
what a wrong gradient is off by. For 2, 32 and 80 layers that is 0.07, 0.29 and 0.46.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

EXACT = 1e-3
"""Relative difference that rounding explains in float32."""
CANCELLED = 1e-2
"""The same of one parameter's gradient: where its terms nearly cancel, as those of queries and keys do,
little is left to compare the rounding of the terms with (1.4e-3 was seen on a sound capture)."""
UNIT_ROUNDOFF = 2.0**-8
"""Of bfloat16."""
PER_LAYER, SAFETY, AT_MOST = 8, 4.0, 0.5


def rounding(model: nn.Module) -> float:
    """Return the relative difference of two evaluations that rounding explains in the model's precision."""
    import torch

    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
    device = next(model.parameters()).device.type
    return EXACT if exact and not torch.is_autocast_enabled(device) else coarse_rounding(depth(model))


def coarse_rounding(layers: int) -> float:
    """Return it for bfloat16 and a number of layers, as the module says."""
    expected = UNIT_ROUNDOFF / math.sqrt(3) * math.sqrt(2 * 2 * PER_LAYER * layers)
    return min(AT_MOST, SAFETY * expected)


def depth(model: Any) -> int:
    """Return a model's number of layers."""
    return int(model.config.get_text_config().num_hidden_layers)
