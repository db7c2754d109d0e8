"""From files and the command line to one checked configuration.

Layers, each over the one before: defaults, the run's own settings, the YAML file, key=value overrides. A null
takes a key back to its default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import PlainSerializer

from dataflex_pipeline.config import checks
from dataflex_pipeline.config.aliases import data_of_method
from dataflex_pipeline.config.candidates import without_other_amount
from dataflex_pipeline.config.components import (
    check_method_names,
    components_file,
    find_file,
    merged,
    sections_passed_over,
)
from dataflex_pipeline.config.draw_rules import AMOUNTS
from dataflex_pipeline.config.fields import DEMO, SECRETS, Config
from dataflex_pipeline.config.llama_factory import PASSED_OVER, REFUSED, RENAMED
from dataflex_pipeline.config.overrides import COMMAND_LINE, override_layers
from dataflex_pipeline.config.peer import FIXED, HINTS, IGNORED, shipped_in_place_of, translate
from dataflex_pipeline.config.redaction import without_secrets
from dataflex_pipeline.config.shipped import shipped_configs
from dataflex_pipeline.config.values import validated
from dataflex_pipeline.config.yaml_files import Layer, read_yaml
from dataflex_pipeline.errors import ConfigError, did_you_mean

QUICKSTART = "configs/quickstart.yaml"
RUN_FILE = "run.yaml"
PEER_DEFAULT = "dataflex default for peer files"
_RECORD = "run"  # section of a run.yaml that is not configuration
OWN_DATA_OR_MODEL = ("model_name_or_path", "dataset")
_BASE_NOTICE = {
    "quickstart": "no --config and no model_name_or_path: the model is the demo's, which knows nothing of "
    "your rows, and learning_rate, cutoff_len and all else are those of its quickstart.yaml; `dataflex init` "
    "writes a file of your own",
    "defaults": "no --config: what is not given here has its default; `dataflex init` explains them all",
}
_EXPECTED = ("model_name_or_path", "dataset")
ONE_OF = (AMOUNTS, ("balanced", "source_quotas"))
"""Settings of which only one can hold."""


@dataclass(frozen=True)
class Loaded:
    """A configuration and how it came about.

    Attributes:
        config: the checked configuration.
        notices: everything that has to be said to the user.
        sources: key -> "default", a file, "command line", "run.yaml" or "dataflex default for peer files".
        config_dir: folder of the configuration file; None without one.
        run_folder: the folder whose run.yaml that file is, with the record of a run; None otherwise.
    """

    config: Config
    notices: tuple[str, ...]
    sources: Mapping[str, str]
    config_dir: Path | None = None
    run_folder: Path | None = None


@dataclass
class _Settings:
    """Values as they are laid over each other, and where each was set last."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    emptied: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    split_off: str | None = None  # where val_size asks for rows of the pool to evaluate on

    def place(self, name: str) -> str:
        return self.places.get(name, "default")

    def drop(self, name: str) -> None:
        """Take a key back to its default."""
        for table in (self.values, self.sources, self.places):
            table.pop(name, None)

    def _give_way(self, kept: Mapping[str, Any], layer: Layer) -> None:
        """Drop what an earlier command left in run.yaml of a setting that only one of can hold."""
        for names in ONE_OF:
            given = [name for name in names if kept.get(name) not in (None, {})]
            recorded = [name for name in names if self.sources.get(name) == RUN_FILE and self.values[name]]
            for name in recorded if given else ():
                if name not in given:
                    old = f"{name}: {self.values[name]} ({self.place(name)})"
                    self.notices.append(f"{given[0]} ({layer.place(given[0])}) stands in place of {old}")
                    self.drop(name)

    def lay(self, layer: Layer) -> None:
        """Lay one layer over the present values."""
        kept, said = translate(layer)
        self.notices += said
        if layer.values.get("val_size"):
            self.split_off = layer.place("val_size")
        _check_names(kept, layer)
        self._give_way(kept, layer)
        for name, value in kept.items():
            if value is None:
                self.drop(name)
                self.emptied[name] = layer.place(name)
            else:
                under = self.values.get(name) if layer.merge or name == "methods" else None
                if name == "candidates" and isinstance(under, dict) and isinstance(value, dict):
                    under = without_other_amount(under, value)
                self.values[name] = merged(under, value)
                self.sources[name], self.places[name] = layer.label, layer.place(name)
                self.emptied.pop(name, None)


def load_config(path: Path | None, overrides: Sequence[str], base: Mapping[str, Any] | None = None) -> Loaded:
    """Read, translate and check a configuration.

    Args:
        path: a YAML file; None for none. Without a file and a base the shipped quickstart.yaml counts, unless
            the overrides name another model than the demo's, which its settings were chosen for.
        overrides: ``key=value`` texts of the command line.
        base: the settings that a run was started with.

    Raises:
        ConfigError: a file, key, value or combination that cannot be used.
    """
    settings = _Settings()
    layers, said = override_layers(overrides)
    own = {name for layer in layers for name in OWN_DATA_OR_MODEL if layer.values.get(name, DEMO) != DEMO}
    files, recorded = _files(path, base)
    if not files and "model_name_or_path" not in own:
        files = [_quickstart("dataset" in own)]
    for layer in files:
        settings.lay(layer)
    if path is None and base is None and own:
        settings.notices.append(_BASE_NOTICE["defaults" if "model_name_or_path" in own else "quickstart"])
    settings.notices += said
    for layer in layers:
        settings.lay(layer)
    config_dir = path.parent if path is not None else None
    _imply_swanlab(settings)
    _steps_or_epochs(settings, str(path) if recorded else RUN_FILE if base is not None else None)
    _without_split(settings)
    config = validated(settings.values, settings.place)
    config = _resolve_files(config, settings, config_dir)
    config = _data_of_method(config, settings, config_dir)
    checks.check(config, settings.place)
    check_method_names(config, config_dir)
    settings.notices += sections_passed_over(config, config_dir)
    settings.notices += checks.notices(config) + _demo_notices(config, settings)
    sources = {name: settings.sources.get(name, "default") for name in Config.model_fields}
    folder = config_dir.resolve() if config_dir is not None and recorded else None
    return Loaded(config, tuple(settings.notices), MappingProxyType(sources), config_dir, folder)


def dump_config(config: Config) -> dict[str, Any]:
    """Return the configuration as plain data for run.yaml; secrets are left out.

    Secrets are the keys in ``SECRETS``, and parameters of methods such as ``api_key`` unless their value is
    the name of an environment variable.
    """
    values = config.model_dump(mode="json", exclude=set(SECRETS))
    return {**values, "methods": without_secrets(values["methods"])}


SentConfig = Annotated[Config, PlainSerializer(dump_config)]
"""A configuration that travels to another process of the launch."""


def _quickstart(own_data: bool) -> Layer:
    """Return the demo's settings; with data of one's own without the demo's test rows, which say nothing."""
    layer = read_yaml(shipped_configs() / "quickstart.yaml", QUICKSTART)
    if not own_data:
        return layer
    return replace(layer, values={k: v for k, v in layer.values.items() if k != "test_dataset"})


def _files(path: Path | None, base: Mapping[str, Any] | None) -> tuple[list[Layer], bool]:
    """Return the layers of files, and whether the one given is the run.yaml of a run."""
    layers, recorded = [] if base is None else [Layer(RUN_FILE, dict(base))], False
    if path is not None:
        layer = read_yaml(path)
        record = layer.values.pop(_RECORD, None)
        if record is not None and not isinstance(record, dict):
            layer.values[_RECORD] = record
        recorded = path.name == RUN_FILE and isinstance(record, dict)
        if not layer.values:
            raise ConfigError(
                f"{path} was given as the configuration.",
                "It holds no settings, so the run would be the embedded demo's.",
                "Write at least model_name_or_path and dataset into it (`dataflex init` writes a file with "
                "every key), or leave --config out for the demo.",
            )
        layers.append(layer)
    return layers, recorded


def _check_names(values: Mapping[str, Any], layer: Layer) -> None:
    unknown = [name for name in values if name not in Config.model_fields]
    if not unknown:
        return
    name = unknown[0]
    known = [*Config.model_fields, *FIXED, *IGNORED, *PASSED_OVER, *REFUSED, *RENAMED]
    if name in HINTS:
        fix = HINTS[name]
    elif "." in name:
        method, _, parameter = name.partition(".")
        fix = f"In a file write methods: {{{method}: {{{parameter}: VALUE}}}}; dots are for the command line."
    else:
        fix = "Correct it, or remove it; 'dataflex init' writes a file with every key and its meaning."
    more = f" Not known either: {', '.join(unknown[1:])}." if len(unknown) > 1 else ""
    hint = "" if name in HINTS else did_you_mean(name, known)
    raise ConfigError(
        f"'{name}' ({layer.place(name)}) is not a key of the configuration.{hint}{more}",
        "A key that is not known could only be ignored, and then the run would not be what you asked for.",
        fix,
    )


def _imply_swanlab(settings: _Settings) -> None:
    report_to = settings.values.get("report_to", "none")
    if settings.values.get("use_swanlab") is not True or not isinstance(report_to, str):
        return
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("none", "")]
    if "swanlab" not in names:
        settings.values["report_to"] = ",".join([*names, "swanlab"])
        settings.sources["report_to"] = settings.sources["use_swanlab"]
        settings.places["report_to"] = f"use_swanlab, {settings.place('use_swanlab')}"
        settings.notices.append("use_swanlab: true: the training log goes to swanlab")


def _steps_or_epochs(settings: _Settings, recorded: str | None) -> None:
    """Keep one of ``update_step`` and ``num_train_epochs`` where both are set.

    The steps win, and it is said; a run's own record holds both, the steps as the epochs came to.

    Args:
        settings: all layers.
        recorded: label of the layer that a run recorded; None for none.
    """
    sources = settings.sources
    if not {"update_step", "num_train_epochs"} <= set(sources):
        return
    if sources["update_step"] == recorded:
        if sources["num_train_epochs"] != recorded:
            settings.drop("update_step")  # asked anew: counted anew
        return
    epochs, steps = settings.values["num_train_epochs"], settings.values["update_step"]
    if epochs != 1 and sources["num_train_epochs"] != recorded:
        settings.notices.append(
            f"num_train_epochs: {epochs} ({settings.place('num_train_epochs')}) is not used: update_step: "
            f"{steps} ({settings.place('update_step')}) says how long a round is, and the run has "
            "warmup_step + update_step x update_times steps"
        )
    settings.drop("num_train_epochs")


_EVALUATING = ("eval_strategy", "load_best_model_at_end", "early_stopping_steps")


def _without_split(settings: _Settings) -> None:
    """Leave evaluation out where the only rows for it were those that ``val_size`` would split off."""
    values = settings.values
    if settings.split_off is None or "eval_dataset" in values or values.get("eval_strategy", "no") == "no":
        return
    found = [name for name in _EVALUATING if values.get(name)]
    for name in found:
        settings.drop(name)
    settings.notices.append(
        f"{', '.join(found)} {'has' if len(found) == 1 else 'have'} no effect: the rows to evaluate on were "
        f"to come from val_size ({settings.split_off}); set eval_dataset"
    )


def _resolve_files(config: Config, settings: _Settings, config_dir: Path | None) -> Config:
    """Find the files that the configuration names; the shipped one stands for one of the peer's own."""
    found: dict[str, str | None] = {}
    if config.components_cfg_file is not None:
        own = components_file(config, config_dir, settings.place("components_cfg_file"))
        found["components_cfg_file"] = None if own is None else str(own[0])
    if config.deepspeed is not None:
        found["deepspeed"] = _deepspeed_file(config.deepspeed, settings, config_dir)
    for name, path in found.items():
        given = getattr(config, name)
        shipped = shipped_in_place_of(name, given)
        if path != given and shipped is not None and find_file(given, config_dir) is None:
            settings.sources[name] = PEER_DEFAULT
            settings.notices.append(
                f"{name}: {given} ({settings.place(name)}) does not exist: "
                f"the shipped configs/{shipped} is taken"
            )
    return config.model_copy(update=found)


def _data_of_method(config: Config, settings: _Settings, config_dir: Path | None) -> Config:
    """Take the data sets that parameters of the configured method name."""

    def given(key: str) -> str | None:
        return None if settings.sources.get(key) in (None, QUICKSTART) else settings.place(key)

    found = data_of_method(config, config_dir, given)
    for key, (value, place) in found.items():
        if getattr(config, key) != value:
            settings.notices.append(f"{key}: {value}, as {place} says")
        settings.sources[key] = settings.places[key] = place
    return config.model_copy(update={key: value for key, (value, _) in found.items()})


def _deepspeed_file(given: str, settings: _Settings, config_dir: Path | None) -> str:
    found = find_file(given, config_dir)
    shipped = shipped_in_place_of("deepspeed", given)
    if found is None and shipped is not None:
        return str(shipped_configs() / shipped)
    if found is None:
        raise ConfigError(
            f"deepspeed: {given} ({settings.place('deepspeed')}) was given.",
            "There is no such file.",
            "Correct the path; ds_z0, ds_z2 and ds_z3 are shipped in configs/deepspeed.",
        )
    try:
        content = json.loads(found.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(
            f"deepspeed: {given} ({settings.place('deepspeed')}) cannot be read.",
            f"It is not valid JSON{line}: {error}.",
            "Correct it, or take one of configs/deepspeed.",
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"deepspeed: {given} ({settings.place('deepspeed')}) cannot be used.",
            "A DeepSpeed configuration is a JSON object.",
            "Take one of configs/deepspeed as a start.",
        )
    return str(found)


def _demo_notices(config: Config, settings: _Settings) -> list[str]:
    """Say where the demo stands in for what was left empty, or stays when only the pool was replaced."""
    lines = [
        f"{name} is empty ({settings.emptied[name]}): the embedded demo is taken"
        for name in _EXPECTED
        if name in settings.emptied
    ]
    left = settings.sources.get("eval_dataset") == QUICKSTART
    if left and config.eval_dataset == DEMO and settings.sources.get("dataset") == COMMAND_LINE:
        lines.append(
            "eval_dataset is still the embedded demo's target set (from configs/quickstart.yaml), although "
            "dataset is your own: give eval_dataset=..., or eval_dataset=null eval_strategy=no"
        )
    return lines
