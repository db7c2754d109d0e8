"""The rows of the demo: pool, target, test and pre-training mix, from one seed.

The pool is clean rows of every skill plus what real pools hold: exact and near duplicates, noise (garbage
answers) and mislabelled rows (the answer to another question of the same skill). ``skill`` and ``quality``
are the ground truth about each row; they are there for measuring a selection, and no method may read them.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dataflex_pipeline.demo.skills import SKILLS, TARGET_SKILL, Maker
from dataflex_pipeline.seeds import derive_seed

QUALITIES = ("clean", "duplicate", "near_duplicate", "noise", "mislabelled")


@dataclass(frozen=True)
class CorpusSettings:
    """How many rows of what.

    Attributes:
        pool_rows, target_rows, test_rows: rows of the three files.
        duplicate, near_duplicate, noise, mislabelled: shares of the pool's rows; the rest is clean.
        seed: of every random stream of the corpus.
    """

    pool_rows: int = 3600
    target_rows: int = 128
    test_rows: int = 200
    duplicate: float = 0.04
    near_duplicate: float = 0.04
    noise: float = 0.07
    mislabelled: float = 0.06
    seed: int = 20


@dataclass(frozen=True)
class Row:
    """One line of a corpus file: the alpaca columns and the ground truth."""

    instruction: str
    input: str
    output: str
    skill: str
    quality: str

    @property
    def prompt(self) -> str:
        """What the user says: the instruction, and the input on a line of its own where there is one."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True)
class Corpus:
    """The three files of the demo, in file order."""

    pool: list[Row]
    target: list[Row]
    test: list[Row]


def stream(seed: int, name: str) -> random.Random:
    """Open the random stream of that name."""
    return random.Random(derive_seed(seed, "demo", name))  # noqa: S311 (rows, not secrets)


def make_corpus(settings: CorpusSettings) -> Corpus:
    """Make the three files; no phrase of the target or the test is in another of them as the target skill."""
    taken: set[str] = set()
    files: dict[str, list[Row]] = {}
    for name, count in (("test", settings.test_rows), ("target", settings.target_rows)):
        rng = stream(settings.seed, name)
        files[name] = []
        for _ in range(count):
            files[name].append(_draw(TARGET_SKILL, SKILLS[TARGET_SKILL].make, rng, taken))
            taken.add(files[name][-1].input)
    return Corpus(pool=_pool(settings, taken), **files)


def pretraining_rows(settings: CorpusSettings, corpus: Corpus, count: int) -> list[Row]:
    """Draw ``count`` rows of the pre-training mix; never a phrase of the target or the test."""
    taken = {row.input for row in (*corpus.target, *corpus.test)}
    rng = stream(settings.seed, "pretraining")
    names = list(SKILLS)
    drawn = rng.choices(names, [SKILLS[name].pretraining for name in names], k=count)
    return [_draw(name, SKILLS[name].pretraining_make or SKILLS[name].make, rng, taken) for name in drawn]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), "utf-8")


def _draw(skill: str, make: Maker, rng: random.Random, taken: set[str]) -> Row:
    """Draw a clean row; for the target skill, one whose phrase is not held out."""
    example = make(rng)
    while skill == TARGET_SKILL and example.input in taken:
        example = make(rng)
    return Row(example.instruction, example.input, example.output, skill, "clean")


def _pool(settings: CorpusSettings, taken: set[str]) -> list[Row]:
    rng = stream(settings.seed, "pool")
    counts = {name: round(settings.pool_rows * getattr(settings, name)) for name in QUALITIES[1:]}
    originals = settings.pool_rows - counts["duplicate"] - counts["near_duplicate"]
    rows = [_draw(skill, SKILLS[skill].make, rng, taken) for skill in _shares(originals)]
    rng.shuffle(rows)
    for position in range(counts["noise"]):
        rows[position] = _noisy(rows[position], rng)
    for position in range(counts["noise"], counts["noise"] + counts["mislabelled"]):
        rows[position] = _mislabelled(rows[position], rng)
    clean = rows[counts["noise"] + counts["mislabelled"] :]
    rows += [replace(row, quality="duplicate") for row in rng.sample(clean, counts["duplicate"])]
    rows += [_reworded(row, rng) for row in rng.sample(clean, counts["near_duplicate"])]
    rng.shuffle(rows)
    return rows


def _shares(total: int) -> list[str]:
    """Name the skill of each of ``total`` rows by the skills' shares; the last skill takes the rounding."""
    names = [name for name, skill in SKILLS.items() for _ in range(round(total * skill.pool))]
    return (names + [list(SKILLS)[-1]] * total)[:total]


def _noisy(row: Row, rng: random.Random) -> Row:
    """Put garbage in place of the answer: letters, digits and signs in runs of random length."""
    signs = string.ascii_letters + string.digits + "#%&*@"
    garbage = ["".join(rng.choices(signs, k=rng.randint(1, 7))) for _ in range(rng.randint(2, 8))]
    return replace(row, output=" ".join(garbage), quality="noise")


def _mislabelled(row: Row, rng: random.Random) -> Row:
    """Put the answer to another question of the same skill in place of the right one."""
    output = row.output
    while output == row.output:
        output = SKILLS[row.skill].make(rng).output
    return replace(row, output=output, quality="mislabelled")


def _reworded(row: Row, rng: random.Random) -> Row:
    """Ask the same question a little differently."""
    instruction = row.instruction
    start = rng.choice(("Please: ", "Question: ", "Now, "))
    return replace(row, instruction=start + instruction, quality="near_duplicate")
