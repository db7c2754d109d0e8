"""What is right, by plain loops over single rows: transformers, peft and torch.optim.AdamW, none of our code.

    row loss       l_i = (1 / T_i) sum_t l_it, l_it = -log softmax(model(row alone).logits)_t, in nats
    LESS           eta x mean over target rows z' of cos(P Gamma(z), P grad l(z')), Gamma Adam's next update
                   from the row's gradient g and the optimizer's m, v and t:
                   ((b1 m + (1-b1) g) / (1-b1^(t+1))) / (sqrt((b2 v + (1-b2) g^2) / (1-b2^(t+1))) + eps)
    training step  sum_i w_i sum_t l_it / sum_i T_i + c x mean over micro-batches of the balancing loss

Every row goes through the model alone, without padding; only the balancing loss, which is a statistic of a
micro-batch, is taken from padded rows. Attention and experts are transformers' plain ("eager") ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, get_scheduler

IGNORED = -100
Row = tuple[list[int], list[int]]
"""Token ids and labels."""
Vectors = dict[str, torch.Tensor]
"""One tensor per trainable parameter, by name."""
Project = Callable[[Vectors], np.ndarray]


@dataclass(frozen=True)
class Hyper:
    """What the loop over optimizer steps is told.

    Attributes:
        rows_per_pass: rows per micro-batch. passes: micro-batches per step.
        balancing: coefficient of the load-balancing loss; 0: none.
    """

    learning_rate: float
    schedule: str
    horizon: int
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float
    rows_per_pass: int
    passes: int
    balancing: float


PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}


def load(folder: Path, adapter: Path | None = None, **settings: Any) -> Any:
    """Return a model with an adapter or without, in float32; what is to be trained requires a gradient.

    Args:
        folder: of the model. adapter: folder of an adapter. settings: of the configuration, to be changed.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **PLAIN, **settings)
    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return model.requires_grad_(True)


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copied(model: Any) -> Vectors:
    """Return a copy of the trained parameters."""
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def summed_loss(model: Any, row: Row) -> tuple[torch.Tensor, int]:
    """Return the sum of the row's negative log-likelihoods (nats) and how many tokens it is over."""
    ids, labels = torch.tensor(row[0]), torch.tensor(row[1])[1:]
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    wanted = labels != IGNORED
    log_p = torch.log_softmax(logits[wanted], -1)
    return -log_p.gather(1, labels[wanted, None]).sum(), int(wanted.sum())


def row_losses(model: Any, rows: Sequence[Row]) -> np.ndarray:
    """Return each row's mean loss in nats per response token. [rows]"""
    with torch.no_grad():
        return np.array([float(total / count) for total, count in (summed_loss(model, row) for row in rows)])


def token_loss(model: Any, rows: Sequence[Row]) -> float:
    """Return the mean loss of all rows' response tokens together, in nats per token."""
    with torch.no_grad():
        found = [summed_loss(model, row) for row in rows]
    return float(sum(total for total, _ in found)) / sum(count for _, count in found)


def row_gradient(model: Any, row: Row) -> Vectors:
    """Return autograd's gradient of the row's mean loss."""
    total, count = summed_loss(model, row)
    named = trainable(model)
    found = torch.autograd.grad(total / count, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def adam_update(checkpoint: Path) -> Callable[[Vectors], Vectors]:
    """Return what turns a gradient into Adam's next update, from the states in ``optimizer.pt``.

    A parameter that has none never had a gradient: torch's AdamW begins with it at m = v = 0, t = 0.
    """
    nothing = {"step": 0, "exp_avg": 0.0, "exp_avg_sq": 0.0}
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    known = {
        name: (group, saved["state"].get(number, nothing))
        for group in saved["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }

    def update(gradients: Vectors) -> Vectors:
        result = {}
        for name, g in gradients.items():
            group, state = known[name]
            (b1, b2), t = group["betas"], float(state["step"]) + 1
            m = (b1 * state["exp_avg"] + (1 - b1) * g) / (1 - b1**t)
            v = (b2 * state["exp_avg_sq"] + (1 - b2) * g**2) / (1 - b2**t)
            result[name] = m / (v.sqrt() + group["eps"])
        return result

    return update


def length(vectors: Vectors) -> float:
    """Return the Euclidean length over all parameters."""
    return sum(float(v.double().square().sum()) for v in vectors.values()) ** 0.5


def less(
    model: Any,
    checkpoint: Path,
    pool: Sequence[Row],
    target: Sequence[Row],
    learning_rate: float,
    project: Project,
) -> tuple[np.ndarray, np.ndarray]:
    """Return LESS's scores of the pool rows and the lengths of their updates before projection. [rows] each

    Args:
        model: of the checkpoint. checkpoint: has the optimizer's states.
        learning_rate: mean of the rates applied before it. project: from vectors to K numbers.
    """
    update = adam_update(checkpoint)
    updates = [update(row_gradient(model, row)) for row in pool]
    ours = np.array([unit(project(vectors)) for vectors in updates])
    theirs = np.array([unit(project(row_gradient(model, row))) for row in target])
    return learning_rate * (ours @ theirs.T).mean(1), np.array([length(vectors) for vectors in updates])


def unit(vector: np.ndarray) -> np.ndarray:
    """Scale to length 1; a zero vector stays."""
    norm = np.linalg.norm(vector)
    return vector / norm if norm else vector


class Training:
    """One AdamW and one schedule over the horizon, the loop written out; goes on where it stopped."""

    def __init__(self, model: Any, hyper: Hyper) -> None:
        self.model, self.hyper = model.train(), hyper
        self.parameters = list(trainable(model).values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=hyper.learning_rate, betas=hyper.betas, eps=hyper.eps, weight_decay=0.0
        )
        self.schedule = get_scheduler(hyper.schedule, self.optimizer, 0, hyper.horizon)
        self.losses: list[float] = []

    def run(self, positions: Sequence[tuple[Row, float]]) -> Vectors:
        """Train on rows with weights, in this order; return the weights afterwards."""
        size = self.hyper.rows_per_pass * self.hyper.passes
        for first in range(0, len(positions), size):
            self._step(positions[first : first + size])
        return copied(self.model)

    def _step(self, positions: Sequence[tuple[Row, float]]) -> None:
        total, tokens = torch.zeros(()), 0
        for row, weight in positions:
            nll, count = summed_loss(self.model, row)
            total, tokens = total + weight * nll, tokens + count
        loss = total / tokens
        if self.hyper.balancing:
            loss = loss + self.hyper.balancing * self._balancing([row for row, _ in positions])
        self.losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.hyper.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def _balancing(self, rows: Sequence[Row]) -> torch.Tensor:
        """Return the mean over the step's micro-batches of transformers' load-balancing loss."""
        found = []
        for first in range(0, len(rows), self.hyper.rows_per_pass):
            part = [torch.tensor(ids) for ids, _ in rows[first : first + self.hyper.rows_per_pass]]
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in part], batch_first=True)
            out = self.model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
            found.append(out.aux_loss)
        return torch.stack(found).mean()
