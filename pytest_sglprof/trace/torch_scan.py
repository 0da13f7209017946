"""The quick way through a torch trace: find GPU events by their category, read only those.

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
from typing import Any, Generic, TypeVar, Union

import msgspec

from pytest_sglprof.trace.collect import Collector
from pytest_sglprof.trace.event_windows import BETWEEN, EventChunk, Layout, Unsafe, event_chunks
from pytest_sglprof.trace.kineto import (
    ANNOUNCEMENT,
    KERNEL,
    LAUNCH,
    NO_SPANS,
    PROCESS_GROUP,
    CallEvent,
    Event,
    FullEvent,
    ProcessName,
)
from pytest_sglprof.trace.needles import QUICKEST, offsets, survey
from pytest_sglprof.trace.salvage import object_end, read_event

__all__ = ["Unsafe", "scan"]

# Bytes from one hit to the next up to which what lies between, a flow or a launch as a rule,
# is decoded with them: that costs less than looking for where each event begins and ends.
_NEAR = 2000
_KEY = re.compile(rb'"?\w+"\s*:')
_GROUP = f'"{PROCESS_GROUP}"'.encode()

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
        full += [b'"Runtime"'] if layout.old else [b'"cuda_', b'"hip_']
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
        mine = _Categories(words)  # others are left to other searches
        self._kinds = {name: kind for name, kind in collector.kinds.items() if mine[name]}
        self._plain = _Decoder[Any](Union[(Event, *NO_SPANS)])
        self._calls = _Decoder[Any](Union[(CallEvent, *NO_SPANS)])

    def take(self, chunk: EventChunk) -> None:
        """Adds the chunk's activities."""
        found: list[Event] = []
        calls = False
        for run in _runs(chunk, self._words):
            told = QUICKEST.find(chunk.data, _GROUP, run.start, run.stop) >= 0
            decoder, kind = (self._calls, CallEvent) if told else (self._plain, Event)
            calls = calls or told
            events = decoder.all(run, self._add_mended)
            found += [event for event in events if type(event) is kind]
        if found:
            self._collector.add_quick(found, self._kinds, calls=calls)

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
    """Searches for events of one name; one that cannot be read tells nothing."""

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
        found = [offsets(word, data, first, last + len(word)) for word in self.words]
        return sorted(at for own in found for at in own if at <= last)

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
    found = survey(words, chunk.data, chunk.begin, chunk.end)
    if found is None:
        return
    first, last, count = found
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
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
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
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
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
