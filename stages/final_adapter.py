"""The trained adapter at the top of ``output_dir``, where users of other trainers look for it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from dataflex_pipeline.models.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dataflex_pipeline.store.atomic import atomic_file
from dataflex_pipeline.store.stale import is_complete
from dataflex_pipeline.training import read_marker

from . import console
from .context import Context
from .outcome import Outcome

BEST = "best"


def publish_adapter(context: Context) -> list[Outcome]:
    """Copy the newest adapter to the top of ``output_dir``; nothing is done where that is not set.

    With ``load_best_model_at_end`` it is the best one so far, as other trainers have it. Each file appears
    whole or not at all, and is left alone where it is the same already. After every round, so that a run
    that is ended early has its adapter there too. All weights of a full fine-tuning are not copied: they
    would be there twice.

    Returns:
        What was done, for the summary: empty without output_dir or before the first round is finished.
    """
    if context.given.output_dir is None:
        return []
    source = newest(context)
    if source is None:
        return []
    if context.given.finetuning_type == "full":
        console.line(f"The weights are in {source}; they are not copied to the top of {context.run.folder}.")
        return []
    began = time.monotonic()
    state, what = published_state(context)
    if state == "damaged":
        context.progress.say(f"  adapter: {what}; it is copied again")
    names = [ADAPTER_WEIGHTS, *_beside_the_weights(source)]  # the configuration last: it makes the adapter
    copied = [name for name in names if _copied(context, source / name)]
    found = f"the adapter of {console.shown(source, context.run.folder)}"
    return [
        Outcome(
            "adapter", context.run.folder / ADAPTER_WEIGHTS, bool(copied), time.monotonic() - began, found
        )
    ]


def published_state(context: Context) -> tuple[str, str]:
    """Return state and description of the copy at the top of the run."""
    source, final = newest(context), context.run.folder / ADAPTER_WEIGHTS
    if source is None or not (source / ADAPTER_WEIGHTS).is_file():
        return "unknown", "there is no checkpoint that it is a copy of"
    if not final.is_file() or not (context.run.folder / ADAPTER_CONFIG).is_file():
        return "missing", f"a copy of {console.shown(source, context.run.folder)}"
    found = context.memo.digest(final)
    if found == context.memo.digest(source / ADAPTER_WEIGHTS):
        return "done", f"a copy of {console.shown(source, context.run.folder)}"
    others = [context.run.folder / BEST] if context.given.load_best_model_at_end else []
    others += [context.run.round(number).checkpoint for number in range(context.given.update_times + 1)]
    weights = [folder / ADAPTER_WEIGHTS for folder in others]
    if found in [context.memo.digest(path) for path in weights if path.is_file()]:
        return "unfinished", "a copy of an earlier checkpoint; the same command goes on with it"
    return "damaged", f"{final} is not what was written there"


def newest(context: Context) -> Path | None:
    """Return the folder whose weights count: best/ where that is kept, else the last finished round's."""
    best = context.run.folder / BEST
    if context.given.load_best_model_at_end and (best / ADAPTER_CONFIG).is_file():
        return best
    for number in range(context.given.update_times, -1, -1):
        checkpoint = context.run.round(number).checkpoint
        if is_complete(checkpoint):
            return checkpoint
    return None


def _beside_the_weights(source: Path) -> list[str]:
    """Return the tokenizer's files and the adapter's configuration, as the checkpoint's marker lists them."""
    marker = read_marker(source)
    listed = sorted(marker.files) if marker is not None else sorted(path.name for path in source.iterdir())
    tokenizer = [
        name for name in listed if name.startswith(("tokenizer", "chat_template", "special_tokens", "vocab"))
    ]
    return [
        *tokenizer,
        *(name for name in listed if name in ("merges.txt", "added_tokens.json")),
        ADAPTER_CONFIG,
    ]


def _copied(context: Context, source: Path) -> bool:
    """Copy one file to the top of the run folder, unless the same bytes are there."""
    final = context.run.folder / source.name
    if final.is_file() and context.memo.digest(final) == context.memo.digest(source):
        return False
    with atomic_file(final) as temporary:
        shutil.copyfile(source, temporary)
    context.memo.digest(final), context.memo.digest(source)  # so that the next command need not read them
    return True
