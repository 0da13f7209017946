"""The rows of an nsys report that hold kernels: process, device and stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pytest_sglprof.trace.nsys_ranks import Owner, label_owners
from pytest_sglprof.trace.nsys_report import opened
from pytest_sglprof.trace.nsys_tables import pid_of

_COLUMNS = ("globalPid", "deviceId", "streamId", "start", "end")


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
    path: Path, *, pid_ranks: Mapping[int, str] | None = None, nsys: str | None = None
) -> list[StreamRow]:
    """All streams with kernels, by process and device, the busiest stream first.

    pid_ranks: the rank of a process id; without it a row is labelled as the kernel table
    labels it. Raises what `read_report` raises.
    """
    with opened(path, nsys) as tables:
        process, device, stream, start, end = tables.integers(
            "CUPTI_ACTIVITY_KIND_KERNEL", _COLUMNS
        )
    keys = np.stack([pid_of(process), device, stream], axis=1)
    distinct, place = np.unique(keys, axis=0, return_inverse=True)
    counts = np.bincount(place.ravel(), minlength=len(distinct))
    totals = np.zeros(len(distinct), np.int64)
    np.add.at(totals, place.ravel(), end - start)
    found = distinct.tolist()
    owners = sorted({Owner(pid, device) for pid, device, _ in found})
    recorded = {owner.pid for owner in owners}
    labels, _ = label_owners(owners, pid_ranks=pid_ranks or {}, gpu_ranks={}, recorded=recorded)
    rows = [
        StreamRow(labels[Owner(pid, device)], pid, device, stream, int(count), int(total))
        for (pid, device, stream), count, total in zip(found, counts, totals, strict=True)
    ]
    return sorted(rows, key=lambda row: (row.pid, row.device, -row.total_ns, row.stream))
