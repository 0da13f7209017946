"""Read the rows of an nsys report: GPU activities, NVTX ranges, and which rank they belong to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pytest_sglprof._trace.completeness import GRAPH_LAUNCH, KERNEL_LAUNCH
from pytest_sglprof._trace.nsys.database import (
    KINDS,
    MISSING,
    PREFIX,
    Owner,
    activity_name,
    skipped,
    table_of,
    whole_graphs,
)
from pytest_sglprof._trace.nsys.tables import ReportTables, coded, pid_of, process_of, usable
from pytest_sglprof._trace.steps import contains_later, excluded
from pytest_sglprof._trace.table import UNKNOWN_STAGE, Flags, Ints, Step, first_of

_COLUMNS = ("start", "end", "deviceId", "streamId", "globalPid", "graphNodeId")
_CORRELATED = ("correlationId", "graphId")
_NAMED = {"kernel": ("demangledName",), "memcpy": ("copyKind",), "memset": ()}


@dataclass(frozen=True)
class GpuRows:
    """Activities, arrays of shape (rows,). Times in ns; MISSING, or -1 for stream and device.

    process: globalPid. kind, name: codes into KINDS and names. correlation: the id that
    the launch has as well. graph: a node of a CUDA graph. graph_id: that of its graph, MISSING if
    not known. unusable: the (pid, device) pairs
    of a report all of whose rows were left out, so that somebody is there to tell it of.
    """

    start: Ints
    dur: Ints
    device: Ints
    stream: Ints
    process: Ints
    correlation: Ints
    graph: Flags
    graph_id: Ints
    kind: Ints
    name: Ints
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unusable: frozenset[tuple[int, int]] = frozenset()

    def __len__(self) -> int:
        return len(self.start)

    def owners(self) -> frozenset[tuple[int, int]]:
        """Every (pid, device) that has a row."""
        return _owners(self.process, self.device)

    def of_owners(self, owners: Iterable[Owner]) -> Ints:
        """The indices of the rows of these owners."""
        pid = pid_of(self.process)
        chosen = np.zeros(len(self), dtype=bool)
        for owner in owners:
            chosen |= (pid == owner.pid) & (self.device == owner.device)
        return np.flatnonzero(chosen)


def read_gpu_rows(tables: ReportTables, *, correlated: bool = True) -> GpuRows:
    """All GPU activities, without those that have no time or an impossible one.

    correlated: whether the ids of launches and graphs are asked for; they are MISSING where not.
    """
    code_of: dict[str, int] = {}
    columns: list[list[Ints]] = [[] for _ in range(len(_COLUMNS) + 4)]
    for number, kind in enumerate(KINDS):
        asked = (*_COLUMNS, *(_CORRELATED if correlated else ()), *_NAMED[kind])
        read = dict(zip(asked, tables.integers(table_of(kind), asked), strict=True))
        count = len(read["start"])
        launch = (read.get(c, np.full(count, MISSING, np.int64)) for c in _CORRELATED)
        kinds = np.full(count, number, dtype=np.int64)
        keys = [read[column] for column in _NAMED[kind]] or [np.zeros(count, dtype=np.int64)]
        names = _names(tables, kind, keys[0], code_of)
        for parts, part in zip(
            columns, (*(read[c] for c in _COLUMNS), *launch, kinds, names), strict=True
        ):
            parts.append(part)
    start, end, device, stream, process, node, correlation, graph_id, kinds, names = (
        _joined(parts) for parts in columns
    )
    timed, untimed = usable(start, end)
    notes = skipped(*untimed)
    graph = (node != MISSING) & (node != 0)
    group = np.zeros(len(start), dtype=np.int64)
    for part in (process, device, stream):
        distinct, codes = coded(part)
        group = group * len(distinct) + codes
    candidate = (kinds == 0) & ~graph & timed
    bad = impossible(start, end, group, candidate)
    if bad.any():  # Or they are of two contexts, which each have their stream 7: seldom asked for.
        (context,) = tables.integers(table_of(KINDS[0]), ["contextId"])
        contexts, codes = coded(context)
        group[: len(codes)] = group[: len(codes)] * len(contexts) + codes  # kernels come first
        bad = impossible(start, end, group, candidate)
    if bad.any():
        notes.append(excluded((end - start)[bad]))
    device = np.maximum(device, -1)
    keep = timed & ~bad
    chosen = slice(None) if keep.all() else keep  # a slice copies nothing
    return GpuRows(
        start=start[chosen],
        dur=(end - start)[chosen],
        device=device[chosen],
        stream=np.maximum(stream, -1)[chosen],
        process=process[chosen],
        correlation=correlation[chosen],
        graph=graph[chosen],
        graph_id=graph_id[chosen],
        kind=kinds[chosen],
        name=names[chosen],
        names=tuple(code_of),
        notes=tuple(notes),
        unusable=frozenset() if keep.any() else _owners(process, device),
    )


def _owners(process: Ints, device: Ints) -> frozenset[tuple[int, int]]:
    devices, at = coded(device)
    pairs = np.unique(pid_of(process) * len(devices) + at)
    pids, at = np.divmod(pairs, max(len(devices), 1))
    return frozenset(zip(pids.tolist(), devices[at].tolist(), strict=True))


def _joined(parts: list[Ints]) -> Ints:
    """One column; the parts are given up, for memory's sake."""
    filled = [part for part in parts if len(part)]
    parts.clear()
    return filled[0] if len(filled) == 1 else np.concatenate([*filled, np.empty(0, np.int64)])


def impossible(start: Ints, end: Ints, group: Ints, candidate: Flags) -> Flags:
    """Which candidates contain a whole candidate of their group that starts later.

    Nodes of graphs run side by side, so they are no candidates.
    """
    bad = np.zeros(len(start), dtype=bool)
    rows = np.flatnonzero(candidate)
    rows = rows[np.lexsort((end[rows], start[rows], group[rows]))]
    bad[rows] = contains_later(end[rows], group[rows])
    return bad


@dataclass(frozen=True)
class Calls:
    """Calls of CUDA, ordered by process and correlation id; arrays of shape (calls,).

    start: ns. process: globalPid. is_kernel, is_graph: whether it launches one kernel, or a graph.
    """

    start: Ints
    process: Ints
    correlation: Ints
    is_kernel: Flags
    is_graph: Flags

    def of_process(self, process: int) -> slice:
        """The calls of a process."""
        first, end = np.searchsorted(self.process, [process, process + 1])
        return slice(int(first), int(end))


def read_calls(tables: ReportTables) -> Calls:
    """All calls of a report. Of those with one id (the driver's inside the runtime's) the first."""
    columns = ("start", "globalTid", "correlationId", "nameId")
    start, thread, correlation, name = tables.integers(PREFIX + "RUNTIME", columns)
    ids = np.unique(name)
    texts = tables.strings(int(number) for number in ids if number != MISSING)
    is_kernel, is_graph = (
        np.isin(name, [number for number, text in texts.items() if call.match(text)])
        for call in (KERNEL_LAUNCH, GRAPH_LAUNCH)
    )
    process = process_of(thread)
    order = np.flatnonzero((correlation != MISSING) & (start != MISSING))
    order = order[np.lexsort((start[order], correlation[order], process[order]))]
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(process[order]) != 0) | (np.diff(correlation[order]) != 0)
    order = order[first]
    return Calls(
        start[order], process[order], correlation[order], is_kernel[order], is_graph[order]
    )


def launch_times(calls: Calls, rows: GpuRows) -> Ints:
    """When the CPU launched each row (ns); MISSING where no launch was recorded."""
    launched = np.full(len(rows), MISSING, dtype=np.int64)
    for one in np.unique(rows.process[rows.process != MISSING]):
        of_process = calls.of_process(int(process_of(one)))
        at_process = np.flatnonzero((rows.process == one) & (rows.correlation != MISSING))
        at = first_of(calls.correlation[of_process], rows.correlation[at_process])
        launched[at_process[at >= 0]] = calls.start[of_process][at[at >= 0]]
    return launched


@dataclass(frozen=True)
class WholeGraphs:
    """Launches of CUDA graphs without their kernels. owners: their (pid, device) pairs."""

    owners: frozenset[tuple[int, int]] = frozenset()
    notes: tuple[str, ...] = ()


def read_whole_graphs(tables: ReportTables) -> WholeGraphs:
    """What `--cuda-graph-trace=graph` leaves instead of kernels."""
    columns = ("start", "end", "globalPid", "deviceId")
    start, end, process, device = tables.integers(PREFIX + "GRAPH_TRACE", columns)
    if not len(start):
        return WholeGraphs()
    timed, _ = usable(start, end)
    total = int((end - start)[timed].sum())
    note = whole_graphs(len(start), total)
    pairs = zip(pid_of(process).tolist(), np.where(device < 0, -1, device).tolist(), strict=True)
    return WholeGraphs(frozenset(pairs), (note,))


def _names(tables: ReportTables, kind: str, keys: Ints, code_of: dict[str, int]) -> Ints:
    """One code a row; adds the names to `code_of`."""
    if kind == "kernel" and (keys == MISSING).any():
        (short,) = tables.integers(table_of(kind), ["shortName"])
        keys = np.where(keys != MISSING, keys, short) if len(short) else keys
    distinct, at = coded(keys)
    numbers = [int(key) for key in distinct]
    texts = tables.strings(n for n in numbers if n != MISSING) if kind == "kernel" else {}
    names = [activity_name(kind, number, texts) for number in numbers]
    codes = np.array([code_of.setdefault(name, len(code_of)) for name in names], dtype=np.int64)
    return codes[at]


# NVTX ranges: the scheduler's batches are steps, all others have a self time.

RUN_BATCH = "scheduler.run_batch"  # SGLang with SGLANG_ENABLE_NVTX_SCHEDULER=1
PUSH_POP, START_END = 59, 60  # ENUM_NSYS_EVENT_TYPE


@dataclass(frozen=True)
class Ranges:
    """Finished ranges, arrays of shape (ranges,). Times in ns.

    thread: globalTid. nests: of push and pop, so it nests within its thread. name: codes
    into names. notes: what was left out.
    """

    start: Ints
    dur: Ints
    thread: Ints
    nests: Flags
    name: Ints
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def take(self, chosen: Flags | Ints) -> Ranges:
        """The ranges that `chosen` (a mask or indices) selects."""
        return Ranges(
            start=self.start[chosen],
            dur=self.dur[chosen],
            thread=self.thread[chosen],
            nests=self.nests[chosen],
            name=self.name[chosen],
            names=self.names,
        )

    def of_pids(self, pids: Iterable[int]) -> Ranges:
        """The ranges of these processes."""
        return self.take(np.isin(pid_of(self.thread), list(pids)))


def read_ranges(tables: ReportTables) -> Ranges:
    """All push/pop and start/end ranges of a report; marks and domains are not ranges."""
    columns = ("start", "end", "eventType", "globalTid", "textId")
    start, end, kind, thread, text_id = tables.integers("NVTX_EVENTS", columns)
    text_code, names = tables.texts("NVTX_EVENTS", "text")
    wanted = (kind == PUSH_POP) | (kind == START_END)
    done = wanted & usable(start, end)[0]
    code = text_code if len(text_code) else np.full(len(start), -1, dtype=np.int64)
    lost = int(wanted.sum() - done.sum())
    registered = np.where(code < 0, text_id, MISSING)[done]
    ids, at = coded(registered)
    texts = tables.strings(int(number) for number in ids if number != MISSING)
    code_of = {name: number for number, name in enumerate(names)}
    codes = [code_of.setdefault(texts.get(int(number), ""), len(code_of)) for number in ids]
    code = np.where(code[done] < 0, np.array(codes, dtype=np.int64)[at], code[done])
    return Ranges(
        start=start[done],
        dur=end[done] - start[done],
        thread=thread[done],
        nests=kind[done] == PUSH_POP,
        name=code,
        names=tuple(name or "unnamed" for name in code_of),
        notes=(f"skipped {lost} NVTX ranges without an end",) if lost else (),
    )


def run_batches(ranges: Ranges) -> tuple[Step, ...]:
    """The steps of one rank: its outermost `scheduler.run_batch` ranges, in order of start."""
    if RUN_BATCH not in ranges.names:
        return ()
    batches = ranges.take(ranges.name == ranges.names.index(RUN_BATCH))
    batches = batches.take(np.lexsort((-batches.dur, batches.start)))
    steps: list[Step] = []
    for start, dur in zip(batches.start.tolist(), batches.dur.tolist(), strict=True):
        if not steps or start >= steps[-1].end_ns:
            steps.append(Step(len(steps), UNKNOWN_STAGE, start, start + dur))
    return tuple(steps)


# Find the rank of each process in an nsys report.
#
# nsys cuts process titles to 15 characters, which are the same for every scheduler. So the rank
# comes from what was known while the server ran, and a note says what was used.
