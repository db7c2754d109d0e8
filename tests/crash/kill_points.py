"""What is put around a command in a forked child: it dies at a chosen durable write, and books its work.

A durable write is a rename: of `store.atomic` (tables, manifests, markers, checkpoints, what is set
aside) or of a path. Two things are booked in an append-only file, one line each: that a Parquet file or
a training step was begun (`table`, `step`), and that a rename happened (`visible`).
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kill:
    """Die by SIGKILL just before or just after the child's n-th durable write, counted from 1."""

    when: str
    write: int


class Book:
    """An append-only file of what was begun and what became visible; it survives the child."""

    def __init__(self, path: Path, root: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.root = root

    def add(self, event: str, path: str | os.PathLike[str]) -> None:
        where = Path(path).absolute()
        name = where.relative_to(self.root) if where.is_relative_to(self.root) else where
        os.write(self.descriptor, f"{event}\t{name}\n".encode())


def read_book(path: Path) -> list[tuple[str, str]]:
    """Return the (event, name) pairs of a book."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(event, name) for event, _, name in (line.partition("\t") for line in lines)]


class Renames:
    """Stands in for the module `os` in `store.atomic`; all but `replace` is the real one."""

    def __init__(self, book: Book, kill: Kill | None, hold: str | None) -> None:
        self.book = book
        self.kill = kill
        self.hold = hold
        self.count = 0

    def __getattr__(self, name: str):
        return getattr(os, name)

    def replace(self, source, target) -> None:
        self.around(os.replace, source, target)

    def around(self, rename, source, target):
        self.count += 1
        self._die("before")
        result = rename(source, target)
        self.book.add("visible", target)
        self._die("after")
        while self.hold is not None and not Path(self.hold).exists():
            time.sleep(0.01)
        return result

    def _die(self, when: str) -> None:
        if self.kill == Kill(when, self.count):
            os.kill(os.getpid(), signal.SIGKILL)


def install(book: Book, kill: Kill | None, hold: str | None) -> None:
    """Put the books and the kill around this process' renames, Parquet writers and training steps."""
    import pyarrow.parquet as pq

    from dataflex_pipeline.store import atomic
    from dataflex_pipeline.training.trainer import WeightedTrainer

    renames = Renames(book, kill, hold)
    atomic.os = renames
    path_rename = Path.rename

    def rename(self, target):
        if Path(target).parent.name.endswith(atomic.TEMPORARY):
            return path_rename(self, target)  # nothing becomes visible inside a temporary folder
        return renames.around(path_rename, self, target)

    Path.rename = rename

    class Writer(pq.ParquetWriter):
        def __init__(self, where, *arguments, **options):
            book.add("table", str(where).removesuffix(atomic.TEMPORARY))
            super().__init__(where, *arguments, **options)

    # write_table finds the class in the module that defines it
    pq.core.ParquetWriter = pq.ParquetWriter = Writer
    one_step = WeightedTrainer.training_step

    def training_step(self, *arguments, **options):
        book.add("step", Path(self.args.output_dir) / f"checkpoint-{self.state.global_step + 1}")
        return one_step(self, *arguments, **options)

    WeightedTrainer.training_step = training_step
