"""Parameters that features and methods share, each declared once.

A feature's Params and those of the methods that ask for it inherit from the same base here, so that a
parameter has one default, one range and one meaning. `Params.part` hands the values of a base on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from dataflex_pipeline import api
from dataflex_pipeline.gradients.policy import Baseline, Policy
from dataflex_pipeline.home import expanded
from dataflex_pipeline.reward.rewarders import SHIPPED, read_settings

DIMENSIONS = 4096
"""Dimensions of a stored sketch where none are named."""
_DIM = "dimensions that gradients are projected to"
_KINDS = (
    "countsketch: one signed bucket per coordinate, countshift: the same by rotated chunks, faster, "
    "rademacher: dense signs, trak: dense signs by traker, on a GPU"
)


class SketchParams(api.Params):
    """A random projection with its seed; tables to be compared share it, so that products mean something."""

    proj_dim: int = Field(DIMENSIONS, ge=1, description=_DIM)
    projection: Literal["countsketch", "countshift", "rademacher", "trak"] = Field(
        "countsketch", description=_KINDS
    )
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="number format of projected gradients on disk"
    )
    seed: int = Field(0, ge=0, description="of the projection")


def by_name(model: str | None) -> str | None:
    """Return a model's name; a folder's own alone, since its content counts and not where it lies."""
    return Path(model).name if model is not None and expanded(model).is_dir() else model


class ProjectionParams(api.Params):
    """Whether gradients are compared as they are, or projected and stored."""

    projection: Literal["none", "countsketch", "countshift", "rademacher", "trak"] | None = Field(
        None,
        description="none (also null, without proj_dim): exact, nothing is projected or stored; or a random "
        f"projection whose results are stored, {_KINDS}",
    )
    proj_dim: int | None = Field(
        None,
        ge=1,
        description=f"{_DIM}; null: {DIMENSIONS} with a projection; set, projection is countsketch",
    )
    dtype: Literal["float16", "float32"] = Field(
        "float16", description="number format of projected gradients on disk"
    )

    @model_validator(mode="before")
    @classmethod
    def _choose(cls, values: Any) -> Any:
        """Let a ``proj_dim`` ask for a projection; one without a projection is a mistake."""
        if not isinstance(values, dict):
            return values
        kind, dim = values.get("projection"), values.get("proj_dim")
        if kind == "none" and dim is not None:
            raise ValueError(
                f"projection: none projects nothing, and proj_dim is {dim}: leave out proj_dim, or set "
                "projection: countsketch"
            )
        if kind is None:
            kind = "none" if dim is None else "countsketch"
        if kind != "none" and dim is None:
            dim = DIMENSIONS
        if kind == "none" and values.get("dtype", "float16") != "float16":
            raise ValueError(
                "dtype is the number format of stored projections, and projection: none stores none: leave "
                "it out, or set projection: countsketch"
            )
        return values | {"projection": kind, "proj_dim": dim}

    @property
    def exact(self) -> bool:
        """Whether nothing is projected."""
        return self.projection == "none"


class UpdateParams(api.Params):
    """The form of Adam's update."""

    adam_update: Literal["torch", "less"] = Field(
        "torch",
        description="torch: what the optimizer's next step would do; less: the published code's form",
    )


class GradientParams(ProjectionParams, UpdateParams):
    """Parameters of every method on gradients."""

    gradient_type: Literal["adam", "sgd"] = Field(
        "adam",
        description="the pool's side; adam: Adam's update of each row's gradient, sgd: the gradient itself",
    )
    temperature: float = Field(
        0.1,
        gt=0,
        description="for strategy: sample, which draws by exp(score / (largest |score| x temperature))",
    )
    aggregate: Literal["max", "mean", "vote"] = Field(
        "max",
        description="the score over target groups: the largest similarity, their mean, or how many groups "
        "have the row among their best (vote)",
    )
    vote_share: float = Field(
        0.2,
        gt=0,
        le=1,
        description="of aggregate: vote: the share of the scored rows, a group's best, that get its vote",
    )


class GenerationParams(api.Params):
    """How the model's own answers to the target's prompts are drawn."""

    mc_samples: int = Field(4, ge=1, description="answers drawn per target row")
    max_new_tokens: int = Field(512, ge=1, description="longest answer in tokens")
    generation_temperature: float = Field(
        0.7, ge=0, description="of the drawn answers, and of log p in a policy gradient; 0: greedy"
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the probability that answers are drawn from; below 1 biases their gradient",
    )
    top_k: int = Field(
        0, ge=0, description="tokens that answers are drawn from; 0: all, fewer bias their gradient"
    )
    max_prompt_length: int = Field(4096, ge=1, description="tokens of a prompt, cut at its beginning")
    generator: Literal["auto", "vllm", "transformers"] = Field(
        "auto",
        description="what draws the answers; auto: vllm on a GPU, if installed, else transformers",
    )
    generation_batch_size: int | None = Field(
        None,
        ge=1,
        exclude=True,
        description="answers drawn at the same time; null: the generator's own; changes no result",
    )
    generation_gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, exclude=True, description="share of a GPU's memory that vLLM draws with"
    )
    generation_tensor_parallel_size: int = Field(
        1, ge=1, exclude=True, description="GPUs that vLLM spreads the model over"
    )

    @property
    def policy_temperature(self) -> float:
        """What logits are divided by where log p of a drawn answer is taken; 1 for greedy ones."""
        return self.generation_temperature or 1.0


class DrawnParams(GenerationParams):
    """The same with the seed: parameters of the generations feature."""

    seed: int = Field(0, ge=0, description="of the random numbers")


def backend_defaults() -> dict[str, dict[str, Any]]:
    """Return every reward backend's settings and their defaults."""
    return {
        name: {key: field.default for key, field in kind.model_fields.items()}
        for name, kind in SHIPPED.items()
    }


def backend_meanings() -> dict[str, Any]:
    """Return what every reward backend is, by its name, and its settings mean, by backend.setting."""
    kinds = {name: str(kind.__doc__).partition("\n")[0].rstrip(".") for name, kind in SHIPPED.items()}
    return kinds | {
        f"{name}.{key}": field.description
        for name, kind in SHIPPED.items()
        for key, field in kind.model_fields.items()
    }


class RewardParams(api.Params):
    """What judges an answer.

    The settings of the backends are left out of a dump: the reward table's own fingerprint holds what can
    change a reward.
    """

    reward_model_backend: str = Field(
        "local_vllm",
        description="what judges an answer: a language model here or behind an HTTP API, a "
        "classifier, or a function; or file.py:Class of your own",
    )
    reward_backend_params: dict[str, Any] = Field(
        default_factory=backend_defaults,
        exclude=True,  # the reward table says what of it decides a reward
        description="settings by backend: local_vllm, api, reward_model, metric; those of your own: settings",
        json_schema_extra=backend_meanings(),
    )


class JudgedParams(RewardParams):
    """Parameters of the rewards feature."""

    reference: bool = Field(False, description="judge the target rows' own answers too")
    generations: DrawnParams = Field(
        default_factory=DrawnParams,
        exclude=True,  # the generations table's own fingerprint tells it
        description="parameters of the generations feature",
    )


class PolicyChoice(api.Params):
    """Which answers count in a policy gradient, and how."""

    policy: Policy = Field(
        "vanilla",
        description="which answers count; vanilla: all, rejection: those of reward above 0, hard_rejection: "
        "those not worse than the row's own answer, topk: the best",
    )
    kept_samples: int = Field(2, ge=1, description="best answers that policy: topk keeps")
    baseline: Baseline = Field(
        "leave_one_out",
        description="what is subtracted from a reward; leave_one_out: the mean of the row's other answers "
        "(where each has one answer, or greedy ones, none is the default)",
    )
    token_mean: bool = Field(False, description="divide an answer's log-probability by its tokens")


class TargetPolicy(PolicyChoice):
    """The policy gradient of a target row: which answers count, where they come from and what judges them."""

    generations: DrawnParams = Field(
        default_factory=DrawnParams, exclude=True, description="parameters of the generations feature"
    )
    rewards: RewardParams = Field(
        default_factory=RewardParams, exclude=True, description="what judges the answers"
    )


class PolicyParams(PolicyChoice, GenerationParams, RewardParams):
    """Parameters of every method on policy gradients. What changes no result is left out of a dump."""

    @model_validator(mode="before")
    @classmethod
    def _default_baseline(cls, values: Any) -> Any:
        """Take no baseline where none is named and a row has nothing to compare its answer with."""
        if not isinstance(values, dict) or "baseline" in values:
            return values
        alone = values.get("mc_samples") == 1 or values.get("generation_temperature") == 0
        return values | {"baseline": "none"} if alone else values

    @model_validator(mode="after")
    def _check(self) -> PolicyParams:
        read_settings(self.reward_model_backend, self.reward_backend_params)
        if self.baseline == "leave_one_out" and self.mc_samples < 2:
            raise ValueError("baseline: leave_one_out needs mc_samples of at least 2")
        if self.baseline == "leave_one_out" and self.generation_temperature == 0:
            raise ValueError(
                "baseline: leave_one_out needs answers that differ, and generation_temperature: 0 draws the "
                "same one every time"
            )
        return self


class DirectionParams(api.Params):
    """Parameters of the target_directions feature."""

    per: Literal["group", "row"] = Field(
        "group", description="what has a direction of its own: a target group, or a target row"
    )
    policy: TargetPolicy | None = Field(
        None,
        description="null: the gradient of a row's own answer; else the policy gradient of drawn ones",
    )


class InfluenceParams(UpdateParams):
    """Parameters of the influence feature."""

    side: Literal["adam", "sgd"] = Field("adam", description="Adam's update of the gradient, or the gradient")
    directions: DirectionParams = Field(
        default_factory=DirectionParams,
        exclude=True,  # the fingerprint of the directions' own table tells them
        description="parameters of the target_directions feature",
    )
    more: tuple[DirectionParams, ...] = Field(
        (), exclude=True, description="further directions in the same pass, each with a column of its own"
    )
