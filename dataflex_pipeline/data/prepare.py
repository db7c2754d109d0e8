"""The second pass over the sources: rows are tokenised, in several processes if asked, and written.

A part holds a fixed number of rows and is made of chunks of a fixed number of rows, so that neither
the number of processes nor an interruption changes a single byte of it.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataflex_pipeline.api import Progress, Split
from dataflex_pipeline.data.chat.labelled import ChatFormat
from dataflex_pipeline.data.chat.templates import named_template
from dataflex_pipeline.data.limits import TokenLimits
from dataflex_pipeline.data.rows import RowMaker, Tally, prepared_schema, reasons_text
from dataflex_pipeline.data.scan import Scan, describe
from dataflex_pipeline.data.settings import DataSettings, PlacedRow
from dataflex_pipeline.errors import DataError, DataflexError
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import PartedTable, PartsWriter

PART_ROWS = 4096
CHUNK_ROWS = 512
MIN_ROWS_PER_WORKER = 8192
"""A process takes seconds to start; fewer rows than this are tokenised sooner without it."""
PREPARE_VERSION = 3
"""Raised whenever the same settings would make other rows."""

Chunk = tuple[int, list[PlacedRow]]
"""Row number of the first row, and the rows."""


def ingredients(settings: DataSettings, scan: Scan, tokenizer_digest: str, split: Split) -> dict[str, Any]:
    """Return all that decides the prepared rows, as plain values for the fingerprint.

    Where files lie and how many processes tokenise is not part of it; what is in them is.

    Args:
        settings, scan: what is prepared.
        tokenizer_digest: of the tokenizer's files, its own chat template included.
        split: pool or target.

    Raises:
        ConfigError: the template is not known.
    """
    template = settings.template
    text = None if template is None else digest({"text": named_template(template).text})
    made: dict[str, Any] = {
        "kind": "prepared",
        "version": PREPARE_VERSION,
        "split": split,
        "sources": describe(scan),
        "originals": [[each.name, each.kind] for each in scan.columns],
        "template": template,
        "template_text": text,
        "cutoff_len": settings.cutoff_len,
        "mask_history": settings.mask_history,
        "default_system": settings.default_system,
        "tokenizer": tokenizer_digest,
    }
    return made | ({"group_column": settings.group_column} if split == "target" else {})


def prepare(
    settings: DataSettings,
    scan: Scan,
    tokenizer_folder: str,
    tokenizer_digest: str,
    folder: Path,
    split: Split,
    progress: Progress,
    trust_remote_code: bool = False,
    limits: TokenLimits | None = None,
) -> PartedTable:
    """Read the sources again, tokenise them and write the prepared table; finished parts are kept.

    Args:
        settings: what is prepared and how. scan: its first pass.
        tokenizer_folder: folder or hub name of the tokenizer. tokenizer_digest: its content.
        folder: where the table goes. split: pool or target. progress: where to report.
        trust_remote_code: whether a tokenizer may bring code of its own.
        limits: what the model takes; nothing is checked without.

    Returns:
        The complete table; its summary has the counts by validity, reason, note and source.

    Raises:
        ConfigError: no tokenizer, no template, or an unknown one; nothing is written then.
        DataError: no row can be used, or the model has not its positions or tokens (the unfinished table is
            removed), or a source changed meanwhile.
        CorruptError: a part on disk is truncated or foreign.
    """
    chat = ChatFormat.load(tokenizer_folder, settings.template, trust_remote_code)
    for line in scan.notices:
        progress.say(line)
    chat.announce(progress)
    made_from = ingredients(settings, scan, tokenizer_digest, split)
    writer = PartsWriter(folder, prepared_schema(scan, split), made_from)
    tally = Tally()
    for number in sorted(writer.done):
        tally.add(writer.read(number, Tally.COLUMNS), settings.cutoff_len)
    limits = limits or TokenLimits()
    _check_limits(limits, tally, split, chat, folder)
    progress.start(f"preparing {split}", scan.n_rows, "rows", sum(tally.rows.values()))
    with ExitStack() as stack:
        tables = _tables(stack, RowMaker(settings, scan, chat, split), writer.done, progress)
        for number, table in _parts(tables, progress):
            writer.write(number, table)
            tally.add(table, settings.cutoff_len)
            _check_limits(limits, tally, split, chat, folder)
    progress.finish()
    if tally.n_valid == 0:
        shutil.rmtree(folder)
        raise _nothing_valid(settings, tally)
    _tell(progress, split, settings, tally)
    too_long = limits.notices(tally.summary(), split)
    for line in too_long:
        progress.say(line)
    notices = [*scan.notices, *chat.notices(), *too_long]
    summary = tally.summary() | {"template": settings.template, "passed_over": scan.passed_over}
    return writer.finish(part_count(scan), summary | {"notices": notices})


def _check_limits(limits: TokenLimits, tally: Tally, split: Split, chat: ChatFormat, folder: Path) -> None:
    """Check what was prepared so far; the unfinished table is removed where the model cannot take it."""
    try:
        limits.check(tally.summary(), split, chat.token_text)
    except DataError:
        shutil.rmtree(folder)
        raise


def part_count(scan: Scan) -> int:
    """Return how many parts the prepared table has."""
    return -(-scan.n_rows // PART_ROWS)


def _nothing_valid(settings: DataSettings, tally: Tally) -> DataError:
    return DataError(
        f"None of the {sum(tally.rows.values())} rows of {', '.join(settings.datasets)} can be used.",
        f"Reasons: {reasons_text(tally.reasons, tally.first)}.",
        "Correct the data or the settings that the reasons name (columns, tags, template, cutoff_len).",
    )


def _tell(progress: Progress, split: Split, settings: DataSettings, tally: Tally) -> None:
    counts = tally.summary()
    line = f"{split}: {counts['valid']} of {counts['rows']} rows valid, {counts['tokens']} tokens"
    if counts["invalid"]:
        line += f"; not valid: {reasons_text(tally.reasons, tally.first)}"
    if counts["at_cutoff"]:
        line += f"; {counts['at_cutoff']} rows reach cutoff_len {settings.cutoff_len}"
    progress.say(line)
    for note, count in counts["notes"].items():
        progress.say(f"{split}: {count} rows: {note}")


def _parts(tables: Iterator[pa.Table], progress: Progress) -> Iterator[tuple[int, pa.Table]]:
    """Put chunks together to (part number, part); every chunk but a part's last has CHUNK_ROWS rows."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        progress.advance(table.num_rows)
        number = waiting[0]["row"][0].as_py() // PART_ROWS
        if sum(each.num_rows for each in waiting) == PART_ROWS:
            yield number, pa.concat_tables(waiting).combine_chunks()
            waiting = []
    if waiting:
        yield waiting[0]["row"][0].as_py() // PART_ROWS, pa.concat_tables(waiting).combine_chunks()


def _chunks(scan: Scan, done: frozenset[int]) -> Iterator[Chunk]:
    """Yield the raw rows of the parts that are not done, in chunks that never cross a part."""
    chunk: list[PlacedRow] = []
    for number, item in enumerate(scan.placed_rows()):
        if number // PART_ROWS in done:
            continue
        chunk.append(item)
        if (number + 1) % CHUNK_ROWS == 0:
            yield number + 1 - len(chunk), chunk
            chunk = []
    if chunk:
        yield scan.n_rows - len(chunk), chunk


def _tables(
    stack: ExitStack, maker: RowMaker, done: frozenset[int], progress: Progress
) -> Iterator[pa.Table]:
    """Yield the prepared chunks in order, made here or in a pool of processes that ends with the stack."""
    if len(done) == part_count(maker.scan):
        return iter(())
    chunks = _chunks(maker.scan, done)
    asked = maker.settings.workers
    n_workers = worker_count(asked, maker.scan.n_rows)
    if n_workers != asked:
        progress.say(
            f"tokenising in {n_workers} of the {asked} processes asked for: more would take longer for "
            f"{maker.scan.n_rows} rows on {available_cores()} cores"
        )
    if n_workers == 1:
        return (maker.table(start, rows) for start, rows in chunks)
    # spawn: a forked copy of the tokenizer's threads, or of an accelerator's, would hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n_workers, context, initializer=_start_worker, initargs=(maker,))
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    return _in_order(pool, chunks, 2 * n_workers)


def worker_count(asked: int, n_rows: int) -> int:
    """Return how many processes are worth starting: never more than asked, or than there are cores."""
    return max(1, min(asked, available_cores(), n_rows // MIN_ROWS_PER_WORKER))


def available_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator[Chunk], in_flight: int) -> Iterator[pa.Table]:
    futures: deque[Future[pa.Table]] = deque()
    try:
        for chunk in chunks:
            futures.append(pool.submit(_work, chunk))
            if len(futures) >= in_flight:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    except BrokenProcessPool as error:
        raise DataflexError(
            "A tokenising process died.",
            "Something ended it from outside, most often the system running out of memory.",
            "Set preprocessing_num_workers=1 (or fewer) and run the same command; finished parts are kept.",
        ) from error


_MAKER: list[RowMaker] = []
"""The row maker of a worker process; empty elsewhere."""


def _start_worker(maker: RowMaker) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    _MAKER.append(maker)


def _work(chunk: Chunk) -> pa.Table:
    start, rows = chunk
    return _MAKER[0].table(start, rows)
