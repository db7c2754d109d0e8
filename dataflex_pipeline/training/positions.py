"""The training positions of the whole run as one data set that holds only this round's rows.

All rounds are one run to the trainer, so that optimizer, schedule and random streams carry over exactly.
Positions of earlier rounds are empty rows: the resuming batch sampler never asks for them, and the
collator refuses to make a batch with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataflex_pipeline.errors import CorruptError, DataError
from dataflex_pipeline.schemas import IGNORED
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.store.row_ids import ROW_IDS
from dataflex_pipeline.training.plan import RoundPlan

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

TOKENS = ("input_ids", "labels")


def training_positions(
    plan: RoundPlan, pool: PartedTable, vocabulary: int, *, by_length: bool = True
) -> Dataset:
    """Return the data set over positions 0 .. last_step x global_batch - 1 of the whole run.

    Args:
        plan: its index says which row and weight each position of this round has.
        pool: the prepared pool; only this round's rows are read.
        vocabulary: number of token ids that the model knows.
        by_length: put the rows of each optimizer step in order of length, so that those of a micro-batch are
            about as long as each other. The step's loss is a sum over its rows, whatever their order.

    Returns:
        Columns input_ids, labels (lists of int32) and weight (float32).

    Raises:
        CorruptError: the index names a row that the pool does not have or that is not valid.
        DataError: a token id is outside the model's vocabulary.
    """
    rows = plan.index.column("row").to_numpy()
    if len(rows) and (rows.min() < 0 or rows.max() >= pool.n_rows):
        raise _foreign_index(plan, f"row {int(rows.max())}, and the pool has {pool.n_rows} rows")
    table = pool.take(rows, [*TOKENS, "row_id", "valid"])
    if not pc.all(table.column("valid")).as_py():
        bad = rows[~table.column("valid").to_numpy()][0]
        raise _foreign_index(plan, f"row {int(bad)}, which is not valid in the pool")
    if not table.column("row_id").equals(plan.index.column("row_id")):
        raise _foreign_index(plan, "rows whose row_id is another one in the pool")
    check_vocabulary(table, vocabulary, "pool")
    weights = plan.index.column("weight").combine_chunks().cast(pa.float32())
    here = table.select(list(TOKENS)).cast(_tokens_schema()).append_column("weight", weights)
    if by_length:
        lengths = pc.list_value_length(here.column("input_ids")).to_numpy()
        here = here.take(longest_first(lengths, plan.global_batch)).combine_chunks()
    return _as_dataset(pa.concat_tables([_empty_rows(plan.first_step * plan.global_batch), here]))


def longest_first(lengths: np.ndarray, global_batch: int) -> np.ndarray:
    """Return the order in which the rows of each step go by falling length, ties as they were. [rows]

    The longest come first: a step whose memory does not suffice fails at its beginning.

    Args:
        lengths: of the rows in the order of the index, in tokens. [rows]
        global_batch: rows per step.
    """
    step = np.arange(len(lengths)) // global_batch
    order: np.ndarray = np.lexsort((-lengths.astype(np.int64), step))
    return order


def target_positions(target: PartedTable, vocabulary: int) -> Dataset:
    """Return the valid rows of the target, in row order, each of weight 1.

    Raises:
        DataError: no row is valid, or a token id is outside the model's vocabulary.
    """
    batches = [
        batch.filter(batch.column("valid")).select(list(TOKENS))
        for batch in target.blocks([*TOKENS, "valid"])
    ]
    table = pa.Table.from_batches(batches).cast(_tokens_schema())
    if not table.num_rows:
        raise DataError(
            "The target set has no valid row.",
            "Without one there is nothing to evaluate on.",
            "Set eval_strategy: no, or give an eval_dataset with rows that fit cutoff_len.",
        )
    check_vocabulary(table, vocabulary, "target")
    ones = pa.array(np.ones(table.num_rows, np.float32))
    return _as_dataset(table.append_column("weight", ones))


def check_vocabulary(table: pa.Table, vocabulary: int, what: str) -> None:
    """Raise DataError when a token id is outside [0, vocabulary)."""
    extremes = pc.min_max(pc.list_flatten(table.column("input_ids"))).as_py()
    if extremes["min"] is not None and not 0 <= extremes["min"] <= extremes["max"] < vocabulary:
        raise DataError(
            f"The {what} has token ids from {extremes['min']} to {extremes['max']}.",
            f"The model knows {vocabulary} token ids, so these come from another tokenizer.",
            "Check that the model's folder holds the tokenizer that belongs to its weights.",
        )


def _tokens_schema() -> pa.Schema:
    return pa.schema([(name, pa.list_(pa.int32())) for name in TOKENS])


def _empty_rows(count: int) -> pa.Table:
    empty = pa.ListArray.from_arrays(np.zeros(count + 1, np.int32), pa.array([], pa.int32()))
    weights = pa.array(np.zeros(count, np.float32))
    return pa.table({"input_ids": empty, "labels": empty, "weight": weights})


def _as_dataset(table: pa.Table) -> Dataset:
    from datasets import Dataset
    from datasets.table import InMemoryTable

    # A given fingerprint keeps the library from hashing the whole table for its own cache.
    return Dataset(InMemoryTable(table), fingerprint="training-positions")


def _foreign_index(plan: RoundPlan, found: str) -> CorruptError:
    return CorruptError(
        f"The index of round {plan.round} names {found}.",
        "An index belongs to the pool that it was selected from.",
        f"Delete the round's selection.parquet, its index.parquet, and {ROW_IDS} in the pool's folder; they "
        "are made again: select the round, then train it.",
    )


class PaddingCollator:
    """Makes a batch: rows padded on the right to the longest, with their weights.

    As in scoring (models/batches.py), a row is filled up with its own last token; attention mask 0 and label
    -100 leave that out of everything.
    """

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, labels [B, T] and weight [B].

        Raises:
            RuntimeError: a position of an earlier round was asked for; the trainer's order is broken.
        """
        import torch

        if any(not example["input_ids"] for example in examples):
            raise RuntimeError("a training position outside of this round was loaded")
        length = max(len(example["input_ids"]) for example in examples)
        labels = torch.full((len(examples), length), IGNORED, dtype=torch.long)
        mask = torch.zeros((len(examples), length), dtype=torch.long)
        last = [example["input_ids"][-1] for example in examples]
        ids = torch.tensor(last, dtype=torch.long)[:, None].repeat(1, length)  # [B, T]
        for line, example in enumerate(examples):
            n = len(example["input_ids"])
            ids[line, :n] = torch.tensor(example["input_ids"], dtype=torch.long)
            labels[line, :n] = torch.tensor(example["labels"], dtype=torch.long)
            mask[line, :n] = 1
        weight = torch.tensor([example["weight"] for example in examples], dtype=torch.float32)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "weight": weight}
