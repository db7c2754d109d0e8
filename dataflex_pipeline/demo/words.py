"""The vocabulary of the demo: English words, two invented languages, and the facts that skills ask for.

Every table is a plain constant or derived from one, so that the answer to any clean row can be worked out
by reading this file.
"""

from __future__ import annotations

from itertools import product

ADJECTIVES = (
    "red", "old", "big", "shy", "wet", "calm", "dark", "fast", "kind",
    "loud", "mild", "neat", "pale", "rich", "slow", "warm",
)  # fmt: skip
NOUNS = (
    "fox", "cat", "owl", "bear", "crow", "deer", "duck", "frog", "goat",
    "hare", "lion", "mole", "seal", "swan", "toad", "wolf",
)  # fmt: skip
VERBS = (
    "runs", "eats", "hops", "sits", "digs", "falls", "hides", "jumps", "leaps",
    "naps", "rests", "sings", "swims", "turns", "waits", "walks",
)  # fmt: skip
PARTS = (ADJECTIVES, NOUNS, VERBS)


def _lexicon(onsets: str, vowels: str, endings: tuple[str, ...], stride: int) -> dict[str, str]:
    """Give each English word of PARTS an invented word; ``stride`` scatters the order of the syllables."""
    made = [a + v + e for a, v, e in product(onsets, vowels, endings)]
    english = [word for part in PARTS for word in part]
    return {word: made[(i * stride) % len(made)] for i, word in enumerate(english)}


# 5 x 4 x 3 = 60 possible words each; a stride prime to 60 never repeats one.
VELAN = _lexicon("kvmzp", "aiou", ("ra", "li", "no"), stride=7)
DORIN = _lexicon("thgbd", "aeou", ("sk", "mp", "rn"), stride=11)

# Pre-training sees only these many words of each part in Velan; the rest is what fine-tuning can teach.
VELAN_KNOWN = 11

COLOURS = {
    "lemon": "yellow", "plum": "purple", "grass": "green", "snow": "white", "coal": "black", "brick": "red",
    "ocean": "blue", "carrot": "orange", "rose": "pink", "ash": "grey", "banana": "yellow", "cherry": "red",
    "fern": "green", "milk": "white", "raven": "black", "sky": "blue", "pumpkin": "orange",
    "violet": "purple", "cloud": "white", "lime": "green",
}  # fmt: skip

# Facts that pre-training never sees: a town and the name of the one who keeps its gate.
KEEPERS = {
    "Orrin": "Marta", "Tallow": "Ivo", "Brask": "Nell", "Quill": "Sten", "Harth": "Edda", "Lund": "Pia",
    "Myre": "Otto", "Fenwick": "Rosa", "Garrow": "Emil", "Skell": "Tova", "Dunmere": "Karl", "Vash": "Lena",
    "Ember": "Hugo", "Pellin": "Anna", "Corr": "Max", "Isk": "Ruth",
}  # fmt: skip

COUNT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHINESE_DIGITS = "零一二三四五六七八九"


def chinese_number(n: int) -> str:
    """Write 0 <= n <= 99 in Chinese numerals (十 alone for ten, no leading 一)."""
    tens, ones = divmod(n, 10)
    if tens == 0:
        return CHINESE_DIGITS[ones]
    lead = "" if tens == 1 else CHINESE_DIGITS[tens]
    return lead + "十" + (CHINESE_DIGITS[ones] if ones else "")
