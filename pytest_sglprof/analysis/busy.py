"""Busy time: the length of the union of activities, where those of a rank may overlap."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def busy_parts(owner: Ints, start: Ints, dur: Ints) -> Ints:
    """What each activity adds to the busy time of its owner, ns, shape of the input.

    owner: a number for each set of activities to unite (say, a rank's step). start, dur:
    ns. The parts of one owner sum to the length of the union of its activities.
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
    """Which activities overlap another one of their owner; sorted by owner, then start."""
    begin, _, before = _one_line(owner, start, dur)
    joins: Mask = begin < before  # it begins before one that began earlier has ended
    found = joins.copy()
    # What overlaps a later one overlaps the next one first.
    found[:-1] |= joins[1:]
    return found


def _one_line(owner: Ints, start: Ints, dur: Ints) -> tuple[Ints, Ints, Ints]:
    """Begin, end, and the latest end before, owners one after the other on one line.

    So one running maximum serves all of them.
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
