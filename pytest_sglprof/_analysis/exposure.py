"""Waiting that costs nothing, since the rank computes meanwhile on another stream.

With two batches in turn, or with experts on a stream of their own, a rank that has entered a
collective goes on computing. Only the waiting that is left exposed is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pytest_sglprof._analysis.busy import Ints
from pytest_sglprof._trace.categories import NOT_COMPUTE

if TYPE_CHECKING:
    from pytest_sglprof._trace.table import KernelTable

Floats = npt.NDArray[np.float64]


def computing(
    table: KernelTable, ranks: Sequence[str], stream: Ints, start: Ints, length: Floats
) -> Floats:
    """How long each rank computes on other streams in intervals of its collectives, ns.

    stream: of each collective, -1 if unknown; start, length: of the interval; shapes
    (collectives, ranks). What runs on the stream of the collective itself waits for it.
    """
    beneath = np.zeros(start.shape)
    if not table.is_timeline:
        return beneath
    columns = (table.frame[name].to_numpy(np.int64) for name in ("stream", "start_ns", "dur_ns"))
    streams, begin, dur = columns
    for column, label in enumerate(ranks):
        rows = table.places[label]
        category = table.frame["category"].iloc[rows]
        rows = rows[~category.isin(NOT_COMPUTE).to_numpy(bool) & (streams[rows] >= 0)]
        for number in np.unique(stream[:, column]).tolist():
            others = rows[streams[rows] != number]
            if number < 0 or not len(others):
                continue
            at = stream[:, column] == number
            first = start[at, column]
            edges, busy = _busy_until(begin[others], dur[others])
            spans = (first, first + length[at, column])
            before, after = (np.interp(each - edges[0], edges - edges[0], busy) for each in spans)
            beneath[at, column] = after - before
    return beneath


def _busy_until(start: Ints, dur: Ints) -> tuple[Ints, Ints]:
    """Times, and the busy time until each of them, between which it grows evenly."""
    order = np.argsort(start, kind="stable")
    start = start[order]
    reached = np.maximum.accumulate(start + dur[order])
    begins = np.flatnonzero(np.append(True, start[1:] > reached[:-1]))
    begin, end = start[begins], np.append(reached[begins[1:] - 1], reached[-1])
    length = end - begin
    until = np.cumsum(length)
    edges: Ints = np.stack([begin, end], axis=1).ravel()
    busy: Ints = np.stack([until - length, until], axis=1).ravel()
    return edges, busy
