"""Scan a torch trace: find GPU events by their category, and parse only those.

One pass over inflated pieces. The bytes between two events are learned from the beginning
of the file; spacing inside an event does not matter. Only events of interest are parsed, and
what lies close between them; invalid JSON elsewhere does no harm. Where something looks
other than learned and cannot be resolved, `Unsafe` is raised, and the file is read the
exact way instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, Union

import msgspec

from pytest_sglprof._errors import TraceTruncated
from pytest_sglprof._limits import UNDECODABLE
from pytest_sglprof._trace.torch.collect import Collector, NeedsText, ScanRequest
from pytest_sglprof._trace.torch.events import (
    ANNOUNCEMENT,
    KERNEL,
    LAUNCH,
    NO_SPANS,
    Batch,
    Event,
    FileFacts,
    FullEvent,
    Header,
    ProcessName,
    take_header,
)
from pytest_sglprof._trace.torch.salvage import object_end, read_event
from pytest_sglprof._trace.torch.stream import PIECE, QUICKEST, offsets, pieces, survey


def scan_file(
    path: Path,
    request: ScanRequest,
    emit: Callable[[Batch], None],
    *,
    restart: Callable[[], None] = lambda: None,
    piece: int = PIECE,
) -> FileFacts:
    """Scans the requested activities of one file; returns what else it says.

    emit: receives batches as they fill; they count only once this function has returned
    facts that are not `unsafe`. restart: called when what was emitted is void. piece: bytes
    inflated at once.
    Raises NotATrace, TraceTruncated, TraceError; each names the file.
    """
    for by_text in (False, True):
        collector = Collector(request, emit)
        stream = pieces(path, size=piece)
        try:
            scan(stream, collector, by_text=by_text)
            return collector.finish()
        except NeedsText:
            restart()
        except Unsafe as unsafe:
            restart()
            return FileFacts(unsafe=str(unsafe))
    raise AssertionError  # reading by text never asks for it again


# Split inflated pieces into chunks of whole events.

MAX_HEAD = 4 << 20  # bytes before the first event; more is left to the exact way
MAX_EVENT = 8 << 20  # bytes of one event, likewise
OLD_CATEGORIES = (b"Operator", b"Runtime", b"Kernel", b"Memcpy", b"Memset")
BETWEEN = re.compile(rb'\s*,\s*\{\s*"')

# Some tools write the list of events alone.
_EVENTS = re.compile(rb'(?:"traceEvents"\s*:\s*|\A(?:\xef\xbb\xbf)?\s*)\[\s*(?=\{)')
_ANOTHER = b'"traceEvents"'  # within the events: a second document begins
_ANOTHER_LIST = re.compile(rb"\}\s*\]\s*\[\s*\{")
_CATEGORY = re.compile(rb'"cat"\s*:\s*"(\w*)')
_MERGED = re.compile(rb'"pid"\s*:\s*"\[[A-Z]+\d')


class Unsafe(Exception):
    """The layout is not what was learned; the text says what was seen."""


class Layout(msgspec.Struct, frozen=True):
    """between: the bytes from an event's `}` to the next one's first `"`. merged: pids
    name ranks. old: the categories are those of before 2022. alone: the document is the
    list of events and nothing else."""

    between: bytes
    merged: bool
    old: bool
    alone: bool = False

    @property
    def open_at(self) -> int:
        """Offset of `{` in `between`."""
        return self.between.rindex(b"{")


class EventChunk(msgspec.Struct, frozen=True, gc=False):
    """Whole events: `data` from `begin`, where `layout.between` stands, to `end`, a last `}`."""

    layout: Layout
    data: bytes
    end: int
    begin: int = 0

    @property
    def events(self) -> bytes:
        """The events alone, as they stand in the file, from `{` to `}`."""
        return self.data[self.begin + self.layout.open_at : self.end + 1]


def event_chunks(
    stream: Iterator[bytes], facts: FileFacts, *, partial: bool = False
) -> Iterator[EventChunk]:
    """Yields all events of a trace; `facts` has the header's metadata before the first one.

    The footer's metadata is there after the last chunk. partial: takes what stands before
    the end of a truncated file. Raises Unsafe, and what the stream raises.
    """
    head, layout = _learn(stream)
    start = _EVENTS.search(head)
    if start is None:
        raise Unsafe("no list of events found")
    if not layout.alone and not read_header(head[: start.start()], facts):
        raise Unsafe("what stands before its events is no valid JSON")
    held = layout.between + head[head.index(b'"', start.end()) + 1 :]
    before, cut = b"", 0
    piece = b""  # the last one is left to `_rest`: the list may end in it
    try:
        for following in stream:
            # Only the event that reaches over the edge of a piece is copied.
            first = piece.find(layout.between)
            seam = held + (piece if first < 0 else piece[: first + 1])
            last = seam.rfind(layout.between) if first < 0 else len(seam) - 1
            if last > 0:
                yield _checked(EventChunk(layout, seam, last))
                before, cut = seam, last
            held = seam[last:]
            if first >= 0:
                last = piece.rfind(layout.between)
                if last > first:
                    yield _checked(EventChunk(layout, piece, last, first))
                before, cut, held = piece, last, piece[last:]
            elif len(held) > MAX_EVENT:
                raise Unsafe("an event, or what follows the events, is very large")
            piece = following
    except TraceTruncated:
        if not partial:
            raise
        facts.truncated = True
    yield from _rest(layout, facts, before[:cut], held + piece, partial=partial)


def _learn(stream: Iterator[bytes]) -> tuple[bytes, Layout]:
    """Reads until two events are there; the bytes so far and their layout."""
    head = b""
    for piece in stream:
        head += piece
        start = _EVENTS.search(head)
        if start is not None:
            end = object_end(head, start.end())
            between = BETWEEN.match(head, end) if end > 0 else None
            category = _CATEGORY.search(head, start.end())
            if between is not None and category is not None:
                return head, Layout(
                    between=b"}" + between[0],
                    merged=_MERGED.search(head, start.end(), end) is not None,
                    old=category[1] in OLD_CATEGORIES,
                    alone=not start[0].startswith(b'"'),
                )
        if len(head) > MAX_HEAD:
            break
    raise Unsafe("the beginning of the list of events was not recognised")


def _checked(chunk: EventChunk) -> EventChunk:
    """Looks whether the categories are still those that are searched for, and the document one.

    Events of a second document would be counted as those of the first one's rank.
    """
    if QUICKEST.find(chunk.data, _ANOTHER, chunk.begin, chunk.end) >= 0 or (
        chunk.layout.alone and _ANOTHER_LIST.search(chunk.data, chunk.begin, chunk.end)
    ):
        raise Unsafe("another document seems to begin within the events")
    at = chunk.data.find(b'"cat"', chunk.begin, chunk.end)
    category = _CATEGORY.match(chunk.data, at) if at >= 0 else None
    if category is not None and not chunk.layout.old and category[1] in OLD_CATEGORIES:
        raise Unsafe("the names of the categories change")
    return chunk


def _rest(
    layout: Layout, facts: FileFacts, before: bytes, held: bytes, *, partial: bool
) -> Iterator[EventChunk]:
    """The last events, once what follows the list was read."""
    end = read_footer(before + held, facts, alone=layout.alone)
    if end is not None:
        stop = max(end - len(before), 1)
        if held.find(_ANOTHER, stop) >= 0:
            raise Unsafe("a second list of events follows")
        yield _checked(EventChunk(layout, held[:stop], stop - 1))
        return
    if not partial:
        raise Unsafe("the list of events has no recognised end")
    facts.truncated = True
    cut = held.rfind(layout.between)
    if cut > 0:
        yield _checked(EventChunk(layout, held, cut))


# Bytes from one hit to the next up to which what lies between, a flow or a launch as a rule,
# is decoded with them: that costs less than looking for where each event begins and ends.
_NEAR = 2000
_KEY = re.compile(rb'"?\w+"\s*:')

Take = Callable[[EventChunk], None]
E = TypeVar("E")


def scan(stream: Iterator[bytes], collector: Collector, *, by_text: bool = False) -> None:
    """Reads a whole trace into `collector`, its metadata included.

    by_text: convert times from their text (needed for absolute stamps). Raises Unsafe,
    NeedsText, and what the stream raises.
    """
    take: Take | None = None
    partial = collector.request.partial
    for chunk in event_chunks(stream, collector.facts, partial=partial):
        if take is None:
            take = _taker(chunk.layout, collector, by_text=by_text)
        take(chunk)


def _taker(layout: Layout, collector: Collector, *, by_text: bool) -> Take:
    """A function that takes every event of interest of a chunk."""
    kinds = collector.request.kinds
    quick: list[bytes] = []
    full = [b'user_annotation"'] if KERNEL in kinds else []
    activities = full if by_text or layout.merged else quick
    if KERNEL in kinds:
        activities += [b'"Kernel"', b'"Mem'] if layout.old else [b'"kernel"', b'"gpu_mem']
    if LAUNCH in kinds:
        activities += [b'"Runtime"'] if layout.old else [b'"cuda_', b'"hip_']
    searches: list[_Quick | _Full | _Named[FullEvent] | _Named[ProcessName]] = []
    searches += [_Quick(quick, collector)] if quick else []
    searches += [_Full(full, collector)] if full else []
    if collector.request.sequences:
        searches.append(_Named(ANNOUNCEMENT, FullEvent, collector.add_announced))
    if layout.merged:
        searches.append(_Named("process_name", ProcessName, collector.add_process))

    def take(chunk: EventChunk) -> None:
        for search in searches:
            search.take(chunk)

    return take


class _Quick:
    """Searches for activities whose times fit a float: the hottest path."""

    def __init__(self, words: Sequence[bytes], collector: Collector) -> None:
        self._words = words
        self._collector = collector
        wanted = _Categories(words)  # others are left to other searches
        self._kinds = {name: kind for name, kind in collector.kinds.items() if wanted[name]}
        self._launches = {name for name, kind in self._kinds.items() if kind == LAUNCH}
        self._decoder = _Decoder[Any](Union[(Event, *NO_SPANS)])

    def take(self, chunk: EventChunk) -> None:
        """Adds the chunk's activities."""
        activities: list[Event] = []
        idle, launches = self._collector.idle, self._launches
        for run in _runs(chunk, self._words):
            activities += [
                event
                for event in self._decoder.all(run, self._add_mended)
                if type(event) is Event and not (event.cat in launches and idle[event.name])
            ]
        if activities:
            self._collector.add_quick(activities, self._kinds)

    def _add_mended(self, event: FullEvent) -> None:
        if event.cat in self._kinds:
            self._collector.add_full(event)


class _Full:
    """Searches for events that are read by their text."""

    def __init__(self, words: Sequence[bytes], collector: Collector) -> None:
        self._words = words
        self._mine = _Categories(words)
        self._decoder = _Decoder[FullEvent](FullEvent)
        self._collector = collector

    def take(self, chunk: EventChunk) -> None:
        """Adds the chunk's events."""
        for run in _runs(chunk, self._words):
            for event in self._decoder.all(run, self._add):
                self._add(event)

    def _add(self, event: FullEvent) -> None:
        if self._mine[event.cat]:
            self._collector.add_full(event)


class _Named(Generic[E]):
    """Searches for events of one name; unreadable ones are ignored."""

    def __init__(self, name: str, kind: type[E], add: Callable[[E], None]) -> None:
        self._word = f'"{name}"'.encode()
        self._decode: Callable[[bytes], E] = msgspec.json.Decoder(kind).decode
        self._add = add

    def take(self, chunk: EventChunk) -> None:
        """Adds those of the chunk."""
        hits = offsets(self._word, chunk.data, chunk.begin, chunk.end)
        for _at, event in _each(chunk, hits, self._decode):
            if event is not None:
                self._add(event)


class _Categories(dict[str, bool]):
    """category -> whether it, in its quotes, holds one of the words."""

    def __init__(self, words: Sequence[bytes]) -> None:
        super().__init__()
        self._words = [word.decode() for word in words]

    def __missing__(self, category: str) -> bool:
        self[category] = any(word in f'"{category}"' for word in self._words)
        return self[category]


class _Run(msgspec.Struct, frozen=True, gc=False):
    """Neighbouring events, from the `{` at `start` to `stop`.

    first, last: where the first and the last of the words stand.
    """

    chunk: EventChunk
    words: Sequence[bytes]
    start: int
    stop: int
    first: int
    last: int

    def hits(self) -> list[int]:
        """Where the words stand."""
        data, first, last = self.chunk.data, self.first, self.last
        offsets_by_word = [offsets(word, data, first, last + len(word)) for word in self.words]
        return sorted(at for places in offsets_by_word for at in places if at <= last)

    def parts(self) -> Iterator[_Run]:
        """Runs of only those events that lie close together; an event is in one of them."""
        chunk, hits = self.chunk, self.hits()
        first = last = hits[0]
        for at in hits[1:]:
            if at - last > _NEAR and at >= (stop := _end(chunk, last)):
                yield _run(chunk, self.words, first, last, stop)
                first = at
            last = at
        yield _run(chunk, self.words, first, last, self.stop)


def _runs(chunk: EventChunk, words: Sequence[bytes]) -> Iterator[_Run]:
    """The events that hold words: in one run, unless most of what it holds is something else."""
    extent = survey(words, chunk.data, chunk.begin, chunk.end, near=_NEAR)
    if extent is None:
        return
    first, last, count = extent
    run = _run(chunk, words, first, last, _end(chunk, last))
    if last - first <= _NEAR * (count - 1):
        yield run
    else:
        yield from run.parts()


def _run(chunk: EventChunk, words: Sequence[bytes], first: int, last: int, stop: int) -> _Run:
    start = chunk.data.rfind(chunk.layout.between, chunk.begin, first)
    return _Run(chunk, words, start + chunk.layout.open_at, stop, first, last)


def _end(chunk: EventChunk, at: int) -> int:
    """The end of the event around offset `at`."""
    stop = chunk.data.find(chunk.layout.between, at, chunk.end)
    return (stop if stop >= 0 else chunk.end) + 1


class _Decoder(Generic[E]):
    """Decodes a run in one call; where that fails, its parts, and of those each hit's event."""

    def __init__(self, kind: Any) -> None:
        self._one: Callable[[bytes], E] = msgspec.json.Decoder(kind).decode
        self._many: Callable[[bytes], list[E]] = msgspec.json.Decoder(list[kind]).decode

    def all(self, run: _Run, mended: Callable[[FullEvent], None]) -> list[E]:
        """The events of a run; mended: takes those that had to be mended first."""
        text = memoryview(run.chunk.data)[run.start : run.stop]
        with suppress(*UNDECODABLE):
            return self._many(b"".join((b"[", text, b"]")))
        parts = [*run.parts()]
        if len(parts) > 1:
            return [event for part in parts for event in self.all(part, mended)]
        return self._singly(run, mended)

    def _singly(self, run: _Run, mended: Callable[[FullEvent], None]) -> list[E]:
        chunk = run.chunk
        events = []
        for at, event in _each(chunk, run.hits(), self._one):
            if event is not None:
                events.append(event)
            else:
                mended(_slowly(chunk, at))
        return events


def _each(
    chunk: EventChunk, hits: Sequence[int], decode: Callable[[bytes], E]
) -> Iterator[tuple[int, E | None]]:
    """The event around each hit; None where it cannot be decoded."""
    between, open_at = chunk.layout.between, chunk.layout.open_at
    data, low = chunk.data, chunk.begin
    for at in hits:
        # AMD's launches name their kernel: `"kernel": ...`.
        if at < low or _KEY.match(data, at):
            continue
        start = data.rfind(between, low, at)
        stop = _end(chunk, at)
        event: E | None = None
        with suppress(*UNDECODABLE):
            event = decode(data[start + open_at : stop])
        yield at, event
        low = stop - 1  # a `}`, with which what lies between events begins


def _slowly(chunk: EventChunk, at: int) -> FullEvent:
    """The event around offset `at`, found by matching braces and mended if need be."""
    layout, data, end = chunk.layout, chunk.data, chunk.end
    start = data.rfind(layout.between, 0, at)
    while start >= 0:
        first = start + layout.open_at
        stop = object_end(data, first, end + 1)
        if stop < 0 or stop > at:
            break
        following = BETWEEN.match(data, stop)
        if following is None:
            break
        start = following.end() - len(layout.between)
    for stop in (object_end(data, first, end + 1), _end(chunk, at)):
        event = read_event(data[first:stop]) if stop > at else None
        if event is not None:
            return event
    raise Unsafe("an event of interest is not valid JSON")


# What stands before and after the list of events of a torch trace.


_LIST_END = re.compile(rb'\}\s*\]\s*(?=,\s*"|\}\s*$)')
_END_ALONE = re.compile(rb"\}\s*\]\s*\Z")
_MOST_ENDS = 200  # each is followed by a try to decode all that comes behind it


_HEADER = msgspec.json.Decoder(Header)


def read_header(data: bytes, facts: FileFacts) -> bool:
    """Takes facts from the bytes before ``"traceEvents"``; False when they are no JSON."""
    text = data.removeprefix(b"\xef\xbb\xbf").strip().rstrip(b",")
    return _take(text + b"}", facts)


def read_footer(data: bytes, facts: FileFacts, *, alone: bool = False) -> int | None:
    """Finds the end of the event list and takes facts from what follows.

    data: the last bytes of the file. alone: the list is the whole document. Returns the
    offset behind the last event's brace, or None when no rest of `data` closes the document.
    Of several candidates (a list of objects after the events ends alike) the first one is
    right: what lies deeper cannot close the document.
    """
    if alone:
        last = _END_ALONE.search(data)
        return last.start() + 1 if last else None
    for match in islice(_LIST_END.finditer(data), _MOST_ENDS):
        if _take(b'{"":0' + data[match.end() :], facts):
            return match.start() + 1
    return None


def _take(document: bytes, facts: FileFacts) -> bool:
    try:
        document.decode()  # in keys that are not asked for, msgspec takes any bytes
        header = _HEADER.decode(document)
    except UNDECODABLE:
        return False
    take_header(header, facts)
    return True
