"""Tables of an nsys report that was exported to a folder of Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pytest_sglprof.errors import NotATrace, TraceError
from pytest_sglprof.trace.arrays import Ints
from pytest_sglprof.trace.nsys_schema import KNOWN_TABLES
from pytest_sglprof.trace.nsys_tables import MISSING

SUFFIX = ".parquet"
_ROWS = 1 << 17  # of a batch: enough to hide the cost of a call, little memory


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
        if not KNOWN_TABLES & self._files.keys():
            raise NotATrace(
                f"{folder} is no export of an nsys report: no file is named like its tables",
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
            for batch in stored.iter_batches(_ROWS, columns=there):
                missing = self._pyarrow.nulls(batch.num_rows, self._pyarrow.int64())
                arrays = [
                    self._whole(batch.column(column)) if column in there else missing
                    for column in columns
                ]
                yield self._pyarrow.Table.from_arrays(arrays, names=list(columns))
        except (OSError, self._pyarrow.ArrowException) as error:
            raise _unreadable(file, str(error)) from error

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
        return {number: value or "" for number, value in pairs if number in wanted}

    def _read(self, table: str, columns: Sequence[str]) -> Any:
        """The columns of `columns` that exist; None when there is none."""
        file = self._files.get(table)
        if file is None:
            return None
        try:
            stored = self._pyarrow.parquet.read_schema(file).names
            there = [column for column in columns if column in stored]
            return self._pyarrow.parquet.read_table(file, columns=there) if there else None
        except (OSError, self._pyarrow.ArrowException) as error:
            raise _unreadable(file, str(error)) from error

    def _integers(self, table: str, column: Any) -> Ints:
        try:
            whole = self._whole(column)
        except self._pyarrow.ArrowException as error:
            raise _unreadable(self._files[table], str(error)) from error
        return np.asarray(whole.fill_null(MISSING).to_numpy(), dtype=np.int64)

    def _whole(self, column: Any) -> Any:
        """A column as int64; fractions and what is out of range are null, as in SQLite."""
        import pyarrow.compute as pc

        if self._pyarrow.types.is_floating(column.type):
            fits = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**63))
            column = pc.if_else(fits, column, self._pyarrow.scalar(None, column.type))
        return column.cast(self._pyarrow.int64(), safe=False)  # 64-bit ids wrap, as in SQLite


def _unreadable(file: Path, why: str) -> TraceError:
    return TraceError(
        f"{file} cannot be read: {why}",
        expected="a complete Parquet export of an nsys report",
        hint="the file may be cut off: export the .nsys-rep again",
    )
