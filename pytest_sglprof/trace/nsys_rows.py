"""The rows of an nsys report that hold kernels: process, device and stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pytest_sglprof.trace.nsys_gpu import read_gpu_rows
from pytest_sglprof.trace.nsys_ranks import Owner, label_owners
from pytest_sglprof.trace.nsys_report import opened
from pytest_sglprof.trace.nsys_schema import KINDS
from pytest_sglprof.trace.nsys_tables import pid_of


@dataclass(frozen=True)
class StreamRow:
    """One stream of one process. total_ns: sum of its kernels' durations."""

    rank: str
    pid: int
    device: int
    stream: int
    kernels: int
    total_ns: int


def stream_rows(
    path: Path,
    *,
    pid_ranks: Mapping[int, str] | None = None,
    nsys: str | None = None,
    notes: list[str] | None = None,
) -> list[StreamRow]:
    """All streams with kernels, by process and device, the busiest stream first.

    Counted are the kernels that the kernel table holds. pid_ranks: the rank of a process id;
    without it a row is labelled as the kernel table labels it. notes: gets what was left
    out. Raises what `read_report` raises.
    """
    with opened(path, nsys) as tables:
        rows = read_gpu_rows(tables, correlated=False)
    if notes is not None:
        notes += rows.notes
    kernels = rows.kind == KINDS.index("kernel")
    columns = (pid_of(rows.process), rows.device, rows.stream)
    keys = np.stack([column[kernels] for column in columns], axis=1)
    distinct, place = np.unique(keys, axis=0, return_inverse=True)
    counts = np.bincount(place.ravel(), minlength=len(distinct))
    totals = np.zeros(len(distinct), np.int64)
    np.add.at(totals, place.ravel(), rows.dur[kernels])
    streams = distinct.tolist()
    owners = sorted({Owner(pid, device) for pid, device, _ in streams})
    recorded = {owner.pid for owner in owners}
    labels, _ = label_owners(owners, pid_ranks=pid_ranks or {}, gpu_ranks={}, recorded=recorded)
    summed = [
        StreamRow(labels[Owner(pid, device)], pid, device, stream, int(count), int(total))
        for (pid, device, stream), count, total in zip(streams, counts, totals, strict=True)
    ]
    return sorted(summed, key=lambda row: (row.pid, row.device, -row.total_ns, row.stream))
