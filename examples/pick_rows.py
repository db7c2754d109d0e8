"""Select rows from Python: warm up, score, select, train one round, and write the rows for another trainer.

    python examples/pick_rows.py pool.jsonl target.jsonl ./model runs/mine selected.jsonl [key=value ...]

Nothing is printed while the run works; what it found is in its tables, which the script reads at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dataflex_pipeline import Run, UserError


def pick(pool: str, target: str, model: str, folder: str, output: str, **settings: str) -> Run:
    """Run one round of LESS and write the selected rows.

    Args:
        pool: training rows.
        target: rows of what the model is to get good at.
        model: folder or hub name of the base model.
        folder: of the run.
        output: the file for the selected rows.
        settings: further keys of the configuration.
    """
    run = Run(folder, dataset=pool, eval_dataset=target, model_name_or_path=model, **settings)
    run.warmup()
    scores = run.score(1, "less")
    chosen = run.select(1, "less", fraction=0.1)
    run.train(1)
    run.export(output)

    print(f"scores:    {scores.summary}")
    print(f"selection: {chosen.summary}")
    for line in scores.top(3).select(["row", "score"]).to_pylist():
        print(f"  row {line['row']}: {line['score']:.3g}")
    for each in run.outputs():
        print(f"{each.label}: {each.state()}")
    return run


if __name__ == "__main__":
    if len(sys.argv) < 6:
        sys.exit(__doc__)
    places, more = sys.argv[1:6], dict(word.split("=", 1) for word in sys.argv[6:])
    try:
        pick(*places, **more)
    except UserError as error:
        sys.exit(f"{error.what}\n{error.why}\n{error.fix}")
    with Path(places[-1]).open(encoding="utf-8") as rows:
        print(f"{sum(1 for _ in rows)} rows are in {places[-1]}")
