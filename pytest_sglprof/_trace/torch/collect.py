"""Gathers what scanning a torch trace finds, and hands it on in batches.

The scan of a file fills one `Collector`; full batches go to `emit` at once, so memory
stays flat however large the file is. Names become codes of the file's own name table.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from pytest_sglprof._trace.torch.events import (
    ANNOUNCEMENT,
    COLLECTIVE,
    COMMUNICATION,
    CPU_SPAN,
    FLOAT_LIMIT,
    GPU_KINDS,
    GPU_SPAN,
    KIND_OF_CATEGORY,
    LAUNCH,
    LONGEST_NS,
    OPERATOR,
    SUBMITTED,
    Annotation,
    Args,
    Batch,
    Event,
    FileFacts,
    FullEvent,
    ProcessName,
    arguments,
    communicates,
    ns,
    unfit,
)

BATCH = 8192  # activities; about 380 KB


# Calls that start nothing on a GPU and interrupt no step: half of all calls, as a rule.
_IDLE_CALL = re.compile(
    r"(cuda|cu|hip)(Event[A-Z]\w+|Device(Get|Can|Synch)\w+|(Get|Set)Device\w*|Occupancy\w+"
    r"|(Peek|Get)\w*LastError|(Func|Pointer)(Get|Set)Attributes?"
    r"|Stream(GetCaptureInfo|GetPriority|IsCapturing|Query|Synchronize|WaitEvent))(_ptsz|_v\d+)*"
)


class IdleCalls(dict[str, bool]):
    """The name of a call -> whether it does nothing that is looked for."""

    def __missing__(self, name: str) -> bool:
        self[name] = _IDLE_CALL.fullmatch(name) is not None
        return self[name]


class NeedsText(Exception):
    """Stamps are too large for float64: read this file by its text."""


class Interner(dict[str, int]):
    """text -> number, numbered in order of appearance."""

    def __missing__(self, text: str) -> int:
        code = len(self)
        self[text] = code
        return code


class _Names(Interner):
    """communicate: the names of kernels that may belong to a process group."""

    def __init__(self) -> None:
        super().__init__()
        self.communicate: set[str] = set()

    def __missing__(self, text: str) -> int:
        if communicates(text):
            self.communicate.add(text)
        return super().__missing__(text)


class ScanRequest(msgspec.Struct, frozen=True):
    """What to take from a file. kinds: of `KINDS`. partial: a truncated file is allowed.

    sequences: numbers of collectives; a scan for these costs a fifth of a scan for kernels.
    """

    kinds: frozenset[int] = GPU_KINDS
    partial: bool = False
    sequences: bool = False


class _Columns(NamedTuple):
    """The fields of many events."""

    category: list[str]
    name: list[str]
    ts: list[Any]  # float
    dur: list[Any]  # float
    args: list[Args]


def _columns(events: Sequence[Event]) -> _Columns:
    return _Columns(
        [event.cat for event in events],
        [event.name for event in events],
        [event.ts for event in events],
        [event.dur for event in events],
        [event.args for event in events],
    )


def _extend_alike(column: array[int], values: list[int]) -> None:
    """Adds values that are nearly always all the same: counting is quicker than converting."""
    if values.count(values[0]) == len(values):
        column.extend(array(column.typecode, values[:1]) * len(values))
    else:
        column.fromlist(values)


def _new_batch(*, exact: bool) -> Batch:
    time = "q" if exact else "d"
    return Batch(
        exact=exact,
        start=array(time),
        dur=array(time),
        name=array("i"),
        kind=array("b"),
        stream=array("q"),
        correlation=array("q"),
        graph=array("b"),
        device=array("h"),
        context=array("q"),
        owner=array("h"),
        call_row=array("i"),
        call_group=array("i"),
        call_sequence=array("q"),
        call_external=array("q"),
        call_operation=array("i"),
        call_size=array("q"),
    )


class Collector:
    """Takes events, keeps codes and counts, emits batches."""

    def __init__(self, request: ScanRequest, emit: Callable[[Batch], None]) -> None:
        self.request = request
        self.facts = FileFacts()
        self._emit = emit
        self.kinds = {
            name: kind for name, kind in KIND_OF_CATEGORY.items() if kind in request.kinds
        }
        self._names = _Names()
        self.idle = IdleCalls()
        self._owners = Interner()
        self._groups = Interner()
        self._operations = Interner()
        self._threads = Interner()
        self._quick = _new_batch(exact=False)
        self._exact = _new_batch(exact=True)

    def add_quick(self, events: Sequence[Event], kinds: Mapping[str, int]) -> None:
        """Adds GPU events with float times. Raises NeedsText when those are too large.

        kinds: category -> kind of those that are taken.
        """
        columns = _columns(events)
        longest = max(columns.dur) * 1000.0
        if max(columns.ts) >= FLOAT_LIMIT or longest >= LONGEST_NS or min(columns.ts) < 0.0:
            raise NeedsText
        if min(columns.dur) < 0.0 or not kinds.keys() >= set(columns.category):
            columns = _columns(self._fitting(events, kinds))
        if not columns.ts:
            return
        try:
            self._extend_quick(columns, bytes(map(kinds.__getitem__, columns.category)))
        except OverflowError:  # a number that is no id; by text it counts as absent
            raise NeedsText from None
        if self._names.communicate:
            self._add_calls(columns)
        if len(self._quick) >= BATCH:
            self._emit(self._quick)
            self._quick = _new_batch(exact=False)

    def _fitting(self, events: Sequence[Event], kinds: Mapping[str, int]) -> list[Event]:
        wanted = [event for event in events if event.cat in kinds]
        for event in wanted:
            if event.dur < 0.0 and kinds[event.cat] != LAUNCH:
                absent = event.dur == float("-inf")
                self._count_unfit(event.cat, unfit(0, None if absent else -1), None)
        return [event for event in wanted if event.dur >= 0.0]

    def _extend_quick(self, columns: _Columns, kind: bytes) -> None:
        # Whole columns by fromlist or frombytes: this is the hottest path.
        names, args = self._names, columns.args
        size = len(args)
        batch = self._quick
        batch.start.fromlist(columns.ts)
        batch.dur.fromlist(columns.dur)
        batch.name.fromlist(list(map(names.__getitem__, columns.name)))
        batch.kind.frombytes(kind)
        batch.stream.fromlist([entry.stream for entry in args])
        batch.correlation.fromlist([entry.correlation for entry in args])
        _extend_alike(batch.graph, [entry.graph_node != 0 for entry in args])
        _extend_alike(batch.device, [entry.device for entry in args])
        _extend_alike(batch.context, [entry.context for entry in args])
        batch.owner.extend(array("h", [self._owners[""]]) * size)

    def _add_calls(self, columns: _Columns) -> None:
        batch, communicate = self._quick, self._names.communicate
        first = len(batch) - len(columns.name)
        for at in [at for at, name in enumerate(columns.name) if name in communicate]:
            self._add_call(batch, first + at, columns.name[at], columns.args[at])

    def _add_call(self, batch: Batch, row: int, name: str, args: Args) -> None:
        if not args.group or name not in self._names.communicate:
            return
        batch.call_row.append(row)
        batch.call_group.append(self._groups[args.group])
        batch.call_sequence.append(args.sequence)
        batch.call_external.append(args.external)
        batch.call_operation.append(self._operations[args.operation])
        batch.call_size.append(args.size)

    def _count_unfit(self, category: str, what: str, pid: object) -> None:
        if category not in self.kinds:
            return
        key = self._owner(pid), f"{category.lower()} events with {what} time"
        self.facts.skipped[key] = self.facts.skipped.get(key, 0) + 1

    def add_full(self, event: FullEvent) -> None:
        """Adds one event by its text: activity, launch, step, or nothing of interest."""
        spans = event.cat in (CPU_SPAN, GPU_SPAN) and event.name.startswith("step[")
        kind = self.kinds.get(event.cat)
        if event.ph != "X" or not (spans or kind is not None):
            return
        start, dur = ns(event.ts), ns(event.dur)
        if start is None or dur is None or unfit(start, dur):
            if kind != LAUNCH:
                self._count_unfit(event.cat, unfit(start, dur), event.pid)
            return
        if spans:
            self._add_step(event, start, dur)
        elif kind == COLLECTIVE:
            if event.cat == CPU_SPAN and event.name.startswith(COMMUNICATION):
                self._add_row(event, kind, start, dur, Args())
        elif kind == OPERATOR:
            if not event.name.startswith(SUBMITTED):
                thread = Args(stream=self._threads[str(event.tid)])
                self._add_row(event, kind, start, dur, thread)
        elif kind is not None and not (kind == LAUNCH and self.idle[event.name]):
            self._add_row(event, kind, start, dur, arguments(event.args))

    def _add_step(self, event: FullEvent, start: int, dur: int) -> None:
        self.facts.annotations.append(
            Annotation(
                owner=self._owner(event.pid),
                name=event.name,
                start=start,
                dur=dur,
                gpu=event.cat == GPU_SPAN,
                thread=str(event.tid),
                external=arguments(event.args).external,
            )
        )

    def _add_row(self, event: FullEvent, kind: int, start: int, dur: int, args: Args) -> None:
        batch = self._exact
        batch.start.append(start)
        batch.dur.append(dur)
        batch.name.append(self._names[event.name])
        batch.kind.append(kind)
        batch.stream.append(args.stream)
        batch.correlation.append(args.correlation)
        batch.graph.append(args.graph_node != 0)
        batch.device.append(args.device if 0 <= args.device < 2**15 else -1)
        batch.context.append(args.context)
        batch.owner.append(self._owner(event.pid))
        self._add_call(batch, len(batch) - 1, event.name, args)
        if len(batch) >= BATCH:
            self._emit(batch)
            self._exact = _new_batch(exact=True)

    def add_announced(self, event: FullEvent) -> None:
        """Adds the number of a collective in its process group."""
        is_operator = KIND_OF_CATEGORY.get(event.cat) == OPERATOR
        if event.ph != "X" or not is_operator or event.name != ANNOUNCEMENT:
            return
        args = arguments(event.args)
        if args.external >= 0 <= args.sequence:
            self.facts.sequences[self._owner(event.pid), args.external] = args.sequence

    def add_process(self, event: ProcessName) -> None:
        """Adds a rank of a merged file, even when it did nothing."""
        if isinstance(event.pid, str):
            self._owner(event.pid)

    def _owner(self, pid: object) -> int:
        """The code of a merged file's pid (``[TP00-DP01] 83``), else of ""."""
        return self._owners[pid if isinstance(pid, str) and pid.startswith("[") else ""]

    def finish(self) -> FileFacts:
        """Emits the rest; the facts of the file."""
        for batch in (self._quick, self._exact):
            if len(batch):
                self._emit(batch)
        self.facts.names = list(self._names)
        self.facts.owners = list(self._owners) or [""]
        self.facts.groups = list(self._groups)
        self.facts.operations = list(self._operations)
        return self.facts
