"""Columns that the viewer's page adds to its table to colour the map by: expressions, no copy of the table.

To colour points, the page numbers the values of a column: it asks for a column ``__ev_NAME_id`` to be added
to the table, and sets it. The table is a view over a file that is only read, so the column becomes an
expression of that view. Any other change is refused.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING

from dataflex_pipeline.reports.viewer.page import TABLE

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ROWS = "rows_of_the_file"
"""The view of the file itself."""
_NAME = r'("__ev_(?:[^"]|"")+_id")'
_ADDED = re.compile(
    rf"\s*alter table {TABLE} add column if not exists {_NAME} integer default 0;"
    rf"\s*update {TABLE}\s+set \1 =\s(?P<value>.+)",
    re.IGNORECASE | re.DOTALL,
)
_CHANGED = re.compile(
    rf"\s*update {TABLE}\s+set {_NAME} =\s(?P<value>.+?)\s+where\s(?P<where>.+)", re.IGNORECASE | re.DOTALL
)


class Colours:
    """The added columns of one database, whose view ``ROWS`` is there.

    Args:
        connection: where the view ``TABLE`` is made, at first without added columns.
    """

    def __init__(self, connection: DuckDBPyConnection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._columns: dict[str, str] = {}
        self._make_view({})

    def change(self, sql: str) -> bool:
        """Follow a statement that adds or changes a colour; return whether it is one.

        Raises:
            ValueError: it is one whose expression is more than that.
        """
        with self._lock:
            if (found := _ADDED.fullmatch(sql)) is not None:
                value = found["value"]
            elif (found := _CHANGED.fullmatch(sql)) is not None and found[1] in self._columns:
                where, new, old = (
                    text.replace(found[1], f"({self._columns[found[1]]})")
                    for text in (found["where"], found["value"], found[1])
                )
                value = f"case when {where} then {new} else {old} end"
            else:
                return False
            self._make_view(self._columns | {found[1]: value})
            return True

    def _make_view(self, columns: dict[str, str]) -> None:
        added = "".join(f", ({value}\n)::integer as {name}" for name, value in columns.items())
        query = f"select *{added} from {ROWS}"  # noqa: S608 (parsed below)
        if len(self._connection.extract_statements(query)) != 1:
            raise ValueError(f"More than an expression: {added}")
        with self._connection.cursor() as cursor:
            cursor.execute(f"create or replace view {TABLE} as {query}")
        self._columns = columns
