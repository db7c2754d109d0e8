"""The tokenizer of the base model, and the rule for its padding token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dataflex_pipeline.errors import UserError
from dataflex_pipeline.models.source import explained, load_arguments, local_folder, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dataflex_pipeline.config.fields import Config


def load_tokenizer(config: Config, say: Callable[[str], None] = quiet) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to ``model_name_or_path``.

    A tokenizer without a padding token gets its end (else unknown) token as one, and ``say`` is told.
    Padding only fills up batches, where attention mask and labels leave it out, so it changes no result.

    Raises:
        UserError: the folder or hub name has no tokenizer that can be loaded, or it has none of the
            three tokens.
    """
    from transformers import AutoTokenizer

    name = config.model_name_or_path
    with explained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(local_folder(name) or name), **load_arguments(config))
    if tokenizer.pad_token is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token
        if stand_in is None:
            raise UserError(
                f"The tokenizer of '{name}' has no pad, eos or unk token.",
                "Batches of rows of different lengths need a token to fill up with.",
                "Add one to its tokenizer_config.json (pad_token), for example its end-of-text token.",
            )
        tokenizer.pad_token = stand_in
        say(f"The tokenizer has no pad token; '{stand_in}' fills up batches (it is masked out everywhere).")
    return tokenizer
