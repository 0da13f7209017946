"""The quick way through a torch trace: find GPU events by their category, read only those.

One pass over inflated pieces. The bytes between two events are learned from the beginning
of the file; spacing inside an event does not matter. Everything that
is not an event of interest is never parsed, so invalid JSON elsewhere does no harm. Where
something looks other than learned and cannot be resolved, `Unsafe` is raised, and the
file is read the exact way instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from pytest_sglprof.errors import TraceTruncated
from pytest_sglprof.trace.collect import Collector
from pytest_sglprof.trace.kineto import KERNEL, LAUNCH, Event, FullEvent
from pytest_sglprof.trace.mend import object_end, read_event
from pytest_sglprof.trace.metadata import read_footer, read_header

MAX_HEAD = 4 << 20  # bytes before the first event; more is left to the exact way
MAX_EVENT = 8 << 20  # bytes of one event, likewise

_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[\s*(?=\{)')
_BETWEEN = re.compile(rb'\s*,\s*\{\s*"')
_CATEGORY = re.compile(rb'"cat"\s*:\s*"(\w*)')
_OLD = (b"Operator", b"Runtime", b"Kernel", b"Memcpy", b"Memset")
_MERGED = re.compile(rb'"pid"\s*:\s*"\[[A-Z]+\d')
_COLON = ord(":")


class Unsafe(Exception):
    """The layout is not what was learned; the text says what was seen."""


@dataclass(frozen=True)
class Layout:
    """between: the bytes from an event's `}` to the next one's first `"`. merged: pids
    name ranks. old: the categories are those of before 2022."""

    between: bytes
    merged: bool
    old: bool

    @property
    def open_at(self) -> int:
        """Offset of `{` in `between`."""
        return self.between.rindex(b"{")


def scan(stream: Iterator[bytes], collector: Collector, *, by_text: bool = False) -> None:
    """Reads a whole trace into `collector`, its metadata included.

    by_text: convert times from their text (needed for absolute stamps). Raises Unsafe,
    NeedsText, and what the stream raises.
    """
    head, layout = _learn(stream)
    start = _EVENTS.search(head)
    if start is None:
        raise Unsafe("no list of events found")
    if not read_header(head[: start.start()], collector.facts):
        raise Unsafe("what stands before its events is no valid JSON")
    take = _taker(layout, collector, by_text=by_text)
    first = head.index(b'"', start.end()) + 1
    held = layout.between + head[first:]
    before, cut = b"", 0
    try:
        for piece in stream:
            last = held.rfind(layout.between)
            if last > 0:
                _check(layout, held, last)
                take(held, last)
                before, cut = held, last
                held = held[last:] + piece
            elif len(held) > MAX_EVENT:
                raise Unsafe("an event, or what follows the events, is very large")
            else:
                held += piece
    except TraceTruncated:
        if not collector.wanted.partial:
            raise
        collector.facts.truncated = True
    _finish(layout, collector, take, before[:cut], held)


def _learn(stream: Iterator[bytes]) -> tuple[bytes, Layout]:
    """Reads until two events are there; the bytes so far and their layout."""
    head = b""
    for piece in stream:
        head += piece
        start = _EVENTS.search(head)
        if start is not None:
            end = object_end(head, start.end())
            between = _BETWEEN.match(head, end) if end > 0 else None
            category = _CATEGORY.search(head, start.end())
            if between is not None and category is not None:
                return head, Layout(
                    between=b"}" + between[0],
                    merged=_MERGED.search(head, start.end(), end) is not None,
                    old=category[1] in _OLD,
                )
        if len(head) > MAX_HEAD:
            break
    raise Unsafe("the beginning of the list of events was not recognised")


def _check(layout: Layout, window: bytes, end: int) -> None:
    """One look a window whether the categories are still those that are searched for."""
    at = window.find(b'"cat"', 0, end)
    category = _CATEGORY.match(window, at) if at >= 0 else None
    if category is not None and not layout.old and category[1] in _OLD:
        raise Unsafe("the names of the categories change")


Take = Callable[[bytes, int], None]


def _taker(layout: Layout, collector: Collector, *, by_text: bool) -> Take:
    """A function that takes every event of interest before offset `end` of a window."""
    kinds = collector.wanted.kinds
    quick: list[bytes] = []
    full = [b'user_annotation"'] if kinds != {LAUNCH} else []
    activities = full if by_text or layout.merged else quick
    if KERNEL in kinds:
        activities += [b'"Kernel"', b'"Mem'] if layout.old else [b'"kernel"', b'"gpu_mem']
    if LAUNCH in kinds:
        full += [b'"Runtime"'] if layout.old else [b'"cuda_', b'"hip_']
    decode_quick = msgspec.json.Decoder(Event).decode
    decode_full = msgspec.json.Decoder(FullEvent).decode

    def take(window: bytes, end: int) -> None:
        for needle in quick:
            events: list[Event] = []
            for failed in _hits(layout, window, end, needle, decode_quick, events.append):
                collector.add_full(_slowly(layout, window, end, failed))
            if events:
                collector.add_quick(events)
        for needle in full:
            for failed in _hits(layout, window, end, needle, decode_full, collector.add_full):
                collector.add_full(_slowly(layout, window, end, failed))

    return take


def _hits(
    layout: Layout,
    window: bytes,
    end: int,
    needle: bytes,
    decode: Callable[[bytes], object],
    add: Callable[..., None],
) -> Iterator[int]:
    """Decodes the events around each `needle`; yields the offsets of those that fail."""
    between, open_at = layout.between, layout.open_at
    find, rfind = window.find, window.rfind
    size = len(needle)
    at = find(needle, 0, end)
    low = 0
    while at >= 0:
        if window[at + size] == _COLON:  # AMD's launches name their kernel: `"kernel": ...`
            at = find(needle, at + size, end)
            continue
        start = rfind(between, low, at)
        stop = find(between, at, end)
        if stop < 0:
            stop = end
        try:
            event = decode(window[start + open_at : stop + 1])
        except (msgspec.DecodeError, UnicodeDecodeError):
            yield at
        else:
            add(event)
        low = stop
        at = find(needle, stop, end)


def _slowly(layout: Layout, window: bytes, end: int, at: int) -> FullEvent:
    """The event around offset `at`, found by matching braces and mended if need be."""
    start = window.rfind(layout.between, 0, at)
    while start >= 0:
        first = start + layout.open_at
        stop = object_end(window, first, end + 1)
        if stop < 0 or stop > at:
            break
        following = _BETWEEN.match(window, stop)
        if following is None:
            break
        start = following.end() - len(layout.between)
    learned = window.find(layout.between, at, end)
    for stop in (object_end(window, first, end + 1), (learned if learned >= 0 else end) + 1):
        event = read_event(window[first:stop]) if stop > at else None
        if event is not None:
            return event
    raise Unsafe("an event of interest is not valid JSON")


def _finish(layout: Layout, collector: Collector, take: Take, before: bytes, held: bytes) -> None:
    """Takes the last events and reads what follows the list."""
    tail = before + held
    end = read_footer(tail, collector.facts)
    if end is not None:
        stop = max(end - len(before), 1)
        take(held[:stop], stop - 1)
        return
    if not collector.wanted.partial:
        raise Unsafe("the list of events has no recognised end")
    collector.facts.truncated = True
    cut = held.rfind(layout.between)
    if cut > 0:
        take(held, cut)
