"""Kineto traces of the torch profiler, as SGLang writes them: one file a rank, or merged.

Times are converted to integer ns from the text of the file; floats are never summed. A file
is used only when its end was reached and every checksum was right, unless `allow_partial`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import msgspec
import numpy as np

from pytest_sglprof.errors import NotATrace, TraceError, TraceTruncated
from pytest_sglprof.trace.arrays import Ints
from pytest_sglprof.trace.collective_calls import CollectiveCalls, numbered
from pytest_sglprof.trace.file_rank import rank_of_file, rank_of_pid
from pytest_sglprof.trace.gpu_steps import TraceSteps
from pytest_sglprof.trace.impossible import excluded, impossible_rows, timelines
from pytest_sglprof.trace.inflate import inflated
from pytest_sglprof.trace.interruptions import Call, interruption, with_interruptions
from pytest_sglprof.trace.kineto import (
    ANNOUNCEMENT,
    KERNEL,
    KIND_OF_CATEGORY,
    KINDS,
    LAUNCH,
    OPERATORS,
    Annotation,
    CallArgs,
    arguments,
    communicates,
)
from pytest_sglprof.trace.repair import Unrepairable, repaired
from pytest_sglprof.trace.self_time import self_times
from pytest_sglprof.trace.steps import Launches, with_graph_share
from pytest_sglprof.trace.table import RankActivities, Step
from pytest_sglprof.trace.times import LARGEST_NS, ns, unfit

GPU_KINDS = {name.lower(): kind for name, kind in KIND_OF_CATEGORY.items() if kind != LAUNCH}
LAUNCHES = frozenset({"cuda_runtime", "cuda_driver", "hip_runtime", "runtime", "driver"})
SPANS = frozenset({"user_annotation", "gpu_user_annotation"})
COMMUNICATION = ("gloo:", "nccl:", "mpi:")
SUBMITTED = "c10d::"  # asynchronous: their time is that of submitting, not of communicating


class _Event(msgspec.Struct, gc=False):
    ph: str | None = ""
    cat: str | None = ""
    name: str | int | float | bool | None = ""
    ts: msgspec.Raw = msgspec.Raw(b"")
    dur: msgspec.Raw = msgspec.Raw(b"")
    pid: msgspec.Raw = msgspec.Raw(b"")
    tid: msgspec.Raw = msgspec.Raw(b"")
    args: msgspec.Raw = msgspec.Raw(b"")


class _Trace(msgspec.Struct):
    events: list[_Event] | None = msgspec.field(name="traceEvents", default=None)
    base: msgspec.Raw = msgspec.field(name="baseTimeNanoseconds", default=msgspec.Raw(b""))
    distributed: msgspec.Raw = msgspec.field(name="distributedInfo", default=msgspec.Raw(b""))


_DECODER = msgspec.json.Decoder(_Trace)


@dataclass
class _Collected:
    """What was found of one owner (one process of a merged file, or the whole file)."""

    names: dict[str, int] = field(default_factory=dict)
    gpu: list[tuple[int, int, int, int, int, int, bool, int, int]] = field(default_factory=list)
    calls: list[CallArgs] = field(default_factory=list)
    sequences: dict[int, int] = field(default_factory=dict)
    operators: list[tuple[int, int, int, str]] = field(default_factory=list)
    communication: list[tuple[int, int, int]] = field(default_factory=list)
    annotations: list[Annotation] = field(default_factory=list)
    launches: Launches = field(default_factory=Launches)
    interruptions: list[Call] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)

    def code(self, name: str) -> int:
        """Index of a name in this owner's table of names."""
        return self.names.setdefault(name, len(self.names))


def read_trace(path: Path, *, allow_partial: bool = False) -> list[RankActivities]:
    """The activities of each rank in one file; ranks of SGLang's merged files are split.

    Raises `NotATrace`, `TraceTruncated` or `TraceError`, all naming the file.
    """
    trace, notes, partial = _decode(path, allow_partial)
    base, unclear = base_time(path, bytes(trace.base))
    notes = [*notes, *unclear]

    @cache
    def rank_of_others() -> str:
        label, contradiction = rank_of_file(path, bytes(trace.distributed))
        notes.extend(contradiction)
        return label

    owners = _collect(trace, rank_of_others) or {rank_of_others(): _Collected()}
    gpu = any(found.gpu for found in owners.values())
    return [
        _activities(label, found, base, notes, partial, gpu=gpu) for label, found in owners.items()
    ]


def _decode(path: Path, allow_partial: bool) -> tuple[_Trace, list[str], bool]:
    notes: list[str] = []
    data, partial = inflated(path, partial=allow_partial)
    try:
        if not data.isascii():
            data.decode()  # in keys that are not asked for, msgspec takes any bytes
        trace = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        trace, notes, cut = _decode_repaired(path, bytes(data), error, allow_partial)
        partial = partial or cut
    if trace.events is None:
        raise NotATrace(
            f"{path} is JSON, but not a trace: it has no traceEvents",
            expected="a Kineto trace of the torch profiler",
            hint="give the *.trace.json.gz files that the server wrote",
        )
    if partial:
        notes = [*notes, f"{path.name}: truncated; only what stands before its end was read"]
    return trace, notes, partial


def _decode_repaired(
    path: Path, data: bytes, error: Exception, allow_partial: bool
) -> tuple[_Trace, list[str], bool]:
    try:
        fixed = repaired(data)
    except Unrepairable as reason:
        raise _refusal(path, data, f"{error}; {reason}") from error
    if fixed.cut and not allow_partial:
        raise _cut(path)
    try:
        trace = _DECODER.decode(fixed.data)
    except (msgspec.DecodeError, UnicodeDecodeError) as second:
        raise _refusal(path, data, str(second)) from error
    note = f"{path.name}: invalid JSON; {fixed.skipped} events that cannot be read were skipped"
    return trace, [note], fixed.cut


def _cut(path: Path) -> TraceTruncated:
    return TraceTruncated(
        f"{path} ends in the middle of its JSON",
        expected="a complete file; the profiler writes it in place and grows it",
        hint="wait until the profiler is done, or read what is there with allow_partial=True",
    )


def _refusal(path: Path, data: bytes, why: str) -> TraceError:
    """The error of a file that no way of reading understands."""
    if b'"traceEvents"' not in data:
        return NotATrace(
            f"{path} is not a trace: {why}",
            expected="a Kineto trace of the torch profiler (JSON)",
            hint="give the *.trace.json.gz files that the server wrote",
        )
    if not data.rstrip().endswith(b"}"):
        return _cut(path)
    return TraceError(
        f"{path} is not valid JSON: {why}",
        expected="a Kineto trace of the torch profiler (JSON), at least its GPU events",
        hint="record the window again with with_stack=False",
    )


def _collect(trace: _Trace, rank_of_others: Callable[[], str]) -> dict[str, _Collected]:
    """By rank; rank_of_others: that of events whose process names none."""
    owners: dict[str, _Collected] = {}
    by_pid: dict[bytes, str] = {}
    for event in trace.events or ():
        pid = bytes(event.pid)
        owner = by_pid.get(pid)
        if owner is None:
            owner = by_pid[pid] = rank_of_pid(pid)
            if owner:  # a rank of a merged file, even when it did nothing
                owners.setdefault(owner, _Collected())
        category = (event.cat or "").lower()
        wanted = category in GPU_KINDS or category in SPANS or category in OPERATORS
        if event.ph != "X" or not (wanted or category in LAUNCHES):
            continue
        _add(owners.setdefault(owner or rank_of_others(), _Collected()), event, category)
    return owners


def _add(into: _Collected, event: _Event, category: str) -> None:
    start = ns(event.ts)
    dur = ns(event.dur)
    if start is None or dur is None or unfit(start, dur):
        if category not in LAUNCHES:
            key = f"{category} events with {unfit(start, dur)} time"
            into.skipped[key] = into.skipped.get(key, 0) + 1
        return
    name = str(event.name)
    if category in GPU_KINDS:
        args = arguments(event.args)
        kind = GPU_KINDS[category]
        graph = args.graph_node != 0
        call = _call_number(into, args, name)
        code, device = into.code(name), args.device
        into.gpu.append(
            (code, kind, start, dur, args.stream, args.correlation, graph, device, call)
        )
    elif category in SPANS:
        thread = bytes(event.tid).decode("ascii", "replace")
        gpu = category == "gpu_user_annotation"
        if name.startswith(COMMUNICATION) and not gpu:
            into.communication.append((into.code(name), start, dur))
        else:
            external = arguments(event.args).external
            into.annotations.append(
                Annotation(0, name, start, dur, gpu, thread.strip('"'), external)
            )
    elif category in LAUNCHES:
        into.launches.add(arguments(event.args).correlation, start)
        if what := interruption(name):
            into.interruptions.append((start, what))
    elif not name.startswith(SUBMITTED):
        if name == ANNOUNCEMENT:
            told = arguments(event.args)
            if told.external >= 0 <= told.sequence:
                into.sequences[told.external] = told.sequence
        thread = bytes(event.tid).decode("ascii", "replace")
        into.operators.append((into.code(name), start, dur, thread))


def _call_number(into: _Collected, args: CallArgs, name: str) -> int:
    """Index of a kernel in `calls`; -1 for one whose process group is not told."""
    if not args.group or not communicates(name):
        return -1
    into.calls.append(args)
    return len(into.calls) - 1


def base_time(path: Path, raw: bytes) -> tuple[int, list[str]]:
    """ns to add to every time, which newer files write relative to this."""
    text = raw.decode("ascii", "replace").strip('" ')
    if text.isdecimal() and int(text[:19]) < LARGEST_NS and len(text) <= 19:
        return int(text), []
    if text in ("", "null"):
        return 0, []
    note = f"{path.name}: baseTimeNanoseconds {text[:40]} is no time; this rank's clock is its own"
    return 0, [note]


def _activities(
    label: str, found: _Collected, base: int, notes: Sequence[str], partial: bool, *, gpu: bool
) -> RankActivities:
    """gpu: the file has GPU activities; a rank of it without any did nothing there."""
    own = [*notes, *(f"{label}: skipped {n} {what}" for what, n in found.skipped.items())]
    steps = TraceSteps(found.annotations)
    entries = steps.steps
    calls = None
    if gpu:
        columns, entries, more, calls = _gpu_columns(label, found, steps)
        own += more
        kinds: tuple[str, ...] = KINDS[:LAUNCH]
    else:
        columns, kinds = _cpu_columns(found, steps), ("op", "collective")
    code, kind, start, dur, stream, step = columns
    entries, more = with_interruptions(label, entries, found.interruptions)
    own += more
    return RankActivities(
        rank=label,
        names=list(found.names),
        name_codes=code,
        kinds=kinds,
        kind_codes=kind,
        start=start + base,
        dur=dur,
        stream=stream,
        step=step,
        steps=[entry.shifted(base) for entry in entries],
        source="gpu" if gpu else "cpu_op",
        notes=own,
        partial=partial,
        calls=calls,
    )


Columns = tuple[Ints, Ints, Ints, Ints, Ints, Ints]


def _gpu_columns(
    label: str, found: _Collected, steps: TraceSteps
) -> tuple[Columns, tuple[Step, ...], list[str], CollectiveCalls | None]:
    table = np.array(found.gpu, dtype=np.int64).reshape(-1, 9)
    where = timelines(table[:, 7], table[:, 4])
    order = np.lexsort((-table[:, 3], table[:, 2], where))
    table, where = table[order], where[order]
    impossible = impossible_rows(table[:, 2], table[:, 3], where, table[:, 6] > 0)
    notes = []
    if impossible.any():
        notes.append(f"{label}: {excluded(table[impossible, 3])}")
        table = table[~impossible]
    launched = found.launches.times(table[:, 5])
    step = steps.of_gpu(table[:, 2], table[:, 4], launched)
    entries = with_graph_share(steps.steps, step, table[:, 1] == KERNEL, table[:, 6] > 0)
    code, kind, start, dur, stream = (np.ascontiguousarray(table[:, n]) for n in range(5))
    calls = _calls(found, table[:, 8])
    return (code, kind, start, dur, stream, step), entries, notes, calls


def _calls(found: _Collected, number: Ints) -> CollectiveCalls | None:
    """number: of each row in `found.calls`, -1 for none."""
    row = np.flatnonzero(number >= 0)
    if not len(row):
        return None
    mine = [found.calls[at] for at in number[row].tolist()]
    return CollectiveCalls(
        row=row.astype(np.int64),
        group=[call.group for call in mine],
        sequence=numbered(
            [call.sequence for call in mine], [call.external for call in mine], found.sequences
        ),
    )


def _cpu_columns(found: _Collected, steps: TraceSteps) -> Columns:
    own = self_times([(start, dur, thread) for _, start, dur, thread in found.operators])
    rows = [
        (code, 0, start, self_dur)
        for (code, start, _, _), self_dur in zip(found.operators, own, strict=True)
    ]
    rows += [(code, 1, start, dur) for code, start, dur in found.communication]
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    code, kind, start, dur = (np.ascontiguousarray(table[:, n]) for n in range(4))
    return code, kind, start, dur, np.full(len(table), -1, dtype=np.int64), steps.of_time(start)
