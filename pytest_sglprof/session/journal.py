"""`Journal`: the records of a run on disk, so that memory does not grow with their number."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from pytest_sglprof.report.model import Record

_Place = tuple[int, int]  # offset and length of a line, in bytes


class Journal:
    """One line of JSON a record. count: how many were added.

    Read through the open file, which is there even when somebody removed its name.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b", buffering=0)
        self._records: list[_Place | Record] = []

    @property
    def count(self) -> int:
        """How many records were added."""
        return len(self._records)

    def add(self, record: Record) -> None:
        """Appends a record; raises OSError when the disk refuses it, and keeps it in memory."""
        line = msgspec.json.encode(record) + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:  # Ctrl-C as well: no half line stays
            self._records.append(record)
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise
        self._records.append((start, len(line)))

    def records(self) -> Iterator[Record]:
        """All records in the order in which they were added, one at a time."""
        from pytest_sglprof.report.model import Record

        for place in self._records:
            if isinstance(place, tuple):
                yield msgspec.json.decode(self._read(*place), type=Record)
            else:
                yield place

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _read(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        pieces = []
        while length and (piece := self._file.read(length)):
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)
