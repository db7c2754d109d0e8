"""Feature and the Need of one, their parameters, and the backends behind them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import pyarrow as pa
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import to_jsonable_python

from dataflex_pipeline.config.keys import LARGEST
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.own_code import in_one_line, load_source
from dataflex_pipeline.reporting import Progress

Split = Literal["pool", "target", "test"]


class BlockTable(Protocol):
    """What can be read in row order, block by block."""

    n_rows: int
    schema: pa.Schema

    def blocks(self, columns: Sequence[str] | None = None, max_rows: int = 65536) -> Iterator[pa.RecordBatch]:
        """Yield record batches of at most ``max_rows`` rows, in row order."""


def _is_upper(limit: Any) -> bool:
    return isinstance(limit, Le | Lt)


class Params(BaseModel):
    """Parameters of a method or feature; a subclass declares them as fields with defaults and meaning.

    A whole number with a lower limit is at most LARGEST, unless an upper limit is declared too; seeds, which
    are derived, have 64 bits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", check_fields=False)
    @classmethod
    def _of_32_bits(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        limits = () if "seed" in name else cls.model_fields[name].metadata
        counts = any(isinstance(each, Ge | Gt) for each in limits)
        if type(value) is int and value > LARGEST and counts and not any(map(_is_upper, limits)):
            raise ValueError(f"Input should be at most {LARGEST}")
        return value

    def part(self, kind: type[Params]) -> dict[str, Any]:
        """Return the values of the parameters that ``kind``, a base shared with others, declares."""
        return {name: getattr(self, name) for name in kind.model_fields}

    def plain(self) -> dict[str, Any]:
        """Return every parameter as plain JSON values, those that a fingerprint leaves out too."""
        return {
            name: value.plain() if isinstance(value, Params) else to_jsonable_python(value)
            for name, value in ((name, getattr(self, name)) for name in type(self).model_fields)
        }


@dataclass(frozen=True)
class Need:
    """One feature table that a method asks for.

    Attributes:
        feature: the feature: its class, the name of a shipped one, or ``my_features.py:Sharpness``. Kept as
            its name.
        split: over the pool or over the target.
        checkpoint: the round whose checkpoint the feature is computed with. Left out it is the round before
            the selection; "base" is the model as the run was given it, and so is 0 without a warm-up. A
            feature without a model has none.
        params: the feature's own parameters: an instance of its Params, or their values by name.
        step: a checkpoint inside that round, by the optimizer steps of the whole run; None: its end.
        kind: the class, where one was given; shipped features are imported when they are made.
    """

    feature: str | type[Feature]
    split: Split = "pool"
    checkpoint: int | Literal["base"] | None = None
    params: Params | Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    kind: type[Feature] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        given: str | type[Feature] = self.feature
        if isinstance(given, str) and ".py:" in given:
            given = own_feature(given)
        if not (isinstance(given, str) or (isinstance(given, type) and issubclass(given, Feature))):
            raise ConfigError(
                f"A Need names the feature {given!r:.100}.",
                "It is neither the name of a feature nor a subclass of dataflex_pipeline.api.Feature.",
                "Name a shipped feature (api.Need('losses')), a class, or my_features.py:Sharpness.",
            )
        if not isinstance(given, str):
            object.__setattr__(self, "kind", given)
            object.__setattr__(self, "feature", given.name)

    @property
    def name(self) -> str:
        """The feature's name."""
        return str(self.feature)


def own_feature(reference: str) -> type[Feature]:
    """Return a Feature subclass of a file of the user's own, named ``file.py:Class``.

    Raises:
        ConfigError: there is no such file, it cannot be run, or it has no such feature.
    """
    file, _, name = reference.rpartition(":")
    fix = (
        "Name a Python file and a subclass of dataflex_pipeline.api.Feature in it: my_features.py:Sharpness."
    )
    if not Path(file).is_file():
        raise ConfigError(f"A method asks for the feature '{reference}'.", f"There is no file {file}.", fix)
    try:
        found = getattr(load_source(f"dataflex_feature_{Path(file).stem}", Path(file)), name, None)
    except Exception as error:  # any error of the user's own file, told without a traceback
        why = f"{file} cannot be run: {in_one_line(error)}"
        raise ConfigError(f"A method asks for the feature '{reference}'.", why, fix) from error
    if not (isinstance(found, type) and issubclass(found, Feature)):
        why = f"{file} has no subclass of Feature of the name {name}."
        raise ConfigError(f"A method asks for the feature '{reference}'.", why, fix)
    return found


@dataclass(frozen=True)
class FeatureInput:
    """What a feature is computed from.

    Attributes:
        table: the prepared rows of the split.
        fingerprint: of that table.
        checkpoint: folder of the checkpoint, with its fingerprint; None where the feature needs none.
        tables: the feature tables that it is computed from, by the names that its ``needs`` gave them.
        folder: of the table being made, for what has to survive a kill before its part is whole.
        made: fingerprint of that table.
    """

    table: BlockTable
    fingerprint: str
    checkpoint: Path | None
    checkpoint_fingerprint: str | None
    tables: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    made: str = ""


class Feature(ABC):
    """One costly table over the rows of a split: computed part by part, cached, shared by methods.

    Class attributes:
        name: of its tables; by default the class's name in lower case, words joined by underscores.
        version: raised when the numbers change for the same input.
        uses_model: whether it is computed with a checkpoint of the run.
        of_trained_weights: whether it takes gradients of the weights that training would change.
        takes_the_machine: whether rank 0 of a launch computes it alone, with all GPUs of its machine.
        schema: its columns, beginning with row and row_id; of the instance where parameters decide it.
        input_columns: columns of the prepared rows that ``compute`` reads.
        side_files: pattern of files that only serve to make the parts and are removed then; None: none.
        Params: its parameters.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    uses_model: ClassVar[bool] = True
    of_trained_weights: ClassVar[bool] = False
    takes_the_machine: bool = False
    schema: pa.Schema
    side_files: ClassVar[str | None] = None
    input_columns: ClassVar[tuple[str, ...]]
    Params: ClassVar[type[Params]] = Params

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, params: Any, config: Any) -> None:
        self.params = params
        self.config = config

    @property
    def lines_per_row(self) -> int:
        """Lines of the table per row of the split: line = row x lines_per_row + sample."""
        return 1

    def row_flops(self, tokens: float) -> float:
        """Return about how many floating-point operations a row of so many tokens takes; 0: not known.

        It decides how many rows make a part where ``rows_per_part`` is auto, so it is the same each time.
        """
        return 0.0

    def needs(self, need: Need) -> Mapping[str, Need]:
        """Return the features that this one, asked for by ``need``, is computed from, by names of its own."""
        return {}

    def ingredients(self) -> dict[str, Any]:
        """Return settings that change the numbers, too; an entry ``params`` stands for the parameters."""
        return {}

    def check(self, need: Need, n_rows: int | None) -> None:  # noqa: B027 (nothing to check is no mistake)
        """Find what would stop the feature, as far as that can be told soon and before a run begins.

        Args:
            need: how it was asked for. n_rows: rows of the split; None where they were not counted.

        Raises:
            UserError: a package, a model or a file is not there, or does not fit the rows.
        """

    def reach(self) -> Sequence[str]:
        """Try the servers that it asks, at no cost: say what is doubtful, UserError if one is not there."""
        return ()

    def table(self, rows: pa.Table, values: Mapping[str, np.ndarray], why: str) -> pa.Table:
        """Return the feature's table of one part from plain columns, a line per row.

        Args:
            rows: what ``compute`` was given, with row, row_id, valid and reason; columns that the feature
                has too and no values are given for are taken over.
            values: by column; the first one decides: where it is not finite, the row is not valid.
            why: the reason of those rows; rows that were not valid before keep their own.
        """
        valid = rows.column("valid").to_numpy(zero_copy_only=False)
        kept = valid & np.isfinite(next(iter(values.values())))
        reason = rows.column("reason").to_pylist()
        for place in np.flatnonzero(valid & ~kept):
            reason[place] = why
        columns = {
            name: pa.array(value, self.schema.field(name).type, mask=~kept) for name, value in values.items()
        }
        same = set(self.schema.names) & set(rows.column_names) - set(values)
        columns |= {name: rows.column(name) for name in same}
        columns |= {"valid": pa.array(kept), "reason": pa.array(reason, pa.string())}
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)

    def has_beside(self, folder: Path, first_row: int, fingerprint: str) -> bool:
        """Whether what a finished part keeps in a file of its own is there and whole.

        A part without it is computed again.

        Args:
            folder: of the table. first_row: of the part. fingerprint: of the table.
        """
        return True

    def finish(  # noqa: B027 (most features are their parts)
        self, folder: Path, first_rows: Sequence[int], fingerprint: str
    ) -> None:
        """Make what all parts come to, once every one is there and before the side files go.

        A kill may let this run again, with or without the side files: what is there already is kept.

        Args:
            folder: of the table. first_rows: of the parts. fingerprint: of the table.
        """

    @abstractmethod
    def open(
        self, given: FeatureInput, progress: Progress
    ) -> AbstractContextManager[Callable[[pa.Table], pa.Table]]:
        """Load what is needed once; yield a function from the rows of one part to the feature of them."""


class Backend(Protocol):
    """What an embedder, a generator and a rewarder share: a context manager around a model or a server.

    Entering loads; leaving frees the accelerator's memory before the next phase loads its own model. No state
    between calls changes an answer: the same input gives the same output whatever was asked before, and in
    whatever batch up to the rounding of the model's precision.
    """

    def __enter__(self) -> Self:
        """Load what is needed."""

    def __exit__(self, *error: object) -> None:
        """Free memory and end every process that was started."""
