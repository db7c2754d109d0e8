"""What methods on policy gradients let their users set: the answers, their rewards, which of them count."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dataflex_pipeline import api
from dataflex_pipeline.gradients.policy import Baseline, Policy
from dataflex_pipeline.reward.rewarders import SHIPPED, read_settings

GENERATION = (
    "mc_samples",
    "max_new_tokens",
    "generation_temperature",
    "top_p",
    "top_k",
    "max_prompt_length",
    "generator",
    "generation_batch_size",
    "generation_gpu_memory_utilization",
    "generation_tensor_parallel_size",
)
"""Parameters that are handed to the generations feature as they are."""


def backend_defaults() -> dict[str, dict[str, Any]]:
    """Return every reward backend's settings and their defaults."""
    return {
        name: {key: field.default for key, field in kind.model_fields.items()}
        for name, kind in SHIPPED.items()
    }


def backend_meanings() -> dict[str, Any]:
    """Return what every reward backend's settings mean, by backend.setting."""
    return {
        f"{name}.{key}": field.description
        for name, kind in SHIPPED.items()
        for key, field in kind.model_fields.items()
    }


class PolicyParams(api.Params):
    """Parameters of every method on policy gradients; such a method's Params inherit from this class.

    What changes no result is left out of a dump, and so are the settings of the reward backends: the reward
    table's own fingerprint holds what can change a reward.
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
    mc_samples: int = Field(4, ge=1, description="answers drawn per target row")
    max_new_tokens: int = Field(512, ge=1, description="longest answer in tokens")
    generation_temperature: float = Field(
        0.7, ge=0, description="of the drawn answers; other than 1 it biases the policy gradient"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="share of the probability that answers are drawn from")
    top_k: int = Field(0, ge=0, description="tokens that answers are drawn from; 0: all")
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
    policy: Policy = Field("vanilla", description="which answers count: all, or those that pass")
    kept_samples: int = Field(2, ge=1, description="answers that policy: topk keeps")
    baseline: Baseline = Field(
        "none", description="what is subtracted from a reward: nothing, or the mean of the row's others"
    )
    token_mean: bool = Field(False, description="divide an answer's log-probability by its tokens")

    @model_validator(mode="after")
    def _check(self) -> PolicyParams:
        read_settings(self.reward_model_backend, self.reward_backend_params)
        if self.baseline == "leave_one_out" and self.mc_samples < 2:
            raise ValueError("baseline: leave_one_out needs mc_samples of at least 2")
        return self


def policy_parameters(params: PolicyParams, seed: int) -> dict[str, Any]:
    """Return the parameters of the policy_gradients feature beyond those of the projection.

    Args:
        params: what the user set. seed: of the answers.
    """
    return {
        "generations": {name: getattr(params, name) for name in GENERATION} | {"seed": seed},
        "rewards": {
            "reward_model_backend": params.reward_model_backend,
            "reward_backend_params": params.reward_backend_params,
            "reference": params.policy == "hard_rejection",
        },
        "policy": params.policy,
        "kept_samples": params.kept_samples,
        "baseline": params.baseline,
        "token_mean": params.token_mean,
    }
