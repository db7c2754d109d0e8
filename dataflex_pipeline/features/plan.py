"""The plan of a feature table: its class, parameters, inputs and fingerprint, before anything is computed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ValidationError

from dataflex_pipeline import launch
from dataflex_pipeline.api import Feature, FeatureInput, Method, Need, Params, Selection
from dataflex_pipeline.config.explain import explain
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.declared import broken, is_own
from dataflex_pipeline.declared.feature import check_feature, check_feature_class
from dataflex_pipeline.declared.feature import ingredients as own_ingredients
from dataflex_pipeline.errors import ConfigError
from dataflex_pipeline.features.candidates import Candidates, CandidateTable, Cascade
from dataflex_pipeline.features.needs import checked_needs
from dataflex_pipeline.launch.team import Place
from dataflex_pipeline.store.fingerprint import digest, file_digest
from dataflex_pipeline.store.parts import MANIFEST, PartedTable
from dataflex_pipeline.store.stale import MARKER

Key = tuple[str, int | str | None, int | None]
"""Split, round and step: what the inputs of a feature depend on."""
FEATURES = (
    "density",
    "embeddings",
    "generations",
    "grades",
    "gradients",
    "influence",
    "losses",
    "model_embeddings",
    "neighbours",
    "policy_gradients",
    "response_losses",
    "rewards",
    "score_losses",
    "target_directions",
    "words",
)
DEEPEST = 16
"""Features below one another; the shipped ones are two deep."""
OF_GRADIENTS = ("gradients", "influence", "target_directions")
"""Those that take the gradients of rows."""


@dataclass(frozen=True)
class FeaturePlan:
    """A feature table worked out and not yet computed.

    Attributes:
        need: what is asked for. feature: made from it. given: the rows and the checkpoint.
        upstream: plans of the features that it is computed from, by the feature's own names.
        rows_per_part: rows of the split per part (auto: part_size.py finds them before the first one);
            batches are formed inside a part. No part of the ingredients: a table that was begun with another
            number goes on with that one.
        ingredients: what the table is made from; their digest is the fingerprint of the table on disk.
        cascade: the candidates that the pool's features are restricted to; None for every row.
        through: the candidates that the table, which holds every row, is read through; None where it is read
            as it is.
    """

    need: Need
    feature: Feature
    given: FeatureInput
    upstream: Mapping[str, FeaturePlan]
    rows_per_part: int | Literal["auto"]
    ingredients: dict[str, Any]
    cascade: Cascade | None = None
    through: Candidates | None = None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the table as it is read."""
        own = digest(self.ingredients)
        return own if self.through is None else digest({"table": own, "candidates": self.through.digest})

    @property
    def rows(self) -> PartedTable:
        """The rows that it is computed over."""
        if not isinstance(self.given.table, PartedTable):
            raise TypeError("features are computed over a parted table")
        return self.given.table

    def with_upstream(self) -> Iterator[FeaturePlan]:
        """Yield the plans of the tables that it is computed from, and then itself."""
        for inner in self.upstream.values():
            yield from inner.with_upstream()
        yield self

    def folder(self, features: Path) -> Path:
        """Return the table's folder: name, split and the head of its fingerprint."""
        return features / f"{self.need.name}-{self.need.split}-{digest(self.ingredients)[:16]}"


def feature_class(need: Need) -> type[Feature]:
    """Return the class of the feature that a need names.

    Raises:
        ConfigError: there is no such feature.
    """
    if need.kind is not None:
        if is_own(need.kind):
            check_feature_class(need.kind, FEATURES)
        return need.kind
    if need.name not in FEATURES:
        raise ConfigError(
            f"A method asks for the feature '{need.name}'.",
            f"The features are: {', '.join(FEATURES)}.",
            "Correct the method's needs(); a feature of your own is named by its class, or my_file.py:Class.",
        )
    module = importlib.import_module(f"dataflex_pipeline.features.{need.name}")
    kind: type[Feature] = getattr(module, need.name.title().replace("_", ""))
    return kind


def params_of(need: Need) -> Any:
    """Return the checked parameters of a need, an instance of its feature's Params.

    Raises:
        ConfigError: a value cannot be used.
    """
    if isinstance(need.params, Params):
        return need.params
    kind = feature_class(need).Params
    try:
        return kind(**need.params)
    except ValidationError as error:
        raise explain(error, kind, need.name, place="a method's needs()") from error


def make_feature(need: Need, config: Any) -> Feature:
    """Make the feature that a need names.

    Raises:
        ConfigError: there is no such feature, or a parameter cannot be used.
    """
    kind = feature_class(need)
    feature = kind(params_of(need), config)
    if is_own(kind):
        check_feature(feature)
    return feature


def method_needs(method: Method, selection: Selection) -> dict[str, Need]:
    """Return what a method needs, each with its checkpoint.

    Raises:
        ConfigError: they are no needs, or cannot be met.
    """
    needs = checked_needs(method, "needs()", method.needs(selection), feature_class, selection.round - 1)
    return with_rounds(needs, selection)


def ranking_needs(method: Method, selection: Selection) -> dict[str, Need]:
    """Return what a method ranks the pool by target row with, each with its checkpoint.

    Raises:
        ConfigError: they are no needs, or cannot be met.
    """
    asked, last = method.ranking_needs(selection), selection.round - 1
    return with_rounds(checked_needs(method, "ranking_needs()", asked, feature_class, last), selection)


def with_rounds(needs: Mapping[str, Need], selection: Selection) -> dict[str, Need]:
    """Return needs, each with its checkpoint: where none is named, that of the round before."""
    return {
        key: replace(need, checkpoint=selection.round - 1)
        if need.checkpoint is None and feature_class(need).uses_model
        else need
        for key, need in needs.items()
    }


def with_upstream(need: Need, config: Any, above: tuple[Need, ...] = ()) -> Iterator[tuple[Need, Feature]]:
    """Yield the features that a feature is computed from, and then itself, each with its need.

    Args:
        need: of it. config: the run's configuration. above: what is computed from it, as far as is known.
    """
    feature = make_feature(need, config)
    for inner in _upstream_needs(feature, need, above).values():
        yield from with_upstream(inner, config, (*above, need))
    yield need, feature


def _upstream_needs(feature: Feature, need: Need, above: tuple[Need, ...]) -> dict[str, Need]:
    """Return what a feature is computed from; where no checkpoint is named, at that of the feature itself.

    Raises:
        ConfigError: the feature takes no model by its own word, and one that it is computed from does; it is
            computed from itself, whatever lies between; or there is no end of what lies below it.
    """
    found = {}
    for key, inner in checked_needs(feature, "needs()", feature.needs(need), feature_class).items():
        if inner.checkpoint is None and feature_class(inner).uses_model:
            if not feature.uses_model:
                raise ConfigError(
                    f"The feature {need.name} says uses_model = False, and is computed from {inner.name}.",
                    f"{inner.name} is computed with a model, and no round says which one.",
                    f"Leave uses_model out of {need.name}, or name the checkpoint in its needs().",
                )
            inner = replace(inner, checkpoint=need.checkpoint, step=need.step)
        wrong = _no_end(inner, (*above, need))
        if wrong is not None:
            others = "A feature is computed from others: another split, other parameters, another checkpoint."
            raise broken(feature, "needs()", wrong, others)
        found[key] = inner
    return found


def _no_end(inner: Need, above: tuple[Need, ...]) -> str | None:
    """Return what is wrong with asking for a feature below others; None where nothing is."""
    if inner == above[-1]:
        return f"asks for {inner.name} of the {inner.split} itself"
    if inner in above:
        circle = [each.name for each in (*above[above.index(inner) :], inner)]
        return f"closes a circle of the {inner.split}: {' from '.join(circle)}"
    if len(above) < DEEPEST:
        return None
    return (
        f"asks for one more feature below {len(above)}: {' from '.join(each.name for each in above[-3:])}..."
    )


def plan_feature(
    need: Need,
    config: Any,
    given: Callable[[Need], FeatureInput],
    rows_per_part: int | Literal["auto"],
    cascade: Cascade | None = None,
    above: tuple[Need, ...] = (),
) -> FeaturePlan:
    """Work out a feature table and those that it is computed from.

    Args:
        need: what is asked for. config: the run's configuration.
        given: finds the rows and the checkpoint that a need speaks of.
        rows_per_part: rows of the split per part, or auto.
        cascade: the candidates that the pool's features are restricted to; None: every row.
        above: what is computed from it, as far as is known.
    """
    feature, found = make_feature(need, config), given(need)
    upstream = {
        key: plan_feature(inner, config, given, rows_per_part, cascade, (*above, need))
        for key, inner in _upstream_needs(feature, need, above).items()
    }
    ingredients = _ingredients(need, feature, found, upstream)
    through = None
    if cascade is not None and need.split == "pool":
        # A row's own feature is the same whatever rows are beside it; one made from other tables may not be.
        if not upstream and digest(ingredients) in cascade.whole:
            through = cascade.candidates
        else:
            ingredients["candidates"] = cascade.candidates.digest
            found = replace(found, table=_restricted(found.table, cascade.candidates))
    return FeaturePlan(need, feature, found, upstream, rows_per_part, ingredients, cascade, through)


def _restricted(table: Any, candidates: Candidates) -> Any:
    """Return the pool's rows seen through candidates; None where only fingerprints are looked at."""
    return None if table is None else CandidateTable(table, candidates)


def _ingredients(
    need: Need, feature: Feature, found: FeatureInput, upstream: Mapping[str, FeaturePlan]
) -> dict[str, Any]:
    """Return what a feature table of every row is made from."""
    file = _own_file(type(feature))
    found_by_itself = feature.ingredients() if file is None else own_ingredients(feature)
    ingredients = {
        "feature": need.name,
        "version": feature.version,
        "split": need.split,
        "params": feature.params.model_dump(mode="json"),
        "rows": found.fingerprint,
        "checkpoint": found.checkpoint_fingerprint,
        **found_by_itself,
    }
    if file is not None:
        ingredients["implementation"] = f"file {file_digest(file)}"
    if upstream:
        ingredients["features"] = {key: plan.fingerprint for key, plan in upstream.items()}
    return ingredients


def _own_file(kind: type[Feature]) -> Path | None:
    """Return the file of a feature of the user's own; None for a shipped one."""
    return Path(inspect.getfile(kind)) if is_own(kind) else None


def plain_need(need: Need) -> dict[str, Any]:
    """Return a need as plain values, for another process of the launch."""
    file = None if need.kind is None else _own_file(need.kind)
    return {
        "feature": need.name if file is None or need.kind is None else f"{file}:{need.kind.__qualname__}",
        "split": need.split,
        "checkpoint": need.checkpoint,
        "params": params_of(need).plain(),
        "step": need.step,
    }


class SentPlan(BaseModel):
    """A plan as another process of the launch is told it, which works it out again.

    Attributes:
        inputs: need, rows, checkpoint and its fingerprint of each feature that it is computed from, and last
            its own.
        rows_per_part: that rank 0 has found.
        cascade: the scores that tell the candidates, how many they are, and the tables that are read through
            them; None for every row.
    """

    inputs: list[tuple[dict[str, Any], Place, Place | None, str | None]]
    rows_per_part: int
    cascade: tuple[Place, int, list[str]] | None

    @classmethod
    def of(cls, plan: FeaturePlan, rows_per_part: int) -> Self:
        """Return what the others are told of a plan."""
        inputs = [
            (plain_need(one.need), one.rows.folder, one.given.checkpoint, one.given.checkpoint_fingerprint)
            for one in plan.with_upstream()
        ]
        chosen = plan.cascade
        cascade = chosen and (chosen.candidates.scores, chosen.candidates.count, sorted(chosen.whole))
        return cls(inputs=inputs, rows_per_part=rows_per_part, cascade=cascade)

    def worked_out(self, config: Config) -> FeaturePlan:
        """Return the plan, its inputs opened as soon as they are visible here."""
        given: dict[Key, FeatureInput] = {}
        for need, folder, checkpoint, fingerprint in self.inputs:
            rows = opened(folder)
            if checkpoint is not None:
                launch.await_file(checkpoint / MARKER)
            given[_key(Need(**need))] = FeatureInput(rows, rows.fingerprint, checkpoint, fingerprint)
        cascade = None
        if self.cascade is not None:
            scores, count, whole = self.cascade
            launch.await_file(scores)
            cascade = Cascade(Candidates.best(scores, count), frozenset(whole))
        own = Need(**self.inputs[-1][0])
        return plan_feature(own, config, lambda need: given[_key(need)], self.rows_per_part, cascade)


def seen(table: PartedTable, plan: FeaturePlan) -> PartedTable:
    """Return a table of every row as its plan reads it."""
    return table if plan.through is None else CandidateTable(table, plan.through)


def opened(folder: Path) -> PartedTable:
    """Open a table that rank 0 has opened and checked, as soon as it is visible here."""
    launch.await_file(folder / MANIFEST)
    return PartedTable.reopen(folder)


def _key(need: Need) -> Key:
    return need.split, need.checkpoint, need.step
