"""Quotas of sources: the number of rows that each gives, and the order they are laid out in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from dataflex_pipeline.api import BlockTable
from dataflex_pipeline.config.draw_rules import exact
from dataflex_pipeline.errors import ConfigError, did_you_mean
from dataflex_pipeline.sampling.rows import ScoreTable, count_by_source, count_valid, source_names
from dataflex_pipeline.sampling.settings import DrawSettings
from dataflex_pipeline.sampling.uniforms import Integers


def allot(total: int, shares: Mapping[str, float]) -> list[int]:
    """Split a number of rows (or tokens) by shares, by largest remainder, so that the sum is right.

    Args:
        total: what there is to split.
        shares: share of each source; what is missing to 1 goes to all others together.

    Returns:
        One number per share, in order, then the others'. Every number is within 1 of its exact share;
        equal remainders go to the source named first. [len(shares) + 1], summing to ``total``
    """
    fractions = [exact(share) for share in shares.values()]
    fractions.append(max(Fraction(0), 1 - sum(fractions, Fraction(0))))
    wanted = [share * total for share in fractions]
    given = [math.floor(number) for number in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda i: (given[i] - wanted[i], i))
    for i in by_remainder[: max(0, total - sum(given))]:
        given[i] += 1
    return given


def amounts_of(settings: DrawSettings, ranked: BlockTable, pool: BlockTable) -> list[int]:
    """Return the rows (with ``token_budget``: tokens) that each quota gives; one number without quotas.

    Raises:
        ConfigError: a quota names a source that the pool does not have, or the quotas leave rows to
            other sources and there are none.
        DataError: ``fraction`` of no valid row.
    """
    total = asked_for(settings, ranked)
    if not settings.source_quotas:
        return [total]
    return check_quotas(settings.source_quotas, source_names(pool), total)


def asked_for(settings: DrawSettings, ranked: BlockTable) -> int:
    """Return the rows (with ``token_budget``: tokens) that are asked for altogether.

    Raises:
        DataError: ``fraction`` of no valid row.
    """
    if settings.token_budget is not None:
        return settings.token_budget
    if settings.fraction is not None:
        table = ranked.whole if isinstance(ranked, ScoreTable) else ranked
        return math.ceil(exact(settings.fraction) * count_valid(table))
    return settings.positions if settings.num_samples is None else settings.num_samples


def balance(settings: DrawSettings, ranked: BlockTable, pool: BlockTable) -> tuple[DrawSettings, list[int]]:
    """Return the settings with a quota for every source that has valid rows, and what each quota gives.

    The quotas are equal. But a source that has fewer rows than its part gives all of them, and the others
    share what is left, smallest first (not with a token budget, or with replacement).

    Args:
        settings: how many rows are asked for. ranked: with ``valid``. pool: with ``source``.
    """
    there = count_by_source(ranked, pool)
    names = sorted(there, key=lambda name: (there[name], name))
    shares = dict.fromkeys(names, 1 / len(names))
    left = asked_for(settings, ranked)
    settings = replace(settings, source_quotas=shares, balanced=False)
    if settings.token_budget is not None or settings.replacement:
        return settings, allot(left, shares)
    given = []
    for number, name in enumerate(names):
        given.append(min(there[name], left // (len(names) - number)))
        left -= given[-1]
    # What is left over once every source was asked is more than there is.
    return settings, [*given[:-1], given[-1] + left, 0]


def check_quotas(quotas: Mapping[str, float], sources: Sequence[str], total: int) -> list[int]:
    """Return what each quota gives of a total, and the others together.

    Raises:
        ConfigError: a quota names none of the sources, or all are named and something is left over.
    """
    for name in quotas:
        if name not in sources:
            raise ConfigError(
                f"source_quotas names '{name}', which is no source of the pool.{did_you_mean(name, sources)}",
                f"The sources are: {', '.join(sources[:20])}{', ...' if len(sources) > 20 else ''}.",
                "Name sources as the pool's source column does.",
            )
    given = allot(total, quotas)
    if given[-1] and len(sources) == len(quotas):
        share = float(sum(map(exact, quotas.values()), Fraction(0)))
        raise ConfigError(
            f"source_quotas sum to {share:.6g} and name every source of the pool.",
            f"The remaining {given[-1]} of {total} would have to come from other sources; there are none.",
            "Make the shares sum to 1, or leave a source out of them.",
        )
    return given


def interleave(counts: Sequence[int]) -> Integers:
    """Return an order of rows listed source after source that mixes the sources evenly.

    Row j of a source's n stands at (j + 1/2)/n of the way, so that every beginning of the order has about
    the sources' shares and each source keeps its own order; ties go to the source listed first.

    Args:
        counts: rows of each source.

    Returns:
        Positions in the list. [sum(counts)] int64
    """
    places = [(np.arange(count) + 0.5) / count for count in counts if count]
    return np.argsort(np.concatenate(places), kind="stable") if places else np.empty(0, np.int64)
