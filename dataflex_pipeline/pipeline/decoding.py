"""Tokens as text, by the run's own tokenizer, where it is on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dataflex_pipeline.errors import DataflexError
from dataflex_pipeline.pipeline.open_run import OpenRun


class Decode(Protocol):
    """From tokens to their text."""

    def __call__(self, tokens: list[int], *, special: bool = True) -> str:
        """Return the text of tokens, with or without the tokenizer's special ones."""
        ...


def decoder(run: OpenRun, ids: Sequence[int], notices: list[str], *, quick: bool = False) -> Decode | None:
    """Return how the run's tokenizer writes tokens as text, where it is on this machine.

    Args:
        run: whose tokenizer.
        ids: tokens that it has to know.
        notices: is told why there is none.
        quick: only one that loads in no time, without transformers.
    """
    from dataflex_pipeline.models.source import local_folder

    try:
        name = run.config.model_name_or_path
        folder = local_folder(name)
    except DataflexError as error:
        notices.append(f"the tokenizer is not at hand: {error.what}")
        return None
    if folder is None and not isinstance(_cached(name, "tokenizer_config.json"), str):
        notices.append(f"the tokenizer of {name} is not on this machine")
        return None
    fast = _cached(name, "tokenizer.json") if folder is None else folder / "tokenizer.json"
    found = _fast_decoder(fast, ids)
    if found is None and quick:
        notices.append(f"the tokenizer of {name} has no tokenizer.json that knows the tokens of these rows")
        return None
    return found or _slow_decoder(run)


def _cached(name: str, file: str) -> Any:
    from huggingface_hub import try_to_load_from_cache

    return try_to_load_from_cache(name, file)


def _fast_decoder(file: Any, ids: Sequence[int]) -> Decode | None:
    """Return the decoder of a file of `tokenizers`, without the seconds that transformers takes to load."""
    if not isinstance(file, str | Path) or not Path(file).is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    if any(tokenizer.id_to_token(token) is None for token in ids):
        return None  # some of its tokens are in other files

    def decode(tokens: list[int], *, special: bool = True) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=not special))

    return decode


def _slow_decoder(run: OpenRun) -> Decode:
    from dataflex_pipeline.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run.config)

    def decode(tokens: list[int], *, special: bool = True) -> str:
        how = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(tokens, **how))

    return decode
