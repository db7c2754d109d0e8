"""Items that are made ahead of time: the same ones, in order, with their errors, and never too many."""

from __future__ import annotations

import threading

import pytest

from dataflex_pipeline.ahead import ahead


@pytest.mark.parametrize("n", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_items_are_the_same(n, count):
    assert list(ahead(iter(range(n)), count)) == list(range(n))
    assert list(ahead(iter([None] * n), count)) == [None] * n


def test_no_more_are_made_than_may_wait():
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    for number in ahead(items(), 3):
        assert len(made) <= number + 4


def test_they_are_made_elsewhere():
    def items():
        yield threading.get_ident()

    assert list(ahead(items())) != [threading.get_ident()]


def test_an_error_comes_at_its_place():
    def items():
        yield 1
        yield 2
        raise OSError("disk")

    found = []
    with pytest.raises(OSError, match="disk"):
        found.extend(iter_into(found, ahead(items())))
    assert found == [1, 2]


def iter_into(found, items):
    for item in items:
        found.append(item)
    return []


def test_whoever_stops_early_leaves_no_thread():
    before = threading.active_count()
    stream = ahead(iter(range(100)))
    assert next(stream) == 0
    stream.close()
    assert threading.active_count() == before
