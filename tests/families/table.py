"""The command that tries every family and writes docs/families.md: ``python -m families.table``.

A family that fails in another way than by a refusal is named at the end, with its traceback, and the page
marks its line as wrong; the exit status is then 1.

    PYTHONPATH=tests python -m families.table [--only TITLE ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, fields
from pathlib import Path

from families.models import ALL, KINDS
from families.settings import Family

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "families.md"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
NAMES = {"lora": "LoRA", "full": "full"}
INTRODUCTION = """\
# Families of models

transformers has some hundreds of architectures, and each has something of its own: soft-capped logits, fused
experts, recurrent layers, tied or embedded heads. What this package computes is tried on tiny random models
of the families below, once with LoRA and once with all weights trained, against plain loops over single rows
that use nothing of it: transformers' own logits, autograd, and torch.optim.AdamW.

A number is an error in 32-bit floats on a CPU, so all of them should be rounding:

- **Losses**: the largest difference of a row's loss, in nats per token.
- **Logs**: the largest difference of a step's or an evaluation's loss in the training log, in nats.
- **LESS**: the largest difference of a score, and of the length of an Adam update, relative to the largest.
- **Training**: the length of (update - the loop's update) over that of the loop's update, for a round of
  weighted training in micro-batches of padded rows.
- **Second round**: the same of the round after it, which goes on from the first one's checkpoint: weights,
  Adam's states, schedule.

Where a line says *refused*, the command stops before anything is trained or scored, with these words.
A mixture of experts is tried without its load-balancing loss (`router_aux_loss_coef: 0`), and, where the
line says so, with it. A family that is not in the table has not been tried.
"""


def main() -> int:
    """Try the families, write the page, and return the exit status."""
    from dataflex_pipeline.models.base import no_bars

    options = _options()
    families = [family for family in ALL if not options.only or family.title in options.only]
    lines, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="families-") as folder, no_bars():
        for family in families:
            for kind in KINDS:
                began = time.monotonic()
                cells, complaint = attempt(family, kind, Path(folder))
                name = f"{family.title}, {NAMES[kind]}"
                lines.append(f"| {family.title} | `{family.model_type}` | {NAMES[kind]} | {cells} |")
                wrong += [f"{name}: {complaint}"] if complaint else []
                said = complaint.strip().splitlines()[-1] if complaint else "right"
                print(f"{name}: {said} ({time.monotonic() - began:.1f} s)", flush=True)
    options.out.write_text(page(lines), encoding="utf-8")
    print(f"{options.out}: {len(lines)} lines, {len(wrong)} wrong")
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="TITLE", help="these families only")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (docs/families.md)")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {family.title for family in ALL}
    if unknown:
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    return options


def attempt(family: Family, kind: str, folder: Path) -> tuple[str, str]:
    """Return the last cells of a family's line, and what is wrong with them (empty: nothing)."""
    from dataflex_pipeline.errors import DataflexError
    from families.check import measure

    try:
        figures = measure(family, kind, folder)
    except DataflexError as error:
        named = kind in family.refused and family.model_type in str(error)
        return _across(f"*refused*: {error.what} {error.why}"), "" if named else f"refused: {error}"
    except Exception:  # noqa: BLE001 (it is printed, marked in the page, and makes the command fail)
        return _across("**wrong**"), traceback.format_exc()
    if kind in family.refused:
        return _cells(asdict(figures), {}), "expected to be refused, and was not"
    beyond = figures.beyond()
    return _cells(asdict(figures), beyond), f"beyond rounding: {beyond}" if beyond else ""


def _cells(figures: dict[str, float], beyond: dict[str, float]) -> str:
    shown = [f"**{value:.0e}**" if name in beyond else f"{value:.0e}" for name, value in figures.items()]
    return " | ".join(shown)


def _across(text: str) -> str:
    from families.check import Figures

    empty = " |" * (len(fields(Figures)) - 1)
    return text.replace("|", "\\|").replace("\n", " ") + empty


def page(lines: list[str]) -> str:
    """Return the whole page."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    head = "| Family | `model_type` | Tuning | Losses | Logs | LESS | Training | Second round |"
    rule = "|---|---|---|---|---|---|---|---|"
    made = f"Made by `make families` with {versions}."
    return "\n".join([INTRODUCTION, made, "", head, rule, *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
