"""Writes a trace's list of events piece by piece, packed, whole or not at all."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

import msgspec

from pytest_sglprof.files import atomic_writer

# Of isal's levels 0 to 3: 1 packs a trace 1.3 times as well as 0 at the same speed, 3 takes
# seven times as long for 1 % less.
LEVEL = 1


class _Deflater(Protocol):
    def compress(self, data: bytes) -> bytes: ...
    def flush(self) -> bytes: ...


class _Plain:
    """No compression, for `*.json`."""

    def compress(self, data: bytes) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


class TraceWriter:
    """A context manager; the file takes its name only when `close` was called in it."""

    def __init__(self, path: Path, *, base_ns: int = 0) -> None:
        self._path = path
        self._base_ns = base_ns
        self._stack = ExitStack()
        self._first = True

    def __enter__(self) -> TraceWriter:
        self._file: IO[bytes] = self._stack.enter_context(atomic_writer(self._path))
        self._deflater = _deflater() if self._path.suffix == ".gz" else _Plain()
        head = {"schemaVersion": 1, "displayTimeUnit": "ms"}
        if self._base_ns:
            head["baseTimeNanoseconds"] = self._base_ns
        self._put(msgspec.json.encode(head)[:-1] + b',"traceEvents":[\n')
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, events: bytes) -> None:
        """Events as JSON texts that are joined by commas; nothing is fine."""
        if events:
            self._put(events if self._first else b",\n" + events)
            self._first = False

    def close(self, metadata: Mapping[str, object]) -> None:
        """Ends the list; `metadata` stands behind it."""
        self._put(b"\n]," + msgspec.json.encode(metadata)[1:])
        self._file.write(self._deflater.flush())

    def _put(self, data: bytes) -> None:
        self._file.write(self._deflater.compress(data))


def _deflater() -> _Deflater:
    """isal's compressor, the standard library's where isal is not installed."""
    try:
        from isal import igzip_lib, isal_zlib
    except ImportError:
        return zlib.compressobj(LEVEL, wbits=31)
    made: _Deflater = isal_zlib.compressobj(level=LEVEL, wbits=16 + igzip_lib.MAX_HIST_BITS)
    return made
