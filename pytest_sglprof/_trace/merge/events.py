"""Events of one file, rewritten for a trace of many ranks.

Nearly all chunks go the quick way: the rank's prefix is put before every process and flow
id by searching bytes, and the result is checked to be valid JSON in which every event was
changed once. A chunk that is anything else (metadata, textual process ids, another clock,
damage) goes the slow way, event by event.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from pytest_sglprof._errors import TraceError
from pytest_sglprof._limits import UNDECODABLE, refuse_deep
from pytest_sglprof._trace.paths import rank_of_pid
from pytest_sglprof._trace.torch.events import ns, string_of
from pytest_sglprof._trace.torch.salvage import mended
from pytest_sglprof._trace.torch.scan import Layout, Unsafe

# With what stands before it: longer patterns are found faster.
_PID = re.compile(rb',\s*"pid"\s*:\s*')
_ID = re.compile(rb',\s*"id"\s*:\s*')
_CATEGORY = re.compile(rb'"cat"\s*:\s*"([^"\\]{0,60})"')
# A name that was copied into the file as it was, quotes and backslashes included.
_NAME = re.compile(rb'("name"\s*:\s*")(.*?)("\s*,\s*"(?:pid|ts|cat|ph)"\s*:)', re.DOTALL)
_UNESCAPED = re.compile(rb'\\(?!["\\/bfnrt]|u[0-9a-fA-F]{4})|(?<!\\)"')
_GPU_LABEL = re.compile(rb"GPU \d+")
_STREAM = re.compile(r"stream \d+")

RawEvent = dict[str, msgspec.Raw]


SAMPLE = 16  # one of so many chunks is searched for threads without a name


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
_TEXT = msgspec.json.Decoder(str)
_ARGS = msgspec.json.Decoder(dict[str, Any])


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

        Raises Unsafe where it is not clear where one event ends.
        """
        if layout.merged:
            self._quick = False
        rewritten = self._quickly(events) if self._quick else None
        return self._slowly(layout, events) if rewritten is None else rewritten

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
        except UNDECODABLE:
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
        except UNDECODABLE:
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
        readable: list[RawEvent] = []
        lost: list[str] = []
        at = repaired = 0
        while at < len(texts):
            event, was_mended, used = _event(texts, at, layout)
            if event is not None:
                readable.append(event)
                repaired += was_mended
            elif at == len(texts) - 1 and texts[at].count(b"{") > texts[at].count(b"}"):
                raise Unsafe("an event was cut where another one seemed to begin")
            else:
                lost.append(_kind(texts[at]))
            at += used
        self.taken += len(lost)
        self.seen.lost.update(lost)
        self.seen.mended += repaired
        return readable

    def _rewrite(self, event: RawEvent, gpus: frozenset[bytes]) -> None:
        raw = bytes(event.get("pid", b"0"))
        label, pid, _ = self.ids.of(raw)
        self.seen.events[label] += 1
        event["pid"] = msgspec.Raw(b"%d" % pid)
        if (tid := _thread_of(event)) is not None:
            self.seen.threads.add((pid, tid))
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
            what = _TEXT.decode(event["name"])
            args = _ARGS.decode(event["args"])
            refuse_deep(args)
        except (KeyError, *UNDECODABLE):
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
            if (tid := _thread_of(event)) is not None:
                self.seen.named_threads.add((pid, tid))
        else:
            return
        event["args"] = msgspec.Raw(msgspec.json.encode(args))


def _thread_of(event: RawEvent) -> int | None:
    """Its thread, where that is a number."""
    tid = bytes(event.get("tid", b""))
    return int(tid) if tid.isdigit() and len(tid) <= 18 else None


def _threads(events: bytes) -> set[tuple[int, int]]:
    """The (process, thread) pairs with numeric threads."""
    decoded = _THREADS.decode(b"".join((b"[", events, b"]")))
    return {(event.pid, event.tid) for event in decoded if isinstance(event.tid, int)}


def sort_index(rank_number: int, place: int) -> int:
    """Where a rank's process stands: behind the summary, by rank, the GPU first."""
    return 1000 + rank_number * 10 + place


def _gpu_processes(events: list[RawEvent]) -> frozenset[bytes]:
    """Pids (JSON text) that the profiler labelled as a GPU."""
    pids = set()
    for event in events:
        labels = bytes(event.get("name", b"")) == b'"process_labels"'
        if labels and _GPU_LABEL.search(bytes(event.get("args", b""))):
            pids.add(bytes(event.get("pid", b"")))
    return frozenset(pids)


def _event(texts: list[bytes], at: int, layout: Layout) -> tuple[RawEvent | None, bool, int]:
    """The event at `at`, whether it was mended, and how many texts it took."""
    text = texts[at]
    event = _whole(text)
    if event is not None:
        return event, False, 1
    escaped = _with_escaped_name(text)
    for candidate in (mended(text), escaped, mended(escaped)):
        event = _whole(candidate)
        if event is not None:
            return event, True, 1
    if at + 1 < len(texts):  # a list of objects inside the event looks like two events
        comma = layout.between[1 : layout.open_at]
        event = _whole(text + comma + texts[at + 1])
        if event is not None:
            return event, False, 2
    return None, False, 1


def _with_escaped_name(text: bytes) -> bytes:
    def escaped(match: re.Match[bytes]) -> bytes:
        return (
            match[1] + _UNESCAPED.sub(lambda character: b"\\" + character[0], match[2]) + match[3]
        )

    return _NAME.sub(escaped, text, count=1)


def _whole(text: bytes) -> RawEvent | None:
    try:
        text.decode()
        decoded: list[RawEvent] = _SLOW.decode(b"[" + text + b"]")
    except UNDECODABLE:
        return None
    return decoded[0] if len(decoded) == 1 else None


def _kind(text: bytes) -> str:
    category = _CATEGORY.search(text)
    return f"{category[1].decode('utf-8', 'replace')} events" if category else "other events"


# Process ids, flow ids and times that stay apart when traces of many ranks become one.
#
# Perfetto keeps a process id in 32 bits, and two ranks' files use the same small ones for
# their GPUs. So each rank has a prefix of three digits that is put before every id of it:
# `83` of rank number 1 becomes `10183`. Text such as `"Spans"` becomes a number above all
# that Linux gives to processes.


FIRST_PREFIX = 100
MAX_RANKS = 328  # 427 followed by seven digits is the last that fits into 32 bits
_NAMED = 9_000_000  # Linux gives process ids up to 4,194,304
_NUMBER = re.compile(r"0|[1-9][0-9]{0,6}")
_FLOW = re.compile(rb"\d{1,15}$")
_MERGED_PID = re.compile(r"^\[[^\]]*\] ?")


class RankNumbers:
    """The place of each rank in the result; ranks that nobody announced come last."""

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self._numbers: dict[str, int] = {}
        for label in labels:
            self.number(label)

    @property
    def labels(self) -> tuple[str, ...]:
        """All ranks, in their order."""
        return tuple(self._numbers)

    def number(self, label: str) -> int:
        """0 for the first rank. Raises TraceError for more than 328 ranks."""
        number = self._numbers.setdefault(label, len(self._numbers))
        if number >= MAX_RANKS:
            raise TraceError(
                f"{label} is rank number {number + 1} of one merged file",
                expected=f"at most {MAX_RANKS} ranks, since Perfetto's process ids have 32 bits",
                hint="merge fewer ranks, for example one node's",
            )
        return number

    def prefix(self, label: str) -> bytes:
        """The three digits before every id of a rank."""
        return b"%d" % (FIRST_PREFIX + self.number(label))


class ProcessIds:
    """New process ids of one file. `default`: the rank of pids that name none."""

    def __init__(self, numbers: RankNumbers, default: str) -> None:
        self._numbers = numbers
        self._default = default
        self._known: dict[bytes, tuple[str, int, str]] = {}
        self._named: dict[str, int] = {}

    def of(self, raw: bytes) -> tuple[str, int, str]:
        """(rank, new pid, the name that a textual pid was) of a pid's JSON text."""
        known = self._known.get(raw)
        if known is None:
            known = self._known[raw] = self._new(raw)
        return known

    @property
    def all(self) -> list[tuple[str, int, str]]:
        """What `of` has answered so far."""
        return list(self._known.values())

    def _new(self, raw: bytes) -> tuple[str, int, str]:
        named = rank_of_pid(raw)
        label = named or self._default
        prefix = int(self._numbers.prefix(label))
        text = string_of(raw)
        if named:
            text = _MERGED_PID.sub("", text)
        if _NUMBER.fullmatch(text) and int(text) < _NAMED:
            return label, int(f"{prefix}{text}"), ""
        place = self._named.setdefault(text, len(self._named))
        return label, prefix * 10_000_000 + _NAMED + place, text


def was_text(pid: int) -> bool:
    """Whether a new process id stands for a textual one."""
    return pid >= 10**9 and pid % 10_000_000 >= _NAMED


def flow_id(prefix: bytes, raw: bytes) -> bytes:
    """The JSON text of a flow's id, apart from those of other ranks."""
    if _FLOW.match(raw):
        return prefix + raw
    return msgspec.json.encode(f"{prefix.decode()}-{raw.decode('utf-8', 'replace')}")


def shifted(raw: bytes, shift_ns: int) -> bytes | None:
    """A time in µs, `shift_ns` later, exact to the ns; None for text that is no time."""
    time = ns(raw)
    if time is None:
        return None
    time += shift_ns
    sign = b"-" if time < 0 else b""
    return sign + b"%d.%03d" % divmod(abs(time), 1000)
