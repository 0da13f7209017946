"""`LogGrowth`: what a log file has grown by since the last look, in bounded pieces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PIECE = 2**20  # bytes read at once, so that a log of gigabytes costs no memory
# A line longer than this is none that anybody looks for: server_args, the longest, has 20,000.
LONGEST_LINE = 2**20


class LogGrowth:
    """Reads every complete line from byte `start` on once; the file may not exist yet.

    A log that was cut short (copy and truncate) or replaced by another file is read from its
    start. Of a line without an end, so far, nothing is read; of one that is longer than
    `LONGEST_LINE` only the end.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        self.offset = start
        self._file = _identity(path)

    def pieces(self, *, at_most: int | None = None) -> Iterator[bytes]:
        """The new lines, some at a time, each with its end.

        at_most: bytes; of more than that only the last ones are read, from the middle of a
        line on.
        """
        try:
            stream = self.path.open("rb")
        except OSError:
            return
        with stream:
            self._begin(os.fstat(stream.fileno()))
            if at_most is not None:
                size = os.fstat(stream.fileno()).st_size
                self.offset = max(self.offset, size - at_most)
            stream.seek(self.offset)
            rest = b""
            while data := stream.read(PIECE):
                whole, end, rest = (rest + data).rpartition(b"\n")
                if len(rest) > LONGEST_LINE:
                    self.offset += len(rest)
                    rest = b""
                if end:
                    self.offset += len(whole) + 1
                    yield whole + end

    def _begin(self, state: os.stat_result) -> None:
        file = (state.st_dev, state.st_ino)
        if state.st_size < self.offset or self._file not in (None, file):
            self.offset = 0
        self._file = file


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino
