"""`ServerLog`: reads a server's log while it grows, and finds out why the server died."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_sglprof._redact import redact_text
from pytest_sglprof._server.log_lines import begins_entry

MAX_LINE = 400  # characters of a line that are shown; server_args alone has 20,000
TAIL_BYTES = 65536  # enough for the last line, whatever the log's size
REASON_BYTES = 2**22  # 30,000 lines; what explains a death is near the end

_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning|Timeout)\b")
_LINE_END = re.compile(rb"[\r\n]")
_TRACEBACK = "Traceback (most recent call last)"
# The server continues after these: only a request failed.
_HARMLESS = re.compile(r"Exception in ASGI application|Profiling is not in progress")
# What the other ranks log after one of them has died.
_AFTERMATH = re.compile(
    r"Connection (?:closed|reset)|Broken pipe|EOFError|remote process exited|"
    r"KeyboardInterrupt|Connection refused|Socket closed",
    re.I,
)
_CAUSES = re.compile(
    r"out of memory|OutOfMemory|not enough memory|address already in use|errno 98|"
    r"port \d+ is (?:not available|in use)|watchdog|segmentation fault|fatal python error|"
    r"core dumped|bus error|illegal instruction|unrecognized arguments|: error: |"
    r"No module named|no such file or directory|can't open file|permission denied|"
    r"no space left|CUDA error|NCCL error|terminate called|Killed",
    re.I,
)
_ENDINGS = re.compile(r"SIGQUIT received|kill_process_tree called|Received sigterm", re.I)
_NOISE = re.compile(
    r"server_args=|\"(?:GET|POST) /|Decode batch|Prefill batch|^USDT:|UserWarning|"
    r"Ignore import error|disabled:|^\s*$|%\|"
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

    def reason(self, start: int = 0, limit: int = 12) -> tuple[str, ...]:
        """At most `limit` lines after `start` that explain why the server died.

        Lines that name a cause (memory, a port, an argument), and of each traceback that
        ended a process its innermost frame and its exception. If there are none, what the
        server logged about its end. Failing that, the last lines that are not about
        requests. Only the last `REASON_BYTES` are read.
        """
        # To the last byte, since a dying server may not finish its last line.
        lines = self._decode(self._last(REASON_BYTES, start))
        blocks = _tracebacks(lines)
        inside = {number for block in blocks for number in range(block.first, block.last + 1)}
        causes = [
            line
            for number, line in enumerate(lines)
            if number not in inside and _CAUSES.search(line) and not _NOISE.search(line)
        ]
        reason = _distinct(causes)[-max(limit // 3, 1) :] + _deadly(blocks)
        if not reason:
            reason = _distinct(line for line in lines if _ENDINGS.search(line))
        if not reason:
            outside = (line for number, line in enumerate(lines) if number not in inside)
            reason = [line for line in outside if not _NOISE.search(line)][-limit // 2 :]
        return tuple(_shorten(line) for line in reason[-limit:])

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


@dataclass(frozen=True)
class _Block:
    """One traceback: the numbers of its first and last line, and the lines of it to show."""

    first: int
    last: int
    shown: tuple[str, ...]
    harmless: bool
    ended_rank: bool

    @property
    def exception(self) -> str:
        """The line of the exception."""
        return self.shown[-1]


def _tracebacks(lines: Sequence[str]) -> list[_Block]:
    blocks = []
    number = 0
    while number < len(lines):
        if _TRACEBACK in lines[number]:
            block = _read_block(lines, number)
            blocks.append(block)
            number = block.last
        number += 1
    return blocks


def _read_block(lines: Sequence[str], first: int) -> _Block:
    end = first + 1
    while end < len(lines) and (lines[end].startswith(" ") or not lines[end]):
        end += 1
    # A message may have several lines, until the next entry of the log.
    last = end
    while last + 1 < len(lines) and last < end + 3 and _continues_message(lines[last + 1]):
        last += 1
    frames = [line for line in lines[first + 1 : end] if line.lstrip().startswith("File ")]
    ended_rank = "hit an exception" in lines[first]
    head = [lines[first].strip()] if ended_rank else []
    exception = " ".join(line.strip() for line in lines[end : last + 1]) or lines[first].strip()
    around = "\n".join([*lines[max(0, first - 3) : first + 1], exception])
    return _Block(
        first,
        min(last, len(lines) - 1),
        shown=(*head, *frames[-1:], exception),
        harmless=bool(_HARMLESS.search(around)),
        ended_rank=ended_rank,
    )


def _continues_message(line: str) -> bool:
    return bool(line.strip()) and not (
        begins_entry(line) or _NOISE.search(line) or _TRACEBACK in line or _EXCEPTION.match(line)
    )


def _deadly(blocks: Sequence[_Block]) -> list[str]:
    """The lines to show of at most two tracebacks, the cause before its consequences."""
    harmful = [block for block in blocks if not block.harmless]
    primary = [block for block in harmful if not _AFTERMATH.search(block.exception)]
    ended = [block for block in primary if block.ended_rank]
    chosen: dict[str, _Block] = {}
    for block in ended or primary or harmful:
        chosen.setdefault(block.exception, block)
    return [line for block in list(chosen.values())[-2:] for line in block.shown]


def _distinct(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))


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


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino
