"""Busy time: the length of the union of a rank's activities, which may overlap.

`BusyTimes` sums the activities once and then answers for any choice of kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def busy_parts(owner: Ints, start: Ints, dur: Ints) -> Ints:
    """How much each activity adds to the busy time of its owner, ns, shape (activities,).

    owner: the number of the set that the activity belongs to, say a step of a rank. start,
    dur: ns. The parts of one owner sum to the length of the union of its activities.
    """
    order = np.lexsort((start, owner))
    parts = np.zeros(len(start), np.int64)
    parts[order] = parts_in_order(owner[order], start[order], dur[order])
    return parts


def parts_in_order(owner: Ints, start: Ints, dur: Ints) -> Ints:
    """`busy_parts` of activities that are sorted by owner, then start."""
    begin, end, before = _one_line(owner, start, dur)
    parts: Ints = np.maximum(0, end - np.maximum(begin, before))
    return parts


def crowded(owner: Ints, start: Ints, dur: Ints) -> Mask:
    """Mask of activities that overlap another of their owner; sorted by owner, then start."""
    begin, _, before = _one_line(owner, start, dur)
    joins: Mask = begin < before  # it begins before one that began earlier has ended
    overlapping = joins.copy()
    # An activity that overlaps any later one also overlaps the very next one.
    overlapping[:-1] |= joins[1:]
    return overlapping


def _one_line(owner: Ints, start: Ints, dur: Ints) -> tuple[Ints, Ints, Ints]:
    """Begin, end and latest earlier end of each activity, with the owners laid end to end.

    Shifting the owners apart in time lets one running maximum serve all of them.
    """
    if not len(start):
        return start, start, start
    number = np.cumsum(np.diff(owner, prepend=owner[0]) != 0)
    first = start[np.flatnonzero(np.diff(owner, prepend=owner[0] - 1))]
    begin = start - first[number]
    shift = number * (int((begin + dur).max()) + 1)
    begin = begin + shift
    end = begin + dur
    before = np.concatenate((np.zeros(1, np.int64), np.maximum.accumulate(end)[:-1]))
    return begin, end, before


# Kernel time and busy time by owner, for any choice of kernels. An activity that overlaps no
# other adds its duration to the busy time, whichever kernels are chosen; only the overlapping
# ones must be united again for each choice.


@dataclass(frozen=True)
class Activities:
    """Parallel columns: kernel and owner (a rank's step, say) as indices; start, dur in ns."""

    kernel: Ints
    owner: Ints
    start: Ints
    dur: Ints

    def take(self, chosen: Ints | Mask) -> Activities:
        """The rows that a mask or indices select."""
        return Activities(*(values[chosen] for values in vars(self).values()))


@dataclass(frozen=True)
class BusyTimes:
    """Times of activities, by kernel and owner.

    owners: number of owners. A cell is one kernel of one owner: `kernel` and `owner` are
    its indices, `count` its number of activities, `ns` its kernel time, `alone` the busy time
    of that kernel alone. Cells are
    sorted by kernel; those of kernel k are `bounds[k]:bounds[k+1]`. crowd: the activities that
    overlap another of the same owner, sorted by owner, then start.
    """

    owners: int
    kernel: Ints
    owner: Ints
    count: Ints
    ns: Ints
    alone: Ints
    bounds: Ints
    crowd: Activities

    def cells_of(self, kernels: Mask) -> slice | Mask:
        """Selects the cells of the chosen kernels; a slice, so no copy, for a single kernel."""
        chosen = np.flatnonzero(kernels)
        if len(chosen) == 1:
            return slice(int(self.bounds[chosen[0]]), int(self.bounds[chosen[0] + 1]))
        return kernels[self.kernel]

    def kernel_time(self, kernels: Mask) -> Ints:
        """Sum of the durations of the chosen kernels, shape (owners,), ns."""
        cells = self.cells_of(kernels)
        return _sums(self.owner[cells], self.ns[cells], self.owners)

    def counts(self, kernels: Mask) -> Ints:
        """Number of activities of the chosen kernels, shape (owners,)."""
        cells = self.cells_of(kernels)
        return _sums(self.owner[cells], self.count[cells], self.owners)

    def busy(self, kernels: Mask) -> Ints:
        """Length of the union of the chosen kernels' activities, shape (owners,), ns."""
        cells = self.cells_of(kernels)
        if isinstance(cells, slice):
            return _sums(self.owner[cells], self.alone[cells], self.owners)
        total = _sums(self.owner[cells], self.ns[cells], self.owners)
        crowd = self.crowd.take(kernels[self.crowd.kernel])
        over = crowd.dur - parts_in_order(crowd.owner, crowd.start, crowd.dur)
        return total - _sums(crowd.owner, over, self.owners)


def busy_times(rows: Activities, kernels: int, owners: int, *, is_timeline: bool) -> BusyTimes:
    """Sums activities. kernels, owners: the number of each.

    is_timeline: False for self times, which are not intervals on a timeline: busy time is
    then kernel time.
    """
    key = rows.kernel * owners + rows.owner
    order = np.argsort(key, kind="stable")
    cells = key[order]
    first = np.flatnonzero(np.diff(cells, prepend=-1))
    ns = np.add.reduceat(rows.dur[order], first) if len(first) else np.zeros(0, np.int64)
    cells = cells[first]
    crowd = _crowd(rows) if is_timeline else rows.take(np.zeros(0, np.int64))
    alone = ns
    if len(crowd.owner):
        key_of_crowd = crowd.kernel * owners + crowd.owner
        over = crowd.dur - busy_parts(key_of_crowd, crowd.start, crowd.dur)
        alone = ns - _sums(np.searchsorted(cells, key_of_crowd), over, len(cells))
    return BusyTimes(
        owners=owners,
        kernel=cells // max(1, owners),
        owner=cells % max(1, owners),
        count=np.diff(first, append=len(order)),
        ns=ns,
        alone=alone,
        bounds=np.searchsorted(cells, owners * np.arange(kernels + 1, dtype=np.int64)),
        crowd=crowd,
    )


def _crowd(rows: Activities) -> Activities:
    if ((np.diff(rows.owner) < 0) | ((np.diff(rows.owner) == 0) & (np.diff(rows.start) < 0))).any():
        rows = rows.take(np.lexsort((rows.start, rows.owner)))
    return rows.take(crowded(rows.owner, rows.start, rows.dur))


def _sums(at: Ints, ns: Ints, size: int) -> Ints:
    """`ns` summed by index, shape (size,); exact, as sums stay below 2**53 ns (104 days)."""
    return np.rint(np.bincount(at, weights=ns, minlength=size)).astype(np.int64)
