"""The beginning that a chat template writes before an answer, without the question."""

from __future__ import annotations

from dataflex_pipeline.data.chat.labelled import QUESTION, ChatFormat, Piece
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.schemas import IGNORED


def beginning_ids(chat: ChatFormat, key: str = "template") -> list[int]:
    """Return the tokens that stand before the answer to an empty question.

    That is all that the template writes for one user turn up to the answer, but for the question itself: the
    beginning-of-sequence token, a system prompt of the template's own, the marks of the two turns. Where
    that is nothing, it is the token that texts begin with, or else the one that they end with.

    Args:
        chat: a tokenizer with its template. key: the setting that chose the template, for messages.

    Raises:
        ConfigError: the template does not write a question as it is given, or the tokenizer has neither of
            the two tokens.
    """
    before, _ = chat.probe()
    if before.count(QUESTION) != 1:
        raise ConfigError(
            f"The chat template ({key}) does not write a single question as it was asked.",
            "What it writes before an answer to no question cannot be told, and ifd compares with that.",
            f"Set {key} to the named template of the model's family (`dataflex methods --templates`).",
        )
    pieces = [Piece(before.replace(QUESTION, ""), False), Piece("a", True)]
    ids, labels = chat.encode([[piece for piece in pieces if piece.text]])[0]
    beginning = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
    return beginning or [_first_token(chat, key)]


def _first_token(chat: ChatFormat, key: str) -> int:
    tokenizer = chat.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError(
        f"The chat template ({key}) writes nothing before an answer, and the tokenizer has no token for the "
        "beginning or the end of a text.",
        "The first token of a response alone has nothing that it could be predicted from.",
        f"Set {key} to a template with marks, such as chatml.",
    )
