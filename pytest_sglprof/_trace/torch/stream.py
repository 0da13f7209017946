"""A trace's bytes in pieces of bounded size, verified to the end.

``pieces(path)`` yields the plain bytes of a ``.json``, ``.json.gz`` or ``.json.zst``
file, recognised by content. It returns normally only when the end was reached and every
checksum was right, so a reader that holds its results back until then never returns
half a file. Memory does not grow with the file.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from pytest_sglprof._errors import NotATrace, TraceError, TraceTruncated
from pytest_sglprof._limits import most_memory, refuse_large
from pytest_sglprof._trace.foreign import refuse_empty, refuse_foreign

PIECE = 256 * 1024  # larger pieces fall out of the processor's cache, smaller ones cost calls
_READ = 128 * 1024
GZIP = b"\x1f\x8b"
ZSTD = b"\x28\xb5\x2f\xfd"
_BOM = b"\xef\xbb\xbf"

Progress = Callable[[int], None]


class _Inflater(Protocol):
    """What isal, zlib and zstd decompressors have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _ZlibInflater:
    """The standard library's zlib with the interface of isal's decompressor."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self._pending = b""

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._pending and not self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        source = self._pending + data
        piece = self._stream.decompress(source, max_length)
        self._pending = self._stream.unconsumed_tail
        return piece


def _gzip_inflater() -> _Inflater:
    """isal's decompressor (four times as fast), zlib's where isal is not installed."""
    try:
        from isal import igzip_lib
    except ImportError:
        return _ZlibInflater()
    inflater: _Inflater = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    return inflater


def _zstd_inflater(path: Path) -> _Inflater:
    """The standard library's decompressor, which exists from Python 3.14 on."""
    try:
        # Nothing that mypy finds in older Pythons, for which it checks.
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        archive = path.name.endswith((".tar.zst", ".tzst"))  # what is inside cannot be seen
        what, how = ("an archive", "tar --zstd -xf") if archive else ("a file", "zstd -d")
        raise TraceError(
            f"{path} is {what} compressed with zstd, which this Python cannot read",
            expected="a .json.gz or .json file, or Python 3.14 and newer",
            hint=f"unpack it first: {how} {path}",
        ) from None
    inflater: _Inflater = zstd.ZstdDecompressor()
    return inflater


def inflated(path: Path, *, partial: bool = False) -> tuple[bytearray, bool]:
    """All plain bytes of `path`, without a byte order mark, and whether its end is missing.

    partial: take what stands before the end of a truncated file. Raises what `pieces` does,
    `NotATrace` where the first bytes are not those of JSON, and `TraceError` for more bytes than
    the memory may hold.
    """
    data = bytearray()
    most = most_memory()
    cut = False
    try:
        for piece in pieces(path):
            if not data:
                refuse_foreign(path, piece)
            data += piece
            if len(data) > most:
                refuse_large(path, len(data), error=TraceError)
    except TraceTruncated:
        if not partial:
            raise
        cut = True
    if data.startswith(_BOM):
        del data[: len(_BOM)]
    return data, cut


def pieces(path: Path, *, size: int = PIECE, progress: Progress | None = None) -> Iterator[bytes]:
    """Yields the plain bytes of `path` in pieces of at most `size` bytes.

    progress: called with the number of *stored* bytes read since its last call.
    Raises NotATrace (missing, empty, another kind of file), TraceTruncated (the stream
    stops before its end) and TraceError (damaged: bad data or a wrong checksum).
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise NotATrace(
            f"{path} cannot be opened: {error.strerror}",
            expected="a readable trace file",
            hint="check the path and its permissions",
        ) from error
    with stream:
        head = stream.read(len(ZSTD))
        stream.seek(0)
        if not head:
            refuse_empty(path, packed=False)
        if head.startswith(GZIP):
            yield from _inflate(path, stream, _gzip_inflater, GZIP, size, progress)
        elif head.startswith(ZSTD):
            yield from _inflate(path, stream, lambda: _zstd_inflater(path), ZSTD, size, progress)
        else:
            yield from _plain(stream, size, progress)


def _plain(stream: IO[bytes], size: int, progress: Progress | None) -> Iterator[bytes]:
    while data := stream.read(size):
        if progress is not None:
            progress(len(data))
        yield data


def _inflate(
    path: Path,
    stream: IO[bytes],
    make: Callable[[], _Inflater],
    magic: bytes,
    size: int,
    progress: Progress | None,
) -> Iterator[bytes]:
    """Inflates every member of `stream`; a file may hold several (`cat a.gz b.gz`)."""
    inflater = make()
    while True:
        data = b""
        if inflater.eof:
            rest = inflater.unused_data.lstrip(b"\0")  # gzip allows zeros as padding
            while len(rest) < len(magic):
                more = stream.read(_READ)
                if not more:
                    break
                rest = (rest + more).lstrip(b"\0")
            if not rest:
                return
            if not rest.startswith(magic):
                raise TraceError(
                    f"{path} has bytes after its compressed data that are not compressed data",
                    expected="nothing, or another member of the same kind",
                    hint="the file was damaged or written twice; copy or record it again",
                )
            inflater, data = make(), rest
        elif inflater.needs_input:
            data = stream.read(_READ)
            if progress is not None:
                progress(len(data))
            if not data:
                raise TraceTruncated(
                    f"{path} ends in the middle of its compressed data",
                    expected="a complete file; the profiler writes it in place and grows it",
                    hint="wait until the profiler is done, or read what is there with "
                    "allow_partial=True",
                )
        try:
            piece = inflater.decompress(data, size)
        except Exception as error:  # isal, zlib and zstd have no common error class
            raise TraceError(
                f"{path} is damaged: its compressed data cannot be unpacked, or its checksum is "
                "wrong",
                expected="compressed data with a right checksum",
                hint="copy the file again; if it was recorded so, open the window again",
            ) from error
        if piece:
            yield piece


# Fast substring search in large buffers.
#
# StringZilla searches 25 GB/s; `bytes.find`, used where it is not installed, 2 to 4.

_Find = Callable[[bytes, bytes, int, int], int]


class Search(NamedTuple):
    """The ways of a library to look for a word in `data[begin:end]`: (data, word, begin, end).

    find, rfind: the first and the last offset, -1 for none. tally: the number of matches, not
    named count because tuples already have `count()`.
    """

    find: _Find
    rfind: _Find
    tally: _Find


def _quickest() -> Search:
    try:
        # Not installed where it has no wheel, and it has no types.
        import stringzilla  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return Search(bytes.find, bytes.rfind, bytes.count)
    return Search(stringzilla.find, stringzilla.rfind, stringzilla.count)


QUICKEST = _quickest()


def offsets(word: bytes, data: bytes, begin: int, end: int) -> list[int]:
    """The offsets of `word` in `data`, ascending; all of it lies between begin and end."""
    hits = []
    find = QUICKEST.find
    at = find(data, word, begin, end)
    while at >= 0:
        hits.append(at)
        at = find(data, word, at + 1, end)
    return hits


def survey(
    words: Sequence[bytes], data: bytes, begin: int, end: int, *, near: int = 0
) -> tuple[int, int, int] | None:
    """The first and the last offset of all words, and how often they stand in all, at least.

    near: where the words so far are no further apart on average, others are not counted
    between them.
    """
    first, last, count = end, -1, 0
    for word in words:
        if not count or last - first >= near * count:
            at = QUICKEST.find(data, word, begin, end)
            if at >= 0:
                stop = QUICKEST.rfind(data, word, at, end)
                count += QUICKEST.tally(data, word, at, stop + len(word))
                first, last = min(first, at), max(last, stop)
        else:
            at = QUICKEST.find(data, word, begin, first)
            first = at if at >= 0 else first
            last = max(last, QUICKEST.rfind(data, word, last, end))
    return (first, last, count) if count else None
