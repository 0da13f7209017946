"""Events of one file, rewritten for a trace of many ranks.

Nearly all chunks go the quick way: the rank's prefix is put before every process and flow
id by searching bytes, and the result is checked to be valid JSON in which every event was
changed once. A chunk that is anything else (metadata, textual process ids, another clock,
damage) goes the slow way, event by event.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from pytest_sglprof.trace.event_windows import Layout, Unsafe
from pytest_sglprof.trace.merge_ids import ProcessIds, RankNumbers, flow_id, shifted
from pytest_sglprof.trace.salvage import mended

# With what stands before it: the longer a text, the faster it is found.
_PID = re.compile(rb',\s*"pid"\s*:\s*')
_ID = re.compile(rb',\s*"id"\s*:\s*')
_CATEGORY = re.compile(rb'"cat"\s*:\s*"([^"\\]{0,60})"')
# A name that was copied into the file as it was, quotes and backslashes included.
_NAME = re.compile(rb'("name"\s*:\s*")(.*?)("\s*,\s*"(?:pid|ts|cat|ph)"\s*:)', re.DOTALL)
_UNESCAPED = re.compile(rb'\\(?!["\\/bfnrt]|u[0-9a-fA-F]{4})|(?<!\\)"')
_GPU_LABEL = re.compile(rb"GPU \d+")
_STREAM = re.compile(r"stream \d+")

RawEvent = dict[str, msgspec.Raw]


SAMPLE = 16  # of so many chunks one is asked for threads that nobody named


class _Quick(msgspec.Struct, gc=False):
    """What an event must have for the quick way. ph: anything but metadata."""

    ph: Literal["X", "s", "t", "f", "i", "I", "B", "E", "b", "e", "n", "C"]
    pid: int
    id: int | None = None


class _Thread(msgspec.Struct, gc=False):
    pid: int
    tid: int | str | float | None = None


_QUICK = msgspec.json.Decoder(list[_Quick])
_THREADS = msgspec.json.Decoder(list[_Thread])
_SLOW = msgspec.json.Decoder(list[RawEvent])


@dataclass
class Seen:
    """What passed: rank → events. lost: what could not be carried over → count.
    timeless: events whose time could not be moved to the common clock.

    threads: (new pid, thread) pairs with numeric ids. named: new pids that have a name.
    """

    events: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    mended: int = 0
    timeless: int = 0
    threads: set[tuple[int, int]] = field(default_factory=set)
    named: set[int] = field(default_factory=set)
    named_threads: set[tuple[int, int]] = field(default_factory=set)


class EventRewriter:
    """Rewrites the chunks of one file. `seen.events` counts what stands in the result.

    shift_ns: added to every time. taken: events of the file that were dealt with.
    """

    def __init__(self, numbers: RankNumbers, label: str, shift_ns: int = 0) -> None:
        self.seen = Seen()
        self.taken = 0
        self.chunks = 0
        self.ids = ProcessIds(numbers, label)
        self._numbers = numbers
        self._label = label
        self._shift = shift_ns
        self._pid = self._id = b""
        self._quick = shift_ns == 0

    @property
    def prefixes(self) -> dict[str, str]:
        """The first three digits of a new process id → its rank."""
        return {self._numbers.prefix(label).decode(): label for label in self.seen.events}

    def chunk(self, layout: Layout, events: bytes) -> bytes:
        """Events joined by commas, as they stand in the file, for the result.

        Raises Unsafe where they cannot be told apart.
        """
        if layout.merged:
            self._quick = False
        found = self._quickly(events) if self._quick else None
        return self._slowly(layout, events) if found is None else found

    def listed(self, events: list[RawEvent]) -> bytes:
        """The same for events that were decoded already."""
        self.taken += len(events)
        gpus = _gpu_processes(events)
        for event in events:
            self._rewrite(event, gpus)
        return msgspec.json.encode(events)[1:-1]

    def _quickly(self, events: bytes) -> bytes | None:
        if not self._pid:
            pid, flow = _PID.search(events), _ID.search(events)
            if pid is None:
                return None
            self._pid = pid[0]
            self._id = flow[0] if flow is not None else self._pid.replace(b"pid", b"id")
        prefix = self._numbers.prefix(self._label)
        # Splitting and joining searches once; `replace` searches twice, to count first.
        parts = events.split(self._pid)
        processes = len(parts) - 1
        flows = [at for at, part in enumerate(parts) if part[-1:].isdigit()]
        for at in flows:  # a flow's id stands right before its process id
            before, key, number = parts[at].rpartition(self._id)
            if not key or not number.isdigit() or len(number) > 15:
                return None
            parts[at] = before + key + prefix + number
        changed = (self._pid + prefix).join(parts)
        try:
            if not changed.isascii():
                changed.decode()
            whole = _QUICK.decode(b"".join((b"[", changed, b"]")))
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        with_id = len([1 for event in whole if event.id is not None])
        if len(whole) != processes or with_id != len(flows):
            return None
        if self.chunks % SAMPLE == 0:
            self.seen.threads.update(_threads(changed))
        self.chunks += 1
        self.seen.events[self._label] += len(whole)
        self.taken += len(whole)
        return changed

    def _slowly(self, layout: Layout, events: bytes) -> bytes:
        try:
            events.decode()  # in what is not looked at, msgspec takes any bytes
            decoded = _SLOW.decode(b"[" + events + b"]")
        except (msgspec.DecodeError, UnicodeDecodeError):
            decoded = self._one_by_one(layout, events)
        return self.listed(decoded)

    def _one_by_one(self, layout: Layout, events: bytes) -> list[RawEvent]:
        """Each event that can be read or mended; the others are counted as lost."""
        chunks = events.split(layout.between)
        opening = layout.between[layout.open_at :]
        texts = [
            (opening if at else b"") + chunk + (b"}" if at < len(chunks) - 1 else b"")
            for at, chunk in enumerate(chunks)
        ]
        found: list[RawEvent] = []
        lost: list[str] = []
        at = repaired = 0
        while at < len(texts):
            event, was_mended, used = _event(texts, at, layout)
            if event is not None:
                found.append(event)
                repaired += was_mended
            elif at == len(texts) - 1 and texts[at].count(b"{") > texts[at].count(b"}"):
                raise Unsafe("an event was cut where another one seemed to begin")
            else:
                lost.append(_kind(texts[at]))
            at += used
        self.taken += len(lost)
        self.seen.lost.update(lost)
        self.seen.mended += repaired
        return found

    def _rewrite(self, event: RawEvent, gpus: frozenset[bytes]) -> None:
        raw = bytes(event.get("pid", b"0"))
        label, pid, _ = self.ids.of(raw)
        self.seen.events[label] += 1
        event["pid"] = msgspec.Raw(b"%d" % pid)
        tid = bytes(event.get("tid", b""))
        if tid.isdigit():
            self.seen.threads.add((pid, int(tid)))
        if "id" in event:
            event["id"] = msgspec.Raw(flow_id(self._numbers.prefix(label), bytes(event["id"])))
        if self._shift and "ts" in event:
            time = shifted(bytes(event["ts"]), self._shift)
            if time is None:
                self.seen.timeless += 1
            else:
                event["ts"] = msgspec.Raw(time)
        if bytes(event.get("ph", b"")) == b'"M"':
            self._metadata(event, label, pid, gpu=raw in gpus)

    def _metadata(self, event: RawEvent, label: str, pid: int, *, gpu: bool) -> None:
        """Names begin with their rank, and processes are sorted by it."""
        try:
            what = json.loads(bytes(event["name"]))
            args: dict[str, Any] = json.loads(bytes(event["args"]))
        except (KeyError, ValueError):
            return
        if what == "process_name":
            self.seen.named.add(pid)
            args["name"] = f"{label} GPU" if gpu else f"{label} {args.get('name', '')}"
        elif what == "process_sort_index":
            args["sort_index"] = sort_index(self._numbers.number(label), 0 if gpu else 1)
        elif what == "thread_name":
            name = str(args.get("name", ""))
            if _STREAM.match(name):
                args["name"] = f"{label} {name.strip()}"
            if (tid := bytes(event.get("tid", b""))).isdigit():
                self.seen.named_threads.add((pid, int(tid)))
        else:
            return
        event["args"] = msgspec.Raw(msgspec.json.encode(args))


def _threads(events: bytes) -> set[tuple[int, int]]:
    """The (process, thread) pairs with numeric threads."""
    found = _THREADS.decode(b"".join((b"[", events, b"]")))
    return {(event.pid, event.tid) for event in found if isinstance(event.tid, int)}


def sort_index(rank_number: int, place: int) -> int:
    """Where a rank's process stands: behind the summary, by rank, the GPU first."""
    return 1000 + rank_number * 10 + place


def _gpu_processes(events: list[RawEvent]) -> frozenset[bytes]:
    """Pids (JSON text) that the profiler labelled as a GPU."""
    found = set()
    for event in events:
        labels = bytes(event.get("name", b"")) == b'"process_labels"'
        if labels and _GPU_LABEL.search(bytes(event.get("args", b""))):
            found.add(bytes(event.get("pid", b"")))
    return frozenset(found)


def _event(texts: list[bytes], at: int, layout: Layout) -> tuple[RawEvent | None, bool, int]:
    """The event at `at`, whether it was mended, and how many texts it took."""
    text = texts[at]
    found = _whole(text)
    if found is not None:
        return found, False, 1
    escaped = _with_escaped_name(text)
    for candidate in (mended(text), escaped, mended(escaped)):
        found = _whole(candidate)
        if found is not None:
            return found, True, 1
    if at + 1 < len(texts):  # a list of objects inside the event looks like two events
        comma = layout.between[1 : layout.open_at]
        found = _whole(text + comma + texts[at + 1])
        if found is not None:
            return found, False, 2
    return None, False, 1


def _with_escaped_name(text: bytes) -> bytes:
    def escaped(match: re.Match[bytes]) -> bytes:
        return match[1] + _UNESCAPED.sub(lambda found: b"\\" + found[0], match[2]) + match[3]

    return _NAME.sub(escaped, text, count=1)


def _whole(text: bytes) -> RawEvent | None:
    try:
        text.decode()
        found: list[RawEvent] = _SLOW.decode(b"[" + text + b"]")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found[0] if len(found) == 1 else None


def _kind(text: bytes) -> str:
    category = _CATEGORY.search(text)
    return f"{category[1].decode('utf-8', 'replace')} events" if category else "other events"
