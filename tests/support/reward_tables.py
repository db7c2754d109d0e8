"""Target rows with ready-made answers, and the rewards feature run over them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from dataflex_pipeline.api import FeatureInput, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.features.rewards import Rewards
from dataflex_pipeline.schemas import GROUP, PREPARED, REASON, ROW, ROW_ID, VALID
from dataflex_pipeline.store.parts import PartedTable, PartsWriter

GENERATED = pa.schema(
    [ROW, ROW_ID, pa.field("sample", pa.int32()), pa.field("completion", pa.string()), VALID, REASON]
)
SAMPLES = 2


class Listener(Silent):
    def __init__(self):
        self.lines: list[str] = []

    def say(self, line):
        self.lines.append(line)


def make_target(folder: Path, prompts: list[str], references: list[str]) -> PartedTable:
    schema = PREPARED.append(GROUP)
    rows = [
        {
            "row": number,
            "row_id": f"{number:08x}",
            "source": "test",
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": reference},
            ],
            "input_ids": [1, 2],
            "labels": [-100, 2],
            "n_tokens": 2,
            "n_response_tokens": 1,
            "valid": True,
            "reason": None,
            "note": None,
            "group": "g",
        }
        for number, (prompt, reference) in enumerate(zip(prompts, references, strict=True))
    ]
    writer = PartsWriter(folder, schema, {"kind": "target", "prompts": prompts, "references": references})
    writer.write(0, pa.Table.from_pylist(rows, schema))
    return writer.finish(1, {})


def make_generations(folder: Path, completions: list[str | None]) -> PartedTable:
    """``SAMPLES`` completions per row; None: nothing was generated."""
    rows = [
        {
            "row": line // SAMPLES,
            "row_id": f"{line // SAMPLES:08x}",
            "sample": line % SAMPLES,
            "completion": text,
            "valid": text is not None,
            "reason": None if text is not None else "the prompt is empty",
        }
        for line, text in enumerate(completions)
    ]
    writer = PartsWriter(folder, GENERATED, {"kind": "generations", "completions": completions})
    writer.write(0, pa.Table.from_pylist(rows, GENERATED))
    return writer.finish(1, {})


def make_inputs(folder: Path, completions: list[str | None], references: list[str] | None = None):
    n_rows = len(completions) // SAMPLES
    prompts = [f"prompt {number}" for number in range(n_rows)]
    target = make_target(folder / "target", prompts, references or ["the reference"] * n_rows)
    return target, make_generations(folder / "generations", completions)


def make_feature(backend: str, settings: dict, config: Config | None = None, **params) -> Rewards:
    given = {"reward_model_backend": backend, "reward_backend_params": {backend: settings}}
    return Rewards(Rewards.Params(**given, **params), config or Config(model_name_or_path="none"))


def run(
    folder: Path,
    feature: Rewards,
    target: PartedTable,
    generations: PartedTable,
    listener=None,
    rows_per_part: int = 1000,
) -> pa.Table:
    """Compute the missing parts as `build_feature` does, and return the whole table."""
    writer = PartsWriter(folder, feature.schema, {"ingredients": feature.ingredients()})
    n_parts = -(-target.n_rows // rows_per_part)
    given = FeatureInput(target, "t", None, None, tables={"generations": generations}, folder=folder)
    with feature.open(given, listener or Silent()) as compute:
        for number in range(n_parts):
            if number not in writer.done:
                rows = target.rows(
                    number * rows_per_part, (number + 1) * rows_per_part, list(feature.input_columns)
                )
                writer.write(number, compute(rows))
    return pa.concat_tables([writer.read(number, feature.schema.names) for number in range(n_parts)])
