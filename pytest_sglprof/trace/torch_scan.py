"""The quick way through a torch trace: find GPU events by their category, read only those.

One pass over inflated pieces. The bytes between two events are learned from the beginning
of the file; spacing inside an event does not matter. Everything that
is not an event of interest is never parsed, so invalid JSON elsewhere does no harm. Where
something looks other than learned and cannot be resolved, `Unsafe` is raised, and the
file is read the exact way instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Generic, TypeVar

import msgspec

from pytest_sglprof.trace.collect import Collector
from pytest_sglprof.trace.event_windows import BETWEEN, Layout, Unsafe, Window, event_windows
from pytest_sglprof.trace.kineto import (
    ANNOUNCEMENT,
    KERNEL,
    LAUNCH,
    Announced,
    Event,
    FullEvent,
)
from pytest_sglprof.trace.mend import object_end, read_event
from pytest_sglprof.trace.needles import offsets

__all__ = ["Unsafe", "scan"]

_COLON = ord(":")
# Bytes from one hit to the next up to which what lies between, a flow as a rule, is decoded
# with them: that costs less than looking for where each event begins and ends.
_NEAR = 1000

Take = Callable[[Window], None]
E = TypeVar("E", Event, FullEvent)
D = TypeVar("D")


def scan(stream: Iterator[bytes], collector: Collector, *, by_text: bool = False) -> None:
    """Reads a whole trace into `collector`, its metadata included.

    by_text: convert times from their text (needed for absolute stamps). Raises Unsafe,
    NeedsText, and what the stream raises.
    """
    take: Take | None = None
    partial = collector.wanted.partial
    for window in event_windows(stream, collector.facts, partial=partial):
        if take is None:
            take = _taker(window.layout, collector, by_text=by_text)
        take(window)


def _taker(layout: Layout, collector: Collector, *, by_text: bool) -> Take:
    """A function that takes every event of interest of a window."""
    kinds = collector.wanted.kinds
    quick: list[bytes] = []
    full = [b'user_annotation"'] if KERNEL in kinds else []
    activities = full if by_text or layout.merged else quick
    if KERNEL in kinds:
        activities += [b'"Kernel"', b'"Mem'] if layout.old else [b'"kernel"', b'"gpu_mem']
    if LAUNCH in kinds:
        full += [b'"Runtime"'] if layout.old else [b'"cuda_', b'"hip_']
    searches: list[_Search[Event] | _Search[FullEvent] | _Announcements] = []

    def add_each(events: Sequence[FullEvent]) -> None:
        for event in events:
            collector.add_full(event)

    mended = collector.add_full
    searches += [_Search(word, Event, collector.add_quick, mended) for word in quick]
    searches += [_Search(word, FullEvent, add_each, mended) for word in full]
    searches += [_Announcements(collector)] if collector.wanted.sequences else []

    def take(window: Window) -> None:
        for search in searches:
            search.take(window)

    return take


class _Search(Generic[E]):
    """The events whose category holds one word, decoded as one type.

    add: takes those of a window; add_mended: one that was no valid JSON and was mended.
    """

    def __init__(
        self,
        word: bytes,
        kind: type[E],
        add: Callable[[Sequence[E]], None],
        add_mended: Callable[[FullEvent], None],
    ) -> None:
        self._word = word
        self._add: Callable[[Sequence[E]], None] = add
        self._add_mended = add_mended
        self._mine = _Categories(word.decode())
        self._one: msgspec.json.Decoder[E] = msgspec.json.Decoder(kind)
        self._run: msgspec.json.Decoder[list[E]] = msgspec.json.Decoder(
            list[kind]  # type: ignore[valid-type]
        )

    def take(self, window: Window) -> None:
        """Adds the window's events."""
        hits = offsets(self._word, window.data, window.begin, window.end)
        if not hits:
            return
        mine = self._mine
        found: list[E] = []
        for near in _near(hits):
            events = self._at_once(window, near)
            if events is None:
                events = []
                for at, event in _each(window, len(self._word), near, self._one.decode):
                    if event is not None:
                        events.append(event)
                        continue
                    mended = _slowly(window.layout, window.data, window.end, at)
                    if mine[mended.cat]:
                        self._add_mended(mended)
            found += [event for event in events if mine[event.cat]]
        if found:
            self._add(found)

    def _at_once(self, window: Window, hits: Sequence[int]) -> list[E] | None:
        """All events from that of the first hit to that of the last, decoded in one call.

        None where one of them, of whatever category, is not as expected.
        """
        between, data = window.layout.between, window.data
        start = data.rfind(between, window.begin, hits[0]) + window.layout.open_at
        stop = data.find(between, hits[-1], window.end)
        try:
            return self._run.decode(b"[%b]" % data[start : (stop if stop >= 0 else window.end) + 1])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None


class _Announcements:
    """The numbers of collectives, which stand in operators of one name."""

    def __init__(self, collector: Collector) -> None:
        self._word = f'"{ANNOUNCEMENT}"'.encode()
        self._decode = msgspec.json.Decoder(Announced).decode
        self._add = collector.add_announced

    def take(self, window: Window) -> None:
        """Adds those of the window; a number that cannot be read is not known."""
        hits = offsets(self._word, window.data, window.begin, window.end)
        for _at, event in _each(window, len(self._word), hits, self._decode):
            if event is not None:
                self._add(event)


def _each(
    window: Window, size: int, hits: Sequence[int], decode: Callable[[bytes], D]
) -> Iterator[tuple[int, D | None]]:
    """The event around each hit of a word of `size` bytes; None where it cannot be decoded."""
    between, open_at = window.layout.between, window.layout.open_at
    data, end, low = window.data, window.end, window.begin
    for at in hits:
        # AMD's launches name their kernel: `"kernel": ...`.
        if at < low or data[at + size] == _COLON:
            continue
        start = data.rfind(between, low, at)
        stop = data.find(between, at, end)
        if stop < 0:
            stop = end
        event: D | None = None
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            event = decode(data[start + open_at : stop + 1])
        yield at, event
        low = stop


class _Categories(dict[str, bool]):
    """category -> whether it, in its quotes, holds the word."""

    def __init__(self, word: str) -> None:
        super().__init__()
        self._word = word

    def __missing__(self, category: str) -> bool:
        self[category] = self._word in f'"{category}"'
        return self[category]


def _near(hits: Sequence[int]) -> Iterator[Sequence[int]]:
    """The hits in runs that lie close together."""
    following = islice(hits, 1, None)
    first = 0
    for number in [n for n, (a, b) in enumerate(zip(hits, following), 1) if b - a > _NEAR]:  # noqa: B905
        yield hits[first:number]
        first = number
    yield hits[first:]


def _slowly(layout: Layout, window: bytes, end: int, at: int) -> FullEvent:
    """The event around offset `at`, found by matching braces and mended if need be."""
    start = window.rfind(layout.between, 0, at)
    while start >= 0:
        first = start + layout.open_at
        stop = object_end(window, first, end + 1)
        if stop < 0 or stop > at:
            break
        following = BETWEEN.match(window, stop)
        if following is None:
            break
        start = following.end() - len(layout.between)
    learned = window.find(layout.between, at, end)
    for stop in (object_end(window, first, end + 1), (learned if learned >= 0 else end) + 1):
        event = read_event(window[first:stop]) if stop > at else None
        if event is not None:
            return event
    raise Unsafe("an event of interest is not valid JSON")
