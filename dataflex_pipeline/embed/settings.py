"""An embedding model as its files describe it before it is loaded: identity, dimension, longest text.

Every embedder gets these as plain numbers, so that two of them cut a text at the same token and give vectors
of the same length, whatever their own defaults are.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.hub import hub_reachable
from dataflex_pipeline.models.source import (
    check_cached_weights,
    check_model_folder,
    check_weights,
    explained,
    local_folder,
)
from dataflex_pipeline.store.fingerprint import digest, digest_while_unchanged

Dtype = Literal["float32", "bfloat16", "float16"]

KEY = "embed_model"
DEFAULT_MODEL = "Qwen/Qwen3-Embedding-0.6B"
DIGESTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.py")
"""Files that a model's vectors can depend on; other editions of the weights beside them do not count."""
OTHER_EDITIONS = frozenset({"onnx", "openvino"})
UNBOUNDED = 10**9
"""Tokenizers without a limit say a number far above this."""


@dataclass(frozen=True)
class EmbedderSettings:
    """What an embedder is loaded with.

    Attributes:
        model: folder or hub name. revision: branch, tag or commit of a hub model.
        dtype: number format of the weights and the forward pass.
        max_length: tokens kept of a text, special tokens included.
        batch_size: texts per forward pass; vLLM fills its batches by itself. device: torch device, resolved.
        batch_tokens: padded tokens per forward pass, where the embedder batches by them; auto: measured.
        folder: of the table that is made, where their number is agreed on.
        trust_remote_code: run Python code that comes with the model.
        gpu_memory_utilization: share of a GPU's memory that vLLM takes.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "float32"
    max_length: int = 512
    batch_size: int = 32
    device: str = "cpu"
    trust_remote_code: bool = False
    gpu_memory_utilization: float = 0.9
    batch_tokens: int | Literal["auto"] = "auto"
    folder: Path | None = None


class EmbedModel:
    """The files of one embedding model, in a folder or on the hub.

    Args:
        name: folder or hub name. revision: of a hub model.

    Raises:
        UserError: it is written like a path and there is no such folder, or the folder holds no model.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name, self.revision = name, revision
        self.folder = local_folder(name, KEY)
        if self.folder is not None:
            check_model_folder(self.folder, KEY)

    @property
    def identity(self) -> str:
        """What tells it apart in a fingerprint: a digest of its files, or ``name@commit``."""
        if self.folder is None:
            return _hub_identity(self.name, self._path("config.json"))
        paths = sorted(_digested(self.folder))
        return digest({str(p.relative_to(self.folder)): digest_while_unchanged(p) for p in paths})

    def check(self, trust_remote_code: bool) -> None:
        """Check that it could be loaded, as far as its small files and the heads of its weights tell.

        Raises:
            UserError: a file is missing or cannot be used.
        """
        if self.folder is None:
            _hub_identity(self.name, self._path("config.json"))
            if not hub_reachable():
                check_cached_weights(self.name, KEY, self.revision)
        else:
            check_weights(self.folder, KEY)
        self.dimension, self.max_length  # noqa: B018 (reading their files is the check)
        self._tokenizer(trust_remote_code)

    @functools.cached_property
    def dimension(self) -> int:
        """Length of its vectors: of its last projection, its pooling, or its hidden states."""
        modules = self.json("modules.json")
        for module in reversed(modules if isinstance(modules, list) else []):
            settings = self.json(f"{module.get('path', '')}/config.json".lstrip("/")) or {}
            if module.get("type", "").endswith(".Dense") and "out_features" in settings:
                return int(settings["out_features"])
            if module.get("type", "").endswith(".Pooling") and "word_embedding_dimension" in settings:
                return int(settings["word_embedding_dimension"]) * max(1, _pooling_modes(settings))
        config = self.config
        size = config.get("hidden_size", config.get("d_model"))
        if size is None:
            raise UserError(
                f"The config.json of '{self.name}' has no hidden_size.",
                "The length of its vectors cannot be told.",
                f"Set {KEY} to a transformers or sentence-transformers model, or give vectors of your own "
                "with embeddings: path.npy.",
            )
        return int(size)

    @functools.cached_property
    def max_length(self) -> int:
        """The longest text that it takes, in tokens: the smallest of the limits in its files."""
        given = [
            (self.json("sentence_bert_config.json") or {}).get("max_seq_length"),
            (self.json("tokenizer_config.json") or {}).get("model_max_length"),
            self.config.get("max_position_embeddings"),
        ]
        limits = [int(limit) for limit in given if isinstance(limit, int | float) and 0 < limit < UNBOUNDED]
        return min(limits, default=UNBOUNDED)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json; of its text part where it has several."""
        whole = self.json("config.json") or {}
        text = whole.get("text_config")
        return text if isinstance(text, dict) else whole

    def token_counts(self, texts: Sequence[str], trust_remote_code: bool) -> list[int]:
        """Return the tokens of each text before anything is cut off, special tokens included. [texts]"""
        if not texts:
            return []
        found = self._tokenizer(trust_remote_code)(
            list(texts), truncation=False, padding=False, return_attention_mask=False, verbose=False
        )
        return [len(ids) for ids in found["input_ids"]]

    @functools.cache  # noqa: B019 (a model's description lives as long as the feature that asks)
    def _tokenizer(self, trust_remote_code: bool) -> Any:
        from transformers import AutoTokenizer

        local = self.folder is not None
        with explained(self.name, "tokenizer", KEY):
            return AutoTokenizer.from_pretrained(
                str(self.folder or self.name),
                revision=None if local else self.revision,
                local_files_only=local or not hub_reachable(),
                trust_remote_code=trust_remote_code,
            )

    def json(self, name: str) -> Any:
        """Return one of its JSON files, or None where there is no such file."""
        path = self._path(name)
        if path is None:
            return None
        try:
            return json.loads(path.read_text("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(
                f"{name} of the model '{self.name}' is not valid JSON ({error}).",
                "It says how the model turns texts into vectors.",
                f"Repair the file, download the model again, or set {KEY} to another one.",
            ) from error

    def _path(self, name: str) -> Path | None:
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        from transformers.utils.hub import cached_file

        with explained(self.name, name, KEY):
            found = cached_file(
                self.name,
                name,
                revision=self.revision,
                local_files_only=not hub_reachable(),
                _raise_exceptions_for_missing_entries=False,
            )
        return None if found is None else Path(found)


def _pooling_modes(settings: dict[str, Any]) -> int:
    """Return how many pooled vectors are put end to end."""
    if "pooling_mode" in settings:
        modes = settings["pooling_mode"]
        return len(modes) if isinstance(modes, list | tuple) else 1
    return sum(value is True for key, value in settings.items() if key.startswith("pooling_mode_"))


def _digested(folder: Path) -> Iterator[Path]:
    for pattern in DIGESTED:
        for path in folder.rglob(pattern):
            inside = path.relative_to(folder).parts
            if path.is_file() and OTHER_EDITIONS.isdisjoint(inside) and not inside[0].startswith("."):
                yield path


@functools.cache
def _hub_identity(name: str, config: Path | None) -> str:
    from transformers.utils.hub import extract_commit_hash

    commit = None if config is None else extract_commit_hash(str(config), None)
    if not commit and not hub_reachable():
        raise UserError(
            f"{KEY} is '{name}': no folder of that name is here, and the hub cannot be reached.",
            "It was not downloaded before either, so there is nothing to embed with.",
            f"Check the network, or set {KEY} of the method (for max_similarity: similarity.{KEY}) to a "
            "folder with a sentence-transformers model.",
        )
    if not commit:
        raise UserError(
            f"The hub model '{name}' has no commit that can be told.",
            "A fingerprint needs to know exactly which weights were used.",
            f"Download the model to a folder and set {KEY} to that folder.",
        )
    return f"{name}@{commit}"
