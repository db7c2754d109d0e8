"""The story of a row of the pool: where it came from, its scores, what it is like, where it was selected.

All of it is read from the run's finished tables, as they are; nothing is computed with a model. A rank is the
place among the rows that have a score, best first, ties by row: the order in which ``top_k`` takes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_pipeline.data.sources.named import resolve_sources
from dataflex_pipeline.errors import UserError
from dataflex_pipeline.gradients.similarity import PREFIX
from dataflex_pipeline.pipeline.decoding import Decode, decoder
from dataflex_pipeline.pipeline.open_run import OpenRun
from dataflex_pipeline.pipeline.prepare import data_settings
from dataflex_pipeline.pipeline.row_gradients import agreements
from dataflex_pipeline.pipeline.row_likeness import Likeness, likenesses
from dataflex_pipeline.pipeline.row_search import open_pool, row_number, same_conversation
from dataflex_pipeline.schemas import IGNORED, ORIGINAL, SCORES, own_names
from dataflex_pipeline.store.parquet import read_line
from dataflex_pipeline.store.run import RoundFolder
from dataflex_pipeline.store.stale import is_complete
from dataflex_pipeline.store.tables import TableFile

LABELLED = "assistant"


@dataclass(frozen=True)
class Stretch:
    """A piece of the conversation. text: as the model reads it. learnt: whether it is labelled."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class Place:
    """A value and its rank.

    Attributes:
        value: a score or similarity; None where the row has none.
        rank: from 1, among the rows that have one; None where this row has none.
        of: rows that have one.
    """

    value: float | None
    rank: int | None
    of: int


@dataclass(frozen=True)
class RowScore:
    """What one method in one round says of the row.

    Attributes:
        round: number of the round.
        method: configuration name.
        score: with its rank.
        reason: why there is no score; None where there is one.
        probability: of being drawn; None where there is no table.
        groups: similarity to each target group, with its rank.
        columns: the method's other columns.
    """

    round: int
    method: str
    score: Place
    reason: str | None
    probability: float | None
    groups: Mapping[str, Place]
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Chosen:
    """Whether the selection of a round has the row.

    Attributes:
        round: number of the round.
        method: whose scores it was made from; uniform for a draw without scores.
        selected: whether it has the row.
        rank: in the selection, from 1; None without a table of selected rows.
        of: rows of the selection, else positions of the index.
        positions: in the index, where the round trains on the row.
        weight: in the loss.
        probability: with which it was drawn.
        trained: whether the round is trained.
        name: of a selection beside the round's own, on which nothing is trained; None for the round's.
    """

    round: int
    method: str
    selected: bool
    rank: int | None
    of: int
    positions: tuple[int, ...]
    weight: float | None
    probability: float | None
    trained: bool
    name: str | None = None


@dataclass(frozen=True)
class RowStory:
    """All that a run knows of a row.

    Attributes:
        row, row_id, source, valid, reason, note, n_tokens, n_response_tokens: as in the pool.
        file: name of its file within the data set; None where it is not known, or on the hub.
        line: place there, from 1.
        path: where that file lies now; None where it is not found.
        original: the row's own columns.
        conversation: what the model reads, cut where labels begin and end.
        exact: whether that is decoded from the row's tokens; else turns stand for it.
        scores: of every round and method.
        embeddings, gradients: the target rows that it is most like.
        selections: of every round that has one.
        same: other rows of the same conversation, the first ten at most.
        notices: what could not be told.
    """

    row: int
    row_id: str
    source: str
    file: str | None
    line: int | None
    path: str | None
    valid: bool
    reason: str | None
    note: str | None
    n_tokens: int
    n_response_tokens: int
    original: Mapping[str, Any]
    conversation: tuple[Stretch, ...]
    exact: bool
    scores: tuple[RowScore, ...]
    embeddings: tuple[Likeness, ...]
    gradients: tuple[Likeness, ...]
    selections: tuple[Chosen, ...]
    same: tuple[int, ...]
    notices: tuple[str, ...]


def row_story(run: OpenRun, asked: int | str, gradients: bool = False) -> RowStory:
    """Return all that a run knows of a row.

    Args:
        run: whose pool.
        asked: the row's number, or the beginning of its row_id.
        gradients: take the gradients of scores that kept none, and name the target rows that agree most.

    Raises:
        RunError: the pool is not prepared.
        UserError: there is no such row, or there are several.
    """
    run = OpenRun(run.loaded, run.store, reads_only=True)  # one that never makes the demo
    pool = open_pool(run)
    number = row_number(pool, asked)
    found = pool.take(np.array([number]), pool.schema.names).to_pylist()[0]
    notices: list[str] = []
    conversation, exact = _conversation(run, found, bool(pool.ingredients.get("mask_history")), notices)
    like = likenesses(run.store, number, notices, taken_anew=gradients)
    if gradients:
        like += agreements(run, number, notices)
    return RowStory(
        **{name: found[name] for name in ("row", "row_id", "source", "valid", "reason")},
        **{name: found.get(name) for name in ("note", "file", "line")},
        **{name: found[name] for name in ("n_tokens", "n_response_tokens")},
        path=_path(run, found, notices),
        original={name: found[ORIGINAL + name] for name in own_names(found)},
        conversation=conversation,
        exact=exact,
        scores=tuple(_scores(run, number, found["row_id"], notices)),
        embeddings=tuple(each for each in like if each.kind == "embeddings"),
        gradients=tuple(each for each in like if each.kind == "gradients"),
        selections=tuple(
            each
            for where in map(run.store.round, run.store.rounds())
            for each in (*_selection(where, number), *_named(where, number))
        ),
        same=same_conversation(pool, number, found["row_id"]),
        notices=tuple(dict.fromkeys(notices)),
    )


def _path(run: OpenRun, found: Mapping[str, Any], notices: list[str]) -> str | None:
    """Return where the file of a row lies; what stands in the way is said."""
    if found.get("line") is None:
        notices.append("the pool was prepared by an earlier version, which did not record file and line")
    if found.get("file") is None:
        return None
    try:
        sources = resolve_sources(data_settings(run, "pool"))
    except UserError as error:
        notices.append(f"the data set is not where it was: {error.what}")
        return None
    for source in sources:
        for path in source.files if source.name == found["source"] else ():
            if source.file_name(path) == found["file"]:
                return str(path)
    notices.append(f"the data set {found['source']} has no file {found['file']} any more")
    return None


# The conversation


def _conversation(
    run: OpenRun, found: Mapping[str, Any], last_only: bool, notices: list[str]
) -> tuple[tuple[Stretch, ...], bool]:
    """Return the conversation in stretches, and whether they are exact."""
    decode = decoder(run, found["input_ids"], notices) if found["input_ids"] else None
    if decode is not None:
        return _decoded(found, decode), True
    turns = found["messages"]
    answers = [place for place, turn in enumerate(turns) if turn["role"] == LABELLED]
    learnt = set(answers[-1:] if last_only else answers) if found["valid"] else set()
    made = [
        Stretch(f"{turn['role']}: {turn['content']}", place in learnt) for place, turn in enumerate(turns)
    ]
    return tuple(made), False


def _decoded(found: Mapping[str, Any], decode: Decode) -> tuple[Stretch, ...]:
    pairs = zip(found["input_ids"], found["labels"], strict=True)
    return tuple(
        Stretch(decode([token for token, _ in stretch]), learnt)
        for learnt, stretch in groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    )


# Scores and ranks


def _scores(run: OpenRun, row: int, row_id: str, notices: list[str]) -> Iterator[RowScore]:
    for number in run.store.rounds():
        where = run.store.round(number)
        for path in sorted((where.folder / "scores").glob("*.parquet")):
            line = read_line(path, row)
            if line is None or (line["row"], line["row_id"]) != (row, row_id):
                notices.append(f"the {path.stem} scores of round {number} are of another pool")
            else:
                yield _score(where, path, line)


def _score(where: RoundFolder, path: Path, line: Mapping[str, Any]) -> RowScore:
    groups = [name for name in line if name.startswith(PREFIX)]
    placed = _ranked(TableFile(path), line, ["score", *groups])
    drawn = where.probabilities(path.stem)
    probability = read_line(drawn, line["row"], ["probability"]) if drawn.is_file() else None
    return RowScore(
        where.number,
        path.stem,
        placed["score"],
        line["reason"],
        None if probability is None else probability["probability"],
        {name.removeprefix(PREFIX): placed[name] for name in groups},
        {name: value for name, value in line.items() if name not in (*SCORES.names, *groups)},
    )


def _ranked(table: TableFile, line: Mapping[str, Any], names: Sequence[str]) -> dict[str, Place]:
    """Return value and rank of the row of a line, by each of some columns, in one pass."""
    own = {name: line[name] if line["valid"] else None for name in names}
    counts, better = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for block in table.blocks(["row", "valid", *names]):
        rows = block.column("row").to_numpy()
        valid = block.column("valid").to_numpy(zero_copy_only=False)
        for name in names:
            values = block.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
            usable = valid & ~np.isnan(values)
            counts[name] += int(usable.sum())
            if own[name] is not None:
                first = (values > own[name]) | ((values == own[name]) & (rows < line["row"]))
                better[name] += int((usable & first).sum())
    return {
        name: Place(value, None if value is None else better[name] + 1, counts[name])
        for name, value in own.items()
    }


# Selections


def _selection(where: RoundFolder, row: int) -> Iterator[Chosen]:
    """Yield what a round's selection and index say of a row; nothing where it has neither."""
    ranked = TableFile(where.selection) if where.selection.is_file() else None
    index = TableFile(where.index) if where.index.is_file() else None
    table = ranked or index
    if table is None:
        return
    taken = _lines(ranked, row) if ranked is not None else []
    places = _lines(index, row) if index is not None else []
    lines = taken or places
    yield Chosen(
        where.number,
        table.metadata.get("method", "uniform"),
        bool(lines),
        int(taken[0]["rank"]) if taken else None,
        table.n_rows,
        tuple(each["position"] for each in places),
        lines[0]["weight"] if lines else None,
        lines[0]["probability"] if lines else None,
        is_complete(where.checkpoint),
    )


def _named(where: RoundFolder, row: int) -> Iterator[Chosen]:
    """Yield what the selections with a name say of a row."""
    for path in where.named_selections():
        table = TableFile(path)
        lines = _lines(table, row)
        first = lines[0] if lines else {"rank": None, "weight": None, "probability": None}
        yield Chosen(
            where.number,
            table.metadata.get("method", "uniform"),
            bool(lines),
            first["rank"],
            table.n_rows,
            (),
            first["weight"],
            first["probability"],
            False,
            path.parent.name,
        )


def _lines(table: TableFile, row: int) -> list[dict[str, Any]]:
    """Return the lines of a table that are of a row."""
    wanted = ("rank", "position", "row", "weight", "probability")
    names = [name for name in wanted if name in table.schema.names]
    found = []
    for block in table.blocks(names):
        at = np.flatnonzero(block.column("row").to_numpy() == row)
        found += block.take(at).to_pylist()
    return found
