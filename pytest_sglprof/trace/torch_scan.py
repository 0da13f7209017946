"""The quick way through a torch trace: find GPU events by their category, read only those.

One pass over inflated pieces. The bytes between two events are learned from the beginning
of the file; spacing inside an event does not matter. Everything that
is not an event of interest is never parsed, so invalid JSON elsewhere does no harm. Where
something looks other than learned and cannot be resolved, `Unsafe` is raised, and the
file is read the exact way instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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

__all__ = ["Unsafe", "scan"]

_COLON = ord(":")

Take = Callable[[Window], None]


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
    decode_quick = msgspec.json.Decoder(Event).decode
    decode_full = msgspec.json.Decoder(FullEvent).decode
    announced = [f'"{ANNOUNCEMENT}"'.encode()] if collector.wanted.sequences else []
    decode_announced = msgspec.json.Decoder(Announced).decode

    def take(window: Window) -> None:
        for needle in quick:
            events: list[Event] = []
            for failed in _hits(window, needle, decode_quick, events.append):
                collector.add_full(_slowly(layout, window.data, window.end, failed))
            if events:
                collector.add_quick(events)
        for needle in full:
            for failed in _hits(window, needle, decode_full, collector.add_full):
                collector.add_full(_slowly(layout, window.data, window.end, failed))
        for needle in announced:
            for _ in _hits(window, needle, decode_announced, collector.add_announced):
                pass  # a number that cannot be read is not known

    return take


def _hits(
    window: Window, needle: bytes, decode: Callable[[bytes], object], add: Callable[..., None]
) -> Iterator[int]:
    """Decodes the events around each `needle`; yields the offsets of those that fail."""
    between, open_at = window.layout.between, window.layout.open_at
    data, end, low = window.data, window.end, window.begin
    find, rfind = data.find, data.rfind
    size = len(needle)
    at = find(needle, low, end)
    while at >= 0:
        if data[at + size] == _COLON:  # AMD's launches name their kernel: `"kernel": ...`
            at = find(needle, at + size, end)
            continue
        start = rfind(between, low, at)
        stop = find(between, at, end)
        if stop < 0:
            stop = end
        try:
            event = decode(data[start + open_at : stop + 1])
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
