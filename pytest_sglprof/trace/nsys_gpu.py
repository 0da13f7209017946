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
from pytest_sglprof.trace.nsys_tables import (
    MISSING,
    ReportTables,
    coded,
    pid_of,
    process_of,
    usable,
)

_COLUMNS = ("start", "end", "deviceId", "streamId", "globalPid", "graphNodeId")
_NAMED = {"kernel": ("demangledName",), "memcpy": ("copyKind",), "memset": ()}


@dataclass(frozen=True)
class GpuRows:
    """Activities, arrays of shape (rows,). Times in ns; MISSING, or -1 for stream and device.

    process: globalPid. kind, name: codes into KINDS and names. correlation: the id that
    the launch has as well. graph: a node of a CUDA graph. unusable: the (pid, device) pairs
    of a report all of whose rows were left out, so that somebody is there to tell it of.
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

    correlated: whether correlation ids are asked for; they are MISSING where not.
    """
    code_of: dict[str, int] = {}
    columns: list[list[Ints]] = [[] for _ in range(len(_COLUMNS) + 3)]
    for number, kind in enumerate(KINDS):
        asked = (*_COLUMNS, *(["correlationId"] if correlated else ()), *_NAMED[kind])
        read = dict(zip(asked, tables.integers(table_of(kind), asked), strict=True))
        count = len(read["start"])
        correlation = read.get("correlationId", np.full(count, MISSING, dtype=np.int64))
        kinds = np.full(count, number, dtype=np.int64)
        keys = [read[column] for column in _NAMED[kind]] or [np.zeros(count, dtype=np.int64)]
        names = _names(tables, kind, keys[0], code_of)
        for parts, part in zip(
            columns, (*(read[c] for c in _COLUMNS), correlation, kinds, names), strict=True
        ):
            parts.append(part)
    start, end, device, stream, process, node, correlation, kinds, names = (
        _joined(parts) for parts in columns
    )
    timed, untimed = usable(start, end)
    notes = skipped(*untimed)
    graph = (node != MISSING) & (node != 0)
    group = np.zeros(len(start), dtype=np.int64)
    for part in (process, device, stream):
        distinct, codes = coded(part)
        group = group * len(distinct) + codes
    bad = impossible(start, end, group, (kinds == 0) & ~graph & timed)
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
        kind=kinds[chosen],
        name=names[chosen],
        names=tuple(code_of),
        notes=tuple(notes),
        unusable=frozenset() if keep.any() else _owners(process, device),
    )


def _owners(process: Ints, device: Ints) -> frozenset[tuple[int, int]]:
    pairs = np.unique((pid_of(process) << 32) + device + 1).tolist()
    return frozenset((pair >> 32, (pair & 0xFFFFFFFF) - 1) for pair in pairs)


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


def launch_times(tables: ReportTables, rows: GpuRows) -> Ints:
    """When the CPU launched each row (ns); MISSING where no launch was recorded."""
    launched = np.full(len(rows), MISSING, dtype=np.int64)
    columns = ("start", "globalTid", "correlationId")
    start, thread, correlation = tables.integers(PREFIX + "RUNTIME", columns)
    process = process_of(thread)
    for one in np.unique(rows.process[rows.process != MISSING]):
        known = (correlation != MISSING) & (start != MISSING)
        calls = np.flatnonzero((process == process_of(one)) & known)
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
