"""One family in one kind of fine-tuning: this package's numbers against the plain loops of oracle.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tiny_training import GLOBAL_BATCH, log_of, make_config, make_index, make_plan, make_pool

from dataflex_pipeline import api
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.features.build import build_feature
from dataflex_pipeline.features.plan import plan_feature
from dataflex_pipeline.gradients.projection import make_projection
from dataflex_pipeline.methods import build_method, method_class
from dataflex_pipeline.models.adapters import wrap_for_training
from dataflex_pipeline.models.base import load_base, load_for_scoring
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.store.parts import PartedTable
from dataflex_pipeline.training import train_round
from families import oracle
from families.models import make_family
from families.settings import BALANCING, Family

STEPS, K = 2, 4096
POOL_ROWS, TARGET_ROWS, SCORED_ROWS = 12, 3, 4
"""The target is the pool's first rows: cosines of unlike rows of random models are all nearly 0."""
PROJECTION_SEED = 7
LESS: dict[str, Any] = {"projection": "countsketch", "proj_dim": K, "dtype": "float32"}


LIMITS = {"losses": 1e-5, "logged": 5e-5, "less": 5e-5, "training": 3e-4, "second_round": 3e-4}
"""Largest error of each figure; rounding in float32 gives a tenth to a third of them."""


@dataclass(frozen=True)
class Figures:
    """How far this package is from the loops.

    Attributes:
        losses: largest difference of a row's loss, nats per token.
        logged: largest difference of a step's loss or of the evaluation's in the training logs, nats.
        less: largest difference of a score or of an update's length, over the largest of them.
        training: |update - the loop's| / |the loop's| of the first round, over all trained parameters.
        second_round: the same of the second round, which goes on from the first one's checkpoint.
    """

    losses: float
    logged: float
    less: float
    training: float
    second_round: float

    def beyond(self) -> dict[str, float]:
        """Return the figures that rounding does not explain."""
        return {name: value for name, value in asdict(self).items() if not value <= LIMITS[name]}


def measure(family: Family, kind: str, folder: Path) -> Figures:
    """Train two rounds and score after the first, both ways.

    Args:
        family: of the model. kind: lora or full. folder: for the model's folder and the runs.

    Raises:
        UserError: this package refuses the family.
    """
    trial = Trial(family, kind, folder)
    training, second = trial.updates()
    return Figures(trial.losses(), trial.logged(), trial.less(), training, second)


@dataclass(frozen=True)
class Loop:
    """What the plain loop over two rounds comes to.

    Attributes:
        weights: at the start and after each round. losses: of the steps. evaluations: after each round.
    """

    weights: list[oracle.Vectors]
    losses: list[float]
    evaluations: list[float]


class Trial:
    """Two rounds of weighted training of a tiny model, and the scores at the checkpoint between them."""

    def __init__(self, family: Family, kind: str, folder: Path) -> None:
        self.family, self.kind = family, kind
        self.model = make_family(family, folder / "models")
        self.run = folder / "runs" / f"{self.model.name}-{kind}"
        self.config = _config(family, kind, self.model)
        self.pool = make_pool(self.run / "pool", rows=POOL_ROWS)
        self.target = make_pool(self.run / "target", rows=TARGET_ROWS, group=True)
        self.rows = _rows(self.pool)
        self.indices = [_weighted_index(number) for number in range(2)]

    @cached_property
    def start(self) -> Path | None:
        """The folder of the adapter that the first round starts from; None: there is none."""
        if self.kind == "full":
            return None
        seed = derive_seed(self.config.seed, "adapter")
        wrapped = wrap_for_training(self.config, load_base(self.config, "cpu"), seed)
        wrapped.save_pretrained(self.run / "start")
        return self.run / "start"

    @cached_property
    def checkpoints(self) -> list[Path]:
        """Both rounds' checkpoints."""
        plans = [
            make_plan(self.run, number, self.config, self.pool, index, STEPS)
            for number, index in enumerate(self.indices)
        ]
        for plan in plans:
            train_round(self.config, plan, self.pool, self.target, api.Silent())
        return [plan.checkpoint for plan in plans]

    @cached_property
    def loop(self) -> Loop:
        """What the plain loop makes of both rounds."""
        training = oracle.Training(oracle.load(self.model, self.start), _hyper(self.config, self.family))
        target = _rows(self.target)
        weights, evaluations = [oracle.copied(training.model)], []
        for index in self.indices:
            pairs = zip(index["row"].to_pylist(), index["weight"].to_pylist(), strict=True)
            weights.append(training.run([(self.rows[row], weight) for row, weight in pairs]))
            evaluations.append(oracle.token_loss(training.model, target))
        return Loop(weights, training.losses, evaluations)

    def updates(self) -> tuple[float, float]:
        """Return how far both rounds' updates are from the loop's."""
        expected = self.loop.weights
        found = [expected[0], *(_weights(self.config, checkpoint) for checkpoint in self.checkpoints)]
        return _difference(found[:2], expected[:2]), _difference(found[1:], expected[1:])

    def logged(self) -> float:
        """Return the largest difference of what the training logs say of steps and evaluations."""
        lines = [line for number in range(2) for line in log_of(self.run, number)]
        steps = [line["loss"] for line in lines if "loss" in line]
        evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
        apart = np.array([*steps, *evaluations]) - np.array([*self.loop.losses, *self.loop.evaluations])
        return float(np.abs(apart).max())

    @cached_property
    def reference(self) -> Any:
        """The model of the first round's checkpoint, as transformers and peft load it."""
        folder = self.checkpoints[0]
        return (oracle.load(folder) if self.kind == "full" else oracle.load(self.model, folder)).eval()

    def losses(self) -> float:
        """Return the largest difference of a row's loss after the first round."""
        found = self._feature(api.Need("losses", "pool", 0))["loss"].to_numpy()
        return float(np.abs(found - oracle.row_losses(self.reference, self.rows)).max())

    def less(self) -> float:
        """Return the largest relative difference of a score, or of an update's length before projection."""
        method = build_method("less", method_class("less"), LESS, "the family matrix")
        rate = float(
            np.mean([self.config.learning_rate * (1 - t / self.config.horizon) for t in range(STEPS)])
        )
        selection = api.Selection(1, 2, 0, str, rate, shared_seed=PROJECTION_SEED)
        tables = {name: self._feature(need) for name, need in method.needs(selection).items()}
        state = method.begin({name: Table(table) for name, table in tables.items()}, selection)
        pool = tables["pool"].slice(0, SCORED_ROWS)
        block = api.Block(_batch(pool), {"pool": _batch(pool)})
        scores, lengths = oracle.less(
            self.reference,
            self.checkpoints[0],
            self.rows[:SCORED_ROWS],
            _rows(self.target),
            rate,
            _projected,
        )
        found = np.asarray(method.score(block, state)["score"])
        return max(_relative(found, scores), _relative(pool["norm"].to_numpy(), lengths))

    def _feature(self, need: api.Need) -> pa.Table:
        def given(asked: api.Need) -> api.FeatureInput:
            table = self.target if asked.split == "target" else self.pool
            return api.FeatureInput(table, table.fingerprint, self.checkpoints[0], "first")

        plan = plan_feature(need, self.config, given, 64)
        built = build_feature(self.run / "features", plan, api.Silent())
        return pa.Table.from_batches(built.table.blocks())


class Table:
    """A table in memory, read in one block."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.schema, self.n_rows = table, table.schema, table.num_rows

    def blocks(self, columns: Any = None, max_rows: int = 65536) -> Any:
        """Yield the table's rows."""
        yield _batch(self.table if columns is None else self.table.select(columns))


def _batch(table: pa.Table) -> pa.RecordBatch:
    (batch,) = table.combine_chunks().to_batches()
    return batch


def _config(family: Family, kind: str, model: Path) -> Config:
    settings: dict[str, Any] = {
        "finetuning_type": kind,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.5,
        "adam_beta2": 0.98,
        # Above the rounding of gradients that are 0 (as of a key's bias), so that Adam does not blow it up.
        "adam_epsilon": 1e-5,
        "weight_decay": 0.0,
        "warmup_step": STEPS,
        "update_step": STEPS,
        "update_times": 2,
        "eval_strategy": "epoch",
        "plot_loss": False,
    }
    if family.asked:
        settings["router_aux_loss_coef"] = BALANCING
    elif "router_aux_loss_coef" in family.settings and not family.balancing:
        settings["router_aux_loss_coef"] = 0.0
    return make_config(model, **settings)


def _hyper(config: Config, family: Family) -> oracle.Hyper:
    return oracle.Hyper(
        learning_rate=config.learning_rate,
        schedule="linear",
        horizon=config.horizon,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        rows_per_pass=config.per_device_train_batch_size,
        passes=config.gradient_accumulation_steps,
        balancing=BALANCING if family.balancing else 0.0,
    )


def _weighted_index(number: int) -> pa.Table:
    weights = np.random.default_rng(50 + number).exponential(1.0, STEPS * GLOBAL_BATCH)
    return make_index(number, STEPS, POOL_ROWS, weights / weights.mean())


def _rows(table: PartedTable) -> list[oracle.Row]:
    found = table.take(np.arange(table.n_rows), ["input_ids", "labels"]).to_pylist()
    return [(row["input_ids"], row["labels"]) for row in found]


def _weights(config: Config, checkpoint: Path) -> oracle.Vectors:
    return oracle.copied(load_for_scoring(config, checkpoint, "cpu"))


def _projected(vectors: Mapping[str, torch.Tensor]) -> np.ndarray:
    projection = make_projection(LESS["projection"], K, PROJECTION_SEED)
    into = torch.zeros(1, K)
    for name, vector in vectors.items():
        projection.add(name, vector.detach().reshape(1, -1).contiguous(), into)
    return np.asarray(into[0].double().numpy())


def _difference(found: list[oracle.Vectors], expected: list[oracle.Vectors]) -> float:
    """Return |found update - expected update| / |expected update| between two sets of weights."""
    if any(weights.keys() != expected[0].keys() for weights in found):
        raise AssertionError("other parameters are trained than in the loop")
    steps = [
        {name: after[name].double() - before[name].double() for name in after}
        for before, after in (found, expected)
    ]
    apart = {name: steps[0][name] - steps[1][name] for name in steps[1]}
    return oracle.length(apart) / oracle.length(steps[1])


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())
