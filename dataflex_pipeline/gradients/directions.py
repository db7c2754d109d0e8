"""Directions of a target: the mean of its rows' unit gradients, by group or one per row, and their files.

    D_g = mean over the rows z' of group g of  grad(z') / |grad(z')|        (a zero gradient adds 0)

so that a row's mean of cosines with a group is one inner product, <u, D_g> / |u|. A row's gradient is the
weighted sum of those of one or several sequences (its response; the answers that the model gave to it). Some
rows at a time are added up whole, measured, and added to the sums with weight 1 / |grad|: rows in flight x P
floats beside the sums, and one pass over the target.

The sums of a part of the target are a file of their own, so that a kill costs one part; the parts' sums are
combined in their order, so that neither the number of processes nor a kill changes a bit. Sums are in float64
where the device has it, files in float32.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: TID253  (imported lazily with the whole layer)
from torch import Tensor  # noqa: TID253

from dataflex_pipeline.errors import CorruptError, UserError
from dataflex_pipeline.gradients.capture import GradientCapture
from dataflex_pipeline.gradients.policy import WeightedAnswers
from dataflex_pipeline.models.base import widest_float
from dataflex_pipeline.models.batches import Sequences, batch_on
from dataflex_pipeline.models.memory import free_bytes
from dataflex_pipeline.models.room import Room
from dataflex_pipeline.store.atomic import atomic_file

Label = str | int
"""A target group, or the number of a target row."""
IN_FLIGHT_BYTES = 1 << 30
"""Whole gradients that are held at a time, of one row at least."""
HEADER = "directions"
"""Key of the entry in a file's metadata that says what it holds."""


class _Torn(Exception):  # noqa: N818 (no error: the rows in flight are begun anew)
    """A batch failed half way, and what it added cannot be told from the rest."""


class RowGradients:
    """A consumer that adds the gradients of sequences up to those of the rows they belong to.

    Args:
        parameters: those whose gradients will be given, by name. rows: in flight at a time.
        device: of the sums.
    """

    def __init__(self, parameters: Mapping[str, Tensor], rows: int, device: torch.device | str) -> None:
        self.sums = {
            name: torch.zeros(rows, p.numel(), device=device) for name, p in parameters.items()
        }  # [rows, numel] each
        self._slots: list[int] = []
        self._scales: list[float] = []

    def clear(self) -> None:
        """Begin with other rows."""
        for sums in self.sums.values():
            sums.zero_()

    def expect(self, slots: Sequence[int], scales: Sequence[float]) -> None:
        """Say what the sequences of the next batch are added to, and how often. [B] each"""
        self._slots, self._scales = list(slots), list(scales)

    def __call__(self, name: str, rows: slice, gradient: Tensor) -> None:
        """Add one parameter's gradients [b, *shape], one after the other: the order of sums is fixed."""
        flat, sums = gradient.reshape(len(gradient), -1), self.sums[name]
        for place, row in enumerate(range(rows.start, rows.stop)):
            sums[self._slots[row]].add_(flat[place], alpha=self._scales[row])

    def norms(self, rows: int) -> Tensor:
        """Return the lengths of the first rows' gradients, not finite where one is not. [rows]"""
        squares = [
            torch.linalg.vector_norm(sums[:rows], dim=1).to(widest_float(sums.device)).square()
            for sums in self.sums.values()
        ]
        return torch.stack(squares).sum(0).sqrt()


def rows_in_flight(numel: int, wanted: int) -> int:
    """Return how many whole gradients of ``numel`` floats are held at a time, at most ``wanted``."""
    return max(1, min(wanted, IN_FLIGHT_BYTES // (4 * max(1, numel))))


@dataclass
class DirectionSums:
    """Sums of unit gradients.

    Attributes:
        labels: what each sum is of. counts: rows in it, zero gradients included. [L] each
        tensors: by parameter name. [L, numel] each
    """

    labels: list[Label]
    counts: list[int]
    tensors: dict[str, Tensor]

    @classmethod
    def empty(
        cls, parameters: Mapping[str, Tensor], device: torch.device | str, labels: Sequence[Label]
    ) -> DirectionSums:
        """Return sums of no rows yet; where each is of one row, nothing is rounded and float32 is enough."""
        single = all(isinstance(label, int) for label in labels)
        kind = torch.float32 if single else widest_float(device)
        tensors = {
            name: torch.zeros(len(labels), p.numel(), dtype=kind, device=device)
            for name, p in parameters.items()
        }
        return cls(list(labels), [0] * len(labels), tensors)

    def add(self, slot: int, row: int, norm: float, gradients: RowGradients) -> None:
        """Add a row in flight, of that length, to one of the sums."""
        self.counts[slot] += 1
        if norm > 0:
            for name, sums in self.tensors.items():
                sums[slot].add_(gradients.sums[name][row], alpha=1.0 / norm)


@dataclass
class Cosines(DirectionSums):
    """Stands in for sums: takes the cosine of each row with one direction, and adds nothing up.

    Attributes:
        tensors: the direction, of length 1. [numel] each. values: row -> its cosine; labels are rows.
    """

    values: dict[Label, float] = field(default_factory=dict)

    @classmethod
    def empty(  # type: ignore[override]
        cls, direction: Mapping[str, Tensor], labels: Sequence[Label]
    ) -> Cosines:
        """Return cosines of no rows yet."""
        return cls(list(labels), [0] * len(labels), dict(direction))

    def add(self, slot: int, row: int, norm: float, gradients: RowGradients) -> None:
        """Take the cosine of a row in flight, of that length."""
        if norm > 0:
            kind = widest_float(next(iter(self.tensors.values())).device)
            products = [
                float(gradients.sums[name][row].to(kind) @ one.to(kind)) for name, one in self.tensors.items()
            ]
            self.values[self.labels[slot]] = math.fsum(products) / norm


def add_rows(
    model: Any,
    capture: GradientCapture,
    gradients: RowGradients,
    answers: WeightedAnswers,
    slots: Mapping[int, int],
    sums: DirectionSums,
    max_tokens: int | Room,
) -> tuple[np.ndarray, np.ndarray]:
    """Add the unit gradients of rows to their sums.

    Args:
        model: of the capture. capture: open, made with ``gradients``.
        answers: the sequences, the rows they belong to, and the factor of each one's mean loss there.
        slots: row -> which sum it is added to; rows without sequences are added as zeros.
        sums: changed in place. max_tokens: padded tokens per batch.

    Returns:
        By row, in the order of ``slots``: lengths of the gradients, NaN where one is not finite, in which
        case it is in no sum; losses of the sequences, added up with their factors. [rows] each
    """
    room = Room.of(max_tokens)

    def run(some: Sequences, batch: np.ndarray) -> Tensor:
        gradients.expect([0] * len(batch), [0.0] * len(batch))
        return capture.run(*batch_on(model, some, batch))

    room.settle(answers.sequences, run, model.device)
    order = list(slots)
    place = {row: number for number, row in enumerate(order)}
    norms, losses = np.zeros(len(order)), np.zeros(len(order))
    lengths = np.zeros(len(order), dtype=np.int64)
    np.maximum.at(lengths, [place[row] for row in answers.rows.tolist()], answers.sequences.lengths)
    some = [order[number] for number in np.argsort(-lengths, kind="stable") if lengths[number]]
    step = len(next(iter(gradients.sums.values())))
    for first in range(0, len(some), step):
        flying = some[first : first + step]
        found = _fly(model, capture, gradients, answers, flying, room)
        lost = ~np.isfinite(found)
        measured = gradients.norms(len(flying)).cpu().double().numpy()
        measured[lost | ~np.isfinite(measured)] = np.nan
        for number, row in enumerate(flying):
            norms[place[row]], losses[place[row]] = measured[number], found[number]
            if np.isfinite(measured[number]):
                sums.add(slots[row], number, float(measured[number]), gradients)
    for number, row in enumerate(order):
        if not lengths[number]:
            sums.counts[slots[row]] += 1
    return norms, losses


def _fly(
    model: Any,
    capture: GradientCapture,
    gradients: RowGradients,
    answers: WeightedAnswers,
    flying: Sequence[int],
    room: Room,
) -> np.ndarray:
    """Add up the gradients of the rows in flight, from the beginning where memory ran out in a batch.

    Returns:
        Their summed losses. [rows in flight]
    """
    while True:
        try:
            return _flown(model, capture, gradients, answers, flying, room)
        except _Torn:
            continue


def _flown(
    model: Any,
    capture: GradientCapture,
    gradients: RowGradients,
    answers: WeightedAnswers,
    flying: Sequence[int],
    room: Room,
) -> np.ndarray:
    slot = {row: number for number, row in enumerate(flying)}
    mine = np.array([n for n, row in enumerate(answers.rows.tolist()) if row in slot], dtype=np.int64)
    sequences, total = answers.sequences, np.zeros(len(flying))
    torn = False
    gradients.clear()

    def work(batch: np.ndarray) -> None:
        nonlocal torn
        if torn:
            raise _Torn
        torn = True
        chosen = mine[batch]
        slots, scales = [slot[row] for row in answers.rows[chosen].tolist()], answers.weights[chosen]
        gradients.expect(slots, scales.tolist())
        losses = capture.run(*batch_on(model, sequences, chosen)).cpu().double().numpy()
        np.add.at(total, slots, scales * losses)
        torn = False

    n_labels = sequences.n_labels()[mine]
    room.each_batch(sequences.lengths[mine], n_labels, capture.max_labels, work)
    return total


@dataclass(frozen=True)
class Directions:
    """The directions of a target.

    Attributes:
        labels: groups or target rows. tensors: mean unit gradients by parameter name. [L, numel] each
    """

    labels: list[Label]
    tensors: dict[str, Tensor]


def write_sums(path: Path, sums: DirectionSums, fingerprint: str) -> None:
    """Write the sums of a part; the file is durable when this returns.

    Args:
        path: of the file. sums: to write. fingerprint: of the table that they belong to.
    """
    tensors = {name: each.to("cpu", torch.float32) for name, each in sums.tensors.items()}
    _write(path, tensors, {"labels": sums.labels, "counts": sums.counts, "fingerprint": fingerprint})


def combine(parts: Sequence[Path], path: Path, fingerprint: str) -> None:
    """Write the means over several parts' sums, added up in the order of the parts.

    Args:
        parts: files of sums. path: of the directions. fingerprint: of the table that all belong to.

    Raises:
        CorruptError: a file is damaged, or of another table.
    """
    from contextlib import ExitStack

    from safetensors import safe_open

    headers = [read_header(part, fingerprint) for part in parts]
    counts: dict[Label, int] = {}
    for header in headers:
        for label, count in zip(header["labels"], header["counts"], strict=True):
            counts[label] = counts.get(label, 0) + count
    labels = sorted(label for label, count in counts.items() if count)
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(part, framework="pt", device="cpu")) for part in parts]
        names = list(files[0].keys()) if labels else []
        for name in names:
            size = files[0].get_slice(name).get_shape()[1]
            total = torch.zeros(len(labels), size, dtype=torch.float64)
            for file, header in zip(files, headers, strict=True):
                part = file.get_tensor(name)
                for slot, label in enumerate(header["labels"]):
                    if counts[label]:
                        total[labels.index(label)] += part[slot]
            total /= torch.tensor([counts[label] for label in labels], dtype=torch.float64)[:, None]
            tensors[name] = total.float()
    _write(path, tensors, {"labels": labels, "fingerprint": fingerprint})


def read_directions(
    path: Path, fingerprint: str, parameters: Mapping[str, Tensor], device: torch.device | str
) -> Directions:
    """Read directions, checked.

    Args:
        path: of the file. fingerprint: of the table that it belongs to.
        parameters: that there have to be directions for. device: where they are needed.

    Raises:
        CorruptError: the file is damaged, or of another table or model.
    """
    from safetensors.torch import load_file

    header = read_header(path, fingerprint)
    tensors = load_file(path, device=str(device))
    shapes = {name: (len(header["labels"]), p.numel()) for name, p in parameters.items()}
    if {name: tuple(each.shape) for name, each in tensors.items()} != shapes:
        raise _damaged(path, "its directions are not those of the parameters that the model trains")
    return Directions(header["labels"], tensors)


def file_bytes(path: Path) -> int:
    """Return the size of a file of directions.

    Raises:
        CorruptError: it is not there.
    """
    if not path.is_file():
        raise _damaged(path, "it is missing")
    return path.stat().st_size


def check_room(
    size: int, parameters: Mapping[str, Tensor], more: int, device: torch.device | str, per: str
) -> None:
    """Refuse directions that do not fit the memory beside the model.

    Args:
        size: bytes of the directions. parameters: that they are of.
        more: floats per parameter that are held beside them. device: where.
        per: what has one, a group or a row.

    Raises:
        UserError: they do not fit.
    """
    numel = sum(p.numel() for p in parameters.values())
    needed, free = size + 4 * more * numel, free_bytes(device)
    if free is None or needed <= free:
        return
    fewer = "fewer groups (eval_group_column)" if per == "group" else "round_robin_over: groups"
    raise UserError(
        f"The directions of the target take {size / 1e9:.3g} GB, {max(1, size // (4 * numel)):,} of "
        f"{numel:,} trained parameters each, with {needed / 1e9:.3g} GB in all beside the model; "
        f"{free / 1e9:.3g} GB of memory are free.",
        f"Exact influence (projection: none) holds a direction of the trained parameters' size per {per}.",
        f"Give {fewer}, or set projection: countsketch (as less.projection=countsketch), which compares "
        "stored sketches instead.",
    )


def is_sound(path: Path, fingerprint: str) -> bool:
    """Whether a file is there, whole, and of that table."""
    if not path.is_file():
        return False
    try:
        read_header(path, fingerprint)
    except CorruptError:
        return False
    return True


def read_header(path: Path, fingerprint: str) -> dict[str, Any]:
    """Return what a file says that it holds, its content checked against its digest.

    Raises:
        CorruptError: the file is damaged, or of another table.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            recorded = header.pop("digest")
            digest = _digest(header, ((name, file.get_tensor(name)) for name in sorted(file.keys())))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, f"it cannot be read ({str(error).splitlines()[0]})") from error
    if digest != recorded:
        raise _damaged(path, "its content is not what was written")
    if header["fingerprint"] != fingerprint:
        raise _damaged(path, "it belongs to another table")
    return dict(header)


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    digest = _digest(header, ((name, tensors[name]) for name in sorted(tensors)))
    # One entry: several would be written in an order of their own each time.
    metadata = {HEADER: json.dumps({**header, "digest": digest})}
    whole = {name: each.contiguous() for name, each in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(whole, temporary, metadata=metadata)


def _digest(header: Mapping[str, Any], tensors: Any) -> str:
    found = hashlib.blake2b(json.dumps(dict(header)).encode(), digest_size=16)
    for name, each in tensors:
        found.update(f"{name} {list(each.shape)} {each.dtype}".encode())
        found.update(each.contiguous().numpy())
    return found.hexdigest()


def _damaged(path: Path, found: str) -> CorruptError:
    return CorruptError(
        f"{path}: {found}.",
        "The directions of a target decide every score that is made with them.",
        "Delete the folder that it is in and run the same command again: it is made anew.",
    )
