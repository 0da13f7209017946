"""The windows of a large results.json, each decoded when it is asked for.

In a file that this plugin wrote, a window reaches from a line `  {` to a line `  }`, in the list
that the line ` "windows": [` begins. No text in JSON has an end of a line in it, so these lines are
what they seem to be. A file that was written in another way is left to who decodes it as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, overload

import msgspec

from pytest_sglprof._errors import SglprofError
from pytest_sglprof._limits import UNDECODABLE, why_undecodable
from pytest_sglprof._report.model import RecordedWindow, Results, WindowHead

LARGE = 4 << 20  # bytes, of 25 windows; as a whole they take six times that of memory
CHUNK = 1 << 20
MOST = 256 << 20  # bytes of one window, of what stands before the windows, and behind them
BEGIN, END = b'\n "windows": [\n', b"\n  }"

Place = tuple[int, int]  # offset and length, in bytes


class StoredWindows(Sequence[RecordedWindow]):
    """The windows of a file, which stays as it is as long as they are needed. heads: of all.

    others: by index, windows that stand for those of the file.
    """

    def __init__(
        self,
        path: Path,
        places: Sequence[Place],
        heads: Sequence[WindowHead],
        others: Mapping[int, RecordedWindow] | None = None,
    ) -> None:
        self._path, self._places, self._others = path, places, dict(others or {})
        self.heads = tuple(self._others.get(at, head) for at, head in enumerate(heads))
        self._index = {id(head): at for at, head in enumerate(self.heads)}

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredWindows, (self._path, self._places, self.heads, self._others)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> RecordedWindow: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[RecordedWindow]: ...
    def __getitem__(self, at: int | slice) -> RecordedWindow | Sequence[RecordedWindow]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(len(self)))]
        if at in self._others:
            return self._others[at]
        offset, length = self._places[at]
        with self._path.open("rb") as stream:  # of hundreds of runs not all can stay open
            stream.seek(offset)
            text = stream.read(length)
        try:
            return msgspec.json.decode(text, type=RecordedWindow)
        except UNDECODABLE as error:
            raise SglprofError(
                f"{self._path}: $.windows[{at}]: {why_undecodable(error)}",
                expected="what results.schema.json describes",
            ) from error

    def whole(self, head: WindowHead) -> RecordedWindow:
        """The window of one of `heads`."""
        return self[self._index[id(head)]]

    def with_other(self, head: WindowHead, window: RecordedWindow) -> StoredWindows:
        """The same windows, but `window` in place of that of `head`."""
        others = {**self._others, self._index[id(head)]: window}
        return StoredWindows(self._path, self._places, self.heads, others)


def heads_of(run: Results) -> Sequence[WindowHead]:
    """The head of each window of a run; each call gives the same objects."""
    return run.windows.heads if isinstance(run.windows, StoredWindows) else run.windows


def whole(head: WindowHead, run: Results) -> RecordedWindow:
    """The window of one of the heads of a run."""
    if isinstance(head, RecordedWindow):
        return head
    assert isinstance(run.windows, StoredWindows)
    return run.windows.whole(head)


def with_window(run: Results, head: WindowHead, window: RecordedWindow) -> Results:
    """The run with `window` in place of that of `head`."""
    if isinstance(run.windows, StoredWindows):
        return msgspec.structs.replace(run, windows=run.windows.with_other(head, window))
    windows = [window if each is head else each for each in run.windows]
    return msgspec.structs.replace(run, windows=windows)


def stored_results(path: Path) -> Results | None:
    """The document of a large file; None for a small one, and for one that is not as ours are."""
    if path.stat().st_size < LARGE:
        return None
    try:
        with path.open("rb") as stream:
            return _read(path, stream)
    except UNDECODABLE:
        return None


def _read(path: Path, stream: IO[bytes]) -> Results | None:
    decoder = msgspec.json.Decoder(WindowHead)
    ahead = bytearray()
    before = _until(BEGIN, stream, ahead)
    places: list[Place] = []
    heads = []
    offset, between = len(before), b",\n"
    while between == b",\n":
        text = _until(END, stream, ahead)
        heads.append(decoder.decode(text))
        places.append((offset, len(text)))
        between = _until(b"\n", stream, ahead)
        offset += len(text) + len(between)
    rest = between + ahead + stream.read(MOST)
    document = msgspec.json.decode(before + rest, type=Results)
    return msgspec.structs.replace(document, windows=StoredWindows(path, places, heads))


def _until(mark: bytes, stream: IO[bytes], ahead: bytearray) -> bytes:
    """What comes up to the end of `mark`, of the file, or of `MOST` bytes.

    ahead: what was read beyond it.
    """
    at = ahead.find(mark)
    while at < 0 and len(ahead) < MOST and (piece := stream.read(CHUNK)):
        begin = max(0, len(ahead) - len(mark))
        ahead += piece
        at = ahead.find(mark, begin)
    end = len(ahead) if at < 0 else at + len(mark)
    taken = bytes(ahead[:end])
    del ahead[:end]
    return taken
