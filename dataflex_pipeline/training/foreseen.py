"""A round's training steps as the memory will make them, before there is a round: nothing is trained.

The trainer is made and its memory settled by the code that a round trains with (first_step.py), on the
longest of some rows, in a folder that is thrown away.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dataflex_pipeline.schemas import INDEX
from dataflex_pipeline.store.parts import PartsWriter
from dataflex_pipeline.training.plan import RoundPlan
from dataflex_pipeline.training.rounds import settled_step

if TYPE_CHECKING:
    from dataflex_pipeline.config.fields import Config
    from dataflex_pipeline.training.first_step import Settled

ASIDE: dict[str, Any] = {
    "load_best_model_at_end": False,
    "early_stopping_steps": None,
    "save_steps": None,
    "keep_checkpoints": False,
    "deepspeed": None,
    "report_to": "none",
    "use_swanlab": False,
    "swanlab_lark_webhook_url": None,
    "swanlab_lark_secret": None,
}
"""Settings of a run that trainings which are thrown away leave out: they keep nothing and tell nobody."""


def foreseen_step(config: Config, rows: pa.Table, global_batch: int) -> Settled | None:
    """Return what the memory that is free now makes of training steps with the longest of some rows.

    Args:
        config: of the run, with real paths. rows: prepared; the longest valid one counts.
        global_batch: rows per optimizer step.

    Returns:
        None for a training by DeepSpeed, which is as it is set.

    Raises:
        UserError: a step of that row alone will not fit, or the model cannot be trained.
    """
    if config.deepspeed is not None:
        return None
    valid = rows.filter(rows.column("valid"))
    longest = int(np.argmax(valid.column("n_tokens").to_numpy()))
    with tempfile.TemporaryDirectory(prefix="dataflex-foreseen-") as folder:
        row = valid.slice(longest, 1).combine_chunks()
        writer = PartsWriter(Path(folder) / "pool", row.schema, {"kind": "foreseen"})
        writer.write(0, row)
        pool = writer.finish(1, {})
        plan = _plan(Path(folder) / "run" / "round-00", config, row, global_batch)
        quiet = config.model_copy(update=ASIDE | {"eval_strategy": "no"})
        return settled_step(quiet, plan, pool, None)


def _plan(folder: Path, config: Config, row: pa.Table, global_batch: int) -> RoundPlan:
    """Return a plan of one step, of a row over and over."""
    ones = np.ones(global_batch)
    columns = {
        "position": np.arange(global_batch),
        "row": np.zeros(global_batch, np.int64),
        "row_id": row.column("row_id").to_pylist() * global_batch,
        "weight": ones.astype(np.float32),
        "probability": ones,
        "score": pa.nulls(global_batch, pa.float64()),
    }
    return RoundPlan(
        round=0,
        first_step=0,
        last_step=1,
        horizon=max(1, config.horizon),
        global_batch=global_batch,
        index=pa.table(columns, schema=INDEX),
        previous=None,
        work=folder / "work",
        checkpoint=folder / "checkpoint",
        ingredients={"output": "foreseen"},
    )
