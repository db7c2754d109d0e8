"""Keys of the peer's configurations (DataFlex on LLaMA-Factory) that are no keys here.

Those that can only have one meaning here are accepted with that value and dropped; with another value they
are an error that says why and what to do instead. Every other key of the peer's guides is a field of Config;
what else LLaMA-Factory's own files for fine-tuning hold is in `llama_factory`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex_pipeline.config.llama_factory import ATTENTION, PASSED_OVER, REFUSED, RENAMED
from dataflex_pipeline.config.values import show
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

# Keys of LLaMA-Factory and transformers that people bring along, where the nearest word would mislead.
HINTS: dict[str, str] = {
    "warmup_steps": "The learning rate's rise is warmup_ratio here, a share of all steps; warmup_step is the "
    "length of round 0.",
    "max_steps": "The length of a run is warmup_step + update_step x update_times.",
    "text_column": "Set data_columns.",
    "load_in_4bit": "Set quantization_bit: 4.",
    "load_in_8bit": "Set quantization_bit: 8.",
    "device_map": "A model is on one device here, the one that device names; quantization_bit: 4 makes a "
    "large one fit, and deepspeed with ZeRO-3 shards its training.",
    "component_overrides": "Write it beside component_name, or as methods: {NAME: {...}}.",
    "resume_from_checkpoint": "Leave it out: the same command goes on where the run stopped. "
    "To start from an adapter set adapter_name_or_path.",
}

_DEEPSPEED_NAMES = ("ds_z0", "ds_z2", "ds_z2_offload", "ds_z3", "ds_z3_offload")


@dataclass(frozen=True)
class Translated:
    """A layer in the words of this program: the keys that are left, and what has to be said."""

    kept: dict[str, Any]
    notices: list[str]

    def take(self, key: str, value: Any, said: str) -> None:
        """Set a key in place of the peer's, unless the layer has the key itself; say so."""
        if key in self.kept:
            said = said.partition(" is taken as ")[0] + f" is not used: {key} is set beside it"
        elif value is not None:
            self.kept[key] = value
        self.notices.append(said)


def translate(layer: Layer) -> tuple[dict[str, Any], list[str]]:
    """Take the peer's own keys out of a layer.

    Returns:
        The remaining keys with their values, and what has to be said.

    Raises:
        ConfigError: a key that is fixed here has another value.
    """
    found = Translated({}, [])
    foreign: list[str] = []
    for name, value in layer.values.items():
        if name in FIXED:
            _check_fixed(name, value, layer)
        elif name in IGNORED:
            found.notices.extend(_ignored(name, value, layer))
        elif name in PASSED_OVER:
            found.notices.extend(_passed_over(name, value, layer))
        elif name in REFUSED:
            _refuse(name, value, layer)
        elif name in RENAMED or name in _TAKEN:
            foreign.append(name)
        elif name == "ddp_timeout" and value is False:
            found.kept[name] = None
            found.notices.append(f"ddp_timeout: false ({layer.place(name)}) is taken as the default")
        else:
            found.kept[name] = _word(name, value)
    for name in foreign:  # once it is known which keys of ours stand beside them
        _TAKEN.get(name, _renamed)(name, layer.values[name], layer, found)
    return found.kept, found.notices


def _word(name: str, value: Any) -> Any:
    """Return a value as it is meant: YAML 1.1 reads a bare no as false."""
    return "no" if name == "eval_strategy" and value is False else value


def _renamed(name: str, value: Any, layer: Layer, found: Translated) -> None:
    ours = RENAMED[name]
    if value is None:
        return
    found.take(ours, _word(ours, value), f"{name} ({layer.place(name)}) is taken as {ours}")


def _attention(name: str, value: Any, layer: Layer, found: Translated) -> None:
    """Take ``flash_attn`` as ``attn_implementation``."""
    if value is None:
        return
    if not isinstance(value, bool | str) or value not in ATTENTION:
        raise ConfigError(
            f"{name}: {show(name, value)} ({layer.place(name)}) is not known.",
            f"It takes {', '.join(key for key in ATTENTION if isinstance(key, str))}.",
            "Choose one of them, or set attn_implementation.",
        )
    chosen = ATTENTION[value]
    meaning = "transformers' own choice" if chosen is None else f"attn_implementation: {chosen}"
    said = f"{name}: {_plain(value)} ({layer.place(name)}) is taken as {meaning}"
    found.take("attn_implementation", chosen, said)


def _pure_bf16(name: str, value: Any, layer: Layer, found: Translated) -> None:
    if value is True:
        found.kept.pop("bf16", None)
        found.take("bf16", value, f"{name}: true ({layer.place(name)}) is taken as bf16: true")


def _no_checkpointing(name: str, value: Any, layer: Layer, found: Translated) -> None:
    if isinstance(value, bool):
        said = f"{name}: {_plain(value)} ({layer.place(name)}) is taken as gradient_checkpointing: "
        found.take("gradient_checkpointing", not value, said + _plain(not value))


def _warmup_steps(name: str, value: Any, layer: Layer, found: Translated) -> None:
    """Take a share of all steps as ``warmup_ratio``, as transformers does; refuse a number of steps."""
    if value is None or (value == 0 and not isinstance(value, bool)):
        return
    if isinstance(value, float) and 0 < value < 1:
        said = f"{name}: {value} ({layer.place(name)}) is taken as warmup_ratio: {value}"
        found.take("warmup_ratio", value, said)
        return
    found.kept[name] = value  # no key of ours: refused with its hint


def _max_steps(name: str, value: Any, layer: Layer, found: Translated) -> None:
    """Drop a number that is not positive, which means no limit; refuse any other."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value <= 0):
        return
    found.kept[name] = value


def _resume(name: str, value: Any, layer: Layer, found: Translated) -> None:
    if value is True:
        said = f"{name}: true ({layer.place(name)}) has no effect: the same command always goes on"
        found.notices.append(f"{said} where the run stopped")
    elif value not in (None, False, ""):
        found.kept[name] = value  # no key of ours: refused with its hint


def _overrides(name: str, value: Any, layer: Layer, found: Translated) -> None:
    """Take parameters of the method that the layer names as ``methods``."""
    method = found.kept.get("component_name")
    if not value:
        return
    if not isinstance(method, str) or not isinstance(value, dict):
        found.kept[name] = value  # no key of ours: refused with its hint
        return
    said = f"{name} ({layer.place(name)}) is taken as parameters of {method}"
    found.take("methods", {method: value}, said)


_Take = Callable[[str, Any, Layer, Translated], None]
_TAKEN: dict[str, _Take] = {
    "flash_attn": _attention,
    "attn": _attention,
    "pure_bf16": _pure_bf16,
    "disable_gradient_checkpointing": _no_checkpointing,
    "warmup_steps": _warmup_steps,
    "max_steps": _max_steps,
    "resume_from_checkpoint": _resume,
    "component_overrides": _overrides,
}
"""Keys whose value decides what becomes of them."""


def _check_fixed(name: str, value: Any, layer: Layer) -> None:
    rule = FIXED[name]
    same_type = isinstance(value, bool) == isinstance(rule.value, bool)
    if value is None or (same_type and value == rule.value):
        return
    raise ConfigError(
        f"{name}: {_plain(value)} ({layer.place(name)}) cannot be used here.", rule.why, rule.fix
    )


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


def _passed_over(name: str, value: Any, layer: Layer) -> list[str]:
    rule = PASSED_OVER[name]
    if value is None or rule.is_off(value):
        return []
    said = name if name.endswith("_token") else f"{name}: {show(name, value)}"  # a token is never shown
    return [f"{said} ({layer.place(name)}) has no effect: {rule.why}"]


def _refuse(name: str, value: Any, layer: Layer) -> None:
    rule = REFUSED[name]
    if value is not None and not rule.is_off(value):
        raise ConfigError(
            f"{name}: {show(name, value)} ({layer.place(name)}) cannot be used here.", rule.why, rule.fix
        )


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
