"""Next steps after an export, in words: using the model, training on the rows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataflex_pipeline.pipeline.run import Run


def next_steps(run: Run, trainer: str) -> list[str]:
    """Return what can be done with what the last call of a run exported.

    Args:
        run: with its outcomes. trainer: the form of the rows.
    """
    made = [outcome.output for outcome in run.outcomes if outcome.stage == "export"]
    [folder, *_] = made
    if folder.is_file():
        return _rows(made, trainer)
    lines = []
    if (folder / "config.json").is_file():
        lines.append(f"use it:  AutoModelForCausalLM.from_pretrained('{folder}')")
    files = sorted((folder / "data").glob("*.jsonl"))
    return lines + (_rows(files, trainer, folder / "data") if files else [])


def _rows(files: Sequence[Path], trainer: str, folder: Path | None = None) -> list[str]:
    """Return how rows are trained on, here or with the trainer that they were written for."""
    first = shlex.quote(str(files[0]))
    stems = ",".join(path.stem for path in files)
    if trainer == "llama-factory":
        return [f"train on them with LLaMA-Factory:  dataset: {stems}  dataset_dir: {files[0].parent}"]
    if trainer == "ms-swift":
        return [f"train on them with ms-swift:  swift sft --dataset {first}"]
    if trainer == "axolotl":
        return [f"train on them with axolotl:  datasets: path: {files[0]}  type: chat_template"]
    if trainer in ("messages", "trl"):
        return [f"train on them with TRL:  load_dataset('json', data_files='{files[0]}')"]
    alone = first if len(files) == 1 else shlex.quote(str(folder) if folder else ",".join(map(str, files)))
    return [f"train on the same rows elsewhere:  dataset={alone}"]
