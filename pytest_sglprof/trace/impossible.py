"""Durations that cannot be true: a stream runs its kernels in order.

A kernel that contains a whole later kernel of its stream was not measured but made up
(seen in real traces). Short overlaps are programmatic dependent launch and are fine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_sglprof.trace.arrays import Flags, Ints


def timelines(device: npt.NDArray[Any], stream: npt.NDArray[Any]) -> Ints:
    """A number for each stream of each device; -1 where one of them is not known."""
    known = (device >= 0) & (device < 2**15) & (stream >= 0) & (stream < 2**32)
    return np.where(known, (device.astype(np.int64) << 32) + stream, -1)


def impossible_rows(start: Ints, dur: Ints, timeline: Ints, graph: Flags) -> Flags:
    """Rows (sorted by timeline, then start) that contain a whole later row of their timeline.

    Short overlaps are programmatic dependent launch and stay; so do nodes of graphs, and
    rows of no known timeline (-1).
    """
    return contains_later(start + dur, timeline) & (timeline >= 0) & ~graph


def contains_later(end: Ints, stream: Ints) -> Flags:
    """Rows (sorted by stream, then start) that contain a whole later row of their stream."""
    bad = np.zeros(len(end), dtype=bool)
    edges = np.flatnonzero(np.diff(stream)) + 1
    for first, last in zip([0, *edges], [*edges, len(end)], strict=True):
        if last - first > 1:
            # The earliest end of all later rows: it lies inside when any of them does.
            earliest = np.minimum.accumulate(end[first + 1 : last][::-1])[::-1]
            bad[first : last - 1] = earliest < end[first : last - 1]
    return bad


def excluded(durations: Ints) -> str:
    """The note on kernels that were left out, from their durations (ns)."""
    return (
        f"excluded {len(durations)} kernels ({int(durations.sum()) / 1e6:.3f} ms) that contain a "
        "whole later kernel of their own stream, which is impossible"
    )
