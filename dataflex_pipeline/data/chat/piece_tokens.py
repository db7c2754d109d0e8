"""Token ids and labels of rows that are cut into pieces, each piece tokenised by itself.

So a response begins at a token of its own, as it does when a model generates it; tokenised whole, the
last characters of a prompt and the first of its response could share a token.

Where nothing is shared, the ids are those of the whole text. Two things reach over the border of pieces: some
tokenizers put a space before every text, or after every added token; and some added tokens swallow the
white space around them (``rstrip``, ``lstrip``, as Phi-3's do). So a piece is tokenised together with the
added token before or after it, whose id is then taken off again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.schemas import IGNORED

if TYPE_CHECKING:
    from transformers import AddedToken, PreTrainedTokenizerBase

_SPACES = ("\u2581", "\u0120")
"""How SentencePiece and byte-level tokenizers write a space inside a token."""
_WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""Unicode's white space, which is what added tokens swallow (Python's own counts four separators more)."""


class PieceTokenizer:
    """Tokenises the pieces of rows.

    Args:
        tokenizer: a transformers tokenizer.
        one_bos: put the beginning-of-sequence token before a row that lacks it, if the tokenizer by
            itself begins every text with it. False: rows have what their text says.

    Attributes:
        special_ids: ids of the special tokens, among which those that end a turn are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, one_bos: bool) -> None:
        self.tokenizer = tokenizer
        self._bos = tokenizer.bos_token_id
        self._adds_bos = one_bos and puts_bos(tokenizer)
        first = tokenizer.convert_ids_to_tokens(self.ids("a")[:1])
        self._pads = bool(first) and first[0].startswith(_SPACES)
        added = tokenizer.added_tokens_decoder
        special = [number for number, token in added.items() if token.special]
        self.special_ids = frozenset([*special, *tokenizer.all_special_ids])
        known = list(self._known(added))
        self._added = _longest_first(text for text, _ in known)
        self._right_strips = _longest_first(text for text, token in known if token.rstrip)
        self._left_strips = _longest_first(text for text, token in known if token.lstrip)

    def _known(self, added: Mapping[int, AddedToken]) -> Iterator[tuple[str, AddedToken]]:
        """Yield how each added token is spelled inside a text.

        Some tokenizers know one at the start of a text or behind a space only: its own spelling is
        normalised, which puts a space before it.
        """
        left = dict(added)
        for space in ("", " "):
            texts = {number: space + token.content for number, token in left.items()}
            found = self._batch([f"a{text}" for text in texts.values()])
            for (number, text), ids in zip(texts.items(), found, strict=True):
                if ids[-1:] == [number]:
                    yield text, left.pop(number)

    def ids(self, text: str) -> list[int]:
        """Return a text's token ids, special tokens only where the text spells them."""
        with _asked():
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, rows: Sequence[Sequence[tuple[str, bool]]]) -> list[tuple[list[int], list[int]]]:
        """Tokenise rows, all in one call where their pieces do not depend on each other.

        Args:
            rows: per row its pieces: text, and whether it carries labels.

        Returns:
            Per row its token ids and its labels (the id in a labelled piece, -100 elsewhere), of equal
            length.
        """
        texts = [[text for text, _ in pieces] for pieces in rows]
        bound = {
            (number, place): made
            for number, pieces in enumerate(texts)
            for place in range(len(pieces))
            if (made := self._bound(pieces, place)) is not None
        }
        places = [(number, place) for number, pieces in enumerate(texts) for place in range(len(pieces))]
        free = [each for each in places if each not in bound]
        ids = bound | dict(zip(free, self._batch([texts[n][p] for n, p in free]), strict=True))
        return [
            self._join([(ids[number, place], labelled) for place, (_, labelled) in enumerate(pieces)])
            for number, pieces in enumerate(rows)
        ]

    def _join(self, parts: Sequence[tuple[list[int], bool]]) -> tuple[list[int], list[int]]:
        input_ids: list[int] = []
        labels: list[int] = []
        if self._adds_bos and parts and parts[0][0][:1] != [self._bos]:
            input_ids, labels = [self._bos], [IGNORED]
        for ids, labelled in parts:
            input_ids += ids
            labels += ids if labelled else [IGNORED] * len(ids)
        return input_ids, labels

    def _batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        with _asked():
            encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _bound(self, texts: Sequence[str], place: int) -> list[int] | None:
        """Tokenise a piece that depends on its neighbours; None for one that does not."""
        text = texts[place]
        left = self._swallows_from_left(texts, place)
        right = self._swallows_from_right(texts, place)
        if not left and not right and not (self._pads and place):
            return None
        inner = place > 0 and not left
        # The space that such tokenizers put before every text belongs to the start of a row only. The
        # second anchor is for texts that merge with the first.
        anchors = ("\n", "a") if inner and self._pads else (left,)
        for anchor in anchors:
            found = self._between(anchor, text, right)
            if found is not None:
                return found
        return self.ids(text)

    def _between(self, left: str, text: str, right: str) -> list[int] | None:
        """Return a text's ids between two others; None where they share a token with it."""
        lead = self.ids(left) if left else []
        tail = self._token_id(right) if right else []
        both = self.ids(left + text + right)
        fits = both[: len(lead)] == lead and both[len(both) - len(tail) :] == tail
        return both[len(lead) : len(both) - len(tail)] if fits else None

    def _token_id(self, text: str) -> list[int]:
        return [int(self.tokenizer.convert_tokens_to_ids(text.lstrip(_WHITE)))]

    def _swallows_from_left(self, texts: Sequence[str], place: int) -> str:
        """Return the added token before a piece that changes how it is tokenised; "" for none."""
        text = texts[place]
        if not place or not (self._pads or (self._right_strips and text[:1] in _WHITE)):
            return ""
        before = texts[place - 1]
        bare = _bare_before(texts, place)
        found = next((token for token in self._right_strips if bare.endswith(token)), "")
        if not found and self._pads:
            found = next((token for token in self._added if before.endswith(token)), "")
        return found

    def _swallows_from_right(self, texts: Sequence[str], place: int) -> str:
        """Return white space and the added token after it that swallows the end of a piece; "" for none."""
        text = texts[place]
        if not self._left_strips or text[-1:] not in _WHITE:
            return ""
        after = "".join(texts[place + 1 :])
        bare = after.lstrip(_WHITE)
        found = next((token for token in self._left_strips if bare.startswith(token)), "")
        return after[: len(after) - len(bare)] + found if found else ""


def puts_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer by itself begins every text with the beginning-of-sequence token."""
    bos = tokenizer.bos_token_id
    with _asked():
        return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


@contextmanager
def _asked() -> Iterator[None]:
    """Turn what a tokenizer raises on a text into an error in words: nothing is wrong with the text."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # its files may hold anything, and its library raises bare Exceptions
        found = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            "The model's tokenizer cannot be used.",
            f"It was loaded, and asked for the tokens of a text it fails: {found[:300]}.",
            "Copy the tokenizer's files again from where the model comes from.",
        ) from error


def _bare_before(texts: Sequence[str], place: int) -> str:
    """Return the last piece before a place that is more than white space, without that at its end."""
    return next((bare for text in reversed(texts[:place]) if (bare := text.rstrip(_WHITE))), "")


def _longest_first(texts: Iterable[str]) -> list[str]:
    return sorted(filter(None, texts), key=len, reverse=True)
