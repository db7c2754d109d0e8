"""Small tokenizers and writers that the tests of the data layer share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SPECIAL = ("<s>", "</s>", "<pad>")


def byte_tokenizer(
    folder: Path, chat_template: str | None = None, extra: Iterable[str] = (), bos: str | None = "<s>"
):
    """A tokenizer with one token per byte, plus special tokens; saved into the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, *extra])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", pad_token="<pad>"
    )
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


class Lines:
    """A Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.started: list[tuple[Any, ...]] = []
        self.advanced = 0

    def start(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self.started.append((what, total, unit, done))

    def advance(self, n: int) -> None:
        self.advanced += n

    def finish(self) -> None:
        pass

    def say(self, line: str) -> None:
        self.said.append(line)


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def alpaca_rows(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"question {n}", "input": "", "output": f"answer {n}"} for n in range(count)]
