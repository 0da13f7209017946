"""`ServerLog`: reads a server's log while it grows, and shows why the server died."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pytest_sglprof._redact import redact_text
from pytest_sglprof._server.death import reason_of

MAX_LINE = 400  # characters of a line that are shown; server_args alone has 20,000
TAIL_BYTES = 65536  # enough for the last line, whatever the log's size
REASON_BYTES = 2**22  # 30,000 lines; what explains a death is near the end

_LINE_END = re.compile(rb"[\r\n]")
# What the log of a server that starts says -> what that is called; a group is how far it is.
_PHASES = (
    (re.compile(r"ready to roll|Application startup complete"), "answering its first request"),
    (
        re.compile(r"Capturing batches.{0,200}?(\d+)%|Capture \w[^\[]{0,80}? begin"),
        "capturing graphs",
    ),
    (re.compile(r"KV Cache is allocated|Memory pool end"), "its memory is allocated"),
    (re.compile(r"[Ll]oading (?:safetensors|pt|shards|weights).{0,200}?(\d+)%"), "loading weights"),
    (re.compile(r"Load weight begin"), "loading weights"),
    (re.compile(r"(?:Fetching \d+ files|Downloading).{0,200}?(\d+)%"), "downloading"),
)


class ServerLog:
    """Reads a log by byte offset; the file may not exist yet and may hold any bytes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def position(self) -> int:
        """Byte offset of the file's end now; 0 without a file."""
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def each(self, start: int = 0) -> Iterator[str]:
        """The complete lines (without their ends) that begin at or after byte `start`.

        Only a piece of the log is in memory at a time.
        """
        yield from self.new(LogGrowth(self.path, start))

    def new(self, growth: LogGrowth) -> Iterator[str]:
        """The complete lines that `growth`, of this log's file, has not read yet."""
        for piece in growth.pieces():
            yield from self._decode(piece)

    def read(self, start: int = 0) -> tuple[list[str], int]:
        """The complete lines from byte `start` on, and the offset for the next call.

        All lines if the log has become shorter than `start`.
        """
        growth = LogGrowth(self.path, start)
        return list(self.new(growth)), growth.offset

    def last_line(self) -> str:
        """The last line that is not empty, with secrets hidden; "" if there is none."""
        for line in reversed(self._decode(self._last(TAIL_BYTES))):
            if line.strip():
                return _shorten(line)
        return ""

    def phase(self) -> str:
        """What a server that starts is doing, `loading weights 45 %`; "" if nothing says."""
        for line in reversed(self._decode(self._last(TAIL_BYTES))):
            for pattern, words in _PHASES:
                if match := pattern.search(line):
                    done = next(filter(None, match.groups()), "")
                    return f"{words} {done} %" if done else words
        return ""

    def reason(self, start: int = 0, limit: int = 12) -> tuple[str, ...]:
        """At most `limit` lines after `start` that explain why the server died; see `reason_of`.

        Only the last `REASON_BYTES` are read.
        """
        # To the last byte, since a dying server may not finish its last line.
        lines = self._decode(self._last(REASON_BYTES, start))
        return tuple(_shorten(line) for line in reason_of(lines, limit))

    def _last(self, count: int, start: int = 0) -> bytes:
        """At most the last `count` bytes from `start` on; of a log shorter than that, of all.

        They begin with a whole line (or progress bar), since half a secret would not be
        recognised as one.
        """
        try:
            with self.path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                first = start if start <= size else 0
                stream.seek(max(first, size - count))
                data = stream.read(count)
        except OSError:
            return b""
        if size - count <= first:
            return data
        end = _LINE_END.search(data)
        return data[end.end() :] if end else b""

    def _decode(self, data: bytes) -> list[str]:
        text = redact_text(data.decode("utf-8", errors="replace"))
        # splitlines() would also split at form feeds and progress bars' carriage returns.
        lines = text.split("\n")
        if lines and not lines[-1]:
            lines.pop()
        return [line.rstrip("\r").rpartition("\r")[2] for line in lines]


def _shorten(line: str) -> str:
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 1]}…"


# Reading what a log has grown by, in pieces of bounded size.

PIECE = 2**20  # bytes read at once, so that a log of gigabytes takes little memory
# No line that matters is longer: server_args, the longest, has 20,000 characters.
LONGEST_LINE = 2**20


class LogGrowth:
    """Reads every complete line from byte `start` on once; the file may not exist yet.

    A log that was cut short (copy and truncate) or replaced by another file is read from its
    start. A line is read once its end is written; of a line longer than `LONGEST_LINE` only
    the end is read.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        self.offset = start
        self._file = _identity(path)

    def pieces(self, *, at_most: int | None = None) -> Iterator[bytes]:
        """The new lines, with their ends, several at a time.

        at_most: bytes. Of a log that has grown by more, only the last `at_most` bytes are
        read, which may begin within a line.
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


# Of whoever asks whether it is ready: no sign that a server makes progress.
_PROBE = re.compile(rb'"GET /(?:ready|health)\b')


class StartGrowth:
    """How much a server that starts has written by itself, without its answers to probes."""

    def __init__(self, log: ServerLog) -> None:
        self._log = log
        self._growth = LogGrowth(log.path)
        self._probes = 0  # bytes

    def size(self) -> int:
        """Bytes so far, with the beginning of a line (a progress bar)."""
        size = self._log.position()
        for piece in self._growth.pieces():
            lines = piece.splitlines(keepends=True)
            self._probes += sum(len(line) for line in lines if _PROBE.search(line))
        return size - self._probes


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino
