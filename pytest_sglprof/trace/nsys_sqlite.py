"""Tables of an nsys report that was exported to SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from pytest_sglprof.trace.arrays import Ints
from pytest_sglprof.trace.nsys_database import Database, open_database
from pytest_sglprof.trace.nsys_schema import MISSING, whole_number

_ROWS = 4_096  # fetched at once: enough to hide the cost of a call, few enough for the cache


@contextlib.contextmanager
def open_sqlite(path: Path) -> Iterator[SqliteTables]:
    """The tables of the export at `path`; errors are those of `open_database`."""
    with open_database(path) as database:
        yield SqliteTables(database)


class SqliteTables:
    """`ReportTables` of an open SQLite database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection = database.connection

    def integers(self, table: str, columns: Sequence[str]) -> Ints:
        """See `ReportTables.integers`."""
        there = [column for column in columns if column in self._database.columns(table)]
        if not there:
            return np.empty((len(columns), 0), dtype=np.int64)
        (count,) = self._connection.execute(f'SELECT COUNT(*) FROM "{table}"').fetchone()
        read = np.empty((len(there), count), dtype=np.int64)
        self._fill(read, table, [_or_missing(column) for column in there])
        if len(there) == len(columns):
            return read
        values = np.full((len(columns), count), MISSING, dtype=np.int64)
        for at, column in enumerate(there):
            values[columns.index(column)] = read[at]
        return values

    def _fill(self, values: Ints, table: str, words: Sequence[str]) -> None:
        cursor = self._scan(table, ", ".join(words))
        at = 0
        while rows := cursor.fetchmany(_ROWS):
            flat = np.fromiter(chain.from_iterable(rows), np.int64, len(rows) * len(words))
            values[:, at : at + len(rows)] = flat.reshape(-1, len(words)).T
            at += len(rows)

    def texts(self, table: str, column: str) -> tuple[Ints, list[str]]:
        """See `ReportTables.texts`."""
        if column not in self._database.columns(table):
            return np.empty(0, dtype=np.int64), []
        code_of: dict[str | None, int] = {None: -1}
        codes = (
            code_of.setdefault(None if text is None else str(text), len(code_of) - 1)
            for (text,) in self._scan(table, f'"{column}"')
        )
        numbers = np.fromiter(codes, np.int64)
        return numbers, [text for text in code_of if text is not None]

    def strings(self, ids: Iterable[int]) -> dict[int, str]:
        """See `ReportTables.strings`."""
        return self._database.strings(ids)

    def _scan(self, table: str, words: str) -> sqlite3.Cursor:
        # Ordered, since an index that covers the columns would give its own order.
        return self._connection.execute(f'SELECT {words} FROM "{table}" ORDER BY rowid')


def _or_missing(column: str) -> str:
    """The column's whole numbers in SQL; whatever else a row may hold there counts as NULL."""
    otherwise = f'IIF({whole_number(column)}, CAST("{column}" AS INTEGER), {MISSING})'
    return f'IIF(TYPEOF("{column}") = \'integer\', "{column}", {otherwise})'  # almost always
