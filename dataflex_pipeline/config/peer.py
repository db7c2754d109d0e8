"""Keys of the peer's configurations (DataFlex on LLaMA-Factory) that are no keys here.

Those that can only have one meaning here are accepted with that value and dropped; with another value they
are an error that says why and what to do instead. Every other key of the peer's guides is a field of Config.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex_pipeline.config.yaml_files import Layer
from dataflex_pipeline.errors import ConfigError


@dataclass(frozen=True)
class Fixed:
    """A key that may only have one value here; why, and what to do instead."""

    value: Any
    why: str
    fix: str


FIXED: dict[str, Fixed] = {
    "stage": Fixed(
        "sft",
        "Rows are selected for supervised fine-tuning; there are no other stages here.",
        "Leave stage out, or write stage: sft.",
    ),
    "do_train": Fixed(
        True,
        "A configuration describes a run, and the command says how much of it is done.",
        "Leave do_train out; to score without training, use 'dataflex score'.",
    ),
    "train_type": Fixed(
        "dynamic_select",
        "Rounds of selection are what this program does.",
        "Write train_type: dynamic_select. For plain training take component_name: random; for fixed shares "
        "of sources set source_quotas; for weighted rows set weights.",
    ),
    "num_train_epochs": Fixed(
        1,
        "A run's length is warmup_step + update_step x update_times optimizer steps, not epochs.",
        "Leave num_train_epochs out and set warmup_step, update_step and update_times.",
    ),
    "save_only_model": Fixed(
        False,
        "A round goes on from the optimizer's states, and some methods score with them: "
        "without them no round could follow.",
        "Leave save_only_model out; the adapter alone is also written at the top of the run folder.",
    ),
    "export_legacy_format": Fixed(
        False,
        "The legacy format is pickled weights, which can run code when they are loaded.",
        "Leave export_legacy_format out; export writes safetensors.",
    ),
}

IGNORED: dict[str, str] = {
    "overwrite_output_dir": "a configuration never deletes anything here; --overwrite does a step again",
    "overwrite_cache": "a configuration never deletes anything here; --overwrite does a step again",
}

RENAMED: dict[str, str] = {"moe_aux_loss_coef": "router_aux_loss_coef"}
"""Keys of LLaMA-Factory that mean the same as one of another name here."""

# Keys of LLaMA-Factory and transformers that people bring along, where the nearest word would mislead.
HINTS: dict[str, str] = {
    "warmup_steps": "The learning rate's rise is warmup_ratio here; warmup_step is the length of round 0.",
    "max_steps": "The length of a run is warmup_step + update_step x update_times.",
    "val_size": "Give the target its own data: eval_dataset.",
    "flash_attn": "Set attn_implementation.",
    "fp16": "Set bf16; half precision without a loss scale is not offered.",
    "pure_bf16": "Set bf16.",
    "evaluation_strategy": "Set eval_strategy.",
    "do_eval": "Set eval_strategy.",
    "packing": "Leave it out: rows are weighted one by one, so they are never packed.",
    "neat_packing": "Leave it out: rows are weighted one by one, so they are never packed.",
    "resume_from_checkpoint": "Leave it out: the same command goes on where the run stopped.",
    "early_stopping_patience": "Set early_stopping_steps.",
    "save_strategy": "Leave it out: a round's end is always saved; save_steps adds checkpoints inside it.",
    "quantization_bit": "Leave it out: models are trained in bf16 or fp32.",
    "streaming": "Leave it out: data is always streamed.",
    "text_column": "Set data_columns.",
}

_DEEPSPEED_NAMES = ("ds_z0", "ds_z2", "ds_z2_offload", "ds_z3", "ds_z3_offload")


def translate(layer: Layer) -> tuple[dict[str, Any], list[str]]:
    """Take the peer's own keys out of a layer.

    Returns:
        The remaining keys with their values, and what has to be said.

    Raises:
        ConfigError: a key that is fixed here has another value.
    """
    kept: dict[str, Any] = {}
    notices: list[str] = []
    for name, value in layer.values.items():
        if name in FIXED:
            _check_fixed(name, value, layer)
        elif name in IGNORED:
            notices += _ignored(name, value, layer)
        elif name in RENAMED:
            kept[RENAMED[name]] = value
            notices.append(f"{name} ({layer.place(name)}) is taken as {RENAMED[name]}")
        elif name == "ddp_timeout" and value is False:
            kept[name] = None
            notices.append(f"ddp_timeout: false ({layer.place(name)}) is taken as the default")
        elif name == "eval_strategy" and value is False:
            kept[name] = "no"  # YAML 1.1 reads a bare no as false
        else:
            kept[name] = value
    return kept, notices


def _check_fixed(name: str, value: Any, layer: Layer) -> None:
    rule = FIXED[name]
    same_type = isinstance(value, bool) == isinstance(rule.value, bool)
    if value is None or (same_type and value == rule.value):
        return
    text = str(value).lower() if isinstance(value, bool) else value
    raise ConfigError(f"{name}: {text} ({layer.place(name)}) cannot be used here.", rule.why, rule.fix)


def _ignored(name: str, value: Any, layer: Layer) -> list[str]:
    if value is None or value is False:
        return []
    if value is not True:
        raise ConfigError(
            f"{name}: {value} ({layer.place(name)}) cannot be used.",
            f"{name} takes true or false.",
            "Leave it out: " + IGNORED[name] + ".",
        )
    return [f"{name}: true ({layer.place(name)}) has no effect: {IGNORED[name]}"]


def shipped_in_place_of(name: str, path: str) -> str | None:
    """Return the shipped file that stands for one of the peer's own, relative to the configs folder.

    Args:
        name: ``components_cfg_file`` or ``deepspeed``.
        path: the path that was set and does not exist.
    """
    file = Path(path)
    if name == "components_cfg_file":
        return "components.yaml" if file.parts[-2:] == ("configs", "components.yaml") else None
    stem = file.stem.removesuffix("_config")
    if file.parent.name == "deepspeed" and file.suffix == ".json" and stem in _DEEPSPEED_NAMES:
        return f"deepspeed/{stem}.json"
    return None
