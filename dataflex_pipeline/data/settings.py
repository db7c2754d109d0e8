"""Settings that decide the rows of a prepared data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

Row = dict[str, object]
"""One row of a source: column name -> plain value (text, number, bool, None, list, mapping)."""
NumberedRow = tuple[int, Row]
"""Where a row stands in its file, from 1, and the row: the line of text, else the element or row."""


class PlacedRow(NamedTuple):
    """A row and where it stands.

    Attributes:
        source: number of its data set.
        row: the row.
        file: name of its file within the data set; None for one of the hub.
        line: its place there, from 1: the line that an editor shows, of a JSON array the element, of
            Parquet, Arrow and the hub the row.
    """

    source: int
    row: Row
    file: str | None
    line: int | None


@dataclass(frozen=True)
class DataSettings:
    """Settings of a pool or a target; everything but ``workers`` is part of the fingerprint.

    Attributes:
        datasets: names or paths as the user gave them, in order.
        dataset_dir: folder that holds ``dataset_info.json`` and files named without their folder.
        template: name of a chat template; None for the tokenizer's own.
        cutoff_len: longest row, in tokens; the end of longer rows is cut off.
        max_samples: only the first so many rows of each data set; None for all.
        mask_history: labels on the last assistant turn only.
        columns: role of columns, like the ``columns`` of an entry of ``dataset_info.json``.
        tags: keys and role names of conversations, like its ``tags``.
        default_system: system prompt of rows that have none; None for what the template says.
        group_column: column of a target that names the group; None for the source's name.
        seed: the run's, for data sets of which rows are drawn at random (``num_samples``).
        workers: processes that tokenise.
    """

    datasets: tuple[str, ...]
    dataset_dir: str
    template: str | None
    cutoff_len: int
    max_samples: int | None
    mask_history: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    default_system: str | None = None
    group_column: str | None = None
    seed: int = 0
    workers: int = 1
