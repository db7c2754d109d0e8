"""The choice of a generator: made once, by name or by the installed packages, never by trying."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.generate import Generator
from dataflex_pipeline.generate.settings import GenerationSettings
from dataflex_pipeline.models.base import is_gpu
from dataflex_pipeline.vllm.engine import require_vllm, vllm_installed

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config

GeneratorName = Literal["vllm", "transformers"]


def choose_generator(setting: Literal["auto", "vllm", "transformers"], device: str) -> GeneratorName:
    """Return the generator that a setting stands for: auto takes vLLM where it is installed and has a GPU.

    Args:
        setting: of the generator. device: the setting; without a GPU vLLM takes longer to start than most
            tables take to draw.
    """
    if setting == "auto":
        return "vllm" if vllm_installed() and is_gpu(device) else "transformers"
    return setting


def check_generator(name: GeneratorName, config: Config | None = None) -> None:
    """Check that a generator can be used here.

    Args:
        name: from `choose_generator`. config: names the model, where it is known.

    Raises:
        ConfigError: vllm is chosen, and not installed, or the model is quantized for training.
    """
    if name == "vllm" and config is not None and config.quantization_bit is not None:
        raise ConfigError(
            f"quantization_bit: {config.quantization_bit} was set, and vllm generates.",
            "vLLM would draw from the plain model, and its completions would be scored by the quantized one.",
            "Set nice.generator: transformers (--generator transformers of evaluate).",
        )
    if name == "vllm":
        require_vllm("generator: vllm (nice.generator, or --generator of evaluate)")


def make_generator(
    name: GeneratorName,
    config: Config,
    checkpoint: Path | None,
    settings: GenerationSettings,
    longest: int,
    say: Callable[[str], None],
    folder: Path | None = None,
) -> Generator:
    """Make a generator, not yet loaded.

    Args:
        name: from `choose_generator`. config: names the model. settings: how completions are drawn.
        checkpoint: folder of the adapter or of the whole model; None: the model before the warm-up.
        longest: tokens of the longest prompt that may come. say: is told what a backend chose.
        folder: of the table that is made, where the size of batches is agreed on.
    """
    if name == "vllm":
        from dataflex_pipeline.generate.vllm import VllmGenerator

        return VllmGenerator(config, checkpoint, settings, longest, say)
    from dataflex_pipeline.generate.transformers import TransformersGenerator

    return TransformersGenerator(config, checkpoint, settings, say, folder)
