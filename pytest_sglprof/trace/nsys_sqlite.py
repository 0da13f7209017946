"""Tables of an nsys report that was exported to SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from pytest_sglprof.errors import NotATrace, TraceError
from pytest_sglprof.trace.arrays import Ints
from pytest_sglprof.trace.nsys_tables import KNOWN_TABLES, MISSING

_ROWS = 65_536  # fetched at once: enough to hide the cost of a call, little memory
_IDS = 500  # in one statement; old SQLite allows 999 variables


@contextlib.contextmanager
def open_sqlite(path: Path) -> Iterator[SqliteTables]:
    """The tables of the export at `path`, which is only ever read.

    Raises `NotATrace` when it is no export, `TraceError` when it cannot be read; also for
    errors that show only while the body reads.
    """
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.text_factory = _text
            tables = SqliteTables(connection)
            if not KNOWN_TABLES & tables.names:
                raise _not_an_export(path, "it has none of an nsys export's tables")
            yield tables
    except sqlite3.Error as error:
        if "not a database" in str(error):
            raise _not_an_export(path, "it is no SQLite database") from error
        raise TraceError(
            f"{path} cannot be read: {error}",
            expected="a complete SQLite export of an nsys report",
            hint="the file may be cut off: export the .nsys-rep again",
        ) from error


class SqliteTables:
    """`ReportTables` of an open SQLite database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        self.names = frozenset(str(name) for (name,) in found)

    def integers(self, table: str, columns: Sequence[str]) -> Ints:
        """See `ReportTables.integers`."""
        there = [column for column in columns if column in self._columns(table)]
        if not there:
            return np.empty((len(columns), 0), dtype=np.int64)
        words = ", ".join(f'CAST(COALESCE("{column}", {MISSING}) AS INTEGER)' for column in there)
        cursor = self._scan(table, words)
        blocks = [np.empty((0, len(there)), dtype=np.int64)]
        while rows := cursor.fetchmany(_ROWS):
            flat = np.fromiter(chain.from_iterable(rows), np.int64, len(rows) * len(there))
            blocks.append(flat.reshape(-1, len(there)))
        read = np.concatenate(blocks)
        values = np.full((len(columns), len(read)), MISSING, dtype=np.int64)
        for at, column in enumerate(there):
            values[columns.index(column)] = read[:, at]
        return values

    def texts(self, table: str, column: str) -> tuple[Ints, list[str]]:
        """See `ReportTables.texts`."""
        if column not in self._columns(table):
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
        found: dict[int, str] = {}
        if not {"id", "value"} <= self._columns("StringIds"):
            return found
        left = iter(ids)
        while some := list(islice(left, _IDS)):
            marks = ", ".join("?" * len(some))
            words = f'SELECT "id", "value" FROM "StringIds" WHERE "id" IN ({marks})'
            for number, value in self._connection.execute(words, some):
                found[int(number)] = "" if value is None else str(value)
        return found

    def _columns(self, table: str) -> frozenset[str]:
        if table not in self.names:
            return frozenset()
        found = self._connection.execute(f'PRAGMA table_info("{table}")')
        return frozenset(str(row[1]) for row in found)

    def _scan(self, table: str, words: str) -> sqlite3.Cursor:
        # Ordered, since an index that covers the columns would give its own order.
        return self._connection.execute(f'SELECT {words} FROM "{table}" ORDER BY rowid')


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _not_an_export(path: Path, why: str) -> NotATrace:
    return NotATrace(
        f"{path} is no export of an nsys report: {why}",
        expected="what `nsys export --type=sqlite` writes",
        hint="give the .nsys-rep itself, or export it",
    )
