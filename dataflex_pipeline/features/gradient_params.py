"""What methods on projected gradients let their users set, and the parameters of the tables that follow."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dataflex_pipeline import api


class GradientParams(api.Params):
    """Parameters of every method on projected gradients; such a method's Params inherit from this class."""

    gradient_type: Literal["adam", "sgd"] = Field(
        "adam",
        description="the pool's side: Adam's update of each row's gradient, or the gradient itself",
    )
    adam_update: Literal["torch", "less"] = Field(
        "torch",
        description="torch: what the optimizer's next step would do; less: the published code's form",
    )
    proj_dim: int = Field(4096, ge=1, description="dimensions that gradients are projected to")
    projection: Literal["countsketch", "rademacher", "trak"] = Field(
        "countsketch",
        description="the random projection: one signed bucket per coordinate, or dense signs",
    )
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="number format of projected gradients on disk"
    )
    temperature: float = Field(
        0.1,
        gt=0,
        description="for strategy: sample, which draws by exp(score / (largest |score| x temperature))",
    )


def projection_parameters(params: GradientParams, seed: int) -> dict[str, Any]:
    """Return what the tables of both sides share: the projection, so that their products mean something."""
    return {
        "proj_dim": params.proj_dim,
        "projection": params.projection,
        "dtype": params.dtype,
        "seed": seed,
    }


def pool_parameters(params: GradientParams, seed: int) -> dict[str, Any]:
    """Return the parameters of the pool's gradients; equal ones are computed once, whatever method asks."""
    side: dict[str, Any] = {"side": params.gradient_type}
    if params.gradient_type == "adam":
        side["adam_update"] = params.adam_update
    return projection_parameters(params, seed) | side
