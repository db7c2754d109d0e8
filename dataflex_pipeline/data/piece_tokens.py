"""Token ids and labels of rows that are cut into pieces, each piece tokenised by itself.

So a response begins at a token of its own, as it does when a model generates it; tokenised whole, the
last characters of a prompt and the first of its response could share a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
_SPACES = ("\u2581", "\u0120")
"""How SentencePiece and byte-level tokenizers write a space inside a token."""


class PieceTokenizer:
    """Tokenises the pieces of rows.

    Args:
        tokenizer: a transformers tokenizer.
        one_bos: put the beginning-of-sequence token before a row that lacks it, if the tokenizer by
            itself begins every text with it. False: rows have what their text says.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, one_bos: bool) -> None:
        self.tokenizer = tokenizer
        self._bos = tokenizer.bos_token_id
        begins = self._bos is not None and tokenizer("a")["input_ids"][:1] == [self._bos]
        self._adds_bos = one_bos and begins
        first = tokenizer.convert_ids_to_tokens(self.ids("a")[:1])
        self._pads = bool(first) and first[0].startswith(_SPACES)

    def ids(self, text: str) -> list[int]:
        """Return a text's token ids, special tokens only where the text spells them."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, rows: Sequence[Sequence[tuple[str, bool]]]) -> list[tuple[list[int], list[int]]]:
        """Tokenise rows, all in one call.

        Args:
            rows: per row its pieces: text, and whether it carries labels.

        Returns:
            Per row its token ids and its labels (the id in a labelled piece, -100 elsewhere), of equal
            length.
        """
        texts = [(text, place > 0) for pieces in rows for place, (text, _) in enumerate(pieces)]
        ids = iter(self._encode_texts(texts))
        return [self._join([(next(ids), labelled) for _, labelled in pieces]) for pieces in rows]

    def _join(self, parts: Sequence[tuple[list[int], bool]]) -> tuple[list[int], list[int]]:
        input_ids: list[int] = []
        labels: list[int] = []
        if self._adds_bos and parts and parts[0][0][:1] != [self._bos]:
            input_ids, labels = [self._bos], [IGNORED]
        for ids, labelled in parts:
            input_ids += ids
            labels += ids if labelled else [IGNORED] * len(ids)
        return input_ids, labels

    def _encode_texts(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Tokenise texts, each with whether it continues a row."""
        if not texts:
            return []
        if self._pads:
            return [self._continue(text) if inner else self.ids(text) for text, inner in texts]
        encoded = self.tokenizer([text for text, _ in texts], add_special_tokens=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _continue(self, text: str) -> list[int]:
        """Tokenise a text without the space that such tokenizers put before every text.

        Only the start of a row has it. The text is tokenised behind an anchor whose own tokens are then
        taken off; the second anchor is for texts that merge with the first.
        """
        for anchor in ("\n", "a"):
            lead, both = self.ids(anchor), self.ids(anchor + text)
            if both[: len(lead)] == lead:
                return both[len(lead) :]
        return self.ids(text)
