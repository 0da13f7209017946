"""Busy time: the length of the union of activities, where those of a rank may overlap."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def busy_parts(owner: Ints, start: Ints, dur: Ints) -> Ints:
    """What each activity adds to the busy time of its owner, ns, shape of the input.

    owner: a number for each set of activities to unite (say, a rank's step). start, dur:
    ns. The parts of one owner sum to the length of the union of its activities.
    """
    parts = np.zeros(len(start), np.int64)
    if not len(start):
        return parts
    order = np.lexsort((start, owner))
    owners = owner[order]
    begin = start[order] - start.min()
    end = begin + dur[order]
    # Owners one after the other on a line, so that one running maximum serves all.
    number = np.cumsum(np.diff(owners, prepend=owners[0]) != 0)
    shift = number * (int(end.max()) + 1)
    reached = np.maximum.accumulate(end + shift)
    before = np.concatenate((np.zeros(1, np.int64), reached[:-1]))
    parts[order] = np.maximum(0, end + shift - np.maximum(begin + shift, before))
    return parts
