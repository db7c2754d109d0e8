"""The skills and the vocabulary of the demo corpus; a skill makes a question and its answer at random.

Skills differ in how much of them pre-training taught, which is what data selection is about: some rows
teach nothing new, some teach the target skill, some teach another one, some cannot be learnt.

Every table is a plain constant or derived from one, so that the answer to any clean row can be worked out
by reading this file.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Example:
    """One question and its right answer, in the columns of the alpaca format."""

    instruction: str
    input: str
    output: str


Maker = Callable[[random.Random], Example]


@dataclass(frozen=True)
class Skill:
    """A kind of row.

    Attributes:
        make: draws one example.
        pool: share of the pool's rows.
        pretraining: share of the pre-training mix (0: the model has never seen it).
        pretraining_make: what pre-training draws instead, where it sees only a part of the skill.
    """

    make: Maker
    pool: float
    pretraining: float
    pretraining_make: Maker | None = None


def phrase(rng: random.Random, known: int | None = None) -> list[str]:
    """Draw an adjective, a noun and a verb, from the first ``known`` of each part if given."""
    return [rng.choice(part[:known]) for part in PARTS]


def _translate(language: str, lexicon: Mapping[str, str], known: int | None = None) -> Maker:
    asks = (f"Translate into {language}.", f"Say this in {language}.", f"What is this in {language}?")

    def make(rng: random.Random) -> Example:
        source = phrase(rng, known)
        return Example(rng.choice(asks), " ".join(source), " ".join(lexicon[word] for word in source))

    return make


def _any_words(rng: random.Random, low: int, high: int) -> list[str]:
    """Draw words of any of the three languages, so that pre-training has met each of them somewhere."""
    table = rng.choice((tuple(VELAN), tuple(VELAN.values()), tuple(DORIN.values())))
    return rng.sample(table, rng.randint(low, high))


def _repeat(rng: random.Random) -> Example:
    lexicon = rng.choice((None, VELAN, DORIN))
    text = " ".join(word if lexicon is None else lexicon[word] for word in phrase(rng))
    return Example(rng.choice(("Repeat the words.", "Write this again.")), text, text)


def _reverse(rng: random.Random) -> Example:
    chosen = _any_words(rng, 3, 3)
    ask = rng.choice(("Reverse the order of the words.", "Write the words backwards."))
    return Example(ask, " ".join(chosen), " ".join(reversed(chosen)))


def _count(rng: random.Random) -> Example:
    chosen = _any_words(rng, 1, 9)
    return Example("How many words are there?", " ".join(chosen), COUNT_WORDS[len(chosen)])


def _colour(rng: random.Random) -> Example:
    thing, colour = rng.choice(tuple(COLOURS.items()))
    ask = rng.choice((f"What colour is {thing}?", f"Name the colour of {thing}."))
    return Example(ask, "", f"It is {colour}.")


def _keeper(rng: random.Random) -> Example:
    town, keeper = rng.choice(tuple(KEEPERS.items()))
    ask = rng.choice((f"Who keeps the gate of {town}?", f"Name the keeper of {town}."))
    return Example(ask, "", f"{keeper} keeps the gate of {town}.")


def _sort(rng: random.Random) -> Example:
    digits = [str(rng.randrange(10)) for _ in range(rng.randint(4, 7))]
    return Example("Sort the digits.", " ".join(digits), " ".join(sorted(digits)))


def _add(rng: random.Random) -> Example:
    a, b = rng.randrange(10, 500), rng.randrange(10, 500)
    return Example(f"What is {a} + {b}?", "", str(a + b))


def _chinese(rng: random.Random) -> Example:
    n = rng.randrange(100)
    return Example(rng.choice((f"用中文写出数字 {n}。", f"Write {n} in Chinese.")), "", chinese_number(n))


def _story(rng: random.Random, low: int = 4, high: int = 20) -> Example:
    """A chain of templated sentences, 40 to 250 tokens long: the long rows of the corpus."""
    adjective, noun, _ = phrase(rng)
    lines = [f"There was a {adjective} {noun}."]
    for _ in range(rng.randint(low, high)):
        friend, verb = rng.choice(NOUNS), rng.choice(VERBS)
        thing, colour = rng.choice(tuple(COLOURS.items()))
        lines.append(
            rng.choice(
                (
                    f"The {noun} {verb} with the {friend}.",
                    f"Then the {adjective} {noun} {verb} under the {thing}, which is {colour}.",
                    f"A {friend} {verb} and the {noun} {verb} too.",
                )
            )
        )
    return Example(f"Tell a story about a {adjective} {noun}.", "", " ".join(lines))


def _short_story(rng: random.Random) -> Example:
    return _story(rng, 2, 5)


def _key(rng: random.Random) -> Example:
    """A random string: no model can learn it, however long it trains."""
    door = rng.randrange(1000, 10000)
    code = "".join(rng.choice(string.ascii_lowercase + string.digits) for _ in range(rng.randint(8, 14)))
    return Example(f"What is the key of door {door}?", "", code)


TARGET_SKILL = "velan"

SKILLS: dict[str, Skill] = {
    "velan": Skill(_translate("Velan", VELAN), 0.10, 0.20, _translate("Velan", VELAN, VELAN_KNOWN)),
    "dorin": Skill(_translate("Dorin", DORIN), 0.09, 0.24),
    "colour": Skill(_colour, 0.09, 0.08),
    "repeat": Skill(_repeat, 0.08, 0.14),
    "reverse": Skill(_reverse, 0.08, 0.08),
    "count": Skill(_count, 0.08, 0.06),
    "keeper": Skill(_keeper, 0.09, 0.0),
    "sort": Skill(_sort, 0.08, 0.06),
    "add": Skill(_add, 0.08, 0.04),
    "chinese": Skill(_chinese, 0.08, 0.04),
    "story": Skill(_story, 0.08, 0.06, _short_story),
    "key": Skill(_key, 0.07, 0.0),
}
