"""The events of a torch trace in chunks of whole events, from inflated pieces.

The bytes between two events are learned from the beginning of the file; spacing inside an
event does not matter. Where something looks other than learned and cannot be resolved,
`Unsafe` is raised, and the file must be read the exact way instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from pytest_sglprof.errors import TraceTruncated
from pytest_sglprof.trace.kineto import FileFacts
from pytest_sglprof.trace.metadata import read_footer, read_header
from pytest_sglprof.trace.salvage import object_end

MAX_HEAD = 4 << 20  # bytes before the first event; more is left to the exact way
MAX_EVENT = 8 << 20  # bytes of one event, likewise
OLD_CATEGORIES = (b"Operator", b"Runtime", b"Kernel", b"Memcpy", b"Memset")
BETWEEN = re.compile(rb'\s*,\s*\{\s*"')

_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[\s*(?=\{)')
_CATEGORY = re.compile(rb'"cat"\s*:\s*"(\w*)')
_MERGED = re.compile(rb'"pid"\s*:\s*"\[[A-Z]+\d')


class Unsafe(Exception):
    """The layout is not what was learned; the text says what was seen."""


class Layout(msgspec.Struct, frozen=True):
    """between: the bytes from an event's `}` to the next one's first `"`. merged: pids
    name ranks. old: the categories are those of before 2022."""

    between: bytes
    merged: bool
    old: bool

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
    if not read_header(head[: start.start()], facts):
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
                )
        if len(head) > MAX_HEAD:
            break
    raise Unsafe("the beginning of the list of events was not recognised")


def _checked(chunk: EventChunk) -> EventChunk:
    """One look a chunk whether the categories are still those that are searched for."""
    at = chunk.data.find(b'"cat"', chunk.begin, chunk.end)
    category = _CATEGORY.match(chunk.data, at) if at >= 0 else None
    if category is not None and not chunk.layout.old and category[1] in OLD_CATEGORIES:
        raise Unsafe("the names of the categories change")
    return chunk


def _rest(
    layout: Layout, facts: FileFacts, before: bytes, held: bytes, *, partial: bool
) -> Iterator[EventChunk]:
    """The last events, once what follows the list was read."""
    end = read_footer(before + held, facts)
    if end is not None:
        stop = max(end - len(before), 1)
        yield EventChunk(layout, held[:stop], stop - 1)
        return
    if not partial:
        raise Unsafe("the list of events has no recognised end")
    facts.truncated = True
    cut = held.rfind(layout.between)
    if cut > 0:
        yield EventChunk(layout, held, cut)
