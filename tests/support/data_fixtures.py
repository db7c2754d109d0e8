"""Small tokenizers and writers that the tests of the data layer share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dataflex_pipeline.data import DataSettings, prepare, scan_sources

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


CHATML = ("<|im_start|>", "<|im_end|>")


def rows_of(folder: Path, data, template: str | None = "chatml", **more):
    """Prepare rows (a template's name, or its text) and return the table, its rows and what was said."""
    folder.mkdir(exist_ok=True)
    own = template is not None and "{" in template
    byte_tokenizer(folder / "tokenizer", template if own else None, extra=CHATML)
    name = "pool.parquet" if isinstance(data, pa.Table) else "pool.jsonl"
    if isinstance(data, pa.Table):
        pq.write_table(data, folder / name)
    else:
        write_jsonl(folder / name, data)
    wanted = DataSettings((name,), str(folder), None if own else template, 4096, None)
    wanted = replace(wanted, **{key: value for key, value in more.items() if key != "limits"})
    said = Lines()
    limits = {"limits": more["limits"]} if "limits" in more else {}
    table = prepare(
        wanted, scan_sources(wanted), str(folder / "tokenizer"), "d", folder / "out", "pool", said, **limits
    )
    rows = pa.Table.from_batches(table.blocks(), table.schema).to_pylist()
    return table, rows, said.said


def stretches(row, folder: Path) -> list[tuple[str, bool]]:
    """The text of a row, cut where labels begin and end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    return [
        (tokenizer.decode([token for token, _ in stretch], clean_up_tokenization_spaces=False), learnt)
        for learnt, stretch in groupby(pairs, key=lambda pair: pair[1] != -100)
    ]


def learnt(row, folder: Path) -> list[str]:
    return [text for text, carries in stretches(row, folder) if carries]


def chat(*turns, **beside):
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return {
        "messages": [{"role": names[who], "content": text, **more} for who, text, more in turns],
        **beside,
    }


def two_answers(mark: dict) -> dict:
    return chat(
        ("u", "Capital of Peru?", {}), ("a", "Quito.", mark), ("u", "Sure?", {}), ("a", "Sorry: Lima.", {})
    )


PLAIN = two_answers({})
