"""The contract of a feature: what its tests inherit to show that it can be relied on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from dataflex_pipeline.api import Feature, FeatureInput, Need, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.features.build import build_feature
from dataflex_pipeline.features.plan import FeaturePlan, make_feature, plan_feature
from dataflex_pipeline.store.fingerprint import digest
from dataflex_pipeline.store.parts import MANIFEST, PartedTable
from dataflex_pipeline.testing.tables import prepared_rows, written

BATCHES: tuple[Mapping[str, Any], ...] = ({"score_batch_tokens": 1}, {"score_batch_tokens": 100_000})
"""Settings of the configuration that only decide which rows are computed together."""
PART = 5
"""Rows per part that a table is cut into."""


class FeatureContract:
    """Tests that every feature passes; a subclass whose name begins with Test says which it is.

    Attributes:
        feature: what a method's ``needs`` names it by.
        params: its parameters that are not at their defaults, by name.
        others: another value for each parameter.
        idle: parameters that decide nothing beside ``params``, as a model where vectors are read from a file.
        split: the rows that it is computed over.
        settings: of the run's configuration, by key.
        rows: prepared rows of pool and of target.
        tolerance: how far numbers may be apart where other rows are computed together.
    """

    feature: ClassVar[Any]
    params: Mapping[str, Any] = {}
    others: Mapping[str, Any] = {}
    idle: ClassVar[frozenset[str]] = frozenset()
    split: ClassVar[Any] = "pool"
    settings: Mapping[str, Any] = {}
    rows: ClassVar[Mapping[str, int]] = {"pool": 23, "target": 11}
    tolerance: ClassVar[float] = 1e-5

    # ------------------------------------------------------------ the made-up world

    def need(self, **more: Any) -> Need:
        """Return how the feature is asked for, with more parameters over those of the class."""
        return Need(self.feature, self.split, self.round(), dict(self.params) | more)

    def round(self) -> int | None:
        """Return the round whose checkpoint the feature is computed with; None where it needs none."""
        return None

    def checkpoint(self) -> Path | None:
        """Return the folder of that checkpoint; None for the base model, or where it needs none."""
        return None

    def config(self, **more: Any) -> Config:
        """Return the run's configuration, with more settings over those of the class."""
        return Config(**{"device": "cpu"} | dict(self.settings) | more)

    def made(self, **more: Any) -> Feature:
        """Return the feature."""
        return make_feature(self.need(**more), self.config())

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield a folder with the prepared rows; it is removed at the end."""
        with tempfile.TemporaryDirectory() as name:
            for split, n_rows in self.rows.items():
                written(Path(name) / split, prepared_rows(n_rows, split), 7)
            yield Path(name)

    def planned(self, folder: Path, need: Need, rows_per_part: int = PART, **settings: Any) -> FeaturePlan:
        """Return the plan of the table over the prepared rows of a folder."""
        checkpoint = self.checkpoint()

        def given(each: Need) -> FeatureInput:
            table = PartedTable.open(folder / each.split)
            named = None if checkpoint is None else digest({"checkpoint": str(checkpoint)})
            return FeatureInput(table, table.fingerprint, checkpoint, named)

        return plan_feature(need, self.config(**settings), given, rows_per_part)

    def computed(
        self, folder: Path, rows_per_part: int = PART, place: str = "features", **settings: Any
    ) -> PartedTable:
        """Return the table, computed where it is not there."""
        plan = self.planned(folder, self.need(), rows_per_part, **settings)
        return build_feature(folder / place, plan, Silent()).table

    def assert_alike(self, one: PartedTable, other: PartedTable) -> None:
        """Assert that two tables hold the same, numbers up to the tolerance."""
        left, right = (pa.Table.from_batches(list(each.blocks())).combine_chunks() for each in (one, other))
        assert left.schema.names == right.schema.names
        for name in left.schema.names:
            first, second = (each.column(name).combine_chunks() for each in (left, right))
            assert first.is_null().equals(second.is_null()), f"{name}: other rows are null"
            numbers, wanted = _flat(first), _flat(second)
            if numbers.dtype.kind == "f":
                np.testing.assert_allclose(
                    numbers, wanted, rtol=self.tolerance, atol=self.tolerance, err_msg=name
                )
            else:
                assert numbers.tolist() == wanted.tolist(), f"{name} differs"

    # ------------------------------------------------------------ what holds

    def test_its_columns_say_what_they_are(self) -> None:
        """Row numbers and ids come first; every column has a meaning, and so has every parameter."""
        schema = self.made().schema
        assert schema.names[:2] == ["row", "row_id"]
        assert {"valid", "reason"} <= set(schema.names)
        for field in schema:
            assert (field.metadata or {}).get(b"description"), f"{field.name} has no meaning"
        for name, info in type(self.made()).Params.model_fields.items():
            assert info.description, f"{name} has no meaning"

    def test_the_table_does_not_depend_on_its_parts(self) -> None:
        """Part by part it is what it is as a whole; there is one line per row and sample, in their order."""
        with self.folder() as folder:
            parts = self.computed(folder, PART, "parts")
            assert parts.n_parts > 1
            n_lines = self.rows[self.split] * self.made().lines_per_row
            assert parts.n_rows == n_lines
            lines = pa.Table.from_batches(list(parts.blocks(["row"]))).column("row").to_pylist()
            assert lines == [line // self.made().lines_per_row for line in range(n_lines)]
            for number in (3, 1 << 20):
                self.assert_alike(self.computed(folder, number, f"parts-{number}"), parts)

    def test_the_same_again_is_the_same_file(self) -> None:
        """Byte for byte, each part."""
        with self.folder() as folder:
            one, two = (self.computed(folder, place=place) for place in ("one", "two"))
            for first, second in zip(one.files, two.files, strict=True):
                assert first.read_bytes() == second.read_bytes()

    def test_a_part_that_is_missing_comes_back_as_it_was(self) -> None:
        """Only that part is computed."""
        with self.folder() as folder:
            table = self.computed(folder)
            before = [file.read_bytes() for file in table.files]
            table.files[1].unlink()
            (table.folder / MANIFEST).unlink()
            again = build_feature(folder / "features", self.planned(folder, self.need()), Silent())
            assert again.computed == 1
            assert [file.read_bytes() for file in again.table.files] == before

    def test_a_row_without_a_value_has_a_reason(self) -> None:
        """Its numbers and vectors are null; a valid row has no reason."""
        with self.folder() as folder:
            table = pa.Table.from_batches(list(self.computed(folder).blocks())).combine_chunks()
            prepared = pa.Table.from_batches(list(PartedTable.open(folder / self.split).blocks(["valid"])))
        valid = table.column("valid").to_numpy()
        usable = prepared.column("valid").to_numpy().repeat(self.made().lines_per_row)
        assert valid.any()
        assert not valid.all()
        assert not (valid & ~usable).any(), "a row that cannot be used has a value"
        assert [reason is None for reason in table.column("reason").to_pylist()] == valid.tolist()
        for field in table.schema:
            if pa.types.is_floating(field.type) or pa.types.is_fixed_size_list(field.type):
                assert table.filter(~valid).column(field.name).null_count == int((~valid).sum()), field.name

    def test_the_company_of_a_row_does_not_matter(self) -> None:
        """Whatever rows are computed together, and the table's name is the same."""
        with self.folder() as folder:
            tables = [self.computed(folder, place=str(n), **more) for n, more in enumerate(self.batches())]
            for table in tables[1:]:
                assert table.fingerprint == tables[0].fingerprint
                self.assert_alike(table, tables[0])

    def batches(self) -> Sequence[Mapping[str, Any]]:
        """Return settings that only decide which rows are computed together."""
        return BATCHES

    def test_the_fingerprint_follows_the_parameters(self) -> None:
        """Each of them, but those that are left out of a dump: these change no number of the table.

        What such a parameter says about the tables that it is computed from, their fingerprints hold.
        """
        fields = self.made().params.__class__.model_fields
        assert set(self.others) | self.idle == set(fields), "others has another value for each parameter"
        with self.folder() as folder:
            before = self._own_ingredients(folder, self.need())
            assert self._own_ingredients(folder, self.need()) == before
            for name, value in self.others.items():
                after = self._own_ingredients(folder, self.need(**{name: value}))
                assert (after == before) == bool(fields[name].exclude), f"{name}: {value!r}"

    def _own_ingredients(self, folder: Path, need: Need) -> str:
        ingredients = self.planned(folder, need).ingredients
        return digest({key: value for key, value in ingredients.items() if key != "features"})

    def test_the_fingerprint_follows_the_rows(self) -> None:
        """Other prepared rows make another table."""
        with self.folder() as folder:
            before = digest(self.planned(folder, self.need()).ingredients)
            rows = prepared_rows(self.rows[self.split] + 1, self.split)
            written(folder / "more" / self.split, rows, 9)
            for split in set(self.rows) - {self.split}:
                (folder / "more" / split).symlink_to(folder / split)
            assert digest(self.planned(folder / "more", self.need()).ingredients) != before


def _flat(values: pa.Array) -> np.ndarray:
    """Return the values that are not null, those of lists one after the other."""
    values = values.drop_null()
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    return np.asarray(values.to_numpy(zero_copy_only=False))
