"""Rows that cannot be used, in a report: one line per reason, however many tables have them."""

from dataflex_pipeline.data.rows import reasons_text, rows_said
from dataflex_pipeline.reports.page.cautions import not_usable


def reason(text, *first, rows=None):
    return {"reason": text, "rows": len(first) if rows is None else rows, "first": list(first)}


def test_a_bad_row_of_the_pool_is_named_once():
    bad = [reason("empty response", 3, 8), reason("no assistant turn", 5)]
    views = ["pool", "losses_pool_after_0", "losses_pool_after_1", "scores_1_loss", "scores_2_loss"]
    found = not_usable(dict.fromkeys(views, bad), dict.fromkeys(views, "pool"))
    assert found == [
        "pool: 2 rows not usable: empty response (rows 3, 8)",
        "pool: 1 row not usable: no assistant turn (row 5)",
    ]


def test_what_failed_later_is_said_of_the_tables_in_which_it_did():
    late = [reason("the loss is not finite", 1, 2, 4, rows=40)]
    seen = {
        "pool": [],
        "target": [reason("empty prompt", 0)],
        "losses_pool_after_1": late,
        "scores_2_loss": late,
    }
    splits = dict.fromkeys(seen, "pool") | {"target": "target"}
    assert not_usable(seen, splits) == [
        "target: 1 row not usable: empty prompt (row 0)",
        "losses_pool_after_1, scores_2_loss: 40 rows not usable: the loss is not finite (rows 1, 2, 4, ...)",
    ]
    many = dict.fromkeys("abcde", late)
    (line,) = not_usable(many, dict.fromkeys(many, "pool"))
    assert line.startswith("a, b, c and 2 more tables: 40 rows")


def test_reasons_that_differ_in_numbers_only_are_one_line():
    seen = {
        "pool": [reason(f"turn {n} has no 'role{n}'", n, rows=n) for n in (1, 2, 3)],
        "losses_pool_after_0": [reason(f"turn {n} has no 'role{n}'", n, rows=n) for n in (1, 2, 3)],
    }
    assert not_usable(seen, dict.fromkeys(seen, "pool")) == [
        "pool: 6 rows not usable: turn 1 has no 'role1' (rows 1, 2, 3, ...; 2 more such reasons)"
    ]


def test_rows_by_number():
    assert rows_said([3], 1) == "row 3"
    assert rows_said([3, 8], 2) == "rows 3, 8"
    assert rows_said([3, 8, 11], 12) == "rows 3, 8, 11, ..."
    told = reasons_text({"a": 1, "b": 5}, {"a": [7], "b": [0, 1, 2]})
    assert told == "5 x b (rows 0, 1, 2, ...); 1 x a (row 7)"
