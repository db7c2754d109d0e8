"""A look at a run or a table, or the answer to a query, printed in the form that was asked for."""

from __future__ import annotations

from dataflex_pipeline.reports.look import Wanted, look, overview
from dataflex_pipeline.reports.query import open_queries
from dataflex_pipeline.reports.subject import Subject
from dataflex_pipeline.seeds import derive_seed
from dataflex_pipeline.terminal import answers, drawing

SEED = derive_seed(0, "inspect") % 2**31
"""Of the rows that are shown by chance: the same ones every time."""


def show(subject: Subject, sql: str | None, how: answers.Form, n_rows: int) -> None:
    """Print a run or a table, or answer a query over its tables.

    Args:
        subject: what is looked at.
        sql: the query, if there is one.
        how: for people, or as JSON or CSV.
        n_rows: example rows of each kind.

    Raises:
        UserError: there is no such table, or the query cannot be answered.
    """
    tables, this = subject.tables()
    with open_queries(tables, this) as queries:
        if sql is not None:
            answers.show(queries.ask(sql), how)
        elif this is not None:
            found = look(queries, this, tables, Wanted(n_rows, SEED))
            if not answers.print_machine(found, found["numbers"], how):
                drawing.draw_table(found)
        elif subject.run is not None:
            found = overview(queries, subject.run, tables)
            if not answers.print_machine(found, found["tables"], how):
                drawing.draw_run(found, subject.again)
