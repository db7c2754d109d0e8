"""Limits of a model: positions and token ids, told from its configuration before anything is trained.

A model with a table of positions (GPT-2, OPT, GPT-J, ...) has no others: a longer row stops it with an index
error. A model with rotary positions computes any, and was trained on so many. An id beyond the
embedding stops every model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dataflex_pipeline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LEARNED_POSITIONS = frozenset(
    {
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "biogpt",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "codegen",
        "ctrl",
        "data2vec-text",
        "electra",
        "ernie",
        "git",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gptj",
        "imagegpt",
        "marian",
        "mbart",
        "megatron-bert",
        "mvp",
        "openai-gpt",
        "opt",
        "pegasus",
        "plbart",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "xlm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Model types that have one vector per position, learned or computed once, and none beyond."""
_RESERVED = dict.fromkeys(
    (
        "roberta",
        "camembert",
        "data2vec-text",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ),
    2,
)
"""Positions at the start of the embedding that no token has, where the configuration counts them, too."""


@dataclass(frozen=True)
class TokenLimits:
    """What a model takes.

    Attributes:
        positions: tokens of a row; None where nothing limits them. hard: whether more cannot be computed.
        vocabulary: rows of its embedding; None where its configuration does not say.
    """

    positions: int | None = None
    hard: bool = False
    vocabulary: int | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> TokenLimits:
        """Read them from a model's configuration."""
        text = config.get_text_config()
        kind = getattr(text, "model_type", "")
        positions = getattr(text, "max_position_embeddings", None)
        hard = kind in LEARNED_POSITIONS
        if positions is not None:
            positions = int(positions) - _RESERVED.get(kind, 0)
        vocabulary = getattr(text, "vocab_size", None)
        known = positions if hard or not _scaled(text) else None
        return cls(known, hard, None if vocabulary is None else int(vocabulary))

    def check(self, summary: Mapping[str, Any], what: str, name_of: Callable[[int], str]) -> None:
        """Check prepared rows by their counts.

        Args:
            summary: with ``longest`` and ``largest_token``. what: pool or target.
            name_of: gives a token's text.

        Raises:
            DataError: a row is too long, or a token is not in the embedding.
        """
        longest, largest = summary.get("longest", 0), summary.get("largest_token", -1)
        if self.hard and self.positions is not None and longest > self.positions:
            raise DataError(
                f"cutoff_len lets a row of the {what} have {longest} tokens, and the model has "
                f"{self.positions} positions.",
                "Each position has a vector of its own, and there is none for the tokens beyond.",
                f"Set cutoff_len={self.positions} (or less), which cuts rows off, or use a model with more.",
            )
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise DataError(
                f"Token {largest} ({name_of(largest)}) occurs in the {what}, and the model's embedding has "
                f"{self.vocabulary} rows.",
                "The tokenizer has tokens that the model was never given, so there is nothing to look up.",
                "Use the model's own tokenizer and a template whose marks it has, or resize the model once "
                "(resize_token_embeddings) and save both.",
            )

    def notices(self, summary: Mapping[str, Any], what: str) -> list[str]:
        """Return what a user should know about the length of rows, one line each."""
        longest = summary.get("longest", 0)
        if self.hard or self.positions is None or longest <= self.positions:
            return []
        return [
            f"the longest row of the {what} has {longest} tokens, and the model was made for "
            f"{self.positions} (max_position_embeddings): set cutoff_len={self.positions}, or expect worse "
            "losses beyond"
        ]


def _scaled(text: PreTrainedConfig) -> bool:
    """Whether the model's rotary positions are scaled to more than its configuration counts."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [given, *(value for value in given.values() if isinstance(value, Mapping))]
    return any((kind.get("rope_type") or kind.get("type") or "default") != "default" for kind in kinds)
