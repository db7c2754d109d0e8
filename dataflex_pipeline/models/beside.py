"""A causal language model beside the run's own: its identity, its checks, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.hub import hub_reachable
from dataflex_pipeline.models.source import (
    check_cached_weights,
    check_model_folder,
    check_weights,
    explained,
    load_arguments,
    local_folder,
    model_digest,
    number_ingredients,
    quiet,
    tokenizer_digest,
)
from dataflex_pipeline.store.fingerprint import digest, digest_while_unchanged

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LOOKED_AT = 4
"""Tokens that the check of causality gives the model."""
TOLERANCES = {True: 1e-4, False: 2e-2}
"""How far logits of the same token may be apart, relative to the largest: in float32, and in less."""


class ModelBeside:
    """A model that scores or embeds and is not trained: a folder or a hub name.

    Args:
        name, revision: of the model. key: the setting that names it, for messages.
        config: the run's; device, precision and ``trust_remote_code`` are taken from it, nothing else.
    """

    def __init__(self, name: str, revision: str | None, key: str, config: Config) -> None:
        self.name, self.key = name, key
        self.folder = local_folder(name, key)
        if self.folder is not None:
            check_model_folder(self.folder, key)
        self.config = Config(
            model_name_or_path=name,
            model_revision=revision,
            trust_remote_code=config.trust_remote_code,
            bf16=config.bf16,
            device=config.device,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its numbers, for a fingerprint: files by their content, and the precision."""
        self.architecture  # noqa: B018 (its errors name the setting; those of the digests name the run's model)
        files = [each(self.config, digest_while_unchanged) for each in (model_digest, tokenizer_digest)]
        return {
            "model": digest({"weights": files[0], "tokenizer": files[1]}),
            **number_ingredients(self.config),
        }

    def check(self) -> None:
        """Check that it could be loaded, as far as its small files and the heads of its weights tell.

        Raises:
            UserError: a file is missing or cannot be used, or it is no causal language model.
        """
        self.architecture, self.tokenizer  # noqa: B018 (reading them is the check)
        if self.folder is not None:
            check_weights(self.folder, self.key)
        elif not hub_reachable():
            check_cached_weights(self.name, self.key, self.config.model_revision)

    @cached_property
    def architecture(self) -> PreTrainedConfig:
        """Its configuration, of transformers.

        Raises:
            UserError: there is none. ConfigError: it is of another kind of model.
        """
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

        with explained(self.name, "configuration", self.key):
            found = AutoConfig.from_pretrained(str(self.folder or self.name), **load_arguments(self.config))
        own_code = "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {})
        if getattr(found, "is_encoder_decoder", False):
            raise self._refused(f"{found.model_type} is an encoder with a decoder")
        if found.model_type not in CAUSAL and not own_code:
            raise self._refused(f"{found.model_type} is no causal language model")
        return found

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own tokenizer, as it is.

        Raises:
            UserError: there is none that can be loaded.
        """
        from transformers import AutoTokenizer

        with explained(self.name, "tokenizer", self.key):
            return AutoTokenizer.from_pretrained(str(self.folder or self.name), **load_arguments(self.config))

    def load(
        self, device: str, say: Callable[[str], None] = quiet, dtype: str | None = None
    ) -> PreTrainedModel:
        """Load it for scoring.

        Args:
            device: from `resolve_device`. say: told what has to be said about its weights.
            dtype: name of a torch number format; None for that of `precision`.

        Raises:
            ConfigError: it is no causal language model.
        """
        from dataflex_pipeline.models.base import load_base

        self.architecture  # noqa: B018 (the check comes before the weights)
        model = load_base(self.config, device, dtype, say).eval()
        if not _is_causal(model):
            raise self._refused("its first hidden state depends on the tokens behind it")
        return model

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self.key}: {self.name} is not a causal language model: {why}.",
            "Each of its tokens has to be read from those before it alone.",
            f"Set {self.key} to a decoder such as Qwen/Qwen2.5-0.5B or openai-community/gpt2.",
        )


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether the first token's logits stay the same when other tokens follow."""
    import torch

    size = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(1, 1 + 2 * LOOKED_AT).reshape(2, -1) % size  # [2, LOOKED_AT]
    ids[1, 0] = ids[0, 0]
    with torch.inference_mode():
        first = model(input_ids=ids.to(model.device), use_cache=False).logits[:, 0].float()  # [2, V]
    largest, apart = float(first.abs().max()), float((first[0] - first[1]).abs().max())
    return apart <= TOLERANCES[model.dtype == torch.float32] * largest
