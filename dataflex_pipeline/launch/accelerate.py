"""Refusal of what ``accelerate launch`` asks for by environment variables and training does not follow.

The trainer would obey them, and the rest would not: a checkpoint without the optimizer's states, a precision
that neither run.yaml nor scoring knows of.
"""

from __future__ import annotations

import os

from dataflex_pipeline.errors import ConfigError

REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_TP": "tensor parallelism",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""Variable -> what it turns on."""
ON = ("1", "true", "yes", "y", "t", "on")
MIXED, COMPILER = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"


def refuse_accelerate(*, mixed: bool | None = None) -> None:
    """Refuse what the environment asks of accelerate and this program would obey by half.

    Args:
        mixed: whether training computes in bfloat16; None where that is not known yet.

    Raises:
        ConfigError: it names the variable.
    """
    for name, what in REFUSED.items():
        if os.environ.get(name, "").lower() in ON:
            raise _refused(
                name,
                f"Training here is DDP or DeepSpeed: a checkpoint made under {what} would lack the "
                "optimizer's states, by which rounds go on and some methods score.",
                "Start with torchrun (or accelerate launch --multi_gpu); a model that is too large for one "
                "GPU trains under deepspeed: ds_z3.",
            )
    if os.environ.get(COMPILER, "no").lower() not in ("no", ""):
        raise _refused(
            COMPILER,
            "A compiled model has parameters of other names than its checkpoints.",
            "Leave --dynamo_backend out.",
        )
    asked = os.environ.get(MIXED, "no").lower()
    if asked in ("no", "") or (asked == "bf16" and mixed is not False):
        return
    raise _refused(
        MIXED,
        "bf16 of the configuration decides what training and scoring compute in, and it says otherwise.",
        "Leave --mixed_precision out, and set bf16: true or false.",
    )


def _refused(name: str, why: str, fix: str) -> ConfigError:
    return ConfigError(f"The environment variable {name} is {os.environ[name]}.", why, fix)
