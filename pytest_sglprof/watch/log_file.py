"""`LogFollower`: the samples of a log file while it grows, also across its rotation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pytest_sglprof.errors import SglprofError
from pytest_sglprof.watch.log_lines import LineReader, Sample

# Bytes read at once, so that a log of gigabytes costs no memory: 2,000 lines, some 20 ms.
BLOCK = 2**18
# A line longer than this is no batch line: server_args is the longest, with 20,000.
MAX_PARTIAL = 2**20


class LogFollower:
    """Reads what was appended since the last look; a file that is not there is empty.

    path: the log. from_end: skip what stands in it now. A file that was replaced
    (rotated by renaming) is read to its end before the new one; one that was cut short
    (copy and truncate) is read from its start. Close it, or use a `with` block.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self.lines = LineReader()
        self._stream: IO[bytes] | None = None
        self._partial = b""
        self._from_end = from_end
        if from_end:
            self._open()

    def poll(self) -> list[Sample]:
        """The samples of all lines that were completed since the last call."""
        return [sample for block in self.blocks() for sample in block]

    def blocks(self) -> Iterator[list[Sample]]:
        """The same as `poll` in pieces, for a log of any size."""
        if self._stream is None and not self._open():
            return
        yield from self._read()
        if self._was_replaced():
            yield from self._read()  # written between the two looks
            yield self.rest()
            self.close()
            if self._open():
                yield from self._read()

    def rest(self) -> list[Sample]:
        """The samples of a last line that has no end: of a log that is finished."""
        return self._take(b"\n")

    def close(self) -> None:
        """Closes the file; the next `poll` would begin anew."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> LogFollower:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> bool:
        try:
            self._stream = self.path.open("rb")
        except FileNotFoundError:
            self._from_end = False  # a log that begins later is read from its start
            return False
        except OSError as error:
            raise SglprofError(
                f"the log {self.path} cannot be read: {error.strerror or error}",
                expected="the server's log",
            ) from error
        if self._from_end:
            self._stream.seek(0, os.SEEK_END)
            self._from_end = False
        return True

    def _read(self) -> Iterator[list[Sample]]:
        assert self._stream is not None
        if os.fstat(self._stream.fileno()).st_size < self._stream.tell():
            self._stream.seek(0)
            self._partial = b""
        while data := self._stream.read(BLOCK):
            yield self._take(data)

    def _take(self, data: bytes) -> list[Sample]:
        whole, _, rest = (self._partial + data).rpartition(b"\n")
        self._partial = rest if len(rest) <= MAX_PARTIAL else b""
        return self.lines.read(whole.decode("utf-8", "replace").split("\n"))

    def _was_replaced(self) -> bool:
        assert self._stream is not None
        try:
            now = self.path.stat()
        except OSError:
            return False  # renamed, and the new one is not there yet
        then = os.fstat(self._stream.fileno())
        return (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)


class FinishedLog:
    """The samples of a log that does not grow, block by block; each iteration reads it anew.

    So its size costs no memory. A last line without an end counts, too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_milliseconds = False

    def __iter__(self) -> Iterator[list[Sample]]:
        with LogFollower(self.path) as log:
            yield from log.blocks()
            yield log.rest()
            self.has_milliseconds = log.lines.has_milliseconds


def read_log(path: Path) -> list[Sample]:
    """All samples of a finished log."""
    return [sample for block in FinishedLog(path) for sample in block]
