"""An nsys export in SQLite, opened for reading, with errors that say what is wrong."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from pytest_sglprof.errors import NotATrace, TraceError
from pytest_sglprof.trace.nsys_schema import KNOWN_TABLES

_IDS = 500  # in one statement; old SQLite allows 999 variables


@contextlib.contextmanager
def open_database(path: Path) -> Iterator[Database]:
    """The export at `path`, whose file is only ever read.

    Raises `NotATrace` when it is no export, `TraceError` when it cannot be read; also for
    errors that show only while the body reads.
    """
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.text_factory = _text
            connection.isolation_level = None
            database = Database(connection)
            if not KNOWN_TABLES & database.names:
                raise _not_an_export(path, "it has none of an nsys export's tables")
            yield database
    except (sqlite3.Error, UnicodeError) as error:  # the latter: in SQLite's own message
        if "not a database" in str(error):
            raise _not_an_export(path, "it is no SQLite database") from error
        raise TraceError(
            f"{path} cannot be read: {error}",
            expected="a complete SQLite export of an nsys report",
            hint="the file may be cut off: export the .nsys-rep again",
        ) from error


class Database:
    """An open export. names: its tables; `temp` ones may be made, in memory."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA temp_store = MEMORY")
        # Of temporary tables, in which a sum is then found within one page.
        connection.execute("PRAGMA page_size = 16384")
        self.connection = connection
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        self.names = frozenset(str(name) for (name,) in found)

    def columns(self, table: str) -> frozenset[str]:
        """The columns of a table; none where there is no such table."""
        if table not in self.names:
            return frozenset()
        found = self.connection.execute(f'PRAGMA table_info("{table}")')
        return frozenset(str(row[1]) for row in found)

    def strings(self, ids: Iterable[int]) -> dict[int, str]:
        """The texts of `StringIds` under these ids; unknown ids are left out."""
        found: dict[int, str] = {}
        if not {"id", "value"} <= self.columns("StringIds"):
            return found
        left = iter(ids)
        while some := list(islice(left, _IDS)):
            marks = ", ".join("?" * len(some))
            words = f'SELECT "id", "value" FROM "StringIds" WHERE "id" IN ({marks})'
            for number, value in self.connection.execute(words, some):
                found[int(number)] = "" if value is None else str(value)
        return found


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _not_an_export(path: Path, why: str) -> NotATrace:
    return NotATrace(
        f"{path} is no export of an nsys report: {why}",
        expected="what `nsys export --type=sqlite` writes",
        hint="give the .nsys-rep itself, or export it",
    )
