"""The demo folder: corpus, tokenizer, model, and the numbers that describe them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import dataflex_pipeline
from dataflex_pipeline.demo.corpus import (
    Corpus,
    CorpusSettings,
    Row,
    make_corpus,
    pretraining_rows,
    write_rows,
)
from dataflex_pipeline.demo.pretrain import (
    EOS,
    ModelSettings,
    fixed_threads,
    new_model,
    padded,
    pretrain,
    save_tokenizer,
    train_bpe,
)
from dataflex_pipeline.demo.skills import TARGET_SKILL
from dataflex_pipeline.schemas import IGNORED
from dataflex_pipeline.store.atomic import atomic_folder, write_json, write_text

BATCH_ROWS = 64


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 32) -> list[str]:
    """Answer each prompt as one user turn, always taking the likeliest token.

    Prompts are padded on the left, which is where a decoder's padding belongs; the answers come without
    special tokens.
    """
    import torch

    answers: list[str] = []
    for start in range(0, len(prompts), BATCH_ROWS):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            for prompt in prompts[start : start + BATCH_ROWS]
        ]
        batch = tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        with torch.no_grad():
            made = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = made[:, batch["input_ids"].shape[1] :]  # [B, new tokens]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def exact_match(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """Give the share of rows whose greedy answer is the right one, character for character."""
    answers = greedy_answers(model, tokenizer, [row.prompt for row in rows])
    return sum(answer == row.output for answer, row in zip(answers, rows, strict=True)) / len(rows)


def mean_loss(model: Any, rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> float:
    """Give the mean over rows of each row's mean loss, nats per answer token.

    Args:
        rows: (input ids, labels) of each row.
        pad_id: the padding token.
    """
    import torch

    total = 0.0
    with torch.no_grad():
        for row in rows:
            ids, mask, labels = padded([row], pad_id)
            total += model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    return total / len(rows)


# Counts the editions of the code that makes the rows and the weights: another edition, another folder.
EDITION = 1

# Rows of the pre-training mix that the tokenizer learns merges from, beside the pool.
TOKENIZER_ROWS = 4000


@dataclass(frozen=True)
class DemoSettings:
    """All that decides what is in the folder, the library versions aside."""

    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    model: ModelSettings = field(default_factory=ModelSettings)


@dataclass(frozen=True)
class Demo:
    """The paths of a made demo.

    Attributes:
        folder: all of it.
        model: model, tokenizer and chat template, for ``from_pretrained``.
        pool: candidate rows, JSONL in the alpaca format with ``skill`` and ``quality`` beside it.
        target: rows of the target skill to select towards.
        test: held-out rows of the target skill, for exact match.
        target_skill: the value of ``skill`` in target and test.
    """

    folder: Path
    model: Path
    pool: Path
    target: Path
    test: Path
    target_skill: str


def _silent(line: str) -> None:
    """Report to nobody."""


def ensure_demo(
    root: Path, report: Callable[[str], None] = _silent, settings: DemoSettings | None = None
) -> Demo:
    """Return the demo under ``root``, making it first if it is not there (about a minute on two cores).

    The folder's name carries a digest of the package version and the settings, and it appears whole or not
    at all. Two processes may call this at once: one makes it, the other waits.

    Args:
        root: where demos are kept; made if missing.
        report: is given one line per stage of the work, and nothing when the demo exists.
        settings: for tests; the defaults are the demo.
    """
    settings = settings or DemoSettings()
    folder = root / f"demo-{_digest(settings)}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with _only_one(root / f".{folder.name}.lock", report):
            if not folder.is_dir():
                report(f"making the demo (corpus and small model) in {folder}")
                with atomic_folder(folder) as temporary:
                    _make(temporary, settings, report)
    return _paths(folder)


def find_demo(root: Path, settings: DemoSettings | None = None) -> Demo | None:
    """Return the demo under ``root``, or None where it was not made yet; nothing is written."""
    folder = root / f"demo-{_digest(settings or DemoSettings())}"
    return _paths(folder) if folder.is_dir() else None


def _paths(folder: Path) -> Demo:
    return Demo(
        folder=folder,
        model=folder / "model",
        pool=folder / "pool.jsonl",
        target=folder / "target.jsonl",
        test=folder / "test.jsonl",
        target_skill=TARGET_SKILL,
    )


def _digest(settings: DemoSettings) -> str:
    text = json.dumps([dataflex_pipeline.__version__, EDITION, asdict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@contextlib.contextmanager
def _only_one(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock that goes away with its process, saying so where another process holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("another process is making the demo; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path, settings: DemoSettings, report: Callable[[str], None]) -> None:
    corpus = make_corpus(settings.corpus)
    for name in ("pool", "target", "test"):
        write_rows(folder / f"{name}.jsonl", getattr(corpus, name))
    report(f"corpus: {len(corpus.pool)} pool, {len(corpus.target)} target, {len(corpus.test)} test rows")
    count = settings.model.steps * settings.model.batch_rows
    mix = pretraining_rows(settings.corpus, corpus, count)
    texts = (text for row in (*corpus.pool, *mix[:TOKENIZER_ROWS]) for text in (row.prompt, row.output))
    bpe = train_bpe(texts, settings.model.vocab_size)
    tokenizer = save_tokenizer(bpe, folder / "model", settings.model.max_length)
    with fixed_threads(settings.model.threads):
        model = new_model(
            settings.model, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        )
        last = pretrain(model, encode_rows(tokenizer, mix), settings.model, report)
        with _no_progress_bars():
            model.save_pretrained(folder / "model")
        measured = {"pretraining_loss": last, **_measure(model, tokenizer, corpus)}
    measured["parameters"] = sum(p.numel() for p in model.parameters())
    report(
        f"demo ready: {measured['parameters']:,} parameters, "
        f"{measured['test_exact_match']:.1%} of the test rows right before any fine-tuning"
    )
    write_json(folder / "demo.json", _record(settings, measured))
    write_text(folder / "README.md", _readme(settings, measured))


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar about one small file among our report lines."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def encode_rows(tokenizer: Any, rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
    """Tokenize rows as one user and one assistant turn; labels on the answer and its end token only.

    Returns:
        (input ids, labels) of each row, two lists of the same length.
    """
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row.prompt}], add_generation_prompt=True, tokenize=False
        )
        for row in rows
    ]
    before = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    after = tokenizer([row.output + EOS for row in rows], add_special_tokens=False)["input_ids"]
    return [(p + a, [IGNORED] * len(p) + a) for p, a in zip(before, after, strict=True)]


def _measure(model: Any, tokenizer: Any, corpus: Corpus) -> dict[str, float]:
    return {
        "test_exact_match": exact_match(model, tokenizer, corpus.test),
        "target_loss": mean_loss(model, encode_rows(tokenizer, corpus.target), tokenizer.pad_token_id),
    }


def _record(settings: DemoSettings, measured: dict[str, float]) -> dict[str, Any]:
    import tokenizers
    import torch
    import transformers

    return {
        "edition": EDITION,
        "target_skill": TARGET_SKILL,
        "settings": asdict(settings),
        "measured": measured,
        "versions": {
            "dataflex-pipeline": dataflex_pipeline.__version__,
            "python": platform.python_version(),
            "tokenizers": tokenizers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _readme(settings: DemoSettings, measured: dict[str, float]) -> str:
    corpus = settings.corpus
    return f"""# The demo of dataflex-pipeline

Made on this machine by the package; nothing in it was downloaded. Delete the folder and it is made again.

- `pool.jsonl`: {corpus.pool_rows} candidate rows (alpaca format) of a dozen skills, some already learnt by
  the model, some learnable in tens of steps, some hard, one impossible (random strings); with duplicates,
  near duplicates, noise and mislabelled rows. `skill` and `quality` say what each row is. They are the ground
  truth for judging a selection: no method reads them.
- `target.jsonl`: {corpus.target_rows} rows of the target skill `{TARGET_SKILL}` (translation into an invented
  language, of whose dictionary pre-training has shown about two thirds).
- `test.jsonl`: {corpus.test_rows} other rows of that skill, for exact match. Neither file's phrases occur in
  the pool's rows of the skill or in the pre-training mix.
- `model/`: a Llama, {measured["parameters"]:,} parameters, pre-trained for {settings.model.steps} steps, with
  a byte-level tokenizer and a chat template.
- `demo.json`: settings, versions and measured numbers.

Before any fine-tuning the model answers {measured["test_exact_match"]:.1%} of the test rows exactly right;
its mean loss on the target rows is {measured["target_loss"]:.3f} nats per token.
"""
