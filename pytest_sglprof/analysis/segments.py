"""Sync segments: what each rank did between two consecutive matched collectives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from pytest_sglprof.analysis.busy import busy_parts
from pytest_sglprof.analysis.waits import Waits
from pytest_sglprof.trace.kernels import NOT_COMPUTE

if TYPE_CHECKING:
    from pytest_sglprof.trace.table import KernelTable

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """The segments of one sync group, one before each matched collective but the first.

    rows: positions in the table's frame of the compute that lies in a segment. rank,
    segment: of each of those rows, indices into the group's ranks and the segments. busy:
    what each adds to its rank's busy time, ns. span: from the end of the one collective to
    the start of the next, shape (segments, ranks), ns, each on the rank's own clock.
    """

    waits: Waits
    rows: Ints
    rank: Ints
    segment: Ints
    busy: Ints
    span: Ints

    @cached_property
    def compute(self) -> Ints:
        """Busy time of compute, shape (segments, ranks), ns."""
        return self.sums(self.busy)

    def sums(self, values: Ints) -> Ints:
        """`values` of the rows summed by segment and rank, shape (segments, ranks)."""
        full = np.zeros(self.span.shape, np.int64)
        np.add.at(full, (self.segment, self.rank), values)
        return full


def segments(table: KernelTable, waits: Waits) -> Segments:
    """The segments between the collectives of `waits`; none without any."""
    frame = table.frame
    codes = pd.Index(waits.group.ranks).get_indexer(pd.Index(frame["rank"].astype(object)))
    compute = ~frame["category"].isin(NOT_COMPUTE).to_numpy(bool) & (codes >= 0)
    rows = np.flatnonzero(compute).astype(np.int64)
    rank = codes[rows].astype(np.int64)
    start = frame["start_ns"].to_numpy(np.int64)[rows]
    # A rank that runs collectives on two streams may start one before the last has ended.
    arrived = np.maximum.accumulate(waits.start, axis=0)
    before = np.full(len(rows), -1, np.int64)
    for number in range(len(waits.group.ranks)):
        mine = rank == number
        before[mine] = np.searchsorted(arrived[:, number], start[mine], side="right") - 1
    inside = (before >= 0) & (before < len(waits.step) - 1)
    rows, rank, segment = rows[inside], rank[inside], before[inside]
    dur = frame["dur_ns"].to_numpy(np.int64)[rows]
    busy = dur
    if table.is_timeline:  # self times are no intervals of a timeline: those are summed
        owner = segment * len(waits.group.ranks) + rank
        busy = busy_parts(owner, frame["start_ns"].to_numpy(np.int64)[rows], dur)
    span = np.maximum(0, waits.start[1:] - waits.end[:-1])
    return Segments(waits, rows, rank, segment, busy, span)


def sync_factor(sums: Ints) -> float | None:
    """λ_sync = Σ max / Σ mean over segments, of a matrix (segments, ranks); None of nothing."""
    mean = float(sums.mean(axis=1).sum()) if sums.size else 0.0
    return float(sums.max(axis=1).sum() / mean) if mean else None
