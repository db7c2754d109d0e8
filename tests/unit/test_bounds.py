"""The bounds that docs/operations.md promises are those of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataflex_pipeline import host_memory, start
from dataflex_pipeline.config import checks, keys, yaml_files
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.data.chat import trial
from dataflex_pipeline.data.sources import json_bounds
from dataflex_pipeline.models import adapter_values, source
from dataflex_pipeline.pipeline import drawing
from dataflex_pipeline.store import chosen_files

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
MIB, GIB = 1 << 20, 1 << 30


def lora_rank() -> int:
    (limit,) = (each.le for each in Config.model_fields["lora_rank"].metadata if hasattr(each, "le"))
    return int(limit)


BOUNDS = {
    "a row of JSON": (
        f"{json_bounds.DEEPEST} levels",
        f"{json_bounds.LONGEST_NUMBER:,} digits",
        f"{json_bounds.LARGEST_ROW // MIB} MiB of text",
    ),
    "a chat template of a model": (
        f"{trial.SECONDS} seconds on a processor and {trial.ROOM // GIB} GiB",
        f"{trial.LONGEST_TEXT:,} characters",
    ),
    "a model's config.json": (f"1 to {keys.LARGEST:,}", f"layers to {source.LAYERS:,}"),
    "an adapter's adapter_config.json": (
        f"1 to {lora_rank():,}",
        f"{adapter_values.SECONDS} seconds on a processor",
    ),
    "a file that you name (`--to`, `--output`)": (f"{chosen_files.LONGEST_NAME} bytes",),
    "a file of settings": (f"{yaml_files.LARGEST_FILE // MIB} MiB",),
    "rows of a random draw, and training positions": (
        f"{drawing.DRAWN_BYTES} bytes a row",
        f"{drawing.POSITION_BYTES} a position",
    ),
    "`lora_alpha`": (f"{checks.MOST_SCALING:,} times",),
    "addresses (`ulimit -v`)": (
        f"{start.LEAST // MIB} MiB and {start.PER_THREAD // MIB} for each thread",
        f"{host_memory.LIBRARIES / GIB} GiB",
    ),
    "whole numbers in settings": (f"{keys.LARGEST:,}", f"worker processes: {keys.MOST_WORKERS:,}"),
}
"""Row of the page -> what it has to say."""


@pytest.mark.parametrize("what", BOUNDS)
def test_the_page_says_the_bounds_of_the_code(what):
    (row,) = (
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {what} |")
    )
    for said in BOUNDS[what]:
        assert said in row


def test_a_million_values_is_said_in_words():
    assert yaml_files.MOST_VALUES == 1_000_000
    assert "a million values" in PAGE.read_text(encoding="utf-8")
