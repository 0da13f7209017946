"""Access to the tables of an nsys export, whether it is SQLite or a folder of Parquet files.

From top to bottom: the interface `ReportTables`, names and numbers of the tables, SQLite,
Parquet, and the type of sums that an engine adds up.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pytest_sglprof._errors import NotATrace, TraceError
from pytest_sglprof._limits import refuse_large
from pytest_sglprof._trace.nsys.database import (
    ACTIVITIES,
    KNOWN_TABLES,
    LONGEST_TEXT,
    MISSING,
    Database,
    open_database,
    refuse_unknown_schema,
    refuse_without_times,
    whole_number,
)
from pytest_sglprof._trace.table import Flags, Ints
from pytest_sglprof._trace.torch.events import LARGEST_NS, LONGEST_NS


class ReportTables(Protocol):
    """Read access to the tables of one export. A table that is absent is an empty one."""

    def integers(self, table: str, columns: Sequence[str]) -> Ints:
        """Shape (columns, rows), in the order of the table; `MISSING` where there is no value."""
        ...

    def texts(self, table: str, column: str) -> tuple[Ints, list[str]]:
        """One code a row, in the order of the table, and the text of each code; -1: NULL.

        Without the table or the column there are no codes at all.
        """
        ...

    def strings(self, ids: Iterable[int]) -> dict[int, str]:
        """The texts of `StringIds` under these ids; unknown ids are left out."""
        ...


def usable(start: Ints, end: Ints) -> tuple[Flags, list[int]]:
    """Which rows have times that can be, and how many lack one or have one that cannot be.

    A time lies within `LARGEST_NS` of 0, an end not before its start, and less than
    `LONGEST_NS` after it: what is beyond is a fault of the recording, and would spoil sums.
    """
    known = (start != MISSING) & (end != MISSING) & (end >= start)
    inside = known & (start > -LARGEST_NS) & (end < LARGEST_NS)
    fits = inside & (np.where(inside, end - start, 0) < LONGEST_NS)
    count, there, left = len(start), int(known.sum()), int(fits.sum())
    return fits, [count - there, there - left]


def coded(values: Ints) -> tuple[Ints, Ints]:
    """The distinct values, ascending, and the index of each value in them.

    As `np.unique` with its inverse, which sorts all rows; here only distinct values are.
    """
    distinct = np.unique(values)
    return distinct, np.searchsorted(distinct, values)


def process_of(global_id: Ints) -> Ints:
    """The process (globalPid) of a globalTid: nsys keeps the thread in the low 24 bits."""
    return global_id & ~np.int64(0xFFFFFF)


def pid_of(global_id: Ints) -> Ints:
    """The operating system's process id in a globalPid or globalTid."""
    return (global_id >> 24) & 0xFFFFFF


# What the tables and columns of an nsys export are called, and what their numbers mean.


"""At least one of these stands in every export; nsys leaves out tables without rows."""

"""Stands for NULL and for columns that this version of nsys does not write."""
"""Where the operating system's process id stands in a globalPid or globalTid."""


"""The rows whose times are used, in SQL: the same as `usable`.

In SQLite a string is greater than any number, so it fails one of the comparisons; the plus
keeps SQLite from converting it to the column's type first. Fractions pass.
"""


# An nsys export in SQLite, opened for reading, with errors that say what is wrong.


# Tables of an nsys report that was exported to SQLite.


_SQLITE_ROWS = 4_096  # fetched at once: enough to hide the cost of a call, few enough for the cache


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
        while rows := cursor.fetchmany(_SQLITE_ROWS):
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


# Tables of an nsys report that was exported to a folder of Parquet files.


SUFFIX = ".parquet"
_PARQUET_VALUE = 24  # bytes: as it is read, without NULLs, as int64
_PARQUET_ROWS = 1 << 17  # of a batch: enough to hide the cost of a call, little memory


class ParquetTables:
    """`ReportTables` of a folder with one Parquet file a table.

    Raises `TraceError` without pyarrow, and when a file cannot be read; `NotATrace` when
    no file is a table of an nsys export.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise TraceError(
                f"{folder} holds Parquet files, which need pyarrow to be read",
                expected="the package pyarrow",
                hint="pip install 'pytest-sglprof[parquet]', or export to SQLite",
            ) from error
        self._pyarrow: Any = pyarrow
        self._files = {file.stem: file for file in sorted(folder.glob(f"*{SUFFIX}"))}
        refuse_unknown_schema(folder, self._files)
        for table in ACTIVITIES:
            refuse_without_times(folder, table, self._columns(table))
        if not KNOWN_TABLES & self._files.keys():
            raise NotATrace(
                f"{folder} is not an export of an nsys report: no file is named like its tables",
                expected="what `nsys export --type=parquetdir` writes",
                hint="give the .nsys-rep itself, or export it",
            )

    def integers(self, table: str, columns: Sequence[str]) -> Ints:
        """See `ReportTables.integers`."""
        read = self._read(table, columns)
        if read is None:
            return np.empty((len(columns), 0), dtype=np.int64)
        values = np.full((len(columns), read.num_rows), MISSING, dtype=np.int64)
        for at, column in enumerate(columns):
            if column in read.column_names:
                values[at] = self._integers(table, read[column])
        return values

    def batches(self, table: str, columns: Sequence[str]) -> Iterator[Any]:
        """Arrow tables of the columns as int64, null where there is no value, row by row."""
        file = self._files.get(table)
        if file is None:
            return
        try:
            stored = self._pyarrow.parquet.ParquetFile(file)
            there = [column for column in columns if column in stored.schema_arrow.names]
            if not there:
                return
            for batch in stored.iter_batches(_PARQUET_ROWS, columns=there):
                missing = self._pyarrow.nulls(batch.num_rows, self._pyarrow.int64())
                arrays = [
                    self._whole(batch.column(column)) if column in there else missing
                    for column in columns
                ]
                yield self._pyarrow.Table.from_arrays(arrays, names=list(columns))
        except (OSError, self._pyarrow.ArrowException) as error:
            raise _unreadable(file) from error

    def texts(self, table: str, column: str) -> tuple[Ints, list[str]]:
        """See `ReportTables.texts`."""
        read = self._read(table, [column])
        if read is None:
            return np.empty(0, dtype=np.int64), []
        code_of: dict[str | None, int] = {None: -1}
        codes = [code_of.setdefault(t, len(code_of) - 1) for t in read[column].to_pylist()]
        return np.array(codes, dtype=np.int64), [text for text in code_of if text is not None]

    def strings(self, ids: Iterable[int]) -> dict[int, str]:
        """See `ReportTables.strings`."""
        read = self._read("StringIds", ["id", "value"])
        if read is None:
            return {}
        wanted = set(ids)
        pairs = zip(read["id"].to_pylist(), read["value"].to_pylist(), strict=True)
        return {number: (value or "")[:LONGEST_TEXT] for number, value in pairs if number in wanted}

    def _columns(self, table: str) -> frozenset[str]:
        """The columns of a table; none where there is no such table."""
        file = self._files.get(table)
        try:
            return frozenset(self._pyarrow.parquet.read_schema(file).names if file else ())
        except (OSError, self._pyarrow.ArrowException) as error:
            raise _unreadable(file or Path(table)) from error

    def _read(self, table: str, columns: Sequence[str]) -> Any:
        """The columns of `columns` that exist; None when there is none."""
        file = self._files.get(table)
        if file is None:
            return None
        try:
            with self._pyarrow.parquet.ParquetFile(file) as stored:
                there = [column for column in columns if column in stored.schema_arrow.names]
                # A file of a kilobyte may hold a thousand million equal values.
                size = _PARQUET_VALUE * len(there) * stored.metadata.num_rows
                refuse_large(file, size, error=TraceError)
                return stored.read(columns=there) if there else None
        except (OSError, self._pyarrow.ArrowException) as error:
            raise _unreadable(file) from error

    def _integers(self, table: str, column: Any) -> Ints:
        try:
            whole = self._whole(column)
        except self._pyarrow.ArrowException as error:
            raise _unreadable(self._files[table]) from error
        return np.asarray(whole.fill_null(MISSING).to_numpy(), dtype=np.int64)

    def _whole(self, column: Any) -> Any:
        """A column as int64; fractions and what is out of range are null, as in SQLite."""
        import pyarrow.compute as pc

        if self._pyarrow.types.is_floating(column.type):
            fits = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**63))
            column = pc.if_else(fits, column, self._pyarrow.scalar(None, column.type))
        return column.cast(self._pyarrow.int64(), safe=False)  # 64-bit ids wrap, as in SQLite


def _unreadable(file: Path) -> TraceError:
    return TraceError(
        f"{file} cannot be read: it is damaged or cut off, or no Parquet file",
        expected="a complete Parquet export of an nsys report",
        hint="the file may be cut off: export the .nsys-rep again",
    )


# GPU activities of an nsys report as the engine of a file format added them up.


"""Process id, device (-1: none), kind and full name."""
