"""`dataflex export`: model, adapter, selected rows and a card, for use elsewhere."""

from __future__ import annotations

import shlex

from dataflex_pipeline.export.bundle import Bundle
from dataflex_pipeline.export.subset import STEM
from dataflex_pipeline.pipeline.export import Asked
from dataflex_pipeline.pipeline.export import export as export_run
from dataflex_pipeline.pipeline.locate import Options

from .opening import open_run
from .summary import report


def export(options: Options, asked: Asked) -> None:
    """Export a run, or merge an adapter as a configuration with ``adapter_name_or_path`` says."""
    run = open_run(options)
    done = export_run(run, asked)
    of_run = done.bundle.origin.run
    report(done.bundle.folder if of_run is None else of_run.folder, done.outcomes, _next(done.bundle))


def _next(bundle: Bundle) -> list[str]:
    folder = bundle.folder
    lines = []
    if "model" in bundle.parts:
        lines.append(f"use it:  AutoModelForCausalLM.from_pretrained('{folder}')")
    if "data" in bundle.parts:
        stems = sorted(path.stem for path in (folder / "data").glob(f"{STEM}*.jsonl"))
        named = [f"dataset={','.join(stems)}", f"dataset_dir={folder / 'data'}"]
        alone = str(folder / "data" / f"{STEM}.jsonl")
        lines.append(f"train on the same rows elsewhere:  {alone if stems == [STEM] else shlex.join(named)}")
    return lines
