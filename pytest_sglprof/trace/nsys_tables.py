"""What a reader of nsys exports asks of their tables, whatever file they are stored in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from pytest_sglprof.trace.arrays import Flags, Ints
from pytest_sglprof.trace.nsys_schema import MISSING as MISSING
from pytest_sglprof.trace.times import LARGEST_NS, LONGEST_NS


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
