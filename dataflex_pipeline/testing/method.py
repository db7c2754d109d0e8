"""The contract of a method: what its tests inherit to show that it can be relied on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, get_args

import numpy as np
import pyarrow as pa
from pydantic_core import to_jsonable_python

from dataflex_pipeline import api
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.declared.method import (
    check_method,
    check_method_class,
    own_columns,
    target_ranking,
    weights,
)
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.features.plan import make_feature, method_needs, params_of
from dataflex_pipeline.methods import build_method
from dataflex_pipeline.pipeline.scored_block import score_block
from dataflex_pipeline.schemas import REASON, ROW, ROW_ID, SCORES, VALID, column
from dataflex_pipeline.store.fingerprint import canonical
from dataflex_pipeline.store.tables import zip_blocks
from dataflex_pipeline.testing.tables import (
    GROUPS,
    WHOLE,
    MemoryTable,
    feature_rows,
    prepared_rows,
    valid_rows,
)

EMBEDDINGS = pa.schema([ROW, ROW_ID, column("embedding", pa.list_(pa.float32(), 8), "vector"), VALID, REASON])
"""Of a made-up model: that of the real one decides the length, and is not there."""
CUTS = (1, 7, WHOLE)
"""Rows per block that everything is tried with."""


class MethodContract:
    """Tests that every method passes; a subclass whose name begins with Test says which it is.

    Attributes:
        method: the class.
        params: its parameters that are not at their defaults, by name.
        rounds: that it scores.
        pool_rows: rows of the made-up pool.
        target_rows: rows of the made-up target.
        tolerance: how far numbers may be apart where only the order of a sum differs.
    """

    method: ClassVar[type[api.Method]]
    params: Mapping[str, Any] = {}
    rounds: ClassVar[tuple[int, ...]] = (1, 2, 3)
    pool_rows: ClassVar[int] = 60
    target_rows: ClassVar[int] = 9
    tolerance: ClassVar[float] = 1e-9

    # ------------------------------------------------------------ the made-up world

    def made(self, **more: Any) -> api.Method:
        """Return the method, with more parameters over those of the class."""
        return build_method("tested", self.method, dict(self.params) | more, "the test")

    def selection(self, number: int, *, accumulates: bool = False) -> api.Selection:
        """Return what the method knows about a round."""
        return api.Selection(
            number, max(self.rounds), 11, lambda line: None, 1e-3, accumulates, (), shared_seed=5
        )

    def rows(self, split: str) -> pa.Table:
        """Return the prepared rows of a split."""
        return prepared_rows(self.pool_rows if split == "pool" else self.target_rows, split)

    def tables(self, needs: Mapping[str, api.Need]) -> Mapping[str, api.BlockTable]:
        """Return the tables that the method needs; override it where random values are not sensible."""
        return {
            key: MemoryTable(
                feature_rows(
                    self.rows(need.split),
                    self.schema(need),
                    need.feature,
                    need.split,
                    need.checkpoint,
                    width=self._width(need),
                )
            )
            for key, need in needs.items()
        }

    def _width(self, need: api.Need) -> int:
        """Return the directions of an influence table: one for each group, or each valid target row."""
        if need.feature != "influence" or params_of(need).directions.per == "group":
            return len(GROUPS)
        valid = np.asarray(self.rows("target").column("valid"))
        also = valid_rows(len(valid), "target_directions", "target", need.checkpoint, share=0.05)
        return int((valid & also).sum())

    def schema(self, need: api.Need) -> pa.Schema:
        """Return the columns of a feature."""
        return (
            EMBEDDINGS
            if need.feature in ("embeddings", "model_embeddings")
            else make_feature(need, Config()).schema
        )

    def begun(self, number: int, cut: int = WHOLE) -> tuple[api.Method, Any, dict[str, api.BlockTable]]:
        """Return the method, its state and its tables at the start of a round."""
        method = self.made()
        selection = self.selection(number, accumulates=method.accumulates and number > 1)
        tables: dict[str, api.BlockTable] = {}
        for key, table in self.tables(method.needs(selection)).items():
            tables[key] = MemoryTable(table.table, cut) if isinstance(table, MemoryTable) else table
        return method, method.begin(tables, selection), tables

    def blocks(
        self, number: int, method: api.Method, tables: Mapping[str, api.BlockTable], max_rows: int
    ) -> Iterator[api.Block]:
        """Yield the pool block by block, as the method sees it."""
        needs = method.needs(self.selection(number))
        features = {key: tables[key] for key, need in needs.items() if need.split == "pool"}
        pool = MemoryTable(self.rows("pool"))
        sources = [(pool, ["row", "row_id", "valid", "reason", *method.pool_columns])]
        sources += [(table, table.schema.names) for table in features.values()]  # type: ignore[misc]
        before = number > 1 and method.accumulates
        if before:
            scores = MemoryTable(self.scored(number - 1))
            sources.append((scores, scores.schema.names))
        for first, *others in zip_blocks(*sources, max_rows=max_rows):
            found = dict(zip(features, others[: len(features)], strict=True))
            yield api.Block(first, found, others[-1] if before else None)

    def scored(self, number: int, max_rows: int = WHOLE, cut: int = WHOLE) -> pa.Table:
        """Return the score table of a round.

        Args:
            number: the round.
            max_rows: rows per block that are scored at a time.
            cut: rows per block in which whole tables are read.
        """
        method, state, tables = self.begun(number, cut)
        schema = pa.schema([*SCORES, *own_columns(method, state)])
        blocks = self.blocks(number, method, tables, max_rows)
        return pa.concat_tables([score_block(method, block, state, schema) for block in blocks])

    def weighed(self, number: int, max_rows: int = WHOLE) -> np.ndarray:
        """Return the weight of every row of a round. [pool_rows]"""
        method, scores = self.made(), self.scored(number).drop_columns(["row_id"])
        fitted = method.fit(MemoryTable(scores, max_rows), self.selection(number))
        return np.concatenate(
            [
                weights(method, block, fitted)
                for block in scores.combine_chunks().to_batches(max_chunksize=max_rows)
            ]
        )

    def assert_alike(self, one: pa.Table, other: pa.Table) -> None:
        """Assert that two tables hold the same, numbers up to the tolerance."""
        assert one.schema.names == other.schema.names
        for name in one.schema.names:
            left, right = one.column(name).combine_chunks(), other.column(name).combine_chunks()
            if pa.types.is_floating(left.type):
                assert left.is_null().equals(right.is_null()), f"{name}: other rows are null"
                numbers, wanted = np.asarray(left.drop_null()), np.asarray(right.drop_null())
                np.testing.assert_allclose(numbers, wanted, rtol=self.tolerance, atol=self.tolerance)
            else:
                assert left.equals(right), f"{name} differs"

    # ------------------------------------------------------------ what holds

    def test_it_declares_what_the_program_reads_and_calls(self) -> None:
        """Attributes, parameters, and functions with the arguments that they are called with."""
        check_method_class(self.method)
        check_method(self.made())
        for number in self.rounds:
            assert method_needs(self.made(), self.selection(number)) is not None

    def test_it_says_what_it_is(self) -> None:
        """Summary, source, strategy, and the meaning of every parameter and column."""
        assert self.method.summary
        assert self.method.source
        assert self.method.default_strategy in get_args(api.Strategy)
        for name, field in self.method.Params.model_fields.items():
            assert field.description, f"{name} has no meaning"
        for number in self.rounds:
            method, state, _ = self.begun(number)
            schema = pa.schema([*SCORES, *own_columns(method, state)])
            assert set(method.group_columns(schema)) <= set(schema.names)
            for own in method.own_columns(state):
                assert own.name not in SCORES.names, f"{own.name} is a column of every score table"
                assert own.nullable, f"{own.name} is null where a row has no score"
                assert (own.metadata or {}).get(b"description"), f"{own.name} has no meaning"

    def test_a_parameter_that_does_not_exist_is_refused_in_three_parts(self) -> None:
        """What was set, why it cannot work, what to do."""
        try:
            self.made(no_such_parameter=1)
        except ConfigError as error:
            assert "no_such_parameter" in error.what
            assert error.why
            assert error.fix
        else:
            raise AssertionError("a parameter that does not exist was taken")

    def test_a_value_of_no_sense_is_taken_or_refused_in_three_parts(self) -> None:
        """Whatever is wrong with a parameter, the error is one for its user."""
        for name in self.method.Params.model_fields:
            for value in (object(), "?", -1, [[]], None):
                try:
                    self.made(**{name: value})
                except ConfigError as error:
                    assert all((error.what, error.why, error.fix)), f"{name}={value!r}"

    def test_needs_are_the_same_each_time_and_plain(self) -> None:
        """Equal needs are computed once, and their parameters go into fingerprints."""
        for number in self.rounds:
            one, two = self.made(), self.made()
            needs = one.needs(self.selection(number))
            assert list(needs) == list(two.needs(self.selection(number)))
            assert needs == one.needs(self.selection(number)) == two.needs(self.selection(number))
            for key, need in needs.items():
                assert need.split in get_args(api.Split), key
                assert not isinstance(need.checkpoint, int) or 0 <= need.checkpoint < number, key
                assert canonical(to_jsonable_python(need.params)), key
                assert make_feature(need, Config()), key

    def test_a_score_is_one_number_per_row_beside_the_declared_columns(self) -> None:
        """Every column that is declared, no other, each as long as the block."""
        for number in self.rounds:
            method, state, tables = self.begun(number)
            declared = {"score", *(own.name for own in method.own_columns(state))}
            for block in self.blocks(number, method, tables, 7):
                found = method.score(block, state)
                assert set(found) - {"reason"} == declared
                for name, values in found.items():
                    assert np.shape(values) == (block.pool.num_rows,), name
                assert np.asarray(found["score"]).dtype == np.float64

    def test_a_row_without_a_value_has_no_score_and_a_reason(self) -> None:
        """Rows that are not valid in the pool or in a feature; every other row has a score."""
        for number in self.rounds:
            method, _, tables = self.begun(number)
            needs = method.needs(self.selection(number))
            valid = np.asarray(self.rows("pool").column("valid"))
            for key, need in needs.items():
                if need.split == "pool":
                    (batch,) = MemoryTable(
                        pa.Table.from_batches(list(tables[key].blocks(["valid"])))
                    ).blocks()
                    valid = valid & np.asarray(batch.column("valid"))
            table = self.scored(number)
            assert valid.any()
            assert table.column("valid").to_numpy().tolist() == valid.tolist()
            for name in set(table.schema.names) - {"row", "row_id", "valid", "reason"}:
                assert not table.filter(~valid).column(name).drop_null(), name
            assert [text is None for text in table.column("reason").to_pylist()] == valid.tolist()
            assert np.isfinite(np.asarray(table.filter(valid).column("score"))).all()

    def test_scores_do_not_depend_on_how_blocks_are_cut(self) -> None:
        """Neither those that are scored nor those in which whole tables are read."""
        for number in self.rounds:
            whole = self.scored(number)
            for cut in CUTS:
                self.assert_alike(self.scored(number, max_rows=cut), whole)
                self.assert_alike(self.scored(number, cut=cut), whole)

    def test_the_same_seed_gives_the_same_scores_and_weights(self) -> None:
        """Bit for bit."""
        for number in self.rounds:
            assert self.scored(number).equals(self.scored(number))
            assert self.weighed(number).tobytes() == self.weighed(number).tobytes()

    def test_weights_are_finite_and_not_negative(self) -> None:
        """Of every row with a score, and not all of them 0."""
        for number in self.rounds:
            valid = self.scored(number).column("valid").to_numpy()
            weights = self.weighed(number)
            assert weights.shape == (self.pool_rows,)
            assert np.isfinite(weights[valid]).all()
            assert (weights[valid] >= 0).all()
            assert weights[valid].sum() > 0

    def test_weights_do_not_depend_on_how_blocks_are_cut(self) -> None:
        """Every block is weighed twice, and never the same blocks as it was scored in."""
        for number in self.rounds:
            valid = self.scored(number).column("valid").to_numpy()
            whole = self.weighed(number)[valid]
            for cut in CUTS:
                np.testing.assert_allclose(
                    self.weighed(number, cut)[valid], whole, rtol=self.tolerance, atol=0
                )

    def test_a_higher_score_is_better(self) -> None:
        """Where the best rows are taken by default, weights do not fall as scores rise."""
        if self.method.default_strategy != "top_k":
            return
        for number in self.rounds:
            table = self.scored(number)
            valid = table.column("valid").to_numpy()
            scores = np.asarray(table.column("score").combine_chunks().filter(pa.array(valid)))
            assert (np.diff(self.weighed(number)[valid][np.argsort(scores, kind="stable")]) >= 0).all()

    def test_target_rows_rank_the_pool_alike_however_blocks_are_cut(self) -> None:
        """One number per pool row and target row, for methods that rank by target row."""
        for number in self.rounds:
            method, _, tables = self.begun(number)
            if not method.ranks_by_target_row:
                continue
            needs = method.ranking_needs(self.selection(number))
            if needs != method.needs(self.selection(number)):
                tables = dict(self.tables(needs))
            ranking = target_ranking(method, tables, self.selection(number))
            assert len(set(ranking.rows.tolist())) == len(ranking.rows)
            assert set(ranking.rows.tolist()) <= set(range(self.target_rows))
            found = [
                np.concatenate([ranking.values(b) for b in self.blocks(number, method, tables, cut)])
                for cut in CUTS
            ]
            valid = self.scored(number).column("valid").to_numpy()
            for values in found:
                assert values.shape == (self.pool_rows, len(ranking.rows))
                np.testing.assert_allclose(values[valid], found[-1][valid], rtol=1e-5, atol=1e-5)
