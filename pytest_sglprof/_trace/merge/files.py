"""Merge the torch traces of many ranks into one file for Perfetto, with constant memory.

Each file is inflated in pieces; its events are rewritten where ranks would collide (process
ids, flow ids, names, clocks) and deflated again. Nothing else in an event changes.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

import msgspec

from pytest_sglprof._errors import TraceError
from pytest_sglprof._files import atomic_writer
from pytest_sglprof._trace.merge.events import (
    EventRewriter,
    RankNumbers,
    RawEvent,
    Seen,
    sort_index,
    was_text,
)
from pytest_sglprof._trace.paths import FileRanks, of_ranks
from pytest_sglprof._trace.read import refuse_twice
from pytest_sglprof._trace.torch.events import FileFacts, base_time, take_header
from pytest_sglprof._trace.torch.salvage import Document, read_whole
from pytest_sglprof._trace.torch.scan import Unsafe, event_chunks
from pytest_sglprof._trace.torch.stream import pieces

PIECE = 64 * 1024  # copies of larger ones come fresh from the kernel, page by page

NO_RANK = "no rank"  # events of a merged file whose process names none

Progress = Callable[[int, int], None]
Event = Mapping[str, object]


@dataclass(frozen=True)
class Merged:
    """events: rank label → events of its files that stand in the result. notes:
    human-readable notes on lost or altered events. lost: how many events were lost."""

    events: dict[str, int]
    notes: tuple[str, ...] = ()
    lost: int = 0


@dataclass(frozen=True)
class Source:
    """What must be known of a file before its events are written."""

    path: Path
    label: str
    base_ns: int
    notes: list[str] = field(default_factory=list)


_DOCUMENT = msgspec.json.Decoder(Document[RawEvent] | list[RawEvent])


def merge_files(
    files: Sequence[Path],
    out: Path,
    *,
    file_ranks: Mapping[Path, str] | None = None,
    ranks: Sequence[str] = (),
    streams: Mapping[str, frozenset[int]] | None = None,
    extra: Callable[[int], Iterable[Event]] = lambda base_ns: (),
    allow_partial: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Writes all events of `files` into `out`, whole or not at all; packed if `*.gz`.

    file_ranks: label of each file for which one is given. A coordinator's file is left out.
    ranks: labels in the order in which they are to stand; by default that of the files.
    streams: rank → the GPU's streams, to name their rows. extra: events to stand first,
    given the clock's zero in Unix ns. progress: (stored bytes read, bytes in all).
    Raises NotATrace, TraceTruncated, TraceError; each names the file.
    """
    files, left_out = of_ranks(files)
    file_rank = FileRanks(files, file_ranks or {})
    sources = [_source(path, file_rank, allow_partial) for path in files]
    refuse_twice([(source.path, source.label) for source in sources if source.label])
    base = next((source.base_ns for source in sources if source.base_ns), 0)
    labels = dict.fromkeys([*ranks, *(source.label for source in sources if source.label)])
    numbers = RankNumbers(tuple(labels))
    notes = [*left_out, *(note for source in sources for note in source.notes)]
    total = sum(path.stat().st_size for path in files)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total)

    events: Counter[str] = Counter()
    owners: list[tuple[Path, str]] = []
    lost = 0
    with TraceWriter(out, base_ns=base) as writer:
        writer.add(msgspec.json.encode(list(extra(base)))[1:-1])
        for source in sources:
            label = source.label or NO_RANK
            rewriter = EventRewriter(numbers, label, source.base_ns - base)
            notes += _copy(source.path, rewriter, writer, allow_partial, advance)
            owners += [(source.path, rank) for rank in rewriter.seen.events]
            refuse_twice(owners)
            names = _names(rewriter, numbers, streams or {})
            writer.add(msgspec.json.encode(names)[1:-1])
            events.update(rewriter.seen.events)
            notes += _notes_of(source.path, rewriter.seen)
            lost += sum(rewriter.seen.lost.values())
        summary = {"ranks": {label: events[label] for label in numbers.labels}, "notes": notes}
        writer.close({"sglprof": summary})
    return Merged({label: events[label] for label in numbers.labels}, tuple(notes), lost)


def _copy(
    path: Path,
    rewriter: EventRewriter,
    writer: TraceWriter,
    allow_partial: bool,
    progress: Callable[[int], None],
) -> list[str]:
    """All events of one file; notes of what was unusual."""
    facts = FileFacts()
    try:
        stream = pieces(path, size=PIECE, progress=progress)
        for chunk in event_chunks(stream, facts, partial=allow_partial):
            writer.add(rewriter.chunk(chunk.layout, chunk.events))
    except Unsafe as unsafe:
        whole = read_whole(path, _DOCUMENT, allow_partial=allow_partial)
        if rewriter.taken and whole.skipped:
            raise TraceError(
                f"{path} is damaged in a way that leaves unclear which events were merged",
                expected="a Kineto trace in which it is clear where each event ends",
                hint="record the window again with with_stack=False",
            ) from unsafe
        writer.add(rewriter.listed(whole.events[rewriter.taken :]))
        notes = [f"{path.name}: read as a whole, since {unsafe}"] if whole.events else []
        if whole.skipped:
            rewriter.seen.lost["events"] += whole.skipped
        return notes + ([_truncated(path)] if whole.truncated else [])
    return [_truncated(path)] if facts.truncated else []


def _source(path: Path, file_rank: FileRanks, allow_partial: bool) -> Source:
    """Reads the beginning of a file, and all of it only if rank or clock are not in there."""
    facts = FileFacts()
    try:
        chunks = event_chunks(pieces(path), facts, partial=allow_partial)
        first = next(chunks, None)
        merged = first is not None and first.layout.merged
        if not facts.base or not (facts.distributed or merged):
            for _ in chunks:
                pass
    except Unsafe:
        whole = read_whole(path, _DOCUMENT, allow_partial=allow_partial)
        take_header(whole.header, facts)
        merged = False
    base, notes = base_time(path, facts.base)
    if merged:
        return Source(path, "", base, notes)
    label, contradiction = file_rank.of(path, facts.distributed.encode())
    return Source(path, label, base, notes + contradiction)


def _names(
    rewriter: EventRewriter, numbers: RankNumbers, streams: Mapping[str, frozenset[int]]
) -> list[Event]:
    """Names and places of processes and GPU streams that the file itself does not name."""
    events: list[Event] = []
    seen = rewriter.seen
    for (pid, tid), label in _threads(rewriter):
        if pid not in seen.named:
            seen.named.add(pid)
            events += process_names(pid, f"{label} GPU", sort_index(numbers.number(label), 0))
        if (pid, tid) not in seen.named_threads and tid in streams.get(label, ()):
            events.append(thread_name(pid, tid, f"{label} stream {tid}"))
    for label, pid, text in rewriter.ids.all:
        if text and pid not in seen.named:
            events += process_names(pid, f"{label} {text}", sort_index(numbers.number(label), 2))
    return events


def _threads(rewriter: EventRewriter) -> list[tuple[tuple[int, int], str]]:
    """Of numeric processes (those that were texts have more digits), with their rank."""
    prefixes = rewriter.prefixes
    return [
        ((pid, tid), prefixes[str(pid)[:3]])
        for pid, tid in sorted(rewriter.seen.threads)
        if not was_text(pid)
    ]


def process_names(pid: int, name: str, place: int) -> list[Event]:
    """The events that give a process its name and its place."""
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0,
         "args": {"sort_index": place}},
    ]  # fmt: skip


def thread_name(pid: int, tid: int, name: str) -> Event:
    """The event that gives a row its name."""
    return {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _notes_of(path: Path, seen: Seen) -> list[str]:
    notes = []
    if seen.mended:
        notes.append(f"{path.name}: {seen.mended} events were not valid JSON and were mended")
    for what, count in seen.lost.items():
        notes.append(f"{path.name}: {count} {what} left out: not valid JSON")
    if seen.timeless:
        notes.append(
            f"{path.name}: {seen.timeless} times are not numbers and were kept as they are"
        )
    return notes


def _truncated(path: Path) -> str:
    return f"{path.name}: truncated; only what stands before its end was merged"


# Writes a trace's list of events piece by piece, packed, whole or not at all.


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
