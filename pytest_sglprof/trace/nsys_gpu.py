"""GPU activities of an nsys report: kernels, copies and sets, with their launches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pytest_sglprof.trace.arrays import Flags, Ints, first_of
from pytest_sglprof.trace.impossible import contains_later, excluded
from pytest_sglprof.trace.nsys_ranks import Owner
from pytest_sglprof.trace.nsys_schema import (
    KINDS,
    PREFIX,
    activity_name,
    skipped,
    table_of,
    whole_graphs,
)
from pytest_sglprof.trace.nsys_tables import MISSING, ReportTables, coded, pid_of, process_of

_COLUMNS = ("start", "end", "deviceId", "streamId", "globalPid", "correlationId", "graphNodeId")


@dataclass(frozen=True)
class GpuRows:
    """Activities, arrays of shape (rows,). Times in ns; MISSING, or -1 for stream and device.

    process: globalPid. kind, name: codes into KINDS and names. correlation: the id that
    the launch has as well. graph: a node of a CUDA graph.
    """

    start: Ints
    dur: Ints
    device: Ints
    stream: Ints
    process: Ints
    correlation: Ints
    graph: Flags
    kind: Ints
    name: Ints
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.start)

    def owners(self) -> frozenset[tuple[int, int]]:
        """Every (pid, device) that has a row."""
        pairs = np.unique((pid_of(self.process) << 32) + self.device + 1).tolist()
        return frozenset((pair >> 32, (pair & 0xFFFFFFFF) - 1) for pair in pairs)

    def of_owners(self, owners: Iterable[Owner]) -> Ints:
        """The indices of the rows of these owners."""
        pid = pid_of(self.process)
        chosen = np.zeros(len(self), dtype=bool)
        for owner in owners:
            chosen |= (pid == owner.pid) & (self.device == owner.device)
        return np.flatnonzero(chosen)


def read_gpu_rows(tables: ReportTables) -> GpuRows:
    """All GPU activities, without those that have no time or an impossible one."""
    code_of: dict[str, int] = {}
    parts = []
    for number, kind in enumerate(KINDS):
        extra = {"kernel": ("demangledName", "shortName"), "memcpy": ("copyKind",)}.get(kind, ())
        read = tables.integers(table_of(kind), (*_COLUMNS, *extra))
        names = _names(tables, kind, read[len(_COLUMNS) :], read.shape[1], code_of)
        kinds = np.full(read.shape[1], number, dtype=np.int64)
        parts.append(np.vstack([read[: len(_COLUMNS)], kinds, names]))
    start, end, device, stream, process, correlation, node, kinds, names = np.hstack(parts)
    timed = (start != MISSING) & (end != MISSING) & (end >= start)
    notes = []
    if not timed.all():
        notes.append(skipped(int((~timed).sum())))
    graph = (node != MISSING) & (node != 0)
    group = np.zeros(len(start), dtype=np.int64)
    for part in (process, device, stream):
        distinct, codes = coded(part)
        group = group * len(distinct) + codes
    bad = impossible(start, end, group, (kinds == 0) & ~graph & timed)
    if bad.any():
        notes.append(excluded((end - start)[bad]))
    keep = timed & ~bad
    return GpuRows(
        start=start[keep],
        dur=(end - start)[keep],
        device=np.where(device < 0, -1, device)[keep],
        stream=np.where(stream < 0, -1, stream)[keep],
        process=process[keep],
        correlation=correlation[keep],
        graph=graph[keep],
        kind=kinds[keep],
        name=names[keep],
        names=tuple(code_of),
        notes=tuple(notes),
    )


def impossible(start: Ints, end: Ints, group: Ints, candidate: Flags) -> Flags:
    """Which candidates contain a whole candidate of their group that starts later.

    Nodes of graphs run side by side, so they are no candidates.
    """
    bad = np.zeros(len(start), dtype=bool)
    rows = np.flatnonzero(candidate)
    rows = rows[np.lexsort((end[rows], start[rows], group[rows]))]
    bad[rows] = contains_later(end[rows], group[rows])
    return bad


def launch_times(tables: ReportTables, rows: GpuRows) -> Ints:
    """When the CPU launched each row (ns); MISSING where no launch was recorded."""
    launched = np.full(len(rows), MISSING, dtype=np.int64)
    columns = ("start", "globalTid", "correlationId")
    start, thread, correlation = tables.integers(PREFIX + "RUNTIME", columns)
    process = process_of(thread)
    for one in np.unique(rows.process[rows.process != MISSING]):
        calls = np.flatnonzero((process == process_of(one)) & (correlation != MISSING))
        # A runtime call and the driver call inside it share their id: the first one counts.
        calls = calls[np.lexsort((start[calls], correlation[calls]))]
        mine = np.flatnonzero((rows.process == one) & (rows.correlation != MISSING))
        at = first_of(correlation[calls], rows.correlation[mine])
        launched[mine[at >= 0]] = start[calls[at[at >= 0]]]
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
    timed = (start != MISSING) & (end != MISSING)
    total = int((end - start)[timed].sum())
    note = whole_graphs(len(start), total)
    pairs = zip(pid_of(process).tolist(), np.where(device < 0, -1, device).tolist(), strict=True)
    return WholeGraphs(frozenset(pairs), (note,))


def _names(
    tables: ReportTables, kind: str, extra: Ints, count: int, code_of: dict[str, int]
) -> Ints:
    """One code a row; adds the names to `code_of`."""
    if kind == "memset":
        keys = np.zeros(count, dtype=np.int64)
    elif kind == "memcpy":
        keys = extra[0]
    else:
        keys = np.where(extra[0] != MISSING, extra[0], extra[1])
    distinct, at = coded(keys)
    numbers = [int(key) for key in distinct]
    texts = tables.strings(n for n in numbers if n != MISSING) if kind == "kernel" else {}
    names = [activity_name(kind, number, texts) for number in numbers]
    codes = np.array([code_of.setdefault(name, len(code_of)) for name in names], dtype=np.int64)
    return codes[at]
